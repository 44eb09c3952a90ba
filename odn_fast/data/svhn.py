"""SVHN, cropped digits: the official `train_32x32.mat` and `test_32x32.mat`."""

from __future__ import annotations

import os
import string
from pathlib import Path

import numpy as np
import torch

from .dataset import DataSet, Split, official_splits, scale_only
from .download import ensure
from .errors import DataError
from .mat import read_mat

FILES = ("train_32x32.mat", "test_32x32.mat")
VALIDATION, OFFICIAL = 5_000, 73_257


def load_svhn(data_dir: Path, download: bool) -> DataSet:
    """SVHN from `data_dir/SVHN`, or from `data_dir` itself where the files lie there; 3x32x32 uint8.

    The files count digits 1..9 and 10 for zero; here digit d is class d. Validation is the last 5,000
    training images. Raises `DataError` naming the file that is missing or damaged.
    """
    usual = Path(data_dir) / "SVHN"
    places = (usual, Path(data_dir))
    folder = next((place for place in places if all(os.path.exists(place / name) for name in FILES)), usual)
    ensure("svhn", folder, download)
    train, test = (read_split(folder / file_name) for file_name in FILES)
    training, validation = official_splits(train.images, train.labels, VALIDATION, OFFICIAL, str(folder), len(test))
    return DataSet(
        name="svhn", train=training, validation=validation, test=test, class_names=tuple(string.digits),
        normalisation=scale_only(255, 3), augment=False, drop_last=True,
    )


def read_split(path: Path) -> Split:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64 in 0..9 of one file: X (32, 32, 3, N), y 1..10."""
    content = read_mat(path, ("X", "y"))
    images, labels = content["X"], content["y"].reshape(-1)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != (32, 32, 3):
        raise DataError(f"{path}: X is {images.dtype} {images.shape}, expected uint8 (32, 32, 3, N)")
    if len(labels) != images.shape[3]:
        raise DataError(f"{path}: {images.shape[3]} images but {len(labels)} labels")
    wrong = ~np.isin(labels, range(1, 11))
    if wrong.any():
        raise DataError(f"{path}: y holds {labels[wrong][0]}, expected digits 1..10 (10 stands for 0)")
    images = np.ascontiguousarray(images.transpose(3, 2, 0, 1))
    return Split(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64) % 10))
