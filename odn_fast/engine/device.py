"""Which devices there are, and waiting for them."""

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
