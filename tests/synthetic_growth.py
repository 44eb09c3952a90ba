"""Run folders of made-up growths: the graphs and splits follow the rules, the losses and accuracies are invented."""

import math
from pathlib import Path

from synthetic_run import near_diagonal, start_event, write_run

from odn_fast.models import count, initial_graph
from odn_fast.search.growth_rules import Limits, can_grow, choose_split, modification_value, shares

KNOWN = {"labels": 98.0, "logits": 98.33}


def cifar_maps(blocks: int, size: int = 32) -> list[list[int]]:
    """Shapes of the maps of a CIFAR ResNet with `blocks` blocks a stage."""
    return [[16, size, size]] * blocks + [[32, size // 2, size // 2]] * blocks + [[64, size // 4, size // 4]] * blocks


def epochs(phase: str, stage: int, accuracies: list, losses: int = 1, **more) -> list[dict]:
    best, events = -1.0, []
    for number, accuracy in enumerate(accuracies, 1):
        improved = accuracy is not None and accuracy > best
        best = max(best, accuracy or 0.0)
        events.append({
            "event": "epoch", "phase": phase, "stage": stage, **more, "epoch": number, "losses": [0.2, 1.5 / number][-losses:],
            "train_accuracies": [min(100.0, 60.0 + 4 * number)], "validation_accuracy": accuracy, "lr": 0.025 * 0.1 ** (number // 6),
            "seconds": 2.0, "images_per_second": 600.0, "improved": improved, "best_accuracy": best, "counter": 0})
    return events


def rising(final: float, number: int) -> list[float]:
    return [final * (1 - 0.5 * math.exp(-4 * (index + 1) / number)) for index in range(number - 1)] + [final]


class Growth:
    """Events of a growth. `controls`: {name: (validation, test)}; `stop_after`: stages, before the budget is reached."""

    def __init__(self, blocks: int = 3, size: int = 8, channels: int = 1, budget: int = 85_000, unit: str = "params",
                 max_flops: int | None = None, stage_epochs: int = 3, retrain: int = 4, validation: int = 300,
                 test: int | None = 300, train: int = 1197, start: float = 87.0, final: float = 98.67, tested: float = 98.0,
                 controls: dict | None = None, collapsed: bool = False, teacher: str = "resnet20", dataset: str = "digits",
                 stop_after: int = 100, scores: str = "s", skip: str = "auto", precision: str = "fp32", depth_power: float = 1.0,
                 extra: tuple = ()):
        controls = {name: (value, value) for name, value in KNOWN.items()} if controls is None else controls
        maps, names = cifar_maps(blocks, size), [str(digit) for digit in range(10)]
        self.config = {"kind": "grow", "teacher": {"train": teacher}, "growth": {
            "budget": budget if unit == "params" else None, "budget_flops": budget if unit == "flops" else None, "max_flops": max_flops,
            "stage_epochs": stage_epochs, "retrain_epochs": retrain, "retrain_from": "grown", "score": scores, "c": 0.5, "skip": skip,
            "width": 1.0, "standardize": not collapsed, "controls": list(controls)}}
        params, flops = (853_018, 126_550_000) if blocks == 9 else (269_722, 2_540_000)
        limits = Limits(unit, budget, max_flops or flops if unit == "params" else None)
        self.teacher = {"name": teacher, "params": params, "flops": flops, "maps": maps, "validation_accuracy": 98.3, "seconds": 11.0}
        self.before = [start_event(train, validation, test, names, (channels, size, size), dataset, precision, search="grow",
                                   teacher=teacher, limits=limits.to_dict()),
                       *epochs("teacher", 0, rising(98.3, 3)), {"event": "teacher", **self.teacher}]
        graph = initial_graph((channels, size, size), maps, 10, 1.0, skip)
        self.stages, split_nodes, number = [], [], 0
        while number < stop_after and can_grow(graph, maps, limits):
            number += 1
            reached = 10.0 if collapsed else final - (final - start) * math.exp(-0.35 * (number - 1))
            cost = count(graph)
            nodes = [self._node(graph, node, number, collapsed, depth_power) for node in graph.supervised]
            values = {node["node"]: node["S" if scores == "s" else "R"] for node in nodes}
            split = choose_split(graph, values, maps, limits)
            split_nodes.append(split.node)
            self.stages += [
                *epochs("stage", number, [None] * stage_epochs, losses=2),
                {"event": "stage", "stage": number, "graph": graph.to_dict(), "params": cost.params, "flops": cost.flops,
                 "validation_accuracy": reached, "epochs": stage_epochs, "seconds": 2.0 * stage_epochs, "step_ms": 8.5,
                 "first_step_seconds": 0.02 * number,
                 "nodes": nodes},
                *([{"event": "warning", "text": f"stage {number}: node 1 has collapsed"}] if collapsed else []),
                {"event": "split", "stage": number, **split.to_dict(), "scores": values, "shares": shares(split_nodes)}]
            graph = split.graph
        self.graph, self.number, cost = graph, number, count(graph)
        self.after = [*epochs("retrain", number, rising(final, retrain)),
                      {"event": "retrain", "outcome": "epochs", "retrain_from": "grown", "epochs": retrain, "best_accuracy": final,
                       "best_epoch": retrain, "seconds": 2.0 * retrain, "first_step_seconds": 0.25},
                       *self._reading("student", tested, test)]
        told = []
        for name, (seen, other) in controls.items():
            trained = retrain + (0 if name == "scratch" else number * stage_epochs)
            entry = {"name": name, "validation_accuracy": seen, "test_accuracy": other if test else None, "epochs": trained}
            told.append(entry)
            self.after += [*epochs("control", number, rising(seen, trained) if seen else [None], control=name),
                           *(self._reading(f"control {name}", other, test) if seen else []),
                           {"event": "control", **entry, "seconds": 2.0 * trained}]
        correct = round(tested / 100 * (test or 0))
        self.after += [*extra, {
            "event": "result", "params": cost.params, "flops": cost.flops, "state_bytes": 4 * cost.params, "macs": cost.flops,
            "latency_ms": 1.5, "latency_low_ms": 1.4, "latency_high_ms": 1.7, "validation_accuracy": final,
            "test_accuracy": 100 * correct / test if test else None, **limits.to_dict(), "stages": number, "controls": told,
            "collapsed": collapsed, "teacher": self.teacher, "shares": shares(split_nodes), "seconds": 1000.0,
            "confusion": near_diagonal(10, 29), "confusion_split": "test" if test else "validation", "class_names": names}]

    @staticmethod
    def _node(graph, node, stage, collapsed, power):
        square = 3.0 * (1.2 - 0.02 * node.q)
        zero = 0.3 * square
        loss = zero if collapsed else zero * (0.2 + 0.6 * node.id % 0.17) * (node.q / graph.node(1).q) ** power * (1 + 1 / stage)
        return {"node": node.id, "q": node.q, "R": loss, "R_zero": zero, "relative": loss / square,
                "mean_square": 1e-6 if collapsed else 0.8 * square, "teacher_mean_square": square,
                "entropy": 0.999 if collapsed else 0.71, "peak": 0.02 if collapsed else 0.26, "distinct": 1.1 if collapsed else 13.6,
                "dead": 28 if collapsed else node.id % 2, "in_degree": graph.in_degree(node.id),
                "out_degree": graph.out_degree(node.id), "S": modification_value(graph, node.id, loss)}

    @staticmethod
    def _reading(network, accuracy, total):
        correct = round(accuracy / 100 * (total or 0))
        return [{"event": "test_reading", "network": network, "correct": correct, "total": total,
                 "accuracy": 100 * correct / total}] if total else []

    @property
    def events(self) -> list[dict]:
        return self.before + self.stages + self.after

    def write(self, folder: Path, events: list | None = None, tail: str = "") -> Path:
        return write_run(folder, self.config, self.events if events is None else events, tail)


def cifar(**changes) -> Growth:
    """ResNet-56's 27 maps and a student of 0.40 M parameters."""
    return Growth(**{"blocks": 9, "size": 32, "channels": 3, "budget": 400_000, "teacher": "resnet56", "dataset": "cifar10",
                     "train": 45_000, "validation": 5_000, "test": 10_000, "start": 45.0, "final": 92.1, "tested": 91.8,
                     "controls": {"labels": (91.0, 90.5), "logits": (91.6, 91.5), "scratch": (90.4, 90.1)},
                     "stage_epochs": 10, "retrain": 100} | changes)
