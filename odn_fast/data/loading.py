"""Which loader makes the batches of a data set: `--loader auto|resident|dali|torch`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from .batches import Batches, Source
from .dali import PACKAGE, ArrayBatches, dali_reader, need_dali
from .dataset import DataSet, Split
from .errors import DataError
from .pictures import Pictures, Reader
from .streaming import PictureBatches, plain_reader

LOADERS = ("auto", "resident", "dali", "torch")
READERS: dict[str, Reader] = {"dali": dali_reader, "torch": plain_reader}
SHARE = 0.5  # of the memory that there is: up to it, auto keeps decoded pictures resident
MOST = 0.8  # of the machine's memory: beyond it, keeping them is refused


def training_batches(data: DataSet, batch_size: int, seed: int, augment: bool, split: Split | Pictures | None = None) -> Source:
    """Shuffled training batches of a data set, as its loader makes them; of `split` in place of its training split."""
    split = data.train if split is None else split
    kind = PictureBatches if isinstance(split, Pictures) else ArrayBatches if data.loader == "dali" else Batches
    return kind(split, data.normalisation, batch_size, seed, augment=augment, drop_last=data.drop_last)


def arrays_with(data: DataSet, loader: str) -> DataSet:
    """A data set that is resident, with the loader that was asked for. Raises `DataError` where that cannot be."""
    check_array_loader(data.name, loader)
    if loader != "dali":
        return data
    if data.train.dtype != torch.uint8:
        raise DataError(f"loader: dali takes bytes, and {data.name} holds {data.train.dtype}; choose auto or resident")
    return replace(data, loader="dali", loader_reason="asked for; resident makes the same batches faster")


def check_array_loader(name: str, loader: str) -> None:
    """Refuse a loader that cannot be that of arrays, or is not installed."""
    if loader == "torch":
        raise DataError(f"loader: torch decodes picture files as they are needed, and {name} is in memory already; "
                        "choose auto, resident or dali")
    if loader == "dali":
        need_dali()


def chosen_loader(asked: str, where: str, pictures: int, size: int, random_crop: bool, device: str) -> tuple[str, str]:
    """The loader of a folder of pictures, and why: (resident, dali or torch, a reason in words).

    Raises `DataError` where the one that was asked for cannot be.
    """
    needed = pictures * 3 * size * size
    if asked == "resident":
        if random_crop:
            raise DataError("loader: resident keeps pictures at their final size, and random crops are cut from whole ones; "
                            "choose auto, dali or torch, or --crop centre")
        if needed > MOST * machine_memory():
            raise DataError(f"{where}: {pictures} pictures of {size}x{size} need {needed / 1e9:.1f} GB and this machine has "
                            f"{machine_memory() / 1e9:.1f} GB; give a smaller image_size, or choose --loader auto")
    if asked == "dali":
        need_dali()
    if asked != "auto":
        return asked, "asked for"
    memory, whose = room(device)
    if random_crop:
        why = "random crops are cut from whole pictures"
    elif needed <= SHARE * memory:
        return "resident", f"decoded pictures take {needed / 1e9:.2g} GB, at most {SHARE:.0%} of {whose} {memory / 1e9:.1f} GB"
    else:
        why = f"decoded pictures would take {needed / 1e9:.1f} GB, more than {SHARE:.0%} of {whose} {memory / 1e9:.1f} GB"
    try:
        need_dali()
    except DataError:
        return "torch", f"{why}; NVIDIA DALI, which may be faster, is not installed (pip install {PACKAGE})"
    return "dali", why


def room(device: str) -> tuple[int, str]:
    """Bytes of memory for a resident set, and whose they are: the machine's, or, if fewer, what a GPU has free."""
    machine = machine_memory()
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        free = torch.cuda.mem_get_info(device)[0]
        if free < machine:
            return free, "the GPU's free"
    return machine, "the machine's"


def machine_memory() -> int:
    """Bytes that this process may use, by the machine and by its control group."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group = Path("/sys/fs/cgroup/memory.max")
    limit = group.read_text().strip() if group.is_file() else "max"
    return min(memory, int(limit)) if limit.isdigit() else memory
