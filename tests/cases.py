"""Shapes, dtypes, layouts and implementations that op tests share."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from odn_fast import _extension
from odn_fast.ops._library import references, without_autocast

FLOATING = (torch.float32, torch.bfloat16, torch.float64)
IMPLEMENTATIONS = ("reference", *_extension.instruction_sets())


def _sliced(x: Tensor) -> Tensor:
    """Every second column of a map with a border: neither channels nor positions are adjacent."""
    n, c, h, w = x.shape
    larger = x.new_full((n, c + 1, h + 2, 2 * w + 1), torch.nan)
    larger[:, 1:, 1 : h + 1, 1::2] = x
    return larger[:, 1:, 1 : h + 1, 1::2]


def _channel_slice(x: Tensor) -> Tensor:
    """Some channels of a wider channels_last map."""
    n, c, h, w = x.shape
    wider = x.new_full((n, c + 3, h, w), torch.nan).contiguous(memory_format=torch.channels_last)
    wider[:, 2 : c + 2] = x
    return wider[:, 2 : c + 2]


def _overlapping(x: Tensor) -> Tensor:
    """Windows into one short line of memory; every element belongs to several positions."""
    return x.flatten().as_strided(x.shape, (1, 1, 1, 1)) if x.numel() else x


# Each takes a contiguous (N, C, H, W) tensor and gives one of the same shape, dtype and (unless noted) values.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    "sliced": _sliced,
    "channel_slice": _channel_slice,
    "expanded_images": lambda x: x[:1].expand(x.shape),  # the first image's values
    "expanded_positions": lambda x: x[..., :1, :1].expand(x.shape),  # the first position's values
    "overlapping": _overlapping,  # other values
}


@contextmanager
def use_implementation(name: str, reference: ModuleType) -> Iterator[None]:
    """Run an op's CPU calls on one of IMPLEMENTATIONS.

    reference: the module odn_fast.reference.<stem>; it holds the references of the ops meant.
    """
    if name != "reference":
        with _extension.use_instruction_set(name):
            yield
        return
    with torch.library._scoped_library("odn_fast", "IMPL") as library, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        for name, function in references.items():
            if function.__module__ == reference.__name__:
                library.impl(name, without_autocast(function), "CPU")
        yield


def assert_accurate(result: Tensor, unfused: Tensor, truth: Tensor, arithmetic: torch.dtype) -> None:
    """Largest error against `truth` (float64) at most twice that of PyTorch's unfused result.

    The floor, four units of rounding at the largest magnitude, is for what PyTorch happens to round exactly. It
    is 64 units in float64, where the truth is rounded as the result is.
    """
    assert result.shape == truth.shape
    if truth.numel() == 0:
        return
    eps = max(torch.finfo(result.dtype).eps, torch.finfo(arithmetic).eps)
    floor = (64 if eps == torch.finfo(torch.float64).eps else 4) * eps * truth.abs().max()
    error, allowed = (result - truth).abs().max(), 2 * (unfused - truth).abs().max() + floor
    assert error <= allowed, f"error {error:.3e} is above {allowed:.3e}"
