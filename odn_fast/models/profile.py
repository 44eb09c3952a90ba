"""What a network costs, counted exactly and before any training."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from .depth_network import DepthNetwork


@dataclass(frozen=True)
class Profile:
    """Size and work of a network for one input image.

    Attributes:
        params: number of parameters.
        state_bytes: bytes of the state dict (buffers and `num_batches_tracked` included).
        macs: multiply-adds of convolutions and linear layers.
        paper_flops: the "FLOPs" of Optimally Deep Networks, Table I: macs + 5 per batch-norm output element
            + 1 per pooled input element.
        growth_flops: the "FLOPs" of SEArch's tables: macs + 2 per batch-norm output element.
    """

    params: int
    state_bytes: int
    macs: int
    paper_flops: int
    growth_flops: int


def profile(model: nn.Module, input_shape: tuple[int, int, int], depth: int | None = None) -> Profile:
    """Count parameters, bytes and multiply-adds of `model` for one image of `input_shape` (C, H, W).

    One image of zeros goes through the model, which is left as it was; on the meta device the first batch norm would wait a
    second until PyTorch has loaded its decompositions. For a `DepthNetwork`, `depth` chooses the network (default: the full
    one). Counted are convolutions, linear layers, batch norms and average pools; other layers count nothing.

    Raises:
        ValueError: an impossible depth, a depth for a network without depths, or an input that does not fit.
    """
    if isinstance(model, DepthNetwork):
        model = model.at_depth(depth)
    elif depth is not None:
        raise ValueError(f"depth: {type(model).__name__} has no depths; expected None, got {depth}")
    state = model.state_dict()
    counts = _count(model, tuple(input_shape))
    macs, normalised = counts["macs"], counts["normalised"]
    return Profile(params=sum(p.numel() for p in model.parameters()),
                   state_bytes=sum(t.numel() * t.element_size() for t in state.values()),
                   macs=macs, paper_flops=macs + 5 * normalised + counts["pooled"], growth_flops=macs + 2 * normalised)


def _count(model: nn.Module, input_shape: tuple[int, ...]) -> dict[str, int]:
    """Multiply-adds, batch-norm output elements and pooled input elements."""
    counts = {"macs": 0, "normalised": 0, "pooled": 0}

    def add(module: nn.Module, inputs: tuple[Tensor], output: Tensor):
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            counts["macs"] += output.numel() * (module.in_channels // module.groups) * prod(module.kernel_size)
        elif isinstance(module, nn.Linear):
            counts["macs"] += output.numel() * module.in_features
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            counts["normalised"] += output.numel()
        elif isinstance(module, (nn.AdaptiveAvgPool2d, nn.AvgPool2d)):
            counts["pooled"] += inputs[0].numel()

    modes = {module: module.training for module in model.modules()}
    hooks = [module.register_forward_hook(add) for module in modes]
    weight = next(model.parameters(), torch.empty(0))
    try:
        model.eval()
        with torch.no_grad():
            model(torch.zeros(1, *input_shape, dtype=weight.dtype, device=weight.device))
    except RuntimeError as error:
        raise ValueError(f"input_shape: {input_shape} does not fit this network ({str(error).splitlines()[0]})") from None
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return counts
