"""Find the fastest block sizes of the Triton kernels on this GPU, once: `python -m odn_fast.tune`.

What is found is written to kernels/tuned/<gpu>.json and used from then on; without it every kernel has a default that
works anywhere. Typical calls of every op, forward and backward, are timed as CUDA graphs; kernel by kernel, each of the
kernel's candidates takes the place of its default, and the fastest that computes the same stays. The candidates are
compiled beforehand by as many processes as there are cores.
"""

import argparse
import contextlib
import datetime
import importlib
import itertools
import json
import os
import pkgutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from torch import Tensor

from odn_fast import ops
from odn_fast.engine.device import collecting_no_garbage
from odn_fast.ops._choose import CannotRun, using
from odn_fast.record import write_atomically

Call = Callable[[], Sequence[Tensor]]
PARTS = 4  # of a workload's candidates, compiled by different processes
WORTH = 0.99  # a candidate replaces the default if it takes at most this share of its time
# Of a relative difference (L2) of results: a few values on the other side of a ReLU's zero, in another order of summation.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 5e-2}


# ---- what is timed


@dataclass(frozen=True)
class Workload:
    """A call of an op at one shape. make: puts tensors on the GPU and returns the call, forward and backward."""

    op: str
    shape: tuple
    dtype: torch.dtype
    make: Callable[..., Call]

    def __str__(self):
        return f"{self.op} {str(self.dtype).removeprefix('torch.')} {self.shape}"

    def call(self, *implementation: str) -> Call:
        """implementation: as `using` takes it, Triton's by default."""
        torch.manual_seed(0)
        with torch.device("cuda"):
            step = self.make(self.dtype, *self.shape)

        def on_one():
            with using(*(implementation or ("triton",))):
                return step()

        return on_one


def _map(dtype, *shape):
    return torch.randn(shape).to(dtype, memory_format=torch.channels_last)


def _separable_parameters(c_in, c_out):
    dw, pw = torch.randn(c_in, 1, 3, 3) / 3, torch.randn(c_out, c_in, 1, 1) / c_in**0.5
    return [tensor.requires_grad_() for tensor in (dw, pw, 0.5 + torch.rand(c_out), torch.randn(c_out))]


def _step(function: Callable[[], Tensor], leaves: Iterable[Tensor]) -> Call:
    """Forward and backward, to the gradients of the leaves."""
    leaves, slope = list(leaves), torch.randn_like(function().detach())

    def step():
        y = function()
        return y, *torch.autograd.grad(y, leaves, slope)

    return step


def _separable_conv(dtype, batch, c_in, c_out, size, stride=1):
    x, parameters = _map(dtype, batch, c_in, size, size).requires_grad_(), _separable_parameters(c_in, c_out)
    return _step(lambda: ops.separable_conv_train(x, *parameters, stride=stride)[0], [x, *parameters])


def _separable_conv_infer(dtype, batch, c_in, c_out, size, stride=1):
    x, (dw, pw, _, bias) = _map(dtype, batch, c_in, size, size), _separable_parameters(c_in, c_out)
    dw, pw, bias = (tensor.detach() for tensor in (dw, pw, bias))
    return lambda: (ops.separable_conv_infer(x, dw, None, pw, bias, stride=stride),)


def _separable_unit(dtype, batch, channels, size):
    x = _map(dtype, batch, channels, size, size).requires_grad_()
    first, second = (_separable_parameters(channels, channels) for _ in range(2))
    return _step(lambda: ops.separable_unit_train(x, first, second, identity=True)[0], [x, *first, *second])


def _channel_attention(dtype, batch, c_student, c_teacher, size):
    student, teacher = (_map(dtype, batch, c, size, size).relu_() for c in (c_student, c_teacher))
    student.requires_grad_()
    return _step(lambda: ops.channel_attention(student, teacher), [student])


def _channel_attention_loss(dtype, batch, c_student, c_teacher, size):
    student, teacher = (_map(dtype, batch, c, size, size).relu_() for c in (c_student, c_teacher))
    student.requires_grad_()
    known = _step(lambda: ops.channel_attention_loss(student, teacher, statistics=ops.teacher_statistics(teacher)), [student])
    unknown = _step(lambda: ops.channel_attention_loss(student, teacher), [student])
    return lambda: (*known(), *unknown())


