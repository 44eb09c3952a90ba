"""Backward of the separable convolution in Triton, in four launches.

1. `separable_sums._sums`: the gradient g before batch norm, masked by the ReLU, its sum and that of its product with
   the normalised z, from which the last program makes the gradients of batch norm's parameters and
   dz = a * g + b * (z - mean) + c.
2. `_pointwise_backward`: dz on load, the gradient of the depthwise output, and partial sums of that of pw. The
   depthwise output is computed again.
3. `_depthwise_backward`: the gradient of x and partial sums of that of dw, from the same nine loads. In a residual unit
   x is the normalised z of the layer before; then g of that layer is what is stored, and its sums are taken here.
4. `separable_sums._reduce`: the partial sums of weights, of all layers at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common
from ._common import (
    HOPPER,
    capability,
    cdiv,
    counter,
    dense,
    dot_dtype,
    is_hopper,
    is_last,
    jit,
    launch,
    processors,
    relu,
    rounded,
)
from ._tuned import blocks
from .separable_conv import (
    NO_NORM,
    channel_scale,
    dense_weight,
    gathered,
    operand,
    padded,
    position,
    split,
    tap_major,
    too_large,
    window,
)
from .separable_sums import finish_norm, gradient_sums, norm_gradients, reduce_weights, total_of


@jit
def _pointwise_backward(
    grad_ptr, z_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, coefficients_ptr,
    x_ptr, dw_ptr, taps_ptr, pw_ptr, norm_mean_ptr, norm_var_ptr, norm_weight_ptr, norm_bias_ptr,
    grad_between_ptr, partial_ptr,
    pixels, height, width, out_height, out_width, tiles, tiles_each, eps,
    CI: tl.constexpr, CO: tl.constexpr, STRIDE: tl.constexpr, RELU: tl.constexpr, DOT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """grad_between = dz . pw and partial sums (programs, CO, CI) of dz^T . between.

    grad: g, or, with RELU, what is still to be masked by batch norm of z. between: the depthwise output of x, or its
    average pool if dw is None. grad_between: (pixels, CI), or None. norm_*, taps: as in the forward pass.
    """
    NORMALISE: tl.constexpr = norm_mean_ptr is not None
    dtype = x_ptr.dtype.element_ty
    channels = tl.program_id(1) * BK + tl.arange(0, BK)
    outputs = tl.arange(0, BN)
    inside, outputs_inside = channels < CI, outputs < CO
    scale = tl.zeros([BK], tl.float32)
    shift = tl.zeros([BK], tl.float32)
    if NORMALISE:
        scale, shift = channel_scale(norm_mean_ptr, norm_var_ptr, norm_weight_ptr, norm_bias_ptr, channels, inside, eps)
    if RELU:
        z_scale, z_shift = channel_scale(mean_ptr, var_ptr, weight_ptr, bias_ptr, outputs, outputs_inside, eps)
    mean = tl.load(mean_ptr + outputs, mask=outputs_inside, other=0.0)
    a = tl.load(coefficients_ptr + outputs, mask=outputs_inside, other=0.0)
    b = tl.load(coefficients_ptr + CO + outputs, mask=outputs_inside, other=0.0)
    c = tl.load(coefficients_ptr + 2 * CO + outputs, mask=outputs_inside, other=0.0)
    weight_offset = outputs[:, None] * CI + channels[None, :]
    weight_mask = outputs_inside[:, None] & inside[None, :]
    if grad_between_ptr is not None:
        pw = operand(tl.load(pw_ptr + weight_offset, mask=weight_mask, other=0.0).to(tl.float32), dtype, DOT)
    weights_ptr = tap_major(dw_ptr, taps_ptr, CI, BK)
    grad_pw = tl.zeros([BN, BK], tl.float32)
    first = tl.program_id(0) * tiles_each
    for tile in tl.range(first, tl.minimum(first + tiles_each, tiles), num_stages=1):
        pixel = tile * BM + tl.arange(0, BM)
        valid = pixel < pixels
        mask = valid[:, None] & outputs_inside[None, :]
        offset = pixel[:, None] * CO + outputs[None, :]
        grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            grad = tl.where(z * z_scale[None, :] + z_shift[None, :] <= 0, 0.0, grad)
        grad_z = a[None, :] * grad + (b[None, :] * (z - mean[None, :]) + c[None, :])
        grad_z = operand(tl.where(mask, grad_z, 0.0), dtype, DOT)
        if grad_between_ptr is not None:
            grad_between = tl.dot(grad_z, pw, input_precision="tf32x3")
            tl.store(
                grad_between_ptr + pixel[:, None] * CI + channels[None, :], rounded(grad_between, dtype),
                mask=valid[:, None] & inside[None, :],
            )  # fmt: skip
        between = gathered(
            x_ptr, weights_ptr, scale, shift, pixel, valid, channels, inside,
            height, width, out_height, out_width, CI, STRIDE, NORMALISE,
        )  # fmt: skip
        grad_pw = tl.dot(tl.trans(grad_z), operand(between, dtype, DOT), grad_pw, input_precision="tf32x3")
    tl.store(partial_ptr + tl.program_id(0) * (CO * CI) + weight_offset, grad_pw, mask=weight_mask)


@triton.jit
def _tap_row(
    grad_x, left, middle, right, x, grad_ptr, dw_ptr, image, row, column, valid, channels, inside,
    out_height, out_width, C: tl.constexpr, STRIDE: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Add what the taps of one row of dw give: to grad_x, and to their sums of x times gradient."""
    for tap in tl.static_range(3):
        below, beside = row + 1 - ROW, column + 1 - tap  # stride times the output's row and column
        reached = valid & (below >= 0) & (beside >= 0)
        if STRIDE == 2:
            reached = reached & ((below & 1) == 0) & ((beside & 1) == 0)
            below, beside = below >> 1, beside >> 1
        mask = (reached & (below < out_height) & (beside < out_width))[:, None] & inside[None, :]
        offset = ((image * out_height + below) * out_width + beside)[:, None] * C + channels[None, :]
        grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(dw_ptr + (ROW * 3 + tap) * C + channels, mask=inside, other=0.0).to(tl.float32)
        grad_x += grad * weight[None, :]
        if tap == 0:
            left += grad * x
        elif tap == 1:
            middle += grad * x
        else:
            right += grad * x
    return grad_x, left, middle, right


