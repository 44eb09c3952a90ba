"""Gather, random crop, flip and normalise in plain PyTorch.

`check` is the one place where arguments are validated; the public function, the fake and this reference all call it.

Randomness is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), which has no state: its
key is the seed, its counter (sample, epoch), each as two words of 32 bits, the low word first. Of the four words that
come out, the first gives the crop's row, the second its column, the third the flip. So what happens to an image depends
on (seed, epoch, sample) and on nothing else, and every implementation draws the same.
"""

from functools import partial

import torch
from torch import Tensor

from odn_fast.reference._arguments import FLOATING, check_tensor

MOST_PADDING = 1 << 20
WORD = 0xFFFFFFFF


def check(
    images: Tensor,
    index: Tensor,
    scale: Tensor,
    shift: Tensor,
    key: Tensor | None,
    padding: int,
    flip: bool,
    dtype: torch.dtype,
) -> None:
    """Raise ValueError naming the first argument that breaks the contract of `augment`."""
    if images.dim() != 4 or 0 in images.shape[1:]:
        raise ValueError(
            f"augment: images has shape {tuple(images.shape)}, expected (M, C, H, W) with C, H and W at least 1"
        )
    if index.dim() != 1:
        raise ValueError(f"augment: index has shape {tuple(index.shape)}, expected (N,)")
    check_each = partial(check_tensor, "augment", device=images.device, leader="images")
    check_each("images", images, images.shape, dtypes=(torch.uint8,))
    check_each("index", index, index.shape, dtypes=(torch.int64,))
    for name, vector in (("scale", scale), ("shift", shift)):
        check_each(name, vector, images.shape[1:2], dtypes=(torch.float32, torch.float64))
    if key is not None:
        check_each("key", key, (2,), dtypes=(torch.int64,))
    elif padding or flip:
        raise ValueError("augment: key is None, expected (2,) int64, seed and epoch, where padding or flip are asked for")
    if not 0 <= padding <= MOST_PADDING:
        raise ValueError(f"augment: padding is {padding}, expected 0 to {MOST_PADDING}")
    if dtype not in FLOATING:
        raise ValueError(f"augment: dtype is {dtype}, expected {', '.join(map(str, FLOATING))}")


def philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox4x32-10: four words from a counter of four words and a key of two; words are int64 in [0, 2^32)."""
    (a, b, c, d), (key_a, key_b) = counter, key
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57  # modulo 2^64, so that both halves are right
        a, b, c, d = (second >> 32 & WORD) ^ b ^ key_a, second & WORD, (first >> 32 & WORD) ^ d ^ key_b, first & WORD
        key_a, key_b = key_a + 0x9E3779B9 & WORD, key_b + 0xBB67AE85 & WORD
    return [a, b, c, d]


def draw(samples: Tensor, key: Tensor, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """What happens to each of `samples` (N,) under `key` (2,): row and column of the crop (N,), and whether it is flipped.

    Row and column are int64, uniform in [0, 2 padding].
    """
    seed, epoch = key.unbind()
    words = [half for value in (samples, epoch.expand(samples.shape)) for half in (value & WORD, value >> 32 & WORD)]
    row, column, mirror, _ = philox(words, [seed & WORD, seed >> 32 & WORD])
    places = 2 * padding + 1
    return row * places >> 32, column * places >> 32, mirror >= 1 << 31


def augment(
    images: Tensor,
    index: Tensor,
    scale: Tensor,
    shift: Tensor,
    key: Tensor | None,
    padding: int,
    flip: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The images at `index`, randomly cropped out of a border of `padding` zeros, randomly flipped, x scale + shift.

    images: (M, C, H, W) uint8; index: (N,) int64 in [0, M); scale, shift: (C,) float32 or float64; key: (2,) int64, seed
    and epoch, None if padding is 0 and flip False.

    Returns (N, C, H, W) in `dtype`, channels_last. The product is rounded before the sum, in float64 for float64 `dtype`
    and in float32 otherwise.
    """
    check(images, index, scale, shift, key, padding, flip, dtype)
    within = (index >= 0) & (index < len(images))
    if index.device.type == "cpu" and not within.all():
        place = int(within.logical_not().nonzero()[0])
        raise ValueError(f"augment: index[{place}] is {index[place]}, expected an image in [0, {len(images)})")
    samples = index.where(within, 0)
    pixels = images.index_select(0, samples) if len(images) else images.new_zeros((len(index), *images.shape[1:]))
    if padding or flip:
        pixels = cropped(pixels, *draw(samples, key, padding), padding, flip)
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    y = pixels.to(arithmetic).mul_(scale.to(arithmetic)[:, None, None]).add_(shift.to(arithmetic)[:, None, None])
    if index.device.type != "cpu":
        y = y.where(within[:, None, None, None], torch.nan)
    return y.to(dtype).contiguous(memory_format=torch.channels_last)


def cropped(pixels: Tensor, row: Tensor, column: Tensor, mirror: Tensor, padding: int, flip: bool) -> Tensor:
    """Images (N, C, H, W) of any dtype, each cropped and mirrored as `draw` says."""
    count, channels, height, width = pixels.shape
    rows, columns = (torch.arange(size, device=pixels.device) for size in (height, width))
    rows = row[:, None] + rows - padding
    columns = column[:, None] + (torch.where(mirror[:, None], columns.flip(0), columns) if flip else columns) - padding
    image = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    places = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    crops = pixels.flatten(2).gather(2, places.flatten(1)[:, None].expand(-1, channels, -1)).view(pixels.shape)
    return crops.where(image[:, None], 0)