def _batch_norm_act(dtype, batch, channels, size, residual):
    x = _map(dtype, batch, channels, size, size).requires_grad_()
    weight, bias = (0.5 + torch.rand(channels)).requires_grad_(), torch.randn(channels).requires_grad_()
    added = [_map(dtype, batch, channels, size, size).requires_grad_()] if residual else []
    return _step(lambda: ops.batch_norm_act(x, weight, bias, *added)[0], [x, weight, bias, *added])


def _exit_heads(dtype, batch, classes, *shapes):
    features = [_map(dtype, batch, channels, size, size).requires_grad_() for channels, size in shapes]
    weights = [torch.randn(classes, channels).div_(channels**0.5).requires_grad_() for channels, _ in shapes]
    biases = [torch.randn(classes).requires_grad_() for _ in shapes]
    target = torch.randint(classes, (batch,))
    return _step(lambda: ops.exit_heads(features, weights, biases, target)[0], [*features, *weights, *biases])


def _augment(dtype, batch, channels, size):
    images, index = torch.randint(256, (50000, channels, size, size), dtype=torch.uint8), torch.randint(50000, (batch,))
    scale, shift = torch.rand(channels), torch.rand(channels)
    key = torch.tensor([1, 2])
    return lambda: (ops.augment(images, index, scale, shift, key, padding=4, flip=True, dtype=dtype),)


_SEPARABLE = [(128, 16, 16, 32), (128, 32, 32, 16), (128, 64, 64, 8), (128, 64, 64, 32), (128, 16, 32, 32, 2),
              (32, 128, 128, 28), (1, 32, 64, 112)]
_ATTENTION = [(128, 16, 16, 32), (128, 32, 32, 16), (128, 64, 64, 8), (128, 16, 64, 8), (32, 256, 512, 14)]
_RESNET = [(64, 28), (128, 14), (256, 7), (512, 4), (64, 32), (256, 32), (512, 16), (1024, 8), (2048, 4)]
_RESNET18 = [(64, 28)] * 2 + [(128, 14)] * 2 + [(256, 7)] * 2 + [(512, 4)] * 2
_SHAPES = [
    ("separable_conv", _separable_conv, _SEPARABLE),
    ("separable_conv", _separable_conv_infer, _SEPARABLE),
    ("separable_unit", _separable_unit, [(128, 16, 32), (128, 32, 16), (128, 64, 8)]),
    ("channel_attention", _channel_attention_loss, _ATTENTION),
    ("channel_attention", _channel_attention, _ATTENTION[:3]),
    ("batch_norm_act", _batch_norm_act, [(128, *shape, residual) for residual in (False, True) for shape in _RESNET]),
    ("exit_heads", _exit_heads, [(128, 10, *_RESNET18), *((128, 10, shape) for shape in sorted(set(_RESNET18)))]),
    ("augment", _augment, [(128, 1, 28), (128, 3, 32)]),
]
WORKLOADS = [
    Workload(op, shape, dtype, make)
    for dtype in (torch.bfloat16, torch.float32)
    for op, make, shapes in _SHAPES
    for shape in shapes
]


# ---- timing


