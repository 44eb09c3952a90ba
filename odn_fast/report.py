"""report.html: what a depth search found, as one page that needs nothing but itself.

    python -m odn_fast.report RUN

Reads `config.yaml` and `events.jsonl` of a run folder. Every sentence and figure on the page is taken from them; an
unfinished run gives a report of what there is and says that it is unfinished.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from odn_fast._report_page import (
    compared, counted, escaped, figures, listed, milliseconds, page, pair, percent, plot, printable, reduction, table)
from odn_fast._report_plots import confusion_plot, interval, learning_curves, size_plot, wilson
from odn_fast.record import RunError, write_atomically

_PHASES = {"warm_up": "warm-up", "search": "search", "fine_tune": "fine-tuning", "baseline": "baseline"}
_OUTCOMES = {"passed": "passed", "converged": "converged", "cap": "cap reached", "epochs": "all its epochs done",
             "diverged": "diverged", None: "unfinished"}
_SMALL_TABLE, _WORST, _UNSTEADY = 20, 10, 1.5
_OWN_MODEL = "a network given in Python"
_SIZE_CAPTION = ("Bars: 95 % Wilson interval of the accuracy, quartiles of the latency. Marks on the axis, hollow points: depths "
                 "that were not trained. Red cross: diverged. The accuracy scale stretches towards 100 %.")
_CURVES_CAPTION = ("Along the top: depth. Shaded: warm-up grey, fine-tuning blue, baseline orange. Solid: validation accuracy. "
                   "Dotted: training accuracy, in warm-up one line per exit. Orange marks on the axis: the learning rate drops. "
                   "Red cross: the loss is not finite.")
_CONFUSION_CAPTION = "Blue: right. Orange: wrong, on a scale of its own. Both by share of the true class's images."
_USAGE = """python -m odn_fast.predict model IMAGE      # on the command line

import odn_fast                             # in Python
network = odn_fast.load("model")"""
# What the page takes from every event; an event without it was written by another version.
_FIELDS = {
    "start": "version torch python processor threads device precision precision_requested malloc_tuned extension model dataset",
    "table": "rows",
    "resume": "phase depth",
    "epoch": "phase depth epoch losses train_accuracies validation_accuracy lr seconds images_per_second improved",
    "depth": "phase depth outcome epochs best_accuracy",
    "chosen": "depth target_met",
    "test_reading": "network correct total accuracy",
    "warning": "text",
    "result": "depth target_met target_accuracy tolerance epochs_cap validation_accuracy test_accuracy seconds depths baseline "
              "confusion confusion_split class_names",
}


@dataclass(frozen=True)
class Run:
    """What a run folder says: its configuration, and its events by name in order."""

    name: str
    config_text: str
    config: dict
    events: dict[str, list[dict]]

    def last(self, name: str) -> dict | None:
        return self.events[name][-1] if self.events[name] else None

    @property
    def result(self) -> dict | None:
        return self.last("result")

    @property
    def found(self) -> int | None:
        chosen = self.result or self.last("chosen")
        return chosen["depth"] if chosen else None

    @property
    def target(self) -> float:
        return self.result["target_accuracy"] if self.result else self.config["search"]["target_accuracy"]

    @property
    def needed(self) -> float:
        """The pass line: target − tolerance, in percent."""
        tolerance = self.result["tolerance"] if self.result else self.config["search"]["tolerance"]
        return round(self.target - tolerance, 6)

    @property
    def cap(self) -> int | None:
        return self.result["epochs_cap"] if self.result else self.config["search"].get("epochs_cap")

    @property
    def fine_tuned(self) -> bool:
        return any(event["phase"] == "fine_tune" for event in self.events["epoch"])

    @property
    def images(self) -> int:
        """Images in the validation split."""
        return self.events["start"][-1]["dataset"]["validation"]

    def depths(self) -> list[dict]:
        """One row per depth, shallow to deep, the found depth's accuracy after fine-tuning; for an unfinished run, what was
        reached so far."""
        if self.result:
            final = {"validation_accuracy": self.result["validation_accuracy"]}
            return [row | final if row["depth"] == self.found else row for row in self.result["depths"]]
        return [row | self._so_far(row["depth"]) for row in (self.last("table") or {"rows": []})["rows"]]

    def search_outcome(self, depth: int) -> dict | None:
        """How the search (not the fine-tuning) at a depth ended."""
        ended = [event for event in self.events["depth"] if event["phase"] == "search" and event["depth"] == depth]
        return ended[-1] if ended else None

    def _so_far(self, depth: int) -> dict:
        epochs = [event for event in self.events["epoch"]
                  if event["depth"] == depth and event["phase"] in ("search", "fine_tune")]
        seen = [event["validation_accuracy"] for event in epochs if event["validation_accuracy"] is not None]
        ended = self.search_outcome(depth)
        return {"trained": bool(epochs), "validation_accuracy": max(seen, default=None), "epochs": len(epochs),
                "outcome": ended["outcome"] if ended else None}


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run folder, whole or not at all, and return its path.

    Raises:
        RunError: no run folder there, or a file cannot be read or written; one line that says what to do.
    """
    return _write(Path(run_folder), read_run(Path(run_folder)))


