"""Run folders with made-up events, and the page of a report read back: what test_report.py works on."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import yaml


def sizes(depth: int, growth: float = 2.0) -> dict:
    """Parameters 10,000·2^depth and so on: figures whose reductions can be worked out by hand."""
    params = int(10_000 * growth ** depth)
    return {"depth": depth, "params": params, "state_bytes": 4 * params,
            "macs": 10_000_000 * depth, "latency_ms": 0.5 * depth, "latency_low_ms": 0.45 * depth, "latency_high_ms": 0.6 * depth}


def epoch_events(phase: str, depth: int, accuracies: list, first: int = 1, exits: int = 1) -> list[dict]:
    best, events = -1.0, []
    for number, accuracy in enumerate(accuracies, first):
        improved = accuracy is not None and accuracy > best
        best = max(best, accuracy or 0.0)
        events.append({
            "event": "epoch", "phase": phase, "depth": depth, "epoch": number, "losses": [1.5 / number] * exits,
            "train_accuracies": [min(100.0, 60.0 + 4 * number)] * exits, "validation_accuracy": accuracy, "best_accuracy": best,
            "lr": 0.01 * 0.6 ** (number // 6), "counter": 0, "seconds": 2.0, "images_per_second": 600.0, "improved": improved})
    return events


def depth_event(phase: str, depth: int, outcome: str, accuracies: list) -> dict:
    best = max((accuracy for accuracy in accuracies if accuracy is not None), default=None)
    return {"event": "depth", "phase": phase, "depth": depth, "outcome": outcome, "epochs": len(accuracies),
            "best_accuracy": best, "best_epoch": 1 + accuracies.index(best) if best is not None else 0, "seconds": 2.0 * len(accuracies),
            "first_step_seconds": 0.05 * depth}


def start_event(train: int, validation: int, test: int | None, names: list[str], shape: tuple = (1, 8, 8), name: str = "digits",
                precision: str = "fp32", **values) -> dict:
    dataset = {"name": name, "checksum": "ab12", "train": train, "validation": validation, "test": test,
               "input_shape": list(shape), "class_names": names}
    return {"event": "start", "version": "0.1.0", "torch": "2.13.0", "python": "3.11.7", "processor": "Some CPU", "threads": 2,
            "device": "cpu", "precision": precision, "precision_requested": "auto", "malloc_tuned": True, "extension": None,
            **values, "dataset": dataset}


def near_diagonal(classes: int, right: int) -> list[list[int]]:
    """A confusion matrix in which one image of every class is taken for the next class."""
    return [[right if row == column else int(column == (row + 1) % classes) for column in range(classes)] for row in range(classes)]


def write_run(folder: Path, config: dict, events: list[dict], tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + tail)
    return folder


class Synthetic:
    """Events of a run. `searched`: {depth: (outcome, accuracies)}; `tuned`: fine-tuning's epochs against `final`."""

    def __init__(self, searched: dict, found: int, final: float, depths: int = 8, target: float = 98.0, tolerance: float = 0.5,
                 cap: int | None = 8, met: bool = True, test: int | None = 300, validation: int = 300, classes: list | None = None,
                 confusion: list | None = None, baseline: dict | None = None, warm_up: int = 3, precision: str = "fp32",
                 extra: tuple = (), tuned: tuple = (-0.3, 0.0, -0.1), search: dict | None = None):
        growth = 2.0 if depths <= 8 else 1.25
        self.names = classes or [str(digit) for digit in range(10)]
        self.confusion = confusion or near_diagonal(len(self.names), 29)
        self.config = {"model": "resnet18", "search": {"target_accuracy": target, "tolerance": tolerance, "epochs_cap": cap,
                                                          **(search or {})}}
        self.start = start_event(1197, validation, test, self.names, precision=precision, model="resnet18")
        estimates = {"paper_flops": 1, "seconds_per_epoch": 2.0}
        table = {"event": "table", "rows": [sizes(depth, growth) | estimates for depth in range(1, depths + 1)]}
        self.before = [self.start, table, *epoch_events("warm_up", depths, [None] * warm_up, exits=depths)]
        self.search = []
        for depth, (outcome, accuracies) in searched.items():
            self.search += [*epoch_events("search", depth, accuracies), depth_event("search", depth, outcome, accuracies)]
        tuned = [final + offset for offset in tuned]
        first = 1 + len(searched[found][1])
        self.after = [{"event": "chosen", "depth": found, "target_met": met}, *epoch_events("fine_tune", found, tuned, first),
                      depth_event("fine_tune", found, "converged", tuned)]
        if baseline:
            reached = [baseline["validation_accuracy"] - 1, baseline["validation_accuracy"]]
            self.after += [*epoch_events("baseline", depths, reached), depth_event("baseline", depths, "converged", reached)]
        correct = round(0.98 * (test or 0))
        if test:
            self.after.append({"event": "test_reading", "network": "found", "depth": found, "correct": correct, "total": test,
                               "accuracy": 100 * correct / test})
        if baseline and test:
            self.after.append({"event": "test_reading", "network": "baseline", "depth": depths, "correct": 1, "total": test,
                               "accuracy": baseline["test_accuracy"]})
        rows = []
        for depth in range(1, depths + 1):
            outcome, accuracies = searched.get(depth, (None, []))
            best = max((accuracy for accuracy in accuracies if accuracy is not None), default=None)
            begun, trained = depth in searched, depth in searched and outcome != "cancelled"
            rows.append(sizes(depth, growth) | {
                "trained": trained, "outcome": outcome, "validation_accuracy": best if trained else None,
                "epochs": len(accuracies) if begun else None, "seconds": 1.0 if begun else None})
        self.after += [*extra, {
            "event": "result", "depth": found, "max_depth": depths, "target_met": met, "target_accuracy": target,
            "tolerance": tolerance, "epochs_cap": cap, "validation_accuracy": final, "seconds": 1000.0, "depths": rows,
            "test_accuracy": 100 * correct / test if test else None, "baseline": baseline and {"depth": depths} | baseline,
            "confusion": self.confusion, "confusion_split": "test" if test else "validation", "class_names": self.names}]

    def write(self, folder: Path, events: list | None = None, tail: str = "") -> Path:
        return write_run(folder, self.config, self.before + self.search + self.after if events is None else events, tail)


