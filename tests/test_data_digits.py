"""data/digits.py: scikit-learn's digits."""

import sys

import pytest
import torch

from odn_fast.data import DataError, load


def test_sizes_shares_and_levels():
    data = load("digits")
    assert (len(data.train), len(data.validation), len(data.test)) == (1197, 300, 300)
    assert data.input_shape == (1, 8, 8) and data.class_names == tuple("0123456789")
    everything = torch.cat([split.labels for _, split in data.splits()])
    shares = torch.bincount(everything).double() / 1797
    for _, split in data.splits():
        assert ((torch.bincount(split.labels) - shares * len(split)).abs() < 2).all()
    assert data.train.images.dtype == torch.uint8 and int(data.train.images.max()) == 16
    assert torch.equal(data.normalisation(data.train.images), data.train.images / 16)
    assert (data.augment, data.drop_last) == (False, False)


def test_every_image_is_in_one_split():
    from sklearn.datasets import load_digits

    data = load("digits")
    images = torch.cat([split.images for _, split in data.splits()]).flatten(1)
    expected = torch.from_numpy(load_digits().data).to(torch.uint8)
    assert sorted(map(tuple, images.tolist())) == sorted(map(tuple, expected.tolist()))


def test_the_seed_decides():
    assert load("digits", seed=1).checksum() == load("digits", seed=1).checksum()
    assert load("digits", seed=1).checksum() != load("digits", seed=2).checksum()


def test_missing_scikit_learn_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        load("digits")
