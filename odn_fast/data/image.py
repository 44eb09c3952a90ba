"""One picture file -> bytes of one size: the same decoding for image folders and for prediction."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .errors import DataError, needs, reading, regular_file_size

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

# Named, because Pillow would otherwise try every format it knows; its EPS reader runs Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
MAX_PIXELS = 80_000_000  # 240 MB as RGB; below the number at which Pillow warns
MODES = {1: "L", 3: "RGB"}


def read_image(path: str | Path, channels: int, height: int, width: int) -> Tensor:
    """The picture in `path` as (1, channels, height, width) uint8, 0..255.

    `channels`: 1 (grey) or 3 (RGB). Turned as its EXIF note says; transparency is laid on white; 16-bit
    grey is scaled to 8; of an animation the first frame is taken. Where the size differs, the picture is
    resized (bilinear with antialias) to just cover (height, width), and its centre cropped. A network whose
    scale is not 255 needs the result brought to its own levels, which is left to the caller.
    Raises `DataError` naming the file where it is missing, no picture, damaged, or too large.
    """
    return torch.from_numpy(read_pixels(Path(path), channels, height, width).transpose(2, 0, 1).copy()).unsqueeze(0)


def read_pixels(path: Path, channels: int, height: int, width: int) -> np.ndarray:
    """As `read_image`, in Pillow's layout: (height, width, channels) uint8."""
    if channels not in MODES:
        raise DataError(f"{path}: pictures are read with 1 or 3 channels, not {channels}")
    image = read_picture(path, MODES[channels])
    return np.array(fit(path, image, height, width)).reshape(height, width, channels)


def read_picture(path: Path, mode: str) -> Picture:
    """The whole picture in `path`, upright and opaque, in `mode`, L or RGB. Raises as `read_image`."""
    needs("PIL", "pillow", "reading pictures")
    from PIL import Image, ImageOps

    regular_file_size(path)
    with reading(path), Image.open(path, formats=FORMATS) as image:
        check_pixels(path, image)
        return opaque(path, ImageOps.exif_transpose(image), mode)


def check_pixels(path: Path, image: Picture) -> None:
    """Refuse what would take too much memory, by what a picture's header says."""
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"{path}: {image.width}x{image.height} pixels, more than {MAX_PIXELS // 10**6} million")


def opaque(path: Path, image: Picture, mode: str) -> Picture:
    """`image` in `mode`, L or RGB: 16-bit grey scaled to 8, transparency laid on white."""
    from PIL import Image

    if image.mode.startswith("I"):
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise DataError(f"{path}: grey levels {levels.min()}..{levels.max()}, expected 8 or 16 bits")
        image = Image.fromarray(np.round(levels / 257).astype(np.uint8))
    elif image.mode == "F":
        raise DataError(f"{path}: holds floating-point pixels, expected 8 or 16 bits; convert it first")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        picture = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return image.convert(mode)


def fit(path: Path, image: Picture, height: int, width: int) -> Picture:
    """Resize so that `image` just covers (height, width), then cut out the centre; nothing where the size is right."""
    from PIL import Image

    if image.size == (width, height):
        return image
    covering, left, top = covering_size(path, image.size, height, width)
    return image.resize(covering, Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))


def covering_size(path: Path, size: tuple[int, int], height: int, width: int) -> tuple[tuple[int, int], int, int]:
    """(width, height) that a picture of `size` is resized to, and left and top of what is cut out of it then."""
    if width * size[1] >= height * size[0]:
        covering = width, max(height, width * size[1] // size[0])
    else:
        covering = max(width, height * size[0] // size[1]), height
    if covering[0] * covering[1] > MAX_PIXELS:
        raise DataError(f"{path}: {size[0]}x{size[1]} pixels are too long and thin to be fitted to {width}x{height}")
    return covering, round((covering[0] - width) / 2), round((covering[1] - height) / 2)


def cut(image: Picture, box: tuple[float, float, float, float], height: int, width: int) -> Picture:
    """The part (left, top, right, bottom) of a picture, in its pixels, resized to (height, width): bilinear with antialias."""
    from PIL import Image

    return image.resize((width, height), Image.Resampling.BILINEAR, box=box)
