"""The network of a student graph: built, run, grown into that of a larger graph, and extracted as plain PyTorch."""

import copy
import functools
import hashlib
import json
import operator
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn

from ..nn import ResidualSeparableUnit, SeparableConvBNReLU
from .depth_network import pooled
from .fold import graph_module
from .student_graph import FINAL, INPUT, Node, StudentGraph, unit_shapes


class StudentNetwork(nn.Module):
    """A student of SEArch: stacks of residual separable units along the edges, a linear classifier on the final node.

    Args:
        graph: what it is made of.
        seed: its weights are drawn from generators keyed by (seed, edge, position in the edge), so a unit starts
            alike whatever else the graph holds; PyTorch's global generator is left as it was.

    Attributes:
        graph: as given.
        edges: the units of every edge, by its number as a string.
        resized: by edge, the size to which its map is brought before the first unit; most edges need none.
        classifier: `nn.Linear` on the final node's global average.

    A node with several incoming edges is their sum. State-dict keys are `edges.<edge>.<position>.*` and `classifier.*`.
    """

    def __init__(self, graph: StudentGraph, seed: int = 0):
        super().__init__()
        self.graph = graph
        self.edges = nn.ModuleDict()
        self.resized: dict[int, tuple[int, int]] = {}
        for edge in graph.edges:
            units = nn.ModuleList()
            for position, shape in enumerate(unit_shapes(graph, edge)):
                if shape.pooled:
                    self.resized[edge.id] = shape.pooled
                with _drawing(seed, edge.id, position):
                    units.append(ResidualSeparableUnit(shape.in_channels, shape.out_channels, shape.stride, graph.skip))
            self.edges[str(edge.id)] = units
        with _drawing(seed, "classifier"):
            self.classifier = nn.Linear(graph.node(FINAL).channels, graph.classes)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """x: (N, C, H, W), of the input node's shape. Returns the logits (N, classes) and the map of every supervised node
        (N, channels, height, width) by the node's number. Raises ValueError on another shape."""
        maps = self.maps(x)
        return self.classifier(pooled(maps[FINAL])), maps

    def maps(self, x: Tensor) -> dict[int, Tensor]:
        """The maps alone, for losses that read the final node themselves."""
        given = self.graph.node(INPUT)
        expected = (given.channels, given.height, given.width)
        if x.dim() != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(f"x: expected shape (N, {', '.join(map(str, expected))}), got {tuple(x.shape)}")
        maps = {INPUT: x}
        for node in _in_order(self.graph):
            branches = (self._branch(edge.id, maps[edge.source]) for edge in self.graph.incoming(node.id))
            maps[node.id] = functools.reduce(operator.add, branches)
        return {node.id: maps[node.id] for node in self.graph.supervised}

    def _branch(self, edge_id: int, x: Tensor) -> Tensor:
        if edge_id in self.resized:
            x = nn.functional.adaptive_avg_pool2d(x, self.resized[edge_id])
        for unit in self.edges[str(edge_id)]:
            x = unit(x)
        return x


def grown(network: StudentNetwork, graph: StudentGraph, seed: int) -> StudentNetwork:
    """The network of a graph that `deepen` and `widen` made from this network's graph.

    Weights and running statistics are copied by name. Units appended to an edge begin with a second batch norm of
    weight 0 where their skip connection is the identity, so they change nothing at first; elsewhere that would leave
    them without a gradient, and they begin as the units of new edges do.

    Args:
        network: left as it is.
        graph: what to grow into.
        seed: decides the new weights, as in `StudentNetwork`.

    Raises:
        ValueError: the graph does not continue that of the network.
    """
    before = network.graph
    same = (before.nodes == graph.nodes[:len(before.nodes)], before.classes == graph.classes, before.skip == graph.skip)
    if not all(same) or len(before.edges) > len(graph.edges):
        raise ValueError("graph: does not continue that of the network; expected one made from it by deepen and widen")
    larger = StudentNetwork(graph, seed)
    for old, new in zip(before.edges, graph.edges):
        if (old.source, old.target) != (new.source, new.target) or old.units > new.units:
            raise ValueError(f"graph: edge {new.id} does not continue that of the network; expected {old} with as many units "
                             f"or more, got {new}")
        for unit in larger.edges[str(old.id)][old.units:]:
            if unit.identity:
                nn.init.zeros_(unit.second.bn.weight)
    weight = network.classifier.weight
    larger.to(weight.device, weight.dtype).load_state_dict(network.state_dict(), strict=False)
    return larger.train(network.training)


