"""Backbones split by depth, students that grow, and what they cost."""

from .depth_network import DepthNetwork, NetworkAtAllDepths
from .fold import FoldedNetwork
from .profile import Profile, profile
from .resnet import BasicBlock, Bottleneck, resnet
from .student_graph import Count, Edge, Node, StudentGraph, count, deepen, initial_graph, widen
from .student_network import StudentNetwork, extract, grown, plain

_RESNETS = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
}
NAMES = tuple(_RESNETS)

__all__ = [
    "Count", "DepthNetwork", "Edge", "FoldedNetwork", "NAMES", "NetworkAtAllDepths", "Node", "Profile",
    "StudentGraph", "StudentNetwork", "count", "create", "deepen", "extract", "grown", "initial_graph", "plain", "profile", "widen",
]


def create(name: str, in_channels: int = 3, num_classes: int = 10) -> DepthNetwork:
    """A network by name, initialised from PyTorch's global generator.

    Args:
        name: one of `NAMES`.
        in_channels: channels of the input images.
        num_classes: logits of every exit head.

    Raises:
        ValueError: an unknown name, or a count below 1.
    """
    if name not in _RESNETS:
        raise ValueError(f"model: expected one of {', '.join(NAMES)}, got {name!r}")
    if in_channels < 1 or num_classes < 1:
        raise ValueError(f"in_channels and num_classes: expected at least 1, got {in_channels} and {num_classes}")
    block, blocks_per_stage = _RESNETS[name]
    return resnet(block, blocks_per_stage, in_channels, num_classes)
