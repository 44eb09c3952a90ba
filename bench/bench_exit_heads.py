"""Exit heads of ResNet-18 on 1x28x28 inputs, batch 128: all eight depths of one backbone pass.

    pytest bench/bench_exit_heads.py -s                 # -m gpu, or -m "not gpu", for one device alone

Timed is forward and backward until every feature's gradient has been added to the dense gradient that comes
from the next block. A stand-in replaces the blocks: its forward hands out ready-made features, its backward a
fresh dense gradient. Gross times hold the stand-in, net times are less the stand-in measured alone in the same
repetition. Each arm's gradients are compared with float64 before anything is timed.

What the arms differ in, beside the forward pass: PyTorch's mean hands back a dense NCHW gradient, which is slow
to add to a channels_last one; an expanded gradient that arrives before the dense one is added out of place, one
that arrives after it in place. In bfloat16 PyTorch's addition is bound by arithmetic, not by memory, so the last
two cost the same.

On a GPU (harness_cuda) whole steps are captured, times are microseconds, and the launch floor counts what a step launches
beyond the stand-in.
"""

import statistics

import pytest
import torch
import torch.nn.functional as F

import harness
import harness_cuda
from odn_fast.ops import exit_heads

BATCH, CLASSES = 128, 10
SHAPES = [(64, 28, 28)] * 2 + [(128, 14, 14)] * 2 + [(256, 7, 7)] * 2 + [(512, 4, 4)] * 2
REACH = {"eager": 3.0, "expanded": 1.3}
REACH_CUDA = {"eager": 4.0, "expanded": 2.0}


class NextBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, feature, output, gradient):
        ctx.gradient = gradient
        return output.detach()

    @staticmethod
    def backward(ctx, _):
        return ctx.gradient.clone(), None, None


def eager(features, weights, biases, target):
    """What a training script writes."""
    losses, correct = [], []
    for feature, weight, bias in zip(features, weights, biases, strict=True):
        logits = F.linear(F.adaptive_avg_pool2d(feature, 1).flatten(1).float(), weight, bias)
        losses.append(F.cross_entropy(logits, target))
        correct.append((logits.argmax(1) == target).sum())
    return torch.stack(losses), torch.stack(correct)


class ExpandedGradient(torch.autograd.Function):
    """The best that plain Python does: one node, one softmax over all depths, no dense feature gradient."""

    @staticmethod
    def forward(ctx, depths, target, *tensors):
        features, weights, biases = tensors[:depths], tensors[depths : 2 * depths], tensors[2 * depths :]
        pooled = [feature.mean((2, 3), dtype=torch.float32) for feature in features]
        logits = torch.stack([F.linear(*head) for head in zip(pooled, weights, biases, strict=True)])
        log_probabilities = logits.log_softmax(2)
        at_target = target.expand(depths, -1)[..., None]
        losses = -log_probabilities.gather(2, at_target).mean((1, 2))
        correct = (logits.argmax(2) == target).sum(1)
        minus_one = logits.new_full((), -1.0).expand(at_target.shape)
        gradient = log_probabilities.exp_().scatter_add_(2, at_target, minus_one)
        ctx.save_for_backward(gradient.div_(len(target)), *pooled, *weights)
        ctx.mark_non_differentiable(correct)
        ctx.features = [(feature.shape, feature.dtype) for feature in features]
        return losses, correct

    @staticmethod
    def backward(ctx, grad_losses, _):
        gradient, *tensors = ctx.saved_tensors
        depths = len(gradient)
        gradient = gradient * grad_losses[:, None, None]
        feature_gradients, weight_gradients = [], []
        for depth, (shape, dtype) in enumerate(ctx.features):
            pooled, weight = tensors[depth], tensors[depths + depth]
            pooled_gradient = (gradient[depth] @ weight).div_(shape[2] * shape[3]).to(dtype)
            feature_gradients.append(pooled_gradient[:, :, None, None].expand(shape))
            weight_gradients.append(gradient[depth].T @ pooled)
        return None, None, *feature_gradients, *weight_gradients, *gradient.sum(1)


def expanded(features, weights, biases, target):
    return ExpandedGradient.apply(len(features), target, *features, *weights, *biases)


