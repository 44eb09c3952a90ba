"""The report of a growth says what its events say. Runs are synthetic: graphs and splits by the rules, figures invented."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from synthetic_growth import Growth, cifar
from synthetic_run import Page

from odn_fast.models import Edge, Node, StudentGraph, deepen, initial_graph, widen
from odn_fast.record import RunError
from odn_fast.report import growth_plots, read_run, write_report
from odn_fast.report.__main__ import main
from odn_fast.report.growth import graphs, headline, notes, verdict
from odn_fast.report.growth_drawing import changed, levels, places
from odn_fast.report.growth_tables import split_words
from odn_fast.report.page import listed, millions, points


def page(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def digits_page(tmp_path_factory) -> Page:
    return page(Growth().write(tmp_path_factory.mktemp("runs") / "digits"))


@pytest.fixture(scope="module")
def cifar_page(tmp_path_factory) -> Page:
    return page(cifar().write(tmp_path_factory.mktemp("runs") / "cifar"))


def said(run: Growth, folder: Path) -> str:
    return "\n".join(notes(read_run(run.write(folder))))


def figure(shown: Page, name: str) -> list[str]:
    """The texts in the figure with that label."""
    svg = next(svg for svg in re.findall(r"<svg.*?</svg>", shown.raw, re.S) if f'aria-label="{name}' in svg)
    return [re.sub(r"<[^>]*>", "", text) for text in re.findall(r"<text[^>]*>(.*?)</text>", svg, re.S)]


def test_headline_and_large_figures(digits_page):
    assert ("A student of 84,060 parameters, 31.2 % of its teacher's, has 98.67 % on validation and 98.0 % on test, after 4 stages of "
            "growth and retraining.") in digits_page.text
    assert ("body", {"class": "met"}) in digits_page.tags
    for words in ("Parameters 84,060 31.2 % of the teacher's 269,722; 98.9 % of the budget",
                  "FLOPs 0.36 M 14.0 % of the teacher's 2.54 M; 14.0 % of the cap", "Validation accuracy 98.67 % 296 of 300 images",
                  "Test accuracy 98.00 % read once; 294 of 300 images", "Latency 1.50 ms",
                  "Teacher: resnet20, 269,722 parameters, 2.54 M FLOPs, 9 maps, 98.3 % on validation.",
                  "Size: parameters 98.9 % of the budget of 85,000 and FLOPs 14.0 % of the cap of 2.54 M; at 98 % of the budget growth"):
        assert words in digits_page.text, words


@pytest.mark.parametrize("controls, sentence, figures", [
    ({"labels": (97.0, 92.0)}, "Growth beat its controls", "98.0 %, the best control (labels) 92.0 %: +6.00 points"),
    ({"labels": (97.0, 97.0), "logits": (97.0, 97.67)}, "Growth did not clearly beat its controls", "(logits) 97.67 %: +0.33 points"),
    ({"labels": (97.0, 98.0)}, "Growth did not beat its controls", "(labels) 98.0 %: 0.00 points"),
    ({"labels": (99.0, 99.0)}, "Growth did not beat its controls",
     "(labels) 99.0 %: −1.00 points, where chance alone on 300 images explains ±2.18. On validation it is −0.33 points"),
    ({}, "Growth was compared with nothing", "nothing can be claimed for it"),
    ({"labels": (None, None)}, "Growth was compared with nothing", "nothing can be claimed for it"),
])
def test_verdict_on_the_controls(tmp_path, controls, sentence, figures):
    beaten, explained = verdict(read_run(Growth(controls=controls).write(tmp_path)))
    assert beaten == sentence and figures in explained
    assert ("Every network was trained once" in explained) is bool(controls and controls["labels"][0])


def test_verdict_on_validation_where_there_is_no_test_split(tmp_path):
    shown = page(Growth(test=None).write(tmp_path))
    assert ("Growth did not clearly beat its controls: on the validation split the grown student has 98.67 %, the best control "
            "(logits) 98.33 %: +0.34 points") in shown.text
    assert "Test accuracy – not read: there is no test split" in shown.text
    assert shown.row("network", "control: logits")[3:] == ["16", "98.33 %", "–", "−0.34", "–"]


def test_controls_stand_beside_the_result(digits_page, tmp_path):
    assert digits_page.table("network")[1:] == [
        ["grown student", "growth, then labels from the grown weights", "84,060", "16", "98.67 %", "98.00 %", "–", "–"],
        ["control: labels", "the same graph from drawn weights, on labels, for as many epochs in all", "84,060", "16", "98.00 %",
         "98.00 %", "−0.67", "0.00"],
        ["control: logits", "the same graph from drawn weights, on the teacher's logits, for as many epochs in all", "84,060", "16",
         "98.33 %", "98.33 %", "−0.34", "+0.33"],
        ["teacher: resnet20", "", "269,722", "", "98.30 %", "–", "", ""]]
    assert "Growth did not beat its controls: on the test split the grown student has 98.0 %" in digits_page.text
    lost = page(Growth(controls={"labels": (None, None), "logits": (98.0, 97.0)}).write(tmp_path))
    assert lost.row("network", "control: labels")[4:] == ["diverged", "–", "–", "–"]


def test_stages_and_splits(digits_page):
    assert digits_page.table("stage")[1:] == [
        ["1", "5,843", "0.0238 M", "87.00 %", "6.0", "8.5", "20.0", "1", "deepen edge 0 → 1: ×1 to ×4"],
        ["2", "34,643", "0.14 M", "90.45 %", "6.0", "8.5", "40.0", "1", "deepen edge 0 → 1: ×4 to ×7"],
        ["3", "63,443", "0.25 M", "92.87 %", "6.0", "8.5", "60.0", "1", "widen beside edge 0 → 1: new node 2 (q = 4)"],
        ["4", "74,460", "0.32 M", "94.59 %", "6.0", "8.5", "80.0", "1", "deepen edge 2 → 1: ×1 to ×2"]]
    assert "Retraining: 250 ms." in digits_page.text and digits_page.table("stage")[0][6] == "first step ms"
    assert digits_page.table("node")[1:] == [
        ["0 (image)", "0", "1 × 8×8", "start", "–", "–"], ["2", "4", "32 × 4×4", "stage 3", "0 ×1", "0 (0.0 %)"],
        ["1 (final)", "9", "64 × 2×2", "start", "0 ×7, 2 ×2", "4 (100.0 %)"]]
    assert "3 nodes, 3 edges, 10 units" in digits_page.text
    assert "one-sided" not in digits_page.text  # a few splits say nothing; of more, the run itself does


def measures(shown: Page) -> list[list[str]]:
    return next(table for table in shown.tables if "deg⁺/deg⁻" in table[0])


def test_measures_that_led_to_each_split(digits_page, cifar_page):
    table = measures(digits_page)
    assert table[0] == ["stage", "node", "q", "S", "R", "R relative", "R/R₀", "entropy", "peak", "distinct", "dead", "deg⁺/deg⁻",
                        "split"]
    assert [row[:3] for row in table[1:]] == [["1", "1", "9"], ["2", "1", "9"], ["3", "1", "9"], ["4", "2", "4"], ["4", "1", "9"]]
    assert table[-1][7:] == ["0.71", "0.26", "13.6", "1", "1/2", "deepen edge 2 → 1: ×1 to ×2"]
    assert digits_page.raw.count("<tr class='found'>") == 5  # every stage's split, and the result among the controls
    run = cifar()
    assert len(measures(cifar_page)) - 1 == sum(len(event["nodes"]) for event in run.stages if event["event"] == "stage")
    assert cifar_page.raw.count("<tr class='found'>") == run.number + 1


@pytest.mark.parametrize("score, words", [("r", "by R alone"), ("random", "drawn by lot"), ("relative", "relative to the teacher's")])
def test_other_scores_are_said_and_shown(tmp_path, score, words):
    run = Growth(scores=score)
    shown = page(run.write(tmp_path))
    assert words in shown.text and measures(shown)[0][4] == "score"
    scores = [event["scores"] for event in run.stages if event["event"] == "split"][-1]
    assert measures(shown)[-1][4] == f"{scores[1]:#.3g}"


def test_choices_passed_over_are_listed_by_reason(cifar_page, digits_page):
    passed = cifar_page.table("in")
    assert ["stages 30–32 and 35–43", "node 6: edge 9 is full, and there is no room beside it"] in passed
    assert not any(table[0][0] == "in" for table in digits_page.tables)


def test_budget_in_flops_and_a_cap(tmp_path):
    flops = page(Growth(budget=300_000, unit="flops").write(tmp_path / "flops"))
    assert "of the budget of 0.30 M" in flops.text and "of the cap" not in flops.text
    capped = page(Growth(max_flops=200_000).write(tmp_path / "capped"))
    assert "of the cap of 0.20 M; growth ended because no further split fitted." in capped.text


def test_collapse_is_said_at_the_top(tmp_path):
    shown = page(Growth(collapsed=True).write(tmp_path))
    assert ("body", {"class": "missed"}) in shown.tags and "retraining; nodes collapsed on the way." in shown.text
    assert "Warning: node 1 collapsed in stages 1–4: its map was close to zero there, so R said nothing" in shown.text
    assert "Warning: node 2 collapsed in stage 4:" in shown.text and "has collapsed" not in shown.text  # said once
    assert measures(shown)[1][6] == "1.000"


def test_many_warnings_are_folded_away(tmp_path):
    warnings = tuple({"event": "warning", "text": f"mind gap {number}"} for number in range(10))
    shown = page(Growth(extra=warnings).write(tmp_path))
    assert "4 more warnings" in shown.text and shown.text.count("Warning: mind gap") == 10


def test_large_graph_is_drawn_with_every_node_and_edge(cifar_page):
    run = cifar()
    texts = figure(cifar_page, "The student's graph under the teacher's maps")
    assert sum(text.startswith("×") for text in texts) == len(run.graph.edges)
    assert {str(node.id) for node in run.graph.nodes} <= set(texts) and "16 × 32×32" in texts and "64 × 8×8" in texts
    small = figure(cifar_page, "The student's graph in every stage")
    assert "1: 6.1 k, 45.0 %" in small and "final" in small and sum(": " in text for text in small) == run.number


def test_plots_name_what_they_show(digits_page):
    accuracies = figure(digits_page, "Validation accuracy against parameters")
    assert {"after a stage", "grown and retrained", "control: labels", "control: logits", "1", "4", "teacher", "98.3 %"} <= set(accuracies)
    assert {"parameters of the budget", "FLOPs of their cap"} <= set(figure(digits_page, "Parameters and FLOPs over their limits"))
    assert {"1 (q = 9)", "2 (q = 4)"} <= set(figure(digits_page, "What nodes"))
    curves = figure(digits_page, "Learning curves")
    assert {"stage 1", "stage 4", "retraining", "best 98.67 %", "control: labels", "training loss"} <= set(curves)


def test_numbers_of_stages_stand_clear_of_each_other_and_of_the_student():
    written = []
    axes = SimpleNamespace(annotate=lambda text, place, *_, **__: written.append((text, place)))
    growth_plots.number_stages(axes, [(1, 10.0, 1.0), (2, 500.0, 2.0), (3, 510.0, 3.0), (4, 1000.0, 4.0)], [1010.0])
    assert written == [("1", (10.0, 1.0)), ("3", (510.0, 3.0))]


def test_the_loss_that_is_drawn_is_that_of_the_labels(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(growth_plots, "training_curves", lambda parts, *_: drawn.extend(parts) or "<svg></svg>")
    write_report(Growth().write(tmp_path))
    assert [part.label for part in drawn] == ["stage 1", "stage 2", "stage 3", "stage 4", "retraining"]
    for part in drawn:
        assert [epoch["losses"] for epoch in part.epochs] == [[1.5 / epoch["epoch"]] for epoch in part.epochs]


def test_a_teacher_from_elsewhere_far_above_its_student(tmp_path):
    """Its line would squeeze the student's points together; and the images of validation may be those it was trained on."""
    run = Growth(start=34.0, final=57.0, tested=55.0, controls={"labels": (56.0, 54.0)})
    run.config["teacher"]["train"] = None
    shown = page(run.write(tmp_path))
    accuracies = figure(shown, "Validation accuracy against parameters")
    assert {"40", "50", "far above"} <= set(accuracies) and not {"90", "98"} & set(accuracies)
    assert "9 maps, 98.3 % on validation, whose images it may have been trained on." in shown.text


