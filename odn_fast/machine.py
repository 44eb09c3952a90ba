"""What machine and which versions a run was made with."""

import platform
from pathlib import Path

import torch


def environment() -> dict[str, str]:
    """Processor model, Python and torch versions: with precision and threads, what the bits of a training depend on."""
    return {"processor": processor_name(), "python": platform.python_version(), "torch": str(torch.__version__)}


def processor_name() -> str:
    """The processor's model name, with family and model numbers where the name alone is generic."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split("\t", 1) for line in first.splitlines() if "\t" in line)
    values = {name.strip(): value.strip(" \t:") for name, value in fields.items()}
    name = values.get("model name", platform.machine())
    if "cpu family" in values and "model" in values:
        name += f" (family {values['cpu family']}, model {values['model']})"
    return name
