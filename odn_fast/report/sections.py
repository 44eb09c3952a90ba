"""Sections, cards and notes that the reports of both searches have."""

from collections.abc import Iterable, Sequence

import numpy as np

from .page import counted, escaped, milliseconds, pair, plot, printable, table
from .plots import confusion_plot, interval, wilson
from .run import Run

_SMALL_TABLE, _WORST = 20, 10
_CONFUSION_CAPTION = "Blue: right. Orange: wrong, on a scale of its own. Both by share of the true class's images."
FIRST_STEP = ("First step: from the decision for this network until its first training step had ended, with all that is made anew "
              "for it in between.")
_USAGE = """python -m odn_fast.predict model IMAGE      # on the command line
python -m odn_fast.evaluate model           # its accuracy, on any split

import odn_fast                             # in Python
network = odn_fast.load("model")"""


def test_card(readings: Sequence[dict]) -> tuple[str, str, str]:
    """The large figure of the test split: title, value, explanation."""
    if not readings:
        return "Test accuracy", "–", "not read: there is no test split"
    times = "read once" if len(readings) == 1 else f"read {len(readings)} times"
    last = readings[-1]
    return "Test accuracy", f"{last['accuracy']:.2f} %", f"{times}; {counted_right(last['correct'], last['total'])}"


def counted_right(correct: int, total: int) -> str:
    low, high = wilson(correct, total)
    return f"{correct:,} of {counted(total, 'image')}; 95 % interval {low:.1f}–{high:.1f} %"


def split_note(accuracy: float, what: str, images: int) -> str:
    """How exactly an accuracy near `accuracy`, called `what`, can be known."""
    low, high = interval(accuracy, images)
    return (f"The validation split has {counted(images, 'image')}: one is worth {100 / images:.2g} points, and an accuracy near "
            f"{what} is known to ±{(high - low) / 2:.2g} points (half of the 95 % Wilson interval).")


def closing_notes(run: Run) -> Iterable[str]:
    """Notes on how the run was computed."""
    start = run.last("start")
    if start and start["precision"] != "fp32":
        yield (f"Trained in {start['precision']} (asked for: {start['precision_requested']}); the large figures are those of "
               "the network as it is loaded, folded and in fp32.")
    if run.events["resume"]:
        yield f"The run was resumed {counted(len(run.events['resume']), 'time')}."


def class_section(result: dict) -> tuple[str, str]:
    """Heading and body: confusion matrix and accuracy of every class."""
    names = [printable(name)[:40] for name in result["class_names"]]
    return f"Classes, on the {result['confusion_split']} split", pair(
        plot(confusion_plot(result["confusion"], names), _CONFUSION_CAPTION), _class_table(result["confusion"], names))


def _class_table(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    counts = np.asarray(matrix)
    totals, right = counts.sum(axis=1), counts.diagonal()
    order, caption = list(range(len(names))), "Accuracy of every class."
    if len(names) > _SMALL_TABLE:
        order = sorted((index for index in order if totals[index]), key=lambda index: right[index] / totals[index])[:_WORST]
        caption = f"The {len(order)} classes with the lowest accuracy, of {len(names)}."
    lines = []
    for index in order:
        wrong = np.where(np.arange(len(names)) == index, 0, counts[index])
        accuracy = f"{100 * right[index] / totals[index]:.1f} %" if totals[index] else "no images"
        taken = f"{names[wrong.argmax()]} ({wrong.max()})" if wrong.any() else "–"
        lines.append([names[index], accuracy, f"{right[index]} of {totals[index]}", taken])
    return table(["class", "accuracy", "correct", "mostly taken for"], lines, caption, "lnnl")


def first_step(seconds: float | None) -> str:
    """What a first step took, in milliseconds; what was not measured, where a run was resumed at this very place, is a dash."""
    return "–" if seconds is None else milliseconds(1e3 * seconds)


def model_usage() -> tuple[str, str]:
    """Heading and body: how to use the artefact."""
    return "Using the model", f"<p>In the run folder:</p><pre>{escaped(_USAGE)}</pre>"


def time_table(run: Run, phases: dict[str, str], things: str = "images") -> str:
    """Epochs, seconds and speed by phase; `phases`: the phases' names in words, in order; `things`: what batches hold."""
    lines, total = [], 0.0
    for phase, name in phases.items():
        epochs = [event for event in run.events["epoch"] if event["phase"] == phase]
        seconds = sum(event["seconds"] for event in epochs)
        if epochs:
            speeds = [event["images_per_second"] for event in epochs if event["images_per_second"] is not None]
            lines.append([name, str(len(epochs)), f"{seconds:,.1f}", f"{np.median(speeds):,.0f}" if speeds else "–"])
        total += seconds
    if run.result:
        rest, total = run.result["seconds"] - total, run.result["seconds"]
        lines.append(["measuring, checking, saving", "", f"{rest:,.1f}", ""] if rest >= 0 else
                     ["done at the same time as others", "", f"−{-rest:,.1f}", ""])
    lines.append(["all", str(len(run.events["epoch"])), f"{total:,.1f}", ""])
    return table(["phase", "epochs", "seconds", f"training {things}/s (median)"], lines, "Time by phase.", "wnnn")


def setting_table(start: dict, first: Sequence[tuple[str, str]], data_set: str = "") -> str:
    """Machine, data and versions, after the settings in `first`; `data_set`: in words, where it is not of images and classes."""
    data = start["dataset"]
    lines = [
        *first,
        ["data set", data_set or _images(data)],
        ["checksum", str(data["checksum"])],
        ["device", f"{start['device']}: {start['processor']}, {counted(start['threads'], 'thread')}"],
        ["precision", f"{start['precision']} (asked for: {start['precision_requested']})"],
        ["kernels", str(start["extension"] or "plain PyTorch: the extension is not built")],
        ["allocator", "tuned" if start["malloc_tuned"] else "not tuned"],
        ["versions", f"odn_fast {start['version']}, torch {start['torch']}, Python {start['python']}"],
    ]
    return table(["setting", "value"], lines, "Machine, data and versions.", "wl")


def _images(data: dict) -> str:
    test = "no test" if data["test"] is None else f"{data['test']:,} test"
    shape = " × ".join(str(length) for length in data["input_shape"])
    return (f"{data['name']}: {data['train']:,} training, {data['validation']:,} validation and {test} images of {shape}, "
            f"{counted(len(data['class_names']), 'class', 'classes')}")


def configuration(run: Run) -> tuple[str, str]:
    """Heading and body: the run's config.yaml."""
    return "Configuration", f"<details><summary>config.yaml</summary><pre>{escaped(run.config_text)}</pre></details>"