def test_graphs_are_those_of_the_stages_and_the_last_split(tmp_path):
    run = cifar(stop_after=9)
    found = graphs(read_run(run.write(tmp_path / "whole")))
    assert len(found) == 10 and found[-1] == run.graph
    for cut in range(len(run.before), len(run.before + run.stages)):
        folder = run.write(tmp_path / "part", (run.before + run.stages)[:cut])
        kept = graphs(read_run(folder))
        assert kept == found[:len(kept)]


def arcs(*edges):
    qs = sorted({q for edge in edges for q in edge})
    numbers = {0: 0, qs[-1]: 1} | {q: number for number, q in enumerate(qs[1:-1], 2)}
    nodes = sorted((Node(numbers[q], q, 3, 8, 8) for q in qs), key=lambda node: node.id)
    return StudentGraph(tuple(nodes), tuple(Edge(number, numbers[first], numbers[last], 7) for number, (first, last) in enumerate(edges)),
                        10)


def test_arcs_nest():
    assert levels(arcs((0, 9))) == {0: 1}
    assert levels(arcs((0, 9), (0, 4), (4, 9), (4, 6), (6, 9))) == {0: 3, 1: 1, 2: 2, 3: 1, 4: 1}
    crossing = levels(arcs((0, 9), (0, 6), (6, 9), (0, 3), (3, 9)))
    assert crossing[1] != crossing[4]  # they overlap and do not nest: no common level


