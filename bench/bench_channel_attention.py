"""Channel attention loss: forward, backward and a full step at the shapes of a ResNet-56 teacher and a wide one.

    pytest bench/bench_channel_attention.py -s          # -m gpu, or -m "not gpu", for one device alone

A step is the loss and the student's gradient. Baselines are PyTorch's own functions on NCHW and on channels_last maps,
and torch.compile (inductor) of the same on channels_last; ours is on channels_last, with and without the teacher's
statistics. Ours writes the gradient in the forward call, so its backward is all but empty: compare steps. "forward" is
a call without a gradient, "backward" what a step takes beyond the forward call that prepares it. Loss and gradient of
every arm are compared with float64 before anything is timed.

The floor is the larger of two: two products of the maps (of the four that PyTorch takes; a cached Gram matrix spares the
others) at the fastest measured rate, and reading both maps and writing the gradient once at the measured bandwidth.

On a GPU (harness_cuda) bfloat16 is judged, and float32 is measured without torch.compile.
"""

import functools
import math
import statistics

import pytest
import torch
import torch.nn.functional as F

import harness
import harness_cuda
from odn_fast.ops import channel_attention_loss, teacher_statistics

SHAPES = [(128, 16, 16, 32), (128, 32, 32, 16), (128, 64, 64, 8), (128, 16, 64, 8), (32, 256, 512, 14)]  # N, C_s, C_t, H = W
BASELINES = ("eager nchw", "eager channels_last", "compiled")
REACH = {"fastest": 2.2, "eager": 3.0, "fastest, cached": 3.5}  # geometric means of steps
REACH_CUDA = [harness_cuda.Reach("step", "fastest", 5.0), harness_cuda.Reach("step", "floor", 0.6)]


def unfused(student, teacher):
    """What a training script writes."""
    q, k = student.flatten(2).float(), teacher.flatten(2).float()
    query, key = ((x - x.mean(2, keepdim=True)) / (x.std(2, correction=0, keepdim=True) + 1e-3) for x in (q, k))
    weights = torch.softmax(query @ key.transpose(1, 2) / math.sqrt(q.shape[2]), 2)
    return F.mse_loss(weights @ k, q)


class Workload:
    """Maps as after a ReLU, in both layouts, and every arm's loss."""

    def __init__(self, shape, dtype):
        torch.manual_seed(0)
        torch._dynamo.reset()
        batch, student_channels, teacher_channels, size = self.shape = shape
        maps = [torch.randn(batch, c, size, size).relu_().to(dtype) for c in (student_channels, teacher_channels)]
        channels_last = [x.contiguous(memory_format=torch.channels_last) for x in maps]
        known = teacher_statistics(channels_last[1])
        compiled = torch.compile(unfused, dynamic=False)
        functions = {
            "eager nchw": (unfused, maps),
            "eager channels_last": (unfused, channels_last),
            "compiled": (compiled, channels_last),
            "ours": (channel_attention_loss, channels_last),
            "ours, cached": (lambda q, k: channel_attention_loss(q, k, statistics=known), channels_last),
        }
        self.maps = maps
        self.losses = {name: self.loss(*arm) for name, arm in functions.items()}

    def loss(self, function, maps):
        student, teacher = maps[0].detach().requires_grad_(), maps[1]
        return student, lambda: function(student, teacher)

    def step(self, name):
        student, loss = self.losses[name]
        return torch.autograd.grad(loss(), student)[0]

    def forward(self, name):
        with torch.no_grad():
            return self.losses[name][1]()

    def prepare(self, name):
        """The forward call of a step."""
        return self.losses[name][1]()

    def truth(self):
        """Loss and gradient in float64."""
        student, teacher = (x.double() for x in self.maps)
        student.requires_grad_()
        q, k = student.flatten(2), teacher.flatten(2)
        query, key = ((x - x.mean(2, keepdim=True)) / (x.std(2, correction=0, keepdim=True) + 1e-3) for x in (q, k))
        loss = F.mse_loss(torch.softmax(query @ key.mT / math.sqrt(q.shape[2]), 2) @ k, q)
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    def errors(self):
        """Largest relative error of loss and gradient against float64, by arm."""
        loss, true = self.truth()
        return {
            name: max(
                abs(self.forward(name).item() / loss.item() - 1),
                ((self.step(name).double() - true).norm() / true.norm()).item(),
            )
            for name in self.losses
        }

    def floor(self, flops, bandwidth):
        """Milliseconds."""
        batch, student_channels, teacher_channels, size = self.shape
        product = 2 * batch * student_channels * teacher_channels * size**2 / 1e6
        read, written = (size / 1e6 for size in self.traffic())
        return max(2 * product / flops, read / bandwidth["read"] + written / bandwidth["update"])

    def traffic(self):
        """Bytes that a step reads, of both maps, and writes, of the gradient."""
        return [sum(x.numel() * x.element_size() for x in maps) for maps in (self.maps, self.maps[:1])]


