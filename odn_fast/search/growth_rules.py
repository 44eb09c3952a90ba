"""The rules of growth as functions of plain data: which node has most to gain, which of its edges is split, and how.

SEArch, sections 3.3 and 3.4. Nothing here trains or holds a tensor. Where the paper leaves a choice open, the choice made
is said where it is made.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..models.student_graph import Count, Edge, Node, StudentGraph, count, deepen, widen

FULL = 7  # B_op: units of an edge that is not deepened any more
APPENDED = 3  # units that a deepening appends, where there is room and budget
ENOUGH = 0.98  # of the budget: growth ends there
ONE_SIDED, ENOUGH_SPLITS = 0.5, 8  # share of that many splits or more above which one node's is worth a warning


@dataclass(frozen=True)
class Limits:
    """What a student may cost at most.

    Attributes:
        unit: "params" or "flops", what `budget` is counted in.
        budget: upper bound, reached as far as possible.
        max_flops: a further bound, in FLOPs, or None.
    """

    unit: str
    budget: int
    max_flops: int | None = None

    def allow(self, cost: Count) -> bool:
        return getattr(cost, self.unit) <= self.budget and (self.max_flops is None or cost.flops <= self.max_flops)

    def reached(self, cost: Count) -> bool:
        return getattr(cost, self.unit) >= ENOUGH * self.budget

    def to_dict(self) -> dict:
        """For events and manifests."""
        return {"budget": self.budget, "budget_unit": self.unit, "max_flops": self.max_flops}

    def __str__(self) -> str:
        if self.unit == "flops":
            return f"{self.budget / 1e6:.2f} M FLOPs"
        return f"{self.budget:,} parameters" + (f" and {self.max_flops / 1e6:.2f} M FLOPs" if self.max_flops else "")


@dataclass(frozen=True)
class Split:
    """One growth step.

    Attributes:
        kind: "deepen" (units appended to an edge) or "widen" (a new node beside a full edge).
        node, edge: numbers of the node v_j with most to gain and of its edge that is split.
        units: appended units of a deepening; q: the teacher's map of a widening's new node.
        graph: the graph after the split.
        skipped: why choices that came before this one were passed over, one line each.
    """

    kind: str
    node: int
    edge: int
    graph: StudentGraph
    units: int | None = None
    q: int | None = None
    skipped: tuple[str, ...] = ()

    def to_dict(self) -> dict:
        """For events and checkpoints; the graph stands elsewhere."""
        change = {"units": self.units} if self.kind == "deepen" else {"new_node": self.graph.nodes[-1].id, "q": self.q}
        return {"kind": self.kind, "node": self.node, "edge": self.edge, **change, "skipped": list(self.skipped)}


def alpha(epoch: int, epochs: int) -> float:
    """Weight of the inner loss in epoch 0, 1, ... of a stage: half a cosine from 1 towards 0, anew in every stage."""
    return 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def modification_value(graph: StudentGraph, node_id: int, inner_loss: float) -> float:
    """S(v_j) = deg+ / deg- * R (Eq. 3); the classifier is the final node's one successor."""
    return graph.out_degree(node_id) / graph.in_degree(node_id) * inner_loss


def in_order(graph: StudentGraph, scores: dict[int, float]) -> list[Node]:
    """The supervised nodes, most to gain first; equals by smaller q, then the older. Raises ValueError on NaN."""
    for node in graph.supervised:
        if not math.isfinite(scores[node.id]):
            raise ValueError(f"node {node.id}: its score is {scores[node.id]}, expected a finite number")
    return sorted(graph.supervised, key=lambda node: (-scores[node.id], node.q, node.id))


def by_closeness(graph: StudentGraph, node_id: int) -> list[Edge]:
    """The edges into a node, from the closest precursor (largest q; of equals the newer) on."""
    return sorted(graph.incoming(node_id), key=lambda edge: (-graph.node(edge.source).q, -edge.source))


