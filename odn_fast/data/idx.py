"""IDX files: MNIST, Fashion-MNIST and the letters of EMNIST.

An IDX file is: two zero bytes, a type (8 = unsigned byte), the number of dimensions, each dimension as a
big-endian 32-bit number, then the values. Official folders: `MNIST/raw`, `FashionMNIST/raw`,
`EMNIST/raw`, each file as it is or gzip-compressed (`.gz`).
"""

from __future__ import annotations

import gzip
import math
import os
import string
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from .dataset import DataSet, Normalisation, Split, official_splits
from .download import ensure
from .errors import DEFLATE_MAX_RATIO, DataError, reading, regular_file_size

SIDE = 28
LARGEST_COUNT = 4_000_000  # 3.1 GB of images; the largest official set has 814,255
UNSIGNED_BYTE = 8
KINDS = {1: "labels", 3: "images"}


@dataclass(frozen=True)
class Family:
    """What sets one IDX data set apart; `first_label` is the file's number of class 0.

    `validation` of the `official` training images, the last ones, are for validation.
    """

    folder: str
    prefixes: tuple[str, str]  # of the training and test files
    class_names: tuple[str, ...]
    mean: float
    std: float
    validation: int
    official: int
    first_label: int = 0
    transposed: bool = False


FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
LETTERS = ("emnist-letters-train", "emnist-letters-test")
FAMILIES = {
    "mnist": Family("MNIST", ("train", "t10k"), tuple(string.digits), 0.1307, 0.3081, 10_000, 60_000),
    "fashion-mnist": Family("FashionMNIST", ("train", "t10k"), FASHION, 0.2860, 0.3530, 10_000, 60_000),
    "emnist-letters": Family(
        "EMNIST", LETTERS, tuple(string.ascii_lowercase), 0.1307, 0.3081, 12_480, 124_800, first_label=1, transposed=True
    ),
}


def load_idx(name: str, data_dir: Path, download: bool) -> DataSet:
    """`mnist`, `fashion-mnist` or `emnist-letters` from `data_dir`, 1x28x28 uint8.

    Validation is the end of the official training set: 10,000 images, of EMNIST-letters 10 %. EMNIST
    labels 1..26 become 0..25, and its images, which the official files hold transposed, are turned upright.
    Raises `DataError` naming the file that is missing or damaged.
    """
    family = FAMILIES[name]
    folder = Path(data_dir) / family.folder / "raw"
    ensure(name, folder, download)
    train, test = (read_pair(folder, prefix, family) for prefix in family.prefixes)
    training, validation = official_splits(
        train.images, train.labels, family.validation, family.official, str(folder), len(test))
    return DataSet(
        name=name, train=training, validation=validation, test=test, class_names=family.class_names,
        normalisation=Normalisation(255.0, (family.mean,), (family.std,)), augment=False, drop_last=False,
    )


def read_pair(folder: Path, prefix: str, family: Family) -> Split:
    """Images (N, 1, 28, 28) and labels (N,) of one official pair of files."""
    image_file = with_or_without_gz(folder / f"{prefix}-images-idx3-ubyte")
    label_file = with_or_without_gz(folder / f"{prefix}-labels-idx1-ubyte")
    labels = read_idx(label_file, dimensions=1)
    images = read_idx(image_file, dimensions=3)
    if len(images) != len(labels):
        raise DataError(f"{image_file}: {len(images)} images, but {label_file.name} holds {len(labels)} labels; get both files again")
    first, last = family.first_label, family.first_label + len(family.class_names) - 1
    if len(labels) and not first <= labels.min() <= labels.max() <= last:
        raise DataError(f"{label_file}: labels {labels.min()}..{labels.max()}, expected {first}..{last}")
    if family.transposed:
        images = np.ascontiguousarray(images.transpose(0, 2, 1))
    return Split(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64) - first))


def with_or_without_gz(path: Path) -> Path:
    """The uncompressed file where it exists, else its `.gz`."""
    return path if os.path.exists(path) else path.with_name(path.name + ".gz")


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The unsigned bytes of one IDX file, in the shape its header states; gzip where the name ends in `.gz`.

    `dimensions`: 3 for images, 1 for labels. What the header claims is checked against the length of the
    file before anything is allocated, and a `.gz` is never unpacked beyond it. Raises `DataError`
    where header and length disagree, even by one byte.
    """
    length = regular_file_size(path)
    with reading(path), path.open("rb") as file:
        if path.suffix != ".gz":
            shape = read_header(path, file, dimensions)
            expected = 4 + 4 * dimensions + math.prod(shape)
            if length != expected:
                raise DataError(f"{path}: {length} bytes, but its header (sizes {shape}) calls for {expected}; get the file again")
            return read_values(path, file, shape)
        with gzip.open(file) as unpacked:
            shape = read_header(path, unpacked, dimensions)
            if math.prod(shape) > DEFLATE_MAX_RATIO * length:
                raise DataError(f"{path}: header claims sizes {shape}, more than {length} compressed bytes can hold")
            values = read_values(path, unpacked, shape)
            if unpacked.read(1):  # reading to the end also makes gzip compare its checksum
                raise DataError(f"{path}: holds more than its header (sizes {shape}) states; get the file again")
            return values


def read_header(path: Path, file: BinaryIO, dimensions: int) -> tuple[int, ...]:
    """The sizes an IDX header states."""
    magic = file.read(4)
    if len(magic) < 4 or magic[:3] != bytes((0, 0, UNSIGNED_BYTE)):
        raise DataError(f"{path}: is no IDX file of unsigned bytes (it starts with {magic.hex(' ') or 'nothing'})")
    if magic[3] != dimensions:
        raise DataError(
            f"{path}: holds {KINDS.get(magic[3], f'{magic[3]} dimensions')}, expected {KINDS[dimensions]}; "
            "were image and label files swapped?"
        )
    header = file.read(4 * dimensions)
    if len(header) < 4 * dimensions:
        raise DataError(f"{path}: ends inside its header; get the file again")
    count, *sides = struct.unpack(f">{dimensions}I", header)
    if sides and sides != [SIDE, SIDE]:
        raise DataError(f"{path}: images of {sides[0]}x{sides[1]} pixels, expected {SIDE}x{SIDE}")
    if count > LARGEST_COUNT:
        raise DataError(f"{path}: its header claims {count} entries, expected at most {LARGEST_COUNT}; get the file again")
    return count, *sides


def read_values(path: Path, file: BinaryIO, shape: tuple[int, ...]) -> np.ndarray:
    """prod(shape) bytes from `file`, in one array."""
    values = np.empty(math.prod(shape), dtype=np.uint8)
    remaining = memoryview(values)
    while len(remaining):
        received = file.readinto(remaining)
        if not received:
            raise DataError(f"{path}: ends {len(remaining)} bytes early (sizes {shape}); get the file again")
        remaining = remaining[received:]
    return values.reshape(shape)
