"""Pictures of one scene from known cameras: the reader of nerf_synthetic's files, and a scene that needs none.

    FOLDER/transforms_{train,val,test}.json, FOLDER/{train,val,test}/*.png
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .batches import Source, keyed_generator
from .errors import DataError, needs, reading, regular_file_size
from .image import MAX_PIXELS

SPLITS = {"train": "train", "validation": "val", "test": "test"}
ANALYTIC_SIZE = 32  # pixels, height and width
_MOST_PIXELS = 100_000_000  # of a scene: 1.2 GB as float32 RGB
_MOST_JSON = 64 << 20  # bytes
_MOST_VIEWS = 10_000  # of a split
_RIGID = 1e-3  # how far a rotation may be from orthonormal


@dataclass(frozen=True)
class Views:
    """Pictures of one size and the cameras that took them.

    Attributes:
        images: (V, H, W, 3) float32, 0..1, what is transparent laid on white.
        poses: (V, 3, 4) float32, camera to world; columns: right, up, backwards, position.
        focal: focal length in pixels.
    """

    images: Tensor
    poses: Tensor
    focal: float

    def __len__(self) -> int:
        return len(self.images)

    @property
    def pixels(self) -> int:
        """V H W: they are numbered view by view, row by row."""
        return self.images.numel() // 3

    def to(self, device: str) -> Views:
        return replace(self, images=self.images.to(device), poses=self.poses.to(device))

    def rays(self, pixels: Tensor | None = None) -> Tensor:
        """(N, 6): origin and unit direction of the ray through the centre of each of `pixels` (N,), or of every pixel."""
        height, width = self.images.shape[1:3]
        pixels = torch.arange(self.pixels) if pixels is None else pixels
        rows, columns = pixels // width % height + 0.5, pixels % width + 0.5
        seen = torch.stack([(columns - width / 2) / self.focal, (height / 2 - rows) / self.focal, -torch.ones_like(rows)], 1)
        poses = self.poses[pixels // (height * width)]
        directions = (poses[:, :, :3] * seen[:, None, :]).sum(2)
        return torch.cat([poses[:, :, 3], torch.nn.functional.normalize(directions, dim=1)], 1)

    def colours(self, pixels: Tensor | None = None) -> Tensor:
        """(N, 3), as `rays`."""
        colours = self.images.reshape(-1, 3)
        return colours if pixels is None else colours[pixels]


@dataclass(frozen=True)
class Scene:
    """Views to train on, to decide by, and to test with; what can be seen lies between `near` and `far` of a camera."""

    name: str
    train: Views
    validation: Views
    test: Views
    near: float
    far: float

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the pictures."""
        return 3, *self.train.images.shape[1:3]

    def checksum(self) -> str:
        """SHA-256 over pictures and cameras."""
        digest = hashlib.sha256(json.dumps([self.near, self.far]).encode())
        for split in SPLITS:
            views: Views = getattr(self, split)
            digest.update(json.dumps([list(views.images.shape), views.focal]).encode())
            for tensor in (views.images, views.poses):
                digest.update(memoryview(tensor.contiguous().numpy()))
        return digest.hexdigest()