@triton.jit
def _store_taps(partial_ptr, left, middle, right, channels, inside, C: tl.constexpr, ROW: tl.constexpr):
    row = partial_ptr + (tl.program_id(0) * 9 + ROW * 3) * C + channels
    tl.store(row, tl.sum(left, 0), mask=inside)
    tl.store(row + C, tl.sum(middle, 0), mask=inside)
    tl.store(row + 2 * C, tl.sum(right, 0), mask=inside)


@jit
def _depthwise_backward(
    grad_ptr, x_ptr, dw_ptr, norm_mean_ptr, norm_var_ptr, norm_weight_ptr, norm_bias_ptr, added_ptr, grad_x_ptr,
    dw_partial_ptr, partial_ptr, counter_ptr, coefficients_ptr, grad_weight_ptr, grad_bias_ptr,
    pixels, height, width, out_height, out_width, tiles, tiles_each, eps,
    C: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """grad_x and partial sums (programs, 9, C) of the gradient of dw, from grad (images, out_height, out_width, C).

    added: what the skip connection adds to grad_x: a gradient of x's size (WINDOW 1), or of the average pool of
    WINDOW x WINDOW pixels of x, or None. norm_*: of the batch norm and ReLU that x goes through on load, or None; if
    given, grad_x is the gradient of what that ReLU takes, and what `_sums` finds is found here.
    """
    NORMALISE: tl.constexpr = norm_mean_ptr is not None
    channels = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = channels < C
    if NORMALISE:
        scale, shift = channel_scale(norm_mean_ptr, norm_var_ptr, norm_weight_ptr, norm_bias_ptr, channels, inside, eps)
        mean = tl.load(norm_mean_ptr + channels, mask=inside, other=0.0)
        sums = tl.zeros([BM, BK], tl.float32)
        products = tl.zeros([BM, BK], tl.float32)
    a0 = tl.zeros([BM, BK], tl.float32)
    a1 = tl.zeros([BM, BK], tl.float32)
    a2 = tl.zeros([BM, BK], tl.float32)
    b0 = tl.zeros([BM, BK], tl.float32)
    b1 = tl.zeros([BM, BK], tl.float32)
    b2 = tl.zeros([BM, BK], tl.float32)
    c0 = tl.zeros([BM, BK], tl.float32)
    c1 = tl.zeros([BM, BK], tl.float32)
    c2 = tl.zeros([BM, BK], tl.float32)
    first = tl.program_id(0) * tiles_each
    for tile in tl.range(first, tl.minimum(first + tiles_each, tiles), num_stages=1):
        pixel = tile * BM + tl.arange(0, BM)
        valid = pixel < pixels
        image, row, column = position(pixel, height, width)
        mask = valid[:, None] & inside[None, :]
        offset = pixel[:, None] * C + channels[None, :]
        stored_x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        x = stored_x
        if NORMALISE:
            x = stored_x * scale[None, :] + shift[None, :]
            let_through = mask & ((x <= 0) == 0)
            x = relu(x)
        grad_x = tl.zeros([BM, BK], tl.float32)
        grad_x, a0, a1, a2 = _tap_row(
            grad_x, a0, a1, a2, x, grad_ptr, dw_ptr, image, row, column, valid, channels, inside,
            out_height, out_width, C, STRIDE, 0,
        )  # fmt: skip
        grad_x, b0, b1, b2 = _tap_row(
            grad_x, b0, b1, b2, x, grad_ptr, dw_ptr, image, row, column, valid, channels, inside,
            out_height, out_width, C, STRIDE, 1,
        )  # fmt: skip
        grad_x, c0, c1, c2 = _tap_row(
            grad_x, c0, c1, c2, x, grad_ptr, dw_ptr, image, row, column, valid, channels, inside,
            out_height, out_width, C, STRIDE, 2,
        )  # fmt: skip
        if grad_x_ptr is not None:
            if added_ptr is not None:
                if WINDOW == 1:
                    grad_x += tl.load(added_ptr + offset, mask=mask, other=0.0).to(tl.float32)
                else:
                    pooled_height, pooled_width = (height - 1) // WINDOW + 1, (width - 1) // WINDOW + 1
                    top, left = row // WINDOW, column // WINDOW
                    place = (image * pooled_height + top) * pooled_width + left
                    added = tl.load(added_ptr + place[:, None] * C + channels[None, :], mask=mask, other=0.0)
                    shared = window(top * WINDOW, left * WINDOW, height, width, WINDOW)
                    grad_x += added.to(tl.float32) / shared[:, None]
            if NORMALISE:
                grad_x = tl.where(let_through, grad_x, 0.0)
            stored = rounded(grad_x, grad_x_ptr.dtype.element_ty)
            tl.store(grad_x_ptr + offset, stored, mask=mask)
            if NORMALISE:
                grad_x = stored.to(tl.float32)
                sums += grad_x
                products += grad_x * (stored_x - mean[None, :])
    _store_taps(dw_partial_ptr, a0, a1, a2, channels, inside, C, 0)
    _store_taps(dw_partial_ptr, b0, b1, b2, channels, inside, C, 1)
    _store_taps(dw_partial_ptr, c0, c1, c2, channels, inside, C, 2)
    if NORMALISE:
        programs = tl.num_programs(0)
        tl.store(partial_ptr + tl.program_id(0) * C + channels, tl.sum(sums, 0), mask=inside)
        tl.store(partial_ptr + (programs + tl.program_id(0)) * C + channels, tl.sum(products, 0), mask=inside)
        if is_last(counter_ptr, programs * tl.num_programs(1)):
            for block in tl.range(0, C, BK, num_stages=1):
                columns = block + tl.arange(0, BK)
                finish_norm(
                    total_of(partial_ptr, columns, programs, C, ROWS),
                    total_of(partial_ptr + programs * C, columns, programs, C, ROWS), columns, pixels,
                    norm_var_ptr, norm_weight_ptr, coefficients_ptr, grad_weight_ptr, grad_bias_ptr, eps, C,
                )  # fmt: skip


# ---- launchers


def pointwise_gradient(grad, z, norm, coefficients, x, dw, pw, x_norm, stride, relu, eps, needed=True):
    """(gradient of the depthwise output, or of the average pool if dw is (None, None); partial sums of pw's gradient).

    dw: from `dense_weight`; its taps are written. grad, norm, coefficients: of the batch norm of z, from
    `gradient_sums`; with relu, grad is still to be masked. needed: whether the first is; else it is None. x_norm: as in
    `pointwise_statistics`.
    """
    outputs, inputs = pw.shape[:2]
    pixels = z.numel() // outputs
    same = (inputs, outputs, stride, int(dw[0] is None), int(x_norm[0] is not None))
    sizes = blocks("separable_pointwise_backward", x, same=same, size=pixels, default=_pointwise_default(same, x))
    output_block = padded(outputs, LARGEST_OUTPUTS)
    input_block = padded(inputs, max(4096 // output_block, 16))
    tiles = cdiv(pixels, sizes["BM"])
    each, programs = split(x, tiles, sizes["waves"])
    between = None
    if needed:
        between = torch.empty(
            (x.shape[0], inputs, *z.shape[2:]), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
        )
    partial = torch.empty((programs, outputs, inputs), dtype=torch.float32, device=x.device)
    launch(
        _pointwise_backward, (programs, cdiv(inputs, input_block)),
        grad, z, *norm, coefficients, x, *dw, pw, *x_norm, between, partial,
        pixels, *x.shape[2:], *z.shape[2:], tiles, each, eps,
        num_warps=sizes["num_warps"], num_stages=1, CI=inputs, CO=outputs, STRIDE=stride, RELU=relu,
        DOT=dot_dtype(x.dtype), BM=sizes["BM"], BN=output_block, BK=input_block,
    )  # fmt: skip
    return between, partial


def depthwise_gradient(grad, x, dw, x_norm, added, window, stride, x_needs_grad, eps):
    """(gradient of x or None, partial sums of dw's gradient, gradients of x_norm or None).

    grad: of the depthwise output; dw: what `pointwise_gradient` took; added, window: the skip connection's, as
    `_depthwise_backward` describes them. With x_norm, the gradient of x is that of the batch norm's result, and the
    last are those `gradient_sums` would find.
    """
    channels = x.shape[1]
    pixels = x.numel() // channels
    normalised = x_norm[0] is not None
    same = (channels, stride, int(normalised), window if added is not None else 0, int(x_needs_grad))
    sizes = blocks("separable_depthwise_backward", x, same=same, size=pixels, default=_depthwise_default(same))
    block, warps = padded(channels, 64), sizes["num_warps"]
    tile = sizes["elements"] // block
    tiles = cdiv(pixels, tile)
    each, programs = split(x, tiles, sizes["waves"])
    grad_x = torch.empty_like(x) if x_needs_grad else None
    partial = torch.empty((programs, 9, channels), dtype=torch.float32, device=x.device)
    norm_partial = sums_counter = gradients = None
    if normalised:
        norm_partial = torch.empty(2 * programs * channels, dtype=torch.float32, device=x.device)
        sums_counter, gradients = counter(x), norm_gradients(x_norm)
    launch(
        _depthwise_backward, (programs, cdiv(channels, block)),
        grad, x, dw[0] if dw[1] is None else dw[1], *x_norm, added, grad_x, partial, norm_partial, sums_counter,
        *(gradients or (None, None, None)),
        pixels, *x.shape[2:], *grad.shape[2:], tiles, each, eps,
        num_warps=warps, num_stages=1, C=channels, STRIDE=stride, WINDOW=window, BM=tile, BK=block,
        ROWS=512 * warps // block,
    )  # fmt: skip
    return grad_x, partial, gradients


def weight_like(weight: Tensor) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def separable_conv_train_backward(
    grad_y, x, dw, pw, bn_weight, bn_bias, y, z, z_mean, var, stride, eps, relu, x_needs_grad
):
    """As `odn_fast.reference.separable_conv.separable_conv_train_backward`."""
    x, z, weight = dense(x), dense(z), dense(pw)
    grad_dw, grad_pw = weight_like(dw), weight_like(pw)
    if z.numel() == 0:
        grad_x = torch.empty_like(x) if x_needs_grad else x.new_empty(0)
        zeros = (grad_dw, grad_pw, weight_like(bn_weight), weight_like(bn_bias))
        return grad_x, *(gradient.zero_() for gradient in zeros), x.new_empty(0) if y is None else torch.empty_like(z)
    norm = (dense(z_mean), dense(var), dense(bn_weight), dense(bn_bias))
    y = None if y is None else dense(y)
    grad, gradients, _ = gradient_sums(dense(grad_y), y, z, norm, None, relu, y is not None, eps)
    kernel, mask = dense_weight(dw), relu and y is None
    between, pw_partial = pointwise_gradient(
        grad, z, norm, gradients[0], x, kernel, weight, NO_NORM, stride, mask, eps
    )
    grad_x, dw_partial, _ = depthwise_gradient(between, x, kernel, NO_NORM, None, 1, stride, x_needs_grad, eps)
    reduce_weights((grad_pw, pw_partial, grad_dw, dw_partial), None, None, *pw.shape[1::-1])
    return (
        grad_x if x_needs_grad else x.new_empty(0), grad_dw, grad_pw, *gradients[1:], x.new_empty(0) if y is None else grad
    )


# ---- what to launch with, and what can be launched


def _pointwise_default(same: tuple[int, ...], x: Tensor) -> dict[str, int]:
    largest = max(padded(same[0], 64), padded(same[1], 64))
    tile, warps = {16: (64, 4), 32: (64, 8), 64: (32, 8)}[largest]
    if not is_hopper(x):  # what ptxas spills there with the larger tile
        narrow = x.dtype == torch.bfloat16
        halved = {16: True, 32: not narrow or capability(x) > HOPPER, 64: narrow}[largest]
        tile //= 2 if halved else 1
    most = 64 if x.dtype == torch.float32 else 256  # outputs, of which a block holds all
    return {"BM": tile if same[1] <= most else 16, "num_warps": warps, "waves": 8 // warps}


def _pointwise_candidates(same: tuple[int, ...]) -> list[dict[str, int]]:
    largest = max(padded(same[0], 64), padded(same[1], 64))
    tiles = {16: [(64, 4), (32, 4), (64, 8)], 32: [(64, 8), (32, 8), (16, 4)], 64: [(32, 8), (16, 8), (16, 4)]}[largest]
    return [
        {"BM": tile, "num_warps": warps, "waves": waves} for tile, warps in tiles for waves in (8 // warps, 16 // warps)
    ]


def _depthwise_default(same: tuple[int, ...]) -> dict[str, int]:
    if same[4]:
        return {"elements": 512, "num_warps": 4, "waves": 4}  # 4 elements a thread, of which each holds nine sums
    return {"elements": 1024, "num_warps": 4, "waves": 3}


def _depthwise_candidates(same: tuple[int, ...]) -> list[dict[str, int]]:
    return [
        {"elements": 128 * warps * many, "num_warps": warps, "waves": waves}
        for many, warps, waves in ((1, 4, 2), (1, 4, 3), (1, 4, 4), (1, 8, 1), (1, 8, 2), (2, 4, 2), (2, 8, 1))
    ]  # fmt: skip


CANDIDATES = {
    "separable_pointwise_backward": _pointwise_candidates,
    "separable_depthwise_backward": _depthwise_candidates,
}
LARGEST_OUTPUTS = 1024  # channels of a block of dz, which a product takes whole
MOST_WAVES = 4  # of the above: programs of a multiprocessor, each with partial sums of its own


def why_not(function, grad_y, x, dw, pw, bn_weight, bn_bias, y, z, z_mean, var, stride, *settings):
    """Reasons why `function` of this file cannot take its arguments; [] if it can."""
    reasons = _common.why_not(
        x=x, grad_y=grad_y, dw=dw, pw=pw, bn_weight=bn_weight, bn_bias=bn_bias, y=y, z=z, z_mean=z_mean, var=var
    )
    return reasons + too_many_weights(pw) + too_large(z, x.shape[1], 1)


def too_many_weights(pw: Tensor) -> list[str]:
    """Reasons why a layer with these pointwise weights is too large."""
    outputs, inputs = pw.shape[:2]
    if outputs > LARGEST_OUTPUTS:
        return [f"there are {outputs} output channels; the Triton backward takes at most {LARGEST_OUTPUTS}"]
    sums = MOST_WAVES * processors(pw) * max(outputs, 9) * inputs
    if sums > _common.LARGEST:
        return [f"there may be {sums} partial sums of weights; the Triton backward indexes at most {_common.LARGEST}"]
    return []
