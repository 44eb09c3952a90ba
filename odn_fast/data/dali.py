"""Pictures decoded by NVIDIA DALI, on a GPU or on the CPU, and arrays fed through it.

DALI's own readers are not used: our order goes in, request by request, so lengths of epochs, last batches and resumed
positions are exact by construction, and the same as every other loader's.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..reference.augment import draw
from .batches import PADDING, Batches
from .crops import Box, random_box
from .errors import DataError, first_line, needs, reading, regular_file_size
from .image import FORMATS, check_pixels, covering_size, read_picture
from .pictures import Pictures, Request, thread_count
from .streaming import read_ahead

PACKAGE = "nvidia-dali-cuda130"
PART = 128  # pictures that a pipeline has whole, in memory, at a time; larger batches are made of several parts


def need_dali() -> None:
    """Raise `DataError` that says how to get DALI where it is missing."""
    needs("nvidia.dali", PACKAGE, "--loader dali")


class Header(NamedTuple):
    """Size of the upright picture, in pixels, and whether DALI makes the same of its file as the plain reader."""

    width: int
    height: int
    alike: bool


class Fed(NamedTuple):
    """One batch, as the pipeline is given it: encoded files; top, left, bottom, right of each; whether it is mirrored."""

    encoded: list[np.ndarray]
    boxes: np.ndarray
    mirrored: np.ndarray


def dali_reader(pictures: Pictures, requests: Iterable[Request]) -> Iterator[Tensor]:
    """Decoded, cut, resized and flipped by a pipeline; a `Reader`.

    DALI names no file when it fails. The pictures at hand are then tried with the plain reader, one by one, and a new
    pipeline goes on with others in place of the damaged ones. Where it finds none, it decodes these pictures for DALI. So what
    counts as damaged is the same with every loader.
    """
    need_dali()
    counts: deque[int] = deque()

    def parts() -> Iterator[Request]:
        for request in requests:
            split = request.parts(PART)
            counts.append(len(split))
            yield from split

    decoded = _decoded(pictures, parts())
    for first in decoded:
        others = list(islice(decoded, counts.popleft() - 1))
        yield torch.cat([first, *others]) if others else first


def _decoded(pictures: Pictures, requests: Iterable[Request]) -> Iterator[Tensor]:
    waiting: deque[Request] = deque()  # read, but not back from the pipeline
    coming, plain = iter(requests), False
    while (first := next(coming, None)) is not None:
        coming = chain([first], coming)
        fed = _feed(pictures, coming, waiting, plain)
        try:
            for pixels in _outputs(_picture_pipeline(pictures, fed), pictures.labels.device):
                waiting.popleft()
                plain = False
                yield pixels.permute(0, 3, 1, 2)
            return
        except RuntimeError as error:
            if plain:
                raise DataError(f"{pictures.root}: DALI cannot go on ({_reason(error)}); choose --loader torch") from error
            fed.close()
            plain, coming = not _trace(pictures, list(waiting) or [first]), chain(list(waiting), coming)
            waiting.clear()
        finally:
            fed.close()


def _trace(pictures: Pictures, requests: list[Request]) -> bool:
    """Whether some of the pictures are damaged that were not known to be. DALI may fail a batch or two ahead of the one at hand."""
    known = len(pictures.damage.found)
    positions = [position for request in requests for position in request.positions]
    with ThreadPoolExecutor(max_workers=thread_count()) as threads:
        list(threads.map(lambda position: pictures.read(position, lambda file: bool(read_picture(file, "RGB"))), positions))
    return len(pictures.damage.found) > known


def _feed(pictures: Pictures, requests: Iterable[Request], waiting: deque[Request], plain: bool) -> Generator[Fed, None, None]:
    """What the pipeline is given for every request, files read ahead. plain: the first is decoded by Pillow."""
    def start(threads: ThreadPoolExecutor, request: Request) -> tuple[Fed, list[Future]]:
        nonlocal plain
        waiting.append(request)
        count = len(request.positions)
        fed = Fed([None] * count, np.empty((count, 4), np.float32), np.array(request.mirrored or [False] * count, np.int32))
        futures = [threads.submit(_fill, pictures, request, place, fed, plain) for place in range(count)]
        plain = False
        return fed, futures

    return read_ahead(requests, start)


def _fill(pictures: Pictures, request: Request, place: int, fed: Fed, plain: bool) -> None:
    def read(file: Path) -> tuple[np.ndarray, Box]:
        content, header = _content(pictures, file, plain)
        if request.numbers is None:
            return content, centre_box(file, header, pictures.size)
        return content, random_box(request.numbers[place].tolist(), header.width, header.height)

    fed.encoded[place], (left, top, right, bottom) = pictures.read(request.positions[place], read)
    fed.boxes[place] = top, left, bottom, right


def _content(pictures: Pictures, file: Path, plain: bool) -> tuple[np.ndarray, Header]:
    """Bytes that DALI decodes to the plain reader's pixels: the file, or where it would not, those pixels as a PPM file."""
    header = pictures.headers.get(file)
    if not plain and (header is None or header.alike):
        regular_file_size(file)
        with reading(file):
            content = np.fromfile(file, np.uint8)
        if header is None:
            header = pictures.headers[file] = inspect(file, content.tobytes())
        if header.alike:
            return content, header
    image = read_picture(file, "RGB")
    encoded = b"P6 %d %d 255\n" % image.size + image.tobytes()
    return np.frombuffer(encoded, np.uint8), Header(*image.size, alike=False)