class RayBatches(Source):
    """Random rays of views with their colours, the same ones for the same (seed, key, epoch, step).

    Args:
        rays_per_step, steps_per_epoch: an epoch is a number of steps, not a pass over all pixels.
        samples: points that a ray is sampled at; every ray brings a random number for each.
    """

    def __init__(self, views: Views, rays_per_step: int, steps_per_epoch: int, samples: int, seed: int) -> None:
        self.steps_per_epoch, self.images_per_epoch = steps_per_epoch, steps_per_epoch * rays_per_step
        self._views, self._count, self._samples, self._seed = views, rays_per_step, samples, seed

    def inputs(self, key: str, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Numbers of pixels (R,), and numbers in [0, 1) (R, samples)."""
        self.check_start(start)
        device = self._views.images.device
        for step in range(start, self.steps_per_epoch):
            generator = keyed_generator(self._seed, f"{key}, epoch {epoch}", step, device)
            chosen = torch.randint(self._views.pixels, (self._count,), generator=generator, device=device)
            yield chosen, torch.rand(self._count, self._samples, generator=generator, device=device)

    def batch(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """x (R, 6 + samples): origin, direction, numbers in [0, 1); y (R, 3): colours."""
        chosen, jitter = inputs
        return torch.cat([self._views.rays(chosen), jitter], 1), self._views.colours(chosen)


def load_views(folder: str | Path, size: int | None = None, near: float = 2.0, far: float = 6.0) -> Scene:
    """The scene in `folder`, in nerf_synthetic's layout: RGBA pictures are laid on white.

    size: height and width in pixels that every picture is brought to by averaging; it must divide theirs.
    near, far: 2 and 6 are right for that data set, whose cameras stand 4 away from the object.
    Raises `DataError` of one line for whatever is missing, damaged or makes no sense.
    """
    folder = Path(folder).expanduser()
    if not 0 < near < far < math.inf:
        raise DataError(f"near and far are {near:g} and {far:g}, expected 0 < near < far")
    parts = {split: _load_split(folder, name, size) for split, name in SPLITS.items()}
    shapes = {tuple(views.images.shape[1:3]) for views in parts.values()}
    if len(shapes) > 1:
        raise DataError(f"{folder}: the splits have pictures of {_sizes(shapes)} pixels, expected one size")
    return Scene(folder.name, **parts, near=near, far=far)


def _load_split(folder: Path, name: str, size: int | None) -> Views:
    path = folder / f"transforms_{name}.json"
    regular_file_size(path, _MOST_JSON)
    with reading(path):
        described = json.loads(path.read_text(encoding="utf-8"))
        angle, frames = _described(described)
        poses = torch.tensor([_pose(number, frame) for number, frame in enumerate(frames)])
        files = [_file(folder, number, frame) for number, frame in enumerate(frames)]
    images, pixels = [], 0
    for file in files:
        images.append(_picture(file, size))
        pixels += images[-1].shape[0] * images[-1].shape[1]
        if images[-1].shape != images[0].shape:
            raise DataError(f"{file}: has {_sizes([images[-1].shape])} pixels, the views before it {_sizes([images[0].shape])}")
        if pixels > _MOST_PIXELS:
            raise DataError(f"{path}: its views have more than {_MOST_PIXELS // 10**6} million pixels; give a smaller size")
    return Views(torch.stack(images), poses, 0.5 * images[0].shape[1] / math.tan(0.5 * angle))


def _described(described: object) -> tuple[float, list]:
    if not isinstance(described, dict):
        raise DataError(f"holds {type(described).__name__}, expected an object with camera_angle_x and frames")
    angle, frames = described.get("camera_angle_x"), described.get("frames")
    if not (_number(angle) and 0 < angle < math.pi):
        raise DataError("camera_angle_x is no angle between 0 and pi")
    if not isinstance(frames, list) or not 1 <= len(frames) <= _MOST_VIEWS:
        raise DataError(f"frames is no list of 1 to {_MOST_VIEWS} views")
    return float(angle), frames


def _pose(number: int, frame: object) -> list[list[float]]:
    """The upper three rows of a camera's matrix."""
    rows = frame.get("transform_matrix") if isinstance(frame, dict) else None
    if not (isinstance(rows, list) and len(rows) == 4 and all(
            isinstance(row, list) and len(row) == 4 and all(map(_number, row)) for row in rows)):
        raise DataError(f"frame {number}: transform_matrix is no 4x4 matrix of finite numbers")
    matrix = np.array(rows, dtype=float)
    rotation = matrix[:3, :3]
    if not (np.abs(matrix[3] - (0, 0, 0, 1)).max() < 1e-6 and np.abs(matrix).max() < 1e6
            and np.abs(rotation @ rotation.T - np.eye(3)).max() < _RIGID and np.linalg.det(rotation) > 0):
        raise DataError(f"frame {number}: transform_matrix is no rotation and shift")
    return matrix[:3].tolist()


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _file(folder: Path, number: int, frame: dict) -> Path:
    """The picture of a frame: inside the folder, whatever the file says."""
    name = frame.get("file_path")
    if not isinstance(name, str) or not 0 < len(name) < 1000 or "\0" in name:
        raise DataError(f"frame {number}: file_path is no path")
    path = folder / (name if name.endswith(".png") else f"{name}.png")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"frame {number}: file_path {name[:100]!r} leads out of the folder")
    return path


def _picture(path: Path, size: int | None) -> Tensor:
    """(H, W, 3) float32, 0..1, on white; brought to `size` by averaging."""
    needs("PIL", "pillow", "reading pictures")
    from PIL import Image

    regular_file_size(path)
    with reading(path), Image.open(path, formats=("PNG",)) as image:
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS // 10**6} million")
        if size is not None and (image.width != image.height or image.height % size):
            raise DataError(f"has {image.width}x{image.height} pixels, which cannot be averaged to {size}x{size}; give a size "
                            "that divides height and width of square pictures")
        levels = torch.from_numpy(np.array(image.convert("RGBA"))).float() / 255
    colours, opacity = levels[..., :3], levels[..., 3:]
    on_white = colours * opacity + (1 - opacity)
    if size is None:
        return on_white
    factor = on_white.shape[0] // size
    return on_white.view(size, factor, size, factor, 3).mean((1, 3))


