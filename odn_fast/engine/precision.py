"""Which number format the heavy arithmetic of training uses."""

import contextlib

import torch


def resolve_precision(name: str, device: str) -> str:
    """`fp32` or `bf16` for `auto`, `fp32` or `bf16`: auto takes bf16 where the processor or GPU computes in it.

    bf16 means autocast: weights, batch-norm statistics, losses and the optimizer stay fp32.
    Raises ValueError for another name.
    """
    if name not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision: expected auto, fp32 or bf16, got {name!r}")
    if name != "auto":
        return name
    return "bf16" if _has_bf16(torch.device(device)) else "fp32"


def autocast(precision: str, device: str) -> contextlib.AbstractContextManager:
    """The context in which a training step runs its forward pass."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check is not None and check() for check in checks)
