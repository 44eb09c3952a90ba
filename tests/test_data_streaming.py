"""data/pictures.py, data/streaming.py, data/loading.py: pictures that are decoded as they are needed."""

import os
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from picture_cases import cut_short, noise, write_folder

from odn_fast.data import DataError, DataSet, load, training_batches
from odn_fast.data import loading, streaming
from odn_fast.data.crops import AREA, RATIO, TRIES, crop_numbers, random_box
from odn_fast.data.streaming import PictureBatches

LOADED = {"image_size": 8}


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path)
    return write_folder(tmp_path, (("a", 4), ("b", 3)), split="val")


def loaded(folder, loader="torch", **options) -> DataSet:
    return load(f"imagefolder:{folder}", loader=loader, **LOADED | options)


def batches(data, batch_size=4, **options):
    return PictureBatches(data.train, data.normalisation, batch_size, 3, **options)


def epoch(source, key="k", number=0, start=0):
    return [(x.clone(), y.clone()) for x, y in source.epoch(key, number, start)]


def every(split, batch_size=8):
    return torch.cat([images for images, _ in split.in_order(batch_size)])


def same(first, second):
    return len(first) == len(second) and all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(first, second))


@pytest.mark.parametrize("augment", [False, True])
def test_pictures_give_the_batches_of_a_resident_set(folder, augment):
    resident, streamed = loaded(folder, "resident"), loaded(folder)
    assert resident.normalisation == streamed.normalisation and resident.input_shape == streamed.input_shape
    for number in range(3):
        expected = epoch(training_batches(resident, 4, 3, augment), number=number)
        found = epoch(training_batches(streamed, 4, 3, augment), number=number)
        assert len(found) == 5 and same(found, expected)
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in found)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [4, 5, 7, 50])
def test_lengths_of_epochs_are_right_over_several(folder, batch_size, drop_last):
    source = batches(loaded(folder), batch_size, drop_last=drop_last)
    for number in range(3):
        sizes = [len(y) for _, y in source.epoch("k", number)]
        assert len(sizes) == source.steps_per_epoch and sum(sizes) == source.images_per_epoch
        assert not drop_last or batch_size > 21 or set(sizes) == {batch_size}


@pytest.mark.parametrize("crop", ["centre", "random"])
def test_an_epoch_goes_on_from_any_step(folder, crop):
    data = loaded(folder, crop=crop)
    source = training_batches(data, 4, 3, data.augment)
    whole = epoch(source, number=2)
    for start in range(len(whole) + 1):
        assert same(epoch(source, number=2, start=start), whole[start:])
    assert not same(epoch(source, number=3), whole) and not same(epoch(source, key="other", number=2), whole)
    with pytest.raises(DataError, match="cannot start at step 6; it has 5"):
        epoch(source, start=6)


def test_shards_are_disjoint_and_equally_long(folder):
    data = loaded(folder)
    numbered = data.train.relabelled(torch.arange(21))
    seen = []
    for index in range(4):
        source = PictureBatches(numbered, data.normalisation, 2, 0, shard=(index, 4))
        assert source.images_per_epoch == 5
        seen += torch.cat([y for _, y in source.epoch("k", 1)]).tolist()
    assert len(set(seen)) == len(seen) == 20
    for shard in ((4, 4), (-1, 2), (0, 30)):
        with pytest.raises(DataError, match="shard"):
            PictureBatches(numbered, data.normalisation, 2, 0, shard=shard)


def test_evaluation_reads_every_picture_once_in_order(folder):
    streamed, resident = loaded(folder), loaded(folder, "resident")
    parts = list(streamed.validation.in_order(3))
    assert [len(labels) for _, labels in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([images for images, _ in parts]), resident.validation.images)
    assert torch.equal(torch.cat([labels for _, labels in parts]), resident.validation.labels)


def test_random_crops_are_cut_from_whole_pictures(folder):
    data = loaded(folder, crop="random")
    assert data.augment and data.loader == "torch"
    source = training_batches(data, 21, 3, data.augment)
    pixels, _, = next(source.inputs("k", 0))
    again, _ = next(training_batches(data, 21, 3, data.augment).inputs("k", 0))
    plain, _ = next(training_batches(data, 21, 3, False).inputs("k", 0))
    other, _ = next(source.inputs("k", 1))
    assert torch.equal(pixels, again) and not torch.equal(pixels, plain) and not torch.equal(pixels, other)


