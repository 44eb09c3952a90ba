"""Separable convolution in plain PyTorch: depthwise 3x3, pointwise 1x1, batch norm, residual, ReLU.

`check`, `check_infer` and `check_backward` are the one place where arguments are validated; the public functions, the
fakes and this reference call them. The pieces that work on one convolution are shared with `separable_unit`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from odn_fast.reference._arguments import FLOATING, check_given, check_map, check_tensor, check_vectors, compute_dtype
from odn_fast.reference.batch_norm_act import (
    batch_norm_gradients,
    check_values_per_channel,
    let_through,
    normalise,
    per_channel,
    statistics,
    stored,
)

ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "relu6": F.relu6, "hard_swish": F.hardswish, "silu": F.silu}


def check(
    x: Tensor, dw: Tensor, pw: Tensor, bn_weight: Tensor, bn_bias: Tensor, residual: Tensor | None, stride: int
) -> None:
    """Raise ValueError naming the first argument that breaks the contract of `separable_conv_train`."""
    op = "separable_conv_train"
    output = check_convolutions(op, x, ("dw", dw), ("pw", pw), stride)
    check_vectors(op, x, output[1], bn_weight=bn_weight, bn_bias=bn_bias)
    if residual is not None:
        check_tensor(op, "residual", residual, output, x.device)
    check_values_per_channel(op, x, output)


def check_backward(
    grad_y: Tensor,
    x: Tensor,
    dw: Tensor,
    pw: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    y: Tensor | None,
    z: Tensor,
    z_mean: Tensor,
    var: Tensor,
    stride: int,
) -> None:
    """Raise ValueError naming the first argument that breaks the contract of `separable_conv_train_backward`."""
    op = "separable_conv_train_backward"
    output = check_convolutions(op, x, ("dw", dw), ("pw", pw), stride)
    channels, own, exact = output[1:2], (x.dtype,), (compute_dtype(x),)
    check_given(op, x.device, (
        ("grad_y", grad_y, output, FLOATING), ("y", y, output, own), ("z", z, output, own),
        ("bn_weight", bn_weight, channels, FLOATING), ("bn_bias", bn_bias, channels, FLOATING),
        ("z_mean", z_mean, channels, exact), ("var", var, channels, exact),
    ))  # fmt: skip


def check_infer(
    x: Tensor,
    dw: Tensor,
    dw_bias: Tensor | None,
    pw: Tensor,
    pw_bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    act_dw: str,
    act_pw: str,
) -> None:
    """Raise ValueError naming the first argument that breaks the contract of `separable_conv_infer`."""
    op = "separable_conv_infer"
    output = check_convolutions(op, x, ("dw", dw), ("pw", pw), stride)
    if dw_bias is not None:
        check_vectors(op, x, x.shape[1], dw_bias=dw_bias)
    if pw_bias is not None:
        check_vectors(op, x, output[1], pw_bias=pw_bias)
    if residual is not None:
        check_tensor(op, "residual", residual, output, x.device)
    for name, activation in (("act_dw", act_dw), ("act_pw", act_pw)):
        if activation not in ACTIVATIONS:
            raise ValueError(f"{op}: {name} is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")


def check_convolutions(
    op: str, x: Tensor, depthwise: tuple[str, Tensor], pointwise: tuple[str, Tensor], stride: int
) -> tuple[int, int, int, int]:
    """The shape of the pointwise output. x and both (name, weight) are checked, and the stride, which is 1 or 2."""
    check_map(op, "x", x)
    if stride != 1 and stride != 2:
        raise ValueError(f"{op}: stride is {stride}, expected 1 or 2")
    batch, channels, height, width = x.shape
    (name, dw), (pointwise_name, pw) = depthwise, pointwise
    check_tensor(op, name, dw, (channels, 1, 3, 3), x.device)
    if pw.dim() != 4 or pw.shape[0] < 1:
        raise ValueError(
            f"{op}: {pointwise_name} has shape {tuple(pw.shape)}, expected (C_out, {channels}, 1, 1) with C_out >= 1"
        )
    check_tensor(op, pointwise_name, pw, (pw.shape[0], channels, 1, 1), x.device)
    return batch, pw.shape[0], output_size(height, stride), output_size(width, stride)


def output_size(size: int, stride: int) -> int:
    """Rows or columns after a 3x3 convolution with padding 1."""
    return (size - 1) // stride + 1


def depthwise(x: Tensor, dw: Tensor, stride: int) -> Tensor:
    """x is in the dtype of arithmetic, here and in the functions below."""
    return F.conv2d(x, dw.to(x.dtype), stride=stride, padding=1, groups=x.shape[1])


def pointwise(x: Tensor, pw: Tensor) -> Tensor:
    return F.conv2d(x, pw.to(x.dtype))


def convolution_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, x_needs_grad: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradients of a depthwise 3x3 or pointwise 1x1 convolution's input (None if not needed) and weight."""
    is_depthwise = weight.shape[2] == 3
    padding, groups = (1, x.shape[1]) if is_depthwise else (0, 1)
    geometry = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups)
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight.to(x.dtype), None, *geometry, [x_needs_grad, True, False]
    )
    return grad_x, grad_weight.to(weight.dtype)


