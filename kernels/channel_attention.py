"""Channel attention in Triton: one launch per call, a program per image and block of the student's channels."""

import math
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import channel_attention_sweeps as sweeps
from ._common import LARGEST, cdiv, counter, dense, dot_dtype, is_hopper, jit, launch, next_power_of_2, rounded
from ._common import why_not as why_not_tensors
from ._tuned import blocks
from .channel_attention_at_once import at_once, moments

MOST_TEACHER_CHANNELS = 1024  # where a program keeps whole rows of weights
MOST_AT_ONCE = 1 << 14  # elements of a block of the student's map that a program keeps


@jit
def _scale(gradient_ptr, slope_ptr, scaled_ptr, count, tile: tl.constexpr):
    first = tl.program_id(0) * tile
    at = first + tl.arange(0, tile)
    slope = tl.load(slope_ptr).to(tl.float32)
    if first + tile <= count:  # without a mask: vectors
        value = tl.load(gradient_ptr + at).to(tl.float32) * slope
        tl.store(scaled_ptr + at, rounded(value, scaled_ptr.dtype.element_ty))
    else:
        value = tl.load(gradient_ptr + at, mask=at < count).to(tl.float32) * slope
        tl.store(scaled_ptr + at, rounded(value, scaled_ptr.dtype.element_ty), mask=at < count)


