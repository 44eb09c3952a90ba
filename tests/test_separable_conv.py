"""separable_conv: every implementation against float64, and as a citizen of PyTorch's dispatcher.

Where rounding decides on the side of zero on which a ReLU's argument falls, the upstream gradient is zero
(`upstream_gradient`), so that the largest errors of all gradients can be compared.
"""

import itertools
import re
from operator import itemgetter

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from cases import (
    FLOATING,
    GPU,
    LAYOUTS,
    ON_CPU,
    OPCHECK,
    SEPARABLE_SHAPES,
    assert_accurate,
    assert_unchanged,
    autocast,
    has_kernel,
    leaves,
    names_device,
    plain_separable_conv,
    run,
    separable_parameters,
    typical_sum,
    upstream_gradient,
)
from odn_fast.ops import separable_conv_train
from odn_fast.reference import separable_conv as reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

op = torch.ops.odn_fast.separable_conv_train.default
backward_op = torch.ops.odn_fast.separable_conv_train_backward.default
KERNELS = has_kernel("separable_conv_train") and has_kernel("separable_conv_train_backward")


def make_inputs(shape="odd", dtype=torch.float32, layout="channels_last", conv_dtype=None, norm_dtype=None,
                residual=None, stride=1, mean=0.0):
    """x, dw, pw, bn_weight, bn_bias and residual, None unless given a dtype; none requires grad yet."""
    n, c_in, c_out, h, w = SEPARABLE_SHAPES[shape] if isinstance(shape, str) else shape
    x = LAYOUTS[layout]((torch.randn(n, c_in, h, w) + mean).to(dtype))
    parameters = separable_parameters(c_in, c_out, conv_dtype or dtype, norm_dtype or dtype)
    output = (n, c_out, reference.output_size(h, stride), reference.output_size(w, stride))
    return [x, *parameters, None if residual is None else LAYOUTS[layout](torch.randn(output).to(residual))]


def plain(x, dw, pw, bn_weight, bn_bias, residual=None, stride=1, eps=1e-5, relu=True):
    y, mean, var = plain_separable_conv(x, dw, pw, bn_weight, bn_bias, stride, eps)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return y.relu() if relu else y, mean, var


def check_accuracy(inputs, layout="channels_last", **settings):
    arguments = plain(*leaves(inputs, torch.float64), **{**settings, "relu": False})[0].detach()
    grad_y = upstream_gradient(arguments, inputs[0].dtype, layout, settings.get("relu", True))
    ours, unfused = (run(function, inputs, grad_y, settings) for function in (separable_conv_train, plain))
    true = run(plain, inputs, grad_y, settings, truth=True)
    arithmetic, x = ours[0][1].dtype, inputs[0]
    assert arithmetic == ours[0][2].dtype == reference.compute_dtype(x)
    assert ours[0][0].dtype == x.dtype and ours[0][0].is_contiguous(memory_format=torch.channels_last)
    y, mean, var = zip(ours[0], unfused[0], true[0], strict=True)
    assert_accurate(*y, arithmetic)
    # The statistics are those of z as it is stored, in x's dtype.
    assert_accurate(*mean, x.dtype, var[2].max().sqrt().item())
    assert_accurate(*var, x.dtype)
    tensors = [tensor for tensor in inputs if tensor is not None]
    for index, (tensor, *gradients) in enumerate(zip(tensors, ours[1], unfused[1], true[1], strict=True)):
        assert gradients[0].dtype == tensor.dtype
        assert_accurate(*gradients, arithmetic, typical_sum(grad_y, var[2]) if 1 <= index <= 4 else 0.0)


@pytest.mark.parametrize("layout, stride", [("nchw", 1), ("channels_last", 1), ("channels_last", 2)])
@pytest.mark.parametrize("shape", SEPARABLE_SHAPES)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_accuracy(implementation, layout, dtype, shape, stride):
    check_accuracy(make_inputs(shape, dtype, layout), layout, stride=stride)


