"""The radiance field of NeRF: an MLP from a point and a direction to density and colour, and the picture along a ray.

A field is described by plain data (`RadianceShape`), counted before it is built, and grown by `widen_layer`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

_LARGEST = 2**16  # of any width: beyond it a shape is a mistake


@dataclass(frozen=True)
class RadianceShape:
    """What a radiance field is made of.

    Attributes:
        widths: neurons of every hidden layer.
        feature, colour: widths of the linear feature behind the last layer, and of the layer that sees the direction.
        point_frequencies, direction_frequencies: octaves of the positional encodings.
        skip: number (from 0) of the hidden layer that is given the encoded point again, or None.

    Raises:
        ValueError: a number that makes no sense.
    """

    widths: tuple[int, ...]
    feature: int
    colour: int
    point_frequencies: int = 10
    direction_frequencies: int = 4
    skip: int | None = None

    def __post_init__(self):
        numbers = [*self.widths, self.feature, self.colour]
        if not self.widths or not all(type(number) is int and 1 <= number <= _LARGEST for number in numbers):
            raise ValueError(f"radiance field: widths are {numbers}, expected whole numbers from 1 to {_LARGEST}")
        octaves = (self.point_frequencies, self.direction_frequencies)
        if not all(type(number) is int and 0 <= number <= 20 for number in octaves):
            raise ValueError(f"radiance field: frequencies are {octaves}, expected whole numbers from 0 to 20")
        if self.skip is not None and not (type(self.skip) is int and 1 <= self.skip < len(self.widths)):
            raise ValueError(f"radiance field: skip is {self.skip}, expected a hidden layer from 1 to {len(self.widths) - 1}")

    @classmethod
    def uniform(cls, layers: int, width: int, point_frequencies: int = 10, direction_frequencies: int = 4) -> RadianceShape:
        """NeRF's own proportions: 8 x 256 has 595,844 parameters, and layer 5 of 0..7 sees the point again."""
        skip = layers // 2 + 1 if layers >= 4 else None
        return cls((width,) * layers, width, max(1, width // 2), point_frequencies, direction_frequencies, skip)

    def with_widths(self, widths: Sequence[int]) -> RadianceShape:
        return replace(self, widths=tuple(widths))

    @property
    def point_size(self) -> int:
        return 3 + 6 * self.point_frequencies

    @property
    def direction_size(self) -> int:
        return 3 + 6 * self.direction_frequencies

    def inputs(self, layer: int) -> int:
        """What a hidden layer is given: the encoded point, the layer before, or both."""
        before = self.widths[layer - 1] if layer else 0
        return before + (self.point_size if layer in (0, self.skip) else 0)

    @property
    def params(self) -> int:
        """Weights and biases, exactly."""
        sizes = [(self.inputs(layer), width) for layer, width in enumerate(self.widths)]
        sizes += [(self.widths[-1], 1), (self.widths[-1], self.feature)]
        sizes += [(self.feature + self.direction_size, self.colour), (self.colour, 3)]
        return sum((inputs + 1) * outputs for inputs, outputs in sizes)

    def to_dict(self) -> dict:
        return {**asdict(self), "widths": list(self.widths)}

    @classmethod
    def from_dict(cls, values: dict) -> RadianceShape:
        """Raises ValueError for anything that `to_dict` does not give."""
        names = list(cls.__dataclass_fields__)
        if not isinstance(values, dict) or sorted(values) != sorted(names) or not isinstance(values["widths"], list):
            raise ValueError(f"radiance field: expected {', '.join(names)}, with a list of widths")
        return cls(**{**values, "widths": tuple(values["widths"])})


class RadianceField(nn.Module):
    """NeRF's MLP. Hidden layers are linear + ReLU; keys are `hidden.<layer>`, `density`, `feature`, `direction`, `colour`."""

    def __init__(self, shape: RadianceShape):
        super().__init__()
        self.shape = shape
        self.hidden = nn.ModuleList(nn.Linear(shape.inputs(layer), width) for layer, width in enumerate(shape.widths))
        self.density = nn.Linear(shape.widths[-1], 1)
        self.feature = nn.Linear(shape.widths[-1], shape.feature)
        self.direction = nn.Linear(shape.feature + shape.direction_size, shape.colour)
        self.colour = nn.Linear(shape.colour, 3)

    def forward(self, points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """points (R, S, 3) on rays of directions (R, 3) -> colours (R, S, 3), densities (R, S), and what the hidden layers
        give, (R S, width) each."""
        rays, samples = points.shape[:2]
        maps = self.maps(points)
        # softplus, not NeRF's ReLU: a narrow field whose density starts below zero everywhere would never learn
        density = nn.functional.softplus(self.density(maps[-1]) - 1)
        seen = encoded(directions, self.shape.direction_frequencies)[:, None].expand(rays, samples, -1).flatten(0, 1)
        colour = self.direction(torch.cat([self.feature(maps[-1]), seen], 1)).relu()
        colour = self.colour(colour).sigmoid()
        return colour.view(rays, samples, 3), density.view(rays, samples), maps

    def maps(self, points: Tensor) -> list[Tensor]:
        """What the hidden layers give for points (..., 3): (N, width) each."""
        x = encoded(points.reshape(-1, 3), self.shape.point_frequencies)
        maps: list[Tensor] = []
        for layer, linear in enumerate(self.hidden):
            given = maps[-1] if maps else x
            if layer == self.shape.skip:
                given = torch.cat([x, given], 1)
            maps.append(linear(given).relu())
        return maps


def encoded(x: Tensor, frequencies: int) -> Tensor:
    """(N, 3) -> (N, 3 + 6 frequencies): x itself, sin(2^k x) and cos(2^k x) (NeRF, Eq. 4, without the factor pi)."""
    scaled = (x[:, None, :] * 2.0 ** torch.arange(frequencies, device=x.device)[:, None]).flatten(1)
    return torch.cat([x, scaled.sin(), scaled.cos()], 1)


def create_field(shape: RadianceShape, seed: int) -> RadianceField:
    """A field initialised from the seed without touching the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RadianceField(shape)


@torch.no_grad()
def widen_layer(network: RadianceField, layer: int, by: int, seed: int) -> RadianceField:
    """A field whose hidden layer (from 0) has `by` more neurons and which computes the same function.

    Old weights are carried over; new neurons are drawn as a new layer's would be, from the seed, and nothing listens to
    them yet: their outgoing weights are zero, and learn at the first step.

    Raises ValueError for a layer that is not there, or fewer than 1 neuron.
    """
    widths = list(network.shape.widths)
    if not 0 <= layer < len(widths) or by < 1:
        raise ValueError(f"widen_layer: layer {layer} by {by}, expected a layer from 0 to {len(widths) - 1} and at least 1")
    widths[layer] += by
    fresh = create_field(network.shape.with_widths(widths), seed).to(next(network.parameters()).device)
    for name, old in network.named_parameters():
        new = fresh.get_parameter(name)
        if new.dim() == 2:
            new[:, old.shape[1]:] = 0  # of the layers that read the widened one
        new[tuple(slice(length) for length in old.shape)] = old
    return fresh


@torch.no_grad()
def keep_neurons(network: RadianceField, widths: Sequence[int], seed: int) -> RadianceField:
    """A field with `widths` neurons in its hidden layers, drawn at random from those of `network`, weights and all.

    Raises ValueError where a width is larger than the network's.
    """
    generator = torch.Generator().manual_seed(seed)
    if len(widths) != len(network.shape.widths) or any(new > old for new, old in zip(widths, network.shape.widths)):
        raise ValueError(f"keep_neurons: widths {list(widths)} do not fit into {list(network.shape.widths)}")
    kept = [torch.arange(network.shape.point_size)]  # what every part of the network still hears of what comes before it
    for new, old in zip(widths, network.shape.widths):
        kept.append(torch.randperm(old, generator=generator)[:new].sort().values)
    pruned = create_field(network.shape.with_widths(widths), seed)
    weights = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    for layer in range(len(widths)):
        heard = kept[layer]
        if layer == network.shape.skip:
            heard = torch.cat([kept[0], network.shape.point_size + heard])
        weights[f"hidden.{layer}.weight"] = weights[f"hidden.{layer}.weight"][kept[layer + 1]][:, heard]
        weights[f"hidden.{layer}.bias"] = weights[f"hidden.{layer}.bias"][kept[layer + 1]]
    for head in ("density", "feature"):
        weights[f"{head}.weight"] = weights[f"{head}.weight"][:, kept[-1]]
    pruned.load_state_dict(weights)
    return pruned.to(next(network.parameters()).device)


def narrow_widths(full: RadianceShape, params: int) -> tuple[int, ...]:
    """The same share of every layer's neurons, as many as a field of at most `params` parameters can have.

    Raises ValueError where not even one neuron a layer fits.
    """
    for kept in range(max(full.widths), 0, -1):
        widths = [max(1, width * kept // max(full.widths)) for width in full.widths]
        if full.with_widths(widths).params <= params:
            return tuple(widths)
    raise ValueError(f"narrow_widths: no field of this kind has {params} parameters or fewer")


def sample_distances(near: float, far: float, jitter: Tensor) -> Tensor:
    """One distance in each of S equal parts of a ray: at jitter (R, S), from 0 to 1, of every part (stratified sampling)."""
    parts = torch.arange(jitter.shape[1], device=jitter.device)
    return near + (parts + jitter) * ((far - near) / jitter.shape[1])


def along(rays: Tensor, distances: Tensor) -> Tensor:
    """Points (R, S, 3) at distances (R, S) along rays (R, 6)."""
    return rays[:, None, :3] + rays[:, None, 3:6] * distances[..., None]


def composited(colours: Tensor, densities: Tensor, distances: Tensor, far: float) -> Tensor:
    """Volume rendering before white (NeRF, Eq. 3): colours (R, S, 3), densities (R, S) at distances (R, S) -> (R, 3).

    A sample stands for the part of the ray up to the next one, the last for that up to `far`.
    """
    ends = torch.cat([distances[:, 1:], torch.full_like(distances[:, :1], far)], 1)
    optical = densities * (ends - distances)
    before = torch.cat([torch.zeros_like(optical[:, :1]), optical[:, :-1].cumsum(1)], 1)
    weights = (-before).exp() * -torch.expm1(-optical)
    return (weights[..., None] * colours).sum(1) + (1 - weights.sum(1, keepdim=True))


@torch.inference_mode()
def rendered(network: RadianceField, rays: Tensor, near: float, far: float, samples: int, chunk: int = 2048) -> Tensor:
    """Colours (N, 3), 0..1, of rays (N, 6), each sampled at the middle of `samples` equal parts; float32 on the CPU."""
    device = next(network.parameters()).device
    pictures = []
    for part in rays.split(chunk):
        part = part.to(device)
        distances = sample_distances(near, far, torch.full((len(part), samples), 0.5, device=device))
        colours, densities, _ = network(along(part, distances), part[:, 3:])
        pictures.append(composited(colours, densities, distances, far).clamp(0, 1).cpu())
    return torch.cat(pictures)


def psnr(mean_square: float) -> float:
    """Peak signal-to-noise ratio in dB of colours 0..1 that are off by this mean square."""
    return -10 * math.log10(max(mean_square, 1e-10))
