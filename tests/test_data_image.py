"""data/image.py: one picture file to bytes of one size."""

import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from odn_fast.data import DataError, read_image


def gradient(height, width, channels=3):
    rows, columns = np.mgrid[0:height, 0:width]
    planes = [rows * 255 // max(height - 1, 1), columns * 255 // max(width - 1, 1), (rows + columns) % 256]
    return np.stack(planes[:channels], axis=-1).astype(np.uint8)


def saved(path, image, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "webp", "gif", "jpg"])
def test_formats_of_the_right_size_are_not_touched(tmp_path, suffix):
    pixels = gradient(20, 30)
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    image = read_image(saved(tmp_path / f"a.{suffix}", Image.fromarray(pixels), **options), 3, 20, 30)
    assert image.shape == (1, 3, 20, 30) and image.dtype == torch.uint8
    tolerance = {"jpg": 4, "gif": 40}.get(suffix, 0)
    assert np.abs(image[0].permute(1, 2, 0).numpy().astype(int) - pixels).max() <= tolerance


def test_the_name_does_not_decide_the_format(tmp_path):
    file = tmp_path / "picture.jpg"
    saved(file, Image.fromarray(gradient(8, 8)), format="PNG")
    assert np.array_equal(read_image(str(file), 3, 8, 8)[0].permute(1, 2, 0).numpy(), gradient(8, 8))


@pytest.mark.parametrize(("height", "width"), [(50, 100), (100, 50), (64, 64), (37, 41), (16, 500), (7, 5)])
@pytest.mark.parametrize("size", [16, 32])
def test_shorter_side_is_resized_and_the_centre_cropped(tmp_path, height, width, size):
    image = Image.fromarray(gradient(height, width))
    result = read_image(saved(tmp_path / "a.png", image), 3, size, size)[0].permute(1, 2, 0).numpy()
    short = min(height, width)
    resized = np.asarray(image.resize((size * width // short, size * height // short), Image.Resampling.BILINEAR))
    top, left = round((resized.shape[0] - size) / 2), round((resized.shape[1] - size) / 2)
    assert np.array_equal(result, resized[top : top + size, left : left + size])


def test_sizes_that_are_not_square(tmp_path):
    file = saved(tmp_path / "a.png", Image.fromarray(gradient(40, 40)))
    wide = read_image(file, 3, 10, 20)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(wide, np.asarray(Image.fromarray(gradient(40, 40)).resize((20, 20), Image.Resampling.BILINEAR))[5:15])


def test_grey_and_colour(tmp_path):
    grey = saved(tmp_path / "grey.png", Image.fromarray(gradient(9, 9)[..., 0]))
    assert torch.equal(read_image(grey, 1, 9, 9).expand(1, 3, 9, 9), read_image(grey, 3, 9, 9))
    colour = saved(tmp_path / "colour.png", Image.new("RGB", (2, 2), (255, 0, 0)))
    assert read_image(colour, 1, 2, 2).tolist() == [[[[76, 76], [76, 76]]]]  # 0.299 red


def test_16_bit_grey_keeps_its_high_byte(tmp_path):
    levels = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tiff"):
        file = saved(tmp_path / name, Image.fromarray(levels))
        assert read_image(file, 1, 1, 4).flatten().tolist() == [0, 1, 128, 255]
        assert read_image(file, 3, 1, 4)[0, 2].flatten().tolist() == [0, 1, 128, 255]


def test_transparency_is_laid_on_white(tmp_path):
    pixels = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 128]]], dtype=np.uint8)
    rgba = read_image(saved(tmp_path / "a.png", Image.fromarray(pixels)), 3, 1, 3)[0, :, 0].T.tolist()
    assert rgba[:2] == [[255, 0, 0], [255, 255, 255]] and rgba[2] == pytest.approx([127] * 3, abs=1)
    grey = Image.new("LA", (1, 1), (0, 0))
    assert read_image(saved(tmp_path / "b.png", grey), 1, 1, 1).item() == 255


