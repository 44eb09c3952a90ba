"""Batches of a resident set: 128 images of MNIST's shape, normalised, and of CIFAR-10's, cropped and flipped too.

    pytest bench/bench_augment.py -s

Baselines are whole-tensor PyTorch (a gather for the batch, one for crop and flip, then the normalisation), eager and by
torch.compile, which is handed crops and flips that were drawn beforehand; and a DataLoader whose data set treats one
image at a time with tensor operations, drawing as it goes: in this process, and on the CPU with two workers, timed over
many batches. A loader that decodes images, or has PIL transform them, takes longer still.

Ours and the whole-tensor arms make the same batch, compared with float64 before anything is timed. The floor is to read
the bytes once and to write the batch once.
"""

import functools
import itertools
import statistics
import time
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import harness
import harness_cuda
from authors import Single
from odn_fast.ops import augment, scale_and_shift
from odn_fast.reference.augment import draw

BATCH, IMAGES = 128, 50_000
REACH = 20.0  # over the loader, on 28x28
REACH_CUDA = [harness_cuda.Reach("batch", "eager", 4.0), harness_cuda.Reach("batch", "floor", 0.6)]
REACH_LOADER_CUDA, REACH_IMAGES = 50.0, 1e6  # over the loader, and a second, on 28x28


@dataclass(frozen=True)
class Shape:
    channels: int
    size: int
    padding: int
    flip: bool

    def __str__(self):
        return f"{self.channels}x{self.size}x{self.size}{', crop and flip' if self.padding else ''}"


MNIST, CIFAR = Shape(1, 28, 0, False), Shape(3, 32, 4, True)
SHAPES = [MNIST, CIFAR]


def plain(images, index, rows, columns, flips, scale, shift, padding, dtype):
    """rows, columns, flips: of every image of the set, drawn for the epoch."""
    batch = images.index_select(0, index)
    if padding:
        count, channels, height, width = batch.shape
        across = torch.arange(width, device=batch.device)
        across = columns[index, None] + torch.where(flips[index, None], across.flip(0), across)
        down = rows[index, None] + torch.arange(height, device=batch.device)
        places = down[:, :, None] * (width + 2 * padding) + across[:, None]
        padded = F.pad(batch, (padding,) * 4).flatten(2)
        batch = padded.gather(2, places.view(count, 1, -1).expand(-1, channels, -1)).view(batch.shape)
    arithmetic = torch.promote_types(dtype, torch.float32)
    y = batch.to(arithmetic, memory_format=torch.channels_last)
    return (y * scale.to(arithmetic)[:, None, None] + shift.to(arithmetic)[:, None, None]).to(dtype)