def place_between(q_before: int, q_after: int, c: float) -> int:
    """q of a new node between two others: floor(c q_i + (1 - c) q_j), kept off both of them.

    The larger c, the nearer to the precursor. (So says the paper's formula, and so its figures for c = 0.25 and 0.75; its
    words say the opposite.) Expects q_after - q_before >= 2.
    """
    q = math.floor(c * q_before + (1 - c) * q_after + 1e-9)  # 0.7 * 10 + 0.3 * 20 is 12.999...
    return min(max(q, q_before + 1), q_after - 1)


def choose_split(graph: StudentGraph, scores: dict[int, float], map_shapes: Sequence[tuple[int, int, int]], limits: Limits,
                 c: float = 0.5, width: float = 1.0) -> Split | None:
    """The next split, or None where none is possible, whatever the scores.

    The node with most to gain gets it, on the edge from its closest precursor: units are appended while the edge has
    fewer than `FULL`, else a node is put beside it. A full edge without room passes it on to the node's next-closest
    precursor, and a node without any, or whose split does not fit the limits even when trimmed, to the next node.

    Args:
        scores: by node number, the larger the more to gain; finite.
        map_shapes: (channels, height, width) of the teacher's maps v_1..v_m.
        c, width: where a new node goes (see `place_between`), and its channels over its teacher's.
    """
    skipped: list[str] = []
    for node in in_order(graph, scores):
        edge = _open_edge(graph, node, c, skipped)
        if edge is None:
            continue
        split = _fitted(graph, edge, map_shapes, limits, c, width)
        if split is not None:
            return replace(split, skipped=tuple(skipped))
        skipped.append(f"node {node.id}: a split of edge {edge.id} does not fit the budget")
    return None


def _open_edge(graph: StudentGraph, node: Node, c: float, skipped: list[str]) -> Edge | None:
    """The edge from the closest precursor that has room; says in `skipped` which ones have none."""
    for edge in by_closeness(graph, node.id):
        if edge.units < FULL or _new_q(graph, edge, c) is not None:
            return edge
        skipped.append(f"node {node.id}: edge {edge.id} is full, and there is no room beside it")
    return None


def _new_q(graph: StudentGraph, edge: Edge, c: float) -> int | None:
    """q of a new node beside an edge, or None: a teacher's map supervises one node only, and never the image's place."""
    before, after = graph.node(edge.source).q, graph.node(edge.target).q
    if after - before < 2:
        return None
    q = place_between(before, after, c)
    return None if any(node.q == q for node in graph.nodes) else q


def _fitted(graph: StudentGraph, edge: Edge, map_shapes: Sequence[tuple[int, int, int]], limits: Limits, c: float,
            width: float) -> Split | None:
    """The split of an open edge, trimmed to what the limits allow, or None."""
    if edge.units < FULL:
        for units in range(min(APPENDED, FULL - edge.units), 0, -1):
            deeper = deepen(graph, edge.id, units)
            if limits.allow(count(deeper)):
                return Split("deepen", edge.target, edge.id, deeper, units=units)
        return None
    q = _new_q(graph, edge, c)
    wider = widen(graph, edge.id, q, map_shapes[q - 1], width)
    return Split("widen", edge.target, edge.id, wider, q=q) if limits.allow(count(wider)) else None


def can_grow(graph: StudentGraph, map_shapes: Sequence[tuple[int, int, int]], limits: Limits, c: float = 0.5,
             width: float = 1.0) -> bool:
    """Whether another stage makes sense: the budget is not reached yet, and some split fits."""
    even = {node.id: 0.0 for node in graph.supervised}
    return not limits.reached(count(graph)) and choose_split(graph, even, map_shapes, limits, c, width) is not None


def shares(nodes: Sequence[int]) -> dict[int, float]:
    """Every node's share of all splits; nodes: whose split each was."""
    return {node: splits / len(nodes) for node, splits in sorted(Counter(nodes).items())}


def one_sided(nodes: Sequence[int]) -> int | None:
    """The node that took more than half of the splits, or None; the first three splits have no choice and count for little."""
    part = shares(nodes)
    return next((node for node in part if len(nodes) >= ENOUGH_SPLITS and part[node] > ONE_SIDED), None)
