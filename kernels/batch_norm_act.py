"""Training batch norm, residual and ReLU in one or two launches, forward and backward.

A program owns a block of channels and a share of the pixels. It needs its share twice: for the sums over pixels, then,
once every program's sums are known, to compute with them. It holds the first HELD tiles of its share in registers; the
rest it reads again, backwards, meeting first what is still in a cache. UNROLL tiles are loaded before any of them is
used, because no load passes a store. How the programs of one block of channels learn of each other's sums is the
`SPLIT` of the kernels:

"none": one program owns all pixels. "grid": all programs run at the same time and wait for each other, in one launch.
"sums", then "rest": two launches, the first ends where the sums are stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common
from ._common import INTERPRETED, cdiv, counter, dense, is_hopper, jit, launch, next_power_of_2, processors, relu, rounded, wait_for_all
from ._tuned import blocks

_interpreted = tl.constexpr(INTERPRETED)
MOST_SHARES = 256  # every program loads the sums of all of them at once


# ---- kernels. Maps are [pixels, channels] with channels = chunks * VECTOR, so that loads of VECTOR elements are aligned.


@triton.jit
def _tile(start, end, columns, channels, ROWS: tl.constexpr):
    """Offsets of ROWS pixels by the columns, and which of them are there."""
    rows = start + tl.arange(0, ROWS)
    return rows[:, None] * channels + columns[None, :], (rows < end)[:, None] & (columns < channels)[None, :]


@triton.jit
def _load_tiles(pointer, start, end, columns, channels, ROWS: tl.constexpr, TILES: tl.constexpr):
    """A tuple of TILES tiles from pixel `start` on, as they are in memory; of nothing, nothing."""
    tiles = ()
    if pointer is not None:
        for tile in tl.static_range(TILES):
            offsets, there = _tile(start + tile * ROWS, end, columns, channels, ROWS)
            tiles = tiles + (tl.load(pointer + offsets, mask=there, other=0.0),)
    return tiles


@triton.jit
def _forgotten(v):
    """v, of which the compiler knows nothing: what was computed from it before is computed again, not kept."""
    if _interpreted:
        return v
    if v.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [v], dtype=v.dtype, is_pure=True, pack=2)
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [v], dtype=v.dtype, is_pure=True, pack=1)


@triton.jit
def _load_columns(pointer, columns, channels):
    return tl.load(pointer + columns, mask=columns < channels, other=0.0).to(tl.float32)


@triton.jit
def _statistics(held, x_ptr, first, end, columns, channels, ROWS: tl.constexpr, UNROLL: tl.constexpr, HELD: tl.constexpr):
    """Mean of pixels [first, end) per column, less the first pixel of all, and sum of squared deviations from it.

    Every row of the tile adds up deviations from its own first value; then rows are combined by their means (Chan,
    Golub and LeVeque, 1983), which are told from the first pixel on: so a mean far from zero costs no digits.
    """
    pivot = held[0].to(tl.float32)
    total = tl.zeros_like(pivot)
    squares = tl.zeros_like(pivot)
    for tile in tl.static_range(1, HELD):
        _, there = _tile(first + tile * ROWS, end, columns, channels, ROWS)
        deviation = tl.where(there, held[tile].to(tl.float32) - pivot, 0.0)
        total += deviation
        squares += deviation * deviation
    for start in range(first + HELD * ROWS, end, UNROLL * ROWS):
        tiles = _load_tiles(x_ptr, start, end, columns, channels, ROWS, UNROLL)
        for tile in tl.static_range(UNROLL):
            _, there = _tile(start + tile * ROWS, end, columns, channels, ROWS)
            deviation = tl.where(there, tiles[tile].to(tl.float32) - pivot, 0.0)
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


@triton.jit
def _write_y(
    x, residual, y_ptr, start, end, columns, channels, mean, scale, bias, ROWS: tl.constexpr, TILES: tl.constexpr,
    OFFSET: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """y of TILES tiles from pixel `start` on, from x's tiles OFFSET to OFFSET + TILES."""
    for tile in tl.static_range(TILES):
        y = (_forgotten(x[OFFSET + tile]).to(tl.float32) - mean[None, :]) * scale[None, :] + bias[None, :]
        if len(residual) > 0:
            y += residual[tile].to(tl.float32)
        if RELU:
            y = relu(y)
        offsets, there = _tile(start + tile * ROWS, end, columns, channels, ROWS)
        tl.store(y_ptr + offsets, rounded(y, y_ptr.dtype.element_ty), mask=there)


