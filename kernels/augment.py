"""Gather, random crop, flip and normalise in one launch.

A program makes one tile of one image of the batch, ROWS rows of SPAN values (columns and channels together), so that
nothing is divided by a run-time size. What it draws from Philox is the same for the whole tile. The resident set is read
where it lies, whatever its strides; the crop and the flip only change the address.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import INTERPRETED, LARGEST, cdiv, jit, launch, next_power_of_2, rounded
from ._common import why_not as why_no_tensors
from ._tuned import blocks

MOST_ELEMENTS = LARGEST - (1 << 21)  # coordinates reach beyond the image by the padding, 2^20 at most, and by a tile

_interpreted = tl.constexpr(INTERPRETED)


def why_not(function: str, images, index, scale, shift, key, padding, flip, dtype) -> list[str]:
    reasons = why_no_tensors(scale=scale, shift=shift)
    if dtype == torch.float64:
        reasons.append("dtype is torch.float64; the Triton kernels write torch.float32 and torch.bfloat16")
    elements = index.numel() * math.prod(images.shape[1:])
    if elements > MOST_ELEMENTS:
        reasons.append(f"the batch has {elements} elements; the Triton kernel writes at most {MOST_ELEMENTS}")
    furthest = sum((size - 1) * stride for size, stride in zip(images.shape[1:], images.stride()[1:], strict=True))
    if max(furthest, *images.stride(), len(images)) > LARGEST:
        reasons.append(
            f"images of shape {tuple(images.shape)} have strides {images.stride()}; the Triton kernels take at most "
            f"{LARGEST} images, and as many elements from one to the next and within one"
        )
    return reasons


def candidates(same: tuple[int, ...]) -> list[dict[str, int]]:
    sizes = ((256, 2), (512, 2), (512, 4), (1024, 2), (1024, 4), (2048, 4), (2048, 8))
    return [{"BLOCK": block, "num_warps": warps, "num_stages": 1} for block, warps in sizes]


CANDIDATES = {"augment": candidates}


def augment(
    images: Tensor,
    index: Tensor,
    scale: Tensor,
    shift: Tensor,
    key: Tensor | None,
    padding: int,
    flip: bool,
    dtype: torch.dtype,
) -> Tensor:
    count, (channels, height, width) = index.shape[0], images.shape[1:]
    y = torch.empty(
        (count, channels, height, width), dtype=dtype, device=images.device, memory_format=torch.channels_last
    )
    default = {"BLOCK": 1024, "num_warps": 4, "num_stages": 1}
    chosen = blocks("augment", y, same=(channels,), size=y.numel(), default=default)
    span = min(next_power_of_2(width * channels), chosen["BLOCK"])
    rows = min(next_power_of_2(height), chosen["BLOCK"] // span)
    spans = cdiv(width * channels, span)
    tiles = cdiv(height, rows) * spans
    random = bool(padding or flip)
    launch(
        _augment,
        (count * tiles,),
        images, index.contiguous(), key.contiguous() if random else None, scale.contiguous(), shift.contiguous(), y,
        images.shape[0], height, width, *images.stride(), padding, tiles, spans,
        C=channels, RANDOM=random, FLIP=bool(flip), ROWS=rows, SPAN=span,
        num_warps=chosen["num_warps"], num_stages=chosen["num_stages"],
    )  # fmt: skip
    return y


@jit
def _augment(
    images,  # uint8 (M, C, H, W), any strides; this and the next four of any alignment, so not named as pointers
    index,  # int64 (N)
    key,  # int64 (2), or None if not RANDOM
    scale,  # fp32 (C)
    shift,  # fp32 (C)
    y_ptr,  # (N, H, W, C)
    count,  # M
    height,
    width,
    image_stride,
    channel_stride,
    row_stride,
    column_stride,
    padding,
    tiles,  # of an image
    spans,  # of a row
    C: tl.constexpr,
    RANDOM: tl.constexpr,
    FLIP: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
):
    n = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    sample = tl.load(index + n)
    known = (sample >= 0) & (sample < count)
    row = (tile // spans) * ROWS + tl.arange(0, ROWS)[:, None]
    value = (tile % spans) * SPAN + tl.arange(0, SPAN)[None, :]
    column = value // C
    channel = value % C
    from_row = row
    from_column = column
    if RANDOM:
        words = _draw(tl.load(key), tl.load(key + 1), sample)
        places = (2 * padding + 1).to(tl.uint32)
        if FLIP:
            from_column = tl.where((words[2] >> 31) != 0, width - 1 - column, column)
        from_row = row + tl.umulhi(words[0], places).to(tl.int32) - padding
        from_column += tl.umulhi(words[1], places).to(tl.int32) - padding

    readable = tl.where(known, height, 0)  # no row of an image that is not there
    inside = (from_row >= 0) & (from_row < readable) & (from_column >= 0) & (from_column < width)
    image_ptr = images + tl.where(known, sample, 0) * image_stride
    place = channel * channel_stride + from_row * row_stride + from_column * column_stride
    pixel = tl.load(image_ptr + place, mask=inside, other=0).to(tl.float32)
    y = _product(pixel, tl.load(scale + channel)) + tl.load(shift + channel)
    y = tl.where(known, y, float("nan"))
    here = (row < height) & (value < width * C)
    to = (n * height + row) * (width * C) + value
    tl.store(y_ptr + to, rounded(y, y_ptr.dtype.element_ty), mask=here)


@triton.jit
def _draw(seed, epoch, sample):
    """Four words of 32 bits: Philox4x32-10 with the seed as key and (sample, epoch) as counter."""
    return tl.philox(
        seed,
        (sample & 0xFFFFFFFF).to(tl.uint32),
        ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32),
        (epoch & 0xFFFFFFFF).to(tl.uint32),
        ((epoch >> 32) & 0xFFFFFFFF).to(tl.uint32),
    )


@triton.jit
def _product(a, b):
    """a * b rounded, where the compiler would otherwise fuse it with the sum that follows."""
    if _interpreted:
        return a * b
    return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1)
