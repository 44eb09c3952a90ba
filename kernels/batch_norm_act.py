"""Training batch norm, residual and ReLU in one or two launches, forward and backward.

A program owns a block of channels and a share of the pixels. It reads its share twice: for the sums over pixels, then,
once every program's sums are known, to compute with them; backwards the second time, meeting first what is still in a
cache. How the programs of one block of channels learn of each other's sums is the `SPLIT` of the kernels:

"none": one program owns all pixels. "grid": all programs run at the same time and wait for each other, in one launch.
"sums", then "rest": two launches, the first ends where the sums are stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common
from ._common import INTERPRETED, counter, dense, jit, launch, processors, relu, rounded, wait_for_all
from ._tuned import blocks

MOST_SHARES = 256  # every program loads the sums of all of them at once


# ---- kernels. Maps are [pixels, channels] with channels = chunks * VECTOR, so that loads of VECTOR elements are aligned.


@triton.jit
def _tile(start, end, columns, channels, ROWS: tl.constexpr):
    """Offsets of ROWS pixels by the columns, and which of them are there."""
    rows = start + tl.arange(0, ROWS)
    return rows[:, None] * channels + columns[None, :], (rows < end)[:, None] & (columns < channels)[None, :]


@triton.jit
def _load(pointer, offsets, there):
    return tl.load(pointer + offsets, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _load_columns(pointer, columns, channels):
    return tl.load(pointer + columns, mask=columns < channels, other=0.0).to(tl.float32)


@triton.jit
def _statistics(x_ptr, columns, channels, first, end, ROWS: tl.constexpr, UNROLL: tl.constexpr):
    """Mean of pixels [first, end) per column, less the first pixel of all, and sum of squared deviations from it.

    Every row of the tile adds up deviations from its own first value; then rows are combined by their means (Chan,
    Golub and LeVeque, 1983), which are told from the first pixel on: so a mean far from zero costs no digits.
    """
    offsets, there = _tile(first, end, columns, channels, ROWS)
    pivot = _load(x_ptr, offsets, there)
    total = tl.zeros_like(pivot)
    squares = tl.zeros_like(pivot)
    for start in range(first, end, ROWS * UNROLL):
        for u in tl.static_range(UNROLL):
            offsets, there = _tile(start + u * ROWS, end, columns, channels, ROWS)
            deviation = tl.where(there, _load(x_ptr, offsets, there) - pivot, 0.0)
            total += deviation
            squares += deviation * deviation
    in_row = tl.maximum(end - first - tl.arange(0, ROWS) + ROWS - 1, 0) // ROWS
    n = in_row.to(tl.float32)[:, None]
    total_mean = total / tl.maximum(n, 1.0)
    squares -= total * total_mean
    base = _load_columns(x_ptr, columns, channels)
    shifts = tl.where(n > 0, pivot - base[None, :] + total_mean, 0.0)
    shift = tl.sum(n * shifts, 0) / (end - first).to(tl.float32)
    apart = shifts - shift[None, :]
    return shift, tl.sum(squares + n * apart * apart, 0)


@triton.jit
def _shares(partials_ptr, columns, channels, shares, SHARES: tl.constexpr):
    """Where the two sums of every share are, and which of SHARES are there."""
    rows = tl.arange(0, SHARES)
    there = (rows < shares)[:, None] & (columns < channels)[None, :]
    return partials_ptr + rows[:, None] * 2 * channels + columns[None, :], there


@triton.jit
def _combined_statistics(partials_ptr, columns, channels, pixels, share, shares, SHARES: tl.constexpr):
    """What `_statistics` is of all pixels, from that of every share."""
    pointers, there = _shares(partials_ptr, columns, channels, shares, SHARES)
    shifts = tl.load(pointers, mask=there, other=0.0, cache_modifier=".cg")
    squares = tl.load(pointers + channels, mask=there, other=0.0, cache_modifier=".cg")
    n = tl.minimum(pixels - tl.arange(0, SHARES) * share, share).to(tl.float32)[:, None]
    shift = tl.sum(n * shifts, 0) / pixels.to(tl.float32)
    apart = shifts - shift[None, :]
    return shift, tl.sum(tl.where(there, squares + n * apart * apart, 0.0), 0)


@triton.jit
def _store_partials(partials_ptr, columns, channels, one, two):
    mine = partials_ptr + tl.program_id(1) * 2 * channels + columns
    tl.store(mine, one, mask=columns < channels)
    tl.store(mine + channels, two, mask=columns < channels)


@triton.jit
def _wait(counter_ptr):
    first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    wait_for_all(counter_ptr, first, tl.num_programs(0) * tl.num_programs(1))


@jit
def _forward(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, mean_ptr, var_ptr, partials_ptr, counter_ptr,
    pixels, share, shares, chunks, eps,
    VECTOR: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr, WRITTEN: tl.constexpr,
    SHARES: tl.constexpr, SPLIT: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    channels = chunks * VECTOR
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * share
    end = tl.minimum(first + share, pixels)
    if SPLIT != "rest":
        shift, squares = _statistics(x_ptr, columns, channels, first, end, ROWS, UNROLL)
        if SPLIT != "none":
            _store_partials(partials_ptr, columns, channels, shift, squares)
    if SPLIT == "grid":
        _wait(counter_ptr)
    if SPLIT != "sums":
        if SPLIT != "none":
            shift, squares = _combined_statistics(partials_ptr, columns, channels, pixels, share, shares, SHARES)
        mean = _load_columns(x_ptr, columns, channels) + shift
        var = squares / pixels.to(tl.float32)
        if tl.program_id(1) == 0:
            tl.store(mean_ptr + columns, mean, mask=columns < channels)
            tl.store(var_ptr + columns, var, mask=columns < channels)
        scale = _load_columns(weight_ptr, columns, channels) * tl.rsqrt(var + eps)
        bias = _load_columns(bias_ptr, columns, channels)
        tiles = tl.cdiv(end - first, WRITTEN)
        for tile in range(tiles):
            offsets, there = _tile(first + (tiles - 1 - tile) * WRITTEN, end, columns, channels, WRITTEN)
            y = (_load(x_ptr, offsets, there) - mean[None, :]) * scale[None, :] + bias[None, :]
            if residual_ptr is not None:
                y += _load(residual_ptr, offsets, there)
            if RELU:
                y = relu(y)
            tl.store(y_ptr + offsets, rounded(y, y_ptr.dtype.element_ty), mask=there)


@triton.jit
def _let_through(grad, y, RELU: tl.constexpr):
    """The gradient where the ReLU with result, or argument, y let it through; NaN does."""
    if RELU:
        grad = tl.where(y <= 0, 0.0, grad)
    return grad


@jit
def _backward(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, var_ptr,
    grad_x_ptr, grad_weight_ptr, grad_bias_ptr, grad_residual_ptr, partials_ptr, counter_ptr,
    pixels, share, shares, chunks, eps,
    VECTOR: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr, WRITTEN: tl.constexpr,
    SHARES: tl.constexpr, SPLIT: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    channels = chunks * VECTOR
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * share
    end = tl.minimum(first + share, pixels)
    mean = _load_columns(mean_ptr, columns, channels)
    inverse_deviation = tl.rsqrt(_load_columns(var_ptr, columns, channels) + eps)
    scale = _load_columns(weight_ptr, columns, channels) * inverse_deviation
    bias = _load_columns(bias_ptr, columns, channels)
    if SPLIT != "rest":
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(first, end, ROWS * UNROLL):
            for u in tl.static_range(UNROLL):
                offsets, there = _tile(start + u * ROWS, end, columns, channels, ROWS)
                grad = _load(grad_ptr, offsets, there)
                centred = _load(x_ptr, offsets, there) - mean[None, :]
                if y_ptr is None:
                    grad = _let_through(grad, centred * scale[None, :] + bias[None, :], RELU)
                else:
                    grad = _let_through(grad, _load(y_ptr, offsets, there), RELU)
                    tl.store(grad_residual_ptr + offsets, rounded(grad, x_ptr.dtype.element_ty), mask=there)
                total += grad
                product += grad * centred
        sum_grad = tl.sum(total, 0)
        sum_product = tl.sum(product, 0) * inverse_deviation
        if SPLIT != "none":
            _store_partials(partials_ptr, columns, channels, sum_grad, sum_product)
    if SPLIT == "none":
        tl.debug_barrier()  # grad_residual is read by other threads than wrote it
    if SPLIT == "grid":
        _wait(counter_ptr)
    if SPLIT != "sums":
        if SPLIT != "none":
            pointers, known = _shares(partials_ptr, columns, channels, shares, SHARES)
            sum_grad = tl.sum(tl.load(pointers, mask=known, other=0.0, cache_modifier=".cg"), 0)
            sum_product = tl.sum(tl.load(pointers + channels, mask=known, other=0.0, cache_modifier=".cg"), 0)
        if tl.program_id(1) == 0:
            grad_weight = rounded(sum_product, grad_weight_ptr.dtype.element_ty)
            tl.store(grad_weight_ptr + columns, grad_weight, mask=columns < channels)
            grad_bias = rounded(sum_grad, grad_bias_ptr.dtype.element_ty)
            tl.store(grad_bias_ptr + columns, grad_bias, mask=columns < channels)
        if grad_x_ptr is not None:
            n = pixels.to(tl.float32)
            mean_grad = sum_grad / n
            slope = sum_product * inverse_deviation / n
            tiles = tl.cdiv(end - first, WRITTEN)
            for tile in range(tiles):
                offsets, there = _tile(first + (tiles - 1 - tile) * WRITTEN, end, columns, channels, WRITTEN)
                centred = _load(x_ptr, offsets, there) - mean[None, :]
                if y_ptr is None:
                    grad = _load(grad_ptr, offsets, there)
                    grad = _let_through(grad, centred * scale[None, :] + bias[None, :], RELU)
                else:
                    grad = _load(grad_residual_ptr, offsets, there)
                grad_x = scale[None, :] * (grad - mean_grad[None, :] - centred * slope[None, :])
                tl.store(grad_x_ptr + offsets, rounded(grad_x, grad_x_ptr.dtype.element_ty), mask=there)


# ---- launchers


def batch_norm_act_train(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = dense(x), dense(weight), dense(bias)
    residual = None if residual is None else dense(residual)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    mean = x.new_empty(x.shape[1], dtype=torch.float32)
    var = torch.empty_like(mean)
    if x.numel() == 0:
        return y, mean.zero_(), var.zero_()
    tensors = (x, weight, bias, residual, y, mean, var)
    _run("batch_norm_act_forward", _forward, x, residual is not None, relu, eps, *tensors)
    return y, mean, var


def batch_norm_act_train_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    y: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    relu: bool,
    x_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_y, x, weight, bias, mean, var = (dense(tensor) for tensor in (grad_y, x, weight, bias, mean, var))
    grad_x = torch.empty_like(x, memory_format=torch.channels_last) if x_needs_grad else None
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
    grad_residual = None
    if y is not None:
        y = dense(y)
        grad_residual = torch.empty_like(x, memory_format=torch.channels_last)
    if x.numel() == 0:
        grad_weight.zero_()
        grad_bias.zero_()
    else:
        tensors = (grad_y, x, weight, bias, y, mean, var, grad_x, grad_weight, grad_bias, grad_residual)
        _run("batch_norm_act_backward", _backward, x, y is not None, relu, eps, *tensors)
    return (
        x.new_empty(0) if grad_x is None else grad_x,
        grad_weight,
        grad_bias,
        x.new_empty(0) if grad_residual is None else grad_residual,
    )


def _run(name: str, kernel, x: Tensor, maps: int, relu: bool, eps: float, *tensors: Tensor | None) -> None:
    """Launch `kernel` for maps like x; `maps` counts those besides what every call has, which decide what is fast."""
    batch, channels, height, width = x.shape
    pixels = batch * height * width
    choice = blocks(name, x, same=(channels, maps), size=pixels, default=_default(channels, pixels))
    columns = choice["columns"]
    grid_wide = choice["grid"] and not INTERPRETED
    column_blocks = triton.cdiv(channels, columns)
    # One program fits a multiprocessor whatever the kernel takes, so that a grid of that many can run at the same time.
    programs = processors(x) * (1 if grid_wide else choice["programs"])
    most_shares = max(1, min(programs // column_blocks, MOST_SHARES))
    shares = max(1, min(most_shares, pixels // choice["fewest"]))
    share = triton.cdiv(pixels, shares)
    shares = triton.cdiv(pixels, share)
    partials = zero = None
    splits = ("none",)
    if shares > 1:
        partials = torch.empty(shares, 2, channels, dtype=torch.float32, device=x.device)
        splits = ("grid",) if grid_wide else ("sums", "rest")
        zero = counter(x) if grid_wide else None
    vector = min(channels & -channels, 8)
    for split in splits:
        launch(
            kernel, (column_blocks, shares), *tensors, partials, zero, pixels, share, shares, channels // vector, eps,
            num_warps=choice["num_warps"], num_stages=choice["num_stages"], cooperative=split == "grid",
            VECTOR=vector, COLUMNS=columns, ROWS=choice["rows"], UNROLL=choice["unroll"], WRITTEN=choice["written"],
            SHARES=triton.next_power_of_2(most_shares), SPLIT=split, RELU=relu,
        )  # fmt: skip


def _sizes(columns: int, unroll: int, fewest: int, grid: int, programs: int = 1, num_warps: int = 16) -> dict[str, int]:
    """columns, rows: of the tile whose sums a program keeps, 8 elements a thread, `unroll` of them loaded together;
    written: rows of the tile the rest is computed in; fewest: pixels of a program; grid: 1 for one launch;
    programs: a multiprocessor, with two launches."""
    rows = 256 * num_warps // columns
    return {
        "columns": columns, "rows": rows, "unroll": unroll, "written": 2 * rows, "fewest": max(fewest, rows),
        "grid": grid, "programs": programs, "num_warps": num_warps, "num_stages": 1,
    }  # fmt: skip


def _default(channels: int, pixels: int) -> dict[str, int]:
    if pixels <= 2048 and channels >= 256:  # one program owns all pixels of a few channels
        return _sizes(16 if channels >= 1024 else 8, unroll=2, fewest=2048, grid=1)
    return _sizes(min(32, triton.next_power_of_2(channels)), unroll=2, fewest=0, grid=1)


def candidates(same: tuple[int, ...]) -> list[dict[str, int]]:
    channels, _ = same
    widths = [columns for columns in (8, 16, 32, 64) if columns <= channels] or [triton.next_power_of_2(channels)]
    in_one = [_sizes(columns, 2, fewest=0, grid=1) for columns in widths]
    in_two = [_sizes(columns, 2, fewest=0, grid=0, programs=2, num_warps=8) for columns in widths[-2:]]
    alone = [_sizes(columns, 2, fewest=4096, grid=1) for columns in widths[:2]]
    return [*in_one, *in_two, *alone]


CANDIDATES = {"batch_norm_act_forward": candidates, "batch_norm_act_backward": candidates}


def why_not(function: str, *args) -> list[str]:
    """Reasons why a launcher here cannot take `args`; [] if it can. The reference refuses what no kernel should take."""
    if function == "batch_norm_act_train":
        x, weight, bias, residual, *_ = args
        maps, vectors = {"residual": residual}, {"weight": weight, "bias": bias}
    else:
        grad_y, x, weight, bias, y, mean, var, *_ = args
        maps, vectors = {"grad_y": grad_y, "y": y}, {"weight": weight, "bias": bias, "mean": mean, "var": var}
    reasons = _common.why_not(x=x, **maps, **vectors)
    if x.dim() != 4 or 0 in x.shape[1:]:
        return [*reasons, f"x has shape {tuple(x.shape)}, expected (N, C, H, W)"]
    if x.numel() == x.shape[1]:
        reasons.append(f"x has shape {tuple(x.shape)}, one value per channel")
    for expected, tensors in ((x.shape, maps), (x.shape[1:2], vectors)):
        for name, tensor in tensors.items():
            if tensor is not None and tensor.shape != expected:
                reasons.append(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(expected)}")
            if tensor is not None and tensor.device != x.device:
                reasons.append(f"{name} is on {tensor.device}, x on {x.device}")
    return reasons
