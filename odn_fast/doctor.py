"""What this installation has and lacks, on one screen: `python -m odn_fast.doctor`."""

import argparse
import sys

import torch

from . import __version__, _extension
from .engine import resolve_precision
from .machine import environment


def report() -> list[str]:
    """The lines that the command prints."""
    here = environment()
    lines = [f"odn_fast {__version__}, Python {here['python']}, torch {here['torch']}",
             f"processor: {here['processor']}, {torch.get_num_threads()} threads",
             f"training on the CPU in {resolve_precision('auto', 'cpu')} by default"]
    if _extension.available:
        built = ", ".join(f"{name} {value}" for name, value in _extension.build_information().items())
        lines.append(f"C++ ops: {_extension.instruction_set()} of {', '.join(_extension.instruction_sets())} ({built})")
    else:
        lines.append(f"C++ ops: not used, because {_extension.reason}; {_extension.HOW_TO_BUILD}")
    lines.append(f"CUDA: {torch.cuda.get_device_name()}" if torch.cuda.is_available() else
                 f"CUDA: PyTorch sees no device (built for {torch.version.cuda or 'the CPU'})")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m odn_fast.doctor",
                                     description="Print what this installation has, what it lacks, and how to get it.")
    parser.parse_args(arguments)
    print("\n".join(report()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
