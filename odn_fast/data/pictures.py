"""A split of pictures that is not resident: files, decoded when they are asked for, by one of two readers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .damage import Damage
from .errors import DataError, reading, regular_file_size
from .split import Split

Result = TypeVar("Result")


class Request(NamedTuple):
    """Pictures that are wanted as one batch.

    positions: in the split; mirrored: whether each is flipped; numbers: (n, tries, 4) that random crops are drawn from, None
    where pictures are fitted and their centre is taken.
    """

    positions: list[int]
    mirrored: list[bool] | None = None
    numbers: Tensor | None = None

    def parts(self, most: int) -> list[Request]:
        """The same pictures in requests of at most `most`."""
        slices = [slice(first, first + most) for first in range(0, len(self.positions), most)]
        return [Request(*(None if each is None else each[part] for each in self)) for part in slices]


class Reader(Protocol):
    """How pictures are decoded: gives (n, 3, size, size) uint8, on the split's device, for every request, in order.

    It may read ahead, and has stopped to when the iterator is closed.
    """

    def __call__(self, pictures: Pictures, requests: Iterable[Request]) -> Iterator[Tensor]: ...


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures by file, with labels (N,) int64; used as a `Split` is, but decoded when they are read.

    A picture that cannot be read is replaced, at its position, by the next readable one of its class in this split, and
    reported to `damage`: so every position has an image, the same one in every epoch and process.

    Attributes:
        classes: (N,) int64, on the CPU: what `labels` were before anyone exchanged them for others.
        size: height and width that pictures are brought to.
        reader: decodes them.
        random_crop: augmented, they give random-resized crops; else, random crops out of a border, as resident images do.
        root: folder that the files lie below.
    """

    files: list[Path]
    labels: Tensor
    classes: Tensor
    size: int
    reader: Reader
    damage: Damage
    root: Path
    random_crop: bool = False
    headers: dict[Path, object] = field(default_factory=dict)  # kept by readers

    dtype = torch.uint8

    def __len__(self) -> int:
        return len(self.files)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 3, self.size, self.size

    def at(self, positions: Tensor) -> Pictures:
        """The pictures at `positions` (M,) int64, in that order."""
        places = positions.cpu()
        return replace(self, files=[self.files[place] for place in places.tolist()],
                       labels=self.labels[positions.to(self.labels.device)], classes=self.classes[places])

    def to(self, device: str) -> Pictures:
        """The same pictures, decoded to `device`."""
        return replace(self, labels=self.labels.to(device))

    def relabelled(self, labels: Tensor) -> Pictures:
        return replace(self, labels=labels)

    def in_order(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once, in order: (n, 3, size, size) uint8 and labels (n,)."""
        firsts = range(0, len(self), batch_size)
        requests = (Request(list(range(first, min(first + batch_size, len(self))))) for first in firsts)
        return zip(self.reader(self, requests), self.labels.split(batch_size))

    def read(self, position: int, read: Callable[[Path], Result]) -> Result:
        """`read` of the picture at `position`, or, while that raises `DataError`, of the next one of its class.

        Raises `DataError` where too many are damaged, or all of the class.
        """
        for candidate in self._candidates(position):
            file = self.files[candidate]
            if file in self.damage.found:
                continue
            try:
                return read(file)
            except DataError as error:
                self.damage.add(file, error)
        raise DataError(f"{self.files[position].parent}: none of the pictures of this class can be read")

    def _candidates(self, position: int) -> Iterator[int]:
        yield position
        alike = torch.nonzero(self.classes == self.classes[position]).flatten().tolist()
        place = alike.index(position)
        yield from alike[place + 1:] + alike[:place]

    def resident(self) -> Split:
        """All of them, decoded into one tensor."""
        images = torch.empty((len(self), *self.image_shape), dtype=torch.uint8)
        first = 0
        for part, _ in self.in_order(64):
            images[first:first + len(part)] = part
            first += len(part)
        return Split(images, self.labels)

    def hash_into(self, digest: hashlib._Hash, name: str) -> None:
        """What a checksum is made of: names, labels and content of the files, and their size as images; all files are read."""
        digest.update(f"{name} pictures {len(self)} {self.size}\n".encode())
        with ThreadPoolExecutor(max_workers=thread_count()) as threads:
            for file, label, content in zip(self.files, self.labels.tolist(), threads.map(_file_digest, self.files)):
                digest.update(os.fsencode(file.relative_to(self.root)) + f" {label}\n".encode() + content)  # names need be no UTF-8


def _file_digest(file: Path) -> bytes:
    digest = hashlib.sha256()
    try:
        regular_file_size(file)
        with reading(file), open(file, "rb") as content:
            while part := content.read(1 << 20):
                digest.update(part)
    except DataError:  # is reported, and stood in for, where it is decoded
        digest.update(b"unreadable")
    return digest.digest()


def thread_count() -> int:
    """Threads that read or decode pictures beside each other."""
    return min(len(os.sched_getaffinity(0)), 16)
