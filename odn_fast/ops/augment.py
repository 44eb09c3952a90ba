"""Batches of a resident set in one step: gather, random crop, flip, normalise.

Nothing random is kept between calls. What happens to an image is a function of (seed, epoch, the image's place in the
set): a resumed run, another batch size and another device see the same images. The key is a tensor, so that a captured
CUDA graph can go from epoch to epoch by `key[1] += 1` on the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from odn_fast.ops._choose import register_cuda, triton
from odn_fast.ops._library import define
from odn_fast.reference import augment as reference


def augment(
    images: Tensor,
    index: Tensor,
    scale: Tensor,
    shift: Tensor,
    key: Tensor | None = None,
    padding: int = 0,
    flip: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A training or evaluation batch: x scale + shift of randomly cropped and flipped images.

    images: (M, C, H, W) uint8, any strides, the resident set; index: (N,) int64 in [0, M), the images of the batch;
    scale, shift: (C,) float32 or float64, see `scale_and_shift`; key: (2,) int64, the seed and the epoch, on the images'
    device as all of them. What is trained can be part of the seed, as a hash.

    padding: raw zeros on each side of an image, of which a crop of the original size keeps a part, every place being
    equally probable. flip: mirror, after the crop, one image in two. With neither, nothing is drawn and key may be None.

    Returns (N, C, H, W) in dtype (float32, bfloat16 or float64), channels_last, with the same bits from every
    implementation. The product is rounded before the sum is, never fused, in float32 (float64 for float64 dtype). Not
    differentiable.

    Raises ValueError on shapes, dtypes, devices or padding that do not fit, and on the CPU on indices outside [0, M). On
    a CUDA device, which is not waited for, such an index gives an image of NaN.
    """
    if not images.is_cuda:  # where the op checks
        reference.check(images, index, scale, shift, key, padding, flip, dtype)
    return _augment(images, index, scale, shift, key, padding, flip, dtype)


def scale_and_shift(
    mean: Sequence[float], std: Sequence[float], one: float = 255.0, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """What turns raw values x into (x / one - mean) / std: scale and shift (C,) float32, formed in float64.

    mean, std: one number a channel. Raises ValueError where they do not have the same length, or one or a std is 0.
    """
    if len(mean) != len(std):
        raise ValueError(f"scale_and_shift: mean has {len(mean)} numbers and std {len(std)}, expected one of each a channel")
    if one == 0 or 0 in std:
        raise ValueError(f"scale_and_shift: one is {one} and std {tuple(std)}, expected no zero among them")
    scale, shift = [1 / (one * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]
    return tuple(torch.tensor(values, dtype=torch.float32, device=device) for values in (scale, shift))


def _fake(images, index, scale, shift, key, padding, flip, dtype):
    reference.check(images, index, scale, shift, key, padding, flip, dtype)
    shape = (index.shape[0], *images.shape[1:])
    return torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)


_augment = define(
    "augment(Tensor images, Tensor index, Tensor scale, Tensor shift, Tensor? key, int padding, bool flip,"
    " ScalarType dtype) -> Tensor",
    reference.augment,
    _fake,
)
register_cuda("augment", [triton("augment", "augment")], reference.check)


@register_flop_formula(torch.ops.odn_fast.augment)
def _flops(*args, **kwargs) -> int:
    return 0  # as PyTorch counts indexing and pointwise operations
