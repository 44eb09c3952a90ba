"""data/cifar.py: the official layout of CIFAR-10 and CIFAR-100, whole and damaged."""

import os
import pickle
import shutil

import numpy as np
import pytest
import torch

from odn_fast.data import DataError, load

OFFICIAL = os.environ.get("ODN_FAST_DATA")
needs_official = pytest.mark.skipif(not OFFICIAL, reason="ODN_FAST_DATA does not name a folder of official data files")
TEN = [f"class {number}" for number in range(10)]


def pixels(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def batch(count, seed, classes=10, key="labels", **changes):
    fields = {"batch_label": "a batch", key: [i % classes for i in range(count)], "data": pixels(count, seed)}
    fields["filenames"] = ["a.png"] * count
    return {name: value for name, value in {**fields, **changes}.items() if value is not None}


def write(path, content, protocol=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol))


def write_cifar10(data_dir, protocol=2):
    folder = data_dir / "cifar-10-batches-py"
    for number in range(1, 6):
        write(folder / f"data_batch_{number}", batch(20 + number, number), protocol)
    write(folder / "test_batch", batch(12, 9), protocol)
    write(folder / "batches.meta", {"label_names": TEN, "num_vis": 3072}, protocol)
    return folder


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_cifar10_round_trip(tmp_path, protocol):
    write_cifar10(tmp_path, protocol)
    data = load("cifar10", tmp_path, download=False)
    assert (len(data.train), len(data.validation), len(data.test)) == (104, 11, 12)  # a tenth, as of the official 50,000
    expected = np.concatenate([pixels(20 + number, number) for number in range(1, 6)]).reshape(-1, 3, 32, 32)
    assert np.array_equal(torch.cat([data.train.images, data.validation.images]).numpy(), expected)
    assert data.test.labels.tolist() == [i % 10 for i in range(12)]
    assert data.class_names == tuple(TEN) and data.input_shape == (3, 32, 32)
    assert (data.augment, data.drop_last) == (True, True)
    assert (data.normalisation.scale, data.normalisation.mean, data.normalisation.std) == (255.0, (0.0,) * 3, (1.0,) * 3)
    data.test.images[0, 0, 0, 0] = 7  # the tensors are memory of their own, not views of a file's bytes


def test_cifar100_takes_the_fine_labels(tmp_path):
    names = [f"fine {number}" for number in range(100)]
    folder = tmp_path / "cifar-100-python"
    write(folder / "train", batch(200, 1, 100, "fine_labels", coarse_labels=[0] * 200))
    write(folder / "test", batch(100, 2, 100, "fine_labels", coarse_labels=[0] * 100))
    write(folder / "meta", {"fine_label_names": names, "coarse_label_names": ["x"] * 20})
    data = load("cifar100", tmp_path, download=False)
    assert (len(data.train), len(data.validation), len(data.test)) == (180, 20, 100)
    assert data.test.labels.tolist() == list(range(100)) and data.class_names == tuple(names)
    assert (data.augment, data.drop_last) == (True, True)


class Attack:
    def __reduce__(self):
        return os.system, ("touch harm",)


