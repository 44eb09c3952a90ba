"""Loads the compiled extension, or says once why it is absent.

Without it every op answers through its PyTorch reference: the same results, more slowly.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch

HOW_TO_BUILD = "build it with: pip install cmake ninja pybind11 setuptools && pip install --no-build-isolation -e ."


def _load():
    """The module `odn_fast._C` and "", or None and the reason why it is not used."""
    spec = find_spec("odn_fast._C")
    if spec is None:
        return None, "it was not built"
    # A library built against another torch may load and then crash, so its file is asked before it is loaded.
    found = re.search(rb"odn_fast built against torch ([^\0]+)\0", Path(spec.origin).read_bytes())
    built_against = found[1].decode() if found else "of an unknown version"
    if built_against != torch.__version__:
        return None, f"it was built against torch {built_against} and torch {torch.__version__} is running"
    try:
        from odn_fast import _C
    except ImportError as error:
        return None, f"it cannot be loaded ({error})"
    return _C, ""


_module, reason = _load()
available: bool = _module is not None
if not available:
    warnings.warn(
        f"odn_fast: the compiled extension is not used, because {reason}; CPU ops run on their slower PyTorch "
        f"reference; {HOW_TO_BUILD}",
        stacklevel=2,
    )


def build_information() -> dict[str, str]:
    """What the extension was built with, {} if it is not available."""
    return dict(_module.build_information) if available else {}


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that were compiled and that this processor has, best first; () without the extension."""
    return tuple(_module.instruction_sets()) if available else ()


def instruction_set() -> str:
    """The instruction set the CPU kernels use now, "" without the extension."""
    return _module.instruction_set() if available else ""


@contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Run CPU kernels with instruction set `name` inside the block. For tests and benchmarks: process-wide.

    Raises ValueError, naming those available, for any other name.
    """
    if name not in instruction_sets():
        raise ValueError(f"instruction set {name!r} is not available, expected one of {instruction_sets()}")
    previous = instruction_set()
    _module.set_instruction_set(name)
    try:
        yield
    finally:
        _module.set_instruction_set(previous)