def extract(network: StudentNetwork) -> fx.GraphModule:
    """A copy as plain PyTorch: a `torch.fx.GraphModule` of `torch.nn` modules, from images to logits, with the same
    state-dict keys. It shares nothing with the network."""
    return copy.deepcopy(plain(network))


def plain(network: StudentNetwork) -> fx.GraphModule:
    """What `extract` gives, sharing modules with the network: for folding and counting while it is trained."""
    trace = _Trace()
    maps = {INPUT: trace.graph.placeholder("x")}
    for node in _in_order(network.graph):
        branches = []
        for edge in network.graph.incoming(node.id):
            x, name = maps[edge.source], f"edges.{edge.id}"
            if edge.id in network.resized:
                x = trace.call(f"{name}.pool", nn.AdaptiveAvgPool2d(network.resized[edge.id]), x)
            for position, unit in enumerate(network.edges[str(edge.id)]):
                x = trace.unit(f"{name}.{position}", unit, x)
            branches.append(x)
        maps[node.id] = trace.sum(branches)
    x = trace.call("pool", nn.AdaptiveAvgPool2d(1), maps[FINAL])
    x = trace.graph.call_function(torch.flatten, (x, 1))
    trace.graph.output(trace.call("classifier", network.classifier, x))
    return graph_module(trace.modules, trace.graph).train(network.training)


class _Trace:
    """The calls and modules of a student written down as a `torch.fx` graph."""

    def __init__(self):
        self.graph = fx.Graph()
        self.modules: dict[str, nn.Module] = {}

    def call(self, name: str, module: nn.Module, x: fx.Node) -> fx.Node:
        self.modules[name] = module
        return self.graph.call_module(name, (x,))

    def sum(self, maps: list[fx.Node]) -> fx.Node:
        return functools.reduce(lambda x, y: self.graph.call_function(operator.add, (x, y)), maps)

    def unit(self, name: str, unit: ResidualSeparableUnit, x: fx.Node) -> fx.Node:
        if unit.pool > 1:
            x = self.call(f"{name}.pool", nn.AvgPool2d(unit.pool, ceil_mode=True), x)
        y = self._relu(self._separable(f"{name}.first", unit.first, x))
        y = self._separable(f"{name}.second", unit.second, y)
        if not unit.identity:
            if unit.stride > 1:
                x = self.call(f"{name}.skip.pool", nn.AvgPool2d(unit.stride, ceil_mode=True), x)
            for part in ("pointwise", "bn"):
                x = self.call(f"{name}.skip.{part}", unit.skip[part], x)
        return self._relu(self.sum([y, x]))

    def _separable(self, name: str, module: SeparableConvBNReLU, x: fx.Node) -> fx.Node:
        for part in ("depthwise", "pointwise", "bn"):
            x = self.call(f"{name}.{part}", getattr(module, part), x)
        return x

    def _relu(self, x: fx.Node) -> fx.Node:
        return self.graph.call_function(nn.functional.relu, (x,))


def _in_order(graph: StudentGraph) -> list[Node]:
    """Supervised nodes so that each comes after all that lead to it."""
    return sorted(graph.supervised, key=lambda node: (node.q, node.id))


@contextmanager
def _drawing(*key: int | str) -> Iterator[None]:
    """Draw from the CPU's global generator as the key says, and leave it as it was."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little"))
        yield