DAMAGES = {
    "empty": (b"", "empty"),
    "text": (b"<html>not found</html>", "refused|damaged"),
    "cut": (pickle.dumps(batch(20, 1))[:-2000], "ends early"),
    "bytes behind": (pickle.dumps(batch(20, 1), 2) + b"x", "1 bytes follow"),
    "a list": (pickle.dumps([1, 2]), "expected a dictionary"),
    "no data": (pickle.dumps(batch(20, 1, data=None), 2), "'data' is NoneType"),
    "no labels": (pickle.dumps(batch(20, 1, labels=None), 2), "'labels' is no list"),
    "float data": (pickle.dumps(batch(20, 1, data=np.zeros((20, 3072))), 2), "expected uint8"),
    "28x28 grey": (pickle.dumps(batch(20, 1, data=np.zeros((20, 784), np.uint8)), 2), r"\(20, 784\), expected"),
    "flat": (pickle.dumps(batch(20, 1, data=np.zeros(20 * 3072, np.uint8)), 2), "expected uint8"),
    "one label fewer": (pickle.dumps(batch(20, 1, labels=[0] * 19), 2), "20 images but 19 labels"),
    "label 10": (pickle.dumps(batch(20, 1, labels=[10] * 20), 2), r"labels 10..10, expected 0..9"),
    "label -1": (pickle.dumps(batch(20, 1, labels=[-1] * 20), 2), r"labels -1..-1"),
    "labels as text": (pickle.dumps(batch(20, 1, labels=["0"] * 20), 2), "no list of whole numbers"),
    "labels as true": (pickle.dumps(batch(20, 1, labels=[True] * 20), 2), "no list of whole numbers"),
    "code as data": (pickle.dumps(batch(20, 1, data=Attack()), 2), "system.*refused"),
    "code beside data": (pickle.dumps(batch(20, 1, note=Attack()), 2), "system.*refused"),
    "objects as data": (pickle.dumps(batch(20, 1, data=np.array([None] * 20)), 2), "only plain numbers"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_batches_give_one_line_naming_the_file(tmp_path, monkeypatch, content, message):
    folder = write_cifar10(tmp_path)
    monkeypatch.chdir(tmp_path)
    (folder / "data_batch_3").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load("cifar10", tmp_path, download=False)
    assert "data_batch_3" in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("harm"))


@pytest.mark.parametrize(
    "names", [None, TEN[:9], list(range(10)), b"abcdefghij", [b"\xff"] * 10], ids=["missing", "nine", "numbers", "text", "no UTF-8"]
)
def test_damaged_class_names(tmp_path, names):
    folder = write_cifar10(tmp_path)
    write(folder / "batches.meta", {"label_names": names} if names is not None else {}, protocol=3)
    with pytest.raises(DataError, match="batches.meta"):
        load("cifar10", tmp_path, download=False)


def test_missing_and_misplaced_files(tmp_path):
    folder = write_cifar10(tmp_path)
    (folder / "data_batch_4").unlink()
    with pytest.raises(DataError, match="data_batch_4 not found in .*cifar-10-python.tar.gz"):
        load("cifar10", tmp_path, download=False)
    (folder / "data_batch_4").mkdir()
    with pytest.raises(DataError, match="data_batch_4: is a folder"):
        load("cifar10", tmp_path, download=False)
    shutil.copy(folder / "batches.meta", folder / "test_batch")
    (folder / "data_batch_4").rmdir()
    write(folder / "data_batch_4", batch(20, 4))
    with pytest.raises(DataError, match="test_batch: 'data' is NoneType"):
        load("cifar10", tmp_path, download=False)


@needs_official
def test_official_files():
    data = load("cifar10", OFFICIAL, download=False)
    assert (len(data.train), len(data.validation), len(data.test)) == (45_000, 5_000, 10_000)
    assert torch.bincount(torch.cat([data.train.labels, data.validation.labels])).tolist() == [5000] * 10
    assert torch.bincount(data.test.labels).tolist() == [1000] * 10
    assert data.class_names == ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    assert data.train.labels[:5].tolist() == [6, 9, 9, 4, 1]
    with open(os.path.join(OFFICIAL, "cifar-10-batches-py", "data_batch_5"), "rb") as file:
        expected = pickle.load(file, encoding="bytes")[b"data"][5000:].reshape(-1, 3, 32, 32)
    assert np.array_equal(data.validation.images.numpy(), expected)
    # the means that are published for CIFAR-10
    assert (torch.cat([data.train.images, data.validation.images]).double().mean((0, 2, 3)) / 255).tolist() == pytest.approx(
        [0.4914, 0.4822, 0.4465], abs=1e-4
    )