def test_palettes_with_and_without_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    assert read_image(saved(tmp_path / "a.png", image), 3, 1, 2)[0, :, 0].T.tolist() == [[10, 20, 30], [200, 100, 50]]
    assert read_image(saved(tmp_path / "b.png", image, transparency=1), 3, 1, 2)[0, :, 0].T.tolist() == [[10, 20, 30], [255] * 3]


def test_other_modes(tmp_path):
    assert read_image(saved(tmp_path / "a.png", Image.new("1", (2, 2), 1)), 1, 2, 2).min() == 255
    cmyk = read_image(saved(tmp_path / "a.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=95), 3, 8, 8)
    assert cmyk[0, 0].float().mean() > 245 and cmyk[0, 1:].float().mean() < 10
    with pytest.raises(DataError, match="floating-point"):
        read_image(saved(tmp_path / "a.tiff", Image.fromarray(np.zeros((4, 4), np.float32))), 1, 4, 4)
    with pytest.raises(DataError, match="grey levels 0..70000"):
        read_image(saved(tmp_path / "b.tiff", Image.fromarray(np.array([[0, 70000]], np.int32))), 1, 1, 2)


def test_exif_orientation_is_honoured(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    file = saved(tmp_path / "a.png", Image.fromarray(gradient(6, 10)), exif=exif)
    assert np.array_equal(read_image(file, 3, 10, 6)[0].permute(1, 2, 0).numpy(), np.rot90(gradient(6, 10), -1))


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.gif", 3, 4, 4)[0, :, 0, 0].tolist() == [255, 0, 0]


def png_of_size(width, height):
    """A PNG whose header claims a size and whose pixels are missing."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_by_their_header(tmp_path):
    for width, height in ((10_000, 10_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)):
        (tmp_path / "bomb.png").write_bytes(png_of_size(width, height))
        with pytest.raises(DataError, match="bomb.png"):
            read_image(tmp_path / "bomb.png", 3, 32, 32)


def test_a_picture_too_long_and_thin(tmp_path):
    file = saved(tmp_path / "line.png", Image.new("L", (200_000, 1)))
    with pytest.raises(DataError, match="too long and thin"):
        read_image(file, 3, 64, 64)
    assert read_image(file, 1, 4, 4).shape == (1, 1, 4, 4)


def test_files_that_are_no_pictures(tmp_path):
    whole = saved(tmp_path / "whole.jpg", Image.fromarray(gradient(64, 64))).read_bytes()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    contents = {"empty": b"", "text": b"<html></html>", "cut": whole[: len(whole) // 2], "header": whole[:20]}
    contents["eps"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"
    for name, content in contents.items():
        (tmp_path / f"{name}.jpg").write_bytes(content)
    for name in (*contents, "pipe", "folder", "missing"):
        with pytest.raises(DataError) as caught:
            read_image(tmp_path / f"{name}.jpg", 3, 8, 8)
        assert f"{name}.jpg" in str(caught.value) and "\n" not in str(caught.value)


def test_only_grey_and_rgb_can_be_asked_for(tmp_path):
    with pytest.raises(DataError, match="1 or 3 channels, not 4"):
        read_image(tmp_path / "a.png", 4, 8, 8)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "gif", "bmp"])
def test_random_damage_gives_a_picture_or_a_data_error(tmp_path, suffix):
    file = saved(tmp_path / f"a.{suffix}", Image.fromarray(gradient(40, 40)))
    whole = file.read_bytes()
    generator = np.random.default_rng(2)
    refused = 0
    for _ in range(60):
        content = bytearray(whole)
        for position in generator.integers(0, min(len(content), 600), 4):
            content[position] = generator.integers(0, 256)
        file.write_bytes(content[: generator.integers(1, 2 * len(content))])
        try:
            assert read_image(file, 3, 16, 16).shape == (1, 3, 16, 16)
        except DataError as error:
            assert str(file) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 5