class Workload:
    """The set and an epoch's draws, the same for all arms, on the default device."""

    def __init__(self, shape, dtype):
        torch.manual_seed(0)
        self.shape, self.dtype = shape, dtype
        self.images = torch.randint(0, 256, (IMAGES, shape.channels, shape.size, shape.size), dtype=torch.uint8)
        self.order = torch.randperm(IMAGES)[: IMAGES // BATCH * BATCH].view(-1, BATCH)
        self.key = torch.tensor([1, 2])
        self.mean, self.std = [0.4914, 0.4822, 0.4465][: shape.channels], [0.2470, 0.2435, 0.2616][: shape.channels]
        self.affine = scale_and_shift(self.mean, self.std, device=self.images.device)
        self.drawn = draw(torch.arange(IMAGES), self.key, shape.padding)

    def ours(self, index):
        settings = self.shape.padding, self.shape.flip, self.dtype
        return (augment(self.images, index, *self.affine, self.key, *settings),)

    def plain(self, index, function=plain, dtype=None):
        return (function(self.images, index, *self.drawn, *self.affine, self.shape.padding, dtype or self.dtype),)

    def loader(self, workers=0):
        """Batches without end."""
        data = Single(self.images.cpu(), self.shape.padding, self.shape.flip, self.mean, self.std)
        order = itertools.cycle(self.order.tolist())
        return iter(DataLoader(data, batch_sampler=order, num_workers=workers))

    def floor(self, gigabytes_per_second):
        """Milliseconds."""
        return 1e-6 * self.traffic() / gigabytes_per_second

    def traffic(self):
        return BATCH * self.images[0].numel() * (1 + self.dtype.itemsize)


def arms_of(work, index):
    """{arm: function of no arguments}, on the batch that `index` gives at every call."""
    torch._dynamo.reset()
    compiled = torch.compile(plain, dynamic=False)
    return {
        "ours": lambda: work.ours(index()),
        "eager": lambda: work.plain(index()),
        "compiled": lambda: work.plain(index(), compiled),
    }


def with_workers(work, workers=2, batches=40):
    """Milliseconds a batch, when as many were waited for as workers fetch ahead."""
    loader = work.loader(workers)
    for _ in range(4 * workers):
        next(loader)
    begin = time.perf_counter()
    for _ in range(batches):
        next(loader)
    return 1e3 * (time.perf_counter() - begin) / batches


def bench(shape, dtype, bandwidth, repetitions):
    work = Workload(shape, dtype)
    first = work.order[0]
    harness.relative_errors(arms_of(work, lambda: first), work.plain(first, dtype=torch.float64))
    batches, loader = itertools.cycle(work.order), work.loader()
    arms = arms_of(work, lambda: next(batches)) | {"loader": lambda: next(loader)}
    measured = harness.measure(arms, repetitions, patience=30.0)
    times = measured.times
    return {
        "milliseconds": {"batch": times},
        "loader_two_workers_ms": with_workers(work),
        "over": {name: harness.ratio(times[name], times["ours"]) for name in times if name != "ours"},
        "floor_ms": work.floor(max(bandwidth.values())),
        "images_per_second": 1e3 * BATCH / statistics.median(times["ours"]),
        "quiet": measured.quiet,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bench_augment(dtype, repetitions=100):
    harness.prepare(threads=2)
    bandwidth = harness.bandwidth()
    results = {str(shape): bench(shape, dtype, bandwidth, repetitions) for shape in SHAPES}
    print(f"\n{harness.machine()}\naugment, {dtype}, batch {BATCH} of {IMAGES} images, milliseconds")
    names = ("ours", "eager", "compiled", "loader")
    rows = [("images", *names, "two workers", *(f"over {name}" for name in names[1:]), "images/s", "of floor")]
    for name, figures in results.items():
        times = figures["milliseconds"]["batch"]
        share = figures["floor_ms"] / statistics.median(times["ours"])
        ratios = (f"{figures['over'][baseline]:.2f}" for baseline in names[1:])
        workers, speed = f"{figures['loader_two_workers_ms']:.2f}", f"{figures['images_per_second']:,.0f}"
        rows.append((name, *(harness.spread(times[arm]) for arm in names), workers, *ratios, speed, f"{share:.0%}"))
    print(harness.table(rows))
    figure = results[str(MNIST)]["over"]["loader"]
    print(f"over the loader, 28x28: {figure:.1f}, reach {REACH}: {'met' if figure >= REACH else 'MISSED'}")
    harness.settle(results)
    harness.report(f"augment_{str(dtype).removeprefix('torch.')}", {"bandwidth_GB_s": bandwidth, "shapes": results})


def cuda_case(shape, dtype):
    with torch.device("cuda"):
        work = Workload(shape, dtype)
    index = work.order[0].clone()
    arms = {name: {"batch": function} for name, function in arms_of(work, lambda: index).items()}
    arms |= harness_cuda.ours("augment", arms["ours"])
    truth = {"batch": lambda: work.plain(index, dtype=torch.float64)}
    return harness_cuda.Case(str(shape), arms, truth, {"batch": work.traffic()})


def cuda_cases(dtype):
    return [functools.partial(cuda_case, shape, dtype) for shape in SHAPES]


@harness_cuda.needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_bench_augment_cuda(dtype):
    harness_cuda.run("augment", dtype, cuda_cases(dtype), REACH_CUDA)


@harness_cuda.needs_gpu
def test_bench_augment_loader_cuda():
    """Batches on the device, without a graph: ours against the loader in this process, then a copy."""
    with torch.device("cuda"):
        work = Workload(MNIST, torch.float32)
    batches, loader = itertools.cycle(work.order), work.loader()
    ours = harness_cuda.wall(lambda: work.ours(next(batches)), calls=200)
    theirs = harness_cuda.wall(lambda: next(loader).cuda(), calls=10)
    ratio, speed = theirs / ours, 1e6 * BATCH / ours
    met = "met" if ratio >= REACH_LOADER_CUDA and speed >= REACH_IMAGES else "MISSED"
    print(f"\n28x28 to the device: {ours:.1f} us a batch, {speed:,.0f} images/s, {ratio:.0f} times as fast as a loader: {met}")
    harness_cuda.report("augment_loader", {"ours_us": ours, "loader_us": theirs, "over_loader": ratio, "images_per_second": speed})
