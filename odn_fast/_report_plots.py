"""The plots of the report: matplotlib drawings returned as SVG elements that can stand in one HTML page together.

Accuracies are drawn on a logarithmic scale of the error, labelled with the accuracy: 97, 99 and 99.5 % stay apart, and
a network at chance level still fits. Same input, same bytes: no dates, no random ids, no matplotlibrc of the user.
"""

import io
import math
import warnings
from collections.abc import Callable, Sequence
from itertools import groupby
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

INK, GREY, PALE, BLUE, ORANGE, RED = "#1d2433", "#6b7485", "#d9dee7", "#1f5fbf", "#c8640a", "#c0262d"
_STYLE = {
    "svg.fonttype": "none", "font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": "#aab2c0",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#eceff4",
    "xtick.color": "#4a5364", "ytick.color": "#4a5364", "text.parse_math": False, "figure.facecolor": "none",
    "axes.facecolor": "none", "axes.unicode_minus": False,
}
_ACCURACY_TICKS = (0, 20, 40, 50, 60, 70, 80, 85, 90, 93, 95, 97, 98, 99, 99.5, 99.7, 99.8, 99.9, 99.95, 99.98, 99.99)
_NUMBERED_CLASSES = 20


def wilson(correct: float, total: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of `correct` out of `total` (> 0), in percent."""
    z, share = 1.959964, correct / total
    centre = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 100 / (1 + z * z / total)
    return max(0.0, (centre - half) * scale), min(100.0, (centre + half) * scale)


def interval(accuracy: float, total: int) -> tuple[float, float]:
    """The 95 % Wilson interval of an accuracy in percent, read on `total` images."""
    return wilson(round(accuracy / 100 * total), total)


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
    return _rendered("size", (8.4, 5.8), "Validation accuracy and latency of every depth against its parameters", draw)


def learning_curves(epochs: Sequence[dict], found: int | None, target: float, needed: float, images: int) -> str:
    """Accuracy and training loss over all epochs end to end; `epochs` are the epoch events of a run in order."""
    def draw(figure: Figure):
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
        segments = [(key, list(group)) for key, group in
                    groupby(enumerate(epochs, 1), key=lambda item: (item[1]["phase"], item[1]["depth"]))]
        _draw_curves(top, segments, found, target, needed, images)
        _draw_losses(bottom, epochs)
        _mark_segments(top, bottom, segments, found)
    return _rendered("curves", (8.4, 5.8), "Learning curves over all epochs, depth changes marked", draw)


def confusion_plot(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Heat map of a confusion matrix, rows = true class; numbers and names only while they can be read."""
    counts = np.asarray(matrix, dtype=float)

    def draw(figure: Figure):
        axes = figure.subplots()
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        right = np.eye(len(counts), dtype=bool)
        for cells, colour, top in ((right, BLUE, 1.0), (~right, ORANGE, max(share[~right].max(initial=0.0), 0.1))):
            colours = LinearSegmentedColormap.from_list("", ["white", colour])
            axes.imshow(np.where(cells, share, np.nan), cmap=colours, vmin=0, vmax=top, interpolation="none")
        axes.grid(False)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        if len(counts) <= _NUMBERED_CLASSES:
            _number_cells(axes, counts, share, names)
    return _rendered("confusion", (5.6, 5.4), "Confusion matrix", draw)


def _draw_accuracies(axes, rows, found, baseline, target, needed, images):
    scale = _AccuracyScale(axes, images)
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
    _draw_target(axes, scale, target, needed)
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
                      color=BLUE if is_found else GREY, weight="bold" if is_found else "normal", zorder=7,
                      bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85})


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


