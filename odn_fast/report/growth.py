"""The report of a growth: the student that was found, how it grew, and whether growing it was worth anything."""

import math
from collections.abc import Iterable, Sequence
from itertools import groupby

from ..models.student_graph import StudentGraph, deepen, widen
from .growth_plots import accuracy_plot, final_graph, graphs_on_the_way, growth_curves, limits_plot, values_plot
from .growth_tables import collapses, node_table, score_table, skipped_table, stage_table
from .page import counted, foldable, listed, milliseconds, millions, percent, plot, points, share, table
from .plots import interval
from .run import Run
from .sections import (
    class_section, closing_notes, configuration, counted_right, model_usage, setting_table, split_note, test_card, time_table)

_PHASES = {"teacher": "teacher", "stage": "stages", "retrain": "retraining", "control": "controls"}
_CONTROLS = {"labels": "the same graph from drawn weights, on labels, for as many epochs in all",
             "logits": "the same graph from drawn weights, on the teacher's logits, for as many epochs in all",
             "scratch": "the same graph from drawn weights, on labels, for the epochs of retraining"}
_UNITS = {"params": "parameters", "flops": "FLOPs"}
_ENOUGH = 98.0
_GRAPH_CAPTION = ("From left to right: depth q, along the teacher's maps (grey line, with their channels × height×width). Maps "
                  "stand closer where they teach no node. A node is taught by the map above it; node 0 is the image, node 1 feeds "
                  "the classifier. Arcs: edges, ×n for their units.")
_STAGES_CAPTION = "Blue: what the last split brought. The thicker an edge, the more units it has. The last graph is the one retrained."
_VALUES_CAPTION = "What nodes were ranked by, over the largest of the stage; circles: the node that was split."
_ACCURACY_CAPTION = ("Numbers: stages. Bars: 95 % Wilson interval on the validation split. The controls have the grown student's "
                     "size and stand beside it to be seen. The accuracy scale stretches towards 100 %.")
_CURVES_CAPTION = ("Along the top: stages. Solid: validation accuracy (after a stage: dots), dotted: training accuracy. The controls "
                   "start at epoch 1. Orange marks on the axis: the learning rate of retraining drops. Below: loss of the labels "
                   "alone.")


def subject(start: dict) -> str:
    """What the title says of a run, by its event `start`."""
    return f"grown under {start['teacher']} on {start['dataset']['name']}"


def missed(result: dict) -> bool:
    """Whether the headline is bad news."""
    return result["collapsed"]


def graphs(run: Run) -> list[StudentGraph]:
    """The graph of every stage, and the one after the last split that was made."""
    found = [StudentGraph.from_dict(event["graph"]) for event in run.events["stage"]]
    split = run.last("split")
    if split and split["stage"] == run.events["stage"][-1]["stage"]:
        maps, width = run.last("teacher")["maps"], run.config["growth"].get("width", 1.0)
        if split["kind"] == "deepen":
            found.append(deepen(found[-1], split["edge"], split["units"]))
        else:
            found.append(widen(found[-1], split["edge"], split["q"], tuple(maps[split["q"] - 1]), width))
    return found


def limits(run: Run) -> list[tuple[str, str, int, str]]:
    """What bounds the student: (name, key of an event, bound, budget or cap); the budget first."""
    start = run.last("start")
    if not start:
        return []
    unit, budget, cap = (start["limits"][name] for name in ("budget_unit", "budget", "max_flops"))
    found = [(f"{_UNITS[unit]} of the budget", unit, budget, "budget")]
    return [*found, ("FLOPs of their cap", "flops", cap, "cap")] if cap else found


def headline(run: Run) -> str:
    """What was found, in one sentence."""
    result, teacher = run.result, run.last("teacher")
    if result is None:
        return _unfinished_headline(run)
    tested = f" and {percent(result['test_accuracy'])} on test" if result["test_accuracy"] is not None else ""
    text = (f"A student of {result['params']:,} parameters, {share(result['params'], teacher['params'])} of its teacher's, has "
            f"{percent(result['validation_accuracy'])} on validation{tested}, after "
            + (f"{counted(result['stages'], 'stage')} of growth and retraining" if result["stages"] else
               "training alone: no split fitted the budget"))
    return text + ("; nodes collapsed on the way." if result["collapsed"] else ".")


def _unfinished_headline(run: Run) -> str:
    if not run.events["epoch"]:
        return "This run is unfinished: no epoch has been recorded yet."
    last = run.events["epoch"][-1]
    where = {"teacher": "the teacher's training", "stage": f"stage {last['stage']}", "retrain": "retraining",
             "control": f"the control {last.get('control')}"}.get(last["phase"], last["phase"])
    so_far = ""
    if run.events["stage"]:
        stage = run.events["stage"][-1]
        so_far = (f"; after stage {stage['stage']} the student had {stage['params']:,} parameters and "
                  f"{percent(stage['validation_accuracy'])} on validation")
    return f"This run is unfinished: it stands at {where}, epoch {last['epoch']}{so_far}."


