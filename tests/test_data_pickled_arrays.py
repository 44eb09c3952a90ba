"""data/pickled_arrays.py: what a call in a pickle may build, piece by piece."""

import numpy as np
import pytest

from odn_fast.data import DataError
from odn_fast.data.pickled_arrays import Name, PendingArray, PendingType, finished, result_of, set_state


def test_an_array_from_its_pieces():
    maker, array_class, type_class = Name("numpy.core.multiarray", "_reconstruct"), Name("numpy", "ndarray"), Name("numpy", "dtype")
    array = result_of(maker, (array_class, (0,), b"b"))
    element = result_of(type_class, ("i2", False, True))
    set_state(element, (3, ">", None, None, None, -1, -1, 0))
    set_state(array, (1, (2, 1), element, False, b"\0\1\1\0"))
    assert finished(array).tolist() == [[1], [256]] and finished(array).dtype == np.dtype(">i2")
    with pytest.raises(ValueError, match="read-only"):
        finished(array)[0] = 1


def test_bytes_of_protocol_2():
    assert result_of(Name("_codecs", "encode"), ("\xff\0a", "latin1")) == b"\xff\0a"
    with pytest.raises(DataError, match="beyond 255"):
        result_of(Name("_codecs", "encode"), ("\u0100", "latin1"))


@pytest.mark.parametrize(
    "name", [("os", "system"), ("builtins", "eval"), ("numpy", "load"), ("numpy.ndarray", ""), (b"os", b"system"), ([], {})]
)
def test_other_names_do_not_exist(name):
    with pytest.raises(DataError, match="refused"):
        Name(*name)


def test_a_long_name_is_cut_and_kept_on_one_line():
    with pytest.raises(DataError) as caught:
        Name("x\r\n" * 5000, "y")
    assert len(str(caught.value)) < 300 and not set("\r\n") & set(str(caught.value))


@pytest.mark.parametrize("function", [Name("numpy", "ndarray"), Name("numpy", "dtype"), Name("_codecs", "encode"), print, "text", None])
@pytest.mark.parametrize("arguments", [(), (1,), [], None, (None, "latin1"), (b"x", "latin1"), ("x", "rot13")])
def test_calls_numpy_does_not_write_are_refused(function, arguments):
    with pytest.raises(DataError, match="refused"):
        result_of(function, arguments)


@pytest.mark.parametrize("code", ["O", "O8", "S1", "U8", "V8", "M8", "c16", "f16", "u1,u1", "i3", "", "(2,)u1"])
def test_types_that_are_no_plain_numbers_are_refused(code):
    with pytest.raises(DataError, match="only plain numbers"):
        result_of(Name("numpy", "dtype"), (code, False, True))


@pytest.mark.parametrize(
    "state",
    [(3,), (3, "<", ("u1", (2,)), None, None), (3, "<", None, ("a",), {"a": 1}), (3, "?", None, None, None), (3, [], None, None, None)],
)
def test_structured_element_types_are_refused(state):
    with pytest.raises(DataError, match="structured"):
        set_state(PendingType("u1"), state)


@pytest.mark.parametrize("target", [{}, [], print, Name("numpy", "ndarray"), object()], ids=type)
def test_nothing_else_has_a_state(target):
    with pytest.raises(DataError, match="refused"):
        set_state(target, (1, 2))


def test_unfinished_things_are_no_data():
    for value in (PendingArray(), PendingType("u1"), Name("numpy", "ndarray")):
        with pytest.raises(DataError, match="unfinished"):
            finished(value)
    assert finished(3) == 3