def _sizes(shapes) -> str:
    return " and ".join(sorted(f"{shape[1]}x{shape[0]}" for shape in shapes))


# Centre, radius, colour of spheres; centre, half lengths, colour of boxes along the axes.
_SPHERES = [((-0.55, -0.35, 0.1), 0.55, (0.85, 0.25, 0.2)), ((0.45, 0.65, 0.0), 0.4, (0.2, 0.45, 0.85)),
            ((0.1, -0.1, 0.75), 0.3, (0.95, 0.8, 0.25))]
_BOXES = [((0.0, 0.0, -0.55), (1.0, 1.0, 0.12), (0.35, 0.6, 0.35)), ((0.6, -0.5, -0.05), (0.25, 0.3, 0.4), (0.6, 0.35, 0.7))]
_LIGHT = (0.48, -0.36, 0.8)
_ANGLE = 0.6911112070083618  # nerf_synthetic's camera_angle_x


def analytic_scene(size: int = ANALYTIC_SIZE, train: int = 24, validation: int = 4, test: int = 4) -> Scene:
    """Spheres and boxes on a plate, rendered exactly at every pixel's centre: matt, lit from one side, on white.

    size: height and width in pixels. train, validation, test: numbers of views, from cameras all around above the plate.
    """
    if min(size, train, validation, test) < 1 or (train + validation + test) * size**2 > _MOST_PIXELS:
        raise DataError(f"an analytic scene of {train} + {validation} + {test} views of {size}x{size} pixels cannot be made")
    counts, focal = {"train": train, "validation": validation, "test": test}, 0.5 * size / math.tan(0.5 * _ANGLE)
    parts = {}
    for split, count in counts.items():
        offset = list(counts).index(split) / 3  # no two splits share a camera
        poses = torch.stack([_camera((index + offset) / count, 2.399963 * (index + offset)) for index in range(count)])
        blank = Views(torch.empty(count, size, size, 3), poses, focal)
        parts[split] = replace(blank, images=_traced(blank.rays()).view_as(blank.images))
    return Scene("analytic", **parts, near=2.0, far=6.0)


def _camera(height: float, turn: float) -> Tensor:
    """The pose (3, 4) of a camera at distance 4 that looks at the origin; height 0..1: from low to high."""
    elevation = math.radians(10 + 65 * height)
    position = torch.tensor([math.cos(elevation) * math.cos(turn), math.cos(elevation) * math.sin(turn), math.sin(elevation)])
    right = torch.nn.functional.normalize(torch.linalg.cross(torch.tensor([0.0, 0.0, 1.0]), position), dim=0)
    return torch.stack([right, torch.linalg.cross(position, right), position, 4 * position], 1)


def _traced(rays: Tensor) -> Tensor:
    """(N, 3): the colour that each ray (N, 6) ends on."""
    origins, directions = rays.double().split(3, 1)
    nearest = torch.full_like(origins[:, :1], math.inf)
    colours = torch.ones_like(origins)
    light = torch.tensor(_LIGHT, dtype=torch.float64)
    for hit, shapes in ((_hit_sphere, _SPHERES), (_hit_box, _BOXES)):
        for centre, extent, colour in shapes:
            distance, normal = hit(origins - origins.new_tensor(centre), directions, origins.new_tensor(extent))
            shaded = origins.new_tensor(colour) * (0.55 + 0.45 * (normal @ light).clamp(min=0))[:, None]
            closer = distance < nearest
            nearest, colours = torch.where(closer, distance, nearest), torch.where(closer, shaded, colours)
    return colours.float()


def _hit_sphere(origins: Tensor, directions: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (N, 1), infinite where a ray from outside misses, and normal (N, 3)."""
    along = (origins * directions).sum(1, keepdim=True)
    inside = along**2 - (origins**2).sum(1, keepdim=True) + radius**2
    distance = torch.where(inside > 0, -along - inside.clamp(min=0).sqrt(), math.inf)
    distance = torch.where(distance > 0, distance, math.inf)
    return distance, (origins + directions * distance.nan_to_num(posinf=0)) / radius


def _hit_box(origins: Tensor, directions: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    safe = torch.where(directions.abs() < 1e-12, torch.full_like(directions, 1e-12), directions)
    entries, axis = ((-half * safe.sign() - origins) / safe).max(1, keepdim=True)
    leaves = ((half * safe.sign() - origins) / safe).amin(1, keepdim=True)
    distance = torch.where((entries < leaves) & (entries > 0), entries, math.inf)
    return distance, torch.zeros_like(origins).scatter(1, axis, -safe.sign().gather(1, axis))