def digits(**changes) -> Synthetic:
    """Depth 1 stopped by the cap, depth 2 passes with 98.3 %, and stands at 98.67 % after fine-tuning."""
    searched = {1: ("cap", [80.0, 88.0, 91.0, 92.0, 94.0, 95.0, 96.0, 96.3]), 2: ("passed", [85.0, 93.0, 97.0, 98.3])}
    return Synthetic(**{"searched": searched, "found": 2, "final": 98.67} | changes)


def missed(**changes) -> Synthetic:
    searched = {1: ("cap", [80.0, 90.0]), 2: ("cap", [85.0, 96.0]), 3: ("cap", [85.0, 95.0])}
    return Synthetic(**{"searched": searched, "found": 2, "final": 97.0, "depths": 3, "met": False} | changes)


class Page(HTMLParser):
    """What a browser would make of a page: visible text, tables, ids, tags with their attributes."""

    VOID = {"meta", "path", "use", "rect", "image", "line", "br"}

    def __init__(self, document: str):
        super().__init__()
        self.raw, self.open, self.tags, self.texts, self.tables = document, [], [], [], []
        self.feed(document)
        self.text = re.sub(r"\s+", " ", " ".join(self.texts).replace("\u2060", "")).strip()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def table(self, first_head: str) -> list[list[str]]:
        return next(table for table in self.tables if table[0][0] == first_head)

    def row(self, first_head: str, first_cell: str) -> list[str]:
        return next(row for row in self.table(first_head)[1:] if row[0] == first_cell)
