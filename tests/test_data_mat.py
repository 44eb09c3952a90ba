"""data/mat.py: MATLAB 5 files, whole and damaged."""

import zlib

import numpy as np
import pytest

from odn_fast.data import DataError
from odn_fast.data.mat import read_mat

scipy_io = pytest.importorskip("scipy.io", reason="scipy is not installed, and writes the .mat files of this test")

X = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
Y = np.array([[1], [2], [3], [10]], np.uint8)


def write(path, compressed=True, **arrays):
    scipy_io.savemat(path, arrays or {"X": X, "y": Y}, do_compression=compressed)
    return path


ARRAYS = [
    X, Y, np.arange(6.0).reshape(2, 3), np.float32([[0.5]]), np.int16([[-3, 300]]), np.uint32([[2**32 - 1]]), np.int64([[-(2**60)]]),
    np.zeros((0, 3)), np.arange(24, dtype=np.int8).reshape(2, 3, 4),
]  # fmt: skip


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}-{array.shape}")
def test_arrays_round_trip_as_scipy_reads_them(tmp_path, array, compressed):
    file = write(tmp_path / "a.mat", compressed, other="text", X=array, cells=np.array(["a"], dtype=object))
    result = read_mat(file, ("X",))["X"]
    expected = scipy_io.loadmat(file)["X"]
    assert result.dtype == expected.dtype and result.shape == expected.shape and np.array_equal(result, expected)


def big_endian(array, name):
    """One uncompressed variable as a big-endian machine wrote it; numbers stored in fewer bytes than meant."""
    def element(kind, data):
        return kind.to_bytes(4, "big") + len(data).to_bytes(4, "big") + data + bytes(-len(data) % 8)

    small_name = len(name).to_bytes(2, "big") + (1).to_bytes(2, "big") + name.ljust(4, b"\0")
    body = element(6, (6).to_bytes(4, "big") + bytes(4)) + element(5, np.array(array.shape, ">i4").tobytes()) + small_name
    body += element(4, array.astype(">u2").tobytes(order="F"))
    return b"text".ljust(124) + b"\x01\x00MI" + element(14, body)


def test_big_endian_files_and_numbers_stored_short(tmp_path):
    array = np.arange(6.0).reshape(2, 3) * 100
    (tmp_path / "a.mat").write_bytes(big_endian(array, b"abc"))
    result = read_mat(tmp_path / "a.mat", ("abc",))["abc"]
    assert result.dtype == np.float64 and np.array_equal(result, array)
    assert np.array_equal(scipy_io.loadmat(tmp_path / "a.mat")["abc"], array)


OTHERS = {"text": "text", "struct": {"field": 1}, "cell": np.array([["a"]], dtype=object), "complex": np.array([[1j]])}


@pytest.mark.parametrize("value", OTHERS.values(), ids=OTHERS)
def test_other_variables_are_no_numbers(tmp_path, value):
    with pytest.raises(DataError, match="X is no array of real numbers"):
        read_mat(write(tmp_path / "a.mat", X=value), ("X",))


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "a.mat")


def test_damage(file):
    whole = file.read_bytes()
    first = int.from_bytes(whole[132:136], "little") + 136  # end of the first variable
    damages = {
        b"": "empty",
        whole[:100]: "MATLAB 5",
        bytes(300): "MATLAB 5",
        b"\x89HDF\r\n\x1a\n" + whole: "MATLAB 5",
        whole[:124] + b"\0\2IM" + whole[128:]: "MATLAB 5",
        whole[:128]: "no variable X",
        whole[:first]: "no variable y",
        whole[:5000]: "cut short",
        whole[:-3]: "cut short",
        whole[:130] + b"\xff\xff\xff\x7f" + whole[134:]: "cut short",
        whole + b"rest": "cut short",
        whole[: first - 1] + bytes([whole[first - 1] ^ 1]) + whole[first:]: "incorrect data check",
        whole[:5000] + bytes([whole[5000] ^ 4]) + whole[5001:]: "damaged|zlib",
        whole + whole[128:first]: "X more than once",
    }
    for content, message in damages.items():
        file.write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            read_mat(file, ("X", "y"))
        assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)


def repacked(file, change):
    """The file with the unpacked bytes of its first variable changed."""
    whole = file.read_bytes()
    size = int.from_bytes(whole[132:136], "little")
    packed = zlib.compress(change(zlib.decompress(whole[136 : 136 + size])))
    file.write_bytes(whole[:128] + (15).to_bytes(4, "little") + len(packed).to_bytes(4, "little") + packed + whole[136 + size :])


SHAPE = np.array([32, 32, 3, 4], "<i4").tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body.replace(SHAPE, np.array([32, 32, 3, 1 << 30], "<i4").tobytes()), "X claims shape"),
        (lambda body: body.replace(SHAPE, np.array([32, 32, 3, -4], "<i4").tobytes()), "X claims shape"),
        (lambda body: body.replace(SHAPE, np.array([0, 2**31 - 1, 2**31 - 1, 2**31 - 1], "<i4").tobytes()), "X claims shape"),
        (lambda body: body[:4] + b"\xff\xff\xff\xff" + body[8:], "claims 4294967295 bytes"),
        (lambda body: body[:-8], "instead of"),
        (lambda body: body + bytes(50_000_000), "instead of"),
        (lambda body: body[:4], "damaged"),
        (lambda body: body[:16] + b"\xff" + body[17:], "no array of real numbers"),
        (lambda body: body[:8] + b"\x63" + body[9:], "damaged header"),
    ],
    ids=["huge", "negative", "zero times huge", "huge size", "cut", "bomb", "only a tag", "class", "flags"],
)
def test_damage_inside_the_compressed_variable(file, change, message):
    repacked(file, change)
    with pytest.raises(DataError, match=message) as caught:
        read_mat(file, ("X", "y"))
    assert str(caught.value).startswith(f"{file}: ")


@pytest.mark.parametrize("compressed", [False, True])
def test_random_damage_gives_data_errors_or_an_array(tmp_path, compressed):
    file = write(tmp_path / "a.mat", compressed)
    whole = file.read_bytes()
    generator = np.random.default_rng(5)
    refused = 0
    for _ in range(400):
        content = bytearray(whole)
        for position in generator.integers(124, len(content) if generator.integers(2) else 260, 3):
            content[position] = generator.integers(0, 256)
        file.write_bytes(content[: generator.integers(1, 3 * len(content))])
        try:
            arrays = read_mat(file, ("X", "y"))
            assert not compressed or (np.array_equal(arrays["X"], X) and np.array_equal(arrays["y"], Y))
        except DataError as error:
            assert str(error).startswith(f"{file}: ") and len(str(error)) < 600
            refused += 1
    assert refused > 200


@pytest.mark.parametrize("extra", [-1, 0, 1, 258])
def test_sizes_around_a_megabyte(tmp_path, extra):
    array = np.random.default_rng(0).integers(0, 256, (1, (1 << 20) + extra), dtype=np.uint8)
    assert np.array_equal(read_mat(write(tmp_path / "a.mat", X=array), ("X",))["X"], array)
