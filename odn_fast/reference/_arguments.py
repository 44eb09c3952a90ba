"""What references ask of tensors, in the same words for every op, and the dtype they compute in."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float64)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of arithmetic, statistics and losses: float64 if any of the tensors is float64, float32 otherwise."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    expected: Sequence[int],
    device: torch.device,
    dtypes: Sequence[torch.dtype] = FLOATING,
    leader: str = "x",
) -> None:
    """Raise ValueError unless `tensor` is of the expected shape, of one of `dtypes`, and on the device of `leader`."""
    if tensor.shape != expected:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected)}")
    if tensor.dtype not in dtypes:
        raise ValueError(
            f"{op}: {name} of shape {tuple(tensor.shape)} has dtype {tensor.dtype}, expected {', '.join(map(str, dtypes))}"
        )
    if tensor.device != device:
        raise ValueError(
            f"{op}: {name} of shape {tuple(tensor.shape)} is on {tensor.device}, expected {device} as {leader}"
        )


def check_map(op: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError unless `tensor` is a feature map; only its batch may be empty."""
    if tensor.dim() != 4 or 0 in tensor.shape[1:]:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected (N, C, H, W) with C, H and W at least 1")
    check_tensor(op, name, tensor, tensor.shape, tensor.device)


def check_vectors(op: str, x: Tensor, channels: int, **vectors: Tensor) -> None:
    for name, vector in vectors.items():
        check_tensor(op, name, vector, (channels,), x.device)


Given = tuple[str, Tensor | None, Sequence[int], Sequence[torch.dtype]]  # name, tensor, expected shape, allowed dtypes


def check_given(op: str, device: torch.device, given: Iterable[Given]) -> None:
    """Raise ValueError naming the first tensor that is of another shape, dtype or device. None may be absent."""
    for name, tensor, shape, dtypes in given:
        if tensor is not None and (tensor.shape != shape or tensor.dtype not in dtypes or tensor.device != device):
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype} on {tensor.device}, expected"
                f" {tuple(shape)} and {', '.join(map(str, dtypes))} on {device}"
            )
