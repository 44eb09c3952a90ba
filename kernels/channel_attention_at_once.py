"""Channel attention where all positions of an image fit one tile.

A program holds a block of Q's channels; K's channels pass by, as keys do in flash attention, once to project and once
for the gradient. Names as in channel_attention_sweeps.
"""

import triton
import triton.language as tl

from ._common import jit, rounded
from .channel_attention_sweeps import EPSILON, image_and_rows, mean_of_partials, read


LOG2_E = tl.constexpr(1.4426950408889634)  # scores times it are what exp2 takes


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
    mean = _sum_of_positions(less) / positions
    if raw:
        variance = _sum_of_positions(less * less) / positions - mean * mean
        return tile.to(dot), first + mean, tl.sqrt(tl.where(variance < 0, 0.0, variance))
    less = tl.where(inside, less - mean[None, :], 0.0)
    return less.to(dot), first + mean, tl.sqrt(_sum_of_positions(less * less) / positions)


@triton.jit
def _sum_of_positions(tile):
    """Per channel. Along the first dimension, Triton 3.6 would sum again in the layout of what the sums meet later, of
    which every warp holds all: of large tiles, more than there are registers."""
    large: tl.constexpr = tile.shape[0] * tile.shape[1] > 4096
    return tl.sum(tl.trans(tile), 1) if large else tl.sum(tile, 0)


@triton.jit
def _logits(
    q, q_mean, q_factor, k_ptr, mean_ptr, std_ptr, position, column, positions, columns: tl.constexpr,
    raw: tl.constexpr, dot: tl.constexpr, standardize: tl.constexpr,
):  # fmt: skip
    """Some columns of the scores times log2(e), -inf outside; K as products take it, its means and scales."""
    if mean_ptr is None:
        k, mean, std = _centre(k_ptr, position, column, positions, columns, raw, dot)
    else:
        mean = tl.load(mean_ptr + column, mask=column < columns, other=0)
        std = tl.load(std_ptr + column, mask=column < columns, other=0)
        k = read(k_ptr, position, column, positions, mean, columns, raw, dot)[0]
    products = _correlate(k, q)
    scale, factor = _scales(std, 1.0, standardize)
    if standardize and raw:
        products -= (positions * mean)[:, None] * q_mean[None, :]
    if not standardize and not raw:
        products += (positions * mean)[:, None] * q_mean[None, :]
    logits = tl.where((column < columns)[:, None], products * factor[:, None] * q_factor[None, :], float("-inf"))
    return logits, k, mean, scale


@triton.jit
def _scales(std, root, standardize: tl.constexpr):
    """What scales products of standardised channels, and the same with zero for channels that are constant: of their
    products, rounding is all there would be."""
    if standardize:
        scale = 1 / (root * (std + EPSILON))
        return scale, tl.where(std == 0, 0.0, scale)
    scale = tl.zeros_like(std) + 1 / root
    return scale, scale


@triton.jit
def _attend(
    logits, k, q_mean, k_mean, largest, totals, errors, projected,
    raw: tl.constexpr, dot: tl.constexpr, standardize: tl.constexpr,
):  # fmt: skip
    """Take columns into a softmax that is under way: A, A (q - k), both still to be summed along rows, and A K."""
    if not standardize:  # standardised scores are at most sqrt(P): their exponentials need no maximum
        greatest = tl.maximum(largest, tl.max(logits, 0))
        fade = tl.exp2(largest - greatest)
        largest = greatest
        logits -= largest[None, :]
        totals *= fade[None, :]
        errors *= fade[None, :]
        projected *= fade[None, :]
    weights = tl.exp2(logits)
    totals += weights
    operand = weights.to(dot)
    projected = tl.dot(k, operand, projected, input_precision="tf32x3")
    if raw:  # what rounding took: the loss is to be accurate
        projected = tl.dot(k, (weights - operand.to(tl.float32)).to(dot), projected)
    else:
        errors += weights * (q_mean[None, :] - k_mean[:, None])
    return weights, largest, totals, errors, projected


