"""The residual separable unit in plain PyTorch: two separable convolutions and a skip connection.

`check` is the one place where arguments are validated; the public function, the fake and this reference all call it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from odn_fast.reference._arguments import FLOATING, check_given, check_tensor, check_vectors, compute_dtype
from odn_fast.reference.batch_norm_act import (
    batch_norm_gradients,
    check_values_per_channel,
    let_through,
    normalise,
    statistics,
    stored,
)
from odn_fast.reference.separable_conv import (
    check_convolutions,
    convolution_gradients,
    depthwise,
    output_size,
    pointwise,
    separable_gradients,
)

# The strides of the two depthwise convolutions, by the unit's stride.
STRIDES = {1: (1, 1), 2: (2, 1), 4: (2, 2)}


def check(
    x: Tensor, first: list[Tensor], second: list[Tensor], skip: list[Tensor], identity: bool, stride: int
) -> None:
    """Raise ValueError naming the first argument that breaks the contract of `separable_unit_train`."""
    op = "separable_unit_train"
    if stride not in STRIDES:
        raise ValueError(f"{op}: stride is {stride}, expected 1, 2 or 4")
    check_counts(first, second, skip)
    batch, channels, height, width = check_convolutions(
        op, x, ("first[0]", first[0]), ("first[1]", first[1]), STRIDES[stride][0]
    )
    check_vectors(op, x, channels, **{"first[2]": first[2], "first[3]": first[3]})
    check_tensor(op, "second[0]", second[0], (channels, 1, 3, 3), x.device)
    check_tensor(op, "second[1]", second[1], (channels, channels, 1, 1), x.device)
    check_vectors(op, x, channels, **{"second[2]": second[2], "second[3]": second[3]})
    if skip:
        check_tensor(op, "skip[0]", skip[0], (channels, x.shape[1], 1, 1), x.device)
        check_vectors(op, x, channels, **{"skip[1]": skip[1], "skip[2]": skip[2]})
    if identity and (skip or stride != 1 or x.shape[1] != channels):
        raise ValueError(
            f"{op}: identity with x of shape {tuple(x.shape)}, stride {stride} and {len(skip)} entries in skip, "
            f"expected {channels} channels, stride 1 and an empty skip"
        )
    second_stride = STRIDES[stride][1]
    output = (batch, channels, output_size(height, second_stride), output_size(width, second_stride))
    check_values_per_channel(op, x, output)


def check_counts(first: list[Tensor], second: list[Tensor], skip: list[Tensor]) -> None:
    op = "separable_unit_train"
    for name, tensors in (("first", first), ("second", second)):
        if len(tensors) != 4:
            raise ValueError(f"{op}: {name} has {len(tensors)} entries, expected 4: dw, pw, bn_weight and bn_bias")
    if len(skip) not in (0, 3):
        raise ValueError(f"{op}: skip has {len(skip)} entries, expected none, or 3: pw, bn_weight and bn_bias")


def check_backward(
    grad_y: Tensor,
    x: Tensor,
    first: list[Tensor],
    second: list[Tensor],
    skip: list[Tensor],
    y: Tensor,
    zs: list[Tensor],
    z_means: list[Tensor],
    vars: list[Tensor],
    identity: bool,
    stride: int,
) -> None:
    """Raise ValueError naming the first argument that breaks the contract of `separable_unit_train_backward`."""
    op = "separable_unit_train_backward"
    check(x, first, second, skip, identity, stride)
    convolutions = 3 if skip else 2
    for name, tensors in (("zs", zs), ("z_means", z_means), ("vars", vars)):
        if len(tensors) != convolutions:
            raise ValueError(f"{op}: {name} has {len(tensors)} entries, expected {convolutions}, one a pointwise convolution")
    batch, channels, sizes = x.shape[0], first[1].shape[0], [x.shape[2:]]
    for each in STRIDES[stride]:
        sizes.append([output_size(size, each) for size in sizes[-1]])
    between, output = ((batch, channels, *size) for size in sizes[1:])
    own, exact = (x.dtype,), (compute_dtype(x),)
    given = [("grad_y", grad_y, output, FLOATING), ("y", y, output, own)]
    for index, shape in zip(range(convolutions), (between, output, output), strict=False):
        given.append((f"zs[{index}]", zs[index], shape, own))
        given.append((f"z_means[{index}]", z_means[index], (channels,), exact))
        given.append((f"vars[{index}]", vars[index], (channels,), exact))
    check_given(op, x.device, given)


def pooled(x: Tensor, stride: int) -> Tensor:
    """Average over stride x stride windows; those cut by the border are divided by what they hold."""
    return F.avg_pool2d(x, stride, ceil_mode=True) if stride > 1 else x


def separable_unit_train(
    x: Tensor, first: list[Tensor], second: list[Tensor], skip: list[Tensor], identity: bool, stride: int, eps: float
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """y = relu(separable(relu(separable(x))) + s), each `separable` being depthwise, pointwise, batch norm.

    x: (N, C_in, H, W); first: dw (C_in, 1, 3, 3), pw (C_out, C_in, 1, 1), bn_weight and bn_bias (C_out,);
    second: the same with C_in = C_out; skip: pw (C_out, C_in, 1, 1), bn_weight and bn_bias, or empty; stride: 1,
    2 (in the first depthwise) or 4 (2 in both).

    s is x if `identity`; the batch norm of the 1x1 convolution of the average pool of x if skip is given; else absent.

    Returns y (N, C_out, H_out, W_out) in x's dtype, channels_last, and lists in the order first, second[, skip] of
    mean, biased variance, pointwise output z and mean of the stored z, each as `separable_conv_train` describes it.
    """
    check(x, first, second, skip, identity, stride)
    dtype = compute_dtype(x)
    means, variances, zs = [], [], []

    def batch_norm(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        zs.append(stored(z, x.dtype))
        mean, var = statistics(zs[-1].to(dtype))
        means.append(mean)
        variances.append(var)
        return normalise(zs[-1].to(dtype), mean, var, weight, bias, eps)

    exact = x.to(dtype)
    between = batch_norm(pointwise(depthwise(exact, first[0], STRIDES[stride][0]), first[1]), *first[2:]).relu()
    y = batch_norm(pointwise(depthwise(between, second[0], STRIDES[stride][1]), second[1]), *second[2:])
    if identity:
        y = y + exact
    elif skip:
        y = y + batch_norm(pointwise(pooled(exact, stride), skip[0]), *skip[1:])
    return stored(y.relu(), x.dtype), means, variances, zs, [mean.clone() for mean in means]


def separable_unit_train_backward(
    grad_y: Tensor,
    x: Tensor,
    first: list[Tensor],
    second: list[Tensor],
    skip: list[Tensor],
    y: Tensor,
    zs: list[Tensor],
    z_means: list[Tensor],
    vars: list[Tensor],
    identity: bool,
    stride: int,
    eps: float,
    x_needs_grad: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of sum(grad_y * y) with respect to x, first, second and skip; y, zs, z_means, vars are the forward's.

    The gradient of x is in x's dtype, channels_last, and of shape (0,) if it is not needed; those of parameters are
    in the parameter's dtype. The map between the two convolutions is computed again, not saved.
    """
    check_backward(grad_y, x, first, second, skip, y, zs, z_means, vars, identity, stride)
    dtype = compute_dtype(x)
    exact, zs = x.to(dtype), [z.to(dtype) for z in zs]
    grad = let_through(grad_y.to(dtype), y)

    between = normalise(zs[0], z_means[0], vars[0], *first[2:], eps)
    grad_z, *grad_norm = batch_norm_gradients(grad, zs[1], z_means[1], vars[1], *second[2:], eps)
    grad_between, *grad_weights = separable_gradients(
        grad_z, between.relu(), *second[:2], STRIDES[stride][1], x_needs_grad=True
    )
    grad_second = [*grad_weights, *grad_norm]

    grad_between = let_through(grad_between, between)
    grad_z, *grad_norm = batch_norm_gradients(grad_between, zs[0], z_means[0], vars[0], *first[2:], eps)
    grad_x, *grad_weights = separable_gradients(grad_z, exact, *first[:2], STRIDES[stride][0], x_needs_grad)
    grad_first = [*grad_weights, *grad_norm]

    grad_skip, grad_s = [], grad
    if skip:
        grad_z, *grad_norm = batch_norm_gradients(grad, zs[2], z_means[2], vars[2], *skip[1:], eps)
        pool = pooled(exact, stride)
        grad_s, grad_pw = convolution_gradients(grad_z, pool, skip[0], 1, x_needs_grad)
        grad_skip = [grad_pw, *grad_norm]
        if x_needs_grad and stride > 1:
            geometry = ([stride] * 2, [stride] * 2, [0, 0])
            grad_s = torch.ops.aten.avg_pool2d_backward(grad_s, exact, *geometry, True, False, None)
    if not x_needs_grad:
        return x.new_empty(0), grad_first, grad_second, grad_skip
    if identity or skip:
        grad_x = grad_x + grad_s
    return stored(grad_x, x.dtype), grad_first, grad_second, grad_skip
