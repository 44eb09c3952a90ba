"""Block sizes that were measured, shipped as data: `tuned/<gpu>.json`, written by `python -m odn_fast.tune`.

Nothing is tuned while a network trains. A kernel asks `blocks` for what it should be launched with and gives the sizes
that are right anywhere as a default; the data only ever replaces one working choice by a faster one.
"""

import contextlib
import functools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ._common import device_name

FOLDER = Path(__file__).with_name("tuned")

_forced: dict[str, dict] = {}
_asked: dict[str, tuple] | None = None


def blocks(kernel: str, x: Tensor, same: tuple[int, ...], size: int, default: dict[str, int]) -> dict[str, int]:
    """What to launch `kernel` with for maps like x: its block sizes, num_warps and num_stages, by name.

    same: what decides whether a choice works at all, such as channels; only data of the very same is used, and of that
    the entry whose size (pixels, say) is nearest by ratio. default: the answer where there is none.
    """
    if _asked is not None:
        _asked[kernel] = (str(x.dtype).removeprefix("torch."), same, size)
    if kernel in _forced:
        return {**default, **_forced[kernel]}
    if not (x.is_cuda or x.is_meta):
        return default
    return _nearest(device_name(x.device), kernel, x.dtype, same, size) or default


@functools.lru_cache(maxsize=4096)
def _nearest(gpu: str, kernel: str, dtype: torch.dtype, same: tuple[int, ...], size: int) -> dict[str, int] | None:
    name = str(dtype).removeprefix("torch.")
    entries = [
        entry for entry in table(gpu).get(kernel, ()) if entry["dtype"] == name and tuple(entry["same"]) == same
    ]
    if not entries:
        return None
    return min(entries, key=lambda entry: abs(math.log(entry["size"] / max(size, 1))))["blocks"]


@functools.cache
def table(gpu: str) -> dict[str, list[dict]]:
    """All entries for a GPU, by kernel; {} if it was never tuned."""
    path = path_of(gpu)
    return json.loads(path.read_text())["kernels"] if path.is_file() else {}


def path_of(gpu: str) -> Path:
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


@contextlib.contextmanager
def forced(kernel: str, choice: dict[str, int]) -> Iterator[None]:
    """Launch `kernel` with `choice` inside the block, as tuning does."""
    _forced[kernel] = choice
    try:
        yield
    finally:
        del _forced[kernel]


@contextlib.contextmanager
def asked() -> Iterator[dict[str, tuple]]:
    """Collect (dtype, same, size) of every kernel that asks for blocks inside the block."""
    global _asked
    _asked = {}
    try:
        yield _asked
    finally:
        _asked = None