@triton.jit
def _slope_through(
    weights, logits, k, k_mean, k_scale, products, through, q_scale, spreads, shifts, gradient,
    raw: tl.constexpr, dot: tl.constexpr, standardize: tl.constexpr,
):  # fmt: skip
    """Add some columns of V: to h and to V k, both still to be summed along rows, and to V K.

    weights, products: A and T; through: the sum of A T.
    """
    through = weights * (products - through[None, :])
    slopes = through * k_scale[:, None] * q_scale[None, :]
    operand = slopes.to(dot)
    if standardize:
        spreads += tl.where(weights > 0, through * logits, 0.0)
    if standardize and raw:
        shifts += operand.to(tl.float32) * k_mean[:, None]
    if not standardize and not raw:
        shifts -= slopes * k_mean[:, None]
    return spreads, shifts, tl.dot(k, operand, gradient, input_precision="tf32x3")


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
    q_scale, q_factor = _scales(q_std, tl.sqrt(positions.to(tl.float32)), standardize)
    q_factor *= LOG2_E

    column = tl.arange(0, block_columns)
    only: tl.constexpr = columns <= block_columns
    nothing = tl.zeros([block_columns, block_rows], tl.float32)
    largest = tl.full([block_rows], float("-inf"), tl.float32)
    totals, errors = nothing, nothing
    projected = tl.zeros([tile, block_rows], tl.float32)
    if only:
        logits, k, k_mean, k_scale = _logits(
            operand, q_mean, q_factor, k_ptr, mean_ptr, std_ptr, position, column, positions, columns, raw, dot, standardize
        )
        weights, largest, totals, errors, projected = _attend(
            logits, k, q_mean, k_mean, largest, totals, errors, projected, raw, dot, standardize
        )
    else:
        for first in range(0, columns, block_columns):
            logits, k, k_mean, k_scale = _logits(
                operand, q_mean, q_factor, k_ptr, mean_ptr, std_ptr, position, first + column, positions, columns, raw, dot,
                standardize,
            )  # fmt: skip
            _, largest, totals, errors, projected = _attend(
                logits, k, q_mean, k_mean, largest, totals, errors, projected, raw, dot, standardize
            )
    share = 1 / tl.sum(totals, 0)
    at += image * positions * rows
    q_ptr -= image * positions * rows
    if not raw:
        error = tl.sum(errors, 0) * share
        left = q_mean - error  # A k
    if projected_ptr is not None:
        value = projected * share[None, :]
        if not raw:
            value += left[None, :]
        tl.store(projected_ptr + at, rounded(value, projected_ptr.dtype.element_ty), mask=inside)
    if grad_ptr is not None:
        r = tl.load(grad_ptr + at, mask=inside, other=0).to(tl.float32)
        through = tl.sum(r * projected, 0) * share
        if not raw:
            factor = tl.sum(r, 0)
    if loss_ptr is not None:
        # Q is loaded again, and so that the compiler does not keep it from the first time: registers are short.
        q = tl.load(q_ptr + at, mask=inside, other=0, eviction_policy="evict_last").to(tl.float32)
        if not raw:
            q -= left[None, :]
            factor = positions * error
        r = tl.where(inside, q - projected * share[None, :], 0.0)
        squares = tl.sum(r * r)
        through = tl.sum(r * (q - r), 0)

    if gradient_ptr is not None:
        difference = r.to(dot)
        if not raw:  # of the sum of A T, R being that of K less its means: K^T R + factor k
            through += factor * left
        spreads, shifts = nothing, nothing
        gradient = tl.zeros([tile, block_rows], tl.float32) if loss_ptr is None else -r
        if only:
            products = _correlate(k, difference)
            if not raw:
                products += factor[None, :] * k_mean[:, None]
            spreads, shifts, gradient = _slope_through(
                weights * share[None, :], logits, k, k_mean, k_scale, products, through, q_scale, spreads, shifts, gradient,
                raw, dot, standardize,
            )  # fmt: skip
        else:
            for first in range(0, columns, block_columns):
                logits, k, k_mean, k_scale = _logits(
                    operand, q_mean, q_factor, k_ptr, mean_ptr, std_ptr, position, first + column, positions, columns, raw,
                    dot, standardize,
                )  # fmt: skip
                products = _correlate(k, difference)
                if not raw:
                    products += factor[None, :] * k_mean[:, None]
                weights = tl.exp2(logits if standardize else logits - largest[None, :])
                spreads, shifts, gradient = _slope_through(
                    weights * share[None, :], logits, k, k_mean, k_scale, products, through, q_scale, spreads, shifts,
                    gradient, raw, dot, standardize,
                )  # fmt: skip
        gradient = -gradient
        if standardize:
            q = tl.load(q_ptr + at, mask=inside, other=0, cache_modifier=".ca").to(tl.float32)
            spread = tl.sum(spreads, 0) / (LOG2_E * (q_std + EPSILON) * q_std * positions)
            spread = tl.where(q_std == 0, 0.0, spread)
            shift = -spread * q_mean
            if raw:
                shift += tl.sum(shifts, 0)
            gradient += spread[None, :] * q + shift[None, :]
        elif not raw:
            gradient += tl.sum(shifts, 0)[None, :]
        tl.store(gradient_ptr + at, rounded(gradient * slope, gradient_ptr.dtype.element_ty), mask=inside)
    if loss_ptr is not None:
        mean_of_partials(squares, partial_ptr, loss_ptr, counter_ptr, slope)
