"""What every bench shares on a GPU: the machine line, timing of captured calls, floors, one way to run a case, the report.

    run("separable_conv", torch.bfloat16, cases, reach)

A figure is microseconds of one call, from a CUDA graph of `CALLS` calls in a row that is replayed between two events: the
median of rounds in which every arm's graph is replayed in turn, in rotating order. So neither Python nor the driver is in
it, as in a training step that is captured whole; "wall" is what a call takes without a graph. A ratio is the median of the
ratios within rounds.

Each call follows a call on the same tensors, and each arm's timed replays follow an untimed one: what fits into the L2
cache is read from there, as in a network, whose maps come from the kernel before. The byte floor is at the bandwidth of a
copy in memory, so small maps can beat it. The launch floor is ours to lower: our own number of graph nodes times what an
empty one takes.

PyTorch's arms have cudnn.benchmark on, and TF32 in float32 convolutions, which is its default.
"""

import ctypes
import datetime
import functools
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import harness
import results_file
from odn_fast.machine import processor_name
from odn_fast.ops._choose import CannotRun, implemented, using
from odn_fast.tune import capture

TRITON_ONLY = "ODN_FAST_BENCH_TRITON_ONLY" in os.environ  # not a single call of CUDA's own kernels, which failed their tests, say
CALLS = 20
ROUNDS = 15
MILLISECONDS = 1.0  # of replays, per arm and round


def needs_gpu(test):
    """Marks a bench that runs on a GPU only."""
    reason = "needs a CUDA device, and PyTorch sees none"
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason=reason)(test))


@dataclass
class Case:
    """One shape of a bench.

    arms: {arm: {phase: function}}, functions returning tensors; names begin with "ours", "eager" or "compiled".
    truth: {phase: function} with the results in float64, of the phases that are checked; tolerance: of a phase's
    relative error, where twice eager's own does not do. traffic: {phase: bytes that must be moved at least}.
    """

    name: str
    arms: dict[str, dict[str, Callable[[], object]]]
    truth: dict[str, Callable[[], Sequence[torch.Tensor]]]
    traffic: dict[str, float]
    tolerance: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Reach:
    """Ours shall be `factor` times as fast as `over` ("fastest", "eager" or "compiled"), or, with "floor", reach that
    share of the floor: geometric mean over the cases, in this phase."""

    phase: str
    over: str
    factor: float


# ---- the machine


def machine() -> dict[str, str]:
    """The line that belongs to every figure."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver(),
        "cuda": str(torch.version.cuda),
        "torch": str(torch.__version__),
        "triton": triton_version,
        "python": platform.python_version(),
        "processor": processor_name(),
        "date": datetime.date.today().isoformat(),
    }


@functools.cache
def driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip().split("\n")[0] or "unknown"


@functools.cache
def ceilings() -> dict[str, float]:
    """What this GPU does at best once it is warm: copies (`copied`), a product, launches of almost nothing.

    The first process that asks measures it for the day's results file; whichever asks, the GPU is warm then.
    """
    left, right = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    begin = time.perf_counter()
    while time.perf_counter() < begin + 1:  # clocks of memory, too, rise only under load
        left.copy_(right)
        (left @ right).sum().item()
    file = results_file.path_of(torch.cuda.get_device_name())
    if known := results_file.entry(file, "ceilings", "warm"):
        return known
    multiplied = statistics.median(measure({"product": lambda: left @ right}, calls=1)[0]["product"])
    one = torch.zeros(1, device="cuda")
    node = statistics.median(measure({"launch": lambda: one.add_(1.0)}, calls=500)[0]["launch"])
    measured = {
        "copy_GB_s": max(copied(bytes) for bytes in (1 << 29, 1 << 31) for _ in range(3)),
        "bf16_product_TFLOP_s": 2 * 8192**3 / multiplied / 1e6,
        "graph_node_us": node,
        "eager_launch_us": wall(lambda: one.add_(1.0), calls=1000),
    }
    results_file.put(file, "ceilings", "warm", measured)
    return measured


def copied(bytes: int) -> float:
    """GB a second, read and written, of the fastest of several ways to copy this much; many times the L2 cache."""
    source = torch.randn(bytes // 4, device="cuda")
    target = torch.empty_like(source)
    halves = source.view(torch.bfloat16), target.view(torch.bfloat16)
    arms = {
        "copy_": lambda: target.copy_(source),  # a copy of the driver's
        "add": lambda: torch.add(source, 1.0, out=target),
        "neg": lambda: torch.neg(source, out=target),
        "neg, bfloat16": lambda: torch.neg(halves[0], out=halves[1]),
    }
    times, _ = measure(arms, calls=1)
    return 2 * bytes / min(statistics.median(each) for each in times.values()) / 1e3


# ---- timing


def nodes(graph: torch.cuda.CUDAGraph) -> int:
    """Kernels, copies and fills in a captured graph."""
    count = ctypes.c_size_t()
    raw = ctypes.c_void_p(graph.raw_cuda_graph())
    status = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(raw, None, ctypes.byref(count))
    if status:
        raise RuntimeError(f"cuGraphGetNodes returned {status}")
    return count.value


def measure(
    arms: dict[str, Callable[[], object]], rounds: int = ROUNDS, calls: int = CALLS
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Microseconds per call of every arm in every round, and every arm's graph nodes per call."""
    graphs = {name: capture(function, calls) for name, function in arms.items()}
    names, replays = list(graphs), dict.fromkeys(graphs, 1)

    def run_round(shift):
        events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in names}
        for name in names[shift:] + names[:shift]:
            graphs[name].replay()
            events[name][0].record()
            for _ in range(replays[name]):
                graphs[name].replay()
            events[name][1].record()
        torch.cuda.synchronize()
        return {name: 1e3 * begin.elapsed_time(end) / replays[name] for name, (begin, end) in events.items()}

    run_round(0)
    replays = {name: max(1, round(1e3 * MILLISECONDS / each)) for name, each in run_round(0).items()}
    each_round = [run_round(index % len(names)) for index in range(rounds)]
    times = {name: [times[name] / calls for times in each_round] for name in names}
    return times, {name: round(nodes(graph) / calls) for name, graph in graphs.items()}


