"""data/plain_pickle.py: reads plain data of every pickle dialect CIFAR comes in, and cannot be made to do more."""

import os
import pickle
import struct

import numpy as np
import pytest

from odn_fast.data import DataError
from odn_fast.data.plain_pickle import load_plain

VALUES = [
    {"a": 1, b"b": [True, False, None], 3: (1.5, "text", b"bytes")},
    [0, 255, 256, 65535, 65536, -1, 2**31 - 1, -(2**31), 2**40, -(2**70)],
    [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}],
    ["", "é∀", "x" * 300, b"y" * 300, "z" * 70_000],
    {"nested": {"deeper": [[[["down"]]]]}},
    list(range(3000)),
]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_plain_values_round_trip(value, protocol):
    if protocol == 2 and "bytes" in repr(value):
        value = {"a": 1, 3: (1.5, "text")}
    assert load_plain(pickle.dumps(value, protocol)) == value


def test_shared_values_stay_shared():
    part = [1]
    value = load_plain(pickle.dumps([part, part], 4))
    assert value[0] is value[1] and value == [[1], [1]]


ARRAYS = [
    np.arange(12, dtype=np.uint8).reshape(3, 4),
    np.asfortranarray(np.arange(12, dtype=np.int64).reshape(3, 4)),
    np.arange(3, dtype=">f4"),
    np.array([True, False]),
    np.array(3.0),
]


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}-{array.shape}")
@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_arrays_of_numpy_1_and_2_round_trip(array, protocol, module):
    data = pickle.dumps({"data": array}, protocol)
    for written in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        if protocol == 4:  # names carry their length
            data = data.replace(bytes([len(written)]) + written, bytes([len(module)]) + module)
        else:
            data = data.replace(b"c" + written, b"c" + module)
    if protocol == 4:
        data = data[:2] + data[11:]  # without the frame, whose length no longer fits
    result = load_plain(data)["data"]
    assert result.dtype == array.dtype and result.shape == array.shape
    assert np.array_equal(result, array)


def python_2_batch():
    """What Python 2's cPickle wrote: byte strings with the U and T instructions, numpy 1 names."""
    image = bytes(range(256)) * 12
    return (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
        b"K\x00tb\x89T\x00\x0c\x00\x00" + image + b"tbU\x06labelsq\x08]q\x09K\x07au."
    ), image


def test_python_2_pickle():
    data, image = python_2_batch()
    batch = load_plain(data)
    assert set(batch) == {b"data", b"labels"} and batch[b"labels"] == [7]
    assert batch[b"data"].shape == (1, 3072) and batch[b"data"].tobytes() == image
    assert np.array_equal(pickle.loads(data, encoding="bytes")[b"data"], batch[b"data"])


class Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attack(module, name, *arguments, protocol=2):
    """GLOBAL, arguments, REDUCE by hand: works for names that cannot be pickled."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + pickle.dumps(arguments, protocol)[2:-1] + b"R."


NDARRAY = b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
BYTE_TYPE = b"cnumpy\ndtype\nX\x02\0\0\0u1\x89\x88\x87R"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(pickle.dumps(Runs(os.system, "touch {}")), "'posix.system'.*refused, nothing was run", id="os.system"),
        pytest.param(pickle.dumps(Runs(eval, "open({!r}, 'w')"), 2), "builtin.*eval.*refused", id="eval"),
        pytest.param(attack("os", "system", "touch {}"), "os.system.*refused", id="os.system by hand"),
        pytest.param(attack("builtins", "getattr", 1), "builtins.getattr", id="getattr"),
        pytest.param(attack("numpy", "load", "x"), "numpy.load", id="numpy.load"),
        pytest.param(attack("numpy.core.multiarray", "scalar"), "scalar", id="numpy scalar"),
        pytest.param(attack("numpy", "ndarray", (2**40,)), "in a way numpy does not", id="ndarray of a huge shape"),
        pytest.param(attack("numpy", "dtype", "O8"), "only plain numbers", id="object type"),
        pytest.param(attack("numpy", "dtype", "V999999999"), "only plain numbers", id="void type"),
        pytest.param(attack("numpy", "dtype", "S2147483647"), "only plain numbers", id="huge string type"),
        pytest.param(attack("numpy", "dtype", [("a", "O")]), "refused", id="structured type"),
        pytest.param(attack("_codecs", "encode", "x", "zlib_codec"), "refused", id="another codec"),
        pytest.param(attack("_codecs", "decode", b"x"), "_codecs.decode", id="decode"),
        pytest.param(pickle.dumps({"data": np.array([Runs(os.system, "touch {}")], dtype=object)}), "refused", id="object array"),
        pytest.param(pickle.dumps(np.zeros(3), 5), "_frombuffer.*refused", id="protocol 5 array"),
        pytest.param(b"\x80\x02\x82\x01.", "0x82", id="EXT1"),
        pytest.param(b"\x80\x02\x83\x01\x00.", "0x83", id="EXT2"),
        pytest.param(b"\x80\x02\x84\x01\x00\x00\x00.", "0x84", id="EXT4"),
        pytest.param(b"\x80\x02K\x01Q.", "0x51", id="persistent id"),
        pytest.param(b"\x80\x02P1\n.", "0x50", id="persistent id as text"),
        pytest.param(b"(ios\nsystem\n.", "0x69", id="INST"),
        pytest.param(b"(cos\nsystem\no.", "os.system", id="OBJ"),
        pytest.param(b"\x80\x02cnumpy\nndarray\n)\x81.", "0x81", id="NEWOBJ"),
        pytest.param(b"\x80\x04cnumpy\nndarray\n)}\x92.", "0x92", id="NEWOBJ_EX"),
        pytest.param(b"\x80\x02cnumpy\nndarray\n}U\x01xK\x01sb.", "no array", id="BUILD on a class"),
        pytest.param(b"\x80\x02}}U\x01xK\x01sb.", "no array", id="BUILD on a dictionary"),
        pytest.param(b"\x80\x02" + NDARRAY + b"}U\x09__class__K\x01sb.", "no array", id="BUILD with attributes"),
        pytest.param(b"\x80\x02" + NDARRAY + b"N}U\x05shapeK\x01s\x86b.", "five parts", id="BUILD with slots"),
        pytest.param(b"\x80\x02" + NDARRAY + b"(K\x01N" + BYTE_TYPE + b"\x89C\x01xtb.", "proper shape", id="no shape"),
        pytest.param(b"\x80\x02" + NDARRAY + b"(K\x01K\x02\x85" + BYTE_TYPE + b"\x89C\x01xtb.", "with 1 bytes", id="shape beyond bytes"),
        pytest.param(
            b"\x80\x02" + NDARRAY + b"(K\x01\x8a\x09" + (2**64).to_bytes(9, "little") + b"\x85" + BYTE_TYPE + b"\x89C\x01xtb.",
            "proper shape", id="huge shape",
        ),
        pytest.param(
            b"\x80\x02" + NDARRAY + b"(K\x01J\xff\xff\xff\xff\x85" + BYTE_TYPE + b"\x89C\x01xtb.", "proper shape", id="negative shape"
        ),
        pytest.param(b"\x80\x02" + NDARRAY + b"(K\x01K\x01\x85" + BYTE_TYPE + b"\x89]atb.", "damaged", id="list for bytes"),
        pytest.param(b"\x80\x02" + NDARRAY + b".", "unfinished array", id="array without state"),
        pytest.param(b"\x80\x02]cnumpy\nndarray\na.", "type or an unfinished", id="class as data"),
        pytest.param(b"\x80\x02}N\x85K\x01s.", "key of type tuple", id="tuple as key"),
        pytest.param(b"\x80\x02B\xff\xff\xff\x7fx.", "ends early", id="2 GB string"),
        pytest.param(b"\x80\x04\x8e" + b"\xff" * 8 + b"x.", "ends early", id="2^64 bytes"),
        pytest.param(b"\x80\x02K\x01r\xff\xff\xff\xff0.", "0x30", id="huge memo index"),
        pytest.param(b"\x80\x02h\x07.", "never stored", id="memo never stored"),
        pytest.param(b"\x80\x02.", "finds no value", id="nothing"),
        pytest.param(b"\x80\x02(.", "finds no value", id="nothing but a mark"),
        pytest.param(b"\x80\x02K\x01K\x02.", "one value", id="two values"),
        pytest.param(b"\x80\x02K\x01.rest", "4 bytes follow", id="bytes behind"),
        pytest.param(b"\x80\x02(K\x01.", "one value", id="open mark"),
        pytest.param(b"\x80\x02K\x01a.", "no value|expected a list", id="append to nothing"),
        pytest.param(b"\x80\x02](a.", "no value", id="append a mark"),
        pytest.param(b"\x80\x02]K\x01u.", "mark is missing", id="no mark"),
        pytest.param(b"\x80\x02}(K\x01u.", "without a value", id="odd items"),
        pytest.param(b"", "ends early", id="empty"),
        pytest.param(b"cos", "ends early", id="cut in a name"),
        pytest.param(b"\x8c\x01\xff.", "text", id="bad UTF-8"),
        pytest.param(b"\x80\x02K\x01K\x02\x93.", "refused", id="name of numbers"),
    ],
)
def test_everything_else_is_refused(tmp_path, monkeypatch, data, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        load_plain(data)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []  # nothing was run


@pytest.mark.parametrize("level", [b"\x85", b"]a"], ids=["tuples", "lists"])
def test_deep_nesting_neither_crashes_nor_is_hashed(level):
    depth = 100_000
    nested = b"N" + b"\x85" * depth if level == b"\x85" else b"]" * depth + b"a" * (depth - 1)
    value = load_plain(b"\x80\x02" + nested + b".")
    for _ in range(1000):
        value = value[0]
    assert type(value) in (tuple, list)
    with pytest.raises(DataError, match="dictionary key of type"):
        load_plain(b"\x80\x02}" + nested + b"K\x01s.")


def test_a_list_in_itself():
    value = load_plain(b"\x80\x02]q\x00h\x00a.")
    assert value[0] is value


def test_random_damage_gives_data_errors_only():
    whole, _ = python_2_batch()
    generator = np.random.default_rng(3)
    refused = 0
    for _ in range(2000):
        data = bytearray(whole)
        for position in generator.integers(0, 200, generator.integers(1, 4)):
            data[position] = generator.integers(0, 256)
        try:
            load_plain(bytes(data[: generator.integers(1, len(data) + 1)] if generator.integers(2) else data))
        except DataError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 1000


def test_long_length_prefix_is_not_signed():
    assert load_plain(b"T" + struct.pack("<I", 3) + b"abc.") == b"abc"