def sweep_candidates(same: tuple[int, ...]) -> list[dict]:
    """Block sizes to try for (C_s, C_t)."""
    default = _sweep_sizes(_padded(same[0]), _padded(same[1]), raw=True)
    return [
        {**default, "tile": max(16, default["tile"] // share), "num_warps": warps, "num_stages": stages}
        for share, warps, stages in ((1, 8, 2), (1, 8, 3), (1, 4, 2), (2, 4, 3), (2, 8, 3))
    ]


def candidates(same: tuple[int, ...]) -> list[dict]:
    """Block sizes to try for (C_s, C_t, positions of a tile that holds them all)."""
    rows, columns, tile = _padded(same[0]), _padded(same[1]), same[2]
    choices = sweep_candidates(same)[:3] if columns <= 128 or 16 * tile > MOST_AT_ONCE else []
    most = MOST_AT_ONCE // tile
    block_columns = min(columns, 64, most)
    for block_rows in sorted({min(rows, limit, most) for limit in (16, 32, 64)}) if most >= 16 else []:
        sizes = {"at_once": 1, "block_rows": block_rows, "block_columns": block_columns, "tile": tile}
        choices += [{**sizes, "num_warps": warps, "num_stages": 1 if block_columns == columns else 2} for warps in (4, 8)]
    return choices


CANDIDATES = {
    "channel_attention_statistics": sweep_candidates,
    "channel_attention": candidates,
    "channel_attention_backward": candidates,
    "channel_attention_loss": candidates,
}


def _padded(extent: int) -> int:
    return max(16, next_power_of_2(extent))


def _sweep_sizes(rows: int, columns: int, raw: bool) -> dict[str, int]:
    block_rows = max(16, min(rows, 4096 // columns) if raw else min(rows, columns, 2048 // columns))
    widest = max(block_rows, columns)
    if raw:
        tile, warps = max(16, min(128, 4096 // widest)), 8
    elif rows == columns == 16:
        tile, warps = 32, 4
    else:
        tile, warps = 64 if widest == 16 else 32 if widest < 512 else 16, 8
    return {
        "at_once": 0, "block_rows": block_rows, "block_columns": columns, "tile": tile,
        "num_warps": warps, "num_stages": 2 if raw else 1,
    }  # fmt: skip


def _sizes(rows: int, columns: int, tile: int, raw: bool, hopper: bool) -> dict[str, int]:
    """Found by compiling: what needs no spills, in as few programs as there can be."""
    most = (8192 if hopper else 4096) // tile
    if (columns <= 128 and not raw) or (tile > 256 and most < columns // 2 and columns <= MOST_TEACHER_CHANNELS):
        return _sweep_sizes(rows, columns, raw)
    warps, stages = 8, 1
    few_warps = 4 if hopper else 8
    if not raw:
        block_rows, block_columns = 16, 16
    elif tile <= 64:
        block_rows, block_columns, warps = min(rows, 32), min(columns, 64), few_warps
    elif columns <= 2 * most:
        block_rows, block_columns = min(rows, max(16, most)), columns
    else:
        block_rows, block_columns, warps, stages = 16, min(64, 2 * most), few_warps, 2
    return {
        "at_once": 1, "block_rows": block_rows, "block_columns": block_columns, "tile": tile,
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


class _Choice(NamedTuple):
    """Whether all positions are taken at once, grid, and the constants of a kernel in its order."""

    at_once: int
    grid: tuple[int]
    constants: dict


def _choice(kernel: str, student: Tensor, teacher: Tensor, *others: Tensor) -> _Choice:
    batch, rows, height, width = student.shape
    columns, positions = teacher.shape[1], height * width
    raw = all(x.dtype == torch.bfloat16 for x in (student, teacher, *others))
    if kernel == "channel_attention_statistics":
        same, default = (rows, columns), _sweep_sizes(_padded(rows), _padded(columns), raw)
    else:
        tile = _padded(positions)
        same, default = (rows, columns, tile), _sizes(_padded(rows), _padded(columns), tile, raw, is_hopper(student))
    choice = blocks(kernel, teacher, same, positions, default)
    if choice["at_once"]:
        choice = {**choice, "tile": _padded(positions)}
    constants = {
        "rows": rows, "columns": columns, "block_rows": choice["block_rows"], "block_columns": choice["block_columns"],
        "tile": choice["tile"], "raw": raw, "dot": dot_dtype(torch.bfloat16 if raw else torch.float32),
        "num_warps": choice["num_warps"], "num_stages": choice["num_stages"],
    }  # fmt: skip
    return _Choice(choice["at_once"], (batch * cdiv(rows, choice["block_rows"]),), constants)


def why_not(function: str, *args) -> list[str]:
    """Reasons why the launcher `function` cannot take these arguments; [] if it can."""
    names = _MAPS[function]
    maps = dict(zip(names, args, strict=False))
    reasons = why_not_tensors(**maps)
    if "teacher" in maps:
        student, teacher = maps.get("student", maps["teacher"]), maps["teacher"]
        channels = teacher.shape[1]
        fits = function != "channel_attention_statistics" and 16 * _padded(teacher.shape[2:].numel()) <= MOST_AT_ONCE
        if channels > MOST_TEACHER_CHANNELS and not fits:
            reasons.append(f"teacher has {channels} channels; the Triton kernels take {MOST_TEACHER_CHANNELS} at most")
        statistics = channels * channels * teacher.shape[0]
        if function == "channel_attention_statistics" and statistics > LARGEST:
            reasons.append(f"the Gram matrices have {statistics} elements; the Triton kernels index at most {LARGEST}")
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
    choice = _choice("channel_attention_statistics", teacher, teacher)
    launch(sweeps.statistics, choice.grid, teacher, mean, std, gram, height * width, **choice.constants)
    return mean, std, gram


def channel_attention(student: Tensor, teacher: Tensor, standardize: bool) -> Tensor:
    """As odn_fast.reference.channel_attention."""
    projected = torch.empty_like(student, memory_format=torch.channels_last)
    student, teacher = dense(student), dense(teacher)
    choice = _choice("channel_attention", student, teacher)
    if choice.at_once:
        _launch_at_once(choice, student, teacher, standardize, projected=projected)
    else:
        positions = student.shape[2] * student.shape[3]
        constants = {**choice.constants, "standardize": standardize}
        launch(sweeps.projection, choice.grid, student, teacher, projected, positions, **constants)
    return projected


def channel_attention_backward(grad: Tensor, student: Tensor, teacher: Tensor, standardize: bool) -> Tensor:
    """As odn_fast.reference.channel_attention."""
    gradient = torch.empty_like(student, memory_format=torch.channels_last)
    grad, student, teacher = dense(grad), dense(student), dense(teacher)
    choice = _choice("channel_attention_backward", student, teacher, grad)
    if choice.at_once:
        _launch_at_once(choice, student, teacher, standardize, grad=grad, gradient=gradient, slope=-1.0)
    else:
        positions = student.shape[2] * student.shape[3]
        constants = {**choice.constants, "standardize": standardize}
        launch(sweeps.projection_backward, choice.grid, grad, student, teacher, gradient, positions, **constants)
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
        choice = _choice("channel_attention_loss", student, teacher)
        outputs = {"gradient": gradient, "loss": loss, "partial": loss.new_empty(choice.grid[0])}
        if choice.at_once:
            slope = 2 / student.numel()
            _launch_at_once(choice, student, teacher, standardize, mean, std, **outputs, slope=slope)
        else:
            launch(
                sweeps.loss, choice.grid, student, teacher, mean, std, *outputs.values(), counter(student),
                student.shape[2] * student.shape[3], 2 / student.numel(), **choice.constants, standardize=standardize,
            )  # fmt: skip
    return loss, student.new_empty(0) if gradient is None else gradient


def _launch_at_once(
    choice, student, teacher, standardize, mean=None, std=None,
    grad=None, projected=None, gradient=None, loss=None, partial=None, slope=1.0,
) -> None:  # fmt: skip
    constants = choice.constants
    if mean is None and constants["block_columns"] < constants["columns"]:
        mean, std = _moments(teacher, constants["tile"], constants["raw"])
    launch(
        at_once, choice.grid, student, teacher, mean, std, grad, projected, gradient, loss, partial,
        None if loss is None else counter(student), student.shape[2] * student.shape[3], slope,
        **constants, standardize=standardize,
    )  # fmt: skip


def _moments(teacher: Tensor, tile: int, raw: bool) -> tuple[Tensor, Tensor]:
    batch, columns, height, width = teacher.shape
    mean = teacher.new_empty(batch, columns, dtype=torch.float32)
    std = torch.empty_like(mean)
    block = min(_padded(columns), max(16, 8192 // tile))
    grid = (batch * cdiv(columns, block),)
    constants = {"columns": columns, "block_columns": block, "tile": tile, "raw": raw}
    launch(moments, grid, teacher, mean, std, height * width, **constants, num_warps=8)
    return mean, std


def channel_attention_loss_backward(grad_loss: Tensor, gradient: Tensor) -> Tensor:
    """As odn_fast.reference.channel_attention."""
    scaled = torch.empty_like(gradient)
    if not (gradient.is_contiguous() or gradient.is_contiguous(memory_format=torch.channels_last)) or gradient.data_ptr() % 16:
        gradient = scaled.copy_(gradient)
    count = gradient.numel()
    launch(_scale, (cdiv(count, 2048),), gradient, grad_loss, scaled, count, tile=2048, num_warps=8)
    return scaled
