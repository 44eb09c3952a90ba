"""Random-resized crops (Szegedy et al., "Going deeper with convolutions", 2015), drawn without state.

What is cut out of a picture depends on (seed, key, epoch, its position in the split) and on its size, and on nothing
else: every loader cuts the same rectangle, whatever the batch and wherever an epoch was resumed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference.augment import WORD, philox

TRIES = 10
AREA = (0.08, 1.0)  # of the picture
RATIO = (3 / 4, 4 / 3)  # width over height

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the picture


def crop_numbers(positions: Tensor, keys: Sequence[int], epoch: int) -> Tensor:
    """What the crops of pictures at `positions` (n,) int64 are drawn from: (n, tries, 4) float64 in [0, 1).

    keys: a number of 63 bits for every try.
    """
    epochs = torch.full_like(positions, epoch)
    counter = [half for value in (positions, epochs) for half in (value & WORD, value >> 32 & WORD)]
    words = [philox(counter, [torch.tensor(key & WORD), torch.tensor(key >> 32 & WORD)]) for key in keys]
    return torch.stack([torch.stack(four, -1) for four in words], 1).double() / 2**32


def random_box(numbers: Sequence[Sequence[float]], width: int, height: int) -> Box:
    """The first of the tries (area, ratio, row, column) that lies within a picture of width x height; whole pixels.

    Where none does, the centre, as large as the ratios allow.
    """
    low, high = map(math.log, RATIO)
    for area, ratio, row, column in numbers:
        pixels = width * height * (AREA[0] + (AREA[1] - AREA[0]) * area)
        shape = math.exp(low + (high - low) * ratio)
        across, down = round(math.sqrt(pixels * shape)), round(math.sqrt(pixels / shape))
        if 0 < across <= width and 0 < down <= height:
            left, top = math.floor(column * (width - across + 1)), math.floor(row * (height - down + 1))
            return left, top, left + across, top + down
    across = min(width, max(1, round(height * RATIO[1])))
    down = min(height, max(1, round(width / RATIO[0])))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down