def capture(function: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `calls` calls of `function` in a row, warmed up on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with collecting_no_garbage(), torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            function()
    graph.instantiate()
    return graph


def microseconds(call: Call, calls: int = 10, rounds: int = 9) -> float:
    """Of one call in a graph of several: the median of rounds, each long enough for the events' resolution."""
    graph = capture(call, calls)

    def replayed(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * begin.elapsed_time(end) / times / calls

    replayed(1)
    times = max(1, round(500 / calls / replayed(1)))
    return statistics.median(replayed(times) for _ in range(rounds))


# ---- choosing


def candidates_of_kernels() -> dict[str, Callable[[tuple], list[dict]]]:
    """CANDIDATES of all files of kernels, together."""
    from odn_fast import kernels

    names = [module.name for module in pkgutil.iter_modules(kernels.__path__) if not module.name.startswith("_")]
    files = [importlib.import_module(f"odn_fast.kernels.{name}") for name in names]
    return {kernel: choices for file in files for kernel, choices in getattr(file, "CANDIDATES", {}).items()}


@contextlib.contextmanager
def chosen(choices: dict[tuple, dict]) -> Iterator[None]:
    """Launch with choices, {(kernel, same): blocks}, inside the block."""
    from odn_fast.kernels import _tuned

    with contextlib.ExitStack() as stack:
        for (kernel, same), blocks in choices.items():
            stack.enter_context(_tuned.forced(kernel, blocks, same))
        yield


def asked(call: Call) -> dict[tuple, dict]:
    """{(kernel, dtype, same, size): default} of what `call` launches."""
    from odn_fast.kernels import _tuned

    with _tuned.asked() as keys:
        call()
    return dict(keys)


def alternatives(kernel: str, same: tuple, default: dict, candidates: dict) -> list[dict]:
    """The kernel's candidates, complete and without the default."""
    complete = [{**default, **choice} for choice in candidates[kernel](same)] if kernel in candidates else []
    return [choice for index, choice in enumerate(complete) if choice != default and choice not in complete[:index]]


def tune_call(
    call: Call,
    candidates: dict,
    clock: Callable[[Call], float],  # microseconds
    tolerance: float,
    known: dict[tuple, dict],
    in_time: Callable[[], bool] = lambda: True,
) -> tuple[dict[tuple, dict], float, list[str]]:
    """The fastest choice for every kernel of `call`, one kernel after the other.

    known: {(kernel, dtype, same, size): entry} that was found before, which is kept. Nothing more is tried once in_time()
    is false.

    Returns what was found, as `known`, an entry being the blocks and the microseconds of the call with them; the share of
    its first time that the call takes at last; and what was refused: candidates that do not compile, do not fit the GPU,
    or compute something else.
    """
    keys = asked(call)
    choices: dict[tuple, dict] = {}  # by what can be forced: kernel and `same`
    for key, default in keys.items():
        choices.setdefault((key[0], key[2]), known[key]["blocks"] if key in known else default)
    settled = {(key[0], key[2]) for key in keys if key in known}
    with chosen(choices):
        expected = [tensor.clone() for tensor in call()]
        first = best = clock(call)
    found, refused = {}, []
    for key, default in keys.items():
        slot = kernel, same = key[0], key[2]
        for choice in [] if slot in settled else alternatives(kernel, same, default, candidates):
            if not in_time():
                return found, best / first, refused
            with chosen(choices | {slot: choice}):
                reason = why_refused(call, expected, tolerance)
                if reason:
                    refused.append(f"{kernel} {same} {choice}: {reason}")
                    continue
                time_of_choice = clock(call)
            if time_of_choice < best * WORTH:
                best, choices[slot] = time_of_choice, choice
        settled.add(slot)
        if key not in known:
            found[key] = {"blocks": choices[slot], "microseconds": float(f"{best:.4g}")}
    return found, best / first, refused


def why_refused(call: Call, expected: Sequence[Tensor], tolerance: float) -> str:
    from triton.errors import TritonError

    try:
        results = call()
    except TritonError as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
    for result, right in zip(results, expected, strict=True):
        difference = (result.float() - right.float()).norm()
        if not difference <= tolerance * right.float().norm() + 1e-6:
            return f"its result differs by {(difference / right.float().norm()).item():.1e}"
    return ""


# ---- compiling beforehand


def compile_candidates(index: int, part: int, until: float) -> None:
    """Run one workload with a part of its kernels' candidates, which leaves them in Triton's cache on disk.

    No more is begun when time.monotonic(), the same in all processes, is `until`.
    """
    from triton.errors import TritonError

    call = WORKLOADS[index].call()
    try:
        keys, candidates = asked(call), candidates_of_kernels()
    except CannotRun:
        return  # said where it is timed
    for (kernel, _, same, _), default in keys.items():
        for choice in alternatives(kernel, same, default, candidates)[part::PARTS]:
            if time.monotonic() > until:
                return
            with contextlib.suppress(TritonError), chosen({(kernel, same): choice}):
                call()
    torch.cuda.synchronize()


def compile_all(indices: Sequence[int], until: float) -> None:
    """compile_candidates of these workloads in parallel, until time.monotonic() is `until`."""
    begin = time.monotonic()
    # First parts first: they leave the defaults behind. What takes longest before others, lest it be alone at the end.
    ordered = sorted(itertools.product(range(PARTS), indices), key=lambda job: (job[0], WORKLOADS[job[1]].op != "channel_attention"))
    with ProcessPoolExecutor(os.cpu_count() or 1, mp_context=get_context("spawn")) as pool:
        jobs = {pool.submit(compile_candidates, index, part, until): index for part, index in ordered}
        for count, job in enumerate(as_completed(jobs), 1):
            if job.exception() is not None:
                print(f"{WORKLOADS[jobs[job]]}: {job.exception()}", file=sys.stderr)
            if count % 40 == 0 or count == len(jobs):
                print(f"compiled {count} of {len(jobs)} parts, {time.monotonic() - begin:.0f} s", flush=True)


# ---- the table


def write_table(gpu: str, found: dict[tuple, dict], kernels: Iterable[str], versions: dict[str, str]) -> str:
    """Put what was found into the table of `gpu`, in place of what it has for the same, and return its path.

    found: as `tune_call` returns it; kernels: all there are, of others nothing is kept.
    """
    from odn_fast.kernels import _tuned

    path = _tuned.path_of(gpu)
    _tuned.forget()
    with contextlib.suppress(ValueError):  # a file that cannot be read is written anew
        before = {
            (kernel, entry["dtype"], tuple(entry["same"]), entry["size"]): entry
            for kernel, entries in _tuned.table(gpu).items()
            for entry in entries
        }
        found = {key: entry for key, entry in before.items() if key[0] in kernels} | found
    ordered = sorted(found.items(), key=lambda item: (item[0][:2], [f"{x:>9}" for x in map(str, item[0][2])], item[0][3]))
    lines = []
    for kernel, entries in itertools.groupby(ordered, key=lambda item: item[0][0]):
        rows = [
            {"dtype": key[1], "same": list(key[2]), "size": key[3], "blocks": entry["blocks"], "microseconds": entry["microseconds"]}
            for key, entry in entries
        ]
        lines.append(f"  {json.dumps(kernel)}: [\n" + ",\n".join(f"   {json.dumps(row)}" for row in rows) + "\n  ]")
    head = {"gpu": gpu, "date": datetime.date.today().isoformat(), "versions": versions}
    text = "{\n" + "".join(f' "{name}": {json.dumps(value)},\n' for name, value in head.items())
    text += ' "kernels": {\n' + ",\n".join(lines) + "\n }\n}\n"
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, text.encode())
    _tuned.forget()
    return str(path)


def why_not() -> str:
    """Why nothing can be tuned here, "" if it can."""
    if not torch.cuda.is_available():
        return f"PyTorch sees no CUDA device (built for {torch.version.cuda or 'the CPU'})"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed; get it with: pip install triton"
    return ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m odn_fast.tune", description=__doc__.split("\n\n")[0])
    names = sorted({workload.op for workload in WORKLOADS})
    parser.add_argument("--op", action="append", choices=names, help="tune this op alone; may be given again (default: all)")
    parser.add_argument("--minutes", type=float, default=10.0, help="stop then, keeping what was found (default: %(default)g)")
    parsed = parser.parse_args(arguments)
    if why_not():
        print(f"tune: {why_not()}", file=sys.stderr)
        return 2
    begin = time.monotonic()
    end = begin + 60 * parsed.minutes
    indices = [index for index, workload in enumerate(WORKLOADS) if workload.op in (parsed.op or names)]
    gpu = torch.cuda.get_device_name()
    print(f"{gpu}: {len(indices)} calls to tune in at most {parsed.minutes:g} minutes", flush=True)
    compile_all(indices, begin + 0.6 * (end - begin))

    import triton

    candidates, found, gains = candidates_of_kernels(), {}, []
    for count, index in enumerate(indices, 1):
        workload, left = WORKLOADS[index], end - time.monotonic()
        if left < 0:
            print(f"tune: out of time after {count - 1} of {len(indices)} calls; the others keep what they had", file=sys.stderr)
            break
        try:
            more, gain, refused = tune_call(workload.call(), candidates, microseconds, TOLERANCE[workload.dtype], found,
                                            lambda: time.monotonic() < end)
        except CannotRun as reason:
            print(f"{workload}: not tuned: {reason}", file=sys.stderr)
            continue
        found |= more
        gains.append(gain)
        said = f", {len(refused)} candidates refused" if refused else ""
        print(f"{count} of {len(indices)}, {left / 60:.1f} minutes left: {workload}: {gain:.2f} of its time{said}", flush=True)
        for reason in refused:
            print(f"  {reason}", file=sys.stderr)
        torch.cuda.empty_cache()
    if not found:
        print("tune: nothing was found", file=sys.stderr)
        return 1
    versions = {"torch": str(torch.__version__), "triton": triton.__version__, "cuda": str(torch.version.cuda)}
    try:
        path = write_table(gpu, found, candidates, versions)
    except OSError as error:
        print(f"tune: the table cannot be written: {error}", file=sys.stderr)
        return 1
    print(f"{len(found)} entries written to {path} in {time.monotonic() - begin:.0f} s; "
          f"calls take {statistics.geometric_mean(gains):.2f} of their time with the defaults")
    return 0


if __name__ == "__main__":
    sys.exit(main())
