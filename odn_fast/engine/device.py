"""Which devices there are, waiting for them, and what may not happen while one is captured."""

import contextlib
import gc
from collections.abc import Iterator

import torch


def check_device(device: str):
    """Refuse a device that is not there. Raises ConfigError."""
    from ..config import ConfigError  # brings pydantic, without which the ops can be measured

    try:
        wanted = torch.device(device)
        usable = wanted.type == "cpu" or wanted.type == "cuda" and (wanted.index or 0) < torch.cuda.device_count()
    except RuntimeError:
        usable = False
    if not usable:
        raise ConfigError(f"device: {device} is not usable here; expected cpu" +
                          (" or cuda" if torch.cuda.is_available() else " (PyTorch sees no CUDA device)"))


def wait_for(device: torch.device | str):
    """Until the device has done what this thread gave it; a GPU works behind the caller's back."""
    if torch.device(device).type == "cuda":
        torch.cuda.current_stream(device).synchronize()


@contextlib.contextmanager
def collecting_no_garbage() -> Iterator[None]:
    """Around the capture of a CUDA graph, which ends where a module of compiled kernels is unloaded, as it is with whatever
    network of `torch.compile` the garbage collector finds."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