def notes(run: Run) -> list[str]:
    """What a reader should know before trusting the headline, one sentence or two each."""
    result = run.result
    said = [": ".join(verdict(run))] if result else []
    said += [*_teacher_notes(run), *_limit_notes(run), *_score_notes(run)]
    if result:
        said.append(split_note(result["validation_accuracy"], "the student's", run.images)
                    + " The weights are those of its best epoch on it, so its accuracy there reads a little high.")
    return [*said, *closing_notes(run)]


def verdict(run: Run) -> tuple[str, str]:
    """Whether growth beat its controls, said as it is: in a few words, and the figures behind them."""
    result = run.result
    controls = [control for control in result["controls"] if control["validation_accuracy"] is not None]
    if not controls:
        return ("Growth was compared with nothing", "without a control (growth.controls) nothing can be claimed for it; the same "
                "graph trained from drawn weights may do as well or better.")
    key, split, images = "validation_accuracy", "validation", run.images
    if all(entry["test_accuracy"] is not None for entry in (result, *controls)):
        key, split, images = "test_accuracy", "test", run.last("start")["dataset"]["test"]
    best = max(controls, key=lambda control: control[key])
    gain, chance = result[key] - best[key], _chance(result[key], best[key], images)
    beaten = ("Growth beat its controls" if gain > chance else
              "Growth did not clearly beat its controls" if gain > 0 else "Growth did not beat its controls")
    other = ""
    if split == "test":
        rival = max(control["validation_accuracy"] for control in controls)
        other = f" On validation it is {points(result['validation_accuracy'] - rival)} points from the best of them."
    return beaten, (f"on the {split} split the grown student has {percent(result[key])}, the best control ({best['name']}) "
                    f"{percent(best[key])}: {points(gain)} points, where chance alone on {counted(images, 'image')} explains "
                    f"±{chance:.2f}.{other} Every network was trained once; what other seeds would give is not known.")


def _chance(one: float, other: float, images: int) -> float:
    """Half the 95 % interval of a difference of two accuracies on as many images, towards zero (Newcombe's method)."""
    larger, smaller = max(one, other), min(one, other)
    return math.hypot(larger - interval(larger, images)[0], interval(smaller, images)[1] - smaller)


def _teacher_notes(run: Run) -> Iterable[str]:
    teacher = run.last("teacher")
    if teacher:
        yield (f"Teacher: {teacher['name']}, {teacher['params']:,} parameters, {millions(teacher['flops'])} FLOPs, "
               f"{len(teacher['maps'])} maps, {percent(round(teacher['validation_accuracy'], 2))} on validation"
               + ("." if run.config.get("teacher", {}).get("train") else ", whose images it may have been trained on."))


def _limit_notes(run: Run) -> Iterable[str]:
    result = run.result
    if not result:
        return
    said = [f"{_UNITS[key]} {share(result[key], bound)} of the {kind} of "
            f"{millions(bound) if key == 'flops' else f'{bound:,}'}" for _, key, bound, kind in limits(run)]
    budget = limits(run)[0]
    full = 100 * result[budget[1]] / budget[2] >= _ENOUGH
    why = f"at {_ENOUGH:g} % of the budget growth ends" if full else "growth ended because no further split fitted"
    yield f"Size: {' and '.join(said)}; {why}."


def _score_notes(run: Run) -> Iterable[str]:
    score = run.config["growth"].get("score", "s")
    if score != "s":
        yield {"r": "Splits were chosen by R alone, without the degrees (score r).",
               "relative": "Splits were chosen by the value relative to the teacher's mean square (score relative).",
               "random": "Splits were drawn by lot (score random)."}.get(score, f"Splits were chosen by the score {score}.")


def warnings(run: Run) -> list[str]:
    """What went wrong: of a collapse once, in place of the run's own words on it; the rest as it said."""
    told, own = [], []
    for node, stages in collapses(run.events["stage"]).items():
        told.append(f"node {node} collapsed in {listed(stages, 'stage')}: its map was close to zero there, so R said nothing and its "
                    "rank was as good as drawn by lot")
        own += [f"stage {stage}: node {node} has collapsed" for stage in stages]
    return [*told, *(text for text in run.warnings if not text.startswith(tuple(own)))]


def cards(run: Run) -> Iterable[tuple[str, str, str]]:
    """The large figures of the first screen: title, value, explanation."""
    result, teacher = run.result, run.last("teacher")
    bounds = {key: f"; {share(result[key], bound)} of the {kind}" for _, key, bound, kind in limits(run)}
    yield ("Parameters", f"{result['params']:,}",
           f"{share(result['params'], teacher['params'])} of the teacher's {teacher['params']:,}{bounds.get('params', '')}")
    yield ("FLOPs", millions(result["flops"]),
           f"{share(result['flops'], teacher['flops'])} of the teacher's {millions(teacher['flops'])}{bounds.get('flops', '')}")
    yield ("Validation accuracy", f"{result['validation_accuracy']:.2f} %",
           counted_right(round(result["validation_accuracy"] / 100 * run.images), run.images))
    yield test_card([reading for reading in run.events["test_reading"] if reading["network"] == "student"])
    yield "Latency", f"{milliseconds(result['latency_ms'])} ms", "one image, folded fp32"


