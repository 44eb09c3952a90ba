"""data/idx.py: IDX files, plain and gzip-compressed, whole and damaged; the official MNIST files."""

import gzip
import os
import shutil
import struct

import numpy as np
import pytest
import torch

from odn_fast.data import DataError, load
from odn_fast.data.idx import read_idx

OFFICIAL = os.environ.get("ODN_FAST_DATA")
needs_official = pytest.mark.skipif(not OFFICIAL, reason="ODN_FAST_DATA does not name a folder of official data files")


def idx_bytes(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def images_of(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 28, 28), dtype=np.uint8)


def write_set(data_dir, folder="MNIST", prefixes=("train", "t10k"), counts=(60, 10), first_label=0, classes=10, pack=None):
    raw = data_dir / folder / "raw"
    raw.mkdir(parents=True)
    for prefix, count in zip(prefixes, counts):
        labels = (np.arange(count) % classes + first_label).astype(np.uint8)
        for name, array in ((f"{prefix}-images-idx3-ubyte", images_of(count)), (f"{prefix}-labels-idx1-ubyte", labels)):
            if pack:
                (raw / f"{name}.gz").write_bytes(pack(idx_bytes(array)))
            else:
                (raw / name).write_bytes(idx_bytes(array))
    return raw


@pytest.mark.parametrize("pack", [None, gzip.compress], ids=["plain", "gz"])
def test_round_trip(tmp_path, pack):
    write_set(tmp_path, pack=pack)
    data = load("mnist", tmp_path, download=False)
    assert data.input_shape == (1, 28, 28) and data.class_names == tuple("0123456789")
    assert (len(data.train), len(data.validation), len(data.test)) == (50, 10, 10)  # a sixth, as of the official 60,000
    images = torch.cat([data.train.images, data.validation.images])[:, 0]
    assert torch.equal(images, torch.from_numpy(images_of(60))) and images.dtype == torch.uint8
    assert torch.cat([data.train.labels, data.validation.labels]).tolist() == [i % 10 for i in range(60)]
    assert (data.augment, data.drop_last) == (False, False)
    assert (data.normalisation.scale, data.normalisation.mean, data.normalisation.std) == (255.0, (0.1307,), (0.3081,))


def test_fashion_names_and_constants(tmp_path):
    write_set(tmp_path, "FashionMNIST")
    data = load("fashion-mnist", tmp_path, download=False)
    assert data.class_names[0] == "T-shirt/top" and data.class_names[9] == "Ankle boot" and len(data.class_names) == 10
    assert (data.normalisation.mean, data.normalisation.std) == ((0.2860,), (0.3530,))


def test_emnist_letters_are_counted_from_0_and_turned_upright(tmp_path):
    write_set(tmp_path, "EMNIST", ("emnist-letters-train", "emnist-letters-test"), (260, 26), first_label=1, classes=26)
    data = load("emnist-letters", tmp_path, download=False)
    assert (len(data.train), len(data.validation), len(data.test)) == (234, 26, 26)
    assert data.test.labels.tolist() == list(range(26)) and data.class_names[0] == "a" and data.class_names[25] == "z"
    assert torch.equal(data.test.images[:, 0], torch.from_numpy(images_of(26)).transpose(1, 2))
    assert data.normalisation.mean == (0.1307,)


def test_uncompressed_file_is_preferred(tmp_path):
    raw = write_set(tmp_path)
    (raw / "train-images-idx3-ubyte.gz").write_bytes(b"not even gzip")
    assert len(load("mnist", tmp_path, download=False).train) == 50


def test_gzip_of_several_members_and_zero_padding(tmp_path):
    content = idx_bytes(images_of(5))
    file = tmp_path / "images.gz"
    file.write_bytes(gzip.compress(content[:1000]) + gzip.compress(content[1000:]) + bytes(100))
    assert np.array_equal(read_idx(file, 3), images_of(5))


LABELS = (np.arange(60) % 10).astype(np.uint8)
WHOLE = idx_bytes(images_of(60))
PACKED = gzip.compress(WHOLE)


def header(*sizes):
    return struct.pack(f">HBB{len(sizes)}I", 0, 8, len(sizes), *sizes)


