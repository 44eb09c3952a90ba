"""Depthwise 3x3 convolution, pointwise 1x1 convolution, batch norm, residual and ReLU in one step.

The layer of MobileNet (Howard et al. 2017, section 3.1) without batch norm between the two convolutions, which is
the separable convolution of SEArch and of Xception (Chollet 2017, section 3). Training and inference are two ops:
in training, batch norm uses the batch's own statistics, which come back to the caller, who keeps the running ones;
at inference it is folded into the convolutions by the caller.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_backward_flop, conv_flop_count, register_flop_formula

from odn_fast.ops import _separable_conv_cuda
from odn_fast.ops._choose import register_cuda, triton
from odn_fast.ops._library import (
    as_bfloat16,
    contiguous_like,
    define,
    define_autocast,
    library,
    refuse_second_derivative,
)
from odn_fast.reference import separable_conv as reference


def separable_conv_train(
    x: Tensor,
    dw: Tensor,
    pw: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    residual: Tensor | None = None,
    stride: int = 1,
    eps: float = 1e-5,
    relu: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """relu(batch_norm(pw * (dw * x)) + residual) with the statistics of the batch.

    x: (N, C_in, H, W), any strides; dw: (C_in, 1, 3, 3), padding 1; pw: (C_out, C_in, 1, 1); bn_weight, bn_bias:
    (C_out,); residual: (N, C_out, H_out, W_out) or None; each float32, bfloat16 or float64, mixed at will.
    stride: 1 or 2, of the depthwise convolution, H_out = ceil(H / stride). relu=False leaves the ReLU out.

    Returns y (N, C_out, H_out, W_out) in x's dtype, channels_last, differentiable once; and the mean and the biased
    variance (C_out,) of the pointwise output, for running statistics, not differentiable, in float32 (float64 for
    float64 x). Arithmetic is in their dtype. An empty batch has y empty and statistics zero.

    Under autocast to bfloat16, x, residual, dw and pw are read as bfloat16; on CUDA, x and residual. `torch.func`
    transforms do not see through the op.

    Raises ValueError on shapes, dtypes, devices or strides that do not fit, and where a channel has only one value.
    """
    if not x.is_cuda:  # where the op checks
        reference.check(x, dw, pw, bn_weight, bn_bias, residual, stride)
    y, mean, var, _, _ = _train(x, dw, pw, bn_weight, bn_bias, residual, stride, eps, relu)
    return y, mean, var


def separable_conv_infer(
    x: Tensor,
    dw: Tensor,
    dw_bias: Tensor | None,
    pw: Tensor,
    pw_bias: Tensor | None,
    residual: Tensor | None = None,
    stride: int = 1,
    act_dw: str = "none",
    act_pw: str = "relu",
) -> Tensor:
    """act_pw(pw * act_dw(dw * x + dw_bias) + pw_bias + residual), batch norm folded into weights and biases.

    x: (N, C_in, H, W), any strides; dw: (C_in, 1, 3, 3), padding 1; dw_bias: (C_in,) or None; pw: (C_out, C_in, 1, 1);
    pw_bias: (C_out,) or None; residual: (N, C_out, H_out, W_out) or None; each float32, bfloat16 or float64, mixed at
    will. stride: 1 or 2, of the depthwise convolution, H_out = ceil(H / stride).
    act_dw, act_pw: "none", "relu", "relu6", "hard_swish" or "silu".

    Returns y (N, C_out, H_out, W_out) in x's dtype, channels_last. Arithmetic is in float32 (float64 for float64 x).
    Under autocast to bfloat16, x, residual, dw and pw are read as bfloat16; on CUDA, x and residual.

    Raises ValueError on shapes, dtypes, devices, strides or activations that do not fit; RuntimeError when
    differentiated.
    """
    if not x.is_cuda:  # where the op checks
        reference.check_infer(x, dw, dw_bias, pw, pw_bias, residual, stride, act_dw, act_pw)
    return _infer(x, dw, dw_bias, pw, pw_bias, residual, stride, act_dw, act_pw)


def empty_map(x: Tensor, channels: int, stride: int) -> Tensor:
    height, width = (reference.output_size(size, stride) for size in x.shape[2:])
    return torch.empty(
        (x.shape[0], channels, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )


def _fake_train(x, dw, pw, bn_weight, bn_bias, residual, stride, eps, relu):
    reference.check(x, dw, pw, bn_weight, bn_bias, residual, stride)
    channels, dtype = pw.shape[0], reference.compute_dtype(x)
    y, z = (empty_map(x, channels, stride) for _ in range(2))
    mean, var, z_mean = (x.new_empty(channels, dtype=dtype) for _ in range(3))
    return y, mean, var, z, z_mean


def _fake_train_backward(
    grad_y, x, dw, pw, bn_weight, bn_bias, y, z, z_mean, var, stride, eps, relu, x_needs_grad
):
    return (
        torch.empty_like(x, memory_format=torch.channels_last) if x_needs_grad else x.new_empty(0),
        *(contiguous_like(parameter) for parameter in (dw, pw, bn_weight, bn_bias)),
        x.new_empty(0) if y is None else empty_map(z, z.shape[1], 1),
    )


def _fake_infer(x, dw, dw_bias, pw, pw_bias, residual, stride, act_dw, act_pw):
    reference.check_infer(x, dw, dw_bias, pw, pw_bias, residual, stride, act_dw, act_pw)
    return empty_map(x, pw.shape[0], stride)


_train = define(
    "separable_conv_train(Tensor x, Tensor dw, Tensor pw, Tensor bn_weight, Tensor bn_bias, Tensor? residual,"
    " int stride, float eps, bool relu) -> (Tensor y, Tensor mean, Tensor var, Tensor z, Tensor z_mean)",
    reference.separable_conv_train,
    _fake_train,
)
_train_backward = define(
    "separable_conv_train_backward(Tensor grad_y, Tensor x, Tensor dw, Tensor pw, Tensor bn_weight, Tensor bn_bias,"
    " Tensor? y, Tensor z, Tensor z_mean, Tensor var, int stride, float eps, bool relu, bool x_needs_grad)"
    " -> (Tensor grad_x, Tensor grad_dw, Tensor grad_pw, Tensor grad_bn_weight, Tensor grad_bn_bias,"
    " Tensor grad_residual)",
    reference.separable_conv_train_backward,
    _fake_train_backward,
)
_infer = define(
    "separable_conv_infer(Tensor x, Tensor dw, Tensor? dw_bias, Tensor pw, Tensor? pw_bias, Tensor? residual,"
    " int stride, str act_dw, str act_pw) -> Tensor y",
    reference.separable_conv_infer,
    _fake_infer,
)


class _SeparableConvTrain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dw, pw, bn_weight, bn_bias, residual, stride, eps, relu):
        with torch._C._AutoDispatchBelowAutograd():
            outputs = _train(x, dw, pw, bn_weight, bn_bias, residual, stride, eps, relu)
        y, mean, var, z, z_mean = outputs
        ctx.mark_non_differentiable(mean, var, z, z_mean)
        ctx.set_materialize_grads(False)  # a map of zeros for z, else
        # Without a residual, the ReLU's mask is computed again from z.
        ctx.save_for_backward(
            x, dw, pw, bn_weight, bn_bias, y if relu and residual is not None else None, z, z_mean, var
        )
        ctx.settings = stride, eps, relu
        ctx.residual_dtype = None if residual is None else residual.dtype
        return outputs

    @staticmethod
    def backward(ctx, grad_y, *_):
        refuse_second_derivative("separable_conv_train")
        if grad_y is None:
            return (None,) * 9
        x_needs_grad, residual_needs_grad = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
        grad_x, *grad_parameters, grad_residual = _train_backward(
            grad_y, *ctx.saved_tensors, *ctx.settings, x_needs_grad
        )
        relu = ctx.settings[2]
        grad_residual = (grad_residual if relu else grad_y).to(ctx.residual_dtype) if residual_needs_grad else None
        return grad_x if x_needs_grad else None, *grad_parameters, grad_residual, None, None, None


class _SeparableConvInfer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return _infer(*args)

    @staticmethod
    def backward(ctx, grad_y):
        raise RuntimeError("separable_conv_infer has no gradient; use separable_conv_train")


def _read_train(x, dw, pw, bn_weight, bn_bias, residual, stride, eps, relu):
    x, dw, pw, residual = map(as_bfloat16, (x, dw, pw, residual))
    return x, dw, pw, bn_weight, bn_bias, residual, stride, eps, relu


def _read_infer(x, dw, dw_bias, pw, pw_bias, residual, stride, act_dw, act_pw):
    x, dw, pw, residual = map(as_bfloat16, (x, dw, pw, residual))
    return x, dw, dw_bias, pw, pw_bias, residual, stride, act_dw, act_pw


def _read_train_on_cuda(x, dw, pw, bn_weight, bn_bias, residual, stride, eps, relu):
    """Without the weights: the kernels round those of products on load and use the others as they are."""
    return as_bfloat16(x), dw, pw, bn_weight, bn_bias, as_bfloat16(residual), stride, eps, relu


def _read_infer_on_cuda(x, dw, dw_bias, pw, pw_bias, residual, stride, act_dw, act_pw):
    return as_bfloat16(x), dw, dw_bias, pw, pw_bias, as_bfloat16(residual), stride, act_dw, act_pw


library.impl("separable_conv_train", _SeparableConvTrain.apply, "Autograd")
library.impl("separable_conv_infer", _SeparableConvInfer.apply, "Autograd")
define_autocast(_train, _read_train, _read_train_on_cuda)
define_autocast(_infer, _read_infer, _read_infer_on_cuda)
# Triton first, here and for the unit: it was tested on a GPU; the CUDA kernels still have to show there what they can do.
register_cuda(
    "separable_conv_train",
    [triton("separable_conv", "separable_conv_train"), _separable_conv_cuda.train],
    lambda *args: reference.check(*args[:7]),
)
register_cuda(
    "separable_conv_infer",
    [triton("separable_conv_infer", "separable_conv_infer"), _separable_conv_cuda.infer],
    reference.check_infer,
)
register_cuda(
    "separable_conv_train_backward",
    [triton("separable_conv_backward", "separable_conv_train_backward"), _separable_conv_cuda.train_backward],
    lambda *args: reference.check_backward(*args[:11]),
)


def forward_flops(x_shape, dw_shape, pw_shape, stride: int) -> tuple[int, list[int]]:
    """What PyTorch counts for the two convolutions, and the shape of their output; batch norm counts nothing."""
    between = [*x_shape[:2], *(reference.output_size(size, stride) for size in x_shape[2:])]
    output = [x_shape[0], pw_shape[0], *between[2:]]
    return conv_flop_count(x_shape, dw_shape, between) + conv_flop_count(between, pw_shape, output), output


def backward_flops(x_shape, dw_shape, pw_shape, stride: int, x_needs_grad: bool) -> int:
    """What PyTorch counts for both convolutions' gradients; the depthwise output computed again is not counted."""
    between = [*x_shape[:2], *(reference.output_size(size, stride) for size in x_shape[2:])]
    output = [x_shape[0], pw_shape[0], *between[2:]]
    return convolution_backward_flops(output, between, pw_shape, True) + convolution_backward_flops(
        between, x_shape, dw_shape, x_needs_grad
    )


