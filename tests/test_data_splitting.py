"""data/splitting.py: class shares, seeds, and who is held out."""

import pytest
import torch

from odn_fast.data import DataError, Split
from odn_fast.data.splitting import class_quotas, complement, fill_missing_splits, stratified_choice


@pytest.mark.parametrize(
    ("counts", "total", "bounds", "expected"),
    [
        ([50, 30, 20], 10, {}, [5, 3, 2]),
        ([5, 5, 5], 7, {}, [3, 2, 2]),  # equal remainders go to the lower class
        ([6, 3, 1], 5, {}, [3, 2, 0]),  # 3.0, 1.5, 0.5: a tie of remainders
        ([97, 1, 2], 3, {"at_least": 1}, [1, 1, 1]),
        ([97, 1, 2], 10, {"at_least": 1}, [8, 1, 1]),
        ([97, 0, 3], 10, {"at_least": 1}, [9, 0, 1]),  # a class without images gives none
        ([1, 1, 8], 5, {"leave": 1}, [0, 0, 5]),
        ([4, 4], 8, {}, [4, 4]),
        ([3, 3], 0, {}, [0, 0]),
    ],
)
def test_quotas_by_largest_remainder(counts, total, bounds, expected):
    assert class_quotas(torch.tensor(counts), total, **bounds).tolist() == expected


@pytest.mark.parametrize(("counts", "total", "bounds"), [([3, 3], 7, {}), ([3, 3], 5, {"leave": 1}), ([3, 3], 1, {"at_least": 1})])
def test_impossible_quotas_are_refused(counts, total, bounds):
    with pytest.raises(DataError, match="are possible"):
        class_quotas(torch.tensor(counts), total, **bounds)


def test_quotas_against_the_definition():
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        counts = torch.randint(0, 40, (7,), generator=generator) + torch.tensor([1, 0, 0, 0, 0, 0, 0])
        total = int(torch.randint(0, int(counts.sum()) + 1, (1,), generator=generator))
        quotas = class_quotas(counts, total)
        exact = counts.double() * total / counts.sum()
        assert int(quotas.sum()) == total
        assert ((quotas - exact).abs() < 1).all()  # largest remainder: floor or ceiling of the exact share


def test_choice_is_seeded_stratified_and_in_order():
    labels = torch.arange(1000) % 4
    first = stratified_choice(labels, 100, seed=3)
    assert torch.equal(first, stratified_choice(labels, 100, seed=3))
    assert not torch.equal(first, stratified_choice(labels, 100, seed=4))
    assert torch.equal(first, first.unique()) and len(first) == 100
    assert torch.bincount(labels[first]).tolist() == [25] * 4


def test_complement():
    assert complement(torch.tensor([1, 3]), 5).tolist() == [0, 2, 4]


def numbered(count, classes):
    return Split(torch.arange(count, dtype=torch.float32).view(count, 1, 1, 1), torch.arange(count) % classes)


def test_missing_splits_are_disjoint_shares_of_what_was_given():
    filled = fill_missing_splits({"train": numbered(200, 4)}, 0.1, 0.25, seed=0, where="here")
    assert {name: len(split) for name, split in filled.items()} == {"train": 130, "validation": 20, "test": 50}
    ids = torch.cat([split.images.flatten() for split in filled.values()])
    assert torch.equal(ids.sort().values, torch.arange(200.0))
    assert torch.bincount(filled["validation"].labels).tolist() == [5] * 4


def test_validation_defaults_to_a_tenth_and_test_to_none():
    filled = fill_missing_splits({"train": numbered(50, 5)}, None, None, seed=0, where="here")
    assert {name: len(split) for name, split in filled.items()} == {"train": 45, "validation": 5}
    assert len(fill_missing_splits({"train": numbered(3, 1)}, None, None, 0, "here")["validation"]) == 1


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 1.5, float("nan")])
def test_fractions_outside_0_to_1_are_refused(fraction):
    with pytest.raises(DataError, match="share between 0 and 1"):
        fill_missing_splits({"train": numbered(50, 5)}, fraction, None, 0, "here")


def test_every_class_keeps_a_training_image():
    filled = fill_missing_splits({"train": numbered(20, 10)}, 0.5, None, 0, "here")
    assert torch.bincount(filled["train"].labels).tolist() == [1] * 10
    with pytest.raises(DataError, match="too few training images"):
        fill_missing_splits({"train": numbered(20, 10)}, 0.6, None, 0, "here")
    with pytest.raises(DataError, match="too few training images"):
        fill_missing_splits({"train": numbered(20, 2)}, 0.5, 0.5, 0, "here")


def test_a_fraction_for_a_split_that_is_there_is_refused():
    both = {"train": numbered(10, 2), "validation": numbered(4, 2)}
    with pytest.raises(DataError, match="val_fraction makes no sense"):
        fill_missing_splits(both, 0.1, None, 0, "here")
    assert len(fill_missing_splits(both, None, None, 0, "here")["validation"]) == 4
