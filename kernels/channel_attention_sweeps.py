"""Kernels of channel attention that sweep over positions, a tile at a time, and what the others share with them.

Of an image, Q (C_s, P) and K (C_t, P) stand for the maps less a pivot per channel, so that channels that hardly vary
around a large mean lose no digits; q, k are the means left, and S = Q K^T - P q k^T is the product of the maps less
their means. Then A = softmax over C_t of S scaled per row and column, and R = Q + e - A K is the difference, where e
makes up for the pivots. The slope of the scores is V = A (T - sum of A T) scaled, T = R K^T, and the gradient of Q is
R - V K + h Q, where h passes on what changes the standard deviation. A and T stay in registers; the maps are read
once from memory, and again per sweep from the L2 cache.

Products of bfloat16 maps are taken of the maps as they are, pivots zero: what is subtracted would have to be rounded.
"""

import triton
import triton.language as tl

from ._common import is_last, jit, rounded

EPSILON = tl.constexpr(1e-3)  # of the standardisation


# ---- device functions


@triton.jit
def read(map_ptr, position, channel, positions, pivot, channels: tl.constexpr, raw: tl.constexpr, dot: tl.constexpr):
    """A tile (positions, channels) of an image: as products take it, in fp32 less its pivot, and where it is."""
    inside = (position < positions)[:, None] & (channel < channels)[None, :]
    tile = tl.load(map_ptr + position[:, None] * channels + channel[None, :], mask=inside, other=0)
    less = tl.where(inside, tile.to(tl.float32) - pivot[None, :], 0.0)
    return tile.to(dot) if raw else less.to(dot), less, inside


@triton.jit
def _pivot(map_ptr, channel, positions, channels: tl.constexpr, tile: tl.constexpr, raw: tl.constexpr):
    """Per channel the mean of the first tile; of maps whose products are raw, the first value, for the moments alone."""
    first = tl.load(map_ptr + channel, mask=channel < channels, other=0).to(tl.float32)
    if raw:
        return first
    _, less, _ = read(map_ptr, tl.arange(0, tile), channel, positions, first, channels, raw, tl.float32)
    return first + tl.sum(less, 0) / tl.minimum(positions, tile)


@triton.jit
def _moments(sums, squares, positions):
    """Mean and standard deviation per channel of what was summed per place of a tile."""
    mean = tl.sum(sums, 0) / positions
    variance = tl.sum(squares, 0) / positions - mean * mean
    return mean, tl.sqrt(tl.where(variance < 0, 0.0, variance))


@triton.jit
def _scores(
    q_ptr, k_ptr, row, column, positions, mean_ptr, std_ptr,
    rows: tl.constexpr, columns: tl.constexpr, tile: tl.constexpr, raw: tl.constexpr, dot: tl.constexpr,
):  # fmt: skip
    """S of the rows and columns given, and per channel of both maps: pivot, mean less pivot, standard deviation.

    mean_ptr, std_ptr: of the columns, or None.
    """
    q_pivot = _pivot(q_ptr, row, positions, rows, tile, raw)
    if mean_ptr is None:
        k_pivot = _pivot(k_ptr, column, positions, columns, tile, raw)
        k_sums = tl.zeros([tile, column.shape[0]], tl.float32)
        k_squares = tl.zeros([tile, column.shape[0]], tl.float32)
    else:
        k_pivot = tl.load(mean_ptr + column, mask=column < columns, other=0)
    q_sums = tl.zeros([tile, row.shape[0]], tl.float32)
    q_squares = tl.zeros([tile, row.shape[0]], tl.float32)
    products = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for first in range(0, positions, tile):
        position = first + tl.arange(0, tile)
        q, q_less, _ = read(q_ptr, position, row, positions, q_pivot, rows, raw, dot)
        k, k_less, _ = read(k_ptr, position, column, positions, k_pivot, columns, raw, dot)
        products = tl.dot(tl.trans(q), k, products, input_precision="tf32x3")
        q_sums += q_less
        q_squares += q_less * q_less
        if mean_ptr is None:
            k_sums += k_less
            k_squares += k_less * k_less
    q_mean, q_std = _moments(q_sums, q_squares, positions)
    if mean_ptr is None:
        k_mean, k_std = _moments(k_sums, k_squares, positions)
    else:
        k_mean = tl.zeros_like(k_pivot)
        k_std = tl.load(std_ptr + column, mask=column < columns, other=0)
    if raw:
        q_mean += q_pivot
        k_mean += k_pivot
        q_pivot = tl.zeros_like(q_pivot)
        k_pivot = tl.zeros_like(k_pivot)
    # Of channels that are constant, rounding would be all that is left.
    constant = (q_std == 0)[:, None] | (k_std == 0)[None, :]
    products = tl.where(constant, 0.0, products - positions * q_mean[:, None] * k_mean[None, :])
    return products, q_pivot, q_mean, q_std, k_pivot, k_mean, k_std


