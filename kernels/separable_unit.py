"""The residual separable unit in Triton: the kernels of the separable convolution, chained.

The map between the two convolutions is never stored: the second convolution normalises the first one's z as it reads
it, forward and backward. Three launches forward, four with a projected skip; six backward, seven with one.
"""

import torch

from . import _common
from ._common import dense
from .separable_conv import NO_NORM, dense_weight, normalised, pointwise_statistics, too_large
from .separable_conv_backward import depthwise_gradient, pointwise_gradient, too_many_weights, weight_like
from .separable_sums import gradient_sums, reduce_weights

STRIDES = {1: (1, 1), 2: (2, 1), 4: (2, 2)}  # of the two depthwise convolutions, by the unit's


def separable_unit_train(x, first, second, skip, identity, stride, eps):
    """As `odn_fast.reference.separable_unit.separable_unit_train`."""
    x = dense(x)
    first, second, skip = layer(first), layer(second), layer([None, *skip] if skip else [])
    z, mean, var, z_mean = pointwise_statistics(x, *first[:2], NO_NORM, STRIDES[stride][0], eps)
    convolutions = [(z, mean, var, z_mean)]
    between = (mean, var, *first[2:])
    convolutions.append(pointwise_statistics(z, *second[:2], between, STRIDES[stride][1], eps))
    residual, residual_norm = x if identity else None, NO_NORM
    if skip:
        convolutions.append(pointwise_statistics(x, *skip[:2], NO_NORM, stride, eps))
        residual, *statistics = convolutions[2][:3]
        residual_norm = (*statistics, *skip[2:])
    z, mean, var, _ = convolutions[1]
    y = normalised(z, (mean, var, *second[2:]), residual, residual_norm, eps, True)
    zs, means, variances, z_means = (list(column) for column in zip(*convolutions, strict=True))
    return y, means, variances, zs, z_means


def separable_unit_train_backward(
    grad_y, x, first, second, skip, y, zs, z_means, vars, identity, stride, eps, x_needs_grad
):
    """As `odn_fast.reference.separable_unit.separable_unit_train_backward`."""
    x, grad_y, y, zs = dense(x), dense(grad_y), dense(y), [dense(z) for z in zs]
    weights = [weight_like(weight) for weight in (*first[:2], *second[:2], *skip[:1])]
    if y.numel() == 0:
        return nothing_to_sum(x, first, second, skip, x_needs_grad)
    inputs, outputs = x.shape[1], y.shape[1]
    first, second, skip = layer(first), layer(second), layer([None, *skip] if skip else [])
    norms = [
        (dense(mean), dense(var), *parameters[2:])
        for mean, var, parameters in zip(z_means, vars, (first, second, skip), strict=False)
    ]
    adds = identity or bool(skip)
    grad, second_norm, skip_norm = gradient_sums(
        grad_y, y if adds else None, zs[1], norms[1], (zs[2], *norms[2]) if skip else None, True, adds, eps
    )
    between, second_pw = pointwise_gradient(
        grad, zs[1], norms[1], second_norm[0], zs[0], *second[:2], norms[0], STRIDES[stride][1], not adds, eps
    )
    grad_between, second_dw, first_norm = depthwise_gradient(
        between, zs[0], second[0], norms[0], None, 1, STRIDES[stride][1], True, eps
    )
    added = grad if identity else None
    if skip:
        added, skip_pw = pointwise_gradient(
            grad, zs[2], norms[2], skip_norm[0], x, *skip[:2], NO_NORM, stride, False, eps, x_needs_grad
        )
    between, first_pw = pointwise_gradient(
        grad_between, zs[0], norms[0], first_norm[0], x, *first[:2], NO_NORM, STRIDES[stride][0], False, eps
    )
    grad_x, first_dw, _ = depthwise_gradient(
        between, x, first[0], NO_NORM, added if x_needs_grad else None, stride, STRIDES[stride][0], x_needs_grad, eps
    )
    reduce_weights(
        (weights[1], first_pw, weights[0], first_dw), (weights[3], second_pw, weights[2], second_dw),
        (weights[4], skip_pw) if skip else None, inputs, outputs,
    )  # fmt: skip
    return (
        grad_x if x_needs_grad else x.new_empty(0),
        [*weights[:2], *first_norm[1:]],
        [*weights[2:4], *second_norm[1:]],
        [weights[4], *skip_norm[1:]] if skip else [],
    )


def layer(parameters):
    """dw, pw, bn_weight, bn_bias as the kernels read them; dw may be None."""
    if not parameters:
        return []
    dw, *others = parameters
    return [(None, None) if dw is None else dense_weight(dw), *map(dense, others)]


def nothing_to_sum(x, *groups_and_need):
    """The gradients of an empty batch."""
    *groups, x_needs_grad = groups_and_need
    grad_x = torch.empty_like(x) if x_needs_grad else x.new_empty(0)
    return grad_x, *([weight_like(parameter).zero_() for parameter in group] for group in groups)


def why_not(function, *args):
    """Reasons why `function` of this file cannot take its arguments; [] if it can."""
    if function == "separable_unit_train":
        x, first, second, skip, _, stride, _ = args
        maps, outputs = {"x": x}, []
        for channels, reach in ((first[1].shape[0], STRIDES[stride][0]), (first[1].shape[0], stride)):
            outputs += too_large(x, channels, reach)
    else:
        grad_y, x, first, second, skip, y, zs = args[:7]
        maps = {"x": x, "grad_y": grad_y, "y": y, **{f"zs[{index}]": z for index, z in enumerate(zs)}}
        outputs = too_many_weights(first[1]) + too_many_weights(second[1]) + too_large(zs[0], x.shape[1], 1)
    parameters = {
        f"{name}[{index}]": parameter
        for name, group in (("first", first), ("second", second), ("skip", skip))
        for index, parameter in enumerate(group)
    }
    return _common.why_not(**maps, **parameters) + outputs