def test_places_rise_and_make_room_for_nodes():
    graph = arcs((0, 54), (0, 27), (27, 54), (0, 1), (1, 27))
    where = places(graph, 54)
    ways = [after - first for first, after in zip(where, where[1:])]
    assert len(where) == 55 and where[0] == 0 and where[-1] == pytest.approx(1) and min(ways) > 0
    assert ways[0] == pytest.approx(1.6 / 0.5 * ways[10]) and ways[26] == pytest.approx(2 * ways[10])


def test_growth_without_a_stage(tmp_path):
    shown = page(Growth(budget=5_900).write(tmp_path))
    assert "after training alone: no split fitted the budget." in shown.text
    assert shown.row("network", "grown student")[3] == "4" and not any(table[0][0] == "stage" for table in shown.tables)


def test_what_a_split_changed():
    start = initial_graph((1, 8, 8), [(16, 8, 8)] * 4, 10)
    deep = deepen(start, 0, 3)
    wide = widen(deep, 0, 2, (16, 8, 8))
    assert changed(None, start) == set() and changed(start, deep) == {0} and changed(deep, wide) == {1, 2}
    assert split_words({"kind": "deepen", "edge": 0, "units": 3}, start) == "deepen edge 0 → 1: ×1 to ×4"
    assert split_words({"kind": "widen", "edge": 0, "new_node": 2, "q": 2}, deep) == "widen beside edge 0 → 1: new node 2 (q = 2)"


