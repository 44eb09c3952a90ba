"""Training batch norm, residual and ReLU in one step, for networks of dense convolutions (ResNet, WRN).

Batch normalisation is that of Ioffe and Szegedy (2015), algorithm 1. The statistics are those of the batch and come
back to the caller, who keeps the running ones. At inference batch norm belongs into the convolution before it.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from odn_fast.ops._choose import register_cuda, triton
from odn_fast.ops._library import (
    as_bfloat16,
    contiguous_like,
    define,
    define_autocast,
    library,
    refuse_second_derivative,
)
from odn_fast.reference import batch_norm_act as reference


def batch_norm_act(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, eps: float = 1e-5, relu: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """relu(batch_norm(x) + residual) with the statistics of the batch.

    x: (N, C, H, W), any strides; weight, bias: (C,); residual: (N, C, H, W) or None; each float32, bfloat16 or
    float64, mixed at will. relu=False leaves the ReLU out.

    Returns y (N, C, H, W) in x's dtype, channels_last, differentiable once; and the mean and the biased variance (C,)
    of x, for running statistics, not differentiable, in float32 (float64 for float64 x). Arithmetic is in their dtype.
    An empty batch has y empty and statistics zero.

    Under autocast to bfloat16, x and residual are read as bfloat16. `torch.func` transforms do not see through the op.

    Raises ValueError on shapes, dtypes or devices that do not fit, and where a channel has only one value.
    """
    if not x.is_cuda:  # where the op checks
        reference.check(x, weight, bias, residual)
    return _train(x, weight, bias, residual, eps, relu)


def _map_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _fake_train(x, weight, bias, residual, eps, relu):
    reference.check(x, weight, bias, residual)
    mean, var = (x.new_empty(x.shape[1], dtype=reference.compute_dtype(x)) for _ in range(2))
    return _map_like(x), mean, var


def _fake_train_backward(grad_y, x, weight, bias, y, mean, var, eps, relu, x_needs_grad):
    return (
        _map_like(x) if x_needs_grad else x.new_empty(0),
        contiguous_like(weight),
        contiguous_like(bias),
        x.new_empty(0) if y is None else _map_like(x),
    )


_train = define(
    "batch_norm_act_train(Tensor x, Tensor weight, Tensor bias, Tensor? residual, float eps, bool relu)"
    " -> (Tensor y, Tensor mean, Tensor var)",
    reference.batch_norm_act_train,
    _fake_train,
)
_train_backward = define(
    "batch_norm_act_train_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor bias, Tensor? y, Tensor mean,"
    " Tensor var, float eps, bool relu, bool x_needs_grad)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
    reference.batch_norm_act_train_backward,
    _fake_train_backward,
)


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps, relu):
        with torch._C._AutoDispatchBelowAutograd():
            y, mean, var = _train(x, weight, bias, residual, eps, relu)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        # Without a residual, the ReLU's mask is computed again from x.
        ctx.save_for_backward(x, weight, bias, y if relu and residual is not None else None, mean, var)
        ctx.settings = eps, relu
        ctx.residual_dtype = None if residual is None else residual.dtype
        return y, mean, var

    @staticmethod
    def backward(ctx, grad_y, *_):
        refuse_second_derivative("batch_norm_act_train")
        if grad_y is None:
            return (None,) * 6
        x_needs_grad, residual_needs_grad = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        grad_x, grad_weight, grad_bias, grad_residual = _train_backward(
            grad_y, *ctx.saved_tensors, *ctx.settings, x_needs_grad
        )
        relu = ctx.settings[1]
        grad_residual = (grad_residual if relu else grad_y).to(ctx.residual_dtype) if residual_needs_grad else None
        return grad_x if x_needs_grad else None, grad_weight, grad_bias, grad_residual, None, None


def _read(x, weight, bias, residual, eps, relu):
    return as_bfloat16(x), weight, bias, as_bfloat16(residual), eps, relu


library.impl("batch_norm_act_train", _BatchNormAct.apply, "Autograd")
define_autocast(_train, _read)
register_cuda(
    "batch_norm_act_train", [triton("batch_norm_act", "batch_norm_act_train")], lambda *args: reference.check(*args[:4])
)
register_cuda(
    "batch_norm_act_train_backward",
    [triton("batch_norm_act", "batch_norm_act_train_backward")],
    lambda *args: reference.check_backward(*args[:7]),
)


@register_flop_formula([torch.ops.odn_fast.batch_norm_act_train, torch.ops.odn_fast.batch_norm_act_train_backward])
def _flops(*args, **kwargs) -> int:
    return 0  # as PyTorch counts batch norm, addition and ReLU
