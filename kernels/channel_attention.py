"""Channel attention in Triton: one program per image and block of the student's channels, one launch per call.

Of an image, Q (C_s, P) and K (C_t, P) stand for the maps less a pivot per channel, so that channels that hardly vary
around a large mean lose no digits; q, k are the means left, and S = Q K^T - P q k^T is the product of the maps less
their means. Then A = softmax over C_t of S scaled per row and column, and R = Q + e - A K is the difference, where e
makes up for the pivots. The slope of the scores is V = A (T - sum of A T) scaled, T = R K^T, and the gradient of Q is
R - V K + h Q, where h passes on what changes the standard deviation. A and T stay in registers; the maps are read
once from memory, and again per sweep from the L2 cache.

Products of bfloat16 maps are taken of the maps as they are, pivots zero: what is subtracted would have to be rounded.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import counter, dense, dot_dtype, is_last, jit, launch, rounded
from ._common import why_not as why_not_tensors
from ._tuned import blocks

EPSILON = tl.constexpr(1e-3)  # of the standardisation
MOST_TEACHER_CHANNELS = 1024  # of which a program keeps whole rows of weights


# ---- device functions


@triton.jit
def _read(map_ptr, position, channel, positions, pivot, channels: tl.constexpr, raw: tl.constexpr, dot: tl.constexpr):
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
    _, less, _ = _read(map_ptr, tl.arange(0, tile), channel, positions, first, channels, raw, tl.float32)
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
        q, q_less, _ = _read(q_ptr, position, row, positions, q_pivot, rows, raw, dot)
        k, k_less, _ = _read(k_ptr, position, column, positions, k_pivot, columns, raw, dot)
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
    products -= positions * q_mean[:, None] * k_mean[None, :]
    return products, q_pivot, q_mean, q_std, k_pivot, k_mean, k_std


@triton.jit
def _weights(
    products, q_pivot, q_mean, q_std, k_pivot, k_mean, k_std, column, positions, columns: tl.constexpr,
    standardize: tl.constexpr,
):  # fmt: skip
    """A, what scales S per row and per column, and e, the mean of R."""
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
    return weights, q_scale, k_scale, tl.sum(weights * difference, 1)


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
def _blocks(rows: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr):
    """Image, first program's rows and columns, all channels of K."""
    count = tl.cdiv(rows, block_rows)
    program = tl.program_id(0)
    return program // count, program % count * block_rows + tl.arange(0, block_rows), tl.arange(0, block_columns)


# ---- kernels


@jit
def _statistics(
    k_ptr, mean_ptr, std_ptr, gram_ptr, positions,
    rows: tl.constexpr, columns: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr,
    tile: tl.constexpr, raw: tl.constexpr, dot: tl.constexpr,
):  # fmt: skip
    image, row, column = _blocks(rows, block_rows, block_columns)
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
def _projection(
    q_ptr, k_ptr, projected_ptr, positions,
    rows: tl.constexpr, columns: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr,
    tile: tl.constexpr, raw: tl.constexpr, dot: tl.constexpr, standardize: tl.constexpr,
):  # fmt: skip
    image, row, column = _blocks(rows, block_rows, block_columns)
    q_ptr += image * positions * rows
    k_ptr += image * positions * columns
    products, q_pivot, q_mean, q_std, k_pivot, k_mean, k_std = _scores(
        q_ptr, k_ptr, row, column, positions, None, None, rows, columns, tile, raw, dot
    )
    weights, _, _, _ = _weights(
        products, q_pivot, q_mean, q_std, k_pivot, k_mean, k_std, column, positions, columns, standardize
    )
    operand = tl.trans(weights).to(dot)
    # A K, of K less its pivots; what rounding took from A is made up for where it meets the means.
    shift = tl.sum(weights * (k_pivot + k_mean)[None, :] - weights.to(dot).to(tl.float32) * k_mean[None, :], 1)
    for first in range(0, positions, tile):
        position = first + tl.arange(0, tile)
        k, _, _ = _read(k_ptr, position, column, positions, k_pivot, columns, raw, dot)
        projected = tl.dot(k, operand, input_precision="tf32x3") + shift[None, :]
        inside = (position < positions)[:, None] & (row < rows)[None, :]
        at = image * positions * rows + position[:, None] * rows + row[None, :]
        tl.store(projected_ptr + at, rounded(projected, projected_ptr.dtype.element_ty), mask=inside)


