"""Numeric arrays out of MATLAB 5 files (`.mat`), with every size checked before it is used.

A file is 128 bytes of header, then elements: type, size, that many bytes. An element is a matrix (flags,
dimensions, name, numbers, each again an element) or a zlib stream of one. scipy.io.loadmat was left aside:
on a damaged file it can crash Python (one changed byte in a matrix's type is enough), it stops before
zlib's checksum, and it ignores what follows the last variable asked for.
"""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path
from typing import Iterator

import numpy as np

from .errors import DEFLATE_MAX_RATIO, DataError, reading, regular_file_size

HEADER_BYTES = 128
BYTE_ORDERS = {b"\x00\x01IM": "<", b"\x01\x00MI": ">"}  # version 1.0 and the letters MI, as the writing machine stored them
MATRIX, COMPRESSED = 14, 15
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}  # as stored
CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}  # as meant
COMPLEX = 0x0800


class Cursor:
    """A position in the bytes of one element."""

    def __init__(self, data: memoryview, order: str) -> None:
        self.data = data
        self.order = order

    def take(self, count: int) -> memoryview:
        if count > len(self.data):
            raise DataError(f"an element of {count} bytes is cut short after {len(self.data)}; get the file again")
        part, self.data = self.data[:count], self.data[count:]
        return part

    def tag(self) -> tuple[int, int]:
        """(type, size) of the next element."""
        return struct.unpack(f"{self.order}2I", self.take(8))

    def element(self) -> tuple[int, memoryview]:
        """(type, bytes) of the next element inside a matrix: padded to 8 bytes, up to 4 within the tag itself."""
        first = struct.unpack(f"{self.order}I", self.data[:4] if len(self.data) >= 8 else self.take(8)[:4])[0]
        if first >> 16:
            if first >> 16 > 4:
                raise DataError("an element's tag is damaged; get the file again")
            return first & 0xFFFF, self.take(8)[4 : 4 + (first >> 16)]
        kind, size = self.tag()
        part = self.take(size)
        self.take(min(-size % 8, len(self.data)))
        return kind, part


def read_mat(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays called `names`, real numbers of any type and shape; read-only, in column order.

    Raises `DataError` naming the file where one is missing, there twice, or no array of numbers, and
    where any part of the file is damaged.
    """
    regular_file_size(path, at_most=2 << 30)
    found: dict[str, np.ndarray] = {}
    with reading(path):
        data = memoryview(path.read_bytes())
        order = BYTE_ORDERS.get(bytes(data[HEADER_BYTES - 4 : HEADER_BYTES]))
        if order is None:
            raise DataError("is no MATLAB 5 file; get the official file again")
        for matrix in matrices(Cursor(data[HEADER_BYTES:], order)):
            flags, dimensions, name = matrix.element(), matrix.element(), bytes(matrix.element()[1]).decode("latin1")
            if name in found:
                raise DataError(f"holds {name} more than once")
            if name in names:
                found[name] = numbers(name, flags, dimensions, matrix)
    for name in names:
        if name not in found:
            raise DataError(f"{path}: holds no variable {name}; expected {' and '.join(names)}")
    return found


def matrices(file: Cursor) -> Iterator[Cursor]:
    """The content of every variable of a file."""
    while len(file.data):
        kind, size = file.tag()
        body = file.take(size)
        if kind == COMPRESSED:
            kind, body = unpacked(body, file.order)
        if kind == MATRIX:
            yield Cursor(body, file.order)


def unpacked(body: memoryview, order: str) -> tuple[int, memoryview]:
    """(type, bytes) of the element in a zlib stream, unpacked to the size its tag states and no further."""
    stream = zlib.decompressobj()
    tag = stream.decompress(body, 8)
    if len(tag) < 8:
        raise DataError("a compressed variable is damaged; get the file again")
    kind, size = struct.unpack(f"{order}2I", tag)
    if size > DEFLATE_MAX_RATIO * len(body):
        raise DataError(f"a variable claims {size} bytes, more than {len(body)} compressed ones can hold")
    content = stream.decompress(stream.unconsumed_tail, size + 1)  # one more would show, and brings zlib to its checksum
    if len(content) != size or not stream.eof or stream.unused_data:
        raise DataError(f"a compressed variable is damaged: {len(content)} bytes instead of {size}; get the file again")
    return kind, memoryview(content)


def numbers(name: str, flags: tuple[int, memoryview], dimensions: tuple[int, memoryview], matrix: Cursor) -> np.ndarray:
    """The array behind flags, dimensions and name."""
    if NUMBERS.get(flags[0]) != "u4" or len(flags[1]) != 8 or NUMBERS.get(dimensions[0]) != "i4" or len(dimensions[1]) % 4:
        raise DataError(f"{name} has a damaged header; get the file again")
    word = struct.unpack(f"{matrix.order}I", flags[1][:4])[0]
    shape = struct.unpack(f"{matrix.order}{len(dimensions[1]) // 4}i", dimensions[1])
    if word & 0xFF not in CLASSES or word & COMPLEX:
        raise DataError(f"{name} is no array of real numbers")
    if not 2 <= len(shape) <= 8 or min(shape) < 0:
        raise DataError(f"{name} claims shape {shape[:8]}; get the file again")
    kind, data = matrix.element()
    if kind not in NUMBERS:
        raise DataError(f"{name} holds numbers of unknown type {kind}; get the file again")
    stored = np.dtype(matrix.order + NUMBERS[kind])
    if math.prod(shape) * stored.itemsize != len(data) or len(matrix.data):
        raise DataError(f"{name} claims shape {shape}, which {len(data)} bytes do not fill; get the file again")
    return np.frombuffer(data, stored).astype(CLASSES[word & 0xFF], copy=False).reshape(shape, order="F")