def test_unfinished_run_gives_what_there_is_at_every_stage(tmp_path):
    run = Growth()
    for length in (0, 1, 4, 5, 8, 9, 10, 26, 28, len(run.events) - 1):
        shown = page(run.write(tmp_path / str(length), run.events[:length]))
        assert "This run is unfinished" in shown.text and f"--resume {length}" in shown.text, length
        assert ("body", {"class": "unfinished"}) in shown.tags and "budget: 85000" in shown.text


def test_unfinished_headline_says_where_it_stands(tmp_path):
    run = Growth()

    def at(length):
        return headline(read_run(run.write(tmp_path, run.events[:length])))

    assert at(1) == "This run is unfinished: no epoch has been recorded yet."
    assert at(3) == "This run is unfinished: it stands at the teacher's training, epoch 2."
    assert at(6) == "This run is unfinished: it stands at stage 1, epoch 1."
    assert at(12) == ("This run is unfinished: it stands at stage 2, epoch 2; after stage 1 the student had 5,843 parameters and 87.0 % "
                      "on validation.")
    done = len(run.before + run.stages)
    assert "it stands at retraining, epoch 1; after stage 4" in at(done + 1)
    assert "it stands at the control labels, epoch 2; after stage 4" in at(done + 8)
    assert "The student so far" in page(tmp_path).text


