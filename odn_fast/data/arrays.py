"""Images that are arrays already: `npz:FILE`, numpy arrays, tensors, or a torch `Dataset`."""

from __future__ import annotations

import math
import operator
import zipfile
from pathlib import Path
from typing import IO, Any, Sequence

import numpy as np
import torch
from torch import Tensor

from .dataset import DataSet, Split, measured_normalisation, scale_only
from .errors import DEFLATE_MAX_RATIO, DataError, first_line, reading, regular_file_size
from .splitting import DEFAULT_VALIDATION, fill_missing_splits

KEYS = ("x_train", "y_train", "x_val", "y_val", "x_test", "y_test", "x", "y")
LARGEST_LABEL = 1 << 31


def load_npz(path: str, val_fraction: float | None, test_fraction: float | None, seed: int) -> DataSet:
    """A `.npz` file with x_train, y_train[, x_val, y_val][, x_test, y_test], or x, y.

    Images and labels as `from_arrays` takes them. A split that is not there is taken from training,
    stratified by `seed`: validation by `val_fraction` (default 0.1), test by `test_fraction` (default:
    there is none). No pickled object is ever loaded. Raises `DataError` naming the file.
    """
    file = Path(path).expanduser()
    arrays = read_npz(file)
    if ("x" in arrays) == ("x_train" in arrays):
        raise DataError(f"{file}: holds {', '.join(sorted(arrays)) or 'nothing'}; expected x_train and y_train, or x and y")
    splits = {}
    for split, suffix in (("train", "" if "x" in arrays else "_train"), ("validation", "_val"), ("test", "_test")):
        images, labels = arrays.get(f"x{suffix}"), arrays.get(f"y{suffix}")
        if (images is None) != (labels is None):
            raise DataError(f"{file}: has one of x{suffix} and y{suffix} without the other")
        if images is not None:
            splits[split] = pair_split(images, labels, f"{file}: x{suffix}, y{suffix}")
    class_names = names_of_classes(splits, None, str(file))
    return assemble(f"npz:{path}", fill_missing_splits(splits, val_fraction, test_fraction, seed, str(file)), class_names)


def from_arrays(
    train: Any,
    validation: Any = None,
    test: Any = None,
    class_names: Sequence[str] | None = None,
    val_fraction: float = DEFAULT_VALIDATION,
    seed: int = 0,
) -> DataSet:
    """A data set from (x, y) pairs of arrays or tensors, or from torch Datasets yielding (image, int).

    x: (N, H, W), (N, C, H, W) or, with C 1 or 3, (N, H, W, C); where both ends could be channels, they come
    first. Whole numbers 0..255 become uint8 and are normalised by the training split; floats are taken as
    they are and must be finite. y: (N,) whole numbers, classes 0..K-1. Without `validation`,
    `val_fraction` of the training images becomes it, stratified by `seed`. Everything is copied.
    Raises `DataError`.
    """
    given = (("train", train), ("validation", validation), ("test", test))
    splits = {name: as_split(source, name) for name, source in given if source is not None}
    if "train" not in splits:
        raise DataError("train is missing; give a pair (x, y) or a torch Dataset")
    class_names = names_of_classes(splits, class_names, "arrays")
    fraction = val_fraction if validation is None else None
    return assemble("arrays", fill_missing_splits(splits, fraction, None, seed, "arrays"), class_names)


def names_of_classes(splits: dict[str, Split], class_names: Sequence[str] | None, where: str) -> tuple[str, ...]:
    """`class_names`, or the numbers 0..K-1, checked against the labels before anything is counted by class."""
    largest = max(int(split.labels.max()) for split in splits.values())
    if class_names is not None:
        if largest >= len(class_names):
            raise DataError(f"{where}: labels run to {largest}, but there are {len(class_names)} class names")
        return tuple(map(str, class_names))
    images = len(splits["train"])
    if largest == 0:
        raise DataError(f"{where}: every label is 0; give images of at least two classes, or class_names")
    if largest >= images:  # each class needs a training image; a stray label must not make a billion classes
        raise DataError(f"{where}: labels run to {largest} with {images} training images; number the classes 0..K-1")
    present = torch.cat([split.labels for split in splits.values()]).unique()
    if len(present) <= largest:
        absent = next(label for label in range(largest) if label not in present)
        raise DataError(f"{where}: labels run to {largest}, but none is {absent}; number the classes 0..K-1, or give class_names")
    return tuple(map(str, range(largest + 1)))


def assemble(name: str, splits: dict[str, Split], class_names: tuple[str, ...]) -> DataSet:
    """The data set of these splits; bytes are normalised by the training split, floats not at all."""
    images = splits["train"].images
    normalisation = measured_normalisation(images) if images.dtype == torch.uint8 else scale_only(1, images.shape[1])
    return DataSet(
        name=name, train=splits["train"], validation=splits["validation"], test=splits.get("test"),
        class_names=class_names, normalisation=normalisation, augment=False, drop_last=False,
    )


def as_split(source: Any, where: str) -> Split:
    """A pair (x, y), or a torch Dataset, as a Split of its own memory."""
    if isinstance(source, (tuple, list)) and len(source) == 2:
        images, labels = source
    elif hasattr(source, "__getitem__") and hasattr(source, "__len__") and not isinstance(source, (np.ndarray, Tensor, str, dict)):
        images, labels = stack(source, where)
    else:
        raise DataError(f"{where}: is a {type(source).__name__}, expected a pair (x, y) or a torch Dataset with a length")
    return pair_split(images, labels, where)


