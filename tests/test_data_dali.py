"""data/dali.py: NVIDIA DALI makes the same batches as the plain reader, within the tolerance of decoders."""

import gc
import os
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from picture_cases import cut_short, encoded, noise, shapes, write_folder

from odn_fast.data import DataError, Normalisation, Split, load, training_batches
from odn_fast.data.batches import Batches

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed: pip install nvidia-dali-cuda130")
from odn_fast.data import dali  # noqa: E402
from odn_fast.data.dali import ArrayBatches, inspect  # noqa: E402

OFFICIAL = os.environ.get("ODN_FAST_DATA")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path)
    return write_folder(tmp_path, (("a", 4), ("b", 3)), split="val")


def loaded(folder, loader, device="cpu", **options):
    return load(f"imagefolder:{folder}", loader=loader, **{"image_size": 8} | options).to(device)


def both(folder, device="cpu", **options):
    return loaded(folder, "dali", device, **options), loaded(folder, "torch", device, **options)


def pixels(data, split="train", batch_size=5):
    return torch.cat([images for images, _ in getattr(data, split).in_order(batch_size)]).int().cpu()


def most_inside(found, expected):
    """Largest difference in levels, of each image, but for its border: there DALI repeats pixels beyond the picture's own
    border, and Pillow leaves them out, which differs with noise."""
    return (found - expected)[:, :, 1:-1, 1:-1].abs().flatten(1).max(1).values


def levels(data, x):
    return (data.normalisation.scale * x * torch.tensor(data.normalisation.std)[:, None, None]).round()


def epoch(data, number=0, start=0, augment=False, batch_size=4, **options):
    source = training_batches(data, batch_size, 3, augment)
    return [(x.clone(), y.clone()) for x, y in source.epoch("k", number, start)]


@pytest.mark.parametrize("device", DEVICES)
def test_png_of_the_right_size_is_exact(tmp_path, device):
    write_folder(tmp_path, make=lambda seed, size: noise(seed, (8, 8)))
    ours, plain = both(tmp_path, device)
    assert torch.equal(pixels(ours), pixels(plain))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [8, 15, 64])
def test_resized_png_is_within_one_level(folder, size, device):
    ours, plain = both(folder, device, image_size=size)
    assert most_inside(pixels(ours), pixels(plain)).max() <= 1
    assert (pixels(ours) - pixels(plain)).abs().float().mean() < 1.5


@pytest.mark.parametrize("device", DEVICES)
def test_jpeg_is_within_decoder_tolerance(tmp_path, device):
    write_folder(tmp_path, suffix="jpg", make=lambda seed, size: shapes(seed))
    ours, plain = both(tmp_path, device, image_size=48)
    difference = (pixels(ours) - pixels(plain)).abs().float()
    assert difference.max() <= 4 and difference.mean() < 0.6


@pytest.mark.skipif(not OFFICIAL, reason="ODN_FAST_DATA does not name a folder of official data files")
@pytest.mark.parametrize("crop", ["centre", "random"])
def test_photographs_are_within_decoder_tolerance(crop):
    ours, plain = both(Path(OFFICIAL) / "imagefolder-jpeg", image_size=64, crop=crop)
    assert (pixels(ours) - pixels(plain)).abs().float().mean() < 0.3
    for (x, y), (u, v) in zip(epoch(ours, augment=crop == "random"), epoch(plain, augment=crop == "random"), strict=True):
        assert torch.equal(y, v)
        assert most_inside(levels(ours, x), levels(ours, u)).max() <= 2


def test_random_crops_and_flips_are_the_plain_reader_s(folder):
    ours, plain = both(folder, crop="random")
    for number in range(2):
        found, expected = epoch(ours, number, augment=True), epoch(plain, number, augment=True)
        for (x, y), (u, v) in zip(found, expected, strict=True):
            assert torch.equal(y, v) and most_inside(levels(ours, x), levels(ours, u)).max() <= 1