def measure_shape(shape, dtype, flops, bandwidth):
    """Times of all arms at one shape, with the ratios that count."""
    work = Workload(shape, dtype)
    errors = work.errors()
    for name in ("ours", "ours, cached"):
        allowed = 2 * errors["eager channels_last"] + 1e-6
        assert errors[name] <= allowed, f"{name} is wrong at {shape}, so its speed says nothing: {errors}"
    parts = {"forward": work.forward, "prepare": work.prepare, "step": work.step}
    arms = {f"{part} {name}": (lambda f=f, n=name: f(n)) for part, f in parts.items() for name in work.losses}
    measured = harness.measure(arms, repetitions=20, patience=60)
    times = {part: {name: measured.times[f"{part} {name}"] for name in work.losses} for part in parts}
    times["backward"] = {
        name: harness.net(times["step"][name], prepare) for name, prepare in times.pop("prepare").items()
    }
    median = {part: {name: statistics.median(t) for name, t in arms.items()} for part, arms in times.items()}
    fastest = min(BASELINES, key=median["step"].get)
    eager = min(BASELINES[:2], key=median["step"].get)
    return {
        "shape": shape,
        "error": errors,
        "milliseconds": median,
        "spread": {name: harness.spread(t) for name, t in times["step"].items()},
        "floor_ms": work.floor(flops, bandwidth),
        "fastest_baseline": fastest,
        "over": {
            "fastest": harness.ratio(times["step"][fastest], times["step"]["ours"]),
            "eager": harness.ratio(times["step"][eager], times["step"]["ours"]),
            "fastest, cached": harness.ratio(times["step"][fastest], times["step"]["ours, cached"]),
        },
        "peak_MB": {name: harness.peak_memory(lambda n=name: work.step(n)) for name in work.losses},
        "disturbed": measured.disturbed,
        "quiet": measured.quiet,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bench_channel_attention(dtype):
    harness.prepare(threads=2)
    flops, bandwidth = harness.peak_flops(), harness.bandwidth()
    results = [measure_shape(shape, dtype, flops, bandwidth) for shape in SHAPES]

    print(f"\n{harness.machine()}\nchannel attention loss, {dtype}; {flops:.0f} GFLOP/s, {bandwidth} GB/s")
    rows = [("N C_s C_t H", "arm", "forward ms", "backward ms", "step ms", "over ours", "floor / step", "peak MB", "error")]
    for result in results:
        ms = result["milliseconds"]
        for name, step in ms["step"].items():
            label = " ".join(map(str, result["shape"])) + ("" if result["quiet"] else " (disturbed)")
            rows.append((label, name, f"{ms['forward'][name]:.2f}", f"{ms['backward'][name]:.2f}", result["spread"][name],
                         f"{step / ms['step']['ours']:.2f}", f"{result['floor_ms'] / step:.0%}",
                         f"{result['peak_MB'][name]:.1f}", f"{result['error'][name]:.1e}"))
    print(harness.table(rows))
    means = {key: statistics.geometric_mean(result["over"][key] for result in results) for key in REACH}
    for key, reach in REACH.items():
        print(f"step over {key}, geometric mean: {means[key]:.2f}, reach {reach}: {'met' if means[key] >= reach else 'MISSED'}")
    harness.report(
        f"channel_attention_{str(dtype).removeprefix('torch.')}",
        {"peak_GFLOP_s": flops, "bandwidth_GB_s": bandwidth, "geometric_mean": means, "reach": REACH, "shapes": results},
    )
    if dtype == torch.float32:
        slow = [result["shape"] for result in results if min(result["over"].values()) < 1]
        assert not slow, f"slower than PyTorch at {slow}"


def cuda_case(shape, dtype):
    """One shape on the GPU."""
    with torch.device("cuda"):
        work = Workload(shape, dtype)

    def arm(name):
        return {"forward": lambda: (work.forward(name),), "step": lambda: (work.step(name),)}

    names = [name for name in work.losses if name not in ("ours", "compiled") or (name == "compiled" and dtype == torch.bfloat16)]
    read, written = work.traffic()
    return harness_cuda.Case(
        " ".join(map(str, shape)),
        harness_cuda.ours("channel_attention", arm("ours")) | {name: arm(name) for name in names},
        {"forward": lambda: work.truth()[:1], "step": lambda: work.truth()[1:]},
        {"forward": read, "step": read + written},
        {"forward": 1e-6, "step": 1e-6},
    )


def cuda_cases(dtype):
    return [functools.partial(cuda_case, shape, dtype) for shape in SHAPES]


@harness_cuda.needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_bench_channel_attention_cuda(dtype):
    harness_cuda.run("channel_attention", dtype, cuda_cases(dtype), REACH_CUDA if dtype == torch.bfloat16 else [])
