"""The plots of a growth's report: graphs, accuracy on the way, limits, and the values that chose the splits."""

import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from matplotlib.transforms import ScaledTranslation

from ..models.student_graph import StudentGraph
from .growth_drawing import draw_graph, levels
from .plots import (
    BEHIND, BLUE, GREEN, GREY, INK, ORANGE, PALE, AccuracyScale, Part, draw_lines, interval, rendered, training_curves)

CONTROLS = {"labels": ORANGE, "logits": "#7a4fb5", "scratch": "#8a6d10"}  # the colour of each
_MARKS = {"labels": "s", "logits": "^", "scratch": "D"}


def final_graph(graph: StudentGraph, maps: Sequence[Sequence[int]]) -> str:
    """One graph, large."""
    depth = max(levels(graph).values())

    def draw(figure: Figure):
        draw_graph(figure.subplots(), graph, maps, depth)
    return rendered("graph", (8.4, 1.3 + 0.33 * (depth + 2)), "The student's graph under the teacher's maps", draw)


def graphs_on_the_way(graphs: Sequence[StudentGraph], titles: Sequence[str], maps: Sequence[Sequence[int]]) -> str:
    """Small drawings of graphs in order, what is new in each in blue."""
    columns = 3 if len(graphs) <= 6 else 4 if len(graphs) <= 16 else 5
    rows = [graphs[first:first + columns] for first in range(0, len(graphs), columns)]
    depths = [max(max(levels(graph).values()) for graph in row) for row in rows]

    def draw(figure: Figure):
        panels = figure.subplots(len(rows), columns, squeeze=False, height_ratios=[depth + 2.5 for depth in depths])
        for index, axes in enumerate(panels.ravel()):
            axes.set_axis_off()
            if index < len(graphs):
                before = graphs[index - 1] if index else None
                draw_graph(axes, graphs[index], maps, depths[index // columns], before, large=False)
                axes.set_title(titles[index], fontsize=7.5, color=INK, pad=2)
    height = sum(0.34 + 0.125 * (depth + 2) for depth in depths)
    return rendered("stages", (8.4, height), "The student's graph in every stage", draw)


def accuracy_plot(stages: Sequence[dict], grown: dict | None, controls: Sequence[dict], teacher: dict | None, images: int) -> str:
    """Validation accuracy against parameters.

    Args:
        stages: per stage: stage, params, validation_accuracy (percent or None).
        grown: params and validation_accuracy of the retrained student, or None.
        controls: name and validation_accuracy of networks of the same size.
        teacher: validation_accuracy, or None.
    """
    def draw(figure: Figure):
        axes = figure.subplots()
        scale = AccuracyScale(axes, images)
        seen = [stage for stage in stages if stage["validation_accuracy"] is not None]
        for stage in seen:
            _whisker(axes, scale, stage["params"], stage["validation_accuracy"], images, GREY)
        axes.plot([stage["params"] for stage in seen], [scale.at(stage["validation_accuracy"]) for stage in seen], "o-",
                  color=INK, ms=5, lw=1.2, label="after a stage")
        number_stages(axes, [(stage["stage"], stage["params"], scale.at(stage["validation_accuracy"])) for stage in seen],
                      [grown["params"]] if grown else [])
        if grown:
            _whisker(axes, scale, grown["params"], grown["validation_accuracy"], images, BLUE)
            axes.plot(grown["params"], scale.at(grown["validation_accuracy"]), "*", color=BLUE, ms=16, mec="white", mew=0.8,
                      zorder=8, label="grown and retrained")
        for place, control in enumerate(controls if grown else (), 1):
            beside = axes.transData + ScaledTranslation(place * 12 / 72, 0, figure.dpi_scale_trans)
            axes.plot(grown["params"], scale.at(control["validation_accuracy"]), _MARKS.get(control["name"], "X"), mfc="white",
                      mec=CONTROLS.get(control["name"], ORANGE), mew=1.6, ms=7, zorder=7, transform=beside, clip_on=False,
                      label=f"control: {control['name']}")
        if teacher and teacher["validation_accuracy"] is not None:
            _teacher_line(axes, scale, round(teacher["validation_accuracy"], 2))
        scale.finish()
        axes.set_xlabel("parameters")
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.set_xlim(0, 1.1 * max(entry["params"] for entry in (*seen, *([grown] if grown else ()))))
        axes.legend(loc="lower right", frameon=False, fontsize=9)
    return rendered("accuracy", (8.4, 4.2), "Validation accuracy against parameters, after every stage and at the end", draw)


def _teacher_line(axes, scale, accuracy):
    """A line at the teacher's accuracy; only a note where it lies so far above that all else would be squeezed below it."""
    low, high = min(scale.placed), max(scale.placed)
    if scale.height(accuracy) - high <= max(1.5 * (high - low), 0.5):
        draw_lines(axes, scale, [("teacher", accuracy, "--", "center")])
    else:
        axes.text(1.01, 1, f"teacher\n{accuracy:g} %,\nfar above", transform=axes.transAxes, va="top", color=GREEN, fontsize=9,
                  linespacing=0.95)


def _whisker(axes, scale, place, accuracy, images, colour):
    low, high = interval(accuracy, images)
    axes.vlines(place, scale.at(low), scale.at(high), color=colour, lw=1.2, alpha=0.5)


def number_stages(axes, stages: Sequence[tuple[int, float, float]], taken: Sequence[float]):
    """Numbers of stages above their points (number, x, y), as many as fit beside each other and beside the places `taken` (x)."""
    widest = max((x for _, x, _ in stages), default=1)
    places = list(taken)
    for number, x, y in [*stages[:1], *stages[:0:-1]]:
        if all(abs(x - other) > 0.028 * widest for other in places):
            places.append(x)
            axes.annotate(str(number), (x, y), (0, 6), textcoords="offset points", ha="center", color=GREY, fontsize=8.5, zorder=5,
                          bbox=BEHIND)


def limits_plot(stages: Sequence[dict], limits: Sequence[tuple[str, str, int, str]], finished: bool) -> str:
    """How much of its limits the student takes up.

    Args:
        stages: per stage: params, flops; and, if the run is finished, the same of the final graph.
        limits: (name, "params" or "flops", bound, "budget" or "cap") of each.
    """
    def draw(figure: Figure):
        axes = figure.subplots()
        where = range(1, len(stages) + 1)
        for (name, key, bound, _), colour in zip(limits, (BLUE, ORANGE)):
            axes.plot(where, [100 * stage[key] / bound for stage in stages], "o-", color=colour, ms=4, lw=1.4, label=name)
        axes.axhline(100, color=GREEN, lw=1.2, ls="--")
        axes.set_ylim(0, 1.05 * max(axes.get_ylim()[1], 100))
        axes.set_xlim(0.5, len(stages) + 0.5)
        axes.set_ylabel("% of the limit")
        axes.set_xlabel("stage; the last point is the graph that is retrained" if finished else "stage")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=14, min_n_ticks=1))
        axes.legend(loc="upper left", bbox_to_anchor=(0, 0.9), frameon=False, fontsize=9)
    return rendered("limits", (8.4, 2.9), "Parameters and FLOPs over their limits, stage by stage", draw)


