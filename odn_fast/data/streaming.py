"""Training batches of pictures that are not resident, read ahead in threads while the device trains."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..reference.augment import cropped, draw
from .batches import PADDING, Source, batch_bounds, keyed_draws, keyed_number, keyed_order
from .crops import TRIES, crop_numbers, random_box
from .dataset import Normalisation
from .errors import DataError
from .image import cut, fit, read_picture
from .pictures import Pictures, Request, thread_count

AHEAD = 3  # batches that are read before they are asked for

Given = TypeVar("Given")
Read = TypeVar("Read")


class PictureBatches(Source):
    """Shuffled training batches of pictures; order, last batch and augmentation are those of `Batches`, whatever the reader.

    augment: random-resized crop and flip where the pictures have `random_crop`; else as `Batches` does to images that are
    resident. shard: (index, count), this process's share of every epoch's order; shares are disjoint and equally long,
    so up to count - 1 images of an epoch are left out.
    Raises `DataError` on an empty share, a batch size below 1, or a shard that is none.
    """

    def __init__(self, split: Pictures, normalisation: Normalisation, batch_size: int, seed: int, augment: bool = False,
                 drop_last: bool = False, shard: tuple[int, int] = (0, 1)) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}, expected at least 1")
        if not 0 <= shard[0] < shard[1]:
            raise DataError(f"shard is {shard}, expected (index, count) with 0 <= index < count")
        share = len(split) // shard[1]
        if share == 0:
            raise DataError(f"cannot make batches of {len(split)} pictures in {shard[1]} shards")
        self.split, self.normalisation, self.seed, self.shard = split, normalisation, seed, shard
        self.padding = PADDING if augment and not split.random_crop else 0
        self.random_crop = augment and split.random_crop
        self.bounds = batch_bounds(share, batch_size, drop_last)
        self.steps_per_epoch = len(self.bounds)
        self.images_per_epoch = self.bounds[-1][1]

    def inputs(self, key: str, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Pixels (n, 3, S, S) uint8 and labels (n,); where crops are out of a border, positions (n,) and their key too."""
        self.check_start(start)
        labels = self.split.labels
        order = keyed_order(len(self.split), self.seed, key, epoch, labels.device)
        index, count = self.shard
        order = order[index:len(order) // count * count:count]
        drawn = keyed_draws(self.seed, key, epoch, labels.device)
        bounds, on_host = self.bounds[start:], order.cpu()
        requests = map(self._requests(key, epoch), [on_host[first:end] for first, end in bounds])
        parts = [order[first:end] for first, end in bounds]
        for pixels, part in zip(self.split.reader(self.split, requests), parts):
            yield (pixels, labels.index_select(0, part), *((part, drawn) if self.padding else ()))

    def _requests(self, key: str, epoch: int) -> Callable[[Tensor], Request]:
        if not self.random_crop:
            return lambda positions: Request(positions.tolist())
        drawn = keyed_draws(self.seed, key, epoch)
        keys = [keyed_number(self.seed, f"{key}, crop {number}") for number in range(TRIES)]

        def request(positions: Tensor) -> Request:
            return Request(positions.tolist(), draw(positions, drawn, 0)[2].tolist(), crop_numbers(positions, keys, epoch))

        return request

    def batch(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        pixels, y, *places = inputs
        if places:
            positions, drawn = places
            pixels = cropped(pixels, *draw(positions, drawn, self.padding), self.padding, flip=True)
        return self.normalisation(pixels), y


def read_ahead(
    given: Iterable[Given], read: Callable[[ThreadPoolExecutor, Given], tuple[Read, list[Future]]]
) -> Generator[Read, None, None]:
    """What `read` makes of everything given, in order, once its futures are done, `AHEAD` of them at work at a time.

    Nothing is left running when the iterator is closed, or an error is raised in a future.
    """
    threads = ThreadPoolExecutor(max_workers=thread_count(), thread_name_prefix="pictures")
    waiting: deque[tuple[Read, list[Future]]] = deque()
    try:
        for each in given:
            waiting.append(read(threads, each))
            if len(waiting) > AHEAD:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())
    finally:
        threads.shutdown(wait=True, cancel_futures=True)


def _finished(read: Read, futures: list[Future]) -> Read:
    for future in futures:
        future.result()
    return read


def plain_reader(pictures: Pictures, requests: Iterable[Request]) -> Iterator[Tensor]:
    """Decoded by Pillow, which works outside Python's lock; resident sets are read this way, too."""
    size, on_gpu = pictures.size, pictures.labels.is_cuda

    def start(threads: ThreadPoolExecutor, request: Request) -> tuple[Tensor, list[Future]]:
        pixels = torch.empty((len(request.positions), size, size, 3), dtype=torch.uint8, pin_memory=on_gpu)
        rows = pixels.numpy()
        return pixels, [threads.submit(_fill, pictures, request, place, rows) for place in range(len(rows))]

    for pixels in read_ahead(requests, start):
        yield pixels.permute(0, 3, 1, 2).to(pictures.labels.device, non_blocking=True)


def _fill(pictures: Pictures, request: Request, place: int, rows: np.ndarray) -> None:
    """Decode one picture of a request into its row (size, size, 3)."""
    size = pictures.size

    def pixels(file: Path) -> np.ndarray:
        image = read_picture(file, "RGB")
        if request.numbers is None:
            return np.asarray(fit(file, image, size, size))
        return np.asarray(cut(image, random_box(request.numbers[place].tolist(), *image.size), size, size))

    found = pictures.read(request.positions[place], pixels)
    rows[place] = found[:, ::-1] if request.mirrored and request.mirrored[place] else found
