"""The Triton launchers of separable_conv against float64: interpreted on the CPU, compiled where there is a GPU."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="the kernels are Triton's, and Triton is not installed")

from cases import LAYOUTS, assert_accurate, plain_separable_conv, separable_parameters, typical_sum, upstream_gradient
from odn_fast.kernels import _tuned, separable_conv, separable_conv_backward, separable_conv_infer
from odn_fast.reference import separable_conv as reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
# Tiles so small that programs take several and there are several programs.
SMALL = {
    "separable_forward": {"BM": 16, "waves": 1},
    "separable_infer": {"BM": 16, "waves": 1},
    "separable_normalise": {"elements": 256},
    "separable_sums": {"elements": 256, "waves": 1},
    "separable_pointwise_backward": {"BM": 16, "waves": 1},
    "separable_depthwise_backward": {"elements": 512, "waves": 1},
}
CASES = {  # (N, C_in, C_out, H, W), dtype of maps, of parameters, residual, stride, relu
    "stride_1": ((2, 16, 16, 6, 5), torch.float32, torch.float32, True, 1, True),
    "stride_2": ((2, 3, 17, 7, 6), torch.float32, torch.float32, False, 2, True),
    "stride_2_residual": ((1, 16, 32, 5, 8), torch.bfloat16, torch.float32, True, 2, True),
    "bfloat16": ((2, 16, 32, 6, 5), torch.bfloat16, torch.bfloat16, False, 1, True),
    "no_relu": ((3, 24, 16, 5, 4), torch.bfloat16, torch.float32, True, 1, False),
    "several_blocks": ((2, 70, 66, 4, 3), torch.float32, torch.bfloat16, False, 1, True),
    "one_position": ((9, 17, 3, 1, 1), torch.float32, torch.float32, False, 1, False),
}


@pytest.fixture(params=["default", "small"])
def tiles(request):
    with contextlib.ExitStack() as stack:
        if request.param == "small":
            for name, sizes in SMALL.items():
                stack.enter_context(_tuned.forced(name, sizes))
        yield request.param


def on(device, tensors):
    return [tensor.to(device) if isinstance(tensor, torch.Tensor) else tensor for tensor in tensors]


def in_double(tensors):
    return [tensor.double() if isinstance(tensor, torch.Tensor) else tensor for tensor in tensors]


def make_inputs(case, layout="channels_last", mean=0.0):
    """The arguments of separable_conv_train."""
    (n, c_in, c_out, h, w), dtype, parameter_dtype, residual, stride, relu = CASES.get(case, case)
    x = LAYOUTS[layout]((torch.randn(n, c_in, h, w) + mean).to(dtype))
    output = (n, c_out, reference.output_size(h, stride), reference.output_size(w, stride))
    residual = LAYOUTS[layout](torch.randn(output).to(dtype)) if residual else None
    return [x, *separable_parameters(c_in, c_out, parameter_dtype, parameter_dtype), residual, stride, EPS, relu]


def plain(x, dw, pw, bn_weight, bn_bias, residual, stride, eps, relu):
    """By PyTorch's own layers: (y, mean, var)."""
    y, mean, var = plain_separable_conv(x, dw, pw, bn_weight, bn_bias, stride, eps)
    y = y if residual is None else y + residual
    return y.relu() if relu else y, mean, var


def plain_gradients(inputs, grad_y):
    tensors = [tensor.detach().requires_grad_() for tensor in inputs[:6] if tensor is not None]
    y = plain(*tensors, *[None] * (6 - len(tensors)), *inputs[6:])[0]
    return torch.autograd.grad(y, tensors, grad_y.to(y.dtype))


def check_accuracy(inputs, layout="channels_last"):
    x, residual, (stride, eps, relu) = inputs[0], inputs[5], inputs[6:]
    arguments = plain(*in_double(inputs[:6]), stride, eps, False)[0]
    grad_y = upstream_gradient(arguments, x.dtype, layout, relu)
    there = on(DEVICE, inputs)
    y, mean, var, z, z_mean = results = separable_conv.separable_conv_train(*there)
    for map_ in (y, z):
        assert map_.dtype == x.dtype and map_.is_contiguous(memory_format=torch.channels_last)
    y, mean, var = on("cpu", results[:3])
    true = plain(*in_double(inputs))
    for index, triple in enumerate(zip((y, mean, var), plain(*inputs), true, strict=True)):
        assert_accurate(*triple, x.dtype, true[2].max().sqrt().item() if index == 1 else 0.0)
    torch.testing.assert_close(z_mean, z.float().mean((0, 2, 3)), rtol=1e-5, atol=1e-5 * true[2].max().sqrt().item())

    saved = (results[0] if relu and residual is not None else None, z, z_mean, results[2])
    for x_needs_grad in (True, False):
        gradients = separable_conv_backward.separable_conv_train_backward(
            grad_y.to(DEVICE), *there[:5], *saved, stride, eps, relu, x_needs_grad
        )
        grad_x, *parameters, grad_residual = on("cpu", gradients)
        assert grad_x.shape == (x.shape if x_needs_grad else (0,)) and grad_x.dtype == x.dtype
        ours = [*([grad_x] if x_needs_grad else []), *parameters]
        unfused, exact = (plain_gradients(tensors, grad_y) for tensors in (inputs, in_double(inputs)))
        first = 0 if x_needs_grad else 1
        for tensor, *triple in zip(inputs[first:5], ours, unfused[first:5], exact[first:5], strict=True):
            assert triple[0].dtype == tensor.dtype and triple[0].is_contiguous(
                memory_format=torch.channels_last if tensor is x else torch.contiguous_format
            )
            assert_accurate(*triple, torch.float32, 0.0 if tensor is x else typical_sum(grad_y, true[2]))
        if saved[0] is not None:
            assert torch.equal(grad_residual, unfused[5])
        else:
            assert grad_residual.shape == (0,)