def growth_curves(stages: Sequence[tuple[int, Sequence[dict], float | None]], retraining: Sequence[dict],
                  controls: dict[str, Sequence[dict]], images: int) -> str:
    """Accuracy and loss of the labels, over the epochs of stages and retraining end to end, controls beside them.

    Args:
        stages: (number, epoch events, validation accuracy at its end or None) of each.
        retraining: its epoch events.
        controls: epoch events by the control's name.
    """
    parts = [Part(f"stage {number}", str(number), _of_labels(epochs), drops=False) for number, epochs, _ in stages]
    if retraining:
        parts.append(Part("retraining", "retraining", _of_labels(retraining), colour=BLUE, shade="#e6eefb", weight=0, best=True))
    ends = accumulate(len(epochs) for _, epochs, _ in stages)
    points = [(end, accuracy) for end, (_, _, accuracy) in zip(ends, stages) if accuracy is not None]
    beside = [Part(f"control: {name}", name, epochs, colour=CONTROLS.get(name, ORANGE)) for name, epochs in controls.items()]
    return training_curves(parts, [], images, beside, points)


def _of_labels(epochs: Sequence[dict]) -> list[dict]:
    """Only the loss of the labels, which all the trainings have, as their last one."""
    return [epoch | {"losses": epoch["losses"][-1:]} for epoch in epochs]


def values_plot(stages: Sequence[dict], splits: Sequence[dict]) -> str:
    """What nodes were ranked by in every stage, over the stage's largest value, the split node marked.

    Args:
        stages: per stage: stage, nodes (node, q, S).
        splits: per split: stage, node, scores by node.
    """
    nodes = {node["node"]: node["q"] for stage in stages for node in stage["nodes"]}
    order = sorted(nodes, key=nodes.get)
    after = {split["stage"]: split for split in splits}

    def draw(figure: Figure):
        axes = figure.subplots()
        shares = np.full((len(order), len(stages)), np.nan)
        for column, stage in enumerate(stages):
            scores = after[stage["stage"]]["scores"] if stage["stage"] in after else {}
            values = {node["node"]: scores.get(str(node["node"]), node["S"]) for node in stage["nodes"]}
            for node, value in values.items():
                shares[order.index(node), column] = value / (max(values.values()) or 1.0)
        axes.imshow(shares, cmap=LinearSegmentedColormap.from_list("", ["#f1f4f9", BLUE]), vmin=0, vmax=1, aspect="auto",
                    interpolation="none")
        marked = [(column, order.index(after[stage["stage"]]["node"]))
                  for column, stage in enumerate(stages) if stage["stage"] in after]
        if marked:
            axes.plot(*zip(*marked), "o", mfc="white", mec=INK, ms=6, mew=1)
        axes.grid(False)
        axes.set_yticks(range(len(order)), [f"{node} (q = {nodes[node]})" for node in order], fontsize=8.5)
        step = max(1, math.ceil(len(stages) / 25))
        axes.set_xticks(range(0, len(stages), step), [str(stage["stage"]) for stage in stages[::step]], fontsize=8.5)
        axes.set_ylabel("node")
        axes.set_xlabel("stage")
        for side in axes.spines.values():
            side.set_color(PALE)
    return rendered("values", (8.4, 1.1 + 0.24 * max(len(order), 2)), "What nodes were ranked by, in every stage", draw)
