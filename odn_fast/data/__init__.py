"""Data sets: readers of official files, image folders and arrays, and the batches made of them.

`load("mnist", "data")` -> `DataSet`; `Batches(data.train, data.normalisation, 128, seed=0)`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .arrays import from_arrays, load_npz
from .batches import Batches, Source, evaluation_batches
from .cifar import EDITIONS, load_cifar
from .dataset import DataSet, Normalisation, Split
from .digits import load_digits
from .errors import DataError
from .idx import FAMILIES, load_idx
from .image import read_image
from .image_folder import load_image_folder
from .loading import LOADERS, arrays_with, check_array_loader, training_batches
from .svhn import load_svhn

if TYPE_CHECKING:
    from ..config import DataConfig

NAMES = ("mnist", "fashion-mnist", "emnist-letters", "cifar10", "cifar100", "svhn", "digits", "imagefolder:PATH", "npz:FILE")

__all__ = [
    "Batches", "DataError", "DataSet", "LOADERS", "NAMES", "Normalisation", "Source", "Split",
    "arrays_with", "evaluation_batches", "from_arrays", "load", "load_configured", "read_image", "training_batches",
]


def load(
    name: str,
    data_dir: str | Path | None = None,
    *,
    image_size: int | None = None,
    val_fraction: float | None = None,
    test_fraction: float | None = None,
    seed: int = 0,
    download: bool = True,
    loader: str = "auto",
    crop: str = "centre",
    corrupt_limit: int = 10,
    device: str = "cpu",
) -> DataSet:
    """The data set called `name`, one of `NAMES`.

    `data_dir` (default `./data`): where official files lie, in torchvision's layout; what is missing is
    downloaded there unless `download` is off. `image_size` (pixels) belongs to image folders,
    `val_fraction` and `test_fraction` to image folders and `npz` files without those splits; `seed`
    decides who is held out (digits, image folders, `npz`), official splits are fixed. `loader`: one of `LOADERS`, auto
    chooses for `device`. Of image folders, `crop` is centre or random, which training then cuts anew in every epoch, and
    `corrupt_limit` the most damaged pictures that others stand in for.
    Raises `DataError` on an unknown name, an option that makes no sense for the set, or files that
    are missing or damaged.
    """
    kind, colon, path = name.partition(":")
    if kind in ("imagefolder", "npz"):
        if not path:
            raise DataError(f"{name} lacks a path; write {kind}:{'PATH' if kind == 'imagefolder' else 'FILE'}")
    elif colon or kind not in NAMES:
        raise DataError(f"no data set is called {name!r}; choose one of {', '.join(NAMES)}")
    options = {"image_size": image_size, "val_fraction": val_fraction, "test_fraction": test_fraction}
    allowed = {"imagefolder": tuple(options), "npz": ("val_fraction", "test_fraction")}.get(kind, ())
    for option, value in options.items():
        if value is not None and option not in allowed:
            fixed = "images have one size" if option == "image_size" else "splits are fixed"
            raise DataError(f"{option} makes no sense for {name}: its {fixed}; leave the option out")
    if loader not in LOADERS or crop not in ("centre", "random"):
        raise DataError(f"loader is {loader!r} and crop {crop!r}; expected one of {', '.join(LOADERS)}, and centre or random")
    if crop == "random" and kind != "imagefolder":
        raise DataError(f"crop random makes no sense for {name}: its images have one size; leave the option out")
    if kind != "imagefolder":
        check_array_loader(name, loader)  # before anything is downloaded
    directory = Path("data" if data_dir is None else data_dir).expanduser()
    if kind == "imagefolder":
        return load_image_folder(path, image_size, val_fraction, test_fraction, seed, loader, crop == "random", corrupt_limit, device)
    if kind == "npz":
        data = load_npz(path, val_fraction, test_fraction, seed)
    elif kind in FAMILIES:
        data = load_idx(kind, directory, download)
    elif kind in EDITIONS:
        data = load_cifar(kind, directory, download)
    else:
        data = load_svhn(directory, download) if kind == "svhn" else load_digits(seed)
    return arrays_with(data, loader)


def load_configured(given: DataConfig, seed: int, device: str) -> DataSet:
    """The data set that a configuration names, its training split limited to what it says. Raises `DataError`."""
    data = load(given.dataset, given.data_dir, image_size=given.image_size, val_fraction=given.val_fraction,
                test_fraction=given.test_fraction, seed=seed, loader=given.loader, crop=given.crop, corrupt_limit=given.corrupt_limit,
                device=device)
    return data.limit_train(given.limit_train, seed) if given.limit_train else data