@jit
def _forward(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, mean_ptr, var_ptr, partials_ptr, counter_ptr,
    pixels, share, shares, chunks, eps,
    VECTOR: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr, HELD: tl.constexpr,
    SHARES: tl.constexpr, SPLIT: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    channels = chunks * VECTOR
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * share
    end = tl.minimum(first + share, pixels)
    TOGETHER: tl.constexpr = min(UNROLL, HELD)
    held = _load_tiles(x_ptr, first, end, columns, channels, ROWS, HELD)
    if SPLIT != "rest":
        shift, squares = _statistics(held, x_ptr, first, end, columns, channels, ROWS, UNROLL, HELD)
        if SPLIT != "none":
            _store_partials(partials_ptr, columns, channels, shift, squares)
    if SPLIT != "sums":
        residual = _load_tiles(residual_ptr, first, end, columns, channels, ROWS, TOGETHER)  # arrives while waiting
        weight = _load_columns(weight_ptr, columns, channels)
        bias = _load_columns(bias_ptr, columns, channels)
        base = _load_columns(x_ptr, columns, channels)
        if SPLIT == "grid":
            _wait(counter_ptr)
        first = _forgotten(first)
        if SPLIT != "none":
            shift, squares = _combined_statistics(partials_ptr, columns, channels, pixels, share, shares, SHARES)
        mean = base + shift
        var = squares / pixels.to(tl.float32)
        if tl.program_id(1) == 0:
            tl.store(mean_ptr + columns, mean, mask=columns < channels)
            tl.store(var_ptr + columns, var, mask=columns < channels)
        scale = weight * tl.rsqrt(var + eps)
        for group in tl.static_range(0, HELD, UNROLL):
            start = first + group * ROWS
            if group > 0:
                residual = _load_tiles(residual_ptr, start, end, columns, channels, ROWS, TOGETHER)
            _write_y(held, residual, y_ptr, start, end, columns, channels, mean, scale, bias, ROWS, TOGETHER, group, RELU)
        rest = first + HELD * ROWS
        groups = tl.cdiv(end - rest, UNROLL * ROWS)
        for group in range(groups):
            start = rest + (groups - 1 - group) * UNROLL * ROWS
            x = _load_tiles(x_ptr, start, end, columns, channels, ROWS, UNROLL)
            residual_tiles = _load_tiles(residual_ptr, start, end, columns, channels, ROWS, UNROLL)
            _write_y(x, residual_tiles, y_ptr, start, end, columns, channels, mean, scale, bias, ROWS, UNROLL, 0, RELU)


@triton.jit
def _let_through(grad, centred, y, tile: tl.constexpr, scale, bias, RELU: tl.constexpr):
    """The gradient where the ReLU let it through, by its result or, where that is not given, its argument; NaN does."""
    if RELU:
        if len(y) > 0:
            grad = tl.where(y[tile].to(tl.float32) <= 0, 0.0, grad)
        else:
            grad = tl.where(centred * scale[None, :] + bias[None, :] <= 0, 0.0, grad)
    return grad


@triton.jit
def _add_products(
    total, product, grad, x, y, grad_residual_ptr, start, end, columns, channels, mean, scale, bias,
    ROWS: tl.constexpr, TILES: tl.constexpr, OFFSET: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Add up g and g * (x - mean), with g the gradient that the ReLU let through, over TILES tiles from `start` on.

    Returns both sums and the tiles of g, after storing them where the residual needs them.
    """
    through = ()
    for tile in tl.static_range(TILES):
        centred = x[OFFSET + tile].to(tl.float32) - mean[None, :]
        g = _let_through(grad[OFFSET + tile].to(tl.float32), centred, y, tile, scale, bias, RELU)
        if len(y) > 0:
            offsets, there = _tile(start + tile * ROWS, end, columns, channels, ROWS)
            tl.store(grad_residual_ptr + offsets, rounded(g, grad_residual_ptr.dtype.element_ty), mask=there)
        total += g
        product += g * centred
        through = through + (rounded(g, grad[0].dtype),)
    return total, product, through


@triton.jit
def _write_grad_x(
    grad, x, grad_x_ptr, start, end, columns, channels, mean, scale, bias, mean_grad, slope,
    ROWS: tl.constexpr, TILES: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    for tile in tl.static_range(TILES):
        centred = _forgotten(x[tile]).to(tl.float32) - mean[None, :]
        g = _let_through(_forgotten(grad[tile]).to(tl.float32), centred, (), tile, scale, bias, RELU)
        grad_x = scale[None, :] * (g - mean_grad[None, :] - centred * slope[None, :])
        offsets, there = _tile(start + tile * ROWS, end, columns, channels, ROWS)
        tl.store(grad_x_ptr + offsets, rounded(grad_x, grad_x_ptr.dtype.element_ty), mask=there)


@jit
def _backward(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, var_ptr,
    grad_x_ptr, grad_weight_ptr, grad_bias_ptr, grad_residual_ptr, partials_ptr, counter_ptr,
    pixels, share, shares, chunks, eps,
    VECTOR: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr, HELD: tl.constexpr,
    SHARES: tl.constexpr, SPLIT: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    channels = chunks * VECTOR
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * share
    end = tl.minimum(first + share, pixels)
    rest = first + HELD * ROWS
    TOGETHER: tl.constexpr = min(UNROLL, HELD)
    x = _load_tiles(x_ptr, first, end, columns, channels, ROWS, HELD)
    grad = _load_tiles(grad_ptr, first, end, columns, channels, ROWS, HELD)
    mean = _load_columns(mean_ptr, columns, channels)
    inverse_deviation = tl.rsqrt(_load_columns(var_ptr, columns, channels) + eps)
    scale = _load_columns(weight_ptr, columns, channels) * inverse_deviation
    bias = _load_columns(bias_ptr, columns, channels)
    through = ()
    if SPLIT != "rest":
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for group in tl.static_range(0, HELD, UNROLL):
            start = first + group * ROWS
            y = _load_tiles(y_ptr, start, end, columns, channels, ROWS, TOGETHER)
            total, product, tiles = _add_products(
                total, product, grad, x, y, grad_residual_ptr, start, end, columns, channels, mean, scale, bias,
                ROWS, TOGETHER, group, RELU,
            )  # fmt: skip
            through = through + tiles
        for start in range(rest, end, UNROLL * ROWS):
            some_x = _load_tiles(x_ptr, start, end, columns, channels, ROWS, UNROLL)
            some_grad = _load_tiles(grad_ptr, start, end, columns, channels, ROWS, UNROLL)
            some_y = _load_tiles(y_ptr, start, end, columns, channels, ROWS, UNROLL)
            total, product, _ = _add_products(
                total, product, some_grad, some_x, some_y, grad_residual_ptr, start, end, columns, channels,
                mean, scale, bias, ROWS, UNROLL, 0, RELU,
            )  # fmt: skip
        sum_grad = tl.sum(total, 0)
        sum_product = tl.sum(product, 0) * inverse_deviation
        if SPLIT != "none":
            _store_partials(partials_ptr, columns, channels, sum_grad, sum_product)
    if SPLIT == "none":
        tl.debug_barrier()  # grad_residual is read by other threads than wrote it
    if SPLIT == "grid":
        _wait(counter_ptr)
    if SPLIT != "sums":
        first = _forgotten(first)
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
            mean_grad = sum_grad / pixels.to(tl.float32)
            slope = sum_product * inverse_deviation / pixels.to(tl.float32)
            _write_grad_x(
                through, x, grad_x_ptr, first, end, columns, channels, mean, scale, bias, mean_grad, slope, ROWS, HELD, False
            )
            groups = tl.cdiv(end - rest, UNROLL * ROWS)
            for group in range(groups):
                start = rest + (groups - 1 - group) * UNROLL * ROWS
                some_x = _load_tiles(x_ptr, start, end, columns, channels, ROWS, UNROLL)
                let_through_ptr = grad_ptr if y_ptr is None else grad_residual_ptr
                some_grad = _load_tiles(let_through_ptr, start, end, columns, channels, ROWS, UNROLL)
                _write_grad_x(
                    some_grad, some_x, grad_x_ptr, start, end, columns, channels, mean, scale, bias, mean_grad, slope,
                    ROWS, UNROLL, RELU and y_ptr is None,
                )  # fmt: skip


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
    _run(_forward, x, False, residual is not None, relu, eps, *tensors)
    return y, mean, var


def batch_norm_act_train_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, y: Tensor | None, mean: Tensor, var: Tensor,
    eps: float, relu: bool, x_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
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
        _run(_backward, x, True, y is not None, relu, eps, *tensors)
    return (
        x.new_empty(0) if grad_x is None else grad_x,
        grad_weight,
        grad_bias,
        x.new_empty(0) if grad_residual is None else grad_residual,
    )


def _run(kernel, x: Tensor, backward: bool, added: bool, relu: bool, eps: float, *tensors: Tensor | None) -> None:
    """Launch `kernel` for maps like x; `added`: with a residual or, backward, with y."""
    channels, pixels = x.shape[1], x.numel() // x.shape[1]
    same = channels, x.element_size(), int(backward), int(added)
    name = "batch_norm_act_backward" if backward else "batch_norm_act_forward"
    choice = blocks(name, x, same, pixels, default=_default(same, pixels, is_hopper(x)))
    columns = choice["columns"]
    grid_wide = choice["grid"] and not INTERPRETED
    column_blocks = cdiv(channels, columns)
    # One program fits a multiprocessor whatever the kernel takes, so that a grid of that many can run at the same time.
    programs = processors(x) * (1 if grid_wide else choice["programs"])
    most_shares = max(1, min(programs // column_blocks, MOST_SHARES))
    shares = max(1, min(most_shares, pixels // choice["fewest"]))
    share = cdiv(pixels, shares)
    shares = cdiv(pixels, share)
    partials = zero = None
    splits = ("none",)
    if shares > 1:
        partials = torch.empty(shares, 2, channels, dtype=torch.float32, device=x.device)
        splits = ("grid",) if grid_wide else ("sums", "rest")
        zero = counter(x) if grid_wide else None
    vector = min(channels & -channels, 8)
    if len(splits) == 1:
        held = min(choice["held"], next_power_of_2(cdiv(share, choice["rows"])))
    else:
        held = 0 if backward else 1  # nothing outlives a launch; the tile that statistics start from counts as held
    for split in splits:
        launch(
            kernel, (column_blocks, shares), *tensors, partials, zero, pixels, share, shares, channels // vector, eps,
            num_warps=choice["num_warps"], num_stages=choice["num_stages"], cooperative=split == "grid",
            VECTOR=vector, COLUMNS=columns, ROWS=choice["rows"], UNROLL=choice["unroll"], HELD=held,
            SHARES=next_power_of_2(most_shares), SPLIT=split, RELU=relu,
        )  # fmt: skip


# ---- block sizes


def _sizes(same: tuple[int, ...], columns: int, fewest=0, grid=1, programs=1, num_warps=16) -> dict[str, int]:
    """columns, rows: of a tile, 8 elements a thread; unroll: tiles loaded together, of every map; held: tiles, at most;
    fewest: pixels of a program; grid: 1 for one launch; programs: a multiprocessor, with two launches.

    16 warps leave 128 registers a thread, which these numbers of tiles nearly fill.
    """
    _, element_size, backward, _ = same
    rows = 256 * num_warps // columns
    return {
        "columns": columns, "rows": rows, "unroll": (4 if backward else 8) // element_size,
        "held": 2 if backward else 16 // element_size, "fewest": max(fewest, rows),
        "grid": grid, "programs": programs, "num_warps": num_warps, "num_stages": 1,
    }  # fmt: skip


def _default(same: tuple[int, ...], pixels: int, hopper: bool) -> dict[str, int]:
    channels, _, backward, _ = same
    few = pixels <= 2048 and channels >= 256  # one program owns all pixels of a few channels
    columns = (16 if channels >= 1024 else 8) if few else min(32, next_power_of_2(channels))
    sizes = _sizes(same, columns, fewest=2048 if few else 0)
    return sizes if hopper or backward else {**sizes, "unroll": sizes["unroll"] // 2}


def candidates(same: tuple[int, ...]) -> list[dict[str, int]]:
    widths = [columns for columns in (8, 16, 32, 64) if columns <= same[0]] or [next_power_of_2(same[0])]
    in_one = [_sizes(same, columns) for columns in widths]
    usual = _sizes(same, min(32, widths[-1]))
    in_one.append({**usual, "held": 2 * usual["held"]})
    in_two = [_sizes(same, columns, grid=0, programs=2, num_warps=8) for columns in widths[-2:]]
    alone = [_sizes(same, columns, fewest=4096) for columns in widths[:2]]
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
