"""Training batch norm, residual and ReLU in plain PyTorch.

`check` is the one place where arguments are validated; the public function, the fake and this reference all call it.
The pieces are shared with `separable_conv` and `separable_unit`.
"""

import torch
from torch import Tensor

from odn_fast.reference._arguments import FLOATING, check_given, check_map, check_tensor, check_vectors, compute_dtype


def check(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> None:
    """Raise ValueError naming the first argument that breaks the contract of `batch_norm_act_train`."""
    op = "batch_norm_act_train"
    check_map(op, "x", x)
    check_vectors(op, x, x.shape[1], weight=weight, bias=bias)
    if residual is not None:
        check_tensor(op, "residual", residual, x.shape, x.device)
    check_values_per_channel(op, x, x.shape)


def check_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, y: Tensor | None, mean: Tensor, var: Tensor
) -> None:
    """Raise ValueError naming the first argument that breaks the contract of `batch_norm_act_train_backward`."""
    op = "batch_norm_act_train_backward"
    check_map(op, "x", x)
    shape, exact = x.shape, (compute_dtype(x),)
    channels = shape[1:2]
    check_given(op, x.device, (
        ("grad_y", grad_y, shape, FLOATING), ("y", y, shape, (x.dtype,)),
        ("weight", weight, channels, FLOATING), ("bias", bias, channels, FLOATING),
        ("mean", mean, channels, exact), ("var", var, channels, exact),
    ))  # fmt: skip


def check_values_per_channel(op: str, x: Tensor, output: tuple[int, int, int, int]) -> None:
    batch, channels, height, width = output
    if batch * height * width == 1:
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)}, which leaves one value per channel, {tuple(output)}; "
            "expected more than 1 value per channel when training"
        )


def stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype).contiguous(memory_format=torch.channels_last)


def statistics(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, zeros for an empty batch."""
    if z.numel() == 0:
        return z.new_zeros(z.shape[1]), z.new_zeros(z.shape[1])
    mean = z.mean((0, 2, 3))
    mean = mean + (z - per_channel(mean)).mean((0, 2, 3))  # what the sum of large values lost
    return mean, (z - per_channel(mean)).square().mean((0, 2, 3))


def per_channel(vector: Tensor) -> Tensor:
    return vector[:, None, None]


def normalise(z: Tensor, z_mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    scale = weight.to(z.dtype) * torch.rsqrt(var + eps)
    return (z - per_channel(z_mean)) * per_channel(scale) + per_channel(bias.to(z.dtype))


def let_through(grad: Tensor, y: Tensor) -> Tensor:
    """The gradient where a ReLU with result, or argument, y let it through; as in PyTorch, NaN does."""
    return grad.masked_fill(y <= 0, 0)


def batch_norm_gradients(
    grad: Tensor, z: Tensor, z_mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of z, through the statistics too, and of weight and bias."""
    inverse_deviation = torch.rsqrt(var + eps)
    standardised = (z - per_channel(z_mean)) * per_channel(inverse_deviation)
    grad_bias, grad_weight = grad.sum((0, 2, 3)), (grad * standardised).sum((0, 2, 3))
    values = z.numel() // z.shape[1]
    through_statistics = per_channel(grad_bias / values) + standardised * per_channel(grad_weight / values)
    grad_z = per_channel(weight.to(z.dtype) * inverse_deviation) * (grad - through_statistics)
    return grad_z, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def batch_norm_act_train(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm with the batch's statistics, + residual, ReLU if `relu`.

    x: (N, C, H, W); weight, bias: (C,); residual: (N, C, H, W) or None.

    Returns y (N, C, H, W) in x's dtype, channels_last, and mean and biased variance (C,) of x in `compute_dtype`.
    """
    check(x, weight, bias, residual)
    exact = x.to(compute_dtype(x))
    mean, var = statistics(exact)
    y = normalise(exact, mean, var, weight, bias, eps)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return stored(y.relu() if relu else y, x.dtype), mean, var


def batch_norm_act_train_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    y: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    relu: bool,
    x_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of sum(grad_y * y) with respect to x, weight, bias and the residual.

    mean, var: from `batch_norm_act_train`; y too, where there is a residual and `relu`, else None.

    The gradient of x and that of the residual are in x's dtype, channels_last, those of parameters in the parameter's.
    The gradient of x has shape (0,) if it is not needed; that of the residual if y is None: without ReLU it is grad_y.
    """
    check_backward(grad_y, x, weight, bias, y, mean, var)
    dtype = compute_dtype(x)
    grad, exact = grad_y.to(dtype), x.to(dtype)
    if relu:
        grad = let_through(grad, normalise(exact, mean, var, weight, bias, eps) if y is None else y)
    grad_x, grad_weight, grad_bias = batch_norm_gradients(grad, exact, mean, var, weight, bias, eps)
    return (
        stored(grad_x, x.dtype) if x_needs_grad else x.new_empty(0),
        grad_weight,
        grad_bias,
        x.new_empty(0) if y is None else stored(grad, x.dtype),
    )
