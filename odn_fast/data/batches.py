"""Batches of a resident split: gathered, augmented and normalised by one op, on the device where the split lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import torch
from torch import Tensor

from .dataset import Normalisation
from .errors import DataError
from .pictures import Pictures
from .split import Split

PADDING = 4  # pixels of raw value 0 on each side, of which a random crop keeps the original size


class Source:
    """Where the batches of a training come from.

    A step is given `inputs`, tensors on the device where training runs, and makes its batch of them with `batch`, which
    reads nothing back from the device: a GPU can capture it together with the step.

    Attributes:
        steps_per_epoch, images_per_epoch: of every epoch.
    """

    steps_per_epoch: int
    images_per_epoch: int

    def inputs(self, key: str, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """What the steps of one epoch are given, from step `start` on, exactly as in an uninterrupted epoch.

        `key` names what is being trained (a depth, a stage), so that each has an order of its own.
        Raises `DataError` where `start` lies outside 0..steps_per_epoch.
        """
        raise NotImplementedError

    def batch(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, C, H, W) float32 channels_last, normalised, and y (n,) int64, of a step's inputs."""
        x, y = inputs
        return x, y

    def epoch(self, key: str, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch, as `inputs` and `batch` give them."""
        return (self.batch(*inputs) for inputs in self.inputs(key, epoch, start))

    def check_start(self, start: int):
        if not 0 <= start <= self.steps_per_epoch:
            raise DataError(f"epoch cannot start at step {start}; it has {self.steps_per_epoch}")


class Batches(Source):
    """Shuffled training batches of a resident split; the same ones for the same (seed, key, epoch), from any step on.

    The last batch is kept when incomplete, or with `drop_last` left out (unless it is the only one). A last
    batch of one image joins the batch before it: batch norm needs two values. `augment`: pad 4, random
    crop, flip with probability 1/2, drawn per image and epoch, whatever the batch size.
    Raises `DataError` on an empty split or a batch size below 1.
    """

    def __init__(
        self, split: Split, normalisation: Normalisation, batch_size: int, seed: int, augment: bool = False, drop_last: bool = False
    ) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}, expected at least 1")
        if len(split) == 0:
            raise DataError("cannot make batches of an empty split")
        self.split = split
        self.normalisation = normalisation
        self.seed = seed
        self.augment = augment
        self.bounds = batch_bounds(len(split), batch_size, drop_last)
        self.steps_per_epoch = len(self.bounds)
        self.images_per_epoch = self.bounds[-1][1]

    def inputs(self, key: str, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Positions in the split (n,) int64, and the key (2,) int64 of what is drawn for its images."""
        self.check_start(start)
        device = self.split.labels.device
        order, drawn = keyed_order(len(self.split), self.seed, key, epoch, device), keyed_draws(self.seed, key, epoch, device)
        return ((order[first:end], drawn) for first, end in self.bounds[start:])

    def batch(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        positions, drawn = inputs
        padding = PADDING if self.augment else 0
        x = self.normalisation.gathered(self.split.images, positions, drawn, padding, flip=self.augment)
        return x, self.split.labels.index_select(0, positions)


def evaluation_batches(split: Split | Pictures, normalisation: Normalisation, batch_size: int = 512) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image once, in order: (x (n, C, H, W) float32 channels_last, y (n,) int64)."""
    return ((normalisation(images), labels) for images, labels in split.in_order(batch_size))


def batch_bounds(count: int, batch_size: int, drop_last: bool) -> list[tuple[int, int]]:
    """(first, end) of every batch of `count` images; see `Batches` for the last one."""
    ends = list(range(batch_size, count + 1, batch_size))
    remaining = count - (ends[-1] if ends else 0)
    if not ends:
        ends = [count]
    elif remaining == 1 and not drop_last:
        ends[-1] = count
    elif remaining and not drop_last:
        ends.append(count)
    return list(zip([0, *ends[:-1]], ends))


def keyed_generator(seed: int, key: str, epoch: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream depends on (seed, key, epoch) and on nothing that ran before."""
    return torch.Generator(device).manual_seed(_hashed(seed, key, epoch))


def keyed_order(count: int, seed: int, key: str, epoch: int, device: torch.device) -> Tensor:
    """0 to count - 1 (count,) in the order of an epoch."""
    return torch.randperm(count, generator=keyed_generator(seed, key, epoch, device), device=device)


def keyed_draws(seed: int, key: str, epoch: int, device: torch.device | str = "cpu") -> Tensor:
    """The key (2,) int64 under which `ops.augment` draws for an epoch; filled in on the device, as a copy would wait for it."""
    return torch.stack([torch.full((), number, device=device) for number in (keyed_number(seed, key), epoch)])


def keyed_number(seed: int, key: str) -> int:
    """A number of 63 bits for (seed, key)."""
    return _hashed(seed, key) >> 1


def _hashed(*values: int | str) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(values).encode()).digest()[:8], "little")
