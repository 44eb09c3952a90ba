"""The 8x8 digits that scikit-learn ships: 1,797 images, no download."""

from __future__ import annotations

import string

import torch

from .dataset import DataSet, Split, scale_only
from .errors import needs
from .splitting import complement, stratified_choice

HELD_OUT = 300  # images for validation, and as many for test
MAXIMUM = 16  # grey levels run from 0 to 16


def load_digits(seed: int) -> DataSet:
    """1,197 / 300 / 300 images 1x8x8 uint8 in 0..16, stratified by `seed`; x / 16, mean 0, std 1.

    Raises `DataError` where scikit-learn is not installed.
    """
    source = needs("sklearn.datasets", "scikit-learn", "the digits data set").load_digits()
    everything = Split(
        torch.from_numpy(source.images).to(torch.uint8).unsqueeze(1), torch.from_numpy(source.target).to(torch.int64)
    )
    test = stratified_choice(everything.labels, HELD_OUT, seed)
    rest = everything.at(complement(test, len(everything)))
    validation = stratified_choice(rest.labels, HELD_OUT, seed)
    return DataSet(
        name="digits", train=rest.at(complement(validation, len(rest))), validation=rest.at(validation),
        test=everything.at(test), class_names=tuple(string.digits), normalisation=scale_only(MAXIMUM, 1),
        augment=False, drop_last=False,
    )
