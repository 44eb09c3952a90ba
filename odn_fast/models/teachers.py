"""Teachers for growth: trained networks, frozen, that give away their inner feature maps (SEArch, section 3.2).

A teacher's maps v_1..v_m are the outputs of its residual blocks, after the ReLU; the stem is none of them. Any module that
`torch.fx` traces becomes a teacher by naming the submodules whose outputs are its maps.
"""

import copy
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from .fold import FoldedNetwork, graph_module
from .profile import profile
from .resnet import CIFAR_DEPTHS, CifarResNet

NETWORKS = {f"resnet{depth}": depth for depth in CIFAR_DEPTHS}  # that can be trained first
# What the public CIFAR-10 checkpoints were trained on: (x - mean) / std of images in [0, 1].
PUBLIC_MEAN, PUBLIC_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Teacher(nn.Module):
    """A frozen network with batch norm folded, its logits and its inner maps.

    Args:
        network: a trained module that `torch.fx` traces, on any device; it is copied.
        names: submodules whose outputs are the maps v_1..v_m, in the order in which they are computed.
        input_shape: (C, H, W) of its images.
        name: what reports call it.
        mean, std: per channel, where the network wants (x - mean) / std of what it is given here.

    Attributes:
        map_shapes: (channels, height, width) of v_1..v_m.
        params, flops: of the network as it was, before folding; multiply-adds + 2 per batch-norm output element.

    Raises:
        ValueError: a name that is no submodule with one output map, maps that grow in size along the path, a network
            that cannot be traced, or an input that does not fit.
    """

    def __init__(self, network: nn.Module, names: Sequence[str], input_shape: tuple[int, int, int], name: str,
                 mean: Sequence[float] | None = None, std: Sequence[float] | None = None):
        super().__init__()
        self.name, self.input_shape = name, tuple(input_shape)
        size = profile(network, self.input_shape)
        self.params, self.flops = size.params, size.growth_flops
        self._folded = FoldedNetwork(copy.deepcopy(network).eval(), _map_tracer(network, names))
        self._parts: dict[tuple[int, ...], fx.GraphModule] = {}
        device = next(network.parameters()).device
        if mean is not None:
            self.register_buffer("mean", torch.tensor(mean, device=device).view(-1, 1, 1))
            self.register_buffer("std", torch.tensor(std, device=device).view(-1, 1, 1))
        self.standardises = mean is not None
        self._check(names)
        self.map_shapes = self._map_shapes(names, device)

    def _check(self, names: Sequence[str]):
        found = [node.meta["map"] for node in self._folded.graph.graph.nodes if "map" in node.meta]
        missing = [name for q, name in enumerate(names, 1) if q not in found]
        if missing or not names:
            raise ValueError(f"teacher {self.name}: {missing[0] if missing else 'no names'}: expected names of submodules whose "
                             "output is one feature map")
        for before, after in pairwise(found):
            if after <= before:
                raise ValueError(f"teacher {self.name}: {names[after - 1]} is computed after {names[before - 1]}; expected names in the "
                                 "order in which their outputs are computed, each once")

    def _map_shapes(self, names: Sequence[str], device: torch.device) -> tuple[tuple[int, int, int], ...]:
        maps = self.maps(torch.zeros(1, *self.input_shape, device=device), range(1, len(names) + 1))
        shapes = tuple(tuple(x.shape[1:]) for x in maps)
        for name, shape, (before, after) in zip(names[1:], shapes[1:], zip(shapes, shapes[1:])):
            if after[1] > before[1] or after[2] > before[2]:
                raise ValueError(f"teacher {self.name}: the map of {name}, {shape[1]}x{shape[2]}, is larger than the one before it, "
                                 f"{before[1]}x{before[2]}; expected maps that do not grow along the path")
        return shapes

    def maps(self, x: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        """The maps v_q (N, C_q, H_q, W_q) for q in `wanted`, 1..m, in its order; nothing beyond the last is computed.

        x: (N, C, H, W).
        """
        wanted = tuple(wanted)
        if wanted not in self._parts:
            self._parts[wanted] = self._part(wanted)
        with torch.no_grad():
            return list(self._parts[wanted](self._input(x)))

    def _part(self, wanted: tuple[int, ...]) -> fx.GraphModule:
        """A graph over the same modules that ends at the maps wanted."""
        graph = copy.deepcopy(self._folded.graph.graph)
        nodes = {node.meta["map"]: node for node in graph.nodes if "map" in node.meta}
        for q in wanted:
            if q not in nodes:
                raise ValueError(f"teacher {self.name}: there is no map {q}; expected 1 to {len(nodes)}")
        graph.erase_node(next(node for node in graph.nodes if node.op == "output"))
        graph.output(tuple(nodes[q] for q in wanted))
        for node in reversed(graph.nodes):
            if not node.users and node.op not in ("placeholder", "output"):
                graph.erase_node(node)
        used = [node.target for node in graph.nodes if node.op == "call_module"]
        return graph_module({target: self._folded.graph.get_submodule(target) for target in used}, graph)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes)."""
        return self._folded(self._input(x))

    def _input(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std if self.standardises else x

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)  # frozen


def _map_tracer(network: nn.Module, names: Sequence[str]) -> fx.Tracer:
    """A tracer that marks the outputs of the submodules `names` with their number, from 1, as `meta["map"]`."""
    known = dict(network.named_modules())
    for name in names:
        if name not in known:
            near = [other for other in known if other.startswith(name.split(".")[0])][1:6]
            hint = f"; near it are {', '.join(near)}" if near else ""
            raise ValueError(f"teacher: {name!r} is no submodule of {type(network).__name__}{hint}")
    numbers = {name: q for q, name in enumerate(names, 1)}

    class MapTracer(fx.Tracer):
        def call_module(self, module, forward, args, kwargs):
            output = super().call_module(module, forward, args, kwargs)
            q = numbers.get(self.path_of_module(module))
            if q is not None and isinstance(output, fx.Proxy):
                output.node.meta["map"] = q
            return output

    return MapTracer()


def block_names(network: nn.Module) -> list[str]:
    """Names of the residual blocks of a ResNet whose stages are called layer1, layer2, ..., in order: its maps."""
    return [f"{layer}.{position}" for layer, stage in network.named_children() if re.fullmatch(r"layer\d", layer)
            for position in range(len(stage))]


def teacher_of(network: nn.Module, names: Sequence[str] | None, input_shape: tuple[int, int, int], name: str,
               mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Teacher:
    """A `Teacher`; names: of the submodules whose outputs are its maps, None for the blocks of a ResNet."""
    return Teacher(network, block_names(network) if names is None else names, input_shape, name, mean, std)


def load_teacher(path: str | Path, classes: int, input_shape: tuple[int, int, int],
                 normalised: tuple[Sequence[float], Sequence[float]] = ((0.0,), (1.0,))) -> Teacher:
    """A CIFAR ResNet from a public checkpoint: {"state_dict": ...}, keys with or without "module." in front.

    Nothing in the file is executed.

    Args:
        normalised: mean and std, per channel or one for all, that its images x are given with, as (x - mean) / std of x in
            [0, 1]. One of coloured images undoes that and standardises them as it was trained.

    Raises:
        ValueError: a file that is no such checkpoint, or one for other classes or images.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"teacher {path}: cannot be read ({error.strerror}); give the path of a checkpoint") from None
    except Exception:  # whatever a damaged archive or a forbidden pickle raises, whose words advise to run what is in it
        raise ValueError(f"teacher {path}: is no checkpoint of tensors alone, or is damaged; give the file that torch.save wrote of a "
                         "network's state dict") from None
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"teacher {path}: expected a state dict of a CIFAR ResNet")
    state = {key.removeprefix("module."): value for key, value in state.items()}
    blocks = len({key.split(".")[1] for key in state if key.startswith("layer1.")})
    depth = 6 * blocks + 2
    if depth not in CIFAR_DEPTHS or "linear.weight" not in state or state["linear.weight"].dim() != 2:
        raise ValueError(f"teacher {path}: holds no CIFAR ResNet of depth {', '.join(map(str, CIFAR_DEPTHS))} "
                         f"(it has {blocks} blocks in its first stage)")
    if len(state["linear.weight"]) != classes:
        raise ValueError(f"teacher {path}: has {len(state['linear.weight'])} classes, the data set {classes}")
    network = CifarResNet(depth, classes, input_shape[0])
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"teacher {path}: does not fit ResNet-{depth} on {input_shape} images "
                         f"({str(error).splitlines()[1].strip()[:200]})") from None
    name = f"ResNet-{depth}"
    if input_shape[0] != len(PUBLIC_MEAN):
        return teacher_of(network, None, input_shape, name)
    given_mean, given_std = (torch.tensor(values, dtype=torch.float64) for values in normalised)
    mean, std = ((torch.tensor(PUBLIC_MEAN, dtype=torch.float64) - given_mean) / given_std,
                 torch.tensor(PUBLIC_STD, dtype=torch.float64) / given_std)
    return teacher_of(network, None, input_shape, name, mean.tolist(), std.tolist())