@pytest.mark.parametrize("device", DEVICES)
def test_lengths_of_epochs_are_right_over_several(folder, device):
    data = loaded(folder, "dali", device)
    for batch_size in (4, 5, 50):  # 21 pictures: one is left over at 4 and 5, and joins the batch before it
        source = training_batches(data, batch_size, 0, False)
        for number in range(3):
            sizes = [len(y) for _, y in source.epoch("k", number)]
            assert len(sizes) == source.steps_per_epoch and sum(sizes) == source.images_per_epoch == 21
    assert [len(y) for _, y in data.validation.in_order(3)] == [3, 3, 1]
    assert [len(images) for images, _ in data.validation.in_order(4)] == [4, 3]


@pytest.mark.parametrize("crop", ["centre", "random"])
def test_large_batches_are_made_of_parts(folder, crop, monkeypatch):
    data = loaded(folder, "dali", crop=crop)
    whole = epoch(data, augment=data.augment, batch_size=10)
    monkeypatch.setattr(dali, "PART", 4)
    parts = epoch(data, augment=data.augment, batch_size=10)
    assert [len(y) for _, y in parts] == [10, 11]
    assert all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(parts, whole, strict=True))


@pytest.mark.parametrize("crop", ["centre", "random"])
def test_an_epoch_goes_on_from_any_step(folder, crop):
    data = loaded(folder, "dali", crop=crop)
    whole = epoch(data, 2, augment=data.augment)
    for start in range(len(whole) + 1):
        rest = epoch(data, 2, start, augment=data.augment)
        assert len(rest) == len(whole) - start
        assert all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(rest, whole[start:]))


def test_nothing_is_left_running(folder):
    data = loaded(folder, "dali")
    epoch(data)
    gc.collect()
    before = len(os.listdir("/proc/self/task"))
    steps = training_batches(data, 2, 0, False).inputs("k", 0)
    next(steps)
    assert len(os.listdir("/proc/self/task")) > before
    steps.close()
    gc.collect()
    deadline = time.monotonic() + 10  # the threads of a pipeline that was dropped take a moment
    while len(os.listdir("/proc/self/task")) > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(os.listdir("/proc/self/task")) <= before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pictures")]


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_damaged_pictures_are_those_of_the_plain_reader(tmp_path, suffix):
    write_folder(tmp_path, suffix=suffix, make=lambda seed, size: shapes(seed))
    ours, plain = both(tmp_path)
    cut_short(tmp_path / "train" / "a" / f"003.{suffix}")
    (tmp_path / "train" / "b" / f"008.{suffix}").write_text("<html>404</html>")
    with pytest.warns(UserWarning, match="stands in for it"):
        found, expected = pixels(ours, batch_size=4), pixels(plain, batch_size=4)
    assert set(ours.damage.found) == set(plain.damage.found) and len(ours.damage.found) >= 1
    assert most_inside(found, expected).max() <= 2
    assert torch.equal(pixels(ours, batch_size=4), found)


def test_a_batch_that_dali_cannot_decode_is_traced_to_its_picture(folder):
    """The header is right, and the fault inside: DALI fails, and says of which of its batches, not of which file."""
    ours, plain = both(folder)
    file = folder / "train" / "a" / "005.png"
    content = bytearray(file.read_bytes())
    content[len(content) // 2:len(content) // 2 + 40] = bytes(40)
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="a/005.png.*stands in for it"):
        found, expected = pixels(ours, batch_size=4), pixels(plain, batch_size=4)
    assert [path.name for path in ours.damage.found] == ["005.png"] and len(found) == len(ours.train)
    assert most_inside(found, expected).max() <= 1


