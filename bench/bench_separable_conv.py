"""Separable convolution: depthwise 3x3, pointwise 1x1, batch norm, ReLU; training and inference.

    pytest bench/bench_separable_conv.py -s             # -m gpu, or -m "not gpu", for one device alone

Baselines are eager PyTorch in NCHW and in channels_last and torch.compile (inductor, channels_last, one graph per
shape); ratios are over the fastest of them, shape by shape. Every arm gets its input and its upstream gradient in its
own layout, made beforehand, and hands out the gradients of the input and of all parameters. At inference batch norm is
folded into the pointwise convolution in all arms. Backward is the step less the forward of the same repetition. A stack
is six layers of one shape, whose maps pass through the caches as in a network.

The floor is the larger of arithmetic at the best measured rate of a dense product and of memory traffic, each map
read and written as often as batch norm's statistics make necessary, at the measured bandwidth. Maps that stay in a
cache can beat it. Judged is float32; bfloat16 is printed beside it, without torch.compile. Before anything is timed,
each arm's results and gradients are compared with float64; the upstream gradient of a single layer is zero where
rounding decides on which side of the ReLU's jump a value falls.

On a GPU (harness_cuda) bfloat16 is judged, and float32 is measured without torch.compile.
"""

import functools
import statistics
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import harness
import harness_cuda
from odn_fast.ops import separable_conv_infer, separable_conv_train

ARMS = ("ours", "eager NCHW", "eager channels_last", "compiled")
REACH = {"inference": 1.7, "step": 1.6, "stack step": 1.5}
REACH_CUDA = [
    harness_cuda.Reach("step", "compiled", 1.5),
    harness_cuda.Reach("step", "eager", 3.0),
    harness_cuda.Reach("step", "floor", 0.6),
    harness_cuda.Reach("inference", "fastest", 1.5),
]
# Relative error that a few values on the other side of a ReLU's zero, in any of six layers, cause in some gradient.
SIDES_OF_ZERO = 0.05


@dataclass(frozen=True)
class Shape:
    batch: int
    c_in: int
    c_out: int
    size: int
    stride: int = 1
    layers: int = 1

    def __str__(self):
        stride = f"/{self.stride}" if self.stride > 1 else ""
        stack = f" x{self.layers}" if self.layers > 1 else ""
        return f"{self.batch}, {self.c_in}-{self.c_out}, {self.size}x{self.size}{stride}{stack}"

    @property
    def output_size(self):
        return (self.size - 1) // self.stride + 1

    def floors(self, element_size, peak, bandwidth):
        """Milliseconds of inference and of a training step, at `peak` GFLOP/s and `bandwidth` in GB/s."""
        positions = self.batch * self.output_size**2
        flops, elements = 2 * positions * self.c_in * (9 + self.c_out) * self.layers, self.elements()

        def floor(flops, elements):
            return 1e-6 * max(flops / peak, elements * element_size / max(bandwidth.values()))

        return floor(flops, elements["inference"]), floor(3 * flops, elements["step"])

    def elements(self):
        """Elements of maps that each phase reads or writes at least, in a step ten times a map where all are of one size."""
        x, y = self.batch * self.c_in * self.size**2, self.batch * self.output_size**2 * self.c_out
        # Training reads x forward and backward, and writes its gradient. The pointwise output is written once and read
        # forward and twice backward, y is written, and y's gradient read twice.
        once = {"inference": x + y, "forward": x + 3 * y, "step": 3 * x + 7 * y}
        return {phase: self.layers * count for phase, count in once.items()}


SHAPES = [
    Shape(128, 16, 16, 32),
    Shape(128, 32, 32, 16),
    Shape(128, 64, 64, 8),
    Shape(128, 64, 64, 32),
    Shape(128, 16, 32, 32, stride=2),
    Shape(32, 128, 128, 28),
    Shape(1, 32, 64, 112),
]
STACKS = [Shape(128, 16, 16, 32, layers=6), Shape(128, 32, 32, 16, layers=6), Shape(128, 64, 64, 8, layers=6)]


def plain_train(x, layers, stride):
    for dw, pw, bn_weight, bn_bias in layers:
        z = F.conv2d(F.conv2d(x, dw, stride=stride, padding=1, groups=x.shape[1]), pw)
        x = F.batch_norm(z, None, None, bn_weight, bn_bias, training=True).relu_()
    return x


def fused_train(x, layers, stride):
    for layer in layers:
        x = separable_conv_train(x, *layer, stride=stride)[0]
    return x


