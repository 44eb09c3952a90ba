"""A pickle reader that can build plain data and nothing else.

A pickle is a program for a stack machine, and Python's own reader runs whatever it says. CIFAR comes as
pickles, so this module is a machine of its own that knows only the instructions for numbers, strings, lists,
tuples, dictionaries and numpy arrays. It imports nothing, calls nothing and has no object to set an attribute
on: a name such as `os.system` is a piece of text to it, and `DataError` says that it was refused.
Python's C reader with a filtered `find_class` was left aside: it reserves memory for any memo index or
string length a file claims, and hashes tuples nested deep enough to overflow the stack.
"""

from __future__ import annotations

import struct
from typing import Any, Callable

from .errors import DataError
from .pickled_arrays import Name, finished, result_of, set_state

MARK = object()


def load_plain(data: bytes) -> Any:
    """The value pickled in `data`: int, float, bool, None, bytes, str, list, tuple, dict, numpy array.

    Strings written by Python 2 come as bytes. Raises `DataError` on any other instruction, name,
    array element type or dictionary key, on a file cut short and on bytes after the end.
    """
    machine = Machine(data)
    while True:
        code = machine.take(1)[0]
        if code == STOP:
            break
        instruction = INSTRUCTIONS.get(code)
        if instruction is None:
            raise DataError(f"pickle instruction 0x{code:02x} at byte {machine.position - 1} builds no plain data; refused")
        instruction(machine)
    if machine.position != len(data):
        raise DataError(f"{len(data) - machine.position} bytes follow the end of the pickle")
    value = machine.pop()
    if machine.stack:
        raise DataError("pickle is damaged: it does not end with one value")
    return finished(value)


class Machine:
    """The bytes, a position in them, the stack and the memo."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise DataError("pickle ends early; get the file again")
        part = self.data[self.position : end]
        self.position = end
        return part

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.position)
        if end < 0:
            raise DataError("pickle ends early; get the file again")
        return self.take(end + 1 - self.position)[:-1]

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is MARK:
            raise DataError("pickle is damaged: an instruction finds no value")
        return self.stack.pop()

    def pop_pair(self) -> list[Any]:
        return [self.pop(), self.pop()][::-1]

    def top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise DataError(f"pickle is damaged: expected a {kind.__name__} to fill")
        return self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        values = []
        while self.stack and self.stack[-1] is not MARK:
            values.append(self.stack.pop())
        if not self.stack:
            raise DataError("pickle is damaged: a mark is missing")
        self.stack.pop()
        return values[::-1]

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise DataError(f"pickle is damaged: it refers to value {index}, which it never stored")
        self.push(self.memo[index])

    def store(self, index: int) -> None:
        if not self.stack or self.stack[-1] is MARK:
            raise DataError("pickle is damaged: it stores a value that is not there")
        self.memo[index] = self.stack[-1]


def extend_list(machine: Machine, values: list[Any]) -> None:
    machine.top(list).extend(map(finished, values))


def set_items(machine: Machine, items: list[Any]) -> None:
    if len(items) % 2:
        raise DataError("pickle is damaged: a key without a value")
    target = machine.top(dict)
    for key, value in zip(items[::2], items[1::2]):
        if type(key) not in (str, bytes, int):  # hashing a tuple nested a million deep would crash Python
            raise DataError(f"pickle has a dictionary key of type {type(key).__name__}; refused")
        target[key] = finished(value)


def build(machine: Machine) -> None:
    state, target = machine.pop(), machine.pop()
    set_state(target, state)
    machine.push(target)


def tuple_of(count: int) -> Callable[[Machine], None]:
    return lambda machine: machine.push(tuple([machine.pop() for _ in range(count)][::-1]))


def constant(make: Callable[[], Any]) -> Callable[[Machine], None]:
    return lambda machine: machine.push(make())


def number(layout: str) -> Callable[[Machine], None]:
    return lambda machine: machine.push(machine.number(layout))


def counted(layout: str, convert: Callable[[bytes], Any]) -> Callable[[Machine], None]:
    return lambda machine: machine.push(convert(machine.take(machine.number(layout))))


def text(data: bytes) -> str:
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise DataError("pickle holds text that is no UTF-8; refused") from error


def signed(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


STOP = ord(".")
INSTRUCTIONS: dict[int, Callable[[Machine], None]] = {
    0x80: lambda machine: machine.number("<B"),  # PROTO: the protocol's number changes nothing here
    0x95: lambda machine: machine.number("<Q"),  # FRAME: a hint for buffering
    ord("("): lambda machine: machine.push(MARK),
    ord("}"): constant(dict),
    ord("]"): constant(list),
    ord(")"): constant(tuple),
    ord("N"): constant(lambda: None),
    0x88: constant(lambda: True),
    0x89: constant(lambda: False),
    0x85: tuple_of(1),
    0x86: tuple_of(2),
    0x87: tuple_of(3),
    ord("t"): lambda machine: machine.push(tuple(machine.pop_to_mark())),
    ord("a"): lambda machine: extend_list(machine, [machine.pop()]),
    ord("e"): lambda machine: extend_list(machine, machine.pop_to_mark()),
    ord("s"): lambda machine: set_items(machine, machine.pop_pair()),
    ord("u"): lambda machine: set_items(machine, machine.pop_to_mark()),
    ord("h"): lambda machine: machine.recall(machine.number("<B")),
    ord("j"): lambda machine: machine.recall(machine.number("<I")),
    ord("q"): lambda machine: machine.store(machine.number("<B")),
    ord("r"): lambda machine: machine.store(machine.number("<I")),
    0x94: lambda machine: machine.store(len(machine.memo)),
    ord("J"): number("<i"),
    ord("K"): number("<B"),
    ord("M"): number("<H"),
    ord("G"): number(">d"),
    0x8A: counted("<B", signed),
    ord("U"): counted("<B", bytes),
    ord("T"): counted("<I", bytes),
    ord("C"): counted("<B", bytes),
    ord("B"): counted("<I", bytes),
    0x8E: counted("<Q", bytes),
    0x8C: counted("<B", text),
    ord("X"): counted("<I", text),
    0x8D: counted("<Q", text),
    ord("c"): lambda machine: machine.push(Name(text(machine.line()), text(machine.line()))),
    0x93: lambda machine: machine.push(Name(*machine.pop_pair())),
    ord("R"): lambda machine: machine.push(result_of(*machine.pop_pair())),
    ord("b"): build,
}
