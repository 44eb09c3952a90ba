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

_forced: dict[tuple, dict] = {}  # by kernel and `same`, or None for any
_asked: dict[tuple, dict] | None = None


def blocks(kernel: str, x: Tensor, same: tuple[int, ...], size: int, default: dict[str, int]) -> dict[str, int]:
    """What to launch `kernel` with for maps like x: its block sizes, num_warps and num_stages, by name.

    same: what decides whether a choice works at all, such as channels; only data of the very same is used, and of that
    the entry whose size (pixels, say) is nearest by ratio. default: the answer where there is none.
    """
    if _asked is not None:
        _asked[kernel, str(x.dtype).removeprefix("torch."), same, size] = default
    if _forced:
        choice = _forced.get((kernel, same), _forced.get((kernel, None)))
        if choice is not None:
            return {**default, **choice}
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
    """All entries for a GPU, by kernel; {} if it was never tuned. Raises ValueError if its file cannot be read."""
    path = path_of(gpu)
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text())["kernels"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no table of block sizes ({error}); delete it, or write it anew: python -m odn_fast.tune") from error


def forget() -> None:
    """Read the tables again when they are next asked for."""
    table.cache_clear()
    _nearest.cache_clear()


def path_of(gpu: str) -> Path:
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


@contextlib.contextmanager
def forced(kernel: str, choice: dict[str, int], same: tuple[int, ...] | None = None) -> Iterator[None]:
    """Launch `kernel` with `choice` inside the block, as tuning does; only for this `same`, if one is given."""
    previous = _forced.get((kernel, same))
    _forced[kernel, same] = choice
    try:
        yield
    finally:
        if previous is None:
            del _forced[kernel, same]
        else:
            _forced[kernel, same] = previous


@contextlib.contextmanager
def asked() -> Iterator[dict[tuple, dict]]:
    """Collect {(kernel, dtype, same, size): default} of all that ask for blocks inside the block."""
    global _asked
    _asked = {}
    try:
        yield _asked
    finally:
        _asked = None
