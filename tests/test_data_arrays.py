"""data/arrays.py: .npz files, numpy arrays, tensors and torch Datasets."""

import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from odn_fast.data import DataError, from_arrays, load
from odn_fast.data.arrays import as_images, as_labels


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def labels_of(count, classes=3):
    return np.arange(count) % classes


def write(path, compressed=False, **arrays):
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return f"npz:{path}"


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_with_all_splits(tmp_path, compressed):
    arrays = {}
    for number, (split, count) in enumerate((("train", 30), ("val", 6), ("test", 9))):
        arrays |= {f"x_{split}": pixels(count, 7, 5, seed=number), f"y_{split}": labels_of(count).astype(np.int32)}
    data = load(write(tmp_path / "a.npz", compressed, **arrays))
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 6, 9)
    assert data.input_shape == (1, 7, 5) and data.class_names == ("0", "1", "2")
    assert np.array_equal(data.test.images[:, 0].numpy(), arrays["x_test"])
    assert data.normalisation.mean == pytest.approx([arrays["x_train"].mean() / 255])
    assert (data.augment, data.drop_last) == (False, False)


def test_npz_of_one_pair_is_split_by_fractions(tmp_path):
    name = write(tmp_path / "a.npz", x=pixels(60, 4, 4), y=labels_of(60))
    data = load(name)
    assert (len(data.train), len(data.validation), data.test) == (54, 6, None)
    data = load(name, val_fraction=0.2, test_fraction=0.1, seed=3)
    assert (len(data.train), len(data.validation), len(data.test)) == (42, 12, 6)
    assert data.checksum() == load(name, val_fraction=0.2, test_fraction=0.1, seed=3).checksum()
    assert data.checksum() != load(name, val_fraction=0.2, test_fraction=0.1, seed=4).checksum()


def test_npz_in_column_order_and_foreign_byte_order(tmp_path):
    x = np.asfortranarray(np.random.default_rng(0).random((20, 3, 5))).astype(">f4")
    data = load(write(tmp_path / "a.npz", x=x, y=labels_of(20).astype(">i8")))
    images = torch.cat([data.train.images, data.validation.images])
    assert sorted(images.flatten().tolist()) == sorted(x.flatten().tolist())
    assert data.normalisation(data.train.images).equal(data.train.images)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((6, 8, 9), (1, 8, 9)), ((6, 8, 9, 3), (3, 8, 9)), ((6, 8, 9, 1), (1, 8, 9)), ((6, 3, 8, 9), (3, 8, 9)), ((6, 1, 8, 9), (1, 8, 9)),
     ((6, 5, 8, 9), (5, 8, 9)), ((6, 3, 8, 3), (3, 8, 3))],
)  # fmt: skip
def test_layouts(shape, expected):
    images = as_images(pixels(*shape), "x")
    assert tuple(images.shape[1:]) == expected and images.is_contiguous()
    if shape == (6, 8, 9, 3):
        assert np.array_equal(images.numpy(), pixels(*shape).transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (pixels(6, 64), r"shape \(6, 64\)"),
        (pixels(6, 2, 2, 2, 2), "expected images"),
        (pixels(0, 8, 8), "none of them 0"),
        (pixels(6, 32, 32, 4), "channels that come last must be 1 or 3"),
        (np.full((2, 4, 4), np.nan), "not finite"),
        (np.full((2, 4, 4), 1e300), "not finite"),
        (np.full((2, 4, 4), 256), "values 256..256"),
        (np.full((2, 4, 4), -1), "values -1..-1"),
        (np.zeros((2, 4, 4), bool), "type bool"),
        (np.zeros((2, 4, 4), complex), "type complex128"),
        (np.full((2, 4, 4), None), "type object"),
        (np.full((2, 4, 4), "a"), "type <U1"),
        (torch.full((2, 4, 4), float("inf")), "not finite"),
        ([[[1, 2], [3]]], "no array"),
        (torch.zeros(2, 4, 4).to_sparse(), "no array"),
    ],
)
def test_arrays_that_are_no_images(array, message):
    with pytest.raises(DataError, match=message) as caught:
        as_images(array, "where")
    assert str(caught.value).startswith("where")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(4), "float64"),
        (np.zeros((4, 3), int), r"\(4, 3\)"),
        (np.array([0, -1]), "labels -1..0"),
        (np.array([0, 2**63], np.uint64), "expected 0..K-1"),
        (np.array([True, False]), "bool"),
        (np.array(["a", "b"]), "expected labels"),
    ],
)
def test_arrays_that_are_no_labels(array, message):
    with pytest.raises(DataError, match=message):
        as_labels(array, "where")


def test_types_of_numbers():
    assert as_images(pixels(2, 4, 4).astype(np.int64), "x").dtype == torch.uint8
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        images = as_images(torch.full((2, 4, 4), 0.5, dtype=dtype), "x")
        assert images.dtype == torch.float32 and images.unique().tolist() == [0.5]
    assert as_labels(np.array([[1], [0]], np.uint8), "y").tolist() == [1, 0]