@jit
def _projection_backward(
    grad_ptr, q_ptr, k_ptr, gradient_ptr, positions,
    rows: tl.constexpr, columns: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr,
    tile: tl.constexpr, raw: tl.constexpr, dot: tl.constexpr, standardize: tl.constexpr,
):  # fmt: skip
    image, row, column = _blocks(rows, block_rows, block_columns)
    q_ptr += image * positions * rows
    grad_ptr += image * positions * rows
    k_ptr += image * positions * columns
    products, q_pivot, q_mean, q_std, k_pivot, k_mean, k_std = _scores(
        q_ptr, k_ptr, row, column, positions, None, None, rows, columns, tile, raw, dot
    )
    weights, q_scale, k_scale, _ = _weights(
        products, q_pivot, q_mean, q_std, k_pivot, k_mean, k_std, column, positions, columns, standardize
    )
    zero = tl.zeros_like(q_mean)
    products = tl.zeros([block_rows, block_columns], tl.float32)
    sums = tl.zeros([tile, block_rows], tl.float32)
    for first in range(0, positions, tile):
        position = first + tl.arange(0, tile)
        grad, grad_less, _ = _read(grad_ptr, position, row, positions, zero, rows, raw, dot)
        k, _, _ = _read(k_ptr, position, column, positions, k_pivot, columns, raw, dot)
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
        _, q, inside = _read(q_ptr, position, row, positions, q_pivot, rows, raw, dot)
        k, _, _ = _read(k_ptr, position, column, positions, k_pivot, columns, raw, dot)
        gradient = tl.dot(k, operand, input_precision="tf32x3") + shift[None, :] - spread[None, :] * (q - q_mean[None, :])
        at = image * positions * rows + position[:, None] * rows + row[None, :]
        tl.store(gradient_ptr + at, rounded(gradient, gradient_ptr.dtype.element_ty), mask=inside)


@jit
def _loss(
    q_ptr, k_ptr, mean_ptr, std_ptr, gradient_ptr, loss_ptr, partial_ptr, counter_ptr, positions, slope,
    rows: tl.constexpr, columns: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr,
    tile: tl.constexpr, raw: tl.constexpr, dot: tl.constexpr, standardize: tl.constexpr,
):  # fmt: skip
    image, row, column = _blocks(rows, block_rows, block_columns)
    q_ptr += image * positions * rows
    k_ptr += image * positions * columns
    if mean_ptr is not None:
        mean_ptr += image * columns
        std_ptr += image * columns
    products, q_pivot, q_mean, q_std, k_pivot, k_mean, k_std = _scores(
        q_ptr, k_ptr, row, column, positions, mean_ptr, std_ptr, rows, columns, tile, raw, dot
    )
    weights, q_scale, k_scale, error = _weights(
        products, q_pivot, q_mean, q_std, k_pivot, k_mean, k_std, column, positions, columns, standardize
    )
    operand = tl.trans(weights).to(dot)
    shift = error + tl.sum(weights.to(dot).to(tl.float32) * k_mean[None, :], 1) - q_mean
    products = tl.zeros([block_rows, block_columns], tl.float32)
    squares = tl.zeros([tile, block_rows], tl.float32)
    for first in range(0, positions, tile):
        position = first + tl.arange(0, tile)
        _, q, inside = _read(q_ptr, position, row, positions, q_pivot, rows, raw, dot)
        k, _, _ = _read(k_ptr, position, column, positions, k_pivot, columns, raw, dot)
        r = tl.where(inside, q + shift[None, :] - tl.dot(k, operand, input_precision="tf32x3"), 0.0)
        squares += r * r
        if gradient_ptr is not None:
            products = tl.dot(tl.trans(r).to(dot), k, products, input_precision="tf32x3")
    tl.store(partial_ptr + tl.program_id(0), tl.sum(squares))

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
            _, q, inside = _read(q_ptr, position, row, positions, q_pivot, rows, raw, dot)
            k, _, _ = _read(k_ptr, position, column, positions, k_pivot, columns, raw, dot)
            gradient = q * (1 + spread)[None, :] + shift[None, :] - tl.dot(k, operand, input_precision="tf32x3")
            at = image * positions * rows + position[:, None] * rows + row[None, :]
            tl.store(gradient_ptr + at, rounded(gradient * slope, gradient_ptr.dtype.element_ty), mask=inside)

    programs = tl.num_programs(0)
    if is_last(counter_ptr, programs):
        total = tl.zeros([1024], tl.float32)
        for first in range(0, programs, 1024):
            program = first + tl.arange(0, 1024)
            total += tl.load(partial_ptr + program, mask=program < programs, other=0, cache_modifier=".cg")
        tl.store(loss_ptr, tl.sum(total) * slope / 2)