def test_a_random_crop_of_the_whole_picture_is_the_picture(tmp_path, monkeypatch):
    write_folder(tmp_path, make=lambda seed, size: noise(seed, (8, 8)))
    data = loaded(tmp_path, crop="random")
    monkeypatch.setattr(streaming, "random_box", lambda numbers, width, height: (0, 0, width, height))
    pixels, labels = next(training_batches(data, len(data.train), 0, True).inputs("k", 0))
    plain, _ = next(training_batches(data, len(data.train), 0, False).inputs("k", 0))
    flipped = (pixels == plain.flip(3)).flatten(1).all(1)
    assert ((pixels == plain).flatten(1).all(1) ^ flipped).all() and 3 < flipped.sum() < len(labels) - 3


def test_boxes_lie_within_the_picture_and_follow_the_numbers():
    numbers = crop_numbers(torch.arange(2000), range(TRIES), 5)
    assert numbers.shape == (2000, TRIES, 4) and 0 <= numbers.min() and numbers.max() < 1
    assert numbers.flatten(0, 1).mean(0).sub(0.5).abs().max() < 0.01
    assert torch.equal(numbers[7:9], crop_numbers(torch.tensor([7, 8]), range(TRIES), 5))
    for width, height in ((40, 30), (5, 90), (1, 1), (300, 2)):
        for row in numbers[:300].tolist():
            left, top, right, bottom = random_box(row, width, height)
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
    boxes = np.array([random_box(row, 400, 300) for row in numbers.tolist()])
    across, down = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    areas, ratios = across * down / 120_000, across / down
    assert AREA[0] - 0.01 < areas.min() < 0.1 and 0.9 < areas.max() <= AREA[1]
    assert RATIO[0] - 0.02 < ratios.min() < 0.78 and 1.3 < ratios.max() < RATIO[1] + 0.02
    assert (boxes[:, 0] == 0).any() and (boxes[:, 2] == 400).any()


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("pictures")]


def test_nothing_is_left_running(folder):
    source = batches(loaded(folder), 2)
    stopped = source.epoch("k", 0)
    next(stopped)
    assert reading_threads()
    stopped.close()
    del stopped
    assert not reading_threads()
    with pytest.raises(KeyboardInterrupt):
        for _ in source.inputs("k", 0):
            raise KeyboardInterrupt
    assert len(epoch(source)) == source.steps_per_epoch and not reading_threads()


def test_it_reads_ahead_and_no_further(folder, monkeypatch):
    data, read = loaded(folder), []
    plain = streaming.read_picture
    monkeypatch.setattr(streaming, "read_picture", lambda file, mode: read.append(file) or plain(file, mode))
    steps = batches(data, 2).inputs("k", 0)
    next(steps)
    time.sleep(0.2)
    assert len(read) == 2 * (1 + streaming.AHEAD)
    del steps


@pytest.mark.parametrize("loader", ["resident", "torch"])
def test_damaged_pictures_are_named_and_stood_in_for(folder, loader):
    expected = loaded(folder, "resident")
    cut_short(folder / "train" / "a" / "003.png")
    (folder / "val" / "b" / "002.png").write_text("<html>")
    with pytest.warns(UserWarning) as said:
        data = loaded(folder, loader)
        found, again = (every(data.train), every(data.validation)), every(data.train, 5)
    assert [str(warning.message).split("; ")[1] for warning in said] == [
        f"another picture of its class stands in for it ({number} of at most 10)" for number in (1, 2)]
    assert {file.name for file in data.damage.found} == {"003.png", "002.png"} and torch.equal(found[0], again)
    train, validation = every(expected.train).clone(), every(expected.validation).clone()
    train[3], validation[6] = train[4], validation[4]  # the next one of its class, and, from its end, the first
    assert torch.equal(found[0], train) and torch.equal(found[1], validation)


def test_a_file_may_be_called_what_is_no_text(folder):
    file = folder / "train" / "a" / "000.png"
    before = loaded(folder).checksum()
    file.rename(file.with_name(os.fsdecode(b"caf\xe9.png")))
    assert len(loaded(folder).checksum()) == 64 and loaded(folder).checksum() != before