def plain_infer(x, layers, stride):
    for dw, pw, bias in layers:
        x = F.conv2d(F.conv2d(x, dw, stride=stride, padding=1, groups=x.shape[1]), pw, bias).relu_()
    return x


def fused_infer(x, layers, stride):
    for dw, pw, bias in layers:
        x = separable_conv_infer(x, dw, None, pw, bias, stride=stride)
    return x


class Workload:
    """One shape's tensors, the same values for all arms."""

    def __init__(self, shape, dtype):
        torch.manual_seed(0)
        self.stride = shape.stride
        self.x = torch.randn(shape.batch, shape.c_in, shape.size, shape.size).to(dtype)
        self.layers, self.folded = [], []
        for _ in range(shape.layers):
            dw = torch.randn(shape.c_in, 1, 3, 3).div_(3).to(dtype)
            pw = torch.randn(shape.c_out, shape.c_in, 1, 1).div_(shape.c_in**0.5).to(dtype)
            scale, bias = 0.5 + torch.rand(shape.c_out), torch.randn(shape.c_out) / 2
            self.layers.append([dw, pw, scale, bias])
            self.folded.append([dw, (pw.float() * scale[:, None, None, None]).to(dtype), bias.to(dtype)])
        self.grad_y = torch.randn(shape.batch, shape.c_out, shape.output_size, shape.output_size).to(dtype)
        if shape.layers == 1:
            self.grad_y[self.near_zero()] = 0

    def near_zero(self):
        """Where rounding may decide on which side of the ReLU's jump a value falls: no two arms agree there."""
        (dw, pw, bn_weight, bn_bias), x = ([t.double() for t in self.layers[0]], self.x.double())
        z = F.conv2d(F.conv2d(x, dw, stride=self.stride, padding=1, groups=x.shape[1]), pw)
        u = F.batch_norm(z, None, None, bn_weight, bn_bias, training=True).abs_()
        return u < u.max() * {torch.float32: 1e-4, torch.bfloat16: 0.03}[self.x.dtype]

    def arm(self, train, infer, memory_format=torch.channels_last, dtype=None):
        """{phase: function} of one arm, in its memory format."""

        def own(tensor):
            layout = {"memory_format": memory_format} if tensor.dim() == 4 else {}
            return tensor.to(dtype or tensor.dtype, **layout, copy=True)

        x, grad_y = own(self.x), own(self.grad_y)
        layers = [[own(tensor).requires_grad_() for tensor in layer] for layer in self.layers]
        folded = [[own(tensor) for tensor in layer] for layer in self.folded]
        leaf = x.detach().requires_grad_()
        leaves = [leaf, *(tensor for layer in layers for tensor in layer)]

        def step():
            y = train(leaf, layers, self.stride)
            return y, *torch.autograd.grad(y, leaves, grad_y)

        @torch.no_grad()
        def inference():
            return (infer(x, folded, self.stride),)

        return {"forward": lambda: train(leaf, layers, self.stride), "step": step, "inference": inference}


def arms_of(work, compiled):
    """{arm: {phase: function}}, as columns; torch.compile's only if `compiled`."""
    arms = {
        "ours": work.arm(fused_train, fused_infer),
        "eager NCHW": work.arm(plain_train, plain_infer, torch.contiguous_format),
        "eager channels_last": work.arm(plain_train, plain_infer),
    }
    if compiled:
        torch._dynamo.reset()
        arms["compiled"] = work.arm(*(torch.compile(function, dynamic=False) for function in (plain_train, plain_infer)))
    return arms


def bench(shape, dtype, peak, bandwidth, repetitions, patience):
    """Figures of one shape."""
    work = Workload(shape, dtype)
    arms = arms_of(work, compiled=dtype == torch.float32)
    truth = work.arm(plain_train, plain_infer, dtype=torch.float64)
    tolerance = {"step": SIDES_OF_ZERO if shape.layers > 1 else 0.0, "inference": 0.0}
    errors = {
        phase: harness.relative_errors({name: arm[phase] for name, arm in arms.items()}, truth[phase](), tolerance[phase])
        for phase in ("step", "inference")
    }
    names = [(name, phase) for name in arms for phase in ("forward", "step")]
    training = harness.measure(
        {f"{name} {phase}": arms[name][phase] for name, phase in names}, repetitions, patience=patience
    )
    inference = harness.measure({name: arm["inference"] for name, arm in arms.items()}, repetitions, patience=patience)
    times = {phase: {name: training.times[f"{name} {phase}"] for name in arms} for phase in ("forward", "step")}
    times["backward"] = {name: harness.net(times["step"][name], times["forward"][name]) for name in arms}
    times["inference"] = inference.times
    return {
        "milliseconds": times,
        "floor_ms": dict(zip(("inference", "step"), shape.floors(work.x.element_size(), peak, bandwidth), strict=True)),
        "over_fastest": {phase: harness.over_fastest(arm) for phase, arm in times.items()},
        "peak_MB": {
            phase: {name: harness.peak_memory(arm[phase]) for name, arm in arms.items()} for phase in errors
        },
        "relative_error": errors,
        "repetitions": min(len(inference.times["ours"]), len(training.times["ours step"])),
        "disturbed": training.disturbed + inference.disturbed,
        "quiet": training.quiet and inference.quiet,
    }


