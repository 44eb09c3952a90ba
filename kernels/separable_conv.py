"""Separable convolution in Triton: depthwise 3x3, pointwise 1x1, batch norm, residual and ReLU.

A channels_last map is a matrix of pixels by channels, and the pixels of all images are split into tiles. A program
computes the depthwise output of its tiles in registers, multiplies it by the pointwise weight, stores the result z and
keeps the statistics of what it stored; the last program to finish adds them up. Normalisation and ReLU follow in a
second launch, or, in a residual unit, where the next convolution reads z (`depthwise` with NORMALISE).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common
from ._common import cdiv, counter, dense, dot_dtype, is_hopper, is_last, jit, launch, next_power_of_2, processors, relu, rounded
from ._tuned import blocks

# ---- device functions, shared with the backward pass


@triton.jit
def position(pixel, height, width):
    """Image, row and column of flat pixels of maps of height x width."""
    row = pixel // width
    image = row // height
    return image, row - image * height, pixel - row * width


@triton.jit
def tap_major(dw_ptr, taps_ptr, C: tl.constexpr, BK: tl.constexpr):
    """Where dw (C, 9) is as (9, C) in fp32: in taps, written by every program for itself, or dw itself if taps is None.

    All programs write the same values, so it does not matter whose a program reads.
    """
    if taps_ptr is None:
        result_ptr = dw_ptr
    else:
        for block in tl.range(0, C, BK, num_stages=1):
            channels = block + tl.arange(0, BK)[:, None]
            taps = tl.arange(0, 16)[None, :]
            mask = (channels < C) & (taps < 9)
            weight = tl.load(dw_ptr + channels * 9 + taps, mask=mask, other=0.0).to(tl.float32)
            tl.store(taps_ptr + taps * C + channels, weight, mask=mask)
        tl.debug_barrier()
        result_ptr = taps_ptr
    return result_ptr


@triton.jit
def channel_scale(mean_ptr, var_ptr, weight_ptr, bias_ptr, channels, inside, eps):
    """Scale and shift of a batch norm: normalised = z * scale + shift."""
    mean = tl.load(mean_ptr + channels, mask=inside, other=0.0)
    var = tl.load(var_ptr + channels, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    scale = weight * tl.rsqrt(var + eps)
    return scale, bias - mean * scale


@triton.jit
def depthwise(
    x_ptr, dw_ptr, scale, shift, pixel, valid, channels, inside, height, width, out_height, out_width,
    CI: tl.constexpr, STRIDE: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """The depthwise output at flat output pixels, (pixels, channels) in fp32. dw: (9, CI).

    With NORMALISE the input is relu(x * scale + shift), padded with zeros after that.
    """
    image, row, column = position(pixel, out_height, out_width)
    top, left = row * STRIDE - 1, column * STRIDE - 1
    offset = ((image * height + top) * width + left)[:, None] * CI + channels[None, :]
    total = tl.zeros([pixel.shape[0], channels.shape[0]], tl.float32)
    for i in tl.range(0, 3, num_stages=1):  # unrolled, all nine loads would be in flight and registers run out
        inside_rows = valid & (top + i >= 0) & (top + i < height)
        for j in tl.static_range(3):
            mask = (inside_rows & (left + j >= 0) & (left + j < width))[:, None] & inside[None, :]
            value = tl.load(x_ptr + offset + (i * width + j) * CI, mask=mask, other=0.0).to(tl.float32)
            if NORMALISE:
                value = relu(value * scale[None, :] + shift[None, :])
            weight = tl.load(dw_ptr + (i * 3 + j) * CI + channels, mask=inside, other=0.0).to(tl.float32)
            # This also keeps the sum out of the layout of the product that follows.
            total = tl.where(mask, total + value * weight[None, :], total)
    return total


@triton.jit
def pooled(
    x_ptr, pixel, valid, channels, inside, height, width, out_height, out_width,
    CI: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """The average over STRIDE x STRIDE windows, of what of them is inside the map."""
    image, row, column = position(pixel, out_height, out_width)
    top, left = row * STRIDE, column * STRIDE
    offset = ((image * height + top) * width + left)[:, None] * CI + channels[None, :]
    total = tl.zeros([pixel.shape[0], channels.shape[0]], tl.float32)
    for i in tl.range(0, STRIDE, num_stages=1):
        for j in tl.static_range(STRIDE):
            mask = (valid & (top + i < height) & (left + j < width))[:, None] & inside[None, :]
            value = tl.load(x_ptr + offset + (i * width + j) * CI, mask=mask, other=0.0).to(tl.float32)
            total = tl.where(mask, total + value, total)
    return total / window(top, left, height, width, STRIDE)[:, None]


@triton.jit
def gathered(
    x_ptr, dw_ptr, scale, shift, pixel, valid, channels, inside, height, width, out_height, out_width,
    CI: tl.constexpr, STRIDE: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """What the pointwise convolution takes: `depthwise`, or `pooled` if dw is None."""
    if dw_ptr is None:
        total = pooled(x_ptr, pixel, valid, channels, inside, height, width, out_height, out_width, CI, STRIDE)
    else:
        total = depthwise(
            x_ptr, dw_ptr, scale, shift, pixel, valid, channels, inside, height, width, out_height, out_width,
            CI, STRIDE, NORMALISE,
        )  # fmt: skip
    return total


@triton.jit
def window(top, left, height, width, STRIDE: tl.constexpr):
    """Pixels of a STRIDE x STRIDE window that are inside the map, in fp32."""
    return (tl.minimum(height - top, STRIDE) * tl.minimum(width - left, STRIDE)).to(tl.float32)


@triton.jit
def operand(value, dtype: tl.constexpr, DOT: tl.constexpr):
    """A factor of a product of maps of `dtype`: rounded as they are, in the type the product is computed in."""
    return rounded(value, dtype).to(DOT)


# ---- training


@jit
def _forward(
    x_ptr, dw_ptr, taps_ptr, pw_ptr, norm_mean_ptr, norm_var_ptr, norm_weight_ptr, norm_bias_ptr,
    z_ptr, partial_ptr, mean_ptr, var_ptr, z_mean_ptr, counter_ptr,
    pixels, height, width, out_height, out_width, tiles, tiles_each, eps,
    CI: tl.constexpr, CO: tl.constexpr, STRIDE: tl.constexpr, DOT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """z = pw . (dw * x), or pw . average pool of x if dw is None, and its mean and variance per channel.

    x: (images, height, width, CI), z in the sizes (images, out_height, out_width, CO), `pixels` in all. norm_*: the
    batch norm whose relu is applied to x on load, or None. taps: see `tap_major`. partial: (2, programs, CO) means, and
    sums of squared distances from them.
    """
    NORMALISE: tl.constexpr = norm_mean_ptr is not None
    CHUNKS: tl.constexpr = (CI + BK - 1) // BK
    dtype = x_ptr.dtype.element_ty
    outputs = tl.program_id(1) * BN + tl.arange(0, BN)
    channels = tl.arange(0, BK)
    inside, outputs_inside = channels < CI, outputs < CO
    scale = tl.zeros([BK], tl.float32)
    shift = tl.zeros([BK], tl.float32)
    if NORMALISE:
        scale, shift = channel_scale(norm_mean_ptr, norm_var_ptr, norm_weight_ptr, norm_bias_ptr, channels, inside, eps)
    pw = pointwise_weight(pw_ptr, channels, inside, outputs, outputs_inside, CI, dtype, DOT)
    weights_ptr = tap_major(dw_ptr, taps_ptr, CI, BK)

    first = tl.program_id(0) * tiles_each
    mean = tl.zeros([BN], tl.float32)
    squares = tl.zeros([BN], tl.float32)
    for tile in tl.range(first, tl.minimum(first + tiles_each, tiles), num_stages=1):
        pixel = tile * BM + tl.arange(0, BM)
        valid = pixel < pixels
        z = tl.zeros([BM, BN], tl.float32)
        for chunk in tl.range(0, CHUNKS, num_stages=1):
            if CHUNKS > 1:
                channels = chunk * BK + tl.arange(0, BK)
                inside = channels < CI
                pw = pointwise_weight(pw_ptr, channels, inside, outputs, outputs_inside, CI, dtype, DOT)
                if NORMALISE:
                    scale, shift = channel_scale(
                        norm_mean_ptr, norm_var_ptr, norm_weight_ptr, norm_bias_ptr, channels, inside, eps
                    )
            between = gathered(
                x_ptr, weights_ptr, scale, shift, pixel, valid, channels, inside,
                height, width, out_height, out_width, CI, STRIDE, NORMALISE,
            )  # fmt: skip
            z = tl.dot(operand(between, dtype, DOT), pw, z, input_precision="tf32x3")
        stored = rounded(z, dtype)
        mask = valid[:, None] & outputs_inside[None, :]
        tl.store(z_ptr + pixel[:, None] * CO + outputs[None, :], stored, mask=mask)

        # Chan, Golub and LeVeque 1983: each tile's own mean and squares, added to those so far.
        value = stored.to(tl.float32)
        before, here = ((tile - first) * BM).to(tl.float32), tl.minimum(pixels - tile * BM, BM).to(tl.float32)
        tile_mean = tl.sum(value, 0) / here  # rows beyond the last pixel are zero
        distance = tl.where(mask, value - tile_mean[None, :], 0.0)
        step = tile_mean - mean
        mean += step * (here / (before + here))
        squares += tl.sum(distance * distance, 0) + step * step * (before * here / (before + here))
    programs = tl.num_programs(0)
    tl.store(partial_ptr + tl.program_id(0) * CO + outputs, mean, mask=outputs_inside)
    tl.store(partial_ptr + (programs + tl.program_id(0)) * CO + outputs, squares, mask=outputs_inside)

    if is_last(counter_ptr, programs * tl.num_programs(1)):
        for block in tl.range(0, CO, BN, num_stages=1):
            columns = block + tl.arange(0, BN)
            _finish_statistics(
                partial_ptr, mean_ptr, var_ptr, z_mean_ptr, columns, programs, pixels, tiles_each * BM, CO, ROWS
            )


@triton.jit
def pointwise_weight(
    pw_ptr, channels, inside, outputs, outputs_inside, CI: tl.constexpr, dtype: tl.constexpr, DOT: tl.constexpr
):
    """(channels, outputs) of pw (CO, CI)."""
    mask = inside[:, None] & outputs_inside[None, :]
    value = tl.load(pw_ptr + outputs[None, :] * CI + channels[:, None], mask=mask, other=0.0)
    return operand(value.to(tl.float32), dtype, DOT)


@triton.jit
def _finish_statistics(
    partial_ptr, mean_ptr, var_ptr, z_mean_ptr, channels, programs, pixels, pixels_each,
    C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Mean and variance from the programs' own, relative to the first program's mean, which spares digits."""
    inside = channels < C
    pivot = tl.load(partial_ptr + channels, mask=inside, other=0.0, cache_modifier=".cg")
    sums = tl.zeros([ROWS, channels.shape[0]], tl.float32)
    squares = tl.zeros([ROWS, channels.shape[0]], tl.float32)
    for row in tl.range(0, programs, ROWS, num_stages=1):
        rows = row + tl.arange(0, ROWS)
        mask = (rows < programs)[:, None] & inside[None, :]
        offset = rows[:, None] * C + channels[None, :]
        mean = tl.load(partial_ptr + offset, mask=mask, other=0.0, cache_modifier=".cg")
        within = tl.load(partial_ptr + programs * C + offset, mask=mask, other=0.0, cache_modifier=".cg")
        count = tl.minimum(pixels - rows * pixels_each, pixels_each).to(tl.float32)
        distance = tl.where(mask, mean - pivot[None, :], 0.0)
        sums += distance * count[:, None]
        squares += within + distance * distance * count[:, None]
    step = tl.sum(sums, 0) / pixels
    mean = pivot + step
    tl.store(mean_ptr + channels, mean, mask=inside)
    tl.store(z_mean_ptr + channels, mean, mask=inside)
    tl.store(var_ptr + channels, relu(tl.sum(squares, 0) / pixels - step * step), mask=inside)