@pytest.mark.parametrize("case", CASES)
def test_accuracy(tiles, case):
    check_accuracy(make_inputs(case))


@pytest.mark.parametrize("layout", ["nchw", "sliced", "channel_slice"])
def test_layouts(layout):
    check_accuracy(make_inputs("stride_1", layout), layout)


def test_strided_parameters():
    inputs = make_inputs("stride_1")
    inputs[1] = torch.randn(3, 3, 16).permute(2, 0, 1).unsqueeze(1)  # taps by channels, as the kernels read it
    inputs[2] = inputs[2].transpose(0, 1)
    inputs[3] = inputs[3][:1].expand(16)
    check_accuracy(inputs)


def test_a_mean_far_from_zero_costs_no_digits_of_the_variance(tiles):
    check_accuracy(make_inputs(((2, 16, 24, 6, 5), torch.float32, torch.float32, False, 1, True), mean=1000.0))


def test_empty_batch():
    inputs = on(DEVICE, make_inputs(((0, 3, 5, 4, 4), torch.float32, torch.float32, True, 2, True)))
    y, mean, var, z, z_mean = separable_conv.separable_conv_train(*inputs)
    assert y.shape == z.shape == (0, 5, 2, 2) and all(v.tolist() == [0.0] * 5 for v in (mean, var, z_mean))
    arguments = (y, *inputs[:5], y, z, z_mean, var, 2, EPS, True, True)
    ours = separable_conv_backward.separable_conv_train_backward(*arguments)
    for gradient, other in zip(ours, reference.separable_conv_train_backward(*arguments), strict=True):
        assert gradient.dtype == other.dtype
        torch.testing.assert_close(gradient, other)
    infer = (*inputs[:2], None, inputs[2], None, None, 2, "none", "relu")
    assert separable_conv_infer.separable_conv_infer(*infer).shape == (0, 5, 2, 2)


def test_nan_stays_nan():
    inputs = make_inputs("stride_1")
    inputs[0][0, 1, 2, 3] = torch.nan
    y, mean, var, *_ = on("cpu", separable_conv.separable_conv_train(*on(DEVICE, inputs)))
    assert y.isnan().all() and mean.isnan().all() and var.isnan().all()
    infer = (*inputs[:2], None, inputs[2], None, None, 1, "relu6", "hard_swish")
    y = separable_conv_infer.separable_conv_infer(*on(DEVICE, infer)).cpu()
    assert torch.equal(y.isnan(), reference.separable_conv_infer(*infer).isnan())


@pytest.mark.parametrize("act_dw, act_pw", [("none", "relu"), ("relu6", "silu"), ("hard_swish", "none"), ("silu", "hard_swish")])
@pytest.mark.parametrize("case", ["stride_1", "stride_2_residual", "several_blocks"])
def test_inference(act_dw, act_pw, case):
    x, dw, pw, bn_weight, bn_bias, residual, stride, *_ = make_inputs(case)
    dw_bias = None if act_dw == "none" else torch.randn(x.shape[1])
    pw_bias = None if act_pw == "none" else bn_bias
    arguments = (x, dw, dw_bias, pw, pw_bias, residual, stride, act_dw, act_pw)
    ours = separable_conv_infer.separable_conv_infer(*on(DEVICE, arguments)).cpu()
    assert ours.dtype == x.dtype and ours.is_contiguous(memory_format=torch.channels_last)
    lowest = [tensor.to(x.dtype) if isinstance(tensor, torch.Tensor) else tensor for tensor in arguments]
    between = F.conv2d(lowest[0], lowest[1], lowest[2], stride, 1, groups=x.shape[1])
    unfused = F.conv2d(reference.ACTIVATIONS[act_dw](between), lowest[3], lowest[4])
    unfused = reference.ACTIVATIONS[act_pw](unfused if residual is None else unfused + residual)
    assert_accurate(ours, unfused, reference.separable_conv_infer(*in_double(arguments)), torch.float32)


def test_why_not():
    inputs = on(DEVICE, make_inputs("stride_1"))
    assert separable_conv.why_not("separable_conv_train", *inputs) == []
    infer = [*inputs[:2], None, inputs[2], None, None, 1, "none", "relu"]
    assert separable_conv_infer.why_not("separable_conv_infer", *infer) == []
    infer[3] = infer[3].double()
    assert "pw is torch.float64" in separable_conv_infer.why_not("separable_conv_infer", *infer)[0]
    y, _, var, z, z_mean = separable_conv.separable_conv_train(*inputs)
    backward = [y, *inputs[:5], y, z, z_mean, var, 1, EPS, True, True]
    assert separable_conv_backward.why_not("separable_conv_train_backward", *backward) == []
    backward[3] = torch.empty(2000, 16, 1, 1, device=DEVICE)
    assert "2000 output channels" in separable_conv_backward.why_not("separable_conv_train_backward", *backward)[0]
    backward[3] = torch.empty(1, 1, 1, 1, device=DEVICE).expand(1024, 300_000, 1, 1)
    assert "partial sums" in separable_conv_backward.why_not("separable_conv_train_backward", *backward)[0]