def test_time_machine_and_classes(digits_page):
    assert [row[0] for row in digits_page.table("phase")[1:]] == ["teacher", "stages", "retraining", "controls",
                                                                  "measuring, checking, saving", "all"]
    assert digits_page.row("phase", "stages")[1:3] == ["12", "24.0"]
    assert digits_page.row("setting", "teacher")[1] == "resnet20"
    assert "10 classes" in digits_page.row("setting", "data set")[1] and "Classes, on the test split" in digits_page.text
    assert 'odn_fast.load("model")' in digits_page.text


def test_page_needs_nothing_but_itself(digits_page, cifar_page):
    for shown in (digits_page, cifar_page):
        assert not re.findall(r"(?:src|href)=[\"'](?!#|data:)", shown.raw) and "<script" not in shown.raw and "http" not in re.sub(
            r"http-equiv", "", shown.raw)
        ids = [attributes["id"] for _, attributes in shown.tags if "id" in attributes]
        assert len(ids) == len(set(ids)) and not shown.open
    assert len(cifar_page.raw) < 2_000_000


def test_same_run_gives_the_same_bytes(tmp_path):
    first = write_report(Growth().write(tmp_path / "a" / "run")).read_bytes()
    assert write_report(Growth().write(tmp_path / "b" / "run")).read_bytes() == first


def test_everything_from_files_is_escaped(tmp_path):
    run = Growth(teacher="<script>alert(1)</script>", dataset="<b>& data", extra=({"event": "warning", "text": "<i>"},))
    shown = page(run.write(tmp_path))
    assert "<script" not in shown.raw and "<b>" not in shown.raw and "<i>" not in shown.raw
    assert "<script>alert(1)</script>" in shown.text


def test_events_and_configurations_of_other_kinds_are_refused(tmp_path):
    run = Growth()
    stage = next(event for event in run.stages if event["event"] == "stage")
    del stage["step_ms"]
    with pytest.raises(RunError, match=r"\(stage\) lacks 'step_ms'"):
        write_report(run.write(tmp_path))
    (tmp_path / "config.yaml").write_text("kind: grow\n")
    with pytest.raises(RunError, match="has no growth.budget and growth.budget_flops"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").write_text("kind: paint\n")
    with pytest.raises(RunError, match="is of kind 'paint'"):
        write_report(tmp_path)


def test_command_line(tmp_path, capsys):
    run = Growth()
    assert main([str(run.write(tmp_path / "whole"))]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'whole' / 'report.html'}\n"
    assert main([str(run.write(tmp_path / "part", run.before))]) == 0
    assert "is unfinished" in capsys.readouterr().err


def test_number_formats():
    assert [millions(value) for value in (126_550_000, 63_100_000, 2_540_000, 360_000, 23_800)] == \
        ["126.5 M", "63.1 M", "2.54 M", "0.36 M", "0.0238 M"]
    assert [points(value) for value in (0.333, -1.2, 0.001, -0.001)] == ["+0.33", "−1.20", "0.00", "0.00"]
    assert [listed(numbers, "stage") for numbers in ([2], [1, 3], [1, 2, 3, 7], [1, 2, 5, 6, 7, 8])] == [
        "stage 2", "stages 1 and 3", "stages 1–3 and 7", "stages 1, 2 and 5–8"]
