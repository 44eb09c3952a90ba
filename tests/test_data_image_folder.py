"""data/image_folder.py: folders of pictures as data sets."""

import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from odn_fast.data import DataError, load
from odn_fast.data.image import read_pixels

OFFICIAL = os.environ.get("ODN_FAST_DATA")
needs_official = pytest.mark.skipif(not OFFICIAL, reason="ODN_FAST_DATA does not name a folder of official data files")


def write_pictures(folder, count, seed=0, size=(12, 16)):
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for number in range(count):
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{number:03}.png")


def write_split(folder, counts):
    for seed, (name, count) in enumerate(counts.items()):
        write_pictures(folder / name, count, seed)


def test_folders_of_splits(tmp_path):
    write_split(tmp_path / "train", {"b": 4, "a": 6})
    write_split(tmp_path / "val", {"a": 2, "b": 1})
    write_split(tmp_path / "test", {"a": 1, "b": 2})
    data = load(f"imagefolder:{tmp_path}", image_size=8)
    assert (len(data.train), len(data.validation), len(data.test)) == (10, 3, 3)
    assert data.class_names == ("a", "b") and data.input_shape == (3, 8, 8)
    assert data.train.labels.tolist() == [0] * 6 + [1] * 4 and data.test.labels.tolist() == [0, 1, 1]
    expected = read_pixels(tmp_path / "train" / "b" / "002.png", 3, 8, 8)
    assert np.array_equal(data.train.images[8].permute(1, 2, 0).numpy(), expected)
    scaled = data.train.images.double() / 255
    assert data.normalisation.mean == pytest.approx(scaled.mean((0, 2, 3)).tolist())
    assert data.normalisation.std == pytest.approx(scaled.std((0, 2, 3), correction=0).tolist())
    assert (data.augment, data.drop_last, data.normalisation.scale) == (False, False, 255.0)
    assert data.name == f"imagefolder:{tmp_path}"


def test_one_folder_of_classes_and_its_default_size(tmp_path):
    write_split(tmp_path, {"a": 20, "b": 10})
    data = load(f"imagefolder:{tmp_path}")
    assert (len(data.train), len(data.validation), data.test) == (27, 3, None)
    assert data.input_shape == (3, 64, 64)
    assert torch.bincount(data.validation.labels).tolist() == [2, 1]


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_names_of_the_validation_folder(tmp_path, name):
    write_split(tmp_path / "train", {"a": 2, "b": 2})
    write_split(tmp_path / name, {"a": 1, "b": 1})
    assert len(load(f"imagefolder:{tmp_path}").validation) == 2


def test_fractions_where_folders_are_missing(tmp_path):
    write_split(tmp_path / "train", {"a": 20, "b": 20})
    data = load(f"imagefolder:{tmp_path}", val_fraction=0.25, test_fraction=0.1, seed=1, image_size=4)
    assert (len(data.train), len(data.validation), len(data.test)) == (26, 10, 4)
    again = load(f"imagefolder:{tmp_path}", val_fraction=0.25, test_fraction=0.1, seed=1, image_size=4)
    other = load(f"imagefolder:{tmp_path}", val_fraction=0.25, test_fraction=0.1, seed=2, image_size=4)
    assert data.checksum() == again.checksum() != other.checksum()
    pictures = {tuple(image.flatten().tolist()) for _, split in data.splits() for image in split.images}
    assert len(pictures) == 40  # nobody twice


def test_a_fraction_beside_the_folder_is_refused(tmp_path):
    write_split(tmp_path / "train", {"a": 2, "b": 2})
    write_split(tmp_path / "val", {"a": 1, "b": 1})
    write_split(tmp_path / "test", {"a": 1, "b": 1})
    for option in ("val_fraction", "test_fraction"):
        with pytest.raises(DataError, match=f"{option} makes no sense"):
            load(f"imagefolder:{tmp_path}", **{option: 0.1})


def test_hidden_files_and_folders_are_ignored_others_reported(tmp_path):
    write_split(tmp_path, {"a": 10, "b": 10, ".cache": 3})
    (tmp_path / "a" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "a" / "._000.png").write_bytes(b"x")
    write_pictures(tmp_path / "a" / ".thumbnails", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load(f"imagefolder:{tmp_path}").train) == 18
    (tmp_path / "b" / "notes.txt").write_text("x")
    (tmp_path / "b" / "picture.heic").write_text("x")
    with pytest.warns(UserWarning, match="2 files ignored .*notes.txt"):
        assert load(f"imagefolder:{tmp_path}").num_classes == 2


def test_pictures_in_deeper_folders_belong_to_the_class_and_links_end(tmp_path):
    write_split(tmp_path, {"a": 5, "b": 5})
    write_pictures(tmp_path / "a" / "more" / "deep", 3)
    os.symlink(tmp_path / "a", tmp_path / "a" / "more" / "round")
    os.symlink(tmp_path / "b" / "000.png", tmp_path / "b" / "link.png")
    data = load(f"imagefolder:{tmp_path}", image_size=4)
    labels = torch.cat([data.train.labels, data.validation.labels])
    assert torch.bincount(labels).tolist() == [8, 6]