def test_pairs_of_arrays_tensors_and_lists():
    x, y = pixels(30, 4, 4), labels_of(30)
    expected = from_arrays((x, y), (x[:6], y[:6]), (x[:3], y[:3]))
    assert (len(expected.train), len(expected.validation), len(expected.test)) == (30, 6, 3)
    tensors = from_arrays(tuple(map(torch.tensor, (x, y))), [x[:6], y[:6].tolist()], (x[:3].tolist(), y[:3]))
    assert tensors.checksum() == expected.checksum()
    assert expected.name == "arrays"


def test_the_data_is_a_copy():
    x, y = pixels(30, 4, 4), labels_of(30)
    data = from_arrays((x, y), (x[:6], y[:6]))
    before = data.checksum()
    x[:], y[:] = 0, 0
    assert data.checksum() == before


def test_validation_is_held_out_where_it_is_missing():
    data = from_arrays((pixels(40, 4, 4), labels_of(40, 2)), val_fraction=0.25, seed=1)
    assert (len(data.train), len(data.validation), data.test) == (30, 10, None)


def test_class_names():
    data = from_arrays((pixels(40, 4, 4), labels_of(40, 2)), class_names=["cat", "dog", "unseen"])
    assert data.class_names == ("cat", "dog", "unseen") and data.num_classes == 3
    with pytest.raises(DataError, match="labels run to 1, but there are 1 class names"):
        from_arrays((pixels(40, 4, 4), labels_of(40, 2)), class_names=["cat"])


def test_torch_datasets():
    x, y = torch.rand(30, 3, 6, 6), torch.arange(30) % 3
    data = from_arrays(TensorDataset(x, y), test=TensorDataset(x[:5], y[:5]))
    assert torch.equal(data.test.images, x[:5]) and torch.equal(data.test.labels, y[:5])
    assert (len(data.train), data.normalisation.scale, data.normalisation.std) == (27, 1.0, (1.0,) * 3)


class Items(Dataset):
    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, position):
        return self.items[position]


def test_datasets_of_pillow_pictures():
    from PIL import Image

    pictures = [(Image.fromarray(image), int(label)) for image, label in zip(pixels(20, 5, 6, 3), labels_of(20))]
    data = from_arrays(Items(*pictures))
    assert data.input_shape == (3, 5, 6) and data.train.images.dtype == torch.uint8


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Items((torch.rand(1, 4, 4), 0), (torch.rand(1, 4, 5), 0)), r"item 1 is float32 \(1, 4, 5\)"),
        (Items((torch.rand(1, 4, 4), 0.5)), "item 0 is no pair"),
        (Items((torch.rand(1, 4, 4), "cat")), "item 0 is no pair"),
        (Items(torch.rand(1, 4, 4)), "item 0 is no pair"),
        (Items(), "expected images"),
        (pixels(4, 4, 4), "expected a pair"),
        ("train", "expected a pair"),
        (None, "train is missing"),
        (iter([]), "expected a pair"),
        ((pixels(4, 4, 4), labels_of(3)), "4 images but 3 labels"),
        ((pixels(9, 4, 4), [0] * 8 + [10**9]), "labels run to 1000000000"),
        ((pixels(4, 4, 4), torch.rand(4)), "expected labels"),
        ((pixels(4, 4, 4), [0, 1, 2, 3]), "too few training images"),
        ((pixels(4, 4, 4), [0, 0, 0, 0]), "arrays: every label is 0; give images of at least two classes"),
    ],
    ids=range(14),
)
def test_unusable_sources_give_one_line(source, message):
    with pytest.raises(DataError, match=message) as caught:
        from_arrays(source)
    assert "\n" not in str(caught.value)


def test_splits_that_do_not_fit_together():
    pair = pixels(20, 4, 4), labels_of(20)
    with pytest.raises(DataError, match="all must be alike"):
        from_arrays(pair, (pixels(5, 4, 5), labels_of(5)))
    with pytest.raises(DataError, match="same type"):
        from_arrays(pair, (np.random.rand(5, 4, 4), labels_of(5)))


