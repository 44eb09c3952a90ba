"""What every op registers with PyTorch's dispatcher, in one place.

`<stem>` and `<stem>_backward` are dispatcher ops defined here in Python. The reference serves every device;
the extension adds only kernels on the CPU key, so the package works where nothing was compiled.
"""

import functools
from collections.abc import Callable

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
