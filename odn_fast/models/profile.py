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
    """

    params: int
    state_bytes: int
    macs: int
    paper_flops: int


def profile(model: nn.Module, input_shape: tuple[int, int, int], depth: int | None = None) -> Profile:
    """Count parameters, bytes and multiply-adds of `model` for one image of `input_shape` (C, H, W).

    Nothing is computed and the model is left as it was: shapes are propagated on the meta device. For a `DepthNetwork`,
    `depth` chooses the network (default: the full one). Counted are convolutions, linear layers, batch norms and
    average pools; other layers count nothing.

    Raises:
        ValueError: an impossible depth, a depth for a network without depths, or an input that does not fit.
    """
    if isinstance(model, DepthNetwork):
        model = model.at_depth(depth)
    elif depth is not None:
        raise ValueError(f"depth: {type(model).__name__} has no depths; expected None, got {depth}")
    state = model.state_dict()
    macs, extra = _count(model, tuple(input_shape))
    return Profile(params=sum(p.numel() for p in model.parameters()),
                   state_bytes=sum(t.numel() * t.element_size() for t in state.values()),
                   macs=macs, paper_flops=macs + extra)


def _count(model: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, int]:
    """Multiply-adds, and the further operations that the paper counts."""
    counts = {"macs": 0, "extra": 0}

    def add(module: nn.Module, inputs: tuple[Tensor], output: Tensor):
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            counts["macs"] += output.numel() * (module.in_channels // module.groups) * prod(module.kernel_size)
        elif isinstance(module, nn.Linear):
            counts["macs"] += output.numel() * module.in_features
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            counts["extra"] += 5 * output.numel()
        elif isinstance(module, (nn.AdaptiveAvgPool2d, nn.AvgPool2d)):
            counts["extra"] += inputs[0].numel()

    modes = {module: module.training for module in model.modules()}
    hooks = [module.register_forward_hook(add) for module in modes]
    tensors = {name: tensor.to("meta") for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    try:
        model.eval()
        with torch.no_grad():
            torch.func.functional_call(model, tensors, (torch.empty(1, *input_shape, device="meta"),))
    except RuntimeError as error:
        raise ValueError(f"input_shape: {input_shape} does not fit this network ({str(error).splitlines()[0]})") from None
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return counts["macs"], counts["extra"]