def test_a_class_may_be_called_train(tmp_path):
    write_split(tmp_path, {"car": 5, "train": 5})
    assert load(f"imagefolder:{tmp_path}", image_size=4).class_names == ("car", "train")


def build_missing(root):
    return root / "nowhere"


def build_no_classes(root):
    write_pictures(root, 3)
    return root


def build_empty(root):
    return root


def build_empty_train(root):
    (root / "train").mkdir()
    (root / "val").mkdir()
    return root


def build_empty_class(root):
    write_split(root, {"a": 3})
    (root / "b").mkdir()
    return root


def build_flat_splits(root):
    write_split(root, {"train": 3, "val": 3})
    return root


def build_other_classes(root):
    write_split(root / "train", {"a": 3, "b": 3})
    write_split(root / "val", {"a": 3, "c": 3})
    return root


def build_fewer_classes(root):
    write_split(root / "train", {"a": 3, "b": 3})
    write_split(root / "test", {"a": 3})
    return root


def build_two_validations(root):
    write_split(root / "train", {"a": 3})
    (root / "val").mkdir()
    (root / "validation").mkdir()
    return root


def build_one_picture(root):
    write_split(root, {"a": 1, "b": 1})
    return root


def build_one_class(root):
    write_split(root, {"all": 3})
    return root


def build_file(root):
    (root / "file").write_text("x")
    return root / "file"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (build_missing, "nowhere: no such folder"),
        (build_no_classes, "has no sub-folders"),
        (build_empty, "has no sub-folders"),
        (build_empty_train, "train: has no sub-folders"),
        (build_empty_class, "b: holds no pictures"),
        (build_flat_splits, "train: has no sub-folders"),
        (build_other_classes, r"val: its classes differ .*\(b is in one only\)"),
        (build_fewer_classes, r"test: its classes differ .*\(b is in one only\)"),
        (build_two_validations, "both val and validation"),
        (build_one_picture, "too few training images"),
        (build_one_class, "has one sub-folder only, all; expected one for each of at least two classes"),
        (build_file, "file: no such folder"),
    ],
)
def test_unusable_folders_give_one_line(tmp_path, build, message):
    with pytest.raises(DataError, match=message) as caught:
        load(f"imagefolder:{build(tmp_path)}", image_size=8)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, -3, 5000])
def test_sizes_out_of_range_are_refused(tmp_path, size):
    with pytest.raises(DataError, match="image_size"):
        load(f"imagefolder:{tmp_path}", image_size=size)


def test_a_broken_link_and_a_page_are_damaged_pictures(tmp_path):
    write_split(tmp_path, {"a": 5, "b": 5})
    os.symlink(tmp_path / "gone.png", tmp_path / "a" / "link.png")
    (tmp_path / "b" / "page.jpg").write_text("<html>404</html>")
    with pytest.warns(UserWarning, match="link.png.*another picture of its class stands in for it"):
        data = load(f"imagefolder:{tmp_path}", image_size=8)
    assert {file.name for file in data.damage.found} == {"link.png", "page.jpg"} and len(data.train) + len(data.validation) == 12
    with pytest.raises(DataError, match="(link.png|page.jpg).*corrupt_limit is 0"):
        load(f"imagefolder:{tmp_path}", image_size=8, corrupt_limit=0)


def test_what_cannot_be_held_is_refused_before_decoding(tmp_path, monkeypatch):
    write_split(tmp_path, {"a": 5, "b": 5})
    (tmp_path / "a" / "000.png").write_bytes(b"would fail if it were opened")
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 1000}[name])
    with pytest.raises(DataError, match="smaller image_size"):
        load(f"imagefolder:{tmp_path}", loader="resident")


@needs_official
def test_jpeg_folder():
    data = load(f"imagefolder:{OFFICIAL}/imagefolder-jpeg")
    assert data.class_names == ("ants", "bees") and data.test is None
    assert torch.bincount(data.train.labels).tolist() == [16, 16]
    assert torch.bincount(data.validation.labels).tolist() == [5, 5]
    x = data.normalisation(data.train.images)
    assert x.mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-4)
    assert x.std((0, 2, 3)).tolist() == pytest.approx([1, 1, 1], abs=1e-3)


def test_split_folders_in_capitals_and_long(tmp_path):
    write_split(tmp_path / "TRAINING", {"a": 4, "b": 4})
    write_split(tmp_path / "Testing", {"a": 1, "b": 1})
    data = load(f"imagefolder:{tmp_path}", image_size=8)
    assert data.class_names == ("a", "b") and len(data.test) == 2


def test_a_test_folder_without_a_train_folder_is_no_class(tmp_path):
    write_split(tmp_path / "val", {"a": 4, "b": 4})
    write_split(tmp_path / "test", {"a": 1, "b": 1})
    with pytest.raises(DataError, match="holds val but no folder train"):
        load(f"imagefolder:{tmp_path}", image_size=8)