def read_run(folder: Path) -> Run:
    """Read a run folder; unknown events and a torn last line are passed over. Raises RunError."""
    try:
        config_text = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
        path = folder / "events.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        config = yaml.safe_load(config_text)
    except FileNotFoundError:
        raise RunError(f"{folder}: is not a run folder (no config.yaml in it); give the folder that a run printed") from None
    except OSError as error:
        raise RunError(f"{folder}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise RunError(f"{folder}/config.yaml: is not YAML ({str(error).splitlines()[0]})") from None
    search = config.get("search") if isinstance(config, dict) else None
    if not isinstance(search, dict) or not {"target_accuracy", "tolerance"} <= set(search):
        raise RunError(f"{folder}/config.yaml: has no search.target_accuracy and search.tolerance; is this a depth search?")
    events: dict[str, list[dict]] = {name: [] for name in _FIELDS}
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            events.get(event["event"], []).append(event)
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise RunError(f"{folder}/events.jsonl: line {number} is damaged; restore the file from a copy") from None
            break
        missing = [field for field in _FIELDS.get(event["event"], "").split() if field not in event]
        if missing:
            raise RunError(f"{folder}/events.jsonl: line {number} ({event['event']}) lacks {missing[0]!r}; "
                           "make the report with the version of odn_fast that made the run")
    return Run(folder.resolve().name, config_text, config, events)


def headline(run: Run) -> str:
    """What was found, in one sentence."""
    rows, result = run.depths(), run.result
    if result is None:
        return _unfinished_headline(run, rows)
    within = f" within {counted(run.cap, 'epoch')}" if run.cap else ""
    searched, final, needed = _search_accuracy(run), result["validation_accuracy"], f"needed {percent(run.needed)}"
    if not result["target_met"]:
        best = searched if searched < run.needed else final
        return (f"No depth reached the target{within} ({needed}); the best, depth {run.found} of {rows[-1]['depth']} with "
                f"{percent(best)}, was {'fine-tuned and ' if run.fine_tuned else ''}extracted.")
    if not run.cap or searched < run.needed:
        within, searched = "", final
    return (f"Depth {run.found} of {rows[-1]['depth']} reaches the target: {percent(searched)} on validation{within} "
            f"({needed}).")


def _unfinished_headline(run: Run, rows: list[dict]) -> str:
    if not run.events["epoch"]:
        return "This run is unfinished: no epoch has been recorded yet."
    last = run.events["epoch"][-1]
    where = f"{_PHASES[last['phase']]}, epoch {last['epoch']}"
    if last["phase"] != "warm_up" and rows:
        where = f"depth {last['depth']} of {rows[-1]['depth']}, {where}"
    best = max((row for row in rows if row["validation_accuracy"] is not None),
               key=lambda row: row["validation_accuracy"], default=None)
    so_far = f"; best so far: depth {best['depth']} with {percent(best['validation_accuracy'])} on validation" if best else ""
    return f"This run is unfinished: it stands at {where}{so_far} (needed {percent(run.needed)})."


def _search_accuracy(run: Run) -> float:
    """Best validation accuracy of the found depth while searching, before fine-tuning."""
    ended = run.search_outcome(run.found)
    return ended["best_accuracy"] if ended and ended["best_accuracy"] is not None else run.result["validation_accuracy"]


def notes(run: Run) -> list[str]:
    """What a reader should know before trusting the headline, one sentence or two each."""
    said = [*_target_notes(run), *_comparison_notes(run), *_latency_notes(run)] if run.result else []
    said += [f"Depth {event['depth']} diverged ({_PHASES[event['phase']]}): its loss was not finite after "
             f"{counted(event['epochs'], 'epoch')}, and its training ended there."
             for event in run.events["depth"] if event["outcome"] == "diverged"]
    start = run.last("start")
    if start:
        low, high = interval(run.needed, run.images)
        said.append(f"The validation split has {counted(run.images, 'image')}: one is worth {100 / run.images:.2g} points, and "
                    f"an accuracy near the pass line is known to ±{(high - low) / 2:.2g} points (half of the 95 % Wilson "
                    "interval). A depth's accuracy is the best of its epochs, so it reads a little high.")
    if start and start["precision"] != "fp32":
        said.append(f"Trained in {start['precision']} (asked for: {start['precision_requested']}); the large figures are those "
                    "of the network as it is loaded, folded and in fp32.")
    if run.events["resume"]:
        said.append(f"The run was resumed {counted(len(run.events['resume']), 'time')}.")
    return said


def _target_notes(run: Run) -> Iterable[str]:
    accuracy, searched = run.result["validation_accuracy"], _search_accuracy(run)
    yield (f"Target {percent(run.target)}, tolerance {run.result['tolerance']:g} points: a depth passes at "
           f"{percent(run.needed)} on validation or above.")
    if run.cap:
        stopped = [event["depth"] for event in run.events["depth"] if event["outcome"] == "cap" and event["phase"] == "search"]
        held = f"It stopped {listed(stopped)}; more epochs might change the answer." if stopped else "No depth ran into it."
        yield (f"A depth had at most {counted(run.cap, 'epoch')}: the cap bound the search, not the fine-tuning. {held} "
               f"After fine-tuning, depth {run.found} stands at {percent(accuracy)} on validation.")
    if not run.result["target_met"] and accuracy >= run.needed:
        yield "Only fine-tuning took the network to the pass line; while searching no depth reached it."
    if accuracy < run.needed <= searched:
        yield f"While searching the depth passed with {percent(searched)}; the network as it is loaded has {percent(accuracy)}."
    low, high = interval(accuracy, run.images)
    if low < run.needed <= high:
        yield "The 95 % interval of the accuracy spans the pass line: other validation images might decide otherwise."
    if run.config["search"].get("epochs_per_depth"):
        yield "The epochs of every depth were fixed beforehand (epochs_per_depth): no depth was trained until it converged."
    deepest = max(row["depth"] for row in run.depths() if row["trained"])
    if not run.result["target_met"] and deepest < len(run.depths()):
        setting = "max_depth" if run.config["search"].get("max_depth") == deepest else "epochs_per_depth"
        yield f"The search was limited to depth {deepest} ({setting}); a deeper network might reach the target."
    untried = [row["depth"] for row in run.depths() if not row["trained"] and row["depth"] < run.found]
    if untried:
        yield f"Not tried: {listed(untried)}. A smaller network might do."


def _comparison_notes(run: Run) -> Iterable[str]:
    baseline, result = run.result["baseline"], run.result
    if not baseline and run.found == run.depths()[-1]["depth"]:
        yield "Compared with full depth: the found network is full depth, nothing is reduced."
        return
    if not baseline:
        yield "Compared with full depth: size only. Full depth was not trained as a baseline (--baseline full does that)."
        return
    gains = [f"{result[key] - baseline[key]:+.2f} points on {split}".replace("-", "−")
             for key, split in (("validation_accuracy", "validation"), ("test_accuracy", "test"))
             if result[key] is not None and baseline[key] is not None]
    yield f"Accuracy against full depth, trained as the baseline: {' and '.join(gains)}."


def _latency_notes(run: Run) -> Iterable[str]:
    rows = run.depths()
    for row in rows:
        if row["depth"] in (run.found, rows[-1]["depth"]) and row["latency_high_ms"] > _UNSTEADY * row["latency_low_ms"]:
            low, high = milliseconds(row["latency_low_ms"]), milliseconds(row["latency_high_ms"])
            yield (f"The latency of depth {row['depth']} was unsteady when it was measured (quartiles {low}–{high} ms), so the "
                   "reduction of latency is rough.")


def _cards(run: Run) -> Iterable[tuple[str, str, str]]:
    """The large figures of the first screen: title, value, explanation."""
    result, rows = run.result, run.depths()
    row, full = next(row for row in rows if row["depth"] == run.found), rows[-1]
    yield "Depth", f"{run.found} of {full['depth']}", "target met" if result["target_met"] else "target not met"
    yield ("Validation accuracy", f"{result['validation_accuracy']:.2f} %",
           _counted_right(round(result["validation_accuracy"] / 100 * run.images), run.images))
    yield _test_card([reading for reading in run.events["test_reading"] if reading["network"] == "found"])
    size, latency = f"{row['state_bytes'] / 1e6:,.2f} MB; ", "one image, folded fp32; "
    if row is full:
        size, latency = size + "this is full depth", latency + "this is full depth"
    else:
        size += compared(row["params"], full["params"], f"{full['params']:,}")
        latency += compared(row["latency_ms"], full["latency_ms"], f"{milliseconds(full['latency_ms'])} ms")
    yield "Parameters", f"{row['params']:,}", size
    yield "Latency", f"{milliseconds(row['latency_ms'])} ms", latency


def _test_card(readings: Sequence[dict]) -> tuple[str, str, str]:
    if not readings:
        return "Test accuracy", "–", "not read: there is no test split"
    times = "read once" if len(readings) == 1 else f"read {len(readings)} times"
    last = readings[-1]
    return "Test accuracy", f"{last['accuracy']:.2f} %", f"{times}; {_counted_right(last['correct'], last['total'])}"


def _counted_right(correct: int, total: int) -> str:
    low, high = wilson(correct, total)
    return f"{correct:,} of {counted(total, 'image')}; 95 % interval {low:.1f}–{high:.1f} %"


def _depth_table(run: Run) -> str:
    rows, baseline = run.depths(), run.result and run.result["baseline"]
    full = rows[-1]
    if baseline and not full["trained"]:
        rows = rows[:-1]
    what = "accuracy, size and latency" if baseline else "size only"
    heads = ["depth", "training", "validation", *(["reduction (points)"] if baseline else []), "parameters", "reduction", "MB",
             "multiply-adds", "latency ms (quartiles)", "reduction"]
    marks = ["found" if row["depth"] == run.found else "" if row["trained"] else "untrained" for row in rows]
    lines = [_depth_cells(row, full, baseline) for row in rows]
    for line, mark in zip(lines, marks):
        line[0] += " found" if mark == "found" else ""
    if baseline:
        lines.append([str(baseline["depth"]), "baseline", f"{baseline['validation_accuracy']:.2f} %", "–",
                      *_depth_cells(full, full, baseline)[4:]])
        marks.append("")
    tuned = " The found depth's accuracy is that of the extracted network." if run.result else ""
    return table(heads, lines, f"Reduction against full depth ({what}). Latency: median of one image, folded fp32, with "
                               f"quartiles.{tuned}",
                 "ww" + "n" * (len(heads) - 2), marks)


def _depth_cells(row: dict, full: dict, baseline: dict | None) -> list[str]:
    accuracy = row["validation_accuracy"]
    outcome = _OUTCOMES.get(row["outcome"], row["outcome"])
    training = f"{outcome}, {counted(row['epochs'], 'epoch')}" if row["trained"] else "not trained"
    points = "–" if not baseline or accuracy is None else f"{baseline['validation_accuracy'] - accuracy:.2f}".replace("-", "−")
    latency, low, high = (milliseconds(row[key]) for key in ("latency_ms", "latency_low_ms", "latency_high_ms"))
    return [str(row["depth"]), training, "–" if accuracy is None else f"{accuracy:.2f} %", *([points] if baseline else []),
            f"{row['params']:,}", "–" if row is full else reduction(row["params"], full["params"]),
            f"{row['state_bytes'] / 1e6:,.2f}", f"{row['macs'] / 1e6:,.1f} M", f"{latency} ({low}–{high})",
            "–" if row is full else reduction(row["latency_ms"], full["latency_ms"])]


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


def _time_table(run: Run) -> str:
    lines, total = [], 0.0
    for phase, name in _PHASES.items():
        epochs = [event for event in run.events["epoch"] if event["phase"] == phase]
        seconds = sum(event["seconds"] for event in epochs)
        if epochs:
            speeds = [event["images_per_second"] for event in epochs if event["images_per_second"] is not None]
            lines.append([name, str(len(epochs)), f"{seconds:,.1f}", f"{np.median(speeds):,.0f}" if speeds else "–"])
        total += seconds
    if run.result and run.result["seconds"] >= total:
        lines.append(["measuring, checking, saving", "", f"{run.result['seconds'] - total:,.1f}", ""])
        total = run.result["seconds"]
    lines.append(["all", str(len(run.events["epoch"])), f"{total:,.1f}", ""])
    return table(["phase", "epochs", "seconds", "training images/s (median)"], lines, "Time by phase.", "wnnn")


def _setting_table(start: dict) -> str:
    data = start["dataset"]
    test = "no test" if data["test"] is None else f"{data['test']:,} test"
    shape = " × ".join(str(length) for length in data["input_shape"])
    lines = [
        ["network", start["model"] or _OWN_MODEL],
        ["data set", f"{data['name']}: {data['train']:,} training, {data['validation']:,} validation and {test} images of "
                     f"{shape}, {counted(len(data['class_names']), 'class', 'classes')}"],
        ["checksum", str(data["checksum"])],
        ["device", f"{start['device']}: {start['processor']}, {counted(start['threads'], 'thread')}"],
        ["precision", f"{start['precision']} (asked for: {start['precision_requested']})"],
        ["kernels", str(start["extension"] or "plain PyTorch: the extension is not built")],
        ["allocator", "tuned" if start["malloc_tuned"] else "not tuned"],
        ["versions", f"odn_fast {start['version']}, torch {start['torch']}, Python {start['python']}"],
    ]
    return table(["setting", "value"], lines, "Machine, data and versions.", "wl")


def _sections(run: Run) -> Iterable[tuple[str, str]]:
    """Heading and HTML of every section that the run has events for."""
    rows, result, epochs, start = run.depths(), run.result, run.events["epoch"], run.last("start")
    if rows:
        svg = size_plot(rows, run.found, result and result["baseline"], run.target, run.needed, run.images)
        yield "Accuracy, size and latency", plot(svg, _SIZE_CAPTION) + _depth_table(run)
    if epochs:
        yield "Learning curves", plot(learning_curves(epochs, run.found, run.target, run.needed, run.images), _CURVES_CAPTION)
    if result:
        names = [printable(name)[:40] for name in result["class_names"]]
        yield f"Classes, on the {result['confusion_split']} split", pair(
            plot(confusion_plot(result["confusion"], names), _CONFUSION_CAPTION), _class_table(result["confusion"], names))
        yield "Using the model", f"<p>In the run folder:</p><pre>{escaped(_USAGE)}</pre>"
    if start:
        yield "What it took", _time_table(run) + _setting_table(start)
    yield "Configuration", f"<details><summary>config.yaml</summary><pre>{escaped(run.config_text)}</pre></details>"


def _write(folder: Path, run: Run) -> Path:
    start, title, state = run.last("start"), run.name, "unfinished"
    lead = f"<p>Go on with <code>python -m odn_fast.search --resume {escaped(run.name)}</code>.</p>"
    if start:
        title = f"{run.name}: {start['model'] or _OWN_MODEL} on {start['dataset']['name']}"
    if run.result:
        state, lead = "met" if run.result["target_met"] else "missed", figures(_cards(run))
    warned = dict.fromkeys(event["text"] for event in run.events["warning"])
    text = page(title, state, headline(run), lead, notes(run), warned, _sections(run))
    path = folder / "report.html"
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror}); make the folder writable, or free space") from None
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m odn_fast.report", description=
        "Write report.html into the folder of a depth search, from its config.yaml and events.jsonl: what was found, accuracy, "
        "size and latency of every depth, learning curves, confusion matrix. The page needs no network and no other file.",
        epilog="An unfinished run gives a report of what there is, which says so. Exit status: 2 if there is no run.")
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder that the search wrote (--out)")
    folder = parser.parse_args(arguments).run
    try:
        run = read_run(folder)
        path = _write(folder, run)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path)
    if run.result is None:
        print(f"{folder}: is unfinished, so its report is too; go on with --resume {folder}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
