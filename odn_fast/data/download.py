"""Fetches official files that are missing, and puts none in place before its MD5 is right.

A file arrives beside its target under a temporary name, is cut off at a size limit, is checked, and only then
renamed. Of an archive, the wanted members alone are taken out, by name, each to a target this module names:
no path in an archive is ever used.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tarfile
import urllib.request
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO, Iterator

from .errors import DataError, first_line, reading

TIMEOUT_SECONDS = 20.0  # without an answer; a slow download that keeps moving may take as long as it needs
CHUNK = 1 << 20
MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Source:
    """One official file: where it is, what it must be, and the file names it provides.

    `megabytes` bounds its size and that of each member; `members` maps file name -> path inside the
    archive, and is empty where the file itself, under its own name, is what is wanted.
    """

    url: str
    md5: str
    megabytes: int
    members: dict[str, str]

    def provides(self) -> tuple[str, ...]:
        return tuple(self.members) or (self.url.rsplit("/", 1)[1],)


def idx_sources(base: str, checksums: tuple[str, ...]) -> tuple[Source, ...]:
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return tuple(Source(f"{base}{name}-ubyte.gz", md5, 40, {}) for name, md5 in zip(names, checksums))


def cifar_source(archive: str, md5: str, folder: str, files: tuple[str, ...]) -> tuple[Source, ...]:
    return (Source(f"https://www.cs.toronto.edu/~kriz/{archive}", md5, 200, {file: f"{folder}/{file}" for file in files}),)


LETTER_FILES = tuple(
    f"emnist-letters-{part}-{kind}-ubyte.gz" for part in ("train", "test") for kind in ("images-idx3", "labels-idx1")
)
SOURCES: dict[str, tuple[Source, ...]] = {
    "mnist": idx_sources(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432",
         "9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c"),
    ),
    "fashion-mnist": idx_sources(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe",
         "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310"),
    ),
    "emnist-letters": (
        Source("https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip", "58c8d27c78d21e728a6bc7b3cc06412e", 600,
               {file: f"gzip/{file}" for file in LETTER_FILES}),
    ),
    "cifar10": cifar_source(
        "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", "cifar-10-batches-py",
        (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"),
    ),
    "cifar100": cifar_source(
        "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", "cifar-100-python", ("train", "test", "meta")
    ),
    "svhn": (
        Source("http://ufldl.stanford.edu/housenumbers/train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373", 200, {}),
        Source("http://ufldl.stanford.edu/housenumbers/test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3", 200, {}),
    ),
}


def ensure(name: str, folder: Path, download: bool = True) -> None:
    """Make sure that the official files of data set `name` lie in `folder`, fetching what is missing.

    A `.gz` counts as there when its uncompressed form is. Nothing is fetched, and no connection opened,
    where all files are there. Raises `DataError` naming the file, the folder and the address where
    `download` is off, there is no network, the checksum is wrong, or the disk is full.
    """
    for source in SOURCES[name]:
        missing = [file for file in source.provides() if not is_there(folder / file)]
        if not missing:
            continue
        if not download:
            raise DataError(f"{name}: {', '.join(missing)} not found in {folder}; put {source.url} there, or allow the download")
        fetch(source, folder, missing)


def is_there(path: Path) -> bool:
    # os.path, because Path.exists raises where a folder above may not be read
    return os.path.exists(path) or (path.suffix == ".gz" and os.path.exists(path.with_suffix("")))


def fetch(source: Source, folder: Path, missing: list[str]) -> None:
    """Download `source`, check it, and put the `missing` files of it into `folder`."""
    file_name = source.url.rsplit("/", 1)[1]
    print(f"downloading {source.url} to {folder}", file=sys.stderr)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary(folder / file_name) as part:
            received, md5 = receive(source, part)
            if md5 != source.md5:
                raise DataError(f"the {received} bytes received have MD5 {md5}, expected {source.md5}")
            if source.members:
                with reading(part):
                    unpack(source, part, folder, missing)
            else:
                os.replace(part, folder / file_name)
    except (OSError, HTTPException, DataError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DataError(
            f"{', '.join(missing)} not in {folder}, and the download of {source.url} failed ({reason}); "
            f"get {file_name} there by other means and put it, or the files in it, into {folder}"
        ) from error


@contextmanager
def temporary(target: Path) -> Iterator[Path]:
    """A name beside `target` that no other process uses; what is left under it is deleted at the end."""
    path = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def receive(source: Source, path: Path) -> tuple[int, str]:
    """Write the answer of `source.url` to `path`; returns its length in bytes and its MD5."""
    digest, received = hashlib.md5(usedforsecurity=False), 0
    request = urllib.request.Request(source.url, headers={"User-Agent": "odn_fast"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer, path.open("wb") as file:
        while chunk := answer.read(CHUNK):
            received += len(chunk)
            if received > source.megabytes * MEGABYTE:
                raise DataError(f"the answer is longer than {source.megabytes} MB")
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return received, digest.hexdigest()


def unpack(source: Source, archive: Path, folder: Path, missing: list[str]) -> None:
    """Take the `missing` files out of `archive` (.zip or .tar.gz), each checked for its size."""
    if source.url.endswith(".zip"):
        with zipfile.ZipFile(archive) as members:
            for file in missing:
                with members.open(source.members[file]) as content:
                    place(content, folder / file, source)
    else:
        with tarfile.open(archive, "r:gz") as members:
            for file in missing:
                member = members.getmember(source.members[file])
                content = members.extractfile(member) if member.isreg() else None
                if content is None:
                    raise DataError(f"{source.members[file]} in the archive is no regular file")
                place(content, folder / file, source)


def place(content: BinaryIO, target: Path, source: Source) -> None:
    """Write `content` to `target`, whole or not at all."""
    with temporary(target) as part:
        written = 0
        with part.open("wb") as file:
            while chunk := content.read(CHUNK):
                written += len(chunk)
                if written > source.megabytes * MEGABYTE:
                    raise DataError(f"{target.name} in the archive is longer than {source.megabytes} MB")
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
