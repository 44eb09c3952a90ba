"""What every op registers with PyTorch's dispatcher, in one place.

`<stem>` and `<stem>_backward` are dispatcher ops defined here in Python. The reference serves every device;
the extension adds only kernels on the CPU key, so the package works where nothing was compiled.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator

import torch

library = torch.library.Library("odn_fast", "DEF")
references: dict[str, Callable] = {}  # of every op defined here, by its name


def define(schema: str, reference: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Define an op with its reference and its fake, and return its default overload."""
    name = schema.split("(", 1)[0]
    references[name] = reference
    library.define(schema)
    library.impl(name, without_autocast(reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"odn_fast::{name}", fake, lib=library)
    return getattr(torch.ops.odn_fast, name).default


def without_autocast(reference: Callable) -> Callable:
    """An op decides its own precision; autocast must not reach the PyTorch calls inside the reference."""

    @functools.wraps(reference)
    def run(*args):
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return reference(*args)

    return run


@contextlib.contextmanager
def on_references(module: str | None = None) -> Iterator[None]:
    """Inside the block, CPU calls of ops run on their references: of all ops, or of those whose reference is in `module`.

    For tests and benchmarks: process-wide.
    """
    with torch.library._scoped_library("odn_fast", "IMPL") as scope, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        for name, function in references.items():
            if module in (None, function.__module__):
                scope.impl(name, without_autocast(function), "CPU")
        yield


def define_autocast(
    op: torch._ops.OpOverload, read: Callable[..., tuple], read_on_cuda: Callable[..., tuple] | None = None
) -> None:
    """Register what `op` does under autocast to bfloat16: it runs on `read(*arguments)`, outside of autocast.

    It runs on its arguments as they are under any other autocast dtype, and where its first argument is float64.
    read_on_cuda: instead of `read` for CUDA, where a conversion is a launch that kernels may be able to do without.
    """
    keys = [torch._C.DispatchKey.AutocastCPU, torch._C.DispatchKey.AutocastCUDA]
    autocast = torch._C.DispatchKeySet(keys[0]) | torch._C.DispatchKeySet(keys[1])

    def rule(device, read):
        def run(x, *args):
            with torch._C._ExcludeDispatchKeyGuard(autocast):
                if torch.get_autocast_dtype(device) == torch.bfloat16 and x.dtype != torch.float64:
                    return op(*read(x, *args))
                return op(x, *args)

        return run

    for device, read_there, key in zip(("cpu", "cuda"), (read, read_on_cuda or read), keys, strict=True):
        library.impl(op, rule(device, read_there), key.name)


def as_bfloat16(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A float32 tensor in bfloat16, anything else as it is."""
    return tensor.bfloat16() if tensor is not None and tensor.dtype == torch.float32 else tensor


def refuse_second_derivative(op: str) -> None:
    if torch.is_grad_enabled():  # create_graph=True: a second backward would silently miss terms
        raise RuntimeError(f"{op} can be differentiated only once, so create_graph=True is not supported")


def contiguous_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
