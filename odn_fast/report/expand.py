"""The report of a depth search: accuracy, size and latency of every depth, and what led to the one that was found."""

from collections.abc import Iterable

from .expand_plots import learning_curves, size_plot
from .page import compared, counted, listed, milliseconds, percent, plot, reduction, table
from .plots import interval
from .run import Run
from .sections import (
    FIRST_STEP, class_section, closing_notes, configuration, counted_right, first_step, model_usage, setting_table, split_note, test_card,
    time_table)

_PHASES = {"warm_up": "warm-up", "search": "search", "fine_tune": "fine-tuning", "baseline": "baseline"}
_OUTCOMES = {"passed": "passed", "converged": "converged", "cap": "cap reached", "epochs": "all its epochs done",
             "diverged": "diverged", "cancelled": "cancelled", None: "unfinished"}
_UNSTEADY = 1.5
_OWN_MODEL = "a network given in Python"
_SIZE_CAPTION = ("Bars: 95 % Wilson interval of the accuracy, quartiles of the latency. Marks on the axis, hollow points: depths "
                 "that were not trained. Red cross: diverged. The accuracy scale stretches towards 100 %.")
_CURVES_CAPTION = ("Along the top: depth. Shaded: warm-up grey, fine-tuning blue, baseline orange. Solid: validation accuracy. "
                   "Dotted: training accuracy, in warm-up one line per exit. Orange marks on the axis: the learning rate drops. "
                   "Red cross: the loss is not finite.")


def _found(run: Run) -> int | None:
    chosen = run.result or run.last("chosen")
    return chosen["depth"] if chosen else None


def _target(run: Run) -> float:
    return run.result["target_accuracy"] if run.result else run.config["search"]["target_accuracy"]


def _needed(run: Run) -> float:
    """The pass line: target − tolerance, in percent."""
    tolerance = run.result["tolerance"] if run.result else run.config["search"]["tolerance"]
    return round(_target(run) - tolerance, 6)


def _cap(run: Run) -> int | None:
    return run.result["epochs_cap"] if run.result else run.config["search"].get("epochs_cap")


def _fine_tuned(run: Run) -> bool:
    return any(event["phase"] == "fine_tune" for event in run.events["epoch"])


def _depths(run: Run) -> list[dict]:
    """One row per depth, shallow to deep, the found depth's accuracy after fine-tuning; for an unfinished run, what was
    reached so far."""
    if run.result:
        final = {"validation_accuracy": run.result["validation_accuracy"]}
        return [row | final if row["depth"] == _found(run) else row for row in run.result["depths"]]
    return [row | _so_far(run, row["depth"]) for row in (run.last("table") or {"rows": []})["rows"]]


def _search_outcome(run: Run, depth: int) -> dict | None:
    """How the search (not the fine-tuning) at a depth ended."""
    ended = [event for event in run.events["depth"] if event["phase"] == "search" and event["depth"] == depth]
    return ended[-1] if ended else None


def _so_far(run: Run, depth: int) -> dict:
    epochs = [event for event in run.events["epoch"]
              if event["depth"] == depth and event["phase"] in ("search", "fine_tune")]
    seen = [event["validation_accuracy"] for event in epochs if event["validation_accuracy"] is not None]
    ended = _search_outcome(run, depth)
    outcome = ended["outcome"] if ended else None
    return {"trained": bool(epochs) and outcome != "cancelled", "epochs": len(epochs), "outcome": outcome,
            "validation_accuracy": None if outcome == "cancelled" else max(seen, default=None)}


def subject(start: dict) -> str:
    """What the title says of a run, by its event `start`."""
    return f"{start['model'] or _OWN_MODEL} on {start['dataset']['name']}"


def missed(result: dict) -> bool:
    """Whether the headline is bad news."""
    return not result["target_met"]


def warnings(run: Run) -> list[str]:
    """What went wrong, as the run said it."""
    return run.warnings


