"""data/dataset.py: normalisation, validation of splits, checksum, limited training splits."""

from dataclasses import replace

import pytest
import torch

from odn_fast.data import DataError, DataSet, Normalisation, Split
from odn_fast.data.dataset import measured_normalisation, official_splits, scale_only


def split_of(count, shape=(3, 4, 5), classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(count) % classes)


def data_set(**changes):
    fields = dict(
        name="set", train=split_of(12), validation=split_of(6, seed=1), test=split_of(3, seed=2), class_names=("a", "b", "c"),
        normalisation=scale_only(255, 3), augment=False, drop_last=False,
    )  # fmt: skip
    return DataSet(**{**fields, **changes})


NORMALISATIONS = [
    Normalisation(255.0, (0.1307,), (0.3081,)),
    Normalisation(16.0, (0.0,), (1.0,)),
    Normalisation(255.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    Normalisation(1.0, (0.5, 0.5), (2.0, 3.0)),
    scale_only(255, 3),
]


@pytest.mark.parametrize("normalisation", NORMALISATIONS, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (28, 28)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalisation_is_its_definition(normalisation, size, dtype):
    channels = len(normalisation.mean)
    images = torch.randint(0, 256, (5, channels, *size)).to(dtype)
    result = normalisation(images)
    mean = torch.tensor(normalisation.mean, dtype=torch.float64).view(1, -1, 1, 1)
    std = torch.tensor(normalisation.std, dtype=torch.float64).view(1, -1, 1, 1)
    torch.testing.assert_close(result.double(), (images / normalisation.scale - mean) / std, rtol=1e-6, atol=1e-6)
    assert result.dtype == torch.float32 and result.shape == images.shape
    assert result.stride() == torch.empty_like(result, memory_format=torch.channels_last).stride()


@pytest.mark.parametrize("normalisation", NORMALISATIONS, ids=str)
def test_normalisation_rounds_twice_and_whatever_the_batch(normalisation):
    images = torch.randint(0, 256, (9, len(normalisation.mean), 5, 7), dtype=torch.uint8)
    together = normalisation(images)
    for position in range(9):
        assert torch.equal(normalisation(images[position : position + 1])[0], together[position])
    a = torch.tensor([1 / (normalisation.scale * std) for std in normalisation.std]).view(1, -1, 1, 1)
    b = torch.tensor([-mean / std for mean, std in zip(normalisation.mean, normalisation.std)]).view(1, -1, 1, 1)
    product = images.float() * a
    assert torch.equal(together, product + b)


@pytest.mark.parametrize("images", [torch.rand(4, 3, 6, 6), torch.randint(0, 256, (4, 3, 6, 6), dtype=torch.uint8)])
def test_normalisation_takes_any_strides_and_leaves_its_input(images):
    before = images.clone()
    normalisation = Normalisation(2.0, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    expected = normalisation(images)
    assert torch.equal(normalisation(images.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(normalisation(images.transpose(2, 3)), expected.transpose(2, 3))
    assert torch.equal(normalisation(images[::2]), expected[::2])
    assert torch.equal(images, before)


def test_normalisation_of_an_empty_batch():
    assert scale_only(255, 3)(torch.empty(0, 3, 4, 4, dtype=torch.uint8)).shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    ("scale", "mean", "std"),
    [(0.0, (0.0,), (1.0,)), (255.0, (0.0,), (0.0,)), (255.0, (0.0, 0.0), (1.0,)), (255.0, (), ()), (float("nan"), (0.0,), (1.0,)),
     (255.0, (float("inf"),), (1.0,)), (255.0, (0.0,), (-1.0,))],
)  # fmt: skip
def test_unusable_normalisation_is_refused(scale, mean, std):
    with pytest.raises(DataError):
        Normalisation(scale, mean, std)


def test_normalisation_of_other_channels_is_refused():
    with pytest.raises(DataError, match="3 channels"):
        Normalisation(255.0, (0.0,), (1.0,))(torch.zeros(1, 3, 2, 2))


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 1, 4, 4, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, dtype=torch.int64)),
        (torch.zeros(2, 1, 4, 4), torch.zeros(3, dtype=torch.int64)),
    ],
)
def test_splits_of_wrong_shape_or_type_are_refused(images, labels):
    with pytest.raises(DataError, match="expected|one label an image"):
        Split(images, labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": split_of(0)}, "training split is empty"),
        ({"validation": split_of(0)}, "validation split is empty"),
        ({"test": split_of(0)}, "test split is empty"),
        ({"validation": split_of(3, (3, 5, 4))}, "all must be alike"),
        ({"test": split_of(3, (1, 4, 5))}, "all must be alike"),
        ({"train": split_of(3, (3, 0, 5)), "validation": split_of(3, (3, 0, 5)), "test": None}, "none of the sizes 0"),
        ({"test": Split(torch.zeros(2, 3, 4, 5), torch.zeros(2, dtype=torch.int64))}, "same type"),
        ({"class_names": ("a", "b")}, r"labels 0..2, expected 0..1"),
        ({"validation": Split(split_of(3).images, torch.tensor([0, -1, 2]))}, r"labels -1..2"),
        ({"normalisation": scale_only(255, 1)}, "3 channels but normalisation for 1"),
    ],
)
def test_inconsistent_data_sets_are_refused(changes, message):
    with pytest.raises(DataError, match=message) as caught:
        data_set(**changes)
    assert str(caught.value).startswith("set: ") and "\n" not in str(caught.value)


