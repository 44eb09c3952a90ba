"""data/batches.py: order, resumption, last batches, augmentation."""

import pytest
import torch

from odn_fast.data import Batches, DataError, Normalisation, Split, evaluation_batches
from odn_fast.data.batches import PADDING, batch_bounds, keyed_number
from odn_fast.data.dataset import scale_only
from odn_fast.reference.augment import cropped, draw

AS_IT_IS = scale_only(1, 1)


def numbered(count):
    """Image i holds the number i, and so does its label."""
    return Split(torch.arange(count, dtype=torch.float32).view(count, 1, 1, 1).expand(count, 1, 2, 3).clone(), torch.arange(count))


def colourful(count, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Split(torch.randint(1, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator), torch.arange(count))


def same(first, second):
    first, second = list(first), list(second)
    return len(first) == len(second) and all(torch.equal(a, b) for pair in zip(first, second) for a, b in zip(*pair))


@pytest.mark.parametrize(
    ("count", "batch_size", "drop_last", "sizes"),
    [
        (10, 5, False, [5, 5]),
        (10, 4, False, [4, 4, 2]),
        (10, 4, True, [4, 4]),
        (9, 4, False, [4, 5]),  # one image alone joins the batch before
        (9, 4, True, [4, 4]),
        (3, 4, False, [3]),
        (3, 4, True, [3]),  # the only batch stays
        (1, 4, False, [1]),
        (1, 4, True, [1]),
        (5, 4, False, [5]),
        (5, 4, True, [4]),
        (3, 1, False, [1, 1, 1]),
        (4, 4, True, [4]),
    ],
)
def test_sizes_of_batches(count, batch_size, drop_last, sizes):
    batches = Batches(numbered(count), AS_IT_IS, batch_size, seed=0, drop_last=drop_last)
    assert [len(y) for _, y in batches.epoch("k", 0)] == sizes
    assert (batches.steps_per_epoch, batches.images_per_epoch) == (len(sizes), sum(sizes))
    assert [end - first for first, end in batch_bounds(count, batch_size, drop_last)] == sizes


def test_every_image_once_with_its_label():
    batches = list(Batches(numbered(103), AS_IT_IS, 16, seed=0).epoch("k", 0))
    labels = torch.cat([y for _, y in batches])
    assert torch.equal(labels.sort().values, torch.arange(103)) and not torch.equal(labels, torch.arange(103))
    for x, y in batches:
        assert torch.equal(x[:, 0, 0, 0].long(), y)


@pytest.mark.parametrize("augment", [False, True])
def test_an_epoch_resumed_at_any_step_goes_on_the_same(augment):
    def batches():
        return Batches(colourful(50), scale_only(255, 3), 8, seed=3, augment=augment)

    whole = list(batches().epoch("depth 2", 7))
    for start in range(8):
        torch.rand(start + 1)  # the global stream has no say
        assert same(batches().epoch("depth 2", 7, start), whole[start:])


@pytest.mark.parametrize("augment", [False, True])
def test_order_depends_on_seed_key_and_epoch_alone(augment):
    def epoch(seed=0, key="a", epoch=0):
        return list(Batches(colourful(64), scale_only(255, 3), 16, seed, augment).epoch(key, epoch))

    assert same(epoch(), epoch())
    for change in ({"seed": 1}, {"key": "b"}, {"epoch": 1}, {"key": "a0"}, {"seed": -1}):
        assert not same(epoch(), epoch(**change))
    batches = Batches(colourful(64), scale_only(255, 3), 16, 0, augment)
    interleaved = list(zip(batches.epoch("a", 0), batches.epoch("a", 1)))
    assert same([first for first, _ in interleaved], epoch()) and same([second for _, second in interleaved], epoch(epoch=1))


@pytest.mark.parametrize("start", [-1, 5])
def test_a_start_outside_the_epoch_is_refused_at_once(start):
    batches = Batches(numbered(16), AS_IT_IS, 4, seed=0)
    with pytest.raises(DataError, match=f"step {start}; it has 4"):
        batches.epoch("k", 0, start)
    assert list(batches.epoch("k", 0, 4)) == []


def test_batches_are_float32_channels_last_and_normalised():
    normalisation = Normalisation(255.0, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    split = colourful(20)
    for x, y in Batches(split, normalisation, 8, seed=0).epoch("k", 0):
        assert x.dtype == torch.float32 and y.dtype == torch.int64
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(x, normalisation(split.images[y]))
    grey = next(Batches(Split(split.images[:, :1], split.labels), scale_only(255, 1), 8, 0).epoch("k", 0))[0]
    assert grey.stride() == (64, 1, 8, 1)


def test_wrong_batch_sizes_and_empty_splits_are_refused():
    with pytest.raises(DataError, match="batch_size is 0"):
        Batches(numbered(4), AS_IT_IS, 0, seed=0)
    with pytest.raises(DataError, match="empty split"):
        Batches(numbered(0), AS_IT_IS, 4, seed=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crops_and_flips_are_those_of_the_op_s_reference(dtype):
    split = Split(colourful(200, size=7).images[:, :, :, :5].to(dtype), torch.arange(200))  # higher than wide
    batches = Batches(split, scale_only(255, 3), 32, seed=4, augment=True)
    drawn = torch.tensor([keyed_number(4, "k"), 3])
    changed = 0
    for x, y in batches.epoch("k", 3):
        expected = cropped(split.images[y], *draw(y, drawn, PADDING), PADDING, True).float() * torch.tensor(1 / 255)
        assert torch.equal(x, expected)
        changed += int((x != split.images[y] / 255).flatten(1).any(1).sum())
    assert changed > 190


def test_every_shift_and_both_directions_occur_evenly():
    image = torch.zeros(1, 1, 11, 11, dtype=torch.uint8)
    image[..., 5, 5:7] = torch.tensor([200, 100], dtype=torch.uint8)
    split = Split(image.expand(20_000, 1, 11, 11).clone(), torch.zeros(20_000, dtype=torch.int64))
    x = torch.cat([x for x, _ in Batches(split, AS_IT_IS, 5000, seed=0, augment=True).epoch("k", 0)])
    where = (x == 200).flatten(1)
    assert where.sum(1).eq(1).all()  # a shift by up to four keeps it inside
    counts = where.sum(0).view(11, 11)
    assert int(counts.sum()) == int(counts[1:10, 1:10].sum())
    counts = counts[1:10, 1:10]
    assert counts.min() > 180 and counts.max() < 320  # expected 247 each
    upright = (where[:, :-1] & (x == 100).flatten(1)[:, 1:]).any(1)  # to the right: not mirrored
    assert 0.48 < upright.double().mean() < 0.52


def test_augmentation_belongs_to_the_image_not_to_the_batch():
    def images_by_label(batch_size, drop_last=False):
        batches = Batches(colourful(60), scale_only(255, 3), batch_size, 5, augment=True, drop_last=drop_last)
        return {int(label): image for x, y in batches.epoch("k", 2) for image, label in zip(x, y)}

    expected = images_by_label(7)
    for other in (images_by_label(20), images_by_label(60), images_by_label(8, drop_last=True)):
        assert all(torch.equal(expected[label], image) for label, image in other.items())


def test_a_step_s_inputs_make_its_batch():
    batches = Batches(colourful(40), scale_only(255, 3), 16, seed=2, augment=True)
    pairs = [batches.batch(*inputs) for inputs in batches.inputs("k", 1, start=1)]
    assert same(pairs, batches.epoch("k", 1, start=1)) and len(pairs) == 2
    assert all(tensor.dtype == torch.int64 for inputs in batches.inputs("k", 1) for tensor in inputs)


def test_augmentation_leaves_the_split_untouched():
    split = colourful(30)
    before = split.images.clone()
    list(Batches(split, scale_only(255, 3), 8, 0, augment=True).epoch("k", 0))
    assert torch.equal(split.images, before)


def test_a_split_that_is_a_view():
    whole = colourful(40)
    view = Split(whole.images[10:], whole.labels[10:])
    for x, y in Batches(view, scale_only(1, 3), 8, 0).epoch("k", 0):
        assert torch.equal(x, whole.images[y].float())


@pytest.mark.parametrize("batch_size", [1, 7, 512])
def test_evaluation_takes_all_in_order(batch_size):
    split = numbered(30)
    batches = list(evaluation_batches(split, AS_IT_IS, batch_size))
    assert torch.cat([y for _, y in batches]).tolist() == list(range(30))
    assert torch.equal(torch.cat([x for x, _ in batches]), split.images)
    assert len(batches) == -(-30 // batch_size)
