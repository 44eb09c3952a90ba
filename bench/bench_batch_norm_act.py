"""Training batch norm, residual and ReLU at the shapes of ResNet-18 on 28x28 images, batch 128, channels_last.

    pytest bench/bench_batch_norm_act.py -s             # -m gpu, or -m "not gpu", for one device alone

Baselines are eager PyTorch, F.batch_norm with the addition and the ReLU in place, and torch.compile of the same
(inductor, one graph per shape), which is so much slower that it is measured with ours alone, not to keep eager's
repetitions apart. A step is forward and backward to the gradients of x, weight, bias and residual; backward is also
timed by itself, from one forward pass, which a compiled graph does not allow. The mean and the variance for running
statistics are outputs of ours; neither baseline is asked for them.

The floor is memory traffic at the measured bandwidth: batch norm reads x for its statistics and again to normalise it,
backward reads the gradient and x for two sums and again for the gradient of x. With a residual, y is read for the
ReLU's mask, and the masked gradient, which is the residual's, is written at the first reading in place of being made
twice. Maps that stay in a cache can beat it.

In float32 with a residual there is least to win: eager's backward sweeps eight maps, one of them just written, where
this sweeps seven. At 512 channels of 4x4 eager was 4 to 7 % faster in two runs on a machine with other work.

Before anything is timed, each arm's results and gradients are compared with float64; the upstream gradient is zero
where rounding decides on which side of the ReLU's jump a value falls.

On a GPU (harness_cuda) the widths of ResNet-50 on 32x32 images come in as well, PyTorch has NCHW for one more arm,
bfloat16 is judged, and float32 is measured without torch.compile.
"""

import functools
import statistics
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import harness
import harness_cuda
from odn_fast.ops import batch_norm_act

ARMS = ("ours", "eager", "compiled")
PHASES = {"eager": ("forward", "backward", "step"), "compiled": ("forward", "step")}
REACH_CUDA = [harness_cuda.Reach("step", "compiled", 1.2), harness_cuda.Reach("step", "floor", 0.6)]
BATCH = 128


@dataclass(frozen=True)
class Shape:
    channels: int
    size: int
    residual: bool

    def __str__(self):
        return f"{self.channels}, {self.size}x{self.size}{' + residual' if self.residual else ''}"

    def floors(self, element_size, bandwidth):
        """Milliseconds of each phase at `bandwidth` in GB/s."""
        return {
            phase: 1e-6 * count * element_size / max(bandwidth.values()) for phase, count in self.elements().items()
        }

    def elements(self):
        """Elements of maps that each phase reads or writes at least."""
        forward, backward = (4, 7) if self.residual else (3, 5)
        passes = {"forward": forward, "backward": backward, "step": forward + backward}
        return {phase: count * BATCH * self.channels * self.size**2 for phase, count in passes.items()}


SHAPES = [
    Shape(channels, size, residual)
    for residual in (False, True)
    for channels, size in ((64, 28), (128, 14), (256, 7), (512, 4))
]
SHAPES_CUDA = [
    *SHAPES,
    Shape(64, 32, False),
    *(Shape(channels, size, True) for channels, size in ((256, 32), (512, 16), (1024, 8), (2048, 4))),
]


def fused(x, weight, bias, residual):
    return batch_norm_act(x, weight, bias, residual)[0]


def plain(x, weight, bias, residual):
    y = F.batch_norm(x, None, None, weight, bias, training=True)
    if residual is not None:
        y += residual
    return y.relu_()


class Workload:
    """One shape's tensors, the same values for all arms."""

    def __init__(self, shape, dtype):
        torch.manual_seed(0)
        x, residual, self.grad_y = (
            torch.randn(BATCH, shape.channels, shape.size, shape.size)
            .to(dtype)
            .contiguous(memory_format=torch.channels_last)
            for _ in range(3)
        )
        self.inputs = [x, 0.5 + torch.rand(shape.channels), torch.randn(shape.channels) / 2]
        self.inputs.append(residual if shape.residual else None)
        self.grad_y[self.near_zero()] = 0

    def near_zero(self):
        """Where rounding may decide on which side of the ReLU's jump a value falls: no two arms agree there."""
        x, weight, bias, residual = (None if t is None else t.double() for t in self.inputs)
        u = F.batch_norm(x, None, None, weight, bias, training=True)
        if residual is not None:
            u += residual
        return u.abs() < u.abs().max() * {torch.float32: 1e-4, torch.bfloat16: 0.03}[self.inputs[0].dtype]

    def arm(self, function, dtype=None, memory_format=torch.channels_last):
        """{phase: function} of one arm, in its memory format."""

        def own(tensor):
            layout = {"memory_format": memory_format} if tensor.dim() == 4 else {}
            return tensor.to(dtype or tensor.dtype, **layout, copy=True)

        inputs = [None if t is None else own(t).requires_grad_() for t in self.inputs]
        leaves = [tensor for tensor in inputs if tensor is not None]
        grad_y = own(self.grad_y)

        def step():
            y = function(*inputs)
            return y, *torch.autograd.grad(y, leaves, grad_y)

        kept = functools.cache(lambda: function(*inputs))
        return {
            "forward": lambda: function(*inputs),
            "backward": lambda: torch.autograd.grad(kept(), leaves, grad_y, retain_graph=True),
            "step": step,
        }