@pytest.mark.parametrize("loader", ["resident", "torch"])
def test_too_many_damaged_pictures_stop_it(folder, loader):
    for number in (1, 4, 7):
        cut_short(folder / "train" / "b" / f"{number:03}.png")
    with pytest.warns(UserWarning, match="1 of at most 2"), pytest.raises(DataError, match="so far 3 cannot be, and corrupt_limit is 2"):
        loaded(folder, loader, corrupt_limit=2)
    with pytest.raises(DataError, match="so far 1 cannot be"):
        loaded(folder, loader, corrupt_limit=0)
    assert not reading_threads()


def test_a_class_without_one_readable_picture_stops_it(folder):
    for number in range(3):
        cut_short(folder / "val" / "b" / f"{number:03}.png")
    data = loaded(folder)
    with pytest.warns(UserWarning), pytest.raises(DataError, match="val/b: none of the pictures of this class can be read"):
        list(data.validation.in_order(8))


def test_damage_that_comes_later_goes_where_it_is_told(folder):
    data, said = loaded(folder), []
    data.damage.tell = said.append
    cut_short(folder / "train" / "a" / "000.png")
    first = epoch(batches(data))
    assert len(said) == 1 and "a/000.png" in said[0] and same(first, epoch(batches(data)))


def test_the_checksum_is_of_the_files(folder):
    def checksum(**options):
        return loaded(folder, **options).checksum()

    first = checksum()
    assert first == checksum() and first != checksum(image_size=9)
    assert loaded(folder).limit_train(8, 0).checksum() != first
    file = folder / "train" / "a" / "003.png"
    content = file.read_bytes()
    file.write_bytes(content + b"more")
    assert checksum() != first
    file.write_bytes(content)
    assert checksum() == first
    file.rename(file.with_name("003b.png"))
    assert checksum() != first


def test_auto_keeps_what_fits_in_half_of_the_memory(folder, monkeypatch):
    needed = 28 * 3 * 8 * 8
    monkeypatch.setattr(loading, "machine_memory", lambda: 2 * needed)
    data = loaded(folder, "auto")
    assert data.loader == "resident" and "at most 50% of the machine's" in data.loader_reason
    monkeypatch.setattr(loading, "machine_memory", lambda: 2 * needed - 1)
    data = loaded(folder, "auto")
    assert data.loader in ("dali", "torch") and "more than 50% of the machine's" in data.loader_reason
    assert loaded(folder, "resident").loader_reason == "asked for"
    monkeypatch.setattr(loading, "machine_memory", lambda: needed)
    with pytest.raises(DataError, match="28 pictures of 8x8 need .*smaller image_size, or choose --loader auto"):
        loaded(folder, "resident")


def test_auto_names_dali_where_it_is_missing(folder, monkeypatch):
    monkeypatch.setattr(loading, "machine_memory", lambda: 1000)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    data = loaded(folder, "auto")
    assert data.loader == "torch" and "pip install nvidia-dali-cuda130" in data.loader_reason
    for load_it in (lambda: loaded(folder, "dali"), lambda: load("digits", loader="dali")):
        with pytest.raises(DataError, match="--loader dali needs nvidia-dali-cuda130: pip install"):
            load_it()


def test_loaders_that_cannot_be_are_refused(folder):
    with pytest.raises(DataError, match="random crops are cut from whole ones"):
        loaded(folder, "resident", crop="random")
    with pytest.raises(DataError, match="torch decodes picture files .* digits is in memory"):
        load("digits", loader="torch")
    with pytest.raises(DataError, match="crop random makes no sense for digits"):
        load("digits", crop="random")
    with pytest.raises(DataError, match="loader is 'quick'"):
        loaded(folder, "quick")


def test_pictures_are_limited_and_relabelled_like_arrays(folder):
    streamed, resident = loaded(folder).limit_train(9, 5), loaded(folder, "resident").limit_train(9, 5)
    assert same(epoch(training_batches(streamed, 4, 0, False)), epoch(training_batches(resident, 4, 0, False)))
    numbered = streamed.train.relabelled(torch.arange(9))
    labels = torch.cat([y for _, y in epoch(training_batches(streamed, 4, 0, False, split=numbered))])
    assert sorted(labels.tolist()) == list(range(9))


def test_greys_and_transparency_as_the_reader_of_one_picture_has_them(folder):
    Image.new("L", (30, 30), 77).save(folder / "train" / "a" / "000.png")
    Image.new("RGBA", (30, 30), (0, 0, 0, 0)).save(folder / "train" / "a" / "001.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images, _ = next(loaded(folder).train.in_order(2))
    assert (images[0] == 77).all() and (images[1] == 255).all()