@jit
def _scale(gradient_ptr, slope_ptr, scaled_ptr, count, tile: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    value = tl.load(gradient_ptr + at, mask=at < count).to(tl.float32) * tl.load(slope_ptr).to(tl.float32)
    tl.store(scaled_ptr + at, rounded(value, scaled_ptr.dtype.element_ty), mask=at < count)


# ---- launchers


def candidates(same: tuple[int, ...]) -> list[dict]:
    """Block sizes to try for (C_s, C_t)."""
    rows, columns = _padded(same[0]), _padded(same[1])
    default = _default(rows, columns, True)
    return [
        {**default, "tile": tile, "num_warps": warps, "num_stages": stages}
        for tile in (max(16, default["tile"] // 2), default["tile"])
        for warps in (4, 8)
        for stages in (2, 3)
    ]


CANDIDATES = dict.fromkeys(
    ("channel_attention_statistics", "channel_attention", "channel_attention_backward", "channel_attention_loss"), candidates
)


def _padded(channels: int) -> int:
    return max(16, triton.next_power_of_2(channels))


def _default(rows: int, columns: int, raw: bool) -> dict[str, int]:
    block_rows = max(16, min(rows, 4096 // columns))
    tile = max(16, min(128, 4096 // max(block_rows, columns))) if raw else 32
    return {"block_rows": block_rows, "tile": tile, "num_warps": 8, "num_stages": 2 if raw else 1}


def _choice(kernel: str, student: Tensor, teacher: Tensor, *others: Tensor) -> tuple[tuple[int], dict]:
    """Grid and constants of a kernel, in its order."""
    batch, rows, height, width = student.shape
    columns = teacher.shape[1]
    raw = all(x.dtype == torch.bfloat16 for x in (student, teacher, *others))
    default = _default(_padded(rows), _padded(columns), raw)
    choice = blocks(kernel, teacher, same=(rows, columns), size=height * width, default=default)
    constants = {
        "rows": rows, "columns": columns, "block_rows": choice["block_rows"], "block_columns": _padded(columns),
        "tile": choice["tile"], "raw": raw, "dot": dot_dtype(torch.bfloat16 if raw else torch.float32),
        "num_warps": choice["num_warps"], "num_stages": choice["num_stages"],
    }  # fmt: skip
    return (batch * triton.cdiv(rows, choice["block_rows"]),), constants


def why_not(function: str, *args) -> list[str]:
    """Reasons why the launcher `function` cannot take these arguments; [] if it can."""
    names = _MAPS[function]
    maps = dict(zip(names, args, strict=False))
    reasons = why_not_tensors(**maps)
    if "teacher" in maps:
        student, teacher = maps.get("student", maps["teacher"]), maps["teacher"]
        channels = teacher.shape[1]
        if channels > MOST_TEACHER_CHANNELS:
            reasons.append(f"teacher has {channels} channels; the Triton kernels take {MOST_TEACHER_CHANNELS} at most")
        if student.dim() != 4 or teacher.dim() != 4 or student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
            reasons.append(f"teacher has shape {tuple(teacher.shape)} and student {tuple(student.shape)}")
    return reasons


_MAPS = {
    "channel_attention_statistics": ("teacher",),
    "channel_attention": ("student", "teacher"),
    "channel_attention_backward": ("grad", "student", "teacher"),
    "channel_attention_loss": ("student", "teacher"),
    "channel_attention_loss_backward": ("grad_loss", "gradient"),
}


def channel_attention_statistics(teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As odn_fast.reference.channel_attention."""
    batch, channels, height, width = teacher.shape
    teacher = dense(teacher)
    mean = teacher.new_empty(batch, channels, dtype=torch.float32)
    std, gram = torch.empty_like(mean), mean.new_empty(batch, channels, channels)
    grid, constants = _choice("channel_attention_statistics", teacher, teacher)
    launch(_statistics, grid, teacher, mean, std, gram, height * width, **constants)
    return mean, std, gram


def channel_attention(student: Tensor, teacher: Tensor, standardize: bool) -> Tensor:
    """As odn_fast.reference.channel_attention."""
    projected = torch.empty_like(student, memory_format=torch.channels_last)
    student, teacher = dense(student), dense(teacher)
    grid, constants = _choice("channel_attention", student, teacher)
    positions = student.shape[2] * student.shape[3]
    launch(_projection, grid, student, teacher, projected, positions, **constants, standardize=standardize)
    return projected


def channel_attention_backward(grad: Tensor, student: Tensor, teacher: Tensor, standardize: bool) -> Tensor:
    """As odn_fast.reference.channel_attention."""
    gradient = torch.empty_like(student, memory_format=torch.channels_last)
    grad, student, teacher = dense(grad), dense(student), dense(teacher)
    grid, constants = _choice("channel_attention_backward", student, teacher, grad)
    positions = student.shape[2] * student.shape[3]
    launch(_projection_backward, grid, grad, student, teacher, gradient, positions, **constants, standardize=standardize)
    return gradient


def channel_attention_loss(
    student: Tensor,
    teacher: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    gram: Tensor | None,
    standardize: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """As odn_fast.reference.channel_attention."""
    gradient = torch.empty_like(student, memory_format=torch.channels_last) if with_gradient else None
    empty = student.numel() == 0
    loss = student.new_full((), math.nan, dtype=torch.float32) if empty else student.new_empty((), dtype=torch.float32)
    if not empty:
        student, teacher = dense(student), dense(teacher)
        if mean is not None:
            mean, std = dense(mean), dense(std)
        grid, constants = _choice("channel_attention_loss", student, teacher)
        launch(
            _loss, grid, student, teacher, mean, std, gradient, loss, loss.new_empty(grid[0]), counter(student),
            student.shape[2] * student.shape[3], 2 / student.numel(), **constants, standardize=standardize,
        )  # fmt: skip
    return loss, student.new_empty(0) if gradient is None else gradient


def channel_attention_loss_backward(grad_loss: Tensor, gradient: Tensor) -> Tensor:
    """As odn_fast.reference.channel_attention."""
    scaled = torch.empty_like(gradient)
    if not (gradient.is_contiguous() or gradient.is_contiguous(memory_format=torch.channels_last)) or scaled.data_ptr() % 16:
        gradient = scaled.copy_(gradient)
    count = gradient.numel()
    launch(_scale, (triton.cdiv(count, 2048),), gradient, grad_loss, scaled, count, tile=2048, num_warps=8)
    return scaled
