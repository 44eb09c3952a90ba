"""What every bench shares: the machine line, paired timing, measured bandwidth, arithmetic and memory, the report.

    def test_something():
        prepare()
        measured = measure({"eager": eager, "ours": ours})
        print(table(...)); report("something", {...})

With ODN_FAST_BENCH_QUICK in the environment, to see whether a bench works at all, there are two repetitions and no report
is written.

A figure is a median of repetitions in which every arm runs once, in turn, so that a slow moment of the machine
meets all arms. A ratio is the median of the ratios within repetitions. Repetitions during which other processes
used the processor are measured again.
"""

import ctypes
import datetime
import itertools
import json
import os
import re
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from odn_fast import _extension
from odn_fast.engine.allocator import tune_allocator
from odn_fast.machine import environment

RESULTS = Path(__file__).with_name("results")
QUICK = "ODN_FAST_BENCH_QUICK" in os.environ


def prepare(threads: int | None = None) -> None:
    """Set the threads and tune the allocator, for all arms alike: a speed-up must not be the allocator's."""
    if threads is not None:
        torch.set_num_threads(threads)
    if not tune_allocator():
        print("the allocator could not be tuned: large tensors cost page faults in all arms")


def machine() -> dict[str, object]:
    """The line that belongs to every figure."""
    return {
        **environment(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": _extension.instruction_set() or f"none, {_extension.reason}",
        "load": os.getloadavg()[0],
        "date": datetime.date.today().isoformat(),
    }


def cpu_seconds_of_others() -> float:
    """CPU time that other processes, or other guests of the host, have taken from this machine so far."""
    user, nice, system, _, _, irq, soft_irq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    own = resource.getrusage(resource.RUSAGE_SELF)
    busy = (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - own.ru_utime - own.ru_stime


@dataclass
class Measurement:
    """Milliseconds of every arm in every repetition, and how many repetitions other processes disturbed.

    Disturbed repetitions are measured again. Only if the machine never came to rest are they counted, and
    `quiet` is False.
    """

    times: dict[str, list[float]]
    disturbed: int
    quiet: bool


def measure(
    arms: dict[str, Callable[[], object]], repetitions: int = 30, warm_up: int = 3, patience: float = 120.0
) -> Measurement:
    """Run all arms in turn, in rotating order, until `repetitions` were quiet or `patience` seconds have passed."""
    names = list(arms)
    if QUICK:
        repetitions, warm_up, patience = 2, 0, 0.0
    quiet, disturbed = [], []
    deadline = time.monotonic() + patience
    for repetition in itertools.count(-warm_up):
        shift, others = repetition % len(names), cpu_seconds_of_others()
        begin_all, times = time.perf_counter(), {}
        for name in names[shift:] + names[:shift]:
            begin = time.perf_counter()
            arms[name]()
            times[name] = 1e3 * (time.perf_counter() - begin)
        # The kernel counts in steps of 10 ms: two steps, or 5 % of the machine, are no disturbance.
        allowed = max(0.02, 0.05 * (os.cpu_count() or 1) * (time.perf_counter() - begin_all))
        if repetition >= 0:
            (quiet if cpu_seconds_of_others() - others <= allowed else disturbed).append(times)
        if len(quiet) >= repetitions or (time.monotonic() > deadline and len(quiet) + len(disturbed) >= repetitions):
            break
    enough = len(quiet) >= min(repetitions, 8)
    kept = quiet if enough else quiet + disturbed
    return Measurement({name: [times[name] for times in kept] for name in names}, len(disturbed), enough)


def net(times: Sequence[float], alone: Sequence[float]) -> list[float]:
    """Times without what `alone` measured in the same repetitions."""
    return [total - part for total, part in zip(times, alone, strict=True)]


def ratio(baseline: Sequence[float], ours: Sequence[float]) -> float:
    """How many times as long the baseline takes: median over paired repetitions."""
    return statistics.median(a / b for a, b in zip(baseline, ours, strict=True))


def over_fastest(times: dict[str, list[float]]) -> tuple[str, float]:
    """The fastest of all arms but "ours", by median, and how many times as long as ours it takes."""
    fastest = min((name for name in times if name != "ours"), key=lambda name: statistics.median(times[name]))
    return fastest, ratio(times[fastest], times["ours"])


def relative_errors(
    arms: dict[str, Callable[[], Sequence[torch.Tensor]]], truth: Sequence[torch.Tensor], tolerance: float = 0.0
) -> dict[str, float]:
    """Largest relative error (L2) of any of each arm's results; arms whose names begin with "ours" have to be right.

    Right is an error of at most twice the eager arms' own, or `tolerance`.
    """
    errors = {}
    for name, arm in arms.items():
        results = zip(arm(), truth, strict=True)
        errors[name] = max(((result.double() - true).norm() / true.norm()).item() for result, true in results)
    eager = max(error for name, error in errors.items() if name.startswith("eager"))
    wrong = [name for name in errors if name.startswith("ours") and not errors[name] <= max(2 * eager, tolerance)]
    assert not wrong, f"{wrong} is wrong, so its speed says nothing: {errors}"
    return errors


def settle(results: dict[str, dict]) -> bool:
    """Name the shapes that were never measured at rest, put medians in place of all times; whether there is none.

    results: figures by shape, of which "quiet" is a bool and "milliseconds" {phase: {arm: times}}.
    """
    restless = [name for name, figures in results.items() if not figures["quiet"]]
    print(f"disturbed throughout, so not to be judged: {'; '.join(restless) or 'none'}")
    for figures in results.values():
        figures["milliseconds"] = {
            phase: {name: statistics.median(t) for name, t in times.items()}
            for phase, times in figures["milliseconds"].items()
        }
    return not restless


def spread(times: Sequence[float]) -> str:
    """Median and quartiles, as `1.23 (1.20-1.31)`."""
    low, middle, high = statistics.quantiles(times, n=4)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def bandwidth(megabytes: int = 256) -> dict[str, float]:
    """GB/s of reading, and of reading and writing back in place, tensors that no cache holds: the best of several."""
    x = torch.ones(megabytes << 18)
    times = measure({"read": x.sum, "update": lambda: x.mul_(1.0)}, repetitions=15).times
    size = x.numel() * x.element_size() / 1e6
    return {"read": size / min(times["read"]), "update": 2 * size / min(times["update"])}


def peak_flops(dtype: torch.dtype = torch.float32) -> float:
    """GFLOP/s of the fastest dense product PyTorch has here: a matrix product, or a convolution, the best of several."""
    matrix = torch.ones(1024, 1024, dtype=dtype)
    image = torch.ones(8, 128, 28, 28, dtype=dtype).contiguous(memory_format=torch.channels_last)
    kernel = torch.ones(128, 128, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        times = measure(
            {"product": lambda: matrix @ matrix, "convolution": lambda: F.conv2d(image, kernel, padding=1)}, repetitions=30
        ).times
    return max(2 * 1024**3 / min(times["product"]), 2 * 9 * image.numel() * 128 / min(times["convolution"])) / 1e6


def peak_memory(function: Callable[[], object]) -> float:
    """Megabytes that a call of `function` has in use at most beyond what was in use before; Linux with glibc.

    Resident memory is measured, after what the allocator holds in reserve was given back: it counts every thread.
    """
    function()  # whatever is kept from a first call
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present level
    before = resident_megabytes("VmRSS")
    function()
    return resident_megabytes("VmHWM") - before


def resident_megabytes(field: str) -> float:
    """VmRSS or VmHWM, the present and the highest resident memory of this process."""
    return int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1]) / 1024


def table(rows: Sequence[Sequence[object]]) -> str:
    """Rows of cells, the first row the header, in aligned columns."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


def report(bench: str, results: dict[str, object]) -> Path:
    """Write bench/results/<bench>-<machine>-<date>.json, unless this is a quick run, and print its content as the last line."""
    line = {"bench": bench, "machine": machine(), **results}
    name = re.sub(r"[^a-z0-9]+", "-", f"{line['machine']['processor']} {os.cpu_count()} cores".lower()).strip("-")
    path = RESULTS / f"{bench}-{name}-{line['machine']['date']}.json"
    if not QUICK:
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(line, indent=1) + "\n")
    print(json.dumps(line), flush=True)
    return path
