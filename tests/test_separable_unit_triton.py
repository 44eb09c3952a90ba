"""The Triton launchers of separable_unit against float64: interpreted on the CPU, compiled where there is a GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are Triton's, and Triton is not installed")

from cases import assert_accurate, typical_sum, upstream_gradient
from odn_fast.kernels import separable_unit
from odn_fast.reference import separable_unit as reference
from test_separable_unit import flat, grouped, leaves, make_inputs, plain

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
UNITS = {  # (N, C_in, C_out, H, W), skip, stride
    "identity": ((2, 16, 16, 5, 4), "identity", 1),
    "no_skip": ((2, 3, 17, 5, 4), "none", 2),
    "projection": ((2, 17, 16, 4, 5), "projection", 1),
    "pooled": ((2, 16, 32, 5, 6), "projection", 2),
    "pooled_twice": ((3, 3, 16, 7, 6), "projection", 4),
}


def on(device, inputs):
    return grouped([tensor.to(device) for tensor in flat(inputs)])


def forward_and_backward(module, inputs, identity, stride, grad_y, x_needs_grad=True):
    """([y, *means, *variances], gradients of x and all parameters), on the CPU."""
    y, means, variances, zs, z_means = module.separable_unit_train(*inputs, identity, stride, EPS)
    gradients = module.separable_unit_train_backward(
        grad_y.to(y).expand(y.shape), *inputs, y, zs, z_means, variances, identity, stride, EPS, x_needs_grad
    )
    results = [y, *means, *variances], flat(gradients)
    return [[tensor.cpu() for tensor in tensors] for tensors in results]


def check_accuracy(unit, dtype, parameter_dtype, layout="channels_last"):
    inputs, identity, stride = make_inputs(unit, dtype, layout, parameter_dtype, parameter_dtype)
    settings = {"identity": identity, "stride": stride, "eps": EPS}
    exact = leaves(inputs, torch.float64)
    grad_y = upstream_gradient(plain(*exact, **settings, relu=False)[0].detach(), dtype, layout)
    ours, true = (
        forward_and_backward(module, tensors, identity, stride, grad_y)
        for module, tensors in ((separable_unit, on(DEVICE, inputs)), (reference, [*map_to_double(inputs)]))
    )
    unfused_inputs = leaves(inputs)
    y, means, variances = plain(*unfused_inputs, **settings)
    gradients = torch.autograd.grad(y, flat(unfused_inputs), grad_y.to(y.dtype))
    unfused = [y.detach(), *means, *variances], gradients
    assert ours[0][0].dtype == dtype and ours[0][0].is_contiguous(memory_format=torch.channels_last)
    largest = max(variance.max().item() for variance in true[0][1 + len(means) :])
    for index, triple in enumerate(zip(ours[0], unfused[0], true[0], strict=True)):
        assert_accurate(*triple, dtype, largest**0.5 if 1 <= index <= len(means) else 0.0)
    summand = typical_sum(grad_y, torch.cat(true[0][1 + len(means) :]))
    for tensor, *triple in zip(flat(inputs), ours[1], unfused[1], true[1], strict=True):
        assert triple[0].dtype == tensor.dtype and triple[0].shape == tensor.shape
        assert_accurate(*triple, torch.float32, 0.0 if tensor is inputs[0] else summand)
    without = forward_and_backward(separable_unit, on(DEVICE, inputs), identity, stride, grad_y, False)[1]
    assert without[0].shape == (0,)
    for triple in zip(without[1:], unfused[1][1:], true[1][1:], strict=True):
        assert_accurate(*triple, torch.float32, summand)


def map_to_double(inputs):
    return grouped([tensor.double() for tensor in flat(inputs)])


@pytest.mark.parametrize("unit", UNITS)
def test_accuracy(unit):
    check_accuracy(UNITS[unit], torch.float32, torch.float32)


@pytest.mark.parametrize("unit, parameter_dtype", [("identity", torch.float32), ("pooled", torch.bfloat16)], ids=str)
def test_accuracy_in_bfloat16(unit, parameter_dtype):
    check_accuracy(UNITS[unit], torch.bfloat16, parameter_dtype)


def test_parameters_of_several_dtypes():
    """Every gradient is in its own parameter's."""
    inputs, identity, stride = make_inputs(UNITS["pooled"])
    for group in inputs[1:]:
        group[-1] = group[-1].bfloat16()
    y, _, variances, zs, z_means = separable_unit.separable_unit_train(*on(DEVICE, inputs), identity, stride, EPS)
    gradients = separable_unit.separable_unit_train_backward(
        y, *on(DEVICE, inputs), y, zs, z_means, variances, identity, stride, EPS, True
    )
    assert [gradient.dtype for gradient in flat(gradients)] == [tensor.dtype for tensor in flat(inputs)]


def test_a_layout_that_is_not_dense():
    check_accuracy(UNITS["pooled"], torch.float32, torch.float32, "channel_slice")


@pytest.mark.parametrize("unit", ["identity", "pooled"])
def test_empty_batch(unit):
    (_, *sizes), skip, stride = UNITS[unit]
    inputs, identity, stride = make_inputs(UNITS[unit])
    inputs = on(DEVICE, inputs)
    inputs[0] = inputs[0][:0]
    ours, true = (
        forward_and_backward(module, inputs, identity, stride, torch.ones(1, 1, 1, 1))
        for module in (separable_unit, reference)
    )
    for one, other in zip(flat(ours), flat(true), strict=True):
        torch.testing.assert_close(one, other)


def test_why_not():
    inputs, identity, stride = make_inputs(UNITS["pooled"])
    inputs = on(DEVICE, inputs)
    assert separable_unit.why_not("separable_unit_train", *inputs, identity, stride, EPS) == []
    y, _, variances, zs, z_means = separable_unit.separable_unit_train(*inputs, identity, stride, EPS)
    saved = (y, zs, z_means, variances, identity, stride, EPS, True)
    assert separable_unit.why_not("separable_unit_train_backward", y, *inputs, *saved) == []
    inputs[3][0] = inputs[3][0].double()
    for function, arguments in (
        ("separable_unit_train", (*inputs, identity, stride, EPS)),
        ("separable_unit_train_backward", (y, *inputs, *saved)),
    ):
        assert separable_unit.why_not(function, *arguments) == [
            "skip[0] is torch.float64; the Triton kernels take torch.float32 and torch.bfloat16"
        ]