def test_properties():
    data = data_set()
    assert data.input_shape == (3, 4, 5) and data.num_classes == 3
    assert [name for name, _ in data.splits()] == ["training", "validation", "test"]
    assert len(data_set(test=None).splits()) == 2


def test_checksum_sees_every_pixel_label_and_shape_but_no_layout():
    data = data_set()
    channels_last = Split(data.train.images.contiguous(memory_format=torch.channels_last), data.train.labels)
    assert data.checksum() == data_set().checksum() == data_set(train=channels_last).checksum()
    seen = {data.checksum(), data_set(test=None).checksum(), data_set(train=data.validation, validation=data.train).checksum()}
    for split in ("train", "validation", "test"):
        changed = getattr(data, split).images.clone()
        changed[-1, -1, -1, -1] ^= 1
        seen.add(data_set(**{split: Split(changed, getattr(data, split).labels)}).checksum())
    labels = data.test.labels.clone()
    labels[0] = 1
    seen.add(data_set(test=Split(data.test.images, labels)).checksum())
    seen.add(data_set(**{name: Split(getattr(data, name).images.reshape(-1, 3, 5, 4), getattr(data, name).labels)
                         for name in ("train", "validation", "test")}).checksum())  # fmt: skip
    assert len(seen) == 8
    assert all(len(value) == 64 for value in seen)


def test_limited_training_split_keeps_shares_order_and_the_rest():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    data = data_set(train=Split(torch.arange(100).view(100, 1, 1, 1).expand(100, 3, 4, 5).to(torch.uint8), labels))
    limited = data.limit_train(20, seed=5)
    assert torch.bincount(limited.train.labels).tolist() == [12, 6, 2]
    ids = limited.train.images[:, 0, 0, 0].long()
    assert torch.equal(ids, ids.unique()) and torch.equal(labels[ids], limited.train.labels)
    assert torch.equal(ids, data.limit_train(20, seed=5).train.images[:, 0, 0, 0].long())
    assert not torch.equal(ids, data.limit_train(20, seed=6).train.images[:, 0, 0, 0].long())
    assert limited.validation is data.validation and limited.normalisation == data.normalisation
    assert torch.bincount(data.limit_train(3, seed=0).train.labels).tolist() == [1, 1, 1]
    assert len(data.limit_train(100, seed=0).train) == 100


@pytest.mark.parametrize("count", [0, 2, 13, -1])
def test_limits_outside_the_possible_are_refused(count):
    with pytest.raises(DataError, match="from 3 .* to 12"):
        data_set().limit_train(count, seed=0)


def test_measured_normalisation_is_mean_and_std_of_each_channel():
    images = split_of(5000, (3, 2, 2)).images
    images[:, 1] //= 3
    measured = measured_normalisation(images)
    scaled = images.double() / 255
    assert measured.scale == 255.0
    assert measured.mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert measured.std == pytest.approx(scaled.std((0, 2, 3), correction=0).tolist(), abs=1e-12)


def test_measured_std_of_constant_images_has_a_floor():
    assert measured_normalisation(torch.full((4, 1, 2, 2), 7, dtype=torch.uint8)).std == (1e-3,)


@pytest.mark.parametrize(("count", "held_out"), [(600, 100), (700, 100), (6, 1), (2, 1), (300, 50)])
def test_official_validation_is_the_end_of_training(count, held_out):
    images, labels = torch.zeros(count, 1, 1, 1, dtype=torch.uint8), torch.arange(count)
    train, validation = official_splits(images, labels, validation=100, official=600, where="here", test_images=2)
    assert torch.equal(torch.cat([train.labels, validation.labels]), labels)
    assert len(validation) == held_out


def test_a_subset_of_an_official_set_is_said():
    with pytest.warns(UserWarning, match="here: 6 training images, the official set has 600"):
        official_splits(torch.zeros(6, 1, 1, 1, dtype=torch.uint8), torch.zeros(6, dtype=torch.int64), 100, 600, "here", 1)


def test_one_image_cannot_be_split():
    with pytest.raises(DataError, match="here: holds 1 training images"):
        official_splits(torch.zeros(1, 1, 1, 1, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), 100, 600, "here", 0)


def test_fields_cannot_be_reassigned():
    with pytest.raises(AttributeError):
        data_set().name = "other"
    assert replace(data_set(), name="other").name == "other"
