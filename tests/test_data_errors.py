"""data/errors.py: every failure of a reader becomes one line that names the file."""

import os
import struct
import zlib

import pytest

from odn_fast.data.errors import DataError, needs, reading, regular_file_size


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), MemoryError(), zlib.error("incorrect header"), struct.error("unpack"), IndexError(),
     ValueError("first line\nsecond line"), RecursionError("too deep"), NotImplementedError()],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_every_exception_becomes_one_line_with_the_file(tmp_path, error):
    with pytest.raises(DataError) as caught, reading(tmp_path / "some.bin"):
        raise error
    assert "some.bin" in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_a_data_error_is_given_the_name_once(tmp_path):
    file = tmp_path / "some.bin"
    for text in ("is wrong", f"{file}: is wrong"):
        with pytest.raises(DataError) as caught, reading(file):
            raise DataError(text)
        assert str(caught.value) == f"{file}: is wrong"


def test_an_interrupt_passes(tmp_path):
    with pytest.raises(KeyboardInterrupt), reading(tmp_path):
        raise KeyboardInterrupt


def test_a_long_text_is_cut(tmp_path):
    with pytest.raises(DataError) as caught, reading(tmp_path):
        raise ValueError("x" * 10_000)
    assert len(str(caught.value)) < 500


def test_data_error_is_a_value_error():
    assert issubclass(DataError, ValueError)


def test_regular_file_size(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"four")
    assert regular_file_size(file) == 4
    file.write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    for path, word in ((file, "empty"), (tmp_path, "folder"), (tmp_path / "pipe", "regular"), (tmp_path / "none", "No such file")):
        with pytest.raises(DataError, match=word) as caught:
            regular_file_size(path)
        assert str(path) in str(caught.value)


def test_a_missing_package_is_named():
    with pytest.raises(DataError, match="reading x needs some-package: pip install some-package"):
        needs("no_such_module_anywhere", "some-package", "reading x")
    assert needs("math", "math", "x").sqrt(4) == 2


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    file = tmp_path / "data_batch_1"
    file.write_bytes(b"12345")
    assert regular_file_size(file, at_most=5) == 5
    with pytest.raises(DataError, match="5 bytes, expected at most 4"):
        regular_file_size(file, at_most=4)
