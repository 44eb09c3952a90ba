"""Stratified, seeded choice of images: who goes into which split, by labels alone."""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch
from torch import Tensor

from .errors import DataError

DEFAULT_VALIDATION = 0.1


class Labelled(Protocol):
    """Images with labels (N,) int64, of which some can be picked: a Split, or a list of files."""

    @property
    def labels(self) -> Tensor: ...

    def at(self: Part, positions: Tensor) -> Part: ...


Part = TypeVar("Part", bound=Labelled)


def class_quotas(class_counts: Tensor, total: int, at_least: int = 0, leave: int = 0) -> Tensor:
    """How many images of each class make `total`, class shares kept by largest remainder.

    `class_counts` (K,) int64. A class gives `at_least` images where it has them, and keeps `leave`
    images back; where these bounds bite, the other classes make up for it. Integers throughout, equal
    remainders go to the lower class, so the result is exact. Returns (K,) int64 that sums to `total`;
    raises `DataError` where the bounds leave no such choice.
    """
    count = int(class_counts.sum())
    lower = class_counts.clamp(max=at_least)
    upper = torch.maximum((class_counts - leave).clamp(min=0), lower)
    if not int(lower.sum()) <= total <= int(upper.sum()):
        raise DataError(
            f"cannot choose {total} of {count} images in {len(class_counts)} classes: "
            f"between {int(lower.sum())} and {int(upper.sum())} are possible"
        )
    shares = class_counts * total  # in units of 1/count of an image
    quotas = torch.minimum(torch.maximum(shares // max(count, 1), lower), upper)
    never = torch.iinfo(torch.int64).max
    while (missing := total - int(quotas.sum())) != 0:
        owed = shares - quotas * count
        if missing > 0:
            quotas[int(owed.masked_fill(quotas >= upper, -never).argmax())] += 1
        else:
            quotas[int(owed.masked_fill(quotas <= lower, never).argmin())] -= 1
    return quotas


def stratified_choice(labels: Tensor, total: int, seed: int, at_least: int = 0, leave: int = 0) -> Tensor:
    """Positions (total,) int64, ascending, of a seeded random choice that keeps the class shares.

    `labels` (N,) int64; bounds as in `class_quotas`.
    """
    generator = torch.Generator().manual_seed(seed)
    quotas = class_quotas(torch.bincount(labels), total, at_least, leave)
    chosen = []
    for label, quota in enumerate(quotas.tolist()):
        members = torch.nonzero(labels == label).flatten()
        chosen.append(members[torch.randperm(len(members), generator=generator)[:quota]])
    return torch.cat(chosen).sort().values


def fill_missing_splits(
    splits: dict[str, Part], val_fraction: float | None, test_fraction: float | None, seed: int, where: str
) -> dict[str, Part]:
    """`splits` with what is missing held out of `"train"`, stratified by `seed`.

    `"validation"` gets `val_fraction` (default 0.1) of the training images given, `"test"`
    `test_fraction` of them (default: there is none), each at least one image; every class keeps at least
    one for training. Raises `DataError` where that is impossible, or a fraction is given for a split
    that is there.
    """
    filled = dict(splits)
    count = len(splits["train"].labels)
    for split, option, fraction in (("test", "test_fraction", test_fraction), ("validation", "val_fraction", val_fraction)):
        if split in splits:
            if fraction is not None:
                raise DataError(f"{where}: {option} makes no sense, there is a {split} split already; leave the option out")
            continue
        if fraction is None:
            if split == "test":
                continue
            fraction = DEFAULT_VALIDATION
        if not 0 < fraction < 1:
            raise DataError(f"{option} is {fraction}, expected a share between 0 and 1, such as 0.1")
        train = filled["train"]
        try:
            held_out = stratified_choice(train.labels, max(1, round(count * fraction)), seed, leave=1)
        except DataError as error:
            raise DataError(f"{where}: {option} {fraction} leaves too few training images: {error}") from error
        filled[split], filled["train"] = train.at(held_out), train.at(complement(held_out, len(train.labels)))
    return filled


def complement(positions: Tensor, count: int) -> Tensor:
    """The positions of 0..count-1 that are not in `positions`, ascending, int64."""
    kept = torch.ones(count, dtype=torch.bool)
    kept[positions] = False
    return torch.nonzero(kept).flatten()