IMAGE_DAMAGES = {
    "empty": (b"", "empty"),
    "cut in the magic": (WHOLE[:3], "no IDX file"),
    "cut in the header": (WHOLE[:10], "ends inside its header"),
    "cut by one byte": (WHOLE[:-1], "calls for"),
    "one byte too many": (WHOLE + b"\0", "calls for"),
    "labels instead of images": (idx_bytes(LABELS), "holds labels, expected images"),
    "floats": (b"\0\0\x0d\x03" + WHOLE[4:], "no IDX file of unsigned bytes"),
    "two dimensions": (idx_bytes(images_of(60).reshape(60, 784)), "2 dimensions"),
    "2^31 images": (header(1 << 31, 28, 28) + WHOLE[16:], "claims 2147483648 entries"),
    "4,000,000 images": (header(4_000_000, 28, 28) + WHOLE[16:], "calls for"),
    "all sizes 2^32-1": (header(*(2**32 - 1,) * 3), "expected 28x28"),
    "one image fewer": (idx_bytes(images_of(59)), "holds 60 labels"),
    "32x32": (idx_bytes(np.zeros((60, 32, 32), np.uint8)), "32x32 pixels, expected 28x28"),
    "text": (b"<html>404 not found</html>", "no IDX file"),
    "gzip without .gz": (PACKED, "no IDX file"),
    "no images": (header(0, 28, 28), "holds 60 labels"),
}
GZIP_DAMAGES = {
    "not gzip": (WHOLE, "Not a gzipped file"),
    "empty": (b"", "empty"),
    "cut in half": (PACKED[: len(PACKED) // 2], "damaged|ends"),
    "cut in the checksum": (PACKED[:-6], "ends|damaged|end-of-stream"),
    "wrong checksum": (PACKED[:-8] + b"\0\0\0\0" + PACKED[-4:], "CRC"),
    "rubbish behind": (PACKED + b"rubbish", "Not a gzipped file"),
    "second member behind": (PACKED + gzip.compress(b"x"), "holds more"),
    "content cut": (gzip.compress(WHOLE[:-1]), "1 bytes early"),
    "content too long": (gzip.compress(WHOLE + b"\0"), "holds more"),
    "2^31 images": (gzip.compress(header(1 << 31, 28, 28) + WHOLE[16:]), "claims 2147483648 entries"),
    "4,000,000 images": (gzip.compress(header(4_000_000, 28, 28) + WHOLE[16:]), "can hold"),
    "bomb": (gzip.compress(idx_bytes(images_of(60)) + bytes(30_000_000)), "holds more"),
    "only the header": (gzip.compress(header(60, 28, 28)), "can hold|early"),
    "labels": (gzip.compress(idx_bytes(LABELS)), "holds labels"),
}


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [pytest.param("", *damage, id=f"plain-{name}") for name, damage in IMAGE_DAMAGES.items()]
    + [pytest.param(".gz", *damage, id=f"gz-{name}") for name, damage in GZIP_DAMAGES.items()],
)
def test_damaged_images_give_one_line_naming_the_file(tmp_path, suffix, content, message):
    raw = write_set(tmp_path)
    whole = raw / "train-images-idx3-ubyte"
    whole.unlink()
    whole.with_name(whole.name + suffix).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load("mnist", tmp_path, download=False)
    assert f"{whole.name}{suffix}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx_bytes(images_of(60)), "holds images, expected labels"),
        (idx_bytes(LABELS[:-1]), "holds 59 labels"),
        (idx_bytes(LABELS + 1), r"labels 1..10, expected 0..9"),
        (header(2**32 - 1) + LABELS.tobytes(), "claims 4294967295 entries"),
    ],
)
def test_damaged_labels(tmp_path, content, message):
    raw = write_set(tmp_path)
    (raw / "train-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load("mnist", tmp_path, download=False)
    assert "train-labels-idx1-ubyte" in str(caught.value)


def test_emnist_label_0_is_refused(tmp_path):
    write_set(tmp_path, "EMNIST", ("emnist-letters-train", "emnist-letters-test"), (260, 26), first_label=0, classes=26)
    with pytest.raises(DataError, match=r"labels 0..25, expected 1..26"):
        load("emnist-letters", tmp_path, download=False)


def test_a_folder_or_a_pipe_in_place_of_the_file(tmp_path):
    raw = write_set(tmp_path)
    for make, word in ((os.mkdir, "folder"), (os.mkfifo, "regular")):
        shutil.rmtree(raw.parent)
        write_set(tmp_path)
        (raw / "t10k-labels-idx1-ubyte").unlink()
        make(raw / "t10k-labels-idx1-ubyte")
        with pytest.raises(DataError, match=word) as caught:
            load("mnist", tmp_path, download=False)
        assert "t10k-labels-idx1-ubyte" in str(caught.value)


def test_missing_file_names_file_folder_and_address(tmp_path):
    raw = write_set(tmp_path)
    (raw / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(DataError) as caught:
        load("mnist", tmp_path, download=False)
    for word in ("t10k-images-idx3-ubyte.gz", str(raw), "https://ossci-datasets.s3.amazonaws.com/mnist/"):
        assert word in str(caught.value)


def test_empty_test_and_too_small_training_sets(tmp_path):
    write_set(tmp_path / "a", counts=(60, 0))
    with pytest.raises(DataError, match="test split is empty"):
        load("mnist", tmp_path / "a", download=False)
    write_set(tmp_path / "b", counts=(1, 1))
    with pytest.raises(DataError, match="holds 1 training images"):
        load("mnist", tmp_path / "b", download=False)
    write_set(tmp_path / "c", counts=(10, 60))
    with pytest.raises(DataError, match="10 training images but 60 test images; were the files swapped"):
        load("mnist", tmp_path / "c", download=False)


def test_random_damage_is_found_or_harmless(tmp_path):
    generator = np.random.default_rng(7)
    file = tmp_path / "images.gz"
    for _ in range(150):
        content = bytearray(PACKED)
        for position in generator.integers(0, len(content), 3):
            content[position] = generator.integers(0, 256)
        file.write_bytes(content[: generator.integers(1, len(content) + 1)])
        try:
            assert read_idx(file, 3).tobytes() == WHOLE[16:]
        except DataError as error:
            assert str(file) in str(error)


@needs_official
@pytest.mark.parametrize(
    ("name", "train_histogram", "test_histogram", "mean"),
    [
        ("mnist", [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
         [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009], 0.1307),
        ("fashion-mnist", [6000] * 10, [1000] * 10, 0.2860),
    ],
)  # fmt: skip
def test_official_files(name, train_histogram, test_histogram, mean):
    data = load(name, OFFICIAL, download=False)
    assert (len(data.train), len(data.validation), len(data.test)) == (50_000, 10_000, 10_000)
    labels = torch.cat([data.train.labels, data.validation.labels])
    assert torch.bincount(labels).tolist() == train_histogram
    assert torch.bincount(data.test.labels).tolist() == test_histogram
    images = torch.cat([data.train.images, data.validation.images])
    assert float(images.double().mean() / 255) == pytest.approx(mean, abs=1e-4)
    assert abs(float(data.normalisation(data.train.images[:5000]).mean())) < 0.02
