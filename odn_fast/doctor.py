"""What this installation has and lacks, on one screen: `python -m odn_fast.doctor`."""

import argparse
import sys

import torch

from . import __version__, _extension
from .data.dali import PACKAGE
from .engine import resolve_precision
from .machine import environment


def report() -> list[str]:
    """The lines that the command prints."""
    here = environment()
    lines = [f"odn_fast {__version__}, Python {here['python']}, torch {here['torch']}",
             f"processor: {here['processor']}, {torch.get_num_threads()} threads",
             f"training on the CPU in {resolve_precision('auto', 'cpu')} by default"]
    if _extension.available:
        information = _extension.build_information()
        cuda = information.pop("CUDA", "left out")
        built = ", ".join(f"{name} {value}" for name, value in information.items())
        lines.append(f"C++ ops: {_extension.instruction_set()} of {', '.join(_extension.instruction_sets())} ({built})")
        lines.append(cuda_line(cuda, torch._C._dispatch_get_all_op_names()))
    else:
        lines.append(f"C++ ops: not used, because {_extension.reason}; {_extension.HOW_TO_BUILD}")
    lines.append(f"CUDA: {torch.cuda.get_device_name()}" if torch.cuda.is_available() else
                 f"CUDA: PyTorch sees no device (built for {torch.version.cuda or 'the CPU'})")
    lines.append(dali_line())
    return [*lines, *triton_lines(torch.cuda.get_device_name() if torch.cuda.is_available() else "")]


def cuda_line(built: str, ops: list[str]) -> str:
    """About the extension's CUDA kernels, which are ops of their own; built: with what, or "left out: " and why."""
    if built.startswith("left out"):
        return f"CUDA kernels: {built}; Triton's are used"
    names = (name.removeprefix("odn_fast::") for name in ops if name.startswith("odn_fast::") and name.endswith("_cuda"))
    return f"CUDA kernels: {', '.join(sorted(name.removesuffix('_cuda') for name in names))} (nvcc {built})"


def dali_line() -> str:
    """About NVIDIA DALI, which decodes image folders that do not fit in memory."""
    try:
        import nvidia.dali
    except ImportError:
        return f"DALI: not installed, so image folders that do not fit in memory are decoded by Pillow; get it with: pip install {PACKAGE}"
    return f"DALI: {nvidia.dali.__version__}"


def triton_lines(gpu: str) -> list[str]:
    """About Triton, and about the block sizes of its kernels on `gpu`, "" where there is none."""
    try:
        import triton
    except ImportError:
        return ["Triton: not installed, so ops on a GPU run on their slower PyTorch reference; get it with: pip install triton"]
    lines = [f"Triton: {triton.__version__}"]
    if not gpu:
        return lines
    from .kernels import _tuned

    try:
        table = _tuned.table(gpu)
    except ValueError as error:
        return [*lines, f"block sizes: {error}"]
    entries = sum(map(len, table.values()))
    return [*lines, f"block sizes: {entries} measured on {gpu}, in {_tuned.path_of(gpu)}" if entries else
            f"block sizes: not tuned for {gpu}, so the defaults are used: python -m odn_fast.tune"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m odn_fast.doctor",
                                     description="Print what this installation has, what it lacks, and how to get it.")
    parser.parse_args(arguments)
    print("\n".join(report()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
