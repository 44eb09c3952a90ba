"""CIFAR-10 and CIFAR-100: the official "python version", folders `cifar-10-batches-py` and `cifar-100-python`.

Each file is a pickled dictionary; none is ever executed (see `plain_pickle`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .dataset import DataSet, Split, official_splits, scale_only
from .download import ensure
from .errors import DataError, reading, regular_file_size
from .plain_pickle import load_plain

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
VALIDATION, OFFICIAL = 5_000, 50_000


@dataclass(frozen=True)
class Edition:
    """What sets the two apart: folder, file names, and the keys of labels and class names."""

    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels_key: str
    names_key: str
    num_classes: int


EDITIONS = {
    "cifar10": Edition(
        "cifar-10-batches-py", tuple(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta",
        "labels", "label_names", 10,
    ),
    "cifar100": Edition("cifar-100-python", ("train",), "test", "meta", "fine_labels", "fine_label_names", 100),
}


def load_cifar(name: str, data_dir: Path, download: bool) -> DataSet:
    """`cifar10` or `cifar100` (its 100 fine classes) from `data_dir`, 3x32x32 uint8.

    Validation is the last 5,000 training images. Raises `DataError` naming the file that is
    missing, damaged, or asks for anything but plain data.
    """
    edition = EDITIONS[name]
    folder = Path(data_dir) / edition.folder
    ensure(name, folder, download)
    class_names = read_class_names(folder / edition.meta, edition)
    train = [read_batch(folder / file_name, edition) for file_name in edition.train]
    images, labels = (np.concatenate(parts) for parts in zip(*train))
    test_images, test_labels = read_batch(folder / edition.test, edition)
    training, validation = official_splits(
        torch.from_numpy(images), torch.from_numpy(labels), VALIDATION, OFFICIAL, str(folder), len(test_labels)
    )
    test = Split(torch.from_numpy(test_images.copy()), torch.from_numpy(test_labels))
    return DataSet(
        name=name, train=training, validation=validation, test=test,
        class_names=class_names, normalisation=scale_only(255, 3), augment=True, drop_last=True,
    )


def read_batch(path: Path, edition: Edition) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3, 32, 32) uint8, read-only, and labels (n,) int64 of one batch file."""
    batch = read_dictionary(path)
    data, labels = batch.get("data"), batch.get(edition.labels_key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != PIXELS:
        found = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise DataError(f"{path}: 'data' is {found}, expected uint8 (n, {PIXELS})")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataError(f"{path}: '{edition.labels_key}' is no list of whole numbers")
    if len(labels) != len(data):
        raise DataError(f"{path}: {len(data)} images but {len(labels)} labels")
    if labels and not 0 <= min(labels) <= max(labels) < edition.num_classes:
        raise DataError(f"{path}: labels {min(labels)}..{max(labels)}, expected 0..{edition.num_classes - 1}")
    return data.reshape(-1, *SHAPE), np.array(labels, dtype=np.int64)


def read_class_names(path: Path, edition: Edition) -> tuple[str, ...]:
    """The class names of a meta file, in order of label."""
    names = read_dictionary(path).get(edition.names_key)
    if not isinstance(names, list) or len(names) != edition.num_classes:
        raise DataError(f"{path}: '{edition.names_key}' does not list {edition.num_classes} names")
    if not all(isinstance(name, (str, bytes)) for name in names):
        raise DataError(f"{path}: '{edition.names_key}' holds something that is no name")
    with reading(path):
        return tuple(name if isinstance(name, str) else name.decode("utf-8") for name in names)


def read_dictionary(path: Path) -> dict[str, Any]:
    """The pickled dictionary of one file, keys as text (Python 2 wrote them as bytes)."""
    regular_file_size(path, at_most=1 << 30)
    with reading(path):
        content = load_plain(path.read_bytes())
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, expected a dictionary")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in content.items()}