def wall(function: Callable[[], object], calls: int = 20) -> float:
    """Microseconds per call without a graph, launches and all: the median of several runs of `calls`."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - begin) / calls)
    return statistics.median(times)


def seconds(function: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def peak_memory(function: Callable[[], object]) -> float:
    """Megabytes that a call has allocated at most, beyond what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


# ---- a case, a bench


def ours(stem: str, arm: dict[str, Callable[[], object]]) -> dict[str, dict[str, Callable[[], object]]]:
    """The arm "ours" as the chooser has it, and one forced to each implementation, where there are several.

    Forced to "cuda" are those of the stem's ops that have such kernels at all. Raises CannotRun if the reference is all
    that a phase could run on: its speed would say nothing.
    """
    in_cuda = [op for op in implemented("cuda") if op.startswith(stem) and not TRITON_ONLY]
    forced = {"triton": {phase: lambda f=f: within(f, "triton") for phase, f in arm.items()}}
    if in_cuda:
        forced["cuda"] = {phase: lambda f=f: within(f, "cuda", *in_cuda) for phase, f in arm.items()}
    able = {name: {phase: f for phase, f in phases.items() if can_run(f)} for name, phases in forced.items()}
    for phase in arm:
        if not any(phase in phases for phases in able.values()):
            raise CannotRun(f"neither a CUDA nor a Triton kernel takes the phase {phase}")
    several = [phase for phase in arm if len(able) > 1 and all(phase in phases for phases in able.values())]
    arms = {"ours": arm}
    for name in able:
        if several:
            arms[f"ours, {name}"] = {phase: able[name][phase] for phase in several}
    return arms


def within(function: Callable[[], object], *implementation: str) -> object:
    with using(*implementation):
        return function()


def can_run(function: Callable[[], object]) -> bool:
    try:
        function()
    except CannotRun:
        return False
    return True


def measure_case(case: Case, limits: dict[str, float]) -> dict[str, object]:
    """All figures of one case, after its results were found right."""
    first = {
        name: {phase: seconds(function) for phase, function in arm.items()}
        for name, arm in case.arms.items()
        if name.startswith("compiled")
    }
    errors = {
        phase: harness.relative_errors(arms_with(case, phase), truth(), case.tolerance.get(phase, 0.0))
        for phase, truth in case.truth.items()
    }
    figures = {
        "first_call_s": first,
        "relative_error": errors,
        "microseconds": {},
        "quartiles_us": {},
        "over": {},
        "fastest": {},
        "launches": {},
        "floor_us": {},
        "share_of_floor": {},
        "wall_us": {},
        "peak_MB": {},
    }
    for phase in case.arms["ours"]:
        arms = arms_with(case, phase)
        times, launches = measure(arms)
        medians = {name: statistics.median(t) for name, t in times.items()}
        figures["microseconds"][phase] = medians
        figures["quartiles_us"][phase] = {name: statistics.quantiles(t, n=4)[::2] for name, t in times.items()}
        figures["launches"][phase] = launches
        figures["wall_us"][phase] = {name: wall(function) for name, function in arms.items()}
        figures["peak_MB"][phase] = {name: peak_memory(function) for name, function in arms.items()}
        baselines = {"fastest": ("eager", "compiled"), "eager": ("eager",), "compiled": ("compiled",)}
        figures["over"][phase] = {}
        for over, kinds in baselines.items():
            among = [name for name in medians if name.startswith(kinds)]
            if among:
                best = min(among, key=medians.get)
                figures["over"][phase][over] = harness.ratio(times[best], times["ours"])
                if over == "fastest":
                    figures["fastest"][phase] = best
        floor = {
            "bytes": case.traffic[phase] / limits["copy_GB_s"] / 1e3,
            "launches": launches["ours"] * limits["graph_node_us"],
        }
        figures["floor_us"][phase] = floor
        figures["share_of_floor"][phase] = sum(floor.values()) / medians["ours"]
    return figures


