"""The plots of the report: matplotlib drawings returned as SVG elements that can stand in one HTML page together.

Accuracies are drawn on a logarithmic scale of the error, labelled with the accuracy: 97, 99 and 99.5 % stay apart, and
a network at chance level still fits. Same input, same bytes: no dates, no random ids, no matplotlibrc of the user.
"""

import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

INK, GREY, PALE, BLUE, ORANGE, RED, GREEN = "#1d2433", "#6b7485", "#d9dee7", "#1f5fbf", "#c8640a", "#c0262d", "#2d7d46"
BEHIND = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}  # of a label over a drawing
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


@dataclass(frozen=True)
class Part:
    """Epochs of one training, drawn in a row.

    Attributes:
        label, short: what stands above it; the short one where there are many parts.
        epochs: epoch events, in order.
        colour, shade: of the line of its validation accuracy, and behind it.
        weight: labels of small weight are placed first; 0 is also blue.
        joined: its loss goes on from that of the part before.
        drops: mark where the learning rate drops. best: the best epoch of such parts gets a star.
    """

    label: str
    short: str
    epochs: Sequence[dict]
    colour: str = INK
    shade: str = "none"
    weight: int = 1
    joined: bool = False
    drops: bool = True
    best: bool = False


def training_curves(parts: Sequence[Part], lines: Sequence[tuple[str, float, str, str]], images: int,
                    beside: Sequence[Part] = (), points: Sequence[tuple[int, float]] = ()) -> str:
    """Accuracy and training loss over all epochs of `parts` end to end.

    Args:
        lines: see `draw_lines`.
        images: size of the validation split.
        beside: trainings whose validation accuracy is drawn from epoch 1 on, for comparison.
        points: (epoch, validation accuracy) read outside the epochs' own validation.
    """
    def draw(figure: Figure):
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
        ends = list(accumulate(len(part.epochs) for part in parts))
        spans = [(part, end - len(part.epochs) + 1, end) for part, end in zip(parts, ends)]
        _draw_curves(top, spans, lines, images, beside, points)
        _draw_losses(bottom, spans)
        bottom.set_xlabel("epochs, end to end")
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
        bottom.set_xlim(0.5, max(ends[-1], *(len(part.epochs) for part in beside), 0) + 0.5)
        _mark_spans(top, bottom, spans)
    return rendered("curves", (8.4, 5.8), "Learning curves over all epochs, changes of what is trained marked", draw)


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
    return rendered("confusion", (5.6, 5.4), "Confusion matrix", draw)


def _draw_curves(axes, spans, lines, images, beside, points):
    scale = AccuracyScale(axes, images)
    total = spans[-1][2]
    for part, first, last in spans:
        where = list(range(first, last + 1))
        train = np.array([[scale.height(value) for value in epoch["train_accuracies"]] for epoch in part.epochs])
        axes.plot(where, train, ls=":", lw=1, color=GREY, alpha=0.8)
        seen = [(index, scale.at(epoch["validation_accuracy"])) for index, epoch in zip(where, part.epochs)
                if epoch["validation_accuracy"] is not None]
        if seen:  # what training reaches above the validation accuracy is cut off
            axes.plot(*zip(*seen), color=part.colour, lw=1.6, **_dots(total))
        else:
            scale.placed.append(train.min())
        drops = [index for index, before, epoch in zip(where[1:], part.epochs, part.epochs[1:]) if epoch["lr"] < before["lr"]]
        if part.drops and drops:
            axes.plot(drops, [0.0] * len(drops), "|", color=ORANGE, ms=8, mew=1.3 if _dots(total) else 0.5,
                      transform=axes.get_xaxis_transform())
    for part in beside:
        seen = [(index, scale.at(epoch["validation_accuracy"])) for index, epoch in enumerate(part.epochs, 1)
                if epoch["validation_accuracy"] is not None]
        if seen:
            axes.plot(*zip(*seen), color=part.colour, lw=1.1, label=part.label)
    if points:
        axes.plot([place for place, _ in points], [scale.at(accuracy) for _, accuracy in points], "o-", color=INK, ms=3.5, lw=1)
    if beside:
        axes.legend(loc="lower right", fontsize=9, framealpha=0.85, edgecolor="none")
    _mark_best(axes, scale, spans)
    draw_lines(axes, scale, lines)
    scale.finish()


def _dots(epochs: int) -> dict:
    """A dot for every epoch while there is room; a single epoch has no line."""
    return {"marker": "o", "ms": 3} if epochs <= 80 else {}


def _mark_best(axes, scale, spans):
    best = [(index, epoch["validation_accuracy"]) for part, first, _ in spans if part.best
            for index, epoch in enumerate(part.epochs, first) if epoch["improved"] and epoch["validation_accuracy"] is not None]
    if best:
        index, accuracy = best[-1]
        axes.plot(index, scale.at(accuracy), "*", color=BLUE, ms=15, mec="white", mew=0.8, zorder=8)
        side = "right" if index > spans[-1][2] / 2 else "left"
        axes.annotate(f"best {accuracy:.2f} %", (index, scale.at(accuracy)), (0, 9), textcoords="offset points", ha=side,
                      color=BLUE, weight="bold", zorder=8, bbox=BEHIND)


def _draw_losses(axes, spans):
    """Training loss (mean over the exits in warm-up); epochs whose loss is not finite are crossed at the upper edge."""
    losses = np.array([np.mean(epoch["losses"]) for part, _, _ in spans for epoch in part.epochs], dtype=float)
    where = np.arange(1, len(losses) + 1)
    lost = ~np.isfinite(losses)
    for part in np.split(where, [first - 1 for part, first, _ in spans[1:] if not part.joined]):
        axes.plot(part, np.where(lost, np.nan, losses)[part - 1], color=INK, lw=1.2, **_dots(len(losses)))
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


def _mark_spans(top, bottom, spans):
    """Shades and vertical lines where one part follows another, and as many labels as fit, by their order of weight."""
    total = spans[-1][2]
    for part, first, last in spans:
        for axes in (top, bottom):
            axes.axvspan(first - 0.5, last + 0.5, color=part.shade, lw=0, zorder=0)
            axes.axvline(first - 0.5, color="#aab2c0", lw=0.8 if len(spans) <= 20 else 0.4, zorder=1)
    taken: list[tuple[float, float]] = []
    for part, first, last in sorted(spans, key=lambda span: (span[0].weight, span[1])):
        text = part.short if len(spans) > 8 else part.label
        half, middle = 0.0054 * len(text) + 0.002, (first + last - 1) / 2 / total
        if all(abs(middle - other) > half + width for other, width in taken):
            taken.append((middle, half))
            top.text(middle, 1.02, text, transform=top.transAxes, ha="center", va="bottom",
                     color=BLUE if part.weight == 0 else GREY)


def draw_lines(axes, scale, lines: Sequence[tuple[str, float, str, str]]):
    """Horizontal lines at accuracies: name, accuracy, line style, and whether the name hangs from its top or stands on it."""
    for text, accuracy, style, side in lines:
        axes.axhline(scale.at(accuracy), ls=style, color=GREEN, lw=1.2, zorder=2)
        axes.text(1.01, scale.at(accuracy), f"{text}\n{accuracy:g} %", transform=axes.get_yaxis_transform(), va=side,
                  color=GREEN, fontsize=9, linespacing=0.95)


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


class AccuracyScale:
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


def rendered(name: str, size: tuple[float, float], label: str, draw: Callable[[Figure], None]) -> str:
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
