"""The plots of a depth search's report."""

import math
from collections.abc import Sequence
from itertools import groupby

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from .plots import (
    BEHIND, BLUE, GREY, INK, ORANGE, RED, AccuracyScale, Part, draw_lines, interval, rendered, training_curves)

_LABELS = {"warm_up": "warm-up", "fine_tune": "fine-tuning", "baseline": "baseline"}
_SHADES = {"warm_up": "#f1f3f7", "fine_tune": "#e6eefb", "baseline": "#fdf1e4"}


def size_plot(rows: Sequence[dict], found: int | None, baseline: dict | None, target: float, needed: float,
              images: int) -> str:
    """Validation accuracy and latency of every depth against its parameters.

    Args:
        rows: per depth: depth, params, validation_accuracy (percent or None), trained, outcome, latency_*_ms.
        found: the depth that was extracted, or None.
        baseline: full depth trained for comparison: depth and validation_accuracy; or None.
        target, needed: the target and the pass line, percent.
        images: size of the validation split, for the intervals.
    """
    if baseline:
        rows = [row | {"trained": True} if row["depth"] == baseline["depth"] else row for row in rows]

    def draw(figure: Figure):
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2.1, 1))
        _draw_accuracies(top, rows, found, baseline, target, needed, images)
        _draw_latencies(bottom, rows, found)
    return rendered("size", (8.4, 5.8), "Validation accuracy and latency of every depth against its parameters", draw)


def learning_curves(epochs: Sequence[dict], found: int | None, target: float, needed: float, images: int) -> str:
    """Accuracy and training loss over all epochs end to end; `epochs` are the epoch events of a run in order."""
    parts: list[Part] = []
    before = None
    for (phase, depth), group in groupby(epochs, key=lambda epoch: (epoch["phase"], epoch["depth"])):
        is_found = depth == found
        parts.append(Part(
            _LABELS.get(phase, f"depth {depth}"), _LABELS.get(phase, str(depth)), list(group),
            colour=ORANGE if phase == "baseline" else BLUE if is_found else INK, shade=_SHADES.get(phase, "none"),
            weight=2 if phase == "warm_up" else 0 if is_found else 1, joined=phase == "fine_tune" and depth == before,
            drops=phase != "warm_up", best=is_found and phase in ("search", "fine_tune")))
        before = depth
    return training_curves(parts, _target_lines(target, needed), images)


def _target_lines(target: float, needed: float) -> list[tuple[str, float, str, str]]:
    lines = [("pass line", needed, "--", "top")]
    return lines if target == needed else [*lines, ("target", target, ":", "bottom")]


def _draw_accuracies(axes, rows, found, baseline, target, needed, images):
    scale = AccuracyScale(axes, images)
    for row in rows:
        accuracy, is_found = row["validation_accuracy"], row["depth"] == found
        if row["outcome"] == "diverged":
            axes.plot(row["params"], scale.at(accuracy or 0), "x", color=RED, ms=8, mew=2, clip_on=False, zorder=7)
        if accuracy is not None:
            low, high = interval(accuracy, images)
            colour = BLUE if is_found else GREY
            axes.vlines(row["params"], scale.at(low), scale.at(high), color=colour, lw=1.2, alpha=0.6)
            axes.plot(row["params"], scale.at(accuracy), "o", color=colour, ms=11 if is_found else 7, zorder=6 if is_found else 4)
        elif not row["trained"]:
            axes.plot(row["params"], 0, marker="|", color=GREY, ms=10, transform=axes.get_xaxis_transform(), clip_on=False)
    if baseline:
        full = next(row for row in rows if row["depth"] == baseline["depth"])
        axes.plot(full["params"], scale.at(baseline["validation_accuracy"]), "s", color=ORANGE, ms=8, zorder=5)
        axes.annotate("baseline", (full["params"], scale.at(baseline["validation_accuracy"])), (-9, 0),
                      textcoords="offset points", ha="right", va="center", color=ORANGE)
    _label_depths(axes, rows, found, scale)
    draw_lines(axes, scale, _target_lines(target, needed))
    scale.finish()


def _label_depths(axes, rows, found, scale):
    """Depth numbers above the points, as many as fit; the found depth first."""
    largest = max(row["params"] for row in rows)
    spread = math.log(largest / min(row["params"] for row in rows)) or 1.0
    taken: list[tuple[bool, float, float]] = []
    for row in sorted(rows, key=lambda row: (row["depth"] != found, row["depth"])):
        drawn = row["validation_accuracy"] is not None or row["outcome"] == "diverged"
        place, half = math.log(row["params"]) / spread, 0.05 if row["depth"] == found else 0.013
        crowds = any(drawn == level and abs(place - other) < half + width for level, other, width in taken)
        if crowds or row["trained"] and not drawn:
            continue
        taken.append((drawn, place, half))
        point = (row["params"], scale.at(row["validation_accuracy"] or 0) if drawn else 0)
        is_found = row["depth"] == found
        offset, side = _beside(is_found, drawn, crowded=len(rows) > 12, at_edge=row["params"] == largest and len(rows) > 1)
        axes.annotate(f"depth {row['depth']}" if is_found else str(row["depth"]), point, offset,
                      xycoords="data" if drawn else axes.get_xaxis_transform(), textcoords="offset points",
                      ha=side,
                      color=BLUE if is_found else GREY, weight="bold" if is_found else "normal", zorder=7, bbox=BEHIND)


def _beside(is_found: bool, drawn: bool, crowded: bool, at_edge: bool) -> tuple[tuple[int, int], str]:
    """Where a depth's label stands: offset in points and alignment, clear of the error bar where there is room."""
    if not drawn or crowded and not is_found:
        return (0, 9 if drawn else 7), "center"
    distance = 9 if is_found else 5
    return ((-distance, 5), "right") if at_edge else ((distance, 5), "left")


def _draw_latencies(axes, rows, found):
    for row in rows:
        is_found = row["depth"] == found
        colour = BLUE if is_found else GREY
        axes.vlines(row["params"], row["latency_low_ms"], row["latency_high_ms"], color=colour, lw=1.2, alpha=0.6)
        axes.plot(row["params"], row["latency_ms"], "o", color=colour, ms=9 if is_found else 5,
                  mfc=colour if row["trained"] else "white")
    axes.set_ylim(0, 1.12 * max(row["latency_high_ms"] for row in rows))
    axes.set_ylabel("latency (ms)")
    axes.set_xlabel("parameters (logarithmic)")
    axes.set_xscale("log")
    params = [row["params"] for row in rows]
    axes.set_xlim(min(params) / 1.5, max(params) * 1.5)
    wide = max(params) / min(params) > 300
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.xaxis.set_minor_formatter(NullFormatter())
