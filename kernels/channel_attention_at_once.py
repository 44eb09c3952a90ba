"""Channel attention's loss where all positions of an image fit one tile.

A program holds a block of Q's channels; K's channels pass by, as keys do in flash attention, once to project and once
for the gradient. Names as in channel_attention_sweeps.
"""

import triton
import triton.language as tl

from ._common import jit, rounded
from .channel_attention_sweeps import EPSILON, image_and_rows, mean_of_partials, read


@triton.jit
def _correlate(x, k):
    """X^T K over the positions of a tile, which every warp takes a share of."""
    groups: tl.constexpr = 8 if x.shape[0] >= 128 else x.shape[0] // 16
    if groups == 1 or x.shape[1] >= 64:
        return tl.dot(tl.trans(x), k, input_precision="tf32x3")
    x = tl.reshape(x, [groups, x.shape[0] // groups, x.shape[1]])
    k = tl.reshape(k, [groups, k.shape[0] // groups, k.shape[1]])
    return tl.sum(tl.dot(tl.permute(x, (0, 2, 1)), k, input_precision="tf32x3"), 0)


@triton.jit
def _centre(map_ptr, position, channel, positions, channels: tl.constexpr, raw: tl.constexpr, dot: tl.constexpr):
    """All positions of some channels, as products take them; mean, what is left of it in them, standard deviation."""
    inside = (position < positions)[:, None] & (channel < channels)[None, :]
    tile = tl.load(map_ptr + position[:, None] * channels + channel[None, :], mask=inside, other=0)
    # Around the first value, so that what is constant has a deviation of exactly zero.
    first = tl.load(map_ptr + channel, mask=channel < channels, other=0).to(tl.float32)
    less = tl.where(inside, tile.to(tl.float32) - first[None, :], 0.0)
    mean = tl.sum(less, 0) / positions
    if raw:
        variance = tl.sum(less * less, 0) / positions - mean * mean
        return tile.to(dot), first + mean, first + mean, tl.sqrt(tl.where(variance < 0, 0.0, variance))
    less = tl.where(inside, less - mean[None, :], 0.0)
    return less.to(dot), first + mean, tl.zeros_like(mean), tl.sqrt(tl.sum(less * less, 0) / positions)


@triton.jit
def _logits(
    q, q_mean, q_scale, k_ptr, mean_ptr, std_ptr, position, column, positions, columns: tl.constexpr,
    raw: tl.constexpr, dot: tl.constexpr, standardize: tl.constexpr,
):  # fmt: skip
    """Some columns of the scores, -inf outside; K as products take it, its means, what is left of them in K, its scales."""
    if mean_ptr is None:
        k, mean, left, std = _centre(k_ptr, position, column, positions, columns, raw, dot)
    else:
        mean = tl.load(mean_ptr + column, mask=column < columns, other=0)
        std = tl.load(std_ptr + column, mask=column < columns, other=0)
        k, _, _ = read(k_ptr, position, column, positions, mean, columns, raw, dot)
        left = mean if raw else tl.zeros_like(mean)
    products = _correlate(q, k)
    if standardize:
        scale = 1 / (std + EPSILON)
        if raw:
            products -= positions * q_mean[:, None] * mean[None, :]
    else:
        scale = tl.full(std.shape, 1.0, tl.float32)
        if not raw:
            products += positions * q_mean[:, None] * mean[None, :]
    logits = tl.where((column < columns)[None, :], products * q_scale[:, None] * scale[None, :], float("-inf"))
    return logits, k, mean, left, scale


@triton.jit
def _attend(logits, k, q_mean, k_mean, k_left, largest, total, error, shift, projected, dot: tl.constexpr):
    """Take columns into a softmax that is under way: sums of A, of A (q - k), of what is left of k, and A K."""
    greatest = tl.maximum(largest, tl.max(logits, 1))
    weights = tl.exp(logits - greatest[:, None])
    fade = tl.exp(largest - greatest)
    operand = weights.to(dot)
    total = total * fade + tl.sum(weights, 1)
    error = error * fade + tl.sum(weights * (q_mean[:, None] - k_mean[None, :]), 1)
    shift = shift * fade + tl.sum(operand.to(tl.float32) * k_left[None, :], 1)
    projected = tl.dot(k, tl.trans(operand), projected * fade[None, :], input_precision="tf32x3")
    return greatest, total, error, shift, projected


@triton.jit
def _slope_through(
    logits, k, q_mean, k_mean, k_left, k_scale, r, r_sum, q_scale, largest, total, error, mean_product,
    positions, spread, shift, gradient, dot: tl.constexpr, standardize: tl.constexpr,
):  # fmt: skip
    """Add some columns of V: to h, to what is left of k in V K, and to V K."""
    weights = tl.exp(logits - largest[:, None]) / total[:, None]
    products = _correlate(r, k) - r_sum[:, None] * k_left[None, :]
    # R K^T up to a constant per row: of K less its means, and of the means.
    products += positions * error[:, None] * (error[:, None] - (q_mean[:, None] - k_mean[None, :]))
    through = weights * (products - mean_product[:, None])
    if standardize:
        spread += tl.sum(through * tl.where(weights > 0, logits - largest[:, None], 0.0), 1)
    slopes = through * q_scale[:, None] * k_scale[None, :]
    operand = slopes.to(dot)
    shift += tl.sum(operand.to(tl.float32) * k_left[None, :], 1)
    if not standardize:
        shift -= tl.sum(slopes * k_mean[None, :], 1)
    return spread, shift, tl.dot(k, tl.trans(operand), gradient, input_precision="tf32x3")


@jit
def loss_at_once(
    q_ptr, k_ptr, mean_ptr, std_ptr, gradient_ptr, loss_ptr, partial_ptr, counter_ptr, positions, slope,
    rows: tl.constexpr, columns: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr,
    tile: tl.constexpr, raw: tl.constexpr, dot: tl.constexpr, standardize: tl.constexpr,
):  # fmt: skip
    """Of maps whose positions fit one tile: Q stays in registers and K's channels pass by, as in flash attention."""
    image, row = image_and_rows(rows, block_rows)
    q_ptr += image * positions * rows
    k_ptr += image * positions * columns
    if mean_ptr is not None:
        mean_ptr += image * columns
        std_ptr += image * columns
    position = tl.arange(0, tile)
    inside = (position < positions)[:, None] & (row < rows)[None, :]
    at = position[:, None] * rows + row[None, :]
    operand, q_mean, _, q_std = _centre(q_ptr, position, row, positions, rows, raw, dot)
    root = tl.sqrt(positions.to(tl.float32))
    q_scale = 1 / (root * (q_std + EPSILON)) if standardize else tl.zeros_like(q_std) + 1 / root

    column = tl.arange(0, block_columns)
    zero = tl.zeros_like(q_mean)
    largest, total, error, shift = zero - float("inf"), zero, zero, zero
    projected = tl.zeros([tile, block_rows], tl.float32)
    if columns <= block_columns:
        logits, k, k_mean, k_left, k_scale = _logits(
            operand, q_mean, q_scale, k_ptr, mean_ptr, std_ptr, position, column, positions, columns, raw, dot, standardize
        )
        largest, total, error, shift, projected = _attend(
            logits, k, q_mean, k_mean, k_left, largest, total, error, shift, projected, dot
        )
    else:
        for first in range(0, columns, block_columns):
            logits, k, k_mean, k_left, k_scale = _logits(
                operand, q_mean, q_scale, k_ptr, mean_ptr, std_ptr, position, first + column, positions, columns, raw,
                dot, standardize,
            )  # fmt: skip
            largest, total, error, shift, projected = _attend(
                logits, k, q_mean, k_mean, k_left, largest, total, error, shift, projected, dot
            )
    error /= total
    # Q is loaded again, and so that the compiler does not keep it from the first time: registers are short.
    q = tl.load(q_ptr + at, mask=inside, other=0, eviction_policy="evict_last").to(tl.float32) - q_mean[None, :]
    r = tl.where(inside, q + (error + shift / total)[None, :] - projected / total[None, :], 0.0)
    squares = tl.sum(r * r)

    if gradient_ptr is not None:
        difference = r.to(dot)
        r_sum = tl.sum(difference.to(tl.float32), 0)
        mean_product = tl.sum(r * (q + error[None, :] - r), 0)  # sum of A T, as A K = Q + e - R
        spread, shift = zero, zero
        gradient = -r
        if columns <= block_columns:
            spread, shift, gradient = _slope_through(
                logits, k, q_mean, k_mean, k_left, k_scale, difference, r_sum, q_scale, largest, total, error,
                mean_product, positions, spread, shift, gradient, dot, standardize,
            )  # fmt: skip
        else:
            for first in range(0, columns, block_columns):
                logits, k, k_mean, k_left, k_scale = _logits(
                    operand, q_mean, q_scale, k_ptr, mean_ptr, std_ptr, position, first + column, positions, columns,
                    raw, dot, standardize,
                )  # fmt: skip
                spread, shift, gradient = _slope_through(
                    logits, k, q_mean, k_mean, k_left, k_scale, difference, r_sum, q_scale, largest, total, error,
                    mean_product, positions, spread, shift, gradient, dot, standardize,
                )  # fmt: skip
        spread = tl.where(q_std == 0, 0.0, spread / ((q_std + EPSILON) * q_std * positions))
        q = tl.load(q_ptr + at, mask=inside, other=0, cache_modifier=".ca").to(tl.float32) - q_mean[None, :]
        gradient = spread[None, :] * q + shift[None, :] - gradient
        tl.store(
            gradient_ptr + image * positions * rows + at,
            rounded(gradient * slope, gradient_ptr.dtype.element_ty), mask=inside,
        )  # fmt: skip
    mean_of_partials(squares, partial_ptr, loss_ptr, counter_ptr, slope)