def pair_split(images: Any, labels: Any, where: str) -> Split:
    """Images and labels of any kind `from_arrays` takes, as a Split of its own memory."""
    x, y = as_images(images, where), as_labels(labels, where)
    if len(x) != len(y):
        raise DataError(f"{where}: {len(x)} images but {len(y)} labels; there must be one label an image")
    return Split(x, y)


def stack(dataset: Any, where: str) -> tuple[np.ndarray, list[int]]:
    """Every (image, label) of a torch Dataset; images are tensors, arrays or Pillow pictures, all of one shape."""
    images, labels = [], []
    for position in range(len(dataset)):
        try:
            image, label = dataset[position]
            label = operator.index(label)
        except (TypeError, ValueError) as error:
            raise DataError(f"{where}: item {position} is no pair of image and whole number ({first_line(error)})") from error
        images.append(as_numpy(image, f"{where}: item {position}"))
        labels.append(label)
        if images[-1].shape != images[0].shape or images[-1].dtype != images[0].dtype:
            raise DataError(
                f"{where}: item {position} is {images[-1].dtype} {images[-1].shape}, item 0 {images[0].dtype} "
                f"{images[0].shape}; resize the images to one shape"
            )
    return np.stack(images) if images else np.empty((0, 1, 1), np.uint8), labels


def as_numpy(array: Any, where: str) -> np.ndarray:
    try:
        if isinstance(array, Tensor):
            array = array.detach().cpu()
            array = array.float() if array.is_floating_point() else array  # numpy has no bfloat16
        return np.asarray(array)
    except (TypeError, ValueError) as error:  # lists of unequal length, sparse tensors
        raise DataError(f"{where}: is no array ({first_line(error)})") from error


def as_images(array: Any, where: str) -> Tensor:
    """(N, C, H, W), uint8 or finite float32, a copy; layouts as in `from_arrays`."""
    array = as_numpy(array, where)
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise DataError(f"{where}: has shape {array.shape}, expected images (N, H, W), (N, C, H, W) or (N, H, W, C), none of them 0")
    if array.ndim == 3:
        array = array[:, None]
    elif array.shape[1] not in (1, 3) and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    elif array.shape[1] not in (1, 3) and array.shape[3] in (2, 4):
        raise DataError(f"{where}: has shape {array.shape}; channels that come last must be 1 or 3, put others first: (N, C, H, W)")
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what float32 cannot hold turns infinite, and is refused below
            images = torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
        if not bool(torch.isfinite(images).all()):
            raise DataError(f"{where}: holds numbers that are not finite; clean the images first")
        return images
    if array.dtype.kind not in "ui":
        raise DataError(f"{where}: is of type {array.dtype}, expected whole numbers 0..255 or floats")
    if array.dtype != np.uint8 and (array.min() < 0 or array.max() > 255):
        raise DataError(f"{where}: values {array.min()}..{array.max()}, expected 0..255; give other ranges as floats")
    return torch.from_numpy(np.array(array, dtype=np.uint8, order="C"))


def as_labels(array: Any, where: str) -> Tensor:
    """(N,) int64, a copy, of whole numbers from 0 on; (N, 1) is taken too."""
    array = as_numpy(array, where)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or array.dtype.kind not in "ui":
        raise DataError(f"{where}: is {array.dtype} {array.shape}, expected labels (N,) of whole numbers 0..K-1")
    if array.size and (array.min() < 0 or array.max() >= LARGEST_LABEL):
        raise DataError(f"{where}: labels {array.min()}..{array.max()}, expected 0..K-1")
    return torch.from_numpy(np.array(array, dtype=np.int64, order="C"))


def read_npz(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by name, each checked against the length of its member before it is read."""
    regular_file_size(file)
    arrays: dict[str, np.ndarray] = {}
    with reading(file), zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            key = member.filename.removesuffix(".npy")
            if key not in KEYS or key in arrays:
                raise DataError(f"{file}: holds {member.filename[:50]!r}; expected only {', '.join(KEYS)}, each once")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DataError(f"{file}: {key} is compressed in a way numpy does not write; save it again with numpy.savez")
            if member.file_size > DEFLATE_MAX_RATIO * member.compress_size:
                raise DataError(f"{file}: {key} claims {member.file_size} bytes, more than {member.compress_size} compressed ones can hold")
            with archive.open(member) as content:
                arrays[key] = read_npy(content, member.file_size, f"{file}: {key}")
    return arrays


def read_npy(content: IO[bytes], length: int, where: str) -> np.ndarray:
    """One .npy of plain numbers, `length` bytes long; read-only."""
    version = np.lib.format.read_magic(content)
    if version not in ((1, 0), (2, 0)):
        raise DataError(f"{where}: .npy version {version}, expected 1.0 or 2.0")
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, column_major, dtype = header(content)
    if dtype.kind not in "uifb":  # object arrays are pickles, and are refused here with the rest
        raise DataError(f"{where}: is of type {str(dtype)[:50]}; only arrays of numbers are read")
    start, size = content.tell(), math.prod(shape) * dtype.itemsize
    if start + size != length:
        raise DataError(f"{where}: header claims shape {shape}, {size} bytes, but {length - start} follow")
    data = content.read()  # to the end, so that zipfile compares its checksum
    return np.frombuffer(data, dtype).reshape(shape, order="F" if column_major else "C")