def rows_of(shape, figures):
    for phase, times in figures["milliseconds"].items():
        fastest, ratio = figures["over_fastest"][phase]
        floor = figures["floor_ms"].get(phase)
        share = f"{floor / statistics.median(times['ours']):.0%}" if floor else ""
        memory = " ".join(f"{peak:.1f}" for peak in figures["peak_MB"].get(phase, {}).values())
        spreads = (harness.spread(times[name]) if name in times else "" for name in ARMS)
        yield shape, phase, *spreads, f"{ratio:.2f}", fastest, share, memory


def run(dtype, repetitions=15, patience=8.0):
    """Measure all shapes, print the table and the verdicts, write the report."""
    harness.prepare(threads=2)
    peak, bandwidth = harness.peak_flops(dtype), harness.bandwidth()
    results = {
        str(shape): bench(shape, dtype, peak, bandwidth, repetitions, patience) for shape in [*SHAPES, *STACKS]
    }
    print(f"\n{harness.machine()}\nseparable_conv, {dtype}, milliseconds; peak MB in the order of the arms")
    print(f"dense product {peak:.0f} GFLOP/s, bandwidth read {bandwidth['read']:.1f}, update {bandwidth['update']:.1f} GB/s")
    header = ("N, channels, size", "phase", *ARMS, "ratio", "over", "of floor", "peak MB")
    print(harness.table([header, *(row for shape, figures in results.items() for row in rows_of(shape, figures))]))

    def ratios(shapes, phase):
        return [results[str(shape)]["over_fastest"][phase][1] for shape in shapes]

    single = {phase: ratios(SHAPES, phase) for phase in ("inference", "step")}
    means = {phase: statistics.geometric_mean(of_phase) for phase, of_phase in single.items()}
    means |= {f"stack {phase}": statistics.geometric_mean(ratios(STACKS, phase)) for phase in ("inference", "step")}
    worst = min(min(of_phase) for of_phase in single.values())
    for name, mean in means.items():
        reach = REACH.get(name) if dtype == torch.float32 else None
        verdict = f", reach {reach}: {'met' if mean >= reach else 'MISSED'}" if reach else ""
        print(f"{name} over the fastest baseline, geometric mean: {mean:.2f}{verdict}")
    print(f"worst shape: {worst:.2f}, reach 1.0: {'met' if worst >= 1.0 else 'MISSED'}")
    harness.report(
        f"separable_conv_{str(dtype).removeprefix('torch.')}",
        {
            "quiet": harness.settle(results),
            "peak_GFLOP_s": peak,
            "bandwidth_GB_s": bandwidth,
            "geometric_mean_over_fastest": means,
            "worst_shape": worst,
            "reach": REACH if dtype == torch.float32 else {},
            "shapes": results,
        },
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bench_separable_conv(dtype):
    run(dtype)


def cuda_case(shape, dtype):
    """One shape on the GPU."""
    with torch.device("cuda"):
        work = Workload(shape, dtype)
    arms = arms_of(work, compiled=dtype == torch.bfloat16)
    truth = work.arm(plain_train, plain_infer, torch.contiguous_format, torch.float64)
    return harness_cuda.Case(
        str(shape),
        harness_cuda.ours("separable_conv", arms.pop("ours")) | arms,
        {phase: truth[phase] for phase in ("step", "inference")},
        {phase: count * work.x.element_size() for phase, count in shape.elements().items()},
        {"step": SIDES_OF_ZERO} if shape.layers > 1 else {},
    )


def cuda_cases(dtype):
    return [functools.partial(cuda_case, shape, dtype) for shape in [*SHAPES, *STACKS]]


@harness_cuda.needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_bench_separable_conv_cuda(dtype):
    harness_cuda.run("separable_conv", dtype, cuda_cases(dtype), REACH_CUDA if dtype == torch.bfloat16 else [])
