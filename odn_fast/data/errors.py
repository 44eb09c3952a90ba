"""The one error of the data readers, and the guards that turn every other error into it.

A reader opens files that came from somewhere else: cut short, swapped, damaged, or made to do harm.
Whatever is wrong with one, the caller gets a `DataError` of one line that names the file.
"""

from __future__ import annotations

import importlib
import stat
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Iterator

DEFLATE_MAX_RATIO = 1032  # no deflate stream (gzip, zip, zlib) grows by more, so no honest header claims more


class DataError(ValueError):
    """Data that cannot be used: one line that says what is wrong, what was expected and what to do."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, cut to 200 characters, or the name of its type where it has none."""
    return next(iter(str(error).strip().splitlines()), "")[:200] or type(error).__name__


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a damaged `path` makes a library raise into one `DataError`.

    The list of what zlib, zipfile, scipy and Pillow raise on random bytes is open-ended (struct.error,
    IndexError, NotImplementedError, RecursionError, ...), so every `Exception` counts as damage here;
    the original stays attached as the cause. A DataError that does not name `path` yet is given its name.
    """
    try:
        yield
    except DataError as error:
        if str(path) in str(error):
            raise
        raise DataError(f"{path}: {error}") from error
    except MemoryError as error:
        raise DataError(f"{path}: does not fit into memory; the file is damaged or too large for this machine") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from error
    except Exception as error:
        raise DataError(f"{path}: is damaged or of another format ({type(error).__name__}: {first_line(error)})") from error


def regular_file_size(path: Path, at_most: int | None = None) -> int:
    """Bytes in `path`.

    Raises `DataError` where it is missing, empty, larger than `at_most` bytes, or not a regular file: opening
    a named pipe would wait for ever, and a device never ends.
    """
    with reading(path):
        status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise DataError(f"{path}: is a folder, expected a file")
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: is not a regular file")
    if status.st_size == 0:
        raise DataError(f"{path}: is empty; get the file again")
    if at_most is not None and status.st_size > at_most:
        raise DataError(f"{path}: {status.st_size} bytes, expected at most {at_most}; get the file again")
    return status.st_size


def needs(module: str, package: str, purpose: str) -> ModuleType:
    """Import an optional `module`, or raise a `DataError` that names the `package` to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"{purpose} needs {package}: pip install {package}") from error
