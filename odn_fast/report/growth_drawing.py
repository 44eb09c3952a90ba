"""Student graphs of SEArch as drawings: nodes from left to right by depth q, under a line of the teacher's maps.

Edges are arcs below the nodes. A split puts a node between two others, so arcs nest and do not cross; every arc lies
deeper than those inside it.
"""

from collections.abc import Sequence
from itertools import groupby, pairwise

from matplotlib.axes import Axes
from matplotlib.path import Path
from matplotlib.patches import PathPatch

from ..models.student_graph import Edge, StudentGraph
from .plots import BEHIND, BLUE, GREY, INK, PALE

TEACHER = 1.15  # height of the teacher's line above the nodes; a level of arcs has height 1


def levels(graph: StudentGraph) -> dict[int, int]:
    """By edge number, how many levels below the nodes its arc lies: from 1, deeper than every arc that it overlaps."""
    placed: dict[int, int] = {}
    ends = {edge.id: (graph.node(edge.source).q, graph.node(edge.target).q) for edge in graph.edges}
    for edge in sorted(graph.edges, key=lambda edge: (ends[edge.id][1] - ends[edge.id][0], edge.id)):
        first, last = ends[edge.id]
        placed[edge.id] = 1 + max((level for other, level in placed.items()
                                   if ends[other][0] < last and first < ends[other][1]), default=0)
    return placed


def changed(before: StudentGraph | None, after: StudentGraph) -> set[int]:
    """Numbers of the edges that are new, or have more units than before."""
    units = {edge.id: edge.units for edge in before.edges} if before else {edge.id: edge.units for edge in after.edges}
    return {edge.id for edge in after.edges if units.get(edge.id) != edge.units}


def draw_graph(axes: Axes, graph: StudentGraph, maps: Sequence[Sequence[int]], depth: int, before: StudentGraph | None = None,
               large: bool = True):
    """Draw a graph; what `before` has not is blue.

    Args:
        maps: (channels, height, width) of the teacher's maps v_1..v_m.
        depth: levels of arcs that the drawing has room for.
        large: with numbers of maps and nodes; a small drawing leaves out what cannot be read.
    """
    last = len(maps)
    axes.set_axis_off()
    axes.set_xlim(-0.035 * last, 1.035 * last)
    axes.set_ylim(-depth - 0.5, TEACHER + (1.5 if large else 0.5))
    _draw_teacher(axes, graph, maps, large)
    fresh, at = changed(before, graph), levels(graph)
    places = sorted(node.q for node in graph.nodes)
    slant = min(0.35 * min(after - first for first, after in pairwise(places)), 0.05 * last)
    for edge in graph.edges:
        _draw_edge(axes, graph, edge, at[edge.id], slant, BLUE if edge.id in fresh else INK, last, large)
    known = {node.id for node in before.nodes} if before else {node.id for node in graph.nodes}
    for node in graph.nodes:
        colour = GREY if node.q == 0 else INK if node.id in known else BLUE
        axes.plot(node.q, 0, "o", color=colour, ms=11.5 if large else 4.5, zorder=5)
        if large:
            axes.text(node.q, 0, str(node.id), color="white", ha="center", va="center_baseline", fontsize=7.5, zorder=6)


def _draw_teacher(axes: Axes, graph: StudentGraph, maps: Sequence[Sequence[int]], large: bool):
    last = len(maps)
    axes.plot([0.3, last], [TEACHER, TEACHER], color=PALE, lw=1, zorder=1)
    supervised = {node.q for node in graph.supervised}
    for q in supervised:
        axes.plot([q, q], [0, TEACHER], color=GREY, ls=":", lw=1 if large else 0.7, zorder=1)
    if not large:
        axes.plot(sorted(supervised), [TEACHER] * len(supervised), "o", color=GREY, ms=2.5)
        return
    axes.plot(range(1, last + 1), [TEACHER] * last, "o", color=PALE, ms=5, zorder=2)
    axes.plot(sorted(supervised), [TEACHER] * len(supervised), "o", color=GREY, ms=6, zorder=3)
    shown: list[int] = []
    for q in sorted(range(1, last + 1), key=lambda q: (q not in supervised, q not in (1, last), q)):
        if all(abs(q - other) > 0.02 * last for other in shown):
            shown.append(q)
            axes.text(q, TEACHER + 0.3, str(q), ha="center", va="bottom", fontsize=8, color=INK if q in supervised else GREY)
    first = 1
    for (channels, height, width), group in groupby(tuple(shape) for shape in maps):
        final = first + len(list(group)) - 1
        axes.axvspan(first - 0.5, final + 0.5, ymin=0, color="#f5f7fa", lw=0, zorder=0)
        axes.axvline(first - 0.5, color="white", lw=2, zorder=0)
        axes.text((first + final) / 2, TEACHER + 1.0, f"{channels} × {height}×{width}", ha="center", va="bottom", fontsize=8,
                  color=GREY)
        first = final + 1


def _draw_edge(axes: Axes, graph: StudentGraph, edge: Edge, level: int, slant: float, colour: str, last: int, large: bool):
    left, right = graph.node(edge.source).q, graph.node(edge.target).q
    turn = 0.25 / level  # of the slant: where the corner is rounded
    corner, foot = (left + slant, -level), (right - slant, -level)
    along = min(slant, (right - left - 2 * slant) / 2)
    points = [(left, 0), (left + (1 - turn) * slant, -level * (1 - turn)), corner, (corner[0] + along * 0.6, -level),
              (foot[0] - along * 0.6, -level), foot, (right - (1 - turn) * slant, -level * (1 - turn)), (right, 0)]
    codes = [Path.MOVETO, Path.LINETO, Path.CURVE3, Path.CURVE3, Path.LINETO, Path.CURVE3, Path.CURVE3, Path.LINETO]
    axes.add_patch(PathPatch(Path(points, codes), fill=False, edgecolor=colour, lw=(0.7 + 0.16 * edge.units) * (1 if large else 0.65),
                             zorder=4 if colour == BLUE else 3))
    if large or right - left >= 0.15 * last:
        axes.text((left + right) / 2, -level, f"×{edge.units}", ha="center", va="center", color=colour, zorder=4.5,
                  fontsize=8.5 if large else 6, bbox=BEHIND | {"boxstyle": "round,pad=0.08", "alpha": 1.0})