def arms_with(case: Case, phase: str) -> dict[str, Callable[[], object]]:
    return {name: arm[phase] for name, arm in case.arms.items() if phase in arm}


def run(bench: str, dtype: torch.dtype, cases: Iterable[functools.partial], reach: Sequence[Reach] = ()) -> None:
    """Measure all cases, print the table and the verdicts, write the report, which after every case holds those before it.

    cases: partial functions of a shape that make a case, whose tensors are given up before the next is made. Cases whose
    results are wrong, or that fail otherwise, have no figures and fail the bench after the report.
    """
    torch.backends.cudnn.benchmark = True
    precision = str(dtype).removeprefix("torch.")
    limits, results, failures, name = ceilings(), {}, [], f"{bench}_{precision}"
    for make in cases:
        try:
            case = make()
            results[case.name] = measure_case(case, limits)
        except Exception as failure:  # the other cases are measured all the same
            failures.append(f"{make.args[0]}: {type(failure).__name__}: {failure}")
        case = None
        enter(name, {"ceilings": limits, "verdicts": verdicts(results, reach), "failures": failures, "cases": results})
        if not in_order():
            failures.append(f"what would follow {make.args[0]} is not measured: CUDA does not work any more in this process")
            break
        torch.cuda.empty_cache()
    print(f"\n{machine()}\n{bench}, {precision}, microseconds a call in a graph; {rounded(limits)}")
    print(harness.table([HEADER, *(row for shape, figures in results.items() for row in rows_of(shape, figures))]))
    judged = verdicts(results, reach)
    for key, each in judged.items():
        met = "met" if each["met"] else "MISSED"
        print(f"{key}: {each['geometric_mean']:.2f}, worst {each['worst']:.2f}, reach {each['reach']}: {met}")
    report(name, {"ceilings": limits, "verdicts": judged, "failures": failures, "cases": results})
    assert not failures, "\n".join(failures)


def in_order() -> bool:
    """Whether CUDA still works in this process, as it does not after an illegal address."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def verdicts(results: dict[str, dict], reach: Sequence[Reach]) -> dict[str, dict]:
    found = {}
    for goal in reach:
        values = list(shares_or_ratios(results, goal))
        if values:
            mean = statistics.geometric_mean(values)
            key = f"{goal.phase}, {'share of floor' if goal.over == 'floor' else f'over {goal.over}'}"
            found[key] = {"geometric_mean": mean, "worst": min(values), "reach": goal.factor, "met": mean >= goal.factor}
    return found


def shares_or_ratios(results: dict[str, dict], goal: Reach) -> Iterable[float]:
    for figures in results.values():
        if goal.over == "floor" and goal.phase in figures["share_of_floor"]:
            yield figures["share_of_floor"][goal.phase]
        elif goal.over in figures["over"].get(goal.phase, ()):
            yield figures["over"][goal.phase][goal.over]


HEADER = ("case", "phase", "ours", "over fastest", "fastest", "over eager", "over compiled", "launches", "byte + launch floor",
          "of floor", "wall ours", "wall fastest", "peak MB ours", "fastest", "other arms of ours")


def rows_of(name: str, figures: dict) -> Iterable[tuple]:
    for phase, times in figures["microseconds"].items():
        fastest, over = figures["fastest"].get(phase), figures["over"][phase]
        floor, walls, peaks = figures["floor_us"][phase], figures["wall_us"][phase], figures["peak_MB"][phase]
        others = "; ".join(f"{arm[6:]} {times[arm]:.2f}" for arm in times if arm.startswith("ours, "))
        best = (f"{times[fastest]:.2f} {fastest}", f"{walls[fastest]:.0f}", f"{peaks[fastest]:.1f}") if fastest else ("", "", "")
        ratios = [f"{over[kind]:.2f}" if kind in over else "" for kind in ("fastest", "eager", "compiled")]
        yield (name, phase, f"{times['ours']:.2f}", ratios[0], best[0], *ratios[1:], figures["launches"][phase]["ours"],
               f"{floor['bytes']:.2f} + {floor['launches']:.2f}", f"{figures['share_of_floor'][phase]:.0%}",
               f"{walls['ours']:.0f}", best[1], f"{peaks['ours']:.1f}", best[2], others)


def report(bench: str, figures: dict[str, object]) -> None:
    """Put one bench's figures into the file of this GPU and day, beside those of the others, and name it."""
    print(f"{bench}: written to {enter(bench, figures)}", flush=True)


def enter(bench: str, figures: dict[str, object]) -> Path:
    path = results_file.path_of(torch.cuda.get_device_name())
    results_file.put(path, "benches", bench, rounded(figures), machine=machine())
    return path


def rounded(value: object) -> object:
    """Floats to four digits, at any depth."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
