"""Channel attention where all positions of an image fit one tile.

A program holds a block of Q's channels; K's channels pass by, as keys do in flash attention, once to project and once
for the gradient. Names as in channel_attention_sweeps.
"""

import triton
import triton.language as tl

from ._common import jit, rounded
from .channel_attention_sweeps import EPSILON, image_and_rows, mean_of_partials, read


@triton.jit
def _correlate(k, x):
    """K^T X over the positions of a tile. Of few channels, every warp takes a share of the positions."""
    groups: tl.constexpr = 8 if x.shape[0] >= 128 else x.shape[0] // 16
    if groups == 1 or k.shape[1] >= 64:
        return tl.dot(tl.trans(k), x, input_precision="tf32x3")
    k = tl.reshape(k, [groups, k.shape[0] // groups, k.shape[1]])
    x = tl.reshape(x, [groups, x.shape[0] // groups, x.shape[1]])
    return tl.sum(tl.dot(tl.permute(k, (0, 2, 1)), x, input_precision="tf32x3"), 0)


@triton.jit
def _centre(map_ptr, position, channel, positions, channels: tl.constexpr, raw: tl.constexpr, dot: tl.constexpr):
    """All positions of some channels, as products take them; their mean and standard deviation."""
    inside = (position < positions)[:, None] & (channel < channels)[None, :]
    tile = tl.load(map_ptr + position[:, None] * channels + channel[None, :], mask=inside, other=0)
    # Around the first value, so that what is constant has a deviation of exactly zero.
    first = tl.load(map_ptr + channel, mask=channel < channels, other=0).to(tl.float32)
    less = tl.where(inside, tile.to(tl.float32) - first[None, :], 0.0)
    mean = tl.sum(less, 0) / positions
    if raw:
        variance = tl.sum(less * less, 0) / positions - mean * mean
        return tile.to(dot), first + mean, tl.sqrt(tl.where(variance < 0, 0.0, variance))
    less = tl.where(inside, less - mean[None, :], 0.0)
    return less.to(dot), first + mean, tl.sqrt(tl.sum(less * less, 0) / positions)


@triton.jit
def _logits(
    q, q_mean, q_std, q_scale, k_ptr, mean_ptr, std_ptr, position, column, positions, columns: tl.constexpr,
    raw: tl.constexpr, dot: tl.constexpr, standardize: tl.constexpr,
):  # fmt: skip
    """Some columns of the scores, -inf outside; K as products take it, its means and scales."""
    if mean_ptr is None:
        k, mean, std = _centre(k_ptr, position, column, positions, columns, raw, dot)
    else:
        mean = tl.load(mean_ptr + column, mask=column < columns, other=0)
        std = tl.load(std_ptr + column, mask=column < columns, other=0)
        k = read(k_ptr, position, column, positions, mean, columns, raw, dot)[0]
    products = _correlate(k, q)
    if standardize:
        scale = 1 / (std + EPSILON)
        if raw:
            # Of channels that are constant, rounding would be all that is left.
            constant = (q_std == 0)[None, :] | (std == 0)[:, None]
            products = tl.where(constant, 0.0, products - positions * mean[:, None] * q_mean[None, :])
    else:
        scale = tl.full(std.shape, 1.0, tl.float32)
        if not raw:
            products += positions * mean[:, None] * q_mean[None, :]
    logits = tl.where((column < columns)[:, None], products * scale[:, None] * q_scale[None, :], float("-inf"))
    return logits, k, mean, scale


@triton.jit
def _attend(
    logits, k, q_mean, k_mean, largest, totals, errors, projected, dot: tl.constexpr, standardize: tl.constexpr
):
    """Take columns into a softmax that is under way: A, A (q - k), both still to be summed along rows, and A K."""
    if not standardize:  # standardised scores are at most sqrt(P): their exponentials need no maximum
        greatest = tl.maximum(largest, tl.max(logits, 0))
        fade = tl.exp(largest - greatest)
        largest = greatest
        logits -= largest[None, :]
        totals *= fade[None, :]
        errors *= fade[None, :]
        projected *= fade[None, :]
    weights = tl.exp(logits)
    totals += weights
    errors += weights * (q_mean[None, :] - k_mean[:, None])
    projected = tl.dot(k, weights.to(dot), projected, input_precision="tf32x3")
    return largest, totals, errors, projected


@triton.jit
def _slope_through(
    logits, k, k_mean, k_scale, r, factor, offset, q_scale, largest, total, spreads, shifts, gradient,
    dot: tl.constexpr, standardize: tl.constexpr,
):  # fmt: skip
    """Add some columns of V: to h and to V k, both still to be summed along rows, and to V K.

    T is K^T R + factor k + offset.
    """
    if not standardize:
        logits -= largest[None, :]
    weights = tl.exp(logits) / total[None, :]
    through = weights * (_correlate(k, r) + factor[None, :] * k_mean[:, None] + offset[None, :])
    slopes = through * k_scale[:, None] * q_scale[None, :]
    if standardize:
        spreads += tl.where(weights > 0, through * logits, 0.0)
    else:
        shifts += slopes * k_mean[:, None]
    return spreads, shifts, tl.dot(k, slopes.to(dot), gradient, input_precision="tf32x3")


@jit
def moments(
    k_ptr, mean_ptr, std_ptr, positions,
    columns: tl.constexpr, block_columns: tl.constexpr, tile: tl.constexpr, raw: tl.constexpr,
):  # fmt: skip
    """Means and standard deviations of K, for programs that would each compute them more than once."""
    image, column = image_and_rows(columns, block_columns)
    k_ptr += image * positions * columns
    _, mean, std = _centre(k_ptr, tl.arange(0, tile), column, positions, columns, raw, tl.float32)
    tl.store(mean_ptr + image * columns + column, mean, mask=column < columns)
    tl.store(std_ptr + image * columns + column, std, mask=column < columns)


@jit
def at_once(
    q_ptr, k_ptr, mean_ptr, std_ptr, grad_ptr, projected_ptr, gradient_ptr, loss_ptr, partial_ptr, counter_ptr,
    positions, slope,
    rows: tl.constexpr, columns: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr,
    tile: tl.constexpr, raw: tl.constexpr, dot: tl.constexpr, standardize: tl.constexpr,
):  # fmt: skip
    """All that is taken of Q and K, as far as there are pointers to write it to.

    projected_ptr: A K; loss_ptr: the loss, and to gradient_ptr slope times half its gradient; grad_ptr: what is to be
    taken back through A K, to gradient_ptr, -slope times.
    """
    image, row = image_and_rows(rows, block_rows)
    q_ptr += image * positions * rows
    k_ptr += image * positions * columns
    if mean_ptr is not None:
        mean_ptr += image * columns
        std_ptr += image * columns
    position = tl.arange(0, tile)
    inside = (position < positions)[:, None] & (row < rows)[None, :]
    at = position[:, None] * rows + row[None, :]
    operand, q_mean, q_std = _centre(q_ptr, position, row, positions, rows, raw, dot)
    root = tl.sqrt(positions.to(tl.float32))
    q_scale = 1 / (root * (q_std + EPSILON)) if standardize else tl.zeros_like(q_std) + 1 / root

    column = tl.arange(0, block_columns)
    largest = tl.full([block_rows], float("-inf"), tl.float32)
    totals = tl.zeros([block_columns, block_rows], tl.float32)
    errors = tl.zeros([block_columns, block_rows], tl.float32)
    projected = tl.zeros([tile, block_rows], tl.float32)
    if columns <= block_columns:
        logits, k, k_mean, k_scale = _logits(
            operand, q_mean, q_std, q_scale, k_ptr, mean_ptr, std_ptr, position, column, positions, columns, raw, dot,
            standardize,
        )  # fmt: skip
        largest, totals, errors, projected = _attend(
            logits, k, q_mean, k_mean, largest, totals, errors, projected, dot, standardize
        )
    else:
        for first in range(0, columns, block_columns):
            logits, k, k_mean, k_scale = _logits(
                operand, q_mean, q_std, q_scale, k_ptr, mean_ptr, std_ptr, position, first + column, positions, columns, raw,
                dot, standardize,
            )  # fmt: skip
            largest, totals, errors, projected = _attend(
                logits, k, q_mean, k_mean, largest, totals, errors, projected, dot, standardize
            )
    total = tl.sum(totals, 0)
    error = tl.sum(errors, 0) / total
    at += image * positions * rows
    q_ptr -= image * positions * rows
    left = q_mean - error  # A k
    shift = left - tl.sum(projected, 0) / (positions * total) if raw else tl.zeros_like(left)
    if projected_ptr is not None:
        value = projected / total[None, :] + (shift if raw else left)[None, :]
        tl.store(projected_ptr + at, rounded(value, projected_ptr.dtype.element_ty), mask=inside)
    if grad_ptr is not None:
        r = tl.load(grad_ptr + at, mask=inside, other=0).to(tl.float32)
        factor = tl.sum(r, 0)
        through = tl.sum(r * (projected / total[None, :] + shift[None, :]), 0)
    if loss_ptr is not None:
        # Q is loaded again, and so that the compiler does not keep it from the first time: registers are short.
        q = tl.load(q_ptr + at, mask=inside, other=0, eviction_policy="evict_last").to(tl.float32)
        if not raw:
            q -= left[None, :]
        r = tl.where(inside, q - shift[None, :] - projected / total[None, :], 0.0)
        factor = positions * error
        through = tl.sum(r * (q - r), 0)
        squares = tl.sum(r * r)

    if gradient_ptr is not None:
        difference = r.to(dot)
        # T is K^T R up to a constant per row, and the sum of A T that of R A K.
        offset = -through
        if raw:
            factor = tl.zeros_like(error)
        else:  # of K less its means, and of the means less those of Q plus e
            offset -= factor * left
        spreads = tl.zeros([block_columns, block_rows], tl.float32)
        shifts = tl.zeros([block_columns, block_rows], tl.float32)
        gradient = tl.zeros([tile, block_rows], tl.float32) if loss_ptr is None else -r
        if columns <= block_columns:
            spreads, shifts, gradient = _slope_through(
                logits, k, k_mean, k_scale, difference, factor, offset, q_scale, largest, total, spreads, shifts,
                gradient, dot, standardize,
            )  # fmt: skip
        else:
            for first in range(0, columns, block_columns):
                logits, k, k_mean, k_scale = _logits(
                    operand, q_mean, q_std, q_scale, k_ptr, mean_ptr, std_ptr, position, first + column, positions, columns,
                    raw, dot, standardize,
                )  # fmt: skip
                spreads, shifts, gradient = _slope_through(
                    logits, k, k_mean, k_scale, difference, factor, offset, q_scale, largest, total, spreads, shifts,
                    gradient, dot, standardize,
                )  # fmt: skip
        gradient = -gradient
        if standardize:
            if raw:
                gradient -= (tl.sum(gradient, 0) / positions)[None, :]
                if loss_ptr is not None:
                    gradient += error[None, :]
            q = tl.load(q_ptr + at, mask=inside, other=0, cache_modifier=".ca").to(tl.float32) - q_mean[None, :]
            spread = tl.sum(spreads, 0) / ((q_std + EPSILON) * q_std * positions)
            gradient += tl.where(q_std == 0, 0.0, spread)[None, :] * q
        elif not raw:
            gradient -= tl.sum(shifts, 0)[None, :]
        tl.store(gradient_ptr + at, rounded(gradient * slope, gradient_ptr.dtype.element_ty), mask=inside)
    if loss_ptr is not None:
        mean_of_partials(squares, partial_ptr, loss_ptr, counter_ptr, slope)