def headline(run: Run) -> str:
    """What was found, in one sentence."""
    rows, result = _depths(run), run.result
    if result is None:
        return _unfinished_headline(run, rows)
    within = f" within {counted(_cap(run), 'epoch')}" if _cap(run) else ""
    searched, final, needed = _search_accuracy(run), result["validation_accuracy"], f"needed {percent(_needed(run))}"
    if not result["target_met"]:
        best = searched if searched < _needed(run) else final
        return (f"No depth reached the target{within} ({needed}); the best, depth {_found(run)} of {rows[-1]['depth']} with "
                f"{percent(best)}, was {'fine-tuned and ' if _fine_tuned(run) else ''}extracted.")
    if not _cap(run) or searched < _needed(run):
        within, searched = "", final
    return (f"Depth {_found(run)} of {rows[-1]['depth']} reaches the target: {percent(searched)} on validation{within} "
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
    return f"This run is unfinished: it stands at {where}{so_far} (needed {percent(_needed(run))})."


def _search_accuracy(run: Run) -> float:
    """Best validation accuracy of the found depth while searching, before fine-tuning."""
    ended = _search_outcome(run, _found(run))
    return ended["best_accuracy"] if ended and ended["best_accuracy"] is not None else run.result["validation_accuracy"]


def notes(run: Run) -> list[str]:
    """What a reader should know before trusting the headline, one sentence or two each."""
    said = [*_target_notes(run), *_comparison_notes(run), *_latency_notes(run)] if run.result else []
    said += _strategy_notes(run)
    for event in run.events["exits"][-1:]:
        reached = ", ".join(f"{each:.2f}" for each in event["validation_accuracies"])
        said.append(f"After warm-up, depths 1 to {len(event['validation_accuracies'])} were right about {reached} % of the validation "
                    "images.")
    said += [f"Depth {event['depth']} diverged ({_PHASES[event['phase']]}): its loss was not finite after "
             f"{counted(event['epochs'], 'epoch')}, and its training ended there."
             for event in run.events["depth"] if event["outcome"] == "diverged"]
    if run.events["start"]:
        said.append(split_note(_needed(run), "the pass line", run.images)
                    + " A depth's accuracy is the best of its epochs, so it reads a little high.")
    return [*said, *closing_notes(run)]


def _target_notes(run: Run) -> Iterable[str]:
    accuracy, searched = run.result["validation_accuracy"], _search_accuracy(run)
    yield (f"Target {percent(_target(run))}, tolerance {run.result['tolerance']:g} points: a depth passes at "
           f"{percent(_needed(run))} on validation or above.")
    if _cap(run):
        stopped = [event["depth"] for event in run.events["depth"] if event["outcome"] == "cap" and event["phase"] == "search"]
        held = f"It stopped {listed(stopped)}; more epochs might change the answer." if stopped else "No depth ran into it."
        yield (f"A depth had at most {counted(_cap(run), 'epoch')}: the cap bound the search, not the fine-tuning. {held} "
               f"After fine-tuning, depth {_found(run)} stands at {percent(accuracy)} on validation.")
    if not run.result["target_met"] and accuracy >= _needed(run):
        yield "Only fine-tuning took the network to the pass line; while searching no depth reached it."
    if accuracy < _needed(run) <= searched:
        yield f"While searching the depth passed with {percent(searched)}; the network as it is loaded has {percent(accuracy)}."
    low, high = interval(accuracy, run.images)
    if low < _needed(run) <= high:
        yield "The 95 % interval of the accuracy spans the pass line: other validation images might decide otherwise."
    if run.config["search"].get("epochs_per_depth"):
        yield "The epochs of every depth were fixed beforehand (epochs_per_depth): no depth was trained until it converged."
    deepest = max(row["depth"] for row in _depths(run) if row["trained"])
    if not run.result["target_met"] and deepest < len(_depths(run)):
        setting = "max_depth" if run.config["search"].get("max_depth") == deepest else "epochs_per_depth"
        yield f"The search was limited to depth {deepest} ({setting}); a deeper network might reach the target."
    untried = [row["depth"] for row in _depths(run) if not row["trained"] and row["depth"] < _found(run)]
    if untried:
        assumed = " if accuracy does not grow with depth" if _strategy(run) == "bisect" else ""
        yield f"Not tried: {listed(untried)}. A smaller network might do{assumed}."


def _strategy(run: Run) -> str:
    return run.config["search"].get("strategy", "linear")


def _strategy_notes(run: Run) -> Iterable[str]:
    if _strategy(run) == "bisect":
        yield ("Depths were chosen by bisection (--strategy bisect). It finds the smallest depth that passes if accuracy grows with depth: "
               "if all depths deeper than one that passes would pass, too.")
    if _strategy(run) == "parallel":
        yield (f"Up to {counted(run.config['search']['workers'], 'depth')} were trained at once (--strategy parallel): the answer is that "
               "of training them one after another.")
    ended = [event for event in run.events["depth"] if event["outcome"] == "cancelled"]
    if ended:
        reached = "; ".join(f"depth {event['depth']} after {counted(event['epochs'], 'epoch')}"
                            + ("" if event["best_accuracy"] is None else f", with {percent(event['best_accuracy'])} as its best so far")
                            for event in sorted(ended, key=lambda event: event["depth"]))
        yield f"Cancelled, since a shallower depth had passed: {reached}."


def _comparison_notes(run: Run) -> Iterable[str]:
    baseline, result = run.result["baseline"], run.result
    if not baseline and _found(run) == _depths(run)[-1]["depth"]:
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
    rows = _depths(run)
    for row in rows:
        if row["depth"] in (_found(run), rows[-1]["depth"]) and row["latency_high_ms"] > _UNSTEADY * row["latency_low_ms"]:
            low, high = milliseconds(row["latency_low_ms"]), milliseconds(row["latency_high_ms"])
            yield (f"The latency of depth {row['depth']} was unsteady when it was measured (quartiles {low}–{high} ms), so the "
                   "reduction of latency is rough.")


def cards(run: Run) -> Iterable[tuple[str, str, str]]:
    """The large figures of the first screen: title, value, explanation."""
    result, rows = run.result, _depths(run)
    row, full = next(row for row in rows if row["depth"] == _found(run)), rows[-1]
    yield "Depth", f"{_found(run)} of {full['depth']}", "target met" if result["target_met"] else "target not met"
    yield ("Validation accuracy", f"{result['validation_accuracy']:.2f} %",
           counted_right(round(result["validation_accuracy"] / 100 * run.images), run.images))
    yield test_card([reading for reading in run.events["test_reading"] if reading["network"] == "found"])
    size, latency = f"{row['state_bytes'] / 1e6:,.2f} MB; ", "one image, folded fp32; "
    if row is full:
        size, latency = size + "this is full depth", latency + "this is full depth"
    else:
        size += compared(row["params"], full["params"], f"{full['params']:,}")
        latency += compared(row["latency_ms"], full["latency_ms"], f"{milliseconds(full['latency_ms'])} ms")
    yield "Parameters", f"{row['params']:,}", size
    yield "Latency", f"{milliseconds(row['latency_ms'])} ms", latency


def _depth_table(run: Run) -> str:
    rows, baseline = _depths(run), run.result and run.result["baseline"]
    full = rows[-1]
    if baseline and not full["trained"]:
        rows = rows[:-1]
    what = "accuracy, size and latency" if baseline else "size only"
    heads = ["depth", "training", "validation", *(["reduction (points)"] if baseline else []), "parameters", "reduction", "MB",
             "multiply-adds", "latency ms (quartiles)", "reduction", "first step ms"]
    marks = ["found" if row["depth"] == _found(run) else "" if row["trained"] else "untrained" for row in rows]
    lines = [[*_depth_cells(row, full, baseline), _first_step(run, row["depth"])] for row in rows]
    for line, mark in zip(lines, marks):
        line[0] += " found" if mark == "found" else ""
    if baseline:
        lines.append([str(baseline["depth"]), "baseline", f"{baseline['validation_accuracy']:.2f} %", "–",
                      *_depth_cells(full, full, baseline)[4:], _first_step(run, baseline["depth"])])
        marks.append("")
    tuned = " The found depth's accuracy is that of the extracted network." if run.result else ""
    return table(heads, lines, f"Reduction against full depth ({what}). Latency: median of one image, folded fp32, with "
                               f"quartiles.{tuned} {FIRST_STEP}",
                 "ww" + "n" * (len(heads) - 2), marks)


def _first_step(run: Run, depth: int) -> str:
    """Of a depth's training from warmed-up weights; fine-tuning goes on with that training."""
    seconds = [event["first_step_seconds"] for event in run.events["depth"] if event["depth"] == depth]
    return first_step(seconds[0] if seconds else None)


def _depth_cells(row: dict, full: dict, baseline: dict | None) -> list[str]:
    accuracy = row["validation_accuracy"]
    outcome = _OUTCOMES.get(row["outcome"], row["outcome"])
    begun = row["trained"] or row["outcome"] == "cancelled"
    training = f"{outcome}, {counted(row['epochs'], 'epoch')}" if begun else "not trained"
    points = "–" if not baseline or accuracy is None else f"{baseline['validation_accuracy'] - accuracy:.2f}".replace("-", "−")
    latency, low, high = (milliseconds(row[key]) for key in ("latency_ms", "latency_low_ms", "latency_high_ms"))
    return [str(row["depth"]), training, "–" if accuracy is None else f"{accuracy:.2f} %", *([points] if baseline else []),
            f"{row['params']:,}", "–" if row is full else reduction(row["params"], full["params"]),
            f"{row['state_bytes'] / 1e6:,.2f}", f"{row['macs'] / 1e6:,.1f} M", f"{latency} ({low}–{high})",
            "–" if row is full else reduction(row["latency_ms"], full["latency_ms"])]


def sections(run: Run) -> Iterable[tuple[str, str]]:
    """Heading and HTML of every section that the run has events for."""
    rows, result, epochs, start = _depths(run), run.result, run.events["epoch"], run.last("start")
    if rows:
        svg = size_plot(rows, _found(run), result and result["baseline"], _target(run), _needed(run), run.images)
        yield "Accuracy, size and latency", plot(svg, _SIZE_CAPTION) + _depth_table(run)
    if epochs:
        order = list(_PHASES)
        epochs = sorted(epochs, key=lambda epoch: (order.index(epoch["phase"]), epoch["depth"]))  # parallel ones are interleaved
        said = "" if _strategy(run) == "linear" else " Depths stand in their order, not in that of training."
        yield "Learning curves", plot(learning_curves(epochs, _found(run), _target(run), _needed(run), run.images), _CURVES_CAPTION + said)
    if result:
        yield class_section(result)
        yield model_usage()
    if start:
        first = [("network", start["model"] or _OWN_MODEL)]
        if _strategy(run) != "linear":
            first.append(("strategy", _strategy(run)))
        yield "What it took", time_table(run, _PHASES) + setting_table(start, first)
    yield configuration(run)
