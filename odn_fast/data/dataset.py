"""What a reader returns: images resident as one uint8 tensor a split, with everything needed to use them."""

from __future__ import annotations

import functools
import hashlib
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ops import augment, scale_and_shift
from ..reference.augment import cropped, draw
from .damage import Damage
from .errors import DataError
from .pictures import Pictures
from .split import Split
from .splitting import stratified_choice


@dataclass(frozen=True)
class Normalisation:
    """x -> (x / scale - mean) / std, per channel; the one way images enter a network.

    `scale`: the raw value that stands for 1 (255 for bytes); `mean` and `std`: one number a channel,
    in units of x / scale.
    """

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        numbers = (self.scale, *self.mean, *self.std)
        if not self.mean or len(self.mean) != len(self.std):
            raise DataError(f"normalisation has {len(self.mean)} means and {len(self.std)} stds, expected one of each a channel")
        if not all(map(math.isfinite, numbers)) or self.scale <= 0 or min(self.std) <= 0:
            raise DataError(f"normalisation needs finite numbers, scale > 0 and std > 0, not {self}")

    def __call__(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), uint8 or float32 -> (N, C, H, W) float32, channels_last.

        Computed as x * a + b with a = 1 / (scale std), b = -mean / std formed in float64 and rounded once.
        The product is rounded before the sum (two passes, never a fused multiply-add), so a pixel has the
        same bits whatever the batch it came in. Raises `DataError` on another number of channels.
        """
        return self.gathered(images, torch.arange(len(images), device=images.device))

    def gathered(self, images: Tensor, positions: Tensor, drawn: Tensor | None = None, padding: int = 0, flip: bool = False) -> Tensor:
        """The same of the images at `positions` (n,) int64, randomly cropped out of `padding` and flipped, as `ops.augment` does.

        drawn: (2,) int64, the op's key; None where nothing is drawn.
        """
        if images.shape[1] != len(self.mean):
            raise DataError(f"images have {images.shape[1]} channels, the normalisation has {len(self.mean)}")
        scale, shift = _affine(self, images.device)
        if images.dtype == torch.uint8:
            return augment(images, positions, scale, shift, drawn, padding, flip)
        pixels = images.index_select(0, positions)
        if padding or flip:
            pixels = cropped(pixels, *draw(positions, drawn, padding), padding, flip)
        result = torch.empty_like(pixels, memory_format=torch.channels_last)
        for channel, plane in enumerate(result.unbind(1)):  # faster than broadcasting along the last, short axis
            plane.copy_(pixels[:, channel]).mul_(scale[channel]).add_(shift[channel])
        return result


@functools.lru_cache(maxsize=64)
def _affine(normalisation: Normalisation, device: torch.device) -> tuple[Tensor, Tensor]:
    """x * scale + shift, (C,) each, is the normalisation."""
    with torch.inference_mode(False):  # they outlive an evaluation
        return scale_and_shift(normalisation.mean, normalisation.std, normalisation.scale, device)


def scale_only(scale: float, channels: int) -> Normalisation:
    """x -> x / scale on every channel: 255 puts bytes into [0, 1], 1 leaves floats as they are."""
    return Normalisation(float(scale), (0.0,) * channels, (1.0,) * channels)


@dataclass(frozen=True, eq=False)
class DataSet:
    """A data set ready for training. A split that is not resident is a `Pictures`.

    `loader`: resident, dali or torch, which makes the batches, and `loader_reason` why. `damage`: pictures that cannot
    be read, where there are pictures. `augment`: random crop and flip belong to its training; `drop_last`: an incomplete last training
    batch is left out. Raises `DataError` unless training and validation hold images, every split
    has the same (C, H, W) and type, and every label lies in 0..num_classes-1.
    """

    name: str
    train: Split | Pictures
    validation: Split | Pictures
    test: Split | Pictures | None
    class_names: tuple[str, ...]
    normalisation: Normalisation
    augment: bool
    drop_last: bool
    loader: str = "resident"
    loader_reason: str = "the images are in memory"
    damage: Damage | None = None

    def __post_init__(self) -> None:
        expected = self.train
        for split_name, split in self.splits():
            where = f"{self.name}: {split_name} split"
            if len(split) == 0:
                raise DataError(f"{where} is empty; it needs at least one image")
            if split.image_shape != expected.image_shape or 0 in split.image_shape:
                raise DataError(
                    f"{where} has images of (C, H, W) = {split.image_shape}, the training split "
                    f"{expected.image_shape}; all must be alike and none of the sizes 0"
                )
            if split.dtype != expected.dtype:
                raise DataError(f"{where} is {split.dtype}, the training split {expected.dtype}; give all splits the same type")
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= self.num_classes:
                raise DataError(f"{where} has labels {low}..{high}, expected 0..{self.num_classes - 1}")
        if len(self.normalisation.mean) != expected.image_shape[0]:
            raise DataError(f"{self.name}: {expected.image_shape[0]} channels but normalisation for {len(self.normalisation.mean)}")

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return self.train.image_shape

    @property
    def decodes(self) -> bool:
        """Whether pictures are decoded as they are needed."""
        return self.damage is not None and self.loader != "resident"

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def to(self, device: str) -> DataSet:
        """The same set with its images resident on `device`, or decoded to it."""
        return replace(self, train=self.train.to(device), validation=self.validation.to(device),
                       test=self.test.to(device) if self.test is not None else None)

    def splits(self) -> list[tuple[str, Split | Pictures]]:
        """(name, split) of every split there is: training, validation, and test where there is one."""
        named = [("training", self.train), ("validation", self.validation), ("test", self.test)]
        return [(name, split) for name, split in named if split is not None]

    def checksum(self) -> str:
        """SHA-256, in hex, over images and labels of all splits; of pictures that are not resident, over their files."""
        digest = hashlib.sha256()
        for name, split in self.splits():
            split.hash_into(digest, name)
        return digest.hexdigest()

    def limit_train(self, count: int, seed: int) -> DataSet:
        """The same set with `count` training images: seeded, class shares kept, original order.

        Every class of the training split keeps at least one image. Raises `DataError` where
        `count` is below the number of classes or above the number of training images.
        """
        if not self.num_classes <= count <= len(self.train):
            raise DataError(
                f"{self.name}: cannot limit the training split to {count} images; give a number from "
                f"{self.num_classes} (one a class) to {len(self.train)}"
            )
        return replace(self, train=self.train.at(stratified_choice(self.train.labels, count, seed, at_least=1)))


def measured_normalisation(images: Tensor) -> Normalisation:
    """/255, then mean and standard deviation of `images` (N, C, H, W) uint8, per channel, std at least 1e-3.

    Counted by grey level in integers, so the result does not depend on any order of summation.
    """
    return normalisation_of_parts(images.split(4096))


def normalisation_of_parts(parts: Iterable[Tensor]) -> Normalisation:
    """The same of images that come in parts (n, C, H, W)."""
    histograms = sum(torch.stack([torch.bincount(plane.flatten(), minlength=256) for plane in part.unbind(1)]) for part in parts)
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for histogram in histograms:
        weights = histogram.double() / histogram.sum()
        mean = float((weights * levels).sum())
        means.append(mean)
        stds.append(max(float((weights * (levels - mean) ** 2).sum().sqrt()), 1e-3))
    return Normalisation(255.0, tuple(means), tuple(stds))


def official_splits(
    images: Tensor, labels: Tensor, validation: int, official: int, where: str, test_images: int
) -> tuple[Split, Split]:
    """Training and validation split of an official training set: the last `validation` images of `official`.

    A subset of the official set gives the same share of its images, at least one, with a warning, and a larger
    set no more than `validation`. Raises `DataError` where there are fewer than two images, or fewer than
    `test_images`, the size of the test split: official training sets are larger.
    """
    if len(labels) < test_images:
        raise DataError(f"{where}: {len(labels)} training images but {test_images} test images; were the files swapped?")
    if len(labels) != official:
        warnings.warn(f"{where}: {len(labels)} training images, the official set has {official}", stacklevel=4)
    if len(labels) < 2:
        raise DataError(f"{where}: holds {len(labels)} training images; training and validation need at least one each")
    first = len(labels) - max(1, min(validation, len(labels) * validation // official))
    return Split(images[:first], labels[:first]), Split(images[first:], labels[first:])