class Workload:
    """Features, the next blocks' gradients and heads, the same for all arms."""

    def __init__(self, dtype):
        torch.manual_seed(0)

        def maps(scale):
            return [
                torch.randn(BATCH, *shape).mul_(scale).to(dtype).contiguous(memory_format=torch.channels_last)
                for shape in SHAPES
            ]

        self.features = [feature.relu_() for feature in maps(1.0)]
        self.gradients = maps(1e-5)
        self.weights = [torch.randn(CLASSES, shape[0]).div_(shape[0] ** 0.5).requires_grad_() for shape in SHAPES]
        self.biases = [torch.randn(CLASSES).requires_grad_() for _ in SHAPES]
        self.target = torch.randint(CLASSES, (BATCH,))
        self.ones = torch.ones(len(SHAPES))

    def step(self, heads=None, between=False, keep=None):
        """Forward and backward through the stand-ins and `heads`, called between blocks or after them all."""
        x = self.ones.new_zeros((), requires_grad=True)
        gradient = x.detach()
        features, losses = [], []
        for depth, output in enumerate(self.features):
            x = NextBlock.apply(x, output, gradient)
            gradient = self.gradients[depth]
            features.append(x)
            if keep is not None:
                x.retain_grad()
                keep.append(x)
            if heads and between:
                losses.append(heads([x], [self.weights[depth]], [self.biases[depth]], self.target)[0])
        end = NextBlock.apply(x, self.ones[0], gradient)
        if heads and not between:
            losses.append(heads(features, self.weights, self.biases, self.target)[0])
        torch.autograd.backward([end, *losses], [self.ones[0], *(self.ones[: len(y)] for y in losses)])
        heads_gradients = [parameter.grad for parameter in self.weights + self.biases]
        for parameter in self.weights + self.biases:
            parameter.grad = None
        return heads_gradients

    def truth(self):
        """The step's gradients of features, weights and biases in float64."""
        features = [feature.double().requires_grad_() for feature in self.features]
        weights = [weight.detach().double().requires_grad_() for weight in self.weights]
        biases = [bias.detach().double().requires_grad_() for bias in self.biases]
        losses = [
            F.cross_entropy(F.linear(feature.mean((2, 3)), weight, bias), self.target)
            for feature, weight, bias in zip(features, weights, biases, strict=True)
        ]
        torch.stack(losses).sum().backward()
        total = [feature.grad + gradient.double() for feature, gradient in zip(features, self.gradients, strict=True)]
        return total + [parameter.grad for parameter in weights + biases]

    def error(self, heads, between):
        """Largest relative error (L2) of any gradient of a step."""
        kept = []
        parameters = self.step(heads, between, kept)
        results = [feature.grad for feature in kept] + parameters
        return max(
            ((result.double() - true).norm() / true.norm()).item()
            for result, true in zip(results, self.truth(), strict=True)
        )

    def floor(self, bandwidth):
        """Milliseconds to read every feature once and to read and write every gradient once."""
        megabytes = self.size() / 1e6
        return megabytes / bandwidth["read"] + 2 * megabytes / bandwidth["update"]

    def size(self):
        """Bytes of all features together."""
        return sum(feature.numel() * feature.element_size() for feature in self.features)


HEADS = {"eager": eager, "expanded": expanded, "ours": exit_heads}
PLACES = {"after": False, "between": True}


