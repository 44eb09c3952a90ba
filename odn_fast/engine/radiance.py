"""Training and measuring radiance fields: loss along rays, distillation of hidden layers, distance from the teacher.

Every hidden layer is a node of SEArch (section 4.5). What its neurons say at a batch's points is cut into chunks of
`CHUNK` points, each of which is to channel attention what an image is: (chunks, C, CHUNK, 1), C = the layer's width.
"""

import torch
from torch import Tensor, nn

from ..models.radiance import RadianceField, along, composited, psnr, rendered, sample_distances
from ..ops import channel_attention_loss
from .node_measures import NodeMeasure, NodeSums
from .step import Loss

CHUNK = 64  # as many positions as an 8x8 map: attention sharpens with their number


def photometric_loss(near: float, far: float) -> Loss:
    """Mean squared difference of colours, (1,), for `fit`; x (R, 6 + samples) and y (R, 3) as `RayBatches` gives them."""
    def loss(network: RadianceField, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        error, _, _ = _seen(network, x, y, near, far)
        return error[None], _uncounted(error[None])

    return loss


def distilled_loss(near: float, far: float, teacher: RadianceField, alpha: Tensor) -> Loss:
    """alpha * (mean of R over hidden layers), and the photometric loss: (2,); alpha: (), read at every step."""
    def loss(network: RadianceField, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        error, maps, points = _seen(network, x, y, near, far)
        with torch.no_grad():
            taught = teacher.maps(points)
        inner = sum(inner_loss(given, wanted) for given, wanted in zip(maps, taught)) / len(maps)
        losses = torch.stack([alpha * inner, error])
        return losses, _uncounted(losses)

    return loss


def inner_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """R of one hidden layer: student (N, C_s), teacher (N, C_t); points beyond the last whole chunk are left out."""
    return channel_attention_loss(chunked(student), chunked(teacher))


def chunked(layer: Tensor) -> Tensor:
    """(N, C) -> (chunks, C, P, 1), channels_last as it stands; P = CHUNK, or N where that is less."""
    positions = min(CHUNK, len(layer))
    chunks = len(layer) // positions
    return layer[:chunks * positions].float().view(chunks, positions, -1).transpose(1, 2).unsqueeze(3)


def _seen(network: RadianceField, x: Tensor, y: Tensor, near: float, far: float) -> tuple[Tensor, list[Tensor], Tensor]:
    """Photometric loss, hidden layers, points (R, S, 3)."""
    distances = sample_distances(near, far, x[:, 6:])
    points = along(x, distances)
    colours, densities, maps = network(points, x[:, 3:6])
    return nn.functional.mse_loss(composited(colours.float(), densities.float(), distances, far), y), maps, points


def _uncounted(losses: Tensor) -> Tensor:
    """Rays are not right or wrong."""
    return torch.zeros(len(losses), dtype=torch.int64, device=losses.device)


@torch.inference_mode()
def measure_layers(student: RadianceField, teacher: RadianceField, rays: Tensor, near: float, far: float,
                   samples: int, batch: int = 256) -> list[NodeMeasure]:
    """Every hidden layer, a node with its number (from 0) for q, over points at the middle of equal parts of `rays` (N, 6), all of
    one order and on any device."""
    device = next(student.parameters()).device
    sums = [NodeSums(layer, layer) for layer in range(len(student.shape.widths))]
    for part in rays.to(device).split(batch):
        distances = sample_distances(near, far, torch.full((len(part), samples), 0.5, device=device))
        points = along(part, distances)
        for each, given, wanted in zip(sums, student.maps(points), teacher.maps(points)):
            each.add(chunked(given), chunked(wanted), standardize=True)
    return [each.measure() for each in sums]


def rays_psnr(network: RadianceField, rays: Tensor, colours: Tensor, near: float, far: float, samples: int) -> float:
    """PSNR in dB over rays (N, 6) of known colours (N, 3)."""
    return psnr((rendered(network, rays, near, far, samples) - colours).square().mean().item())
