"""Folders of pictures for the tests of loaders."""

import io

import numpy as np
from PIL import Image


def noise(seed, size=(24, 20)):
    """A picture that compresses badly: every mistake shows."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def shapes(seed, size=(60, 80)):
    """A smooth picture, as JPEG likes them, of a colour that belongs to no other seed."""
    rows, columns = np.mgrid[:size[0], :size[1]]
    planes = [128 + 100 * np.sin(rows / 9 + seed), 128 + 100 * np.cos(columns / 7 - seed), (rows + columns + 37 * seed) % 256 * 0.5]
    return Image.fromarray(np.stack(planes, -1).clip(0, 255).astype(np.uint8))


def write_folder(root, counts=(("a", 12), ("b", 9)), suffix="png", split="train", make=noise):
    """PATH/split/class/number.suffix; sizes differ from picture to picture."""
    for label, (name, count) in enumerate(counts):
        folder = root / split / name
        folder.mkdir(parents=True)
        for number in range(count):
            seed = 100 * label + number
            make(seed, (20 + seed % 7, 30 - seed % 5)).save(folder / f"{number:03}.{suffix}")
    return root


def cut_short(file):
    """Leave half of a picture's bytes: its header is right, its end is missing."""
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


def encoded(picture, kind, **options):
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()