def separable_gradients(
    grad: Tensor, x: Tensor, dw: Tensor, pw: Tensor, stride: int, x_needs_grad: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of x (None if not needed), dw and pw. The depthwise output is computed again, not saved."""
    grad_depthwise, grad_pw = convolution_gradients(grad, depthwise(x, dw, stride), pw, 1, True)
    grad_x, grad_dw = convolution_gradients(grad_depthwise, x, dw, stride, x_needs_grad)
    return grad_x, grad_dw, grad_pw


def separable_conv_train(
    x: Tensor,
    dw: Tensor,
    pw: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    residual: Tensor | None,
    stride: int,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Depthwise 3x3, pointwise 1x1, batch norm with the batch's statistics, + residual, ReLU if `relu`.

    x: (N, C_in, H, W); dw: (C_in, 1, 3, 3); pw: (C_out, C_in, 1, 1); bn_weight, bn_bias: (C_out,);
    residual: (N, C_out, H_out, W_out) or None; stride: 1 or 2.

    Returns y (N, C_out, H_out, W_out) in x's dtype, mean and biased variance (C_out,) of the pointwise output in
    `compute_dtype`, and, for backward, that output z in x's dtype, up to one constant per channel, with the mean of
    the stored values. The constant is 0 here; a kernel may choose one that spares digits. Statistics and y are those
    of the stored z. Maps are channels_last.
    """
    check(x, dw, pw, bn_weight, bn_bias, residual, stride)
    dtype = compute_dtype(x)
    z = stored(pointwise(depthwise(x.to(dtype), dw, stride), pw), x.dtype)
    mean, var = statistics(z.to(dtype))
    y = normalise(z.to(dtype), mean, var, bn_weight, bn_bias, eps)
    if residual is not None:
        y = y + residual.to(dtype)
    return stored(y.relu() if relu else y, x.dtype), mean, var, z, mean.clone()


def separable_conv_train_backward(
    grad_y: Tensor,
    x: Tensor,
    dw: Tensor,
    pw: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    y: Tensor | None,
    z: Tensor,
    z_mean: Tensor,
    var: Tensor,
    stride: int,
    eps: float,
    relu: bool,
    x_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of sum(grad_y * y) with respect to x, dw, pw, bn_weight, bn_bias and the residual.

    z, z_mean, var: from `separable_conv_train`; y too, where there is a residual and `relu`, else None.

    The gradient of x and that of the residual are in x's dtype, those of parameters in the parameter's. The
    gradient of x has shape (0,) if it is not needed; that of the residual if y is None: without ReLU it is grad_y.
    """
    check_backward(grad_y, x, dw, pw, bn_weight, bn_bias, y, z, z_mean, var, stride)
    dtype = compute_dtype(x)
    grad, z = grad_y.to(dtype), z.to(dtype)
    if relu:
        grad = let_through(grad, normalise(z, z_mean, var, bn_weight, bn_bias, eps) if y is None else y)
    grad_z, grad_bn_weight, grad_bn_bias = batch_norm_gradients(grad, z, z_mean, var, bn_weight, bn_bias, eps)
    grad_x, grad_dw, grad_pw = separable_gradients(grad_z, x.to(dtype), dw, pw, stride, x_needs_grad)
    nothing = x.new_empty(0)
    return (
        nothing if grad_x is None else stored(grad_x, x.dtype),
        grad_dw,
        grad_pw,
        grad_bn_weight,
        grad_bn_bias,
        nothing.clone() if y is None else stored(grad, x.dtype),
    )


def separable_conv_infer(
    x: Tensor,
    dw: Tensor,
    dw_bias: Tensor | None,
    pw: Tensor,
    pw_bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    act_dw: str,
    act_pw: str,
) -> Tensor:
    """act_pw(pw * act_dw(dw * x + dw_bias) + pw_bias + residual), batch norm folded into weights and biases.

    x: (N, C_in, H, W); dw: (C_in, 1, 3, 3); dw_bias: (C_in,) or None; pw: (C_out, C_in, 1, 1); pw_bias: (C_out,) or
    None; residual: (N, C_out, H_out, W_out) or None; stride: 1 or 2; act_dw, act_pw: names in `ACTIVATIONS`.

    Returns y (N, C_out, H_out, W_out) in x's dtype, channels_last.
    """
    check_infer(x, dw, dw_bias, pw, pw_bias, residual, stride, act_dw, act_pw)
    y = depthwise(x.to(compute_dtype(x)), dw, stride)
    if dw_bias is not None:
        y = y + per_channel(dw_bias.to(y.dtype))
    y = pointwise(ACTIVATIONS[act_dw](y), pw)
    for addend in (None if pw_bias is None else per_channel(pw_bias), residual):
        if addend is not None:
            y = y + addend.to(y.dtype)
    return stored(ACTIVATIONS[act_pw](y), x.dtype)