def _draw_curves(axes, segments, found, target, needed, images):
    scale = _AccuracyScale(axes, images)
    dots = _dots(segments[-1][1][-1][0])
    for (phase, depth), items in segments:
        where = [index for index, _ in items]
        train = np.array([[scale.height(value) for value in epoch["train_accuracies"]] for _, epoch in items])
        axes.plot(where, train, ls=":", lw=1, color=GREY, alpha=0.8)
        seen = [(index, scale.at(epoch["validation_accuracy"])) for index, epoch in items
                if epoch["validation_accuracy"] is not None]
        colour = {"baseline": ORANGE}.get(phase, BLUE if depth == found else INK)
        if seen:  # what training reaches above the validation accuracy is cut off
            axes.plot(*zip(*seen), color=colour, lw=1.6, **dots)
        else:
            scale.placed.append(train.min())
        drops = [index for (_, before), (index, epoch) in zip(items, items[1:]) if epoch["lr"] < before["lr"]]
        if phase != "warm_up" and drops:
            axes.plot(drops, [0.0] * len(drops), "|", color=ORANGE, ms=8, mew=1.3 if dots else 0.5,
                      transform=axes.get_xaxis_transform())
    _mark_best(axes, scale, segments, found)
    _draw_target(axes, scale, target, needed)
    scale.finish()


def _dots(epochs: int) -> dict:
    """A dot for every epoch while there is room; a single epoch has no line."""
    return {"marker": "o", "ms": 3} if epochs <= 80 else {}


def _mark_best(axes, scale, segments, found):
    best = [(index, epoch["validation_accuracy"]) for (phase, depth), items in segments for index, epoch in items
            if depth == found and phase in ("search", "fine_tune") and epoch["improved"]
            and epoch["validation_accuracy"] is not None]
    if best:
        index, accuracy = best[-1]
        axes.plot(index, scale.at(accuracy), "*", color=BLUE, ms=15, mec="white", mew=0.8, zorder=8)
        side = "right" if index > segments[-1][1][-1][0] / 2 else "left"
        axes.annotate(f"best {accuracy:.2f} %", (index, scale.at(accuracy)), (0, 9), textcoords="offset points", ha=side,
                      color=BLUE, weight="bold", zorder=8,
                      bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85})