def bench(shape, dtype, bandwidth, repetitions, patience):
    """Figures of one shape."""
    torch._dynamo.reset()
    work = Workload(shape, dtype)
    functions = dict(zip(ARMS, (fused, plain, torch.compile(plain, dynamic=False)), strict=True))
    arms = {name: work.arm(function) for name, function in functions.items()}
    truth = work.arm(plain, torch.float64)["step"]()
    errors = harness.relative_errors({name: arm["step"] for name, arm in arms.items()}, truth)
    times, ratios = ({phase: {} for phase in PHASES["eager"]} for _ in range(2))
    disturbed, quiet = 0, True
    for name in ("compiled", "eager"):
        measured = harness.measure(
            {f"{arm} {phase}": arms[arm][phase] for arm in ("ours", name) for phase in PHASES[name]},
            repetitions,
            patience=patience,
        )
        for phase in PHASES[name]:
            times[phase] |= {arm: measured.times[f"{arm} {phase}"] for arm in ("ours", name)}
            ratios[phase][name] = harness.ratio(times[phase][name], times[phase]["ours"])
        disturbed, quiet = disturbed + measured.disturbed, quiet and measured.quiet
    return {
        "milliseconds": times,
        "floor_ms": shape.floors(work.grad_y.element_size(), bandwidth),
        "over": ratios,
        "peak_MB": {name: harness.peak_memory(arm["step"]) for name, arm in arms.items()},
        "relative_error": errors,
        "disturbed": disturbed,
        "quiet": quiet,
    }


def rows_of(shape, figures):
    for phase, times in figures["milliseconds"].items():
        share = figures["floor_ms"][phase] / statistics.median(times["ours"])
        spreads = (harness.spread(times[name]) if name in times else "" for name in ARMS)
        ratios = (f"{figures['over'][phase][name]:.2f}" if name in times else "" for name in ARMS[1:])
        memory = " ".join(f"{peak:.1f}" for peak in figures["peak_MB"].values()) if phase == "step" else ""
        yield shape, phase, *spreads, *ratios, f"{share:.0%}", memory


def run(dtype, repetitions=20, patience=8.0):
    """Measure all shapes, print the table and the verdicts, write the report."""
    harness.prepare(threads=2)
    bandwidth = harness.bandwidth()
    results = {str(shape): bench(shape, dtype, bandwidth, repetitions, patience) for shape in SHAPES}
    print(f"\n{harness.machine()}\nbatch_norm_act, {dtype}, batch {BATCH}, milliseconds; peak MB in the order of the arms")
    print(f"bandwidth read {bandwidth['read']:.1f}, update {bandwidth['update']:.1f} GB/s")
    header = ("channels, size", "phase", *ARMS, *(f"over {name}" for name in ARMS[1:]), "of floor", "peak MB")
    print(harness.table([header, *(row for shape, figures in results.items() for row in rows_of(shape, figures))]))

    means, worst = {}, {}
    for name, phases in PHASES.items():
        for phase in phases:
            ratios = [figures["over"][phase][name] for figures in results.values()]
            means[f"{phase} over {name}"] = statistics.geometric_mean(ratios)
            worst[f"{phase} over {name}"] = min(ratios)
    for name, mean in means.items():
        print(f"{name}: geometric mean {mean:.2f}, worst {worst[name]:.2f}")
    beaten = worst["step over eager"] >= 1.0
    print(f"a step beats eager at every shape: {'yes' if beaten else 'NO'}")
    harness.report(
        f"batch_norm_act_{str(dtype).removeprefix('torch.')}",
        {"quiet": harness.settle(results), "bandwidth_GB_s": bandwidth, "geometric_mean": means, "worst": worst, "shapes": results},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bench_batch_norm_act(dtype):
    run(dtype)


def cuda_case(shape, dtype):
    """One shape on the GPU, where a backward pass of a forward pass outside its graph cannot be captured."""
    with torch.device("cuda"):
        work = Workload(shape, dtype)

    def arm(function, *settings):
        return {phase: function for phase, function in work.arm(function, *settings).items() if phase != "backward"}

    arms = {"eager NCHW": arm(plain, None, torch.contiguous_format), "eager channels_last": arm(plain)}
    if dtype == torch.bfloat16:
        torch._dynamo.reset()
        arms["compiled"] = arm(torch.compile(plain, dynamic=False))
    return harness_cuda.Case(
        str(shape),
        harness_cuda.ours("batch_norm_act", arm(fused)) | arms,
        {"step": arm(plain, torch.float64)["step"]},
        {phase: count * work.grad_y.element_size() for phase, count in shape.elements().items()},
    )


def cuda_cases(dtype):
    return [functools.partial(cuda_case, shape, dtype) for shape in SHAPES_CUDA]


@harness_cuda.needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_bench_batch_norm_act_cuda(dtype):
    harness_cuda.run("batch_norm_act", dtype, cuda_cases(dtype), REACH_CUDA if dtype == torch.bfloat16 else [])