def sections(run: Run) -> Iterable[tuple[str, str]]:
    """Heading and HTML of every section that the run has events for."""
    result, stages, start, teacher = run.result, run.events["stage"], run.last("start"), run.last("teacher")
    if result:
        yield verdict(run)[0], _control_table(run, teacher)
    if stages:
        yield from _growth_sections(run, stages, teacher)
    if any(epoch["phase"] in ("stage", "retrain") for epoch in run.events["epoch"]):
        yield "Learning curves", plot(_curves(run), _CURVES_CAPTION)
    if result:
        yield class_section(result)
        yield model_usage()
    if start:
        yield "What it took", time_table(run, _PHASES) + setting_table(start, [("teacher", start["teacher"])])
    yield configuration(run)


def _growth_sections(run: Run, stages: Sequence[dict], teacher: dict) -> Iterable[tuple[str, str]]:
    grown, result, maps = graphs(run), run.result, teacher["maps"]
    heading = "The student" if result else "The student so far"
    yield heading, plot(final_graph(grown[-1], maps), _GRAPH_CAPTION) + node_table(run, grown[-1])
    svg = accuracy_plot(stages, result, [control for control in run.events["control"] if control["validation_accuracy"] is not None],
                        teacher, run.images)
    yield "Accuracy and size on the way", (plot(svg, _ACCURACY_CAPTION)
                                           + foldable(stage_table(run, grown), "Every stage, and the split it led to", len(stages)))
    titles = [f"{stage['stage']}: {stage['params'] / 1e3:,.1f} k, {stage['validation_accuracy']:.1f} %" for stage in stages]
    titles += ["final" if result else "next"] * (len(grown) - len(stages))
    sizes = [*stages, *([result] if result else [])]
    yield "Growth, stage by stage", (plot(graphs_on_the_way(grown, titles, maps), _STAGES_CAPTION)
                                     + plot(limits_plot(sizes, limits(run), bool(result)), _limit_caption(limits(run))))
    rows = sum(len(stage["nodes"]) for stage in stages)
    yield "What chose the splits", (plot(values_plot(stages, run.events["split"]), _VALUES_CAPTION)
                                    + foldable(score_table(run, grown), "Every node's measures in every stage", rows)
                                    + skipped_table(run.events["split"]))


def _limit_caption(bounds: Sequence[tuple[str, str, int, str]]) -> str:
    said = [f"{'FLOPs' if key == 'flops' else 'Parameters'}: {kind} {millions(bound) if key == 'flops' else f'{bound:,}'}."
            for _, key, bound, kind in bounds]
    return f"Dashed: the limits. {' '.join(said)}"


def _control_table(run: Run, teacher: dict) -> str:
    result = run.result
    retrained = run.last("retrain") or {}
    from_where = "the grown weights" if retrained.get("retrain_from", "grown") == "grown" else "drawn weights"
    epochs = sum(stage["epochs"] for stage in run.events["stage"]) + retrained.get("epochs", 0)
    lines = [["grown student", f"growth, then labels from {from_where}", f"{result['params']:,}", str(epochs),
              *_accuracies(result, result)]]
    lines += [[f"control: {control['name']}", _CONTROLS.get(control["name"], ""), f"{result['params']:,}", str(control["epochs"]),
               *_accuracies(control, result)] for control in result["controls"]]
    lines.append([f"teacher: {teacher['name']}", "", f"{teacher['params']:,}", "",
                  *_accuracies({"test_accuracy": None} | teacher, result)[:2], "", ""])
    return table(["network", "training", "parameters", "epochs", "validation", "test", "points on validation", "on test"], lines,
                 "Points: above the grown student. The controls train the graph that growth ended with: they tell what growing its "
                 "weights gave, not whether another graph would do better.", "wlnnnnnn", ["found", *[""] * (len(lines) - 1)])


def _accuracies(entry: dict, grown: dict) -> list[str]:
    """Validation and test accuracy, and how far above the grown student's."""
    values = [entry["validation_accuracy"], entry["test_accuracy"]]
    if values[0] is None:
        return ["diverged", "–", "–", "–"]
    gains = [None if value is None or entry is grown or grown[key] is None else value - grown[key]
             for value, key in zip(values, ("validation_accuracy", "test_accuracy"))]
    return [*("–" if value is None else f"{value:.2f} %" for value in values),
            *("–" if gain is None else points(gain) for gain in gains)]


def _curves(run: Run) -> str:
    epochs = run.events["epoch"]
    reached = {stage["stage"]: stage["validation_accuracy"] for stage in run.events["stage"]}
    stages = [(number, list(group), reached.get(number)) for number, group in
              groupby((epoch for epoch in epochs if epoch["phase"] == "stage"), key=lambda epoch: epoch["stage"])]
    controls: dict[str, list[dict]] = {}
    for epoch in epochs:
        if epoch["phase"] == "control":
            controls.setdefault(epoch.get("control", "control"), []).append(epoch)
    return growth_curves(stages, [epoch for epoch in epochs if epoch["phase"] == "retrain"], controls, run.images)
