"""The residual separable unit, the unit of growth in SEArch, in one step.

Two separable convolutions with a ReLU between them, plus a skip connection, then ReLU. One boundary for the whole
unit lets the kernels apply normalisation and ReLU where the next convolution reads the map anyway.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

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
from odn_fast.ops.separable_conv import backward_flops, convolution_backward_flops, empty_map, forward_flops
from odn_fast.reference import separable_unit as reference


def separable_unit_train(
    x: Tensor,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    skip: Sequence[Tensor] = (),
    identity: bool = False,
    stride: int = 1,
    eps: float = 1e-5,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """relu(separable(relu(separable(x, first)), second) + s), separable = depthwise 3x3, pointwise, batch norm.

    x: (N, C_in, H, W), any strides. first: dw (C_in, 1, 3, 3), pw (C_out, C_in, 1, 1), bn_weight (C_out,), bn_bias
    (C_out,); second: dw (C_out, 1, 3, 3), pw (C_out, C_out, 1, 1), bn_weight, bn_bias; skip: pw (C_out, C_in, 1, 1),
    bn_weight, bn_bias, or empty. Each float32, bfloat16 or float64, mixed at will.
    stride: 1; 2, in the first depthwise convolution; 4, 2 in both. H_out = ceil(H / stride).

    s is x if `identity`, which needs stride 1, C_in = C_out and an empty skip. With skip it is the batch norm of the
    1x1 convolution of x, average-pooled by the stride (windows cut by the border divided by what they hold). With
    neither it is absent. All batch norms use the statistics of the batch.

    Returns y (N, C_out, H_out, W_out) in x's dtype, channels_last, differentiable once; and the means and the biased
    variances (C_out,) of the pointwise outputs of first, second and, if given, skip, as `separable_conv_train` does.
    Under autocast to bfloat16, x and the convolution weights are read as bfloat16; on CUDA, x.

    Raises ValueError on shapes, dtypes, devices, counts or strides that do not fit, and where a channel of y has only
    one value.
    """
    reference.check_counts(first, second, skip)
    if not x.is_cuda:  # where the op checks
        reference.check(x, first, second, skip, identity, stride)
    y, means, variances, _, _ = _train(x, first, second, skip, identity, stride, eps)
    return y, means, variances


def _fake(x, first, second, skip, identity, stride, eps):
    reference.check(x, first, second, skip, identity, stride)
    channels, dtype = first[1].shape[0], reference.compute_dtype(x)
    between = empty_map(x, channels, reference.STRIDES[stride][0])
    zs = [between, *(empty_map(between, channels, reference.STRIDES[stride][1]) for _ in range(2 if skip else 1))]
    means, variances, z_means = ([x.new_empty(channels, dtype=dtype) for _ in zs] for _ in range(3))
    return torch.empty_like(zs[1]), means, variances, zs, z_means


def _fake_backward(grad_y, x, first, second, skip, y, zs, z_means, vars, identity, stride, eps, x_needs_grad):
    grad_x = torch.empty_like(x, memory_format=torch.channels_last) if x_needs_grad else x.new_empty(0)
    return grad_x, *([contiguous_like(parameter) for parameter in group] for group in (first, second, skip))


_train = define(
    "separable_unit_train(Tensor x, Tensor[] first, Tensor[] second, Tensor[] skip, bool identity, int stride,"
    " float eps) -> (Tensor y, Tensor[] means, Tensor[] vars, Tensor[] zs, Tensor[] z_means)",
    reference.separable_unit_train,
    _fake,
)
_train_backward = define(
    "separable_unit_train_backward(Tensor grad_y, Tensor x, Tensor[] first, Tensor[] second, Tensor[] skip, Tensor y,"
    " Tensor[] zs, Tensor[] z_means, Tensor[] vars, bool identity, int stride, float eps, bool x_needs_grad)"
    " -> (Tensor grad_x, Tensor[] grad_first, Tensor[] grad_second, Tensor[] grad_skip)",
    reference.separable_unit_train_backward,
    _fake_backward,
)


class _SeparableUnitTrain(torch.autograd.Function):
    """Takes and gives the lists flattened, because a Function sees only tensors that are arguments of their own."""

    @staticmethod
    def forward(ctx, identity, stride, eps, x, *parameters):
        first, second, skip = parameters[:4], parameters[4:8], parameters[8:]
        with torch._C._AutoDispatchBelowAutograd():
            y, *lists = _train(x, first, second, skip, identity, stride, eps)
        means, variances, zs, z_means = lists
        ctx.mark_non_differentiable(*means, *variances, *zs, *z_means)
        ctx.set_materialize_grads(False)  # maps of zeros for zs, else
        ctx.save_for_backward(x, *parameters, y, *zs, *z_means, *variances)
        ctx.settings = identity, stride, eps
        return y, *means, *variances, *zs, *z_means

    @staticmethod
    def backward(ctx, grad_y, *_):
        refuse_second_derivative("separable_unit_train")
        if grad_y is None:
            return (None,) * len(ctx.needs_input_grad)
        x_needs_grad = ctx.needs_input_grad[3]
        x, *saved = ctx.saved_tensors
        skip_size = len(ctx.needs_input_grad) - 12
        convolutions = 3 if skip_size else 2
        first, second, skip, (y,), zs, z_means, variances = _split(saved, 4, 4, skip_size, 1, *[convolutions] * 3)
        grad_x, *grad_parameters = _train_backward(
            grad_y, x, first, second, skip, y, zs, z_means, variances, *ctx.settings, x_needs_grad
        )
        return None, None, None, grad_x if x_needs_grad else None, *sum(grad_parameters, [])


def _split(tensors, *sizes):
    begin = 0
    for size in sizes:
        yield tensors[begin : begin + size]
        begin += size


def _autograd(x, first, second, skip, identity, stride, eps):
    y, *flat = _SeparableUnitTrain.apply(identity, stride, eps, x, *first, *second, *skip)
    convolutions = 3 if skip else 2
    return y, *_split(flat, *[convolutions] * 4)


def _read(x, first, second, skip, identity, stride, eps):
    first, second = ([as_bfloat16(dw), as_bfloat16(pw), *norm] for dw, pw, *norm in (first, second))
    return as_bfloat16(x), first, second, [*map(as_bfloat16, skip[:1]), *skip[1:]], identity, stride, eps


def _read_on_cuda(x, *others):
    """x alone: the kernels round the weights of products on load and use the others as they are."""
    return as_bfloat16(x), *others


library.impl("separable_unit_train", _autograd, "Autograd")
define_autocast(_train, _read, _read_on_cuda)
register_cuda(
    "separable_unit_train",
    [triton("separable_unit", "separable_unit_train"), _separable_conv_cuda.unit_train],
    lambda *args: reference.check(*args[:6]),
)
register_cuda(
    "separable_unit_train_backward",
    [triton("separable_unit", "separable_unit_train_backward"), _separable_conv_cuda.unit_train_backward],
    lambda *args: reference.check_backward(*args[:11]),
)


@register_flop_formula(torch.ops.odn_fast.separable_unit_train)
def _flops(x_shape, first, second, skip, identity, stride, eps, **kwargs) -> int:
    flops, between = forward_flops(x_shape, first[0], first[1], reference.STRIDES[stride][0])
    more_flops, output = forward_flops(between, second[0], second[1], reference.STRIDES[stride][1])
    return flops + more_flops + (conv_flop_count(x_shape, skip[0], output) if skip else 0)


@register_flop_formula(torch.ops.odn_fast.separable_unit_train_backward)
def _flops_backward(
    grad_shape, x_shape, first, second, skip, y, zs, z_means, vars, identity, stride, eps, x_needs_grad, **kwargs
) -> int:
    first_stride, second_stride = reference.STRIDES[stride]
    flops = backward_flops(x_shape, first[0], first[1], first_stride, x_needs_grad)
    flops += backward_flops(zs[0], second[0], second[1], second_stride, True)
    if skip:
        pooled = [*x_shape[:2], *grad_shape[2:]]
        flops += convolution_backward_flops(grad_shape, pooled, skip[0], x_needs_grad)
    return flops