@jit
def _normalise(
    z_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr,
    residual_ptr, residual_mean_ptr, residual_var_ptr, residual_weight_ptr, residual_bias_ptr, y_ptr,
    pixels, eps, C: tl.constexpr, RELU: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y = batch norm of z + residual (None: none), and ReLU; residual_mean...: of a batch norm of the residual."""
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = channels < C
    pixel = tl.program_id(0) * BM + tl.arange(0, BM)
    mask = (pixel < pixels)[:, None] & inside[None, :]
    offset = pixel[:, None] * C + channels[None, :]
    scale, shift = channel_scale(mean_ptr, var_ptr, weight_ptr, bias_ptr, channels, inside, eps)
    value = tl.load(z_ptr + offset, mask=mask, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if residual_mean_ptr is not None:
            scale, shift = channel_scale(
                residual_mean_ptr, residual_var_ptr, residual_weight_ptr, residual_bias_ptr, channels, inside, eps
            )
            residual = residual * scale[None, :] + shift[None, :]
        value += residual
    if RELU:
        value = relu(value)
    tl.store(y_ptr + offset, rounded(value, y_ptr.dtype.element_ty), mask=mask)


# ---- launchers


def dense_weight(dw: Tensor) -> tuple[Tensor, Tensor | None]:
    """dw (C, 1, 3, 3), and memory for `tap_major`; None where dw already has taps by channels."""
    aligned, contiguous = dw.data_ptr() % 16 == 0, dw.is_contiguous()
    if aligned and not contiguous and dw.permute(2, 3, 1, 0).is_contiguous():
        return dw, None
    taps = torch.empty(9 * dw.shape[0], dtype=torch.float32, device=dw.device)
    return dw if aligned and contiguous else dense(dw.flatten(1)), taps


def padded(channels: int, largest: int) -> int:
    """Channels of a block: a power of two from 16, the least that a product takes."""
    return min(max(next_power_of_2(channels), 16), largest)


def empty_map(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    shape = (x.shape[0], channels, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def split(x: Tensor, tiles: int, waves: int) -> tuple[int, int]:
    """Tiles of each program and programs, at most about `waves` on every multiprocessor."""
    each = cdiv(tiles, waves * processors(x))
    return each, cdiv(tiles, each)


def pointwise_statistics(x, dw, pw, norm, stride, eps):
    """(z, mean, var, z_mean) of pw . (dw * x), or of pw . average pool of x if dw is (None, None).

    x and pw dense; dw: from `dense_weight`; norm: (mean, var, weight, bias) of a batch norm applied to x with ReLU on
    load, or four times None.
    """
    outputs, inputs = pw.shape[:2]
    height, width = x.shape[2:]
    z = empty_map(x, outputs, (height - 1) // stride + 1, (width - 1) // stride + 1)
    pixels = z.numel() // outputs
    mean, var, z_mean = (torch.empty(outputs, dtype=torch.float32, device=x.device) for _ in range(3))
    if pixels == 0:
        return z, mean.zero_(), var.zero_(), z_mean.zero_()
    same = (inputs, outputs, stride, int(dw[0] is None), int(norm[0] is not None))
    sizes = blocks("separable_forward", x, same=same, size=pixels, default=default_tiles(same, x))
    tile, warps = sizes["BM"], sizes["num_warps"]
    output_block = padded(outputs, 64)
    tiles = cdiv(pixels, tile)
    each, programs = split(x, tiles, sizes["waves"])
    launch(
        _forward, (programs, cdiv(outputs, output_block)),
        x, *dw, pw, *norm, z, torch.empty(2 * programs * outputs, dtype=torch.float32, device=x.device),
        mean, var, z_mean, counter(x), pixels, height, width, *z.shape[2:], tiles, each, eps,
        num_warps=warps, num_stages=1, CI=inputs, CO=outputs, STRIDE=stride, DOT=dot_dtype(x.dtype),
        BM=tile, BN=output_block, BK=input_block(x), ROWS=512 * warps // output_block,
    )  # fmt: skip
    return z, mean, var, z_mean


def normalised(z, norm, residual, residual_norm, eps, relu):
    """relu(batch norm of z + residual); norms: (mean, var, weight, bias), residual_norm four times None if raw."""
    y = torch.empty_like(z)
    channels = z.shape[1]
    pixels = z.numel() // channels
    same = (channels, 0 if residual is None else 1)
    sizes = blocks("separable_normalise", z, same=same, size=pixels, default={"elements": 4096, "num_warps": 4})
    block = padded(channels, 256)
    tile = max(sizes["elements"] // block, 1)
    launch(
        _normalise, (cdiv(pixels, tile), cdiv(channels, block)),
        z, *norm, residual, *residual_norm, y, pixels, eps,
        num_warps=sizes["num_warps"], num_stages=1, C=channels, RELU=relu, BM=tile, BC=block,
    )  # fmt: skip
    return y


NO_NORM = (None, None, None, None)


def separable_conv_train(x, dw, pw, bn_weight, bn_bias, residual, stride, eps, relu):
    """As `odn_fast.reference.separable_conv.separable_conv_train`, in two launches."""
    x, pw, bn_weight, bn_bias = dense(x), dense(pw), dense(bn_weight), dense(bn_bias)
    z, mean, var, z_mean = pointwise_statistics(x, dense_weight(dw), pw, NO_NORM, stride, eps)
    residual = None if residual is None else dense(residual)
    y = normalised(z, (mean, var, bn_weight, bn_bias), residual, NO_NORM, eps, relu)
    return y, mean, var, z, z_mean


# ---- what to launch with, and what can be launched


def default_tiles(same: tuple[int, ...], x: Tensor) -> dict[str, int]:
    """Tiles without spills, 4 to 16 elements of the depthwise output a thread."""
    largest = max(padded(same[0], 64), padded(same[1], 64))
    tile, warps = 64, 4 if largest == 16 else 8
    if largest == 64 and x.dtype == torch.float32:
        tile = 32
    elif not (is_hopper(x) or same[3]):
        tile, warps = 32, 4 if largest < 64 else 8
    return {"BM": tile, "num_warps": warps, "waves": 16 // warps}


def input_block(x: Tensor) -> int:
    """Channels of x that a product takes at once: fewer in fp32, where several blocks take more registers."""
    return padded(x.shape[1], 64 if x.shape[1] <= 64 or x.dtype == torch.bfloat16 else 32)


def tile_candidates(same: tuple[int, ...]) -> list[dict[str, int]]:
    largest = max(padded(same[0], 64), padded(same[1], 64))
    tiles = {16: [(64, 4), (32, 4), (128, 8)], 32: [(32, 4), (64, 8), (32, 8)], 64: [(32, 4), (32, 8), (64, 8)]}
    return [
        {"BM": tile, "num_warps": warps, "waves": waves}
        for tile, warps in tiles[largest]
        for waves in (8 // warps, 16 // warps)
    ]


def _normalise_candidates(same: tuple[int, ...]) -> list[dict[str, int]]:
    return [{"elements": 1024 * warps * many, "num_warps": 4 * warps} for warps in (1, 2) for many in (1, 2, 4)]


CANDIDATES = {"separable_forward": tile_candidates, "separable_normalise": _normalise_candidates}


def why_not(function, x, dw, pw, bn_weight, bn_bias, residual, stride, *settings):
    """Reasons why `function` of this file cannot take its arguments; [] if it can."""
    reasons = _common.why_not(x=x, dw=dw, pw=pw, bn_weight=bn_weight, bn_bias=bn_bias, residual=residual)
    return reasons + too_large(x, pw.shape[0], stride)


def too_large(x: Tensor, outputs: int, stride: int) -> list[str]:
    """A reason if the map of `outputs` channels that comes from x has more elements than kernels index."""
    elements = x.shape[0] * ((x.shape[2] - 1) // stride + 1) * ((x.shape[3] - 1) // stride + 1) * outputs
    if elements > _common.LARGEST:
        return [f"the output has {elements} elements; the Triton kernels index at most {_common.LARGEST}"]
    return []
