"""data/__init__.py: load() and what the package offers."""

import subprocess
import sys

import numpy as np
import pytest

from odn_fast import data
from odn_fast.data import NAMES, DataError, load


@pytest.mark.parametrize("name", ["", "imagenet", "MNIST", "mnist:x", "digits:", "imagefolder", "npz", "imagefolder:PATH:x", "../mnist"])
def test_unknown_names_list_the_known_ones(name):
    with pytest.raises(DataError) as caught:
        load(name)
    assert "\n" not in str(caught.value)
    if not name.startswith(("imagefolder", "npz")):
        assert all(known in str(caught.value) for known in NAMES)


@pytest.mark.parametrize("name", ["imagefolder:", "npz:"])
def test_a_path_is_needed(name):
    with pytest.raises(DataError, match="lacks a path"):
        load(name)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn", "digits", "emnist-letters"])
@pytest.mark.parametrize("option", [{"image_size": 32}, {"val_fraction": 0.1}, {"test_fraction": 0.1}])
def test_options_that_make_no_sense_are_refused(tmp_path, name, option):
    with pytest.raises(DataError, match=f"{next(iter(option))} makes no sense for {name}"):
        load(name, tmp_path, **option, download=False)


def test_npz_images_have_one_size(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((20, 4, 4), np.uint8), y=np.arange(20) % 2)
    with pytest.raises(DataError, match="image_size makes no sense"):
        load(f"npz:{tmp_path}/a.npz", image_size=8)
    assert load(f"npz:{tmp_path}/a.npz", val_fraction=0.1).input_shape == (1, 4, 4)


def test_the_default_folder_is_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mnist", "fashion-mnist", "emnist-letters", "cifar10", "cifar100", "svhn"):
        with pytest.raises(DataError, match="not found in data/"):
            load(name, download=False)
    assert list(tmp_path.iterdir()) == []


def test_everything_promised_is_there():
    assert all(hasattr(data, name) for name in data.__all__)
    assert set(data.__all__) >= {"load", "DataSet", "Split", "Normalisation", "DataError", "NAMES", "Batches", "from_arrays", "read_image"}


def test_optional_packages_are_imported_only_by_the_reader_that_needs_them():
    code = """
import importlib, sys
blocked = ("PIL", "scipy", "sklearn")
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ImportError(name)
sys.meta_path.insert(0, Block())
from odn_fast import data
try:
    data.load("digits")
except data.DataError as error:
    assert "pip install scikit-learn" in str(error), error
else:
    raise SystemExit("loaded digits")
try:
    data.read_image(sys.argv[1], 3, 4, 4)
except data.DataError as error:
    assert "pip install pillow" in str(error), error
"""
    finished = subprocess.run([sys.executable, "-c", code, "nowhere"], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
