"""The residual separable unit: two separable convolutions and a skip connection, one training step.

    pytest bench/bench_separable_unit.py -s             # -m gpu, or -m "not gpu", for one device alone

Baselines are eager PyTorch in NCHW and in channels_last and torch.compile (inductor, channels_last, one graph per
unit); ratios are over the fastest of them, unit by unit. Every arm gets its input and its upstream gradient in its own
layout, made beforehand, and hands out the gradients of the input and of all parameters. Backward is the step less the
forward of the same repetition. Judged is float32; bfloat16 is printed beside it, without torch.compile. Before
anything is timed, each arm's results and gradients are compared with float64.

The floor is the larger of arithmetic at the best measured rate of a dense product and of memory traffic at the
measured bandwidth, each map read and written as often as batch norm's statistics make necessary. Maps that stay in a
cache can beat it.

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
from odn_fast.ops import separable_unit_train

ARMS = ("ours", "eager NCHW", "eager channels_last", "compiled")
REACH = 1.8
REACH_CUDA = [
    harness_cuda.Reach("step", "compiled", 1.5),
    harness_cuda.Reach("step", "eager", 3.0),
    harness_cuda.Reach("step", "floor", 0.6),
]
BATCH = 128
# Relative error that a few values on the other side of a ReLU's zero cause in some gradient.
SIDES_OF_ZERO = {torch.float32: 0.01, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Unit:
    c_in: int
    c_out: int
    size: int
    skip: str
    stride: int = 1

    def __str__(self):
        return f"{BATCH}, {self.c_in}-{self.c_out}, {self.size}x{self.size}/{self.stride}, {self.skip}"

    def floor(self, element_size, peak, bandwidth):
        """Milliseconds of a training step, at `peak` GFLOP/s and `bandwidth` in GB/s."""
        positions = BATCH * (self.size // self.stride) ** 2
        flops = 2 * positions * (self.c_in * (9 + self.c_out) + self.c_out * (9 + self.c_out))
        if self.skip == "pooled":
            flops += 2 * positions * self.c_in * self.c_out
        return 1e-6 * max(3 * flops / peak, self.elements()["step"] * element_size / max(bandwidth.values()))

    def elements(self):
        """Elements of maps that each phase reads or writes at least; a step about twenty times a map of y's size."""
        x, y = BATCH * self.c_in * self.size**2, BATCH * (self.size // self.stride) ** 2 * self.c_out
        # x is read forward and backward and its gradient written. Both pointwise outputs are written once and read
        # once forward and twice backward; y is written and read; the gradients of y and of the map between the
        # convolutions are each read twice, the latter written once.
        forward, step = x + 5 * y, 3 * x + (2 * 4 + 2 + 5) * y
        if self.skip == "pooled":
            forward, step = forward + 2 * y, step + 4 * y
        elif self.skip == "identity":
            forward, step = forward + x, step + x
        return {"forward": forward, "step": step}


UNITS = [
    Unit(16, 16, 32, "identity"),
    Unit(32, 32, 16, "identity"),
    Unit(64, 64, 8, "identity"),
    Unit(16, 32, 32, "pooled", stride=2),
    Unit(32, 32, 16, "none"),
]


def plain(x, first, second, skip, identity, stride):
    def separable(x, dw, pw, bn_weight, bn_bias, stride):
        z = F.conv2d(F.conv2d(x, dw, stride=stride, padding=1, groups=x.shape[1]), pw)
        return F.batch_norm(z, None, None, bn_weight, bn_bias, training=True)

    y = separable(separable(x, *first, stride).relu_(), *second, 1)
    if identity:
        y += x
    elif skip:
        pw, bn_weight, bn_bias = skip
        pool = F.avg_pool2d(x, stride, ceil_mode=True)
        y += F.batch_norm(F.conv2d(pool, pw), None, None, bn_weight, bn_bias, training=True)
    return y.relu_()


def fused(*arguments):
    return separable_unit_train(*arguments)[0]


class Workload:
    """One unit's tensors, the same values for all arms."""

    def __init__(self, unit, dtype):
        torch.manual_seed(0)

        def parameters(c_in):
            return [
                torch.randn(c_in, 1, 3, 3).div_(3).to(dtype),
                torch.randn(unit.c_out, c_in, 1, 1).div_(c_in**0.5).to(dtype),
                0.5 + torch.rand(unit.c_out),
                torch.randn(unit.c_out) / 2,
            ]

        self.settings = unit.skip == "identity", unit.stride
        self.x = torch.randn(BATCH, unit.c_in, unit.size, unit.size).to(dtype)
        projection = parameters(unit.c_in)[1:] if unit.skip == "pooled" else []
        self.parameters = [parameters(unit.c_in), parameters(unit.c_out), projection]
        self.grad_y = torch.randn(BATCH, unit.c_out, *[unit.size // unit.stride] * 2).to(dtype)

    def arm(self, function, memory_format=torch.channels_last, dtype=None):
        """{phase: function} of one arm, in its memory format."""

        def own(tensor):
            layout = {"memory_format": memory_format} if tensor.dim() == 4 else {}
            return tensor.to(dtype or tensor.dtype, **layout, copy=True)

        x, grad_y = own(self.x).requires_grad_(), own(self.grad_y)
        parameters = [[own(tensor).requires_grad_() for tensor in group] for group in self.parameters]
        leaves = [x, *(tensor for group in parameters for tensor in group)]

        def forward():
            return function(x, *parameters, *self.settings)

        def step():
            y = forward()
            return y, *torch.autograd.grad(y, leaves, grad_y)

        return {"forward": forward, "step": step}


def arms_of(work, compiled):
    """{arm: {phase: function}}, as columns; torch.compile's only if `compiled`."""
    arms = {
        "ours": work.arm(fused),
        "eager NCHW": work.arm(plain, torch.contiguous_format),
        "eager channels_last": work.arm(plain),
    }
    if compiled:
        torch._dynamo.reset()
        arms["compiled"] = work.arm(torch.compile(plain, dynamic=False))
    return arms


def bench(unit, dtype, peak, bandwidth, repetitions, patience):
    """Figures of one unit."""
    work = Workload(unit, dtype)
    arms = arms_of(work, compiled=dtype == torch.float32)
    steps = {name: arm["step"] for name, arm in arms.items()}
    errors = harness.relative_errors(steps, work.arm(plain, dtype=torch.float64)["step"](), SIDES_OF_ZERO[dtype])
    measured = harness.measure(
        {f"{name} {phase}": function for name, arm in arms.items() for phase, function in arm.items()},
        repetitions,
        patience=patience,
    )
    times = {phase: {name: measured.times[f"{name} {phase}"] for name in arms} for phase in ("forward", "step")}
    times["backward"] = {name: harness.net(times["step"][name], times["forward"][name]) for name in arms}
    return {
        "milliseconds": times,
        "floor_ms": unit.floor(work.x.element_size(), peak, bandwidth),
        "over_fastest": {phase: harness.over_fastest(arm) for phase, arm in times.items()},
        "peak_MB": {name: harness.peak_memory(function) for name, function in steps.items()},
        "relative_error": errors,
        "repetitions": len(times["step"]["ours"]),
        "disturbed": measured.disturbed,
        "quiet": measured.quiet,
    }


def rows_of(unit, figures):
    for phase, times in figures["milliseconds"].items():
        fastest, ratio = figures["over_fastest"][phase]
        share, memory = "", ""
        if phase == "step":
            share = f"{figures['floor_ms'] / statistics.median(times['ours']):.0%}"
            memory = " ".join(f"{peak:.1f}" for peak in figures["peak_MB"].values())
        spreads = (harness.spread(times[name]) if name in times else "" for name in ARMS)
        yield unit, phase, *spreads, f"{ratio:.2f}", fastest, share, memory


def run(dtype, repetitions=15, patience=10.0):
    """Measure all units, print the table and the verdict, write the report."""
    harness.prepare(threads=2)
    peak, bandwidth = harness.peak_flops(dtype), harness.bandwidth()
    results = {str(unit): bench(unit, dtype, peak, bandwidth, repetitions, patience) for unit in UNITS}
    print(f"\n{harness.machine()}\nseparable_unit, {dtype}, milliseconds; peak MB in the order of the arms")
    print(f"dense product {peak:.0f} GFLOP/s, bandwidth read {bandwidth['read']:.1f}, update {bandwidth['update']:.1f} GB/s")
    header = ("N, channels, size/stride, skip", "phase", *ARMS, "ratio", "over", "of floor", "peak MB")
    print(harness.table([header, *(row for unit, figures in results.items() for row in rows_of(unit, figures))]))
    ratios = [figures["over_fastest"]["step"][1] for figures in results.values()]
    mean = statistics.geometric_mean(ratios)
    verdict = f", reach {REACH}: {'met' if mean >= REACH else 'MISSED'}" if dtype == torch.float32 else ""
    print(f"step over the fastest baseline, geometric mean: {mean:.2f}, worst {min(ratios):.2f}{verdict}")
    harness.report(
        f"separable_unit_{str(dtype).removeprefix('torch.')}",
        {
            "quiet": harness.settle(results),
            "peak_GFLOP_s": peak,
            "bandwidth_GB_s": bandwidth,
            "geometric_mean_over_fastest": mean,
            "worst_unit": min(ratios),
            "reach": REACH if dtype == torch.float32 else None,
            "units": results,
        },
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bench_separable_unit(dtype):
    run(dtype)


def cuda_case(unit, dtype):
    """One unit on the GPU."""
    with torch.device("cuda"):
        work = Workload(unit, dtype)
    arms = arms_of(work, compiled=dtype == torch.bfloat16)
    truth = work.arm(plain, torch.contiguous_format, torch.float64)
    return harness_cuda.Case(
        str(unit),
        harness_cuda.ours("separable_unit", arms.pop("ours")) | arms,
        {"step": truth["step"]},
        {phase: count * work.x.element_size() for phase, count in unit.elements().items()},
        {"step": SIDES_OF_ZERO[dtype]},
    )


def cuda_cases(dtype):
    return [functools.partial(cuda_case, unit, dtype) for unit in UNITS]


@harness_cuda.needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_bench_separable_unit_cuda(dtype):
    harness_cuda.run("separable_unit", dtype, cuda_cases(dtype), REACH_CUDA if dtype == torch.bfloat16 else [])