@pytest.mark.parametrize("relu, stride", [(True, 2), (False, 1)])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(implementation, layout, dtype, relu, stride):
    inputs = make_inputs("odd", dtype, layout, residual=dtype, stride=stride)
    check_accuracy(inputs, layout, relu=relu, stride=stride)


@pytest.mark.parametrize("residual, relu", [(None, True), (torch.float32, True), (torch.float32, False)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_upstream_gradient_may_have_any_strides(implementation, layout, residual, relu):
    inputs, grad_y = make_inputs("odd", residual=residual), LAYOUTS[layout](torch.randn(3, 17, 7, 5))
    dense = grad_y.clone(memory_format=torch.channels_last)
    gradients = (run(separable_conv_train, inputs, grad, {"relu": relu})[1] for grad in (grad_y, dense))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtypes", list(itertools.product(FLOATING, repeat=3)), ids=str)
def test_mixed_dtypes(implementation, dtypes):
    x, conv, norm = dtypes
    residual = FLOATING[(FLOATING.index(x) + FLOATING.index(conv) + FLOATING.index(norm)) % 3]
    check_accuracy(make_inputs("odd", x, conv_dtype=conv, norm_dtype=norm, residual=residual))


@pytest.mark.parametrize("residual, relu", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_residual_and_relu_are_optional(implementation, dtype, residual, relu):
    check_accuracy(make_inputs("remainders", dtype, residual=dtype if residual else None), relu=relu, eps=0.1)


def test_strided_parameters(implementation):
    x, dw, pw, bn_weight, bn_bias, residual = make_inputs("remainders")
    dw, pw = dw.transpose(2, 3), pw.transpose(0, 1).contiguous().transpose(0, 1)
    check_accuracy([x, dw, pw, bn_weight[:1].expand(bn_weight.shape), bn_bias.repeat_interleave(2)[::2], residual])


@pytest.mark.parametrize("shape", [(64, 16, 16, 16, 16), (3, 32, 16, 61, 60)], ids=["images", "positions"])
def test_accuracy_of_long_sums(implementation, shape):
    check_accuracy(make_inputs(shape))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("mean", [10.0, 1000.0])
def test_a_mean_far_from_zero_costs_no_digits_of_the_variance(implementation, layout, mean):
    check_accuracy(make_inputs((4, 16, 24, 9, 8), layout=layout, mean=mean), layout)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("residual, relu, stride", [(True, True, 1), (False, True, 2), (True, False, 1)])
def test_gradcheck(implementation, layout, residual, relu, stride):
    inputs = make_inputs((3, 2, 3, 3, 3), torch.float64, layout, residual=torch.float64 if residual else None, stride=stride)
    tensors = [tensor for tensor in leaves(inputs) if tensor is not None]

    def y(x, dw, pw, bn_weight, bn_bias, residual=None):
        return separable_conv_train(x, dw, pw, bn_weight, bn_bias, residual, stride, relu=relu)[0]

    assert torch.autograd.gradcheck(y, tensors)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_what_is_saved_for_backward(implementation, dtype):
    """z is the pointwise output but for a constant per channel, z_mean the mean of what is stored."""
    inputs = make_inputs("remainders", dtype, mean=3.0)
    x, dw, pw = (tensor.double() for tensor in inputs[:3])
    true = F.conv2d(F.conv2d(x, dw, padding=1, groups=x.shape[1]), pw)
    mean, z, z_mean = itemgetter(1, 3, 4)(op(*inputs, 1, 1e-5, True))
    assert z.dtype == dtype and z_mean.dtype == mean.dtype and z.is_contiguous(memory_format=torch.channels_last)
    rounded, true_mean = true.to(dtype).double(), true.mean((0, 2, 3), keepdim=True)
    centred = (z.double() - z_mean.double()[:, None, None]).to(mean.dtype)
    assert_accurate(centred, rounded - true_mean, true - true_mean, dtype)
    assert_accurate(z_mean, z.to(mean.dtype).mean((0, 2, 3)), z.double().mean((0, 2, 3)), dtype)


@pytest.mark.filterwarnings("ignore:var_mean")  # of nothing, in the plain network
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced"])
def test_empty_batch(implementation, layout):
    inputs = make_inputs((0, 3, 5, 4, 4), layout=layout, residual=torch.float32)
    (y, mean, var), gradients = run(separable_conv_train, inputs, torch.empty(0, 5, 4, 4), {})
    assert y.shape == (0, 5, 4, 4) and mean.tolist() == var.tolist() == [0.0] * 5
    for gradient, other in zip(gradients, run(plain, inputs, torch.empty(0, 5, 4, 4), {})[1], strict=True):
        torch.testing.assert_close(gradient, other)


NON_FINITE = {"x": (0, (1, 2, 3, 1)), "pw": (2, (4, 1, 0, 0)), "bn_bias": (4, (3,)), "residual": (5, (1, 6, 2, 2))}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", NON_FINITE)
def test_non_finite_values_propagate(implementation, where, value):
    inputs = make_inputs("odd", residual=torch.float32)
    argument, index = NON_FINITE[where]
    inputs[argument][index] = value
    grad_y = torch.randn(3, 17, 7, 5)
    (y, *statistics), gradients = run(separable_conv_train, inputs, grad_y, {})
    (plain_y, *plain_statistics), plain_gradients = run(plain, inputs, grad_y, {})
    assert torch.equal(y.isnan(), plain_y.isnan()) and torch.equal(y.isinf(), plain_y.isinf())
    for ours, other in zip([*statistics, *gradients], [*plain_statistics, *plain_gradients], strict=True):
        assert torch.equal(ours.isfinite(), other.isfinite())


@pytest.mark.parametrize("shape", [(33, 16, 32, 14, 14), (2, 40, 17, 61, 40)], ids=str)
@pytest.mark.parametrize("residual", [None, torch.float32], ids=["alone", "residual"])
def test_same_bits_twice_and_with_any_number_of_threads(implementation, shape, residual):
    inputs = make_inputs(shape, residual=residual)
    n, _, c, h, w = shape
    grad_y, results = torch.randn(n, c, h, w), []
    own = KERNELS and implementation != "reference"
    for threads in (2, 1, 2) if own else (2, 2):  # the bits of PyTorch's own kernels depend on the threads
        torch.set_num_threads(threads)
        values, gradients = run(separable_conv_train, inputs, grad_y, {})
        results.append([*values, *gradients])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_autocast(implementation):
    """x, residual and, on the CPU, convolution weights are read as bfloat16, the rest as it is; backward follows."""
    inputs = make_inputs("odd", residual=torch.float32)
    read = (0, 5) if implementation in GPU else (0, 1, 2, 5)
    cast = [t.bfloat16() if i in read else t for i, t in enumerate(inputs)]
    grad_y = torch.randn(3, 17, 7, 5).bfloat16()
    expected, expected_gradients = run(separable_conv_train, cast, grad_y, {})
    with autocast(torch.bfloat16):
        results, gradients = run(separable_conv_train, inputs, grad_y, {})
    assert [result.dtype for result in results] == [torch.bfloat16, torch.float32, torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    for tensor, gradient, other in zip(inputs, gradients, expected_gradients, strict=True):
        assert gradient.dtype == tensor.dtype and torch.equal(gradient, other.float())


@pytest.mark.parametrize("dtype, target", [(torch.float32, torch.float16), (torch.float64, torch.bfloat16)], ids=str)
def test_autocast_to_another_dtype_and_of_float64_changes_nothing(implementation, dtype, target):
    inputs = make_inputs("odd", dtype)
    with autocast(target):
        y = separable_conv_train(*inputs)[0]
    assert y.dtype == dtype and torch.equal(y, separable_conv_train(*inputs)[0])


# What opcheck asks does not depend on the instruction set.
@pytest.mark.parametrize("implementation", ON_CPU[:2], indirect=True)
@pytest.mark.parametrize("shape, stride, residual", [("odd", 1, torch.float32), ("odd", 2, None)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(implementation, layout, shape, stride, residual):
    utilities = OPCHECK if layout in ("nchw", "channels_last") else OPCHECK[:3]  # the last is slow
    check_op(make_inputs(shape, layout=layout, stride=stride, residual=residual), stride, utilities)


@pytest.mark.parametrize("shape", ["one_channel", "one_position", (0, 3, 5, 4, 4)], ids=str)
def test_opcheck_edges(shape):
    check_op(make_inputs(shape), stride=1)


@pytest.mark.parametrize("implementation", ON_CPU[:2], indirect=True)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float64, torch.bfloat16)], ids=str)
def test_opcheck_mixed_dtypes(implementation, dtypes):
    check_op(make_inputs(dtype=dtypes[0], conv_dtype=dtypes[1], norm_dtype=torch.float32, residual=torch.float32), stride=1)


def check_op(inputs, stride, utilities=OPCHECK, relu=True):
    with torch.no_grad():
        y, _, var, z, z_mean = op(*inputs, stride, 1e-5, relu)
    saved = (y if inputs[5] is not None and relu else None, z, z_mean, var)
    backward = (torch.ones_like(y), *inputs[:5], *saved, stride, 1e-5, relu)
    for x_needs_grad in (True, False):
        torch.library.opcheck(backward_op, (*backward, x_needs_grad), test_utils=utilities)
    torch.library.opcheck(op, (*leaves(inputs), stride, 1e-5, relu), test_utils=utilities)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(backend):
    inputs, grad_y = make_inputs("odd", residual=torch.float32, stride=2), torch.randn(3, 17, 4, 3)
    torch._dynamo.reset()
    compiled = torch.compile(separable_conv_train, fullgraph=True, backend=backend)
    (y, *statistics), gradients = run(separable_conv_train, inputs, grad_y, {"stride": 2})
    (compiled_y, *compiled_statistics), compiled_gradients = run(compiled, inputs, grad_y, {"stride": 2})
    for ours, other in zip(
        [y, *statistics, *gradients], [compiled_y, *compiled_statistics, *compiled_gradients], strict=True
    ):
        torch.testing.assert_close(ours, other)


def test_export_sees_one_op():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tensors = torch.nn.ParameterList(separable_parameters(3, 5, torch.float32, torch.float32))

        def forward(self, x):
            return separable_conv_train(x, *self.tensors)

    program = torch.export.export(
        Layer(), (torch.randn(4, 3, 5, 5),), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)
    )
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called.count(op) == 1
    assert program.module()(torch.randn(7, 3, 5, 5))[0].shape == (7, 5, 5, 5)


def test_opcheck_without_relu():
    check_op(make_inputs(residual=torch.float32), stride=1, relu=False)


def test_differentiates_once(implementation):
    inputs = leaves(make_inputs("odd"))
    y = separable_conv_train(*inputs)[0]
    with pytest.raises(RuntimeError, match="separable_conv_train can be differentiated only once"):
        torch.autograd.grad(y.sum(), inputs[1], create_graph=True)
    assert torch.autograd.grad(y.sum(), inputs[1], retain_graph=True)[0].isfinite().all()
    assert torch.autograd.grad(y.sum(), inputs[1])[0].isfinite().all()


@pytest.mark.parametrize("relu", [True, False])
def test_only_what_needs_a_gradient_gets_one(implementation, relu):
    inputs, grad_y = make_inputs("odd", residual=torch.bfloat16), torch.randn(3, 17, 7, 5)
    _, gradients = run(separable_conv_train, inputs, grad_y, {"relu": relu})
    for needs_grad, expected in enumerate(gradients):
        arguments = [tensor.clone().requires_grad_(index == needs_grad) for index, tensor in enumerate(inputs)]
        y, mean, var = separable_conv_train(*arguments, relu=relu)
        assert y.requires_grad and not mean.requires_grad and not var.requires_grad
        y.backward(grad_y)
        assert [tensor.grad is not None for tensor in arguments] == [index == needs_grad for index in range(6)]
        assert_unchanged(arguments[needs_grad].grad, expected, implementation)
    assert not separable_conv_train(*inputs)[0].requires_grad


@pytest.mark.parametrize("x_needs_grad", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_flops_equal_the_unfused_ones(stride, x_needs_grad):
    inputs = leaves(make_inputs("remainders"))
    inputs[0].requires_grad_(x_needs_grad)
    counts = []
    for function in (separable_conv_train, plain):
        with FlopCounterMode(display=False) as counter:
            y = function(*inputs, stride=stride)[0]
            counts.append(counter.get_total_flops())
            y.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[:2] == counts[2:] and 0 < counts[0] < counts[1]


# What to change among x, dw, pw, bn_weight, bn_bias, residual and stride, and what is said of it.
BAD_INPUTS = {
    "flat x": ({"x": lambda t: t[0]}, "x has shape (3, 7, 5), expected (N, C, H, W)"),
    "no channels": ({"x": lambda t: t[:, :0]}, "x has shape (3, 0, 7, 5), expected (N, C, H, W) with C, H and W at least 1"),
    "no rows": ({"x": lambda t: t[:, :, :0]}, "x has shape (3, 3, 0, 5)"),
    "integer x": ({"x": lambda t: t.long()}, "x of shape (3, 3, 7, 5) has dtype torch.int64, expected torch.float32"),
    "half x": ({"x": lambda t: t.half()}, "has dtype torch.float16"),
    "dense dw": ({"dw": lambda t: t.expand(3, 3, 3, 3)}, "dw has shape (3, 3, 3, 3), expected (3, 1, 3, 3)"),
    "5x5 dw": ({"dw": lambda t: t.new_ones(3, 1, 5, 5)}, "dw has shape (3, 1, 5, 5), expected (3, 1, 3, 3)"),
    "complex dw": ({"dw": lambda t: t.cfloat()}, "dw of shape (3, 1, 3, 3) has dtype torch.complex64"),
    "pw matrix": ({"pw": lambda t: t[:, :, 0, 0]}, "pw has shape (17, 3), expected (C_out, 3, 1, 1)"),
    "3x3 pw": ({"pw": lambda t: t.expand(17, 3, 3, 3)}, "pw has shape (17, 3, 3, 3), expected (17, 3, 1, 1)"),
    "narrow pw": ({"pw": lambda t: t[:, :2]}, "pw has shape (17, 2, 1, 1), expected (17, 3, 1, 1)"),
    "no outputs": ({"pw": lambda t: t[:0]}, "pw has shape (0, 3, 1, 1), expected (C_out, 3, 1, 1) with C_out >= 1"),
    "pw on meta": ({"pw": lambda t: t.to("meta")}, "pw of shape (17, 3, 1, 1) is on meta, expected cpu as x"),
    "long bias": ({"bn_bias": lambda t: torch.cat([t, t])}, "bn_bias has shape (34,), expected (17,)"),
    "boolean bias": ({"bn_bias": lambda t: t > 0}, "bn_bias of shape (17,) has dtype torch.bool"),
    "one residual": ({"residual": lambda t: t[:1]}, "residual has shape (1, 17, 7, 5), expected (3, 17, 7, 5)"),
    "residual on meta": ({"residual": lambda t: t.to("meta")}, "residual of shape (3, 17, 7, 5) is on meta"),
    "stride 0": ({"stride": lambda _: 0}, "stride is 0, expected 1 or 2"),
    "stride 3": ({"stride": lambda _: 3}, "stride is 3, expected 1 or 2"),
    "stride -1": ({"stride": lambda _: -1}, "stride is -1, expected 1 or 2"),
    "bn_weight map": ({"bn_weight": lambda t: t[:, None]}, "bn_weight has shape (17, 1), expected (17,)"),
    "one value": (
        {"x": lambda t: t[:1, :, :2, :2], "residual": lambda _: None, "stride": lambda _: 2},
        "x has shape (1, 3, 2, 2), which leaves one value per channel, (1, 17, 1, 1); expected more than 1",
    ),
    "residual of stride 1": ({"stride": lambda _: 2}, "residual has shape (3, 17, 7, 5), expected (3, 17, 4, 3)"),
}


@pytest.mark.parametrize("change, message", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs_raise(implementation, change, message):
    names = ("x", "dw", "pw", "bn_weight", "bn_bias", "residual", "stride")
    inputs = dict(zip(names, [*make_inputs(residual=torch.float32), 1], strict=True))
    inputs.update({name: function(inputs[name]) for name, function in change.items()})
    with pytest.raises(ValueError, match=re.escape(names_device(message))):
        separable_conv_train(**inputs)
    with pytest.raises(ValueError):  # without the public function's checks
        op(*inputs.values(), 1e-5, True)


# What to change among the arguments of the backward op.
BAD_GRADIENTS = {
    "grad_y of another size": {"grad_y": lambda t: t[:, :, 1:]},
    "grad_y of fewer images": {"grad_y": lambda t: t[1:]},
    "flat grad_y": {"grad_y": lambda t: t[0]},
    "integer grad_y": {"grad_y": lambda t: t.long()},
    "flat x": {"x": lambda t: t[0]},
    "integer x": {"x": lambda t: t.long()},
    "other channels in x": {"x": lambda t: t[:, :2]},
    "other channels in dw": {"dw": lambda t: t[:2]},
    "5x5 dw": {"dw": lambda t: t.new_ones(3, 1, 5, 5)},
    "pw matrix": {"pw": lambda t: t[:, :, 0, 0]},
    "narrow pw": {"pw": lambda t: t[:, :2]},
    "short pw": {"pw": lambda t: t[:2]},
    "bn_weight": {"bn_weight": lambda t: t[:1]},
    "bn_bias": {"bn_bias": lambda t: t[:, None]},
    "smaller y": {"y": lambda t: t[:, :, :, 1:]},
    "y of another dtype": {"y": lambda t: t.double()},
    "smaller z": {"z": lambda t: t[:, 1:]},
    "z of another dtype": {"z": lambda t: t.bfloat16()},
    "z_mean": {"z_mean": lambda t: t[1:]},
    "z_mean of another dtype": {"z_mean": lambda t: t.double()},
    "var": {"var": lambda t: t[None]},
    "var of another dtype": {"var": lambda t: t.bfloat16()},
    "stride 0": {"stride": lambda _: 0},
    "stride 2": {"stride": lambda _: 2},
    "stride 3": {"stride": lambda _: 3},
}


@pytest.mark.parametrize("change", BAD_GRADIENTS.values(), ids=BAD_GRADIENTS)
def test_bad_backward_inputs_raise(implementation, change):
    x, dw, pw, bn_weight, bn_bias, residual = make_inputs(residual=torch.float32)
    y, _, var, z, z_mean = op(x, dw, pw, bn_weight, bn_bias, residual, 1, 1e-5, True)
    arguments = {
        "grad_y": torch.ones_like(y), "x": x, "dw": dw, "pw": pw, "bn_weight": bn_weight, "bn_bias": bn_bias, "y": y,
        "z": z, "z_mean": z_mean, "var": var, "stride": 1, "eps": 1e-5, "relu": True, "x_needs_grad": True,
    }
    assert all(gradient.isfinite().all() for gradient in backward_op(*arguments.values()))
    arguments.update({name: function(arguments[name]) for name, function in change.items()})
    with pytest.raises(ValueError, match="separable_conv"):
        backward_op(*arguments.values())
