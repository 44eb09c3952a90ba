"""Student graphs of SEArch as drawings: nodes from left to right by depth q, under a line of the teacher's maps.

Edges are arcs below the nodes. A split puts a node between two others, so arcs nest and do not cross; every arc lies
deeper than those inside it.
"""

from collections.abc import Sequence
from itertools import accumulate, groupby, pairwise

from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from ..models.student_graph import Edge, StudentGraph
from .plots import BEHIND, BLUE, GREY, INK, PALE

TEACHER = 1.15  # height of the teacher's line above the nodes; a level of arcs has height 1
_WEIGHTS = (0.5, 1.0, 1.6)  # of the way between two maps, neither, one or both of which teach a node


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


def places(graph: StudentGraph, last: int) -> list[float]:
    """Where depths q = 0..last stand, from 0 to 1: close together where there are no nodes, further apart where there are."""
    nodes = {node.q for node in graph.nodes}
    ways = list(accumulate((_WEIGHTS[(q in nodes) + (q + 1 in nodes)] for q in range(last)), initial=0.0))
    return [way / ways[-1] for way in ways]


def draw_graph(axes: Axes, graph: StudentGraph, maps: Sequence[Sequence[int]], depth: int, before: StudentGraph | None = None,
               large: bool = True):
    """Draw a graph; what `before` has not is blue.

    Args:
        maps: (channels, height, width) of the teacher's maps v_1..v_m.
        depth: levels of arcs that the drawing has room for.
        large: with numbers of maps and nodes; a small drawing leaves out what cannot be read, and has all depths equally far
            apart.
    """
    last = len(maps)
    place = places(graph, last) if large else [q / last for q in range(last + 1)]
    axes.set_axis_off()
    axes.set_xlim(-0.035, 1.035)
    axes.set_ylim(-depth - 0.5, TEACHER + (1.5 if large else 0.5))
    _draw_teacher(axes, graph, maps, place, large)
    fresh, at = changed(before, graph), levels(graph)
    gaps = (place[after] - place[first] for first, after in pairwise(sorted(node.q for node in graph.nodes)))
    slant = min(0.05, 0.35 * min(gaps))
    for edge in graph.edges:
        ends = place[graph.node(edge.source).q], place[graph.node(edge.target).q]
        _draw_edge(axes, edge, ends, at[edge.id], slant, BLUE if edge.id in fresh else INK, large)
    known = {node.id for node in before.nodes} if before else {node.id for node in graph.nodes}
    for node in graph.nodes:
        colour = GREY if node.q == 0 else INK if node.id in known else BLUE
        axes.plot(place[node.q], 0, "o", color=colour, ms=11.5 if large else 4.5 if last <= 30 else 3.5, zorder=5)
        if large:
            axes.text(place[node.q], 0, str(node.id), color="white", ha="center", va="center_baseline", fontsize=7.5, zorder=6)


def _draw_teacher(axes: Axes, graph: StudentGraph, maps: Sequence[Sequence[int]], place: Sequence[float], large: bool):
    last = len(maps)
    taught = sorted(node.q for node in graph.supervised)
    axes.plot([place[1], 1.0], [TEACHER, TEACHER], color=PALE, lw=1, zorder=1)
    for q in taught:
        axes.plot([place[q]] * 2, [0, TEACHER], color=GREY, ls=":", lw=1 if large else 0.7, zorder=1)
    axes.plot([place[q] for q in taught], [TEACHER] * len(taught), "o", color=GREY, ms=6 if large else 2.5, zorder=3)
    if not large:
        return
    axes.plot(place[1:], [TEACHER] * last, "o", color=PALE, ms=5 if last <= 30 else 3.5, zorder=2)
    shown: list[float] = []
    for q in sorted(range(1, last + 1), key=lambda q: (q not in taught, q not in (1, last), q)):
        if all(abs(place[q] - other) > 0.02 for other in shown):
            shown.append(place[q])
            axes.text(place[q], TEACHER + 0.3, str(q), ha="center", va="bottom", fontsize=8, color=INK if q in taught else GREY)
    edges = [(first + after) / 2 for first, after in pairwise(place)] + [1.0 + (place[-1] - place[-2]) / 2]  # between maps
    first = 0
    for (channels, height, width), group in groupby(tuple(shape) for shape in maps):
        final = first + len(list(group))
        axes.axvspan(edges[first], edges[final], color="#f5f7fa", lw=0, zorder=0)
        axes.axvline(edges[first], color="white", lw=2, zorder=0)
        axes.text((edges[first] + edges[final]) / 2, TEACHER + 1.0, f"{channels} × {height}×{width}", ha="center", va="bottom",
                  fontsize=8, color=GREY)
        first = final


def _draw_edge(axes: Axes, edge: Edge, ends: tuple[float, float], level: int, slant: float, colour: str, large: bool):
    """Down, along, and up again, with round corners."""
    left, right = ends
    turn = 0.25 / level  # of the slant: where the corner begins
    along = 0.6 * min(slant, (right - left - 2 * slant) / 2)
    points = [(left, 0), (left + (1 - turn) * slant, -level * (1 - turn)), (left + slant, -level), (left + slant + along, -level),
              (right - slant - along, -level), (right - slant, -level), (right - (1 - turn) * slant, -level * (1 - turn)), (right, 0)]
    codes = [Path.MOVETO, Path.LINETO, Path.CURVE3, Path.CURVE3, Path.LINETO, Path.CURVE3, Path.CURVE3, Path.LINETO]
    axes.add_patch(PathPatch(Path(points, codes), fill=False, edgecolor=colour, lw=(0.7 + 0.16 * edge.units) * (1 if large else 0.65),
                             zorder=4 if colour == BLUE else 3))
    if large or right - left >= 0.15:
        axes.text((left + right) / 2, -level, f"×{edge.units}", ha="center", va="center", color=colour, zorder=4.5,
                  fontsize=8.5 if large else 6, bbox=BEHIND | {"boxstyle": "round,pad=0.08", "alpha": 1.0})
