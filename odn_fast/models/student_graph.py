"""The student of SEArch as plain data: nodes that are feature maps, edges that are stacks of units, and what it costs.

A graph says what a network is made of and holds no weights; `student_network` builds and grows the network. Every
function returns a new graph. Edges and nodes keep their numbers for life, so weights are inherited by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import ceil, prod

INPUT, FINAL = 0, 1
SKIPS = ("auto", "always")
_LARGEST = 2**24  # of any number in a graph: a network beyond it is a mistake


@dataclass(frozen=True)
class Node:
    """A feature map (channels, height, width), supervised by the teacher's map number q.

    Node 0 is the input (q = 0, unsupervised), node 1 the final node (q = m, the teacher's last map); later nodes are
    numbered as they come.
    """

    id: int
    q: int
    channels: int
    height: int
    width: int


@dataclass(frozen=True)
class Edge:
    """A stack of `units` residual separable units, from node `source` to node `target`."""

    id: int
    source: int
    target: int
    units: int


@dataclass(frozen=True)
class StudentGraph:
    """Nodes and edges of a student, checked when it is made.

    Args:
        nodes, edges: in the order of their numbers.
        classes: logits of the classifier behind the final node.
        skip: "auto" for the identity where the shape holds, "always" for a 1x1 convolution on every skip connection.

    Raises:
        ValueError: the graph is none that growth can make; the message says where.
    """

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    classes: int
    skip: str = "auto"

    def __post_init__(self):
        _check(self)

    def node(self, node_id: int) -> Node:
        return _numbered(self.nodes, node_id, "node")

    def edge(self, edge_id: int) -> Edge:
        return _numbered(self.edges, edge_id, "edge")

    def incoming(self, node_id: int) -> tuple[Edge, ...]:
        """The edges into a node, older first."""
        return tuple(edge for edge in self.edges if edge.target == node_id)

    def outgoing(self, node_id: int) -> tuple[Edge, ...]:
        """The edges out of a node, older first."""
        return tuple(edge for edge in self.edges if edge.source == node_id)

    @property
    def supervised(self) -> tuple[Node, ...]:
        """Every node but the input, older first."""
        return self.nodes[1:]

    def in_degree(self, node_id: int) -> int:
        """Number of incoming edges; the units inside an edge do not count."""
        return len(self.incoming(node_id))

    def out_degree(self, node_id: int) -> int:
        """Number of outgoing edges; 1 at the final node, for the classifier."""
        return 1 if node_id == FINAL else len(self.outgoing(node_id))

    def to_dict(self) -> dict:
        """The graph as plain data, for JSON."""
        return {"nodes": [asdict(node) for node in self.nodes], "edges": [asdict(edge) for edge in self.edges],
                "classes": self.classes, "skip": self.skip}

    @classmethod
    def from_dict(cls, values: dict) -> StudentGraph:
        """The inverse of `to_dict`. Raises ValueError for anything else."""
        values = _entries(values, {entry.name for entry in fields(cls)}, "student graph")
        nodes = tuple(_made(Node, entry, position) for position, entry in enumerate(_listed(values["nodes"], "nodes")))
        edges = tuple(_made(Edge, entry, position) for position, entry in enumerate(_listed(values["edges"], "edges")))
        return cls(nodes, edges, values["classes"], values["skip"])


@dataclass(frozen=True)
class Count:
    """What a student costs for one image.

    Attributes:
        params: number of parameters.
        flops: multiply-adds of convolutions and linear layers + 2 per batch-norm output element, as SEArch counts.
    """

    params: int
    flops: int

    def __add__(self, other: Count) -> Count:
        return Count(self.params + other.params, self.flops + other.flops)


@dataclass(frozen=True)
class UnitShape:
    """What one unit of an edge is made from, and the sizes of what it computes.

    Attributes:
        in_channels, out_channels, stride: as `odn_fast.nn.ResidualSeparableUnit` takes them.
        pooled: the size to which an adaptive average pool brings the map before the unit, or None for no pool.
        identity: whether the skip connection is the identity.
        between, size: (height, width) after the first and the second separable convolution.
    """

    in_channels: int
    out_channels: int
    stride: int
    pooled: tuple[int, int] | None
    identity: bool
    between: tuple[int, int]
    size: tuple[int, int]


def initial_graph(input_shape: tuple[int, int, int], map_shapes: Sequence[tuple[int, int, int]], classes: int,
                  width: float = 1.0, skip: str = "auto") -> StudentGraph:
    """The student a search starts from: input and final node, one edge of one unit.

    Args:
        input_shape: (channels, height, width) of the images.
        map_shapes: the same of the teacher's maps v_1..v_m, in order.
        classes: logits of the classifier.
        width: a node's channels over those of its teacher's map.
        skip: as in `StudentGraph`.

    Raises:
        ValueError: no map, a map larger than one before it, or a shape, count, width or skip out of range.
    """
    if not map_shapes or any(len(shape) != 3 for shape in (input_shape, *map_shapes)):
        raise ValueError(f"input_shape, map_shapes: expected (channels, height, width), of at least one map, got {input_shape} "
                         f"and {list(map_shapes)}")
    before, name = tuple(input_shape), "the input"
    for number, shape in enumerate(map_shapes, 1):
        if shape[1] > before[1] or shape[2] > before[2]:
            raise ValueError(f"map_shapes: map {number} has size {_size(shape)}, larger than {_size(before)} of {name}; "
                             "a teacher's maps may not grow along the path")
        before, name = shape, f"map {number}"
    final = _node(FINAL, len(map_shapes), map_shapes[-1], width)
    return StudentGraph((Node(INPUT, 0, *input_shape), final), (Edge(0, INPUT, FINAL, 1),), classes, skip)


def deepen(graph: StudentGraph, edge_id: int, units: int) -> StudentGraph:
    """The graph with `units` more units at the end of an edge. Raises ValueError for an unknown edge or units below 1."""
    _check_number("units", units)
    edge = graph.edge(edge_id)
    deeper = replace(edge, units=edge.units + units)
    return replace(graph, edges=tuple(deeper if each.id == edge_id else each for each in graph.edges))


def widen(graph: StudentGraph, edge_id: int, q: int, map_shape: tuple[int, int, int], width: float = 1.0) -> StudentGraph:
    """The graph with a new branch beside an edge (i, j): a new node k, edges (i, k) and (k, j) of one unit each.

    Args:
        graph, edge_id: the edge (i, j), which stays as it is.
        q: the teacher's map that supervises k, between those of i and j and different from both.
        map_shape: its (channels, height, width).
        width: as in `initial_graph`.

    Raises:
        ValueError: an unknown edge, or a q or shape that does not lie between those of i and j.
    """
    beside = graph.edge(edge_id)
    node = _node(len(graph.nodes), q, map_shape, width)
    first = len(graph.edges)
    edges = Edge(first, beside.source, node.id, 1), Edge(first + 1, node.id, beside.target, 1)
    return replace(graph, nodes=(*graph.nodes, node), edges=(*graph.edges, *edges))


def count(graph: StudentGraph) -> Count:
    """Parameters and FLOPs of the network that the graph describes, exactly, without building it."""
    final = graph.node(FINAL)
    total = Count((final.channels + 1) * graph.classes, final.channels * graph.classes)
    for edge in graph.edges:
        for shape, times in Counter(unit_shapes(graph, edge)).items():
            unit = _unit_count(shape)
            total += Count(times * unit.params, times * unit.flops)
    return total


def unit_shapes(graph: StudentGraph, edge: Edge) -> Iterator[UnitShape]:
    """The units of an edge in order. Only the first changes the shape: by a stride where sizes, rounded up, are a power
    of two apart, by an adaptive average pool before it elsewhere."""
    source, target = graph.node(edge.source), graph.node(edge.target)
    given, size = (source.height, source.width), (target.height, target.width)
    stride = next((stride for stride in (2**power for power in range(max(given).bit_length() + 1))
                   if _reduced(given, stride) == size), None)
    pooled, stride = (None, stride) if stride else (size, 1)
    between = _reduced(given, stride // 2) if stride > 2 else size
    identity = graph.skip == "auto" and stride == 1 and source.channels == target.channels
    yield UnitShape(source.channels, target.channels, stride, pooled, identity, between, size)
    for _ in range(edge.units - 1):
        yield UnitShape(target.channels, target.channels, 1, None, graph.skip == "auto", size, size)


def _unit_count(unit: UnitShape) -> Count:
    c_in, c_out, between, size = unit.in_channels, unit.out_channels, prod(unit.between), prod(unit.size)
    # (parameters of convolutions, batch-norm channels, places where they are applied)
    parts = [(9 * c_in + c_in * c_out, c_out, between), (9 * c_out + c_out * c_out, c_out, size)]
    if not unit.identity:
        parts.append((c_in * c_out, c_out, size))
    return Count(sum(weights + 2 * norms for weights, norms, _ in parts),
                 sum((weights + 2 * norms) * places for weights, norms, places in parts))


def _reduced(size: tuple[int, int], stride: int) -> tuple[int, int]:
    return ceil(size[0] / stride), ceil(size[1] / stride)


def _node(node_id: int, q: int, map_shape: tuple[int, int, int], width: float) -> Node:
    """A node with its teacher's size and `width` of its teacher's channels."""
    if not (isinstance(width, (int, float)) and 0 < width < _LARGEST):
        raise ValueError(f"width: expected a number above 0, got {width!r}")
    channels, height, columns = map_shape
    return Node(node_id, q, max(1, round(channels * width)), height, columns)


def _numbered(items: tuple, number: int, name: str):
    if not 0 <= number < len(items):
        raise ValueError(f"{name}: expected 0 to {len(items) - 1}, got {number}")
    return items[number]


def _check(graph: StudentGraph):
    """Raise ValueError for a graph that growth cannot make."""
    for name, items in (("node", graph.nodes), ("edge", graph.edges)):
        for position, item in enumerate(items):
            for entry in fields(item):
                least = 0 if entry.name in ("id", "q", "source", "target") else 1
                _check_number(f"{name} {position}: {entry.name}", getattr(item, entry.name), least)
            if item.id != position:
                raise ValueError(f"{name} {position}: expected the number {position}, got {item.id}")
    _check_number("classes", graph.classes)
    if graph.skip not in SKIPS:
        raise ValueError(f"skip: expected one of {', '.join(SKIPS)}, got {graph.skip!r}")
    if len(graph.nodes) < 2 or graph.nodes[INPUT].q != 0:
        raise ValueError("nodes: expected the input as node 0, with q = 0, and the final node as node 1")
    for edge in graph.edges:
        _check_edge(graph, edge)
    if len({(edge.source, edge.target) for edge in graph.edges}) < len(graph.edges):
        raise ValueError("edges: expected one edge at most from a node to another")
    for node in graph.nodes:
        if node.id != INPUT and not graph.incoming(node.id) or node.id != FINAL and not graph.outgoing(node.id):
            raise ValueError(f"node {node.id}: does not lie on a path from the input to the final node")


def _check_edge(graph: StudentGraph, edge: Edge):
    source, target = graph.node(edge.source), graph.node(edge.target)
    if source.q >= target.q:
        raise ValueError(f"edge {edge.id}: leads from q = {source.q} to q = {target.q}; q must rise along an edge")
    if target.height > source.height or target.width > source.width:
        raise ValueError(f"edge {edge.id}: leads from size {source.height}x{source.width} to the larger size "
                         f"{target.height}x{target.width}")


def _check_number(name: str, value: object, least: int = 1):
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _LARGEST:
        raise ValueError(f"{name}: expected a whole number from {least}, got {value!r}")


def _made(kind: type, values: object, position: int):
    return kind(**_entries(values, {entry.name for entry in fields(kind)}, f"{kind.__name__.lower()} {position}"))


def _entries(values: object, names: set[str], of: str) -> dict:
    if not isinstance(values, dict) or set(values) != names:
        raise ValueError(f"{of}: expected the entries {', '.join(sorted(names))}, got {values!r:.80}")
    return values


def _listed(values: object, name: str) -> list:
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"{name}: expected a list, got {values!r:.80}")
    return list(values)


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]}x{shape[2]}"