def convolution_backward_flops(grad_shape, x_shape, weight_shape, x_needs_grad: bool) -> int:
    geometry = (None, None, None, None, False, None, None)  # of which the formula reads `transposed` alone
    gradients = (x_shape, weight_shape, None)
    return conv_backward_flop(
        grad_shape, x_shape, weight_shape, *geometry, (x_needs_grad, True, False), out_val=gradients
    )


@register_flop_formula(torch.ops.odn_fast.separable_conv_train)
def _flops_train(x_shape, dw_shape, pw_shape, bn_weight, bn_bias, residual, stride, *args, **kwargs) -> int:
    return forward_flops(x_shape, dw_shape, pw_shape, stride)[0]


@register_flop_formula(torch.ops.odn_fast.separable_conv_train_backward)
def _flops_train_backward(
    grad, x_shape, dw_shape, pw_shape, bn_weight, bn_bias, y, z, z_mean, var, stride, eps, relu, x_needs_grad, **kwargs
) -> int:
    return backward_flops(x_shape, dw_shape, pw_shape, stride, x_needs_grad)


@register_flop_formula(torch.ops.odn_fast.separable_conv_infer)
def _flops_infer(x_shape, dw_shape, dw_bias, pw_shape, pw_bias, residual, stride, *args, **kwargs) -> int:
    return forward_flops(x_shape, dw_shape, pw_shape, stride)[0]