def inspect(file: Path, content: bytes) -> Header:
    """What a picture's header says. Raises `DataError` where it is none."""
    needs("PIL", "pillow", "reading pictures")
    from PIL import Image

    with reading(file), Image.open(io.BytesIO(content), formats=FORMATS) as image:
        check_pixels(file, image)
        turned = image.getexif().get(0x0112, 1)
        alike = image.mode in ("RGB", "L") and "transparency" not in image.info and (
            # A JPEG that was cut short has no end of image after its last start of scan; DALI might make grey of the rest.
            image.format == "JPEG" and content.rfind(b"\xff\xd9") > content.rfind(b"\xff\xda")
            or image.format == "PNG" and content[24] == 8 and turned == 1)
        width, height = image.size[::-1] if turned in (5, 6, 7, 8) else image.size
        return Header(width, height, alike)


def centre_box(file: Path, header: Header, size: int) -> Box:
    """The part of a picture that `fit` brings to size x size."""
    (across, down), left, top = covering_size(file, (header.width, header.height), size, size)
    x, y = header.width / across, header.height / down
    return left * x, top * y, (left + size) * x, (top + size) * y


def _picture_pipeline(pictures: Pictures, fed: Iterator[Fed]):
    from nvidia.dali import fn, types

    on_gpu, size = pictures.labels.is_cuda, pictures.size
    pipeline = _pipeline(PART, pictures.labels.device)
    with pipeline:
        encoded, boxes, mirrored = fn.external_source(
            source=fed, num_outputs=3, dtype=[types.UINT8, types.FLOAT, types.INT32], ndim=[1, 1, 0])
        images = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB, jpeg_fancy_upsampling=True)
        images = fn.resize(images, size=[size, size], roi_start=boxes[0:2], roi_end=boxes[2:4],
                           interp_type=types.INTERP_LINEAR, antialias=True)
        pipeline.set_outputs(fn.flip(images, horizontal=mirrored))
    return pipeline


def _pipeline(most: int, device: torch.device):
    from nvidia.dali import Pipeline

    return Pipeline(batch_size=most, num_threads=thread_count(), device_id=device.index if device.type == "cuda" else None,
                    exec_dynamic=True, prefetch_queue_depth=2)


def _outputs(pipeline, device: torch.device) -> Iterator[Tensor]:
    """The one output of every run of a pipeline, as a tensor on the device, without a copy."""
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    while True:
        try:
            (output,) = pipeline.run(stream)
        except StopIteration:
            return
        yield torch.from_dlpack(output.as_tensor())


def _reason(error: RuntimeError) -> str:
    """The line of DALI's message that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = lines[lines.index("encountered:") + 1:] if "encountered:" in lines else lines
    return after[0][:200] if after else first_line(error)


class ArrayBatches(Batches):
    """The batches of a resident split of bytes, cropped, flipped and normalised by DALI, to the last bits but one.

    The resident loader makes the same of them in one launch, without a copy, and is the faster.
    """

    def inputs(self, key: str, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, ...]]:
        need_dali()
        chosen = list(super().inputs(key, epoch, start))
        if not chosen:
            return
        labels = self.split.labels
        for x, (positions, _) in zip(_outputs(self._pipeline(chosen), labels.device), chosen):
            yield x.permute(0, 3, 1, 2), labels.index_select(0, positions)

    def batch(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        x, y = inputs
        return x, y

    def _pixels(self, chosen: list[tuple[Tensor, ...]]) -> Iterator[Tensor | np.ndarray]:
        for positions, _ in chosen:
            pixels = self.split.images.index_select(0, positions)
            yield pixels if pixels.is_cuda else pixels.numpy()

    def _crops(self, chosen: list[tuple[Tensor, ...]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Where each crop begins in the picture (n, 2), and whether it is mirrored (n,)."""
        for positions, drawn in chosen:
            row, column, mirrored = draw(positions.cpu(), drawn.cpu(), PADDING)
            yield (torch.stack([row, column], 1) - PADDING).int().numpy(), mirrored.int().numpy()

    def _pipeline(self, chosen: list[tuple[Tensor, ...]]):
        from nvidia.dali import fn, types

        how, images = self.normalisation, self.split.images
        pipeline = _pipeline(max(end - first for first, end in self.bounds), images.device)
        with pipeline:
            pixels = fn.external_source(source=self._pixels(chosen), device="gpu" if images.is_cuda else "cpu", layout="CHW")
            mirrored = 0
            if self.augment:
                starts, mirrored = fn.external_source(source=self._crops(chosen), num_outputs=2)
                pixels = fn.slice(pixels, start=starts, shape=list(images.shape[2:]), axes=[1, 2], out_of_bounds_policy="pad")
            pipeline.set_outputs(fn.crop_mirror_normalize(
                pixels, mirror=mirrored, dtype=types.FLOAT, output_layout="HWC",
                mean=[how.scale * mean for mean in how.mean], std=[how.scale * std for std in how.std]))
        return pipeline
