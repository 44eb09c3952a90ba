"""Batches of a resident split: whole-tensor gathers, no worker processes, no work per image."""

from __future__ import annotations

import hashlib
import json
from typing import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from .dataset import Normalisation, Split
from .errors import DataError

PADDING = 4  # pixels of raw value 0 on each side, of which a random crop keeps the original size


class Batches:
    """Shuffled training batches; the same ones for the same (seed, key, epoch), from any step on.

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

    def epoch(self, key: str, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch from step `start` on, exactly as an uninterrupted epoch gives them.

        Each is (x (n, C, H, W) float32 channels_last, normalised; y (n,) int64). `key` names what is being
        trained (a depth, a stage), so that each has an order of its own.
        Raises `DataError` where `start` lies outside 0..steps_per_epoch.
        """
        if not 0 <= start <= self.steps_per_epoch:
            raise DataError(f"epoch cannot start at step {start}; it has {self.steps_per_epoch}")
        return self._batches(keyed_generator(self.seed, key, epoch), start)

    def _batches(self, generator: torch.Generator, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.split.images, self.split.labels
        order = torch.randperm(len(labels), generator=generator).to(images.device)
        if self.augment:
            shifts = torch.randint(0, 2 * PADDING + 1, (2, len(labels)), generator=generator).to(images.device)
            flips = torch.randint(0, 2, (len(labels),), generator=generator).bool().to(images.device)
        for first, end in self.bounds[start:]:
            chosen = order[first:end]
            batch = images.index_select(0, chosen)
            if self.augment:
                batch = crop_and_flip(batch, shifts[:, chosen], flips[chosen])
            yield self.normalisation(batch), labels.index_select(0, chosen)


def evaluation_batches(split: Split, normalisation: Normalisation, batch_size: int = 512) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image once, in order: (x (n, C, H, W) float32 channels_last, y (n,) int64)."""
    for first in range(0, len(split), batch_size):
        images = split.images[first : first + batch_size]
        yield normalisation(images), split.labels[first : first + batch_size]


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


def keyed_generator(seed: int, key: str, epoch: int) -> torch.Generator:
    """A generator whose stream depends on (seed, key, epoch) and on nothing that ran before."""
    digest = hashlib.sha256(json.dumps([int(seed), key, int(epoch)]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def crop_and_flip(images: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """Crops (n, C, H, W) of images padded by 4: from row and column `shifts` (2, n) on, mirrored where `flips` (n,)."""
    count, channels, height, width = images.shape
    padded = functional.pad(images, (PADDING,) * 4).flatten(2)
    rows = shifts[0, :, None] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    columns = shifts[1, :, None] + torch.where(flips[:, None], columns.flip(0), columns)
    pixels = rows[:, :, None] * (width + 2 * PADDING) + columns[:, None, :]
    return padded.gather(2, pixels.view(count, 1, -1).expand(-1, channels, -1)).view(images.shape)
