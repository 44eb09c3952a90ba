"""A split whose images are resident: two tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import DataError


@dataclass(frozen=True, eq=False)
class Split:
    """Images (N, C, H, W), uint8 (float32 where they were given as floats), and labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dim() != 4 or self.images.dtype not in (torch.uint8, torch.float32):
            raise DataError(f"images are {tuple(self.images.shape)} {self.images.dtype}, expected (N, C, H, W) uint8 or float32")
        if self.labels.dim() != 1 or self.labels.dtype != torch.int64:
            raise DataError(f"labels are {tuple(self.labels.shape)} {self.labels.dtype}, expected (N,) int64")
        if len(self.images) != len(self.labels):
            raise DataError(f"{len(self.images)} images but {len(self.labels)} labels; there must be one label an image")

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, positions: Tensor) -> Split:
        """The images at `positions` (M,) int64, in that order."""
        return Split(self.images[positions], self.labels[positions])

    def to(self, device: str) -> Split:
        return Split(self.images.to(device), self.labels.to(device))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def dtype(self) -> torch.dtype:
        return self.images.dtype

    def relabelled(self, labels: Tensor) -> Split:
        """The same images with other labels (N,) int64."""
        return Split(self.images, labels)

    def in_order(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once, in order: (n, C, H, W) as they are and labels (n,)."""
        return zip(self.images.split(batch_size), self.labels.split(batch_size))

    def hash_into(self, digest: hashlib._Hash, name: str) -> None:
        """What a checksum is made of: shapes, types and bytes of images and labels."""
        for tensor in (self.images, self.labels):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            for part in tensor.split(4096):  # in parts: a slice that is not contiguous is copied
                digest.update(part.cpu().contiguous().numpy())