GOOD = {"x": pixels(20, 4, 4), "y": labels_of(20)}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "holds nothing"),
        ({"x": GOOD["x"]}, "one of x and y"),
        ({"y": GOOD["y"]}, "expected x_train and y_train, or x and y"),
        ({**GOOD, "x_train": GOOD["x"], "y_train": GOOD["y"]}, "expected x_train and y_train, or x and y"),
        ({**GOOD, "x_test": GOOD["x"]}, "one of x_test and y_test"),
        ({**GOOD, "x_valid": GOOD["x"]}, "'x_valid.npy'; expected only x_train"),
        ({"x": GOOD["x"], "y": np.array([None] * 20)}, "only arrays of numbers"),
        ({"x": np.array([b"x"] * 20), "y": GOOD["y"]}, "only arrays of numbers"),
        ({"x": np.zeros(20, [("a", "u1")]), "y": GOOD["y"]}, "only arrays of numbers"),
        ({"x": GOOD["x"], "y": GOOD["y"][:-1]}, "one label an image|20 images but 19"),
        ({"x": GOOD["x"][:, :, 0], "y": GOOD["y"]}, "expected images"),
    ],
    ids=range(11),
)
def test_unusable_npz_files_give_one_line(tmp_path, arrays, message):
    name = write(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        load(name)
    assert "a.npz" in str(caught.value) and "\n" not in str(caught.value)


def test_a_fraction_beside_the_split_is_refused(tmp_path):
    name = write(tmp_path / "a.npz", **GOOD, x_val=GOOD["x"], y_val=GOOD["y"])
    with pytest.raises(DataError, match="val_fraction makes no sense"):
        load(name, val_fraction=0.1)
    assert len(load(name).train) == 20


class Attack:
    def __reduce__(self):
        return os.system, ("touch harm",)


def test_no_pickle_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "a.npz", x=np.array([Attack()], dtype=object), y=labels_of(1))
    with pytest.raises(DataError, match="only arrays of numbers"):
        load("npz:a.npz")
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(DataError, match="b.npz"):
        load("npz:b.npz")
    assert not (tmp_path / "harm").exists()


def npy(header, data=b""):
    header = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776, 28, 28)}"), "header claims shape"),
        (npy("{'descr': '|u1', 'fortran_order': False, 'shape': (20, 4, 4)}", bytes(319)), "320 bytes, but 319 follow"),
        (npy("{'descr': '|u1', 'fortran_order': False, 'shape': (20, 4, 4)}", bytes(321)), "but 321 follow"),
        (npy("{'descr': '|u1', 'fortran_order': False, 'shape': (-20, 4, -4)}", bytes(320)), "a.npz"),
        (npy("{'descr': '|u1', 'fortran_order': False, 'shape': 20}"), "shape is not valid"),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", pickle.dumps(Attack())), "only arrays of numbers"),
        (npy("__import__('os').system('touch harm')"), "a.npz"),
        (npy("[" * 110), "a.npz"),
        (b"\x93NUMPY\x03\x00" + bytes(100), "version"),
        (b"no numpy at all", "a.npz"),
        (b"", "a.npz"),
    ],
    ids=range(11),
)
def test_damaged_members(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("a.npz", "w") as archive:
        archive.writestr("x.npy", content)
    with pytest.raises(DataError, match=message) as caught:
        load("npz:a.npz")
    assert "a.npz" in str(caught.value) and "\n" not in str(caught.value)
    assert not os.path.exists("harm")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_damaged_archives(tmp_path):
    file = tmp_path / "a.npz"
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **GOOD)
    whole = buffer.getvalue()
    for content in (b"", b"PK", whole[:-10], whole[: len(whole) // 2], bytes(500), pixels(20, 4, 4).tobytes()):
        file.write_bytes(content)
        with pytest.raises(DataError, match="a.npz"):
            load(f"npz:{file}")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.npy", b"1")
        archive.writestr("x.npy", b"2")
    with pytest.raises(DataError, match="each once|a.npz"):
        load(f"npz:{file}")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x.npy", bytes(10_000))
    with pytest.raises(DataError, match="in a way numpy does not write"):
        load(f"npz:{file}")
    with pytest.raises(DataError, match="is a folder"):
        load(f"npz:{tmp_path}")
    with pytest.raises(DataError, match="none.npz"):
        load(f"npz:{tmp_path}/none.npz")


def test_random_damage_is_found_or_changes_nothing(tmp_path):
    file = tmp_path / "a.npz"
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **GOOD)
    whole = buffer.getvalue()
    file.write_bytes(whole)
    expected = load(f"npz:{file}").checksum()
    generator = np.random.default_rng(11)
    refused = 0
    for _ in range(200):
        content = bytearray(whole)
        for position in generator.integers(0, len(content), 2):
            content[position] = generator.integers(0, 256)
        file.write_bytes(content[: generator.integers(1, 3 * len(content))])
        try:
            assert load(f"npz:{file}").checksum() == expected
        except DataError as error:
            assert "a.npz" in str(error)
            refused += 1
    assert refused > 100


def test_a_class_without_any_image_is_refused_unless_named():
    images, labels = np.zeros((6, 4, 4), dtype=np.uint8), np.array([1, 2, 3, 1, 2, 3])
    with pytest.raises(DataError, match="labels run to 3, but none is 0; number the classes 0..K-1, or give class_names"):
        from_arrays((images, labels), (images, labels))
    assert from_arrays((images, labels), (images, labels), class_names="abcd").num_classes == 4