def test_a_picture_that_only_dali_cannot_decode_is_decoded_for_it(folder, monkeypatch):
    """DALI is made to be given a picture of a kind that it does not know; the plain reader has no fault to find."""
    place = folder / "train" / "a" / "005.png"
    place.write_bytes(encoded(noise(5), "GIF"))
    ours, plain = both(folder)
    monkeypatch.setattr(dali, "inspect", lambda file, content: inspect(file, content)._replace(alike=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, expected = pixels(ours, batch_size=4), pixels(plain, batch_size=4)
    assert most_inside(found, expected).max() <= 1 and not ours.damage.found


def test_a_pipeline_that_fails_for_other_reasons_is_given_up(folder, monkeypatch):
    def fail(*_):
        raise RuntimeError("Critical error in pipeline:\n\nencountered:\n\nout of memory\n")
        yield

    data = loaded(folder, "dali")
    monkeypatch.setattr(dali, "_outputs", fail)
    with pytest.raises(DataError, match=r"DALI cannot go on \(out of memory\); choose --loader torch"):
        pixels(data)


def test_too_many_damaged_pictures_stop_it(folder):
    data = loaded(folder, "dali", corrupt_limit=1)
    for number in (1, 4):
        cut_short(folder / "train" / "b" / f"{number:03}.png")
    with pytest.warns(UserWarning, match="1 of at most 1"), pytest.raises(DataError, match="so far 2 cannot be, and corrupt_limit is 1"):
        pixels(data)


def test_kinds_of_pictures_that_dali_reads_otherwise(folder):
    """Grey, transparent, 16-bit, with a palette, turned by a note, CMYK, of other formats: as the plain reader has them."""
    place = folder / "train" / "a"
    picture = noise(1, (30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures = {
        "000.png": encoded(picture.convert("L"), "PNG"),
        "001.png": encoded(picture.convert("RGBA").rotate(20), "PNG"),
        "002.png": encoded(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50), "PNG"),
        "003.png": encoded(picture.quantize(16), "PNG"),
        "004.jpg": encoded(shapes(3), "JPEG", exif=exif),
        "005.jpg": encoded(shapes(4).convert("CMYK"), "JPEG"),
        "006.gif": encoded(picture.quantize(16), "GIF"),
        "007.bmp": encoded(picture, "BMP"),
        "008.webp": encoded(picture, "WEBP", lossless=True),
        "009.tif": encoded(picture, "TIFF"),
        "010.jpg": encoded(shapes(5).convert("L"), "JPEG"),
        "011.png": encoded(picture, "PNG", exif=exif),
    }
    for name, content in pictures.items():
        (place / f"{name[:3]}.png").unlink()
        (place / name).write_bytes(content)
    ours, plain = both(folder, image_size=12)
    assert most_inside(pixels(ours), pixels(plain)).max() <= 2
    alike = [inspect(place / name, content).alike for name, content in pictures.items()]
    assert alike == [True, False, False, False, True, False, False, False, False, False, True, False]
    assert inspect(place / "004.jpg", pictures["004.jpg"])[:2] == (60, 80)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_through_dali_are_the_resident_batches(channels, augment, device):
    generator = torch.Generator().manual_seed(0)
    split = Split(torch.randint(0, 256, (45, channels, 9, 7), dtype=torch.uint8, generator=generator), torch.arange(45)).to(device)
    how = Normalisation(255, (0.4, 0.5, 0.6)[:channels], (0.2, 0.3, 0.1)[:channels])
    ours, expected = (kind(split, how, 8, 1, augment) for kind in (ArrayBatches, Batches))
    for number in range(3):
        found, wanted = list(ours.epoch("k", number)), list(expected.epoch("k", number))
        assert [len(y) for _, y in found] == [8, 8, 8, 8, 8, 5]
        for (x, y), (u, v) in zip(found, wanted, strict=True):
            assert torch.equal(y, v) and torch.allclose(x, u, atol=1e-5)
            assert x.is_contiguous(memory_format=torch.channels_last) or channels == 1
    assert torch.equal(next(ours.epoch("k", 1, start=4))[1], list(expected.epoch("k", 1))[4][1]) and not list(ours.epoch("k", 0, start=6))


def test_arrays_of_bytes_only(tmp_path):
    np.savez(tmp_path / "set.npz", x=np.random.default_rng(0).integers(0, 256, (40, 6, 6, 3), dtype=np.uint8), y=np.arange(40) % 2)
    np.savez(tmp_path / "floats.npz", x=np.zeros((40, 6, 6, 3), np.float32), y=np.arange(40) % 2)
    data = load(f"npz:{tmp_path}/set.npz", loader="dali")
    assert data.loader == "dali" and isinstance(training_batches(data, 8, 0, False), ArrayBatches)
    with pytest.raises(DataError, match="dali takes bytes"):
        load(f"npz:{tmp_path}/floats.npz", loader="dali")
