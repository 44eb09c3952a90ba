"""What test_kernel_compilation compiles: one function per op, named by its stem, calling its launchers.

Each takes the device of its tensors ("meta" where there is no GPU: then launches compile and run nothing) and
`everything`: all typical shapes in bfloat16 and float32, or only one set of channels in bfloat16 and one in float32, which
should compile in a few seconds. Forward and backward. Launchers are imported inside.
"""

import torch
from torch import Tensor


def feature_map(device: str, n: int, c: int, h: int, w: int, dtype: torch.dtype) -> Tensor:
    """A channels_last map without values."""
    return torch.empty(n, c, h, w, dtype=dtype, device=device, memory_format=torch.channels_last)


CASES = []  # of functions (device, everything) -> None
