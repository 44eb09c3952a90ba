"""A folder of pictures, one sub-folder a class: `PATH/train/ants/1.jpg` ... or `PATH/ants/1.jpg` ..."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .damage import Damage
from .dataset import DataSet, Normalisation, Split, measured_normalisation, normalisation_of_parts
from .errors import DataError, reading
from .image import SUFFIXES
from .loading import READERS, chosen_loader
from .pictures import Pictures
from .splitting import fill_missing_splits
from .streaming import plain_reader

DEFAULT_SIZE = 64
LARGEST_SIZE = 4096
SPLIT_FOLDERS = {  # in any case
    "train": ("train", "training"), "validation": ("val", "valid", "validation"), "test": ("test", "testing")}
MEASURED = 2_000  # pictures that decide the normalisation of a set that is not resident


@dataclass(frozen=True)
class Listing:
    """The pictures of one split: files, and the label of each."""

    files: list[Path]
    labels: torch.Tensor

    def at(self, positions: torch.Tensor) -> Listing:
        return Listing([self.files[position] for position in positions.tolist()], self.labels[positions])


def load_image_folder(
    path: str, image_size: int | None, val_fraction: float | None, test_fraction: float | None, seed: int, loader: str = "auto",
    random_crop: bool = False, corrupt_limit: int = 10, device: str = "cpu",
) -> DataSet:
    """Pictures below `path` as 3 x image_size x image_size uint8 (default 64), /255 and normalised by the training split.

    With `path/train` there, `path/val` and `path/test` are the other splits; else `path` itself holds
    the classes. A split without a folder is taken from training, stratified by `seed`: validation by
    `val_fraction` (default 0.1), test by `test_fraction` (default: there is none). Classes are the sorted
    names of the sub-folders, alike in every split; pictures in folders below a class belong to it; hidden
    files are ignored, other files that are no pictures are ignored with a warning. Up to `corrupt_limit` damaged
    pictures are reported, and others of their class stand in for them. `loader`: resident, dali, torch, or auto,
    which chooses for `device`. `random_crop`: training cuts random-resized crops, and flips them. Pictures that are not
    resident are normalised by a sample of `MEASURED` of the training split. Raises `DataError` naming the folder or
    file: no classes, an empty class, too many damaged pictures, classes that differ, a loader that cannot be.
    """
    root = Path(path).expanduser()
    size = DEFAULT_SIZE if image_size is None else image_size
    if not 1 <= size <= LARGEST_SIZE:
        raise DataError(f"image_size is {size}, expected 1 to {LARGEST_SIZE} pixels")
    folders = split_folders(root)
    class_names = sub_folders(folders["train"])
    if len(class_names) < 2:
        raise DataError(f"{folders['train']}: has one sub-folder only, {class_names[0]}; expected one for each of at least two classes")
    listings = {split: list_pictures(folder, class_names, folders["train"]) for split, folder in folders.items()}
    listings = fill_missing_splits(listings, val_fraction, test_fraction, seed, str(root))
    count = sum(len(listing.files) for listing in listings.values())
    loader, reason = chosen_loader(loader, str(root), count, size, random_crop, device)
    damage = Damage(corrupt_limit)
    splits: dict[str, Split | Pictures] = {
        split: Pictures(listing.files, listing.labels, listing.labels, size, plain_reader, damage, root, random_crop)
        for split, listing in listings.items()}
    if loader == "resident":
        splits = {split: pictures.resident() for split, pictures in splits.items()}
        normalisation = measured_normalisation(splits["train"].images)
    else:
        normalisation = sampled_normalisation(splits["train"])
        splits = {split: replace(pictures, reader=READERS[loader]) for split, pictures in splits.items()}
    return DataSet(
        name=f"imagefolder:{path}", train=splits["train"], validation=splits["validation"], test=splits.get("test"),
        class_names=class_names, normalisation=normalisation, augment=random_crop, drop_last=False,
        loader=loader, loader_reason=reason, damage=damage,
    )


def sampled_normalisation(pictures: Pictures) -> Normalisation:
    """That of at most `MEASURED` pictures, the same ones in every run and with every loader."""
    chosen = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))[:MEASURED].sort().values
    return normalisation_of_parts(images for images, _ in pictures.at(chosen).in_order(64))


def split_folders(root: Path) -> dict[str, Path]:
    """Split -> folder of its classes; the training split alone where `root` itself holds the classes."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected one with a sub-folder for each class")
    found = {split: [root / name for name in visible_folders(root) if name.lower() in names]
             for split, names in SPLIT_FOLDERS.items()}
    for split, folders in found.items():
        if len(folders) > 1:
            raise DataError(f"{root}: both {folders[0].name} and {folders[1].name} could be the {split} split; keep one")
    train = found["train"]
    if not train or not visible_folders(train[0]):
        others = found["validation"] + found["test"]
        if train and others:
            raise DataError(f"{train[0]}: has no sub-folders; expected one for each class")
        if any(visible_folders(other) for other in others):
            raise DataError(f"{root}: holds {others[0].name} but no folder train; put the training images there")
        return {"train": root}
    return {split: folders[0] for split, folders in found.items() if folders}


def sub_folders(folder: Path) -> tuple[str, ...]:
    """The sorted names of the folders in `folder`: its classes, at least one."""
    names = visible_folders(folder)
    if not names:
        raise DataError(f"{folder}: has no sub-folders; expected one for each class")
    return names


def visible_folders(folder: Path) -> tuple[str, ...]:
    with reading(folder):
        return tuple(sorted(child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")))


def list_pictures(folder: Path, class_names: tuple[str, ...], train_folder: Path) -> Listing:
    """Every picture of one split, class by class, sorted by path."""
    if (found := sub_folders(folder)) != class_names:
        differing = sorted(set(found) ^ set(class_names))[0]
        raise DataError(f"{folder}: its classes differ from those of {train_folder} ({differing} is in one only)")
    files, labels, others = [], [], []
    for label, class_name in enumerate(class_names):
        everything = files_below(folder / class_name)
        pictures = [file for file in everything if file.suffix.lower() in SUFFIXES]
        others += [file for file in everything if file.suffix.lower() not in SUFFIXES]
        if not pictures:
            raise DataError(f"{folder / class_name}: holds no pictures ({' '.join(SUFFIXES)})")
        files += pictures
        labels += [label] * len(pictures)
    if others:
        warnings.warn(f"{folder}: {len(others)} files ignored that are no pictures by their names, such as {others[0]}", stacklevel=4)
    return Listing(files, torch.tensor(labels, dtype=torch.int64))


def files_below(folder: Path) -> list[Path]:
    """Every file in `folder` and the folders below it, sorted; nothing hidden, no folder twice."""
    files, seen = [], set()

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error

    for place, names, file_names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(place)
        names[:] = [] if real in seen else sorted(name for name in names if not name.startswith("."))
        if real not in seen:  # a link that leads back up would go round in circles
            seen.add(real)
            files += [Path(place, name) for name in file_names if not name.startswith(".")]
    return sorted(files)
