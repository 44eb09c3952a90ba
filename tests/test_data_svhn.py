"""data/svhn.py: .mat files as SVHN's, whole and damaged."""

import numpy as np
import pytest
import torch

from odn_fast.data import DataError, load
from odn_fast.data.svhn import read_split

savemat = pytest.importorskip("scipy.io", reason="scipy is not installed, and writes the .mat files of this test").savemat


def pixels(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3, count), dtype=np.uint8)


def write_svhn(folder, train=100, test=20, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, count) in enumerate((("train", train), ("test", test))):
        content = {"X": pixels(count, seed), "y": (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]}
        if name == "train":
            content = {key: value for key, value in {**content, **changes}.items() if value is not None}
        savemat(folder / f"{name}_32x32.mat", content, do_compression=True)
    return folder / "train_32x32.mat"


@pytest.mark.parametrize("folder", ["SVHN", "."])
def test_round_trip_from_both_places(tmp_path, folder):
    write_svhn(tmp_path / folder)
    data = load("svhn", tmp_path, download=False)
    assert (len(data.train), len(data.validation), len(data.test)) == (94, 6, 20)
    images = torch.cat([data.train.images, data.validation.images])
    assert np.array_equal(images.numpy(), pixels(100).transpose(3, 2, 0, 1)) and images.is_contiguous()
    assert data.test.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] * 2  # 10 stands for zero
    assert data.class_names == tuple("0123456789") and data.input_shape == (3, 32, 32)
    assert (data.augment, data.drop_last) == (False, True)
    assert (data.normalisation.scale, data.normalisation.mean, data.normalisation.std) == (255.0, (0.0,) * 3, (1.0,) * 3)


def test_the_folder_of_its_own_comes_first(tmp_path):
    write_svhn(tmp_path / "SVHN", train=100)
    write_svhn(tmp_path, train=50)
    assert len(load("svhn", tmp_path, download=False).train) == 94


def test_labels_as_matlab_doubles_in_a_row(tmp_path):
    file = write_svhn(tmp_path, y=np.array([[1.0, 10.0] * 50]))
    assert read_split(file).labels.tolist() == [1, 0] * 50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"X": None}, "no variable X"),
        ({"y": None}, "no variable y"),
        ({"X": pixels(100).astype(np.float64)}, "X is float64"),
        ({"X": pixels(100)[:28, :28]}, r"\(28, 28, 3, 100\), expected"),
        ({"X": pixels(100).transpose(3, 2, 0, 1)}, r"expected uint8 \(32, 32, 3, N\)"),
        ({"X": pixels(100)[..., 0]}, "expected"),
        ({"X": {"field": 1}}, "X is no array of real numbers"),
        ({"y": np.arange(99) % 10 + 1}, "100 images but 99 labels"),
        ({"y": np.arange(100) % 10}, "y holds 0, expected digits 1..10"),
        ({"y": np.arange(100) % 11 + 1}, "y holds 11"),
        ({"y": np.full(100, 1.5)}, "y holds 1.5"),
        ({"y": np.full(100, np.nan)}, "y holds nan"),
        ({"y": "x" * 100}, "y is no array of real numbers"),
        ({"y": np.array(["a"] * 100, dtype=object)}, "y is no array of real numbers"),
    ],
    ids=[
        "no X", "no y", "float X", "28x28", "wrong order", "three dimensions", "struct", "one label fewer", "label 0", "label 11",
        "fractions", "nan", "text", "cells",
    ],
)  # fmt: skip
def test_wrong_content_gives_one_line_naming_the_file(tmp_path, changes, message):
    if "X" in changes and isinstance(changes["X"], np.ndarray) and changes["X"].dtype == np.float64:
        changes = {"X": changes["X"] + 0.5}  # else scipy writes whole doubles as bytes
    write_svhn(tmp_path / "SVHN", **changes)
    with pytest.raises(DataError, match=message) as caught:
        load("svhn", tmp_path, download=False)
    assert "train_32x32.mat" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files_name_the_address(tmp_path):
    with pytest.raises(DataError, match="train_32x32.mat not found in .*SVHN.*ufldl.stanford.edu"):
        load("svhn", tmp_path, download=False)