@triton.jit
def _weights(
    q_ptr, k_ptr, row, column, positions, mean_ptr, std_ptr,
    rows: tl.constexpr, columns: tl.constexpr, tile: tl.constexpr, raw: tl.constexpr, dot: tl.constexpr,
    standardize: tl.constexpr,
):  # fmt: skip
    """A, what scales S per row and per column, e, the mean of R, and all of `_scores` but S."""
    products, q_pivot, q_mean, q_std, k_pivot, k_mean, k_std = _scores(
        q_ptr, k_ptr, row, column, positions, mean_ptr, std_ptr, rows, columns, tile, raw, dot
    )
    root = tl.sqrt(positions.to(tl.float32))
    difference = (q_pivot[:, None] - k_pivot[None, :]) + (q_mean[:, None] - k_mean[None, :])
    if standardize:
        q_scale = 1 / (root * (q_std + EPSILON))
        k_scale = 1 / (k_std + EPSILON)
    else:
        products += positions * (q_pivot + q_mean)[:, None] * (k_pivot + k_mean)[None, :]
        q_scale = tl.zeros_like(q_std) + 1 / root
        k_scale = tl.zeros_like(k_std) + 1.0
    logits = tl.where((column < columns)[None, :], products * q_scale[:, None] * k_scale[None, :], float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    weights /= tl.sum(weights, 1)[:, None]
    error = tl.sum(weights * difference, 1)
    return weights, q_scale, k_scale, error, q_pivot, q_mean, q_std, k_pivot, k_mean, k_std


@triton.jit
def _slopes(weights, products, q_std, q_scale, k_scale, positions, standardize: tl.constexpr):
    """V from A and T, and h."""
    through = weights * (products - tl.sum(weights * products, 1)[:, None])
    spread = tl.zeros_like(q_std)
    if standardize:
        # The scores of a row are log A up to a constant, and `through` sums to zero.
        scores = tl.where(weights > 0, tl.log(weights), 0.0)
        spread = tl.sum(through * scores, 1) / ((q_std + EPSILON) * q_std * positions)
        spread = tl.where(q_std == 0, 0.0, spread)
    return through * q_scale[:, None] * k_scale[None, :], spread


@triton.jit
def image_and_rows(rows: tl.constexpr, block_rows: tl.constexpr):
    """What this program works on. Programs of one image are neighbours: they share K in the L2 cache."""
    count = tl.cdiv(rows, block_rows)
    program = tl.program_id(0)
    return program // count, program % count * block_rows + tl.arange(0, block_rows)


@triton.jit
def mean_of_partials(squares, partial_ptr, loss_ptr, counter_ptr, slope):
    """The loss from every program's sum of squares, added in a fixed order."""
    tl.store(partial_ptr + tl.program_id(0), squares)
    programs = tl.num_programs(0)
    if is_last(counter_ptr, programs):
        total = tl.zeros([1024], tl.float32)
        for first in range(0, programs, 1024):
            program = first + tl.arange(0, 1024)
            total += tl.load(partial_ptr + program, mask=program < programs, other=0, cache_modifier=".cg")
        tl.store(loss_ptr, tl.sum(total) * slope / 2)


# ---- kernels


@jit
def statistics(
    k_ptr, mean_ptr, std_ptr, gram_ptr, positions,
    rows: tl.constexpr, columns: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr,
    tile: tl.constexpr, raw: tl.constexpr, dot: tl.constexpr,
):  # fmt: skip
    image, row = image_and_rows(rows, block_rows)
    column = tl.arange(0, block_columns)
    k_ptr += image * positions * columns
    gram, pivot, mean, std, _, _, _ = _scores(
        k_ptr, k_ptr, row, column, positions, None, None, rows, columns, tile, raw, dot
    )
    at = image * rows + row
    tl.store(mean_ptr + at, pivot + mean, mask=row < rows)
    tl.store(std_ptr + at, std, mask=row < rows)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(gram_ptr + at[:, None] * columns + column[None, :], gram, mask=inside)


@jit
def projection(
    q_ptr, k_ptr, projected_ptr, positions,
    rows: tl.constexpr, columns: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr,
    tile: tl.constexpr, raw: tl.constexpr, dot: tl.constexpr, standardize: tl.constexpr,
):  # fmt: skip
    image, row = image_and_rows(rows, block_rows)
    column = tl.arange(0, block_columns)
    q_ptr += image * positions * rows
    k_ptr += image * positions * columns
    weights, _, _, _, _, _, _, k_pivot, k_mean, _ = _weights(
        q_ptr, k_ptr, row, column, positions, None, None, rows, columns, tile, raw, dot, standardize
    )
    operand = tl.trans(weights).to(dot)
    # A K, of K less its pivots; what rounding took from A is made up for where it meets the means.
    shift = tl.sum(weights * (k_pivot + k_mean)[None, :] - weights.to(dot).to(tl.float32) * k_mean[None, :], 1)
    for first in range(0, positions, tile):
        position = first + tl.arange(0, tile)
        k = read(k_ptr, position, column, positions, k_pivot, columns, raw, dot)[0]
        projected = tl.dot(k, operand, input_precision="tf32x3") + shift[None, :]
        inside = (position < positions)[:, None] & (row < rows)[None, :]
        at = image * positions * rows + position[:, None] * rows + row[None, :]
        tl.store(projected_ptr + at, rounded(projected, projected_ptr.dtype.element_ty), mask=inside)


@jit
def projection_backward(
    grad_ptr, q_ptr, k_ptr, gradient_ptr, positions,
    rows: tl.constexpr, columns: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr,
    tile: tl.constexpr, raw: tl.constexpr, dot: tl.constexpr, standardize: tl.constexpr,
):  # fmt: skip
    image, row = image_and_rows(rows, block_rows)
    column = tl.arange(0, block_columns)
    q_ptr += image * positions * rows
    grad_ptr += image * positions * rows
    k_ptr += image * positions * columns
    weights, q_scale, k_scale, error, q_pivot, q_mean, q_std, k_pivot, k_mean, k_std = _weights(
        q_ptr, k_ptr, row, column, positions, None, None, rows, columns, tile, raw, dot, standardize
    )
    zero = tl.zeros_like(q_mean)
    products = tl.zeros([block_rows, block_columns], tl.float32)
    sums = tl.zeros([tile, block_rows], tl.float32)
    for first in range(0, positions, tile):
        position = first + tl.arange(0, tile)
        grad, grad_less, inside = read(grad_ptr, position, row, positions, zero, rows, raw, dot)
        k = read(k_ptr, position, column, positions, k_pivot, columns, raw, dot)[0]
        products = tl.dot(tl.trans(grad), k, products, input_precision="tf32x3")
        sums += grad_less
    pivot = k_pivot[None, :] - tl.sum(weights * k_pivot[None, :], 1)[:, None]
    slopes, spread = _slopes(
        weights, products + tl.sum(sums, 0)[:, None] * pivot, q_std, q_scale, k_scale, positions, standardize
    )
    operand = tl.trans(slopes).to(dot)
    rounded_slopes = slopes.to(dot).to(tl.float32)
    if standardize:
        shift = -tl.sum(rounded_slopes * k_mean[None, :], 1)
    else:
        shift = tl.sum(slopes * (k_pivot + k_mean)[None, :] - rounded_slopes * k_mean[None, :], 1)
    for first in range(0, positions, tile):
        position = first + tl.arange(0, tile)
        _, q, inside = read(q_ptr, position, row, positions, q_pivot, rows, raw, dot)
        k = read(k_ptr, position, column, positions, k_pivot, columns, raw, dot)[0]
        gradient = tl.dot(k, operand, input_precision="tf32x3") + shift[None, :] - spread[None, :] * (q - q_mean[None, :])
        at = image * positions * rows + position[:, None] * rows + row[None, :]
        tl.store(gradient_ptr + at, rounded(gradient, gradient_ptr.dtype.element_ty), mask=inside)


@jit
def loss(
    q_ptr, k_ptr, mean_ptr, std_ptr, gradient_ptr, loss_ptr, partial_ptr, counter_ptr, positions, slope,
    rows: tl.constexpr, columns: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr,
    tile: tl.constexpr, raw: tl.constexpr, dot: tl.constexpr, standardize: tl.constexpr,
):  # fmt: skip
    image, row = image_and_rows(rows, block_rows)
    column = tl.arange(0, block_columns)
    q_ptr += image * positions * rows
    k_ptr += image * positions * columns
    if mean_ptr is not None:
        mean_ptr += image * columns
        std_ptr += image * columns
    weights, q_scale, k_scale, error, q_pivot, q_mean, q_std, k_pivot, k_mean, k_std = _weights(
        q_ptr, k_ptr, row, column, positions, mean_ptr, std_ptr, rows, columns, tile, raw, dot, standardize
    )
    operand = tl.trans(weights).to(dot)
    if raw:  # what rounding took: the loss is to be accurate
        rest = tl.trans(weights - weights.to(dot).to(tl.float32)).to(dot)
    shift = error + tl.sum(weights * k_mean[None, :], 1) - q_mean
    products = tl.zeros([block_rows, block_columns], tl.float32)
    squares = tl.zeros([tile, block_rows], tl.float32)
    for first in range(0, positions, tile):
        position = first + tl.arange(0, tile)
        _, q, inside = read(q_ptr, position, row, positions, q_pivot, rows, raw, dot)
        k, _, _ = read(k_ptr, position, column, positions, k_pivot, columns, raw, dot)
        projected = tl.dot(k, operand, input_precision="tf32x3")
        if raw:
            projected = tl.dot(k, rest, projected)
        r = tl.where(inside, q + shift[None, :] - projected, 0.0)
        squares += r * r
        if gradient_ptr is not None:
            products = tl.dot(tl.trans(r).to(dot), k, products, input_precision="tf32x3")

    if gradient_ptr is not None:
        pivot = k_pivot[None, :] - tl.sum(weights * k_pivot[None, :], 1)[:, None]
        slopes, spread = _slopes(
            weights, products + positions * error[:, None] * pivot, q_std, q_scale, k_scale, positions, standardize
        )
        # R - V K = Q + e - (A + V) K: one product.
        weights += slopes
        operand = tl.trans(weights).to(dot)
        shift = error + tl.sum(weights.to(dot).to(tl.float32) * k_mean[None, :], 1) - (1 + spread) * q_mean
        if not standardize:
            shift -= tl.sum(slopes * (k_pivot + k_mean)[None, :], 1)
        for first in range(0, positions, tile):
            position = first + tl.arange(0, tile)
            _, q, inside = read(q_ptr, position, row, positions, q_pivot, rows, raw, dot)
            k, _, _ = read(k_ptr, position, column, positions, k_pivot, columns, raw, dot)
            gradient = q * (1 + spread)[None, :] + shift[None, :] - tl.dot(k, operand, input_precision="tf32x3")
            at = image * positions * rows + position[:, None] * rows + row[None, :]
            tl.store(gradient_ptr + at, rounded(gradient * slope, gradient_ptr.dtype.element_ty), mask=inside)
    mean_of_partials(tl.sum(squares), partial_ptr, loss_ptr, counter_ptr, slope)
