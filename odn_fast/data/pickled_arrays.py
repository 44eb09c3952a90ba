"""Numpy arrays inside a pickle: the three names, two calls and two states that numpy writes, and no others.

Used by `plain_pickle`; nothing here looks a name up or calls what a file names.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from .errors import DataError

ARRAY_MAKERS = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")  # numpy 1, numpy 2
KNOWN_NAMES = (*ARRAY_MAKERS, "numpy.ndarray", "numpy.dtype", "_codecs.encode")
ELEMENT_TYPE = re.compile(r"[|<>=]?(b1|[iu][1248]|f[248])")
BYTE_ORDERS = ("<", ">", "|", "=", b"<", b">", b"|", b"=")


class Name:
    """A global name met in the file: text. Raises `DataError` unless numpy's arrays need it."""

    def __init__(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise DataError("pickle is damaged: a name that is no text; refused")
        self.text = f"{module}.{name}"
        if self.text not in KNOWN_NAMES:
            raise DataError(f"pickle asks for {self.text[:80]!r}, which is no plain data; refused, nothing was run")


class PendingType:
    """A numpy element type between its constructor's arguments and its state (the byte order)."""

    def __init__(self, code: str) -> None:
        self.type = np.dtype(code)


class PendingArray:
    """A numpy array between `_reconstruct` and its state; `value` is None until the state has come."""

    def __init__(self) -> None:
        self.value: np.ndarray | None = None


def finished(value: Any) -> Any:
    """`value` as data: the array of a finished PendingArray. Names and unfinished values are no data."""
    if type(value) is PendingArray and value.value is not None:
        return value.value
    if type(value) in (Name, PendingType, PendingArray):
        raise DataError("pickle holds a type or an unfinished array where data belongs; refused")
    return value


def result_of(function: Any, arguments: Any) -> PendingArray | PendingType | bytes:
    """What a call builds: an array, an element type, or bytes that protocol 2 had to write as text."""
    name = function.text if type(function) is Name else "something that has no name"
    if type(arguments) is tuple and arguments:
        first, *others = arguments
        if name in ARRAY_MAKERS and type(first) is Name and first.text == "numpy.ndarray":
            return PendingArray()
        if name == "numpy.dtype" and type(first) in (str, bytes):
            code = as_text(first)
            if not ELEMENT_TYPE.fullmatch(code):
                raise DataError(f"pickle holds an array of type {code[:20]!r}; only plain numbers are read, the rest is refused")
            return PendingType(code)
        if name == "_codecs.encode" and type(first) is str and others in (["latin1"], [b"latin1"]):
            try:
                return first.encode("latin1")
            except UnicodeEncodeError as error:
                raise DataError("pickle is damaged: bytes beyond 255") from error
    raise DataError(f"pickle calls {name} in a way numpy does not; refused")


def set_state(target: Any, state: Any) -> None:
    """The byte order of an element type, or the shape and bytes of an array."""
    if type(state) is not tuple or type(target) not in (PendingType, PendingArray):
        raise DataError("pickle sets the state of something that is no array; refused")
    if type(target) is PendingType:
        target.type = ordered(target.type, state)
    else:
        target.value = array_of(state)


def ordered(element: np.dtype, state: tuple[Any, ...]) -> np.dtype:
    """`element` in the byte order of (version, order, subarray, names, fields, item size, alignment, flags)."""
    plain = len(state) >= 5 and type(state[1]) in (str, bytes) and state[1] in BYTE_ORDERS
    if not plain or any(part is not None for part in state[2:5]):
        raise DataError("pickle holds an array of structured type; only plain numbers are read")
    order = as_text(state[1])
    return element if order == "|" else element.newbyteorder(order)


def array_of(state: tuple[Any, ...]) -> np.ndarray:
    """(version, shape, element type, column-major?, bytes) -> array, read-only, over those very bytes."""
    if len(state) != 5:
        raise DataError("pickle is damaged: an array's state has five parts")
    _, shape, element, column_major, data = state
    if type(shape) is not tuple or len(shape) > 8 or not all(type(size) is int and 0 <= size < 1 << 40 for size in shape):
        raise DataError("pickle is damaged: an array without a proper shape")
    if type(element) is not PendingType or type(data) is not bytes or type(column_major) not in (bool, int):
        raise DataError("pickle is damaged: an array without type or bytes")
    if math.prod(shape) * element.type.itemsize != len(data):
        raise DataError(f"pickle is damaged: an array of shape {shape} with {len(data)} bytes")
    return np.frombuffer(data, element.type).reshape(shape, order="F" if column_major else "C")


def as_text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("latin1")
