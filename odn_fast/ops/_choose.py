"""Which kernel answers an op on a CUDA device.

Every op has one list of implementations, best first. Each says why it cannot take given arguments; the first that can
runs, and the reference always can. `using` forces one by name.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from odn_fast import _extension
from odn_fast.ops._library import library, references, without_autocast

NAMES = ("cuda", "triton", "reference")
_forced: dict[str | None, str] = {}  # names, by op; None stands for every op that has no entry


class CannotRun(RuntimeError):
    """The implementation asked for cannot take these arguments."""


@dataclass(frozen=True)
class Implementation:
    """name: one of NAMES; run: takes the op's arguments; why_not: takes them too, and returns reasons, [] if it can."""

    name: str
    run: Callable
    why_not: Callable[..., list[str]]


@contextlib.contextmanager
def using(name: str, *ops: str) -> Iterator[None]:
    """Inside the block, ops on CUDA tensors run on the implementation `name`: "cuda", "triton" or "reference".

    ops: the dispatcher ops meant, by name (backward passes are ops of their own); none means all. Process-wide, so that
    backward passes, which run on threads of their own, follow. Ops called inside raise CannotRun, a RuntimeError, with
    all reasons where that implementation cannot take the arguments. CPU tensors are not concerned.

    Raises ValueError for any other name.
    """
    global _forced
    if name not in NAMES:
        raise ValueError(f"using: implementation is {name!r}, expected one of {', '.join(NAMES)}")
    previous, _forced = _forced, {**_forced, **dict.fromkeys(ops, name)} if ops else {None: name}
    try:
        yield
    finally:
        _forced = previous


def triton(module: str, function: str) -> Implementation:
    """The launcher `odn_fast.kernels.<module>.<function>`, imported when first asked for.

    Its reasons are those of `why_not` in that module, called as why_not(function, *arguments).
    """

    @functools.cache
    def kernels():
        try:
            import triton  # noqa: F401
        except ImportError:
            return None
        return importlib.import_module(f"odn_fast.kernels.{module}")

    def why_not(*args):
        if kernels() is None:
            return ["Triton is not installed; get it with: pip install triton"]
        return kernels().why_not(function, *args)

    return Implementation("triton", lambda *args: getattr(kernels(), function)(*args), why_not)


def cuda(op: str, why_not: Callable[..., list[str]]) -> Implementation:
    """The extension's own op `torch.ops.odn_fast.<op>`, for what `why_not`, called with its arguments, has no reason against."""

    @functools.cache
    def absent():
        if hasattr(torch.ops.odn_fast, op):
            return []
        if not _extension.available:
            return [f"the compiled extension is not used, because {_extension.reason}; {_extension.HOW_TO_BUILD}"]
        return [f"the extension was built without CUDA kernels ({_extension.build_information()['CUDA']})"]

    @functools.cache
    def kernel():
        return getattr(torch.ops.odn_fast, op).default

    return Implementation("cuda", lambda *args: kernel()(*args), lambda *args: absent() or why_not(*args))


def reasons(op: str, *args) -> dict[str, list[str]]:
    """Why each implementation of a dispatcher op (`torch.ops.odn_fast.<op>`) would not run on these arguments.

    The first with an empty list answers.
    """
    return {implementation.name: implementation.why_not(*args) for implementation in _implementations[op]}


_implementations: dict[str, list[Implementation]] = {}


def implemented(name: str) -> list[str]:
    """The dispatcher ops that have an implementation of this name, whether or not it can run here."""
    return [op for op, candidates in _implementations.items() if name in {candidate.name for candidate in candidates}]


def register_cuda(op: str, implementations: Sequence[Implementation], check: Callable[..., None]) -> None:
    """Put the chooser among `implementations`, best first, and the reference on the op's CUDA key.

    check: called with the arguments first, raises ValueError where they are not the op's: kernels would read out of
    bounds. Public functions leave it to this on CUDA, where a check takes as long as a launch.
    """
    reference = Implementation("reference", without_autocast(references[op]), lambda *args: [])
    _implementations[op] = candidates = [*implementations, reference]

    def run(*args):
        check(*args)
        implementation = chosen(op, candidates, args)
        device = device_of(args)
        if device.index == torch.cuda.current_device():
            return implementation.run(*args)
        with torch.cuda.device(device):
            return implementation.run(*args)

    library.impl(op, run, "CUDA")


def chosen(op: str, candidates: Sequence[Implementation], args: tuple) -> Implementation:
    """The first candidate that can run, or the forced one."""
    forced = _forced.get(op, _forced.get(None)) if _forced else None
    for implementation in candidates:
        if forced not in (None, implementation.name):
            continue
        why_not = implementation.why_not(*args)
        if not why_not:
            return implementation
        if forced:
            raise CannotRun(f"{op}: {forced} was asked for and cannot run: {'; '.join(why_not)}")
    raise CannotRun(
        f"{op}: {forced} was asked for and there is none; there are {', '.join(c.name for c in candidates)}"
    )


def device_of(args: Sequence) -> torch.device:
    """Of the first tensor, or of the first in the first list."""
    first = args[0]
    return (first if isinstance(first, torch.Tensor) else first[0]).device