def _draw_losses(axes, epochs):
    """Training loss (mean over the exits in warm-up); epochs whose loss is not finite are crossed at the upper edge."""
    losses = np.array([np.mean(epoch["losses"]) for epoch in epochs], dtype=float)
    where = np.arange(1, len(losses) + 1)
    lost = ~np.isfinite(losses)
    starts = [index for index, (before, after) in enumerate(zip(epochs, epochs[1:]), 1)
              if before["depth"] != after["depth"] or before["phase"] != after["phase"] != "fine_tune"]
    for part in np.split(where, starts):
        axes.plot(part, np.where(lost, np.nan, losses)[part - 1], color=INK, lw=1.2, **_dots(len(epochs)))
    positive = losses[~lost & (losses > 0)]
    if positive.size:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if positive.max() < 50 * positive.min() else (1.0,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if lost.any():
        axes.plot(where[lost], np.ones(lost.sum()), "x", color=RED, ms=7, mew=2, clip_on=False,
                  transform=axes.get_xaxis_transform())
    axes.set_ylabel("training loss")
    axes.set_xlabel("epochs, end to end")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
    axes.set_xlim(0.5, len(epochs) + 0.5)


def _mark_segments(top, bottom, segments, found):
    """Shades and vertical lines where the phase or the depth changes, and as many labels as fit, the found depth's first."""
    shades, total = {"warm_up": "#f1f3f7", "fine_tune": "#e6eefb", "baseline": "#fdf1e4"}, segments[-1][1][-1][0]
    spans = [(phase, depth, items[0][0] - 0.5, items[-1][0] + 0.5) for (phase, depth), items in segments]
    for phase, _, first, last in spans:
        for axes in (top, bottom):
            axes.axvspan(first, last, color=shades.get(phase, "none"), lw=0, zorder=0)
            axes.axvline(first, color="#aab2c0", lw=0.8, zorder=1)
    taken: list[tuple[float, float]] = []
    for phase, depth, first, last in sorted(spans, key=lambda span: (span[0] == "warm_up", span[1] != found, span[2])):
        number = str(depth) if len(spans) > 8 else f"depth {depth}"
        text = {"warm_up": "warm-up", "fine_tune": "fine-tuning", "baseline": "baseline"}.get(phase, number)
        half, middle = 0.0054 * len(text) + 0.002, (first + last - 1) / 2 / total
        if all(abs(middle - other) > half + width for other, width in taken):
            taken.append((middle, half))
            top.text(middle, 1.02, text, transform=top.transAxes, ha="center", va="bottom", 
                     color=BLUE if depth == found and phase != "warm_up" else GREY)


def _draw_target(axes, scale, target, needed):
    lines = [(needed, "--", "pass line", "top")]
    if target != needed:
        lines.append((target, ":", "target", "bottom"))
    for accuracy, style, text, side in lines:
        axes.axhline(scale.at(accuracy), ls=style, color="#2d7d46", lw=1.2, zorder=2)
        axes.text(1.01, scale.at(accuracy), f"{text}\n{accuracy:g} %", transform=axes.get_yaxis_transform(), va=side,
                  color="#2d7d46", fontsize=9, linespacing=0.95)


def _number_cells(axes, counts, share, names):
    shown = [name if len(name) <= 14 else name[:13] + "…" for name in names]
    axes.set_xticks(range(len(shown)), shown, rotation=0 if max(map(len, shown)) <= 3 else 45,
                    ha="center" if max(map(len, shown)) <= 3 else "right", rotation_mode="anchor")
    axes.set_yticks(range(len(shown)), shown)
    axes.tick_params(length=0)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            dark = row == column and share[row, column] > 0.5
            axes.text(column, row, f"{count:.0f}", ha="center", va="center", color="white" if dark else INK,
                      fontsize=10 if len(counts) <= 12 else 7)


class _AccuracyScale:
    """A logarithmic scale of the error 100 - accuracy, labelled with accuracies; remembers what was placed on it."""

    def __init__(self, axes, images: int):
        self.axes = axes
        self.smallest_error = 50 / images  # half an image stands for none
        self.placed: list[float] = []

    def height(self, accuracy: float) -> float:
        return -math.log10(max(100 - accuracy, self.smallest_error))

    def at(self, accuracy: float) -> float:
        """The height, which the limits will include."""
        self.placed.append(self.height(accuracy))
        return self.placed[-1]

    def finish(self):
        """Set limits around everything placed, and ticks that do not crowd."""
        low, high = min(self.placed), max(self.placed)
        margin = 0.07 * (high - low) or 0.1
        low, high = low - margin, high + 1.6 * margin
        candidates = [(-math.log10(self.smallest_error), "100")]
        candidates += [(-math.log10(100 - tick), f"{tick:g}") for tick in reversed(_ACCURACY_TICKS)]
        ticks: list[tuple[float, str]] = []
        for height, text in candidates:
            if low <= height <= high and (not ticks or ticks[-1][0] - height > 0.055 * (high - low)):
                ticks.append((height, text))
        self.axes.set_ylim(low, high)
        self.axes.set_yticks([height for height, _ in ticks], [text for _, text in ticks])
        self.axes.set_ylabel("accuracy (%)")


def _rendered(name: str, size: tuple[float, float], label: str, draw: Callable[[Figure], None]) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the reader's browser has the letters
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE | {"svg.hashsalt": name})
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _inline(buffer.getvalue(), name, label, widest=7 * size[0])


def _inline(document: str, name: str, label: str, widest: float) -> str:
    """An SVG document as an HTML element up to `widest` rem: no namespaces, metadata, style sheet; ids prefixed by `name`."""
    root = ElementTree.fromstring(document)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value.replace("url(#", f"url(#{name}-") for key, value in element.items()}
        if "id" in attributes:
            attributes["id"] = f"{name}-{attributes['id']}"
        if attributes.get("href", "").startswith("#"):
            attributes["href"] = f"#{name}-{attributes['href'][1:]}"
        element.attrib.clear()
        element.attrib.update(attributes)
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in ("metadata", "style")]:
            parent.remove(child)
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.attrib.update({"role": "img", "aria-label": label, "style": f"max-width: {widest:g}rem"})
    return ElementTree.tostring(root, encoding="unicode")