def arms_of(work):
    """{arm: step}, after ours was found right, and every arm's error."""
    arms = {f"{name} {place}": (HEADS[name], PLACES[place]) for name in HEADS for place in PLACES}
    errors = {name: work.error(*arm) for name, arm in arms.items()}
    for name in ("ours after", "ours between"):
        assert errors[name] <= 2 * errors["eager after"], f"{name} is wrong, so its speed says nothing: {errors}"
    return {name: (lambda arm=arm: work.step(*arm)) for name, arm in arms.items()}, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bench_exit_heads(dtype):
    harness.prepare(threads=2)
    work = Workload(dtype)
    steps, errors = arms_of(work)
    bandwidth = harness.bandwidth()
    measured = harness.measure({"stand-in": work.step, **steps}, repetitions=40)
    times = measured.times
    alone, floor = times.pop("stand-in"), work.floor(bandwidth)
    net = {name: harness.net(gross, alone) for name, gross in times.items()}
    ours = net["ours between"]

    print(f"\n{harness.machine()}\nexit_heads, {dtype}, channels_last, stand-in {harness.spread(alone)} ms")
    print(f"{len(alone)} repetitions, {measured.disturbed} more were disturbed; quiet: {measured.quiet}")
    print(f"bandwidth: read {bandwidth['read']:.1f}, update {bandwidth['update']:.1f} GB/s; byte floor {floor:.2f} ms")
    rows = [("arm", "gross ms", "net ms", "floor / net", "net / ours between", "error")]
    for name, gross in times.items():
        share, over = floor / statistics.median(net[name]), harness.ratio(net[name], ours)
        cells = (harness.spread(gross), harness.spread(net[name]), f"{share:.0%}", f"{over:.2f}", f"{errors[name]:.1e}")
        rows.append((name, *cells))
    print(harness.table(rows))
    ratios = {name: harness.ratio(net[name], ours) for name in times if name != "ours between"}
    for baseline, reach in REACH.items():
        for place in PLACES:
            figure = ratios[f"{baseline} {place}"]
            print(f"over {baseline} {place}: {figure:.2f}, reach {reach}: {'met' if figure >= reach else 'MISSED'}")
    harness.report(
        f"exit_heads_{str(dtype).removeprefix('torch.')}",
        {
            "bandwidth_GB_s": bandwidth,
            "floor_ms": floor,
            "stand_in_ms": statistics.median(alone),
            "repetitions": len(alone),
            "disturbed": measured.disturbed,
            "quiet": measured.quiet,
            "gross_ms": {name: statistics.median(t) for name, t in times.items()},
            "net_ms": {name: statistics.median(t) for name, t in net.items()},
            "net_over_ours_between": ratios,
            "relative_error": errors,
        },
    )


@harness_cuda.needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_bench_exit_heads_cuda(dtype):
    with torch.device("cuda"):
        work = Workload(dtype)
    steps, errors = arms_of(work)
    limits = harness_cuda.ceilings()
    times, launches = harness_cuda.measure({"stand-in": work.step, **steps})
    walls = {name: harness_cuda.wall(step) for name, step in {"stand-in": work.step, **steps}.items()}
    alone, base = times.pop("stand-in"), launches.pop("stand-in")
    net = {name: harness.net(gross, alone) for name, gross in times.items()}
    median = {name: statistics.median(t) for name, t in net.items()}
    ours = min(("ours after", "ours between"), key=median.get)
    floors = {
        name: 3 * work.size() / limits["copy_GB_s"] / 1e3 + (count - base) * limits["graph_node_us"] for name, count in launches.items()
    }

    print(f"\n{harness_cuda.machine()}\nexit_heads, {dtype}, microseconds in a graph")
    print(f"stand-in {statistics.median(alone):.2f}, {base} launches, which net figures are without")
    rows = [("arm", "gross", "net", "launches", "byte + launch floor", "of floor", f"net / {ours}", "wall, net", "error")]
    over = {name: harness.ratio(net[name], net[ours]) for name in net}
    for name, gross in times.items():
        rows.append((name, f"{statistics.median(gross):.2f}", f"{median[name]:.2f}", launches[name] - base, f"{floors[name]:.2f}",
                     f"{floors[name] / median[name]:.0%}", f"{over[name]:.2f}", f"{walls[name] - walls['stand-in']:.0f}",
                     f"{errors[name]:.1e}"))
    print(harness.table(rows))
    verdicts = {}
    for baseline, reach in REACH_CUDA.items():
        figure = min(over[f"{baseline} {place}"] for place in PLACES)
        verdicts[f"net, over {baseline}"] = {"geometric_mean": figure, "worst": figure, "reach": reach, "met": figure >= reach}
        print(f"over {baseline}, the faster of both places: {figure:.2f}, reach {reach}: {'met' if figure >= reach else 'MISSED'}")
    harness_cuda.report(
        f"exit_heads_{str(dtype).removeprefix('torch.')}",
        {
            "ceilings": limits,
            "verdicts": verdicts,
            "stand_in_us": statistics.median(alone),
            "net_us": median,
            "launches": {name: count - base for name, count in launches.items()},
            "floor_us": floors,
            "wall_us": walls,
            "relative_error": errors,
        },
    )
