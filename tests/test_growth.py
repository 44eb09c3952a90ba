"""Growth as a whole: small runs on digits, and on made-up images with a teacher from Python."""

import json
import re
import sys

import pytest
import torch
from test_distillation import Blocks

import odn_fast
import odn_fast.report
from odn_fast.config import ConfigError
from odn_fast.data import Normalisation, load
from odn_fast.engine import accuracy, confusion
from odn_fast.models.resnet import CifarResNet
from odn_fast.models.student_graph import StudentGraph, count, deepen, widen
from odn_fast.models.teachers import teacher_of
from odn_fast.ops._library import on_references
from odn_fast.record import RunError
from odn_fast.search import grow, resume
from odn_fast.search.recorder import Recorder

QUICK = {"teacher_epochs": 4, "stage_epochs": 2, "retrain_epochs": 3, "precision": "fp32", "threads": 1}


def events(result, kind=None):
    lines = (result.folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if kind in (None, event["event"])]


def images(count, seed):
    """(x, y): uint8 (N, 2, 6, 6) whose bright pixels tell one of five classes."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 5
    x = torch.randint(0, 200, (count, 2, 6, 6), generator=generator, dtype=torch.uint8)
    x[torch.arange(count), 0, y] = 255
    return x, y


def blocks():
    torch.manual_seed(4)
    return teacher_of(Blocks(), ["parts.0", "parts.1", "parts.2"], (2, 6, 6), "blocks")


def small(tmp_path, name="run", teacher=None, **settings):
    """A second of growth: 80 images, three maps of at most six channels."""
    defaults = {"budget": 2100, "max_flops": 10**6, "stage_epochs": 2, "retrain_epochs": 2, "batch_size": 16, "precision": "fp32",
                "threads": 1, "seed": 5, "controls": []}
    return grow(teacher or blocks(), train=images(80, 0), validation=images(40, 1), test=images(35, 2), out=tmp_path / name,
                **{**defaults, **settings})


@pytest.fixture(scope="module", autouse=True)
def no_report():
    """Its plots would take most of the time; test_growth_command_line.py has one written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(odn_fast.report, "write_report", lambda folder: folder)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return grow("resnet20", "digits", limit_train=250, budget="75k", controls=["labels", "logits", "scratch"],
                out=tmp_path_factory.mktemp("grown") / "run", **QUICK)


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    return small(tmp_path_factory.mktemp("small"), budget=3000)


def test_the_default_budget_is_filled_as_counted(run):
    assert [stage["params"] for stage in events(run, "stage")] == [5_843, 34_643, 63_443]
    assert (run.params, run.stages) == (74_460, 3)
    assert run.teacher["params"] == 269_434 and run.teacher["flops"] == 2_540_160 and len(run.teacher["maps"]) == 9
    assert [(split["kind"], split["node"], split["edge"]) for split in events(run, "split")] == [
        ("deepen", 1, 0), ("deepen", 1, 0), ("widen", 1, 0)]


@pytest.mark.parametrize("which", ["run", "grown"])
def test_every_split_leads_to_the_next_stage_and_the_last_one_to_the_result(which, request):
    result = request.getfixturevalue(which)
    stages, splits = events(result, "stage"), events(result, "split")
    assert [event["stage"] for event in stages] == [event["stage"] for event in splits] == list(range(1, result.stages + 1))
    manifest = json.loads((result.folder / "model" / "manifest.json").read_text())
    graphs = [StudentGraph.from_dict(event["graph"]) for event in stages] + [StudentGraph.from_dict(manifest["student"])]
    for before, split, after in zip(graphs, splits, graphs[1:]):
        node = next((node for node in after.nodes if node.id == split.get("new_node")), None)
        expected = deepen(before, split["edge"], split["units"]) if split["kind"] == "deepen" else widen(
            before, split["edge"], split["q"], (node.channels, node.height, node.width))
        assert after == expected and before.edge(split["edge"]).target == split["node"]
    for event, graph in zip(stages, graphs):
        cost = count(graph)
        assert (event["params"], event["flops"]) == (cost.params, cost.flops)
    assert count(graphs[-1]).params == result.params <= manifest["budget"]
    assert sum(tensor.numel() for tensor in result.network.parameters()) == result.params


def test_the_node_with_the_largest_modification_value_is_split(grown):
    assert grown.stages >= 5 and len(events(grown, "stage")[-1]["nodes"]) >= 2
    for stage, split in zip(events(grown, "stage"), events(grown, "split")):
        graph = StudentGraph.from_dict(stage["graph"])
        values = {}
        for node in stage["nodes"]:
            assert node["in_degree"] == len(graph.incoming(node["node"]))
            assert node["S"] == pytest.approx(node["out_degree"] / node["in_degree"] * node["R"])
            values[node["node"]] = node["S"]
        assert {int(node): value for node, value in split["scores"].items()} == values
        assert split["node"] == max(values, key=values.get) or split["skipped"]


def test_what_events_say(run):
    assert [event["event"] for event in events(run) if event["event"] not in ("epoch", "test_reading", "warning")] == [
        "start", "teacher", *["stage", "split"] * 3, "retrain", *["control"] * 3, "result"]
    stage, result = events(run, "stage")[0], events(run, "result")[0]
    assert all(event["first_step_seconds"] > 0 for event in [*events(run, "stage"), *events(run, "retrain")])
    assert {"params", "flops", "validation_accuracy", "epochs", "seconds", "step_ms", "graph"} <= set(stage)
    assert {"q", "R", "R_zero", "relative", "mean_square", "teacher_mean_square", "entropy", "peak", "distinct", "dead", "S"} <= set(
        stage["nodes"][0])
    assert result["budget"] == 75_000 and result["max_flops"] == 2_540_160 and result["seconds"] > 0 and not result["collapsed"]
    assert events(run, "split")[-1]["shares"] == {"1": 1.0}
    epochs = [(event["phase"], event["stage"], event["epoch"]) for event in events(run, "epoch")]
    assert epochs[:4] == [("teacher", 0, epoch) for epoch in (1, 2, 3, 4)]
    assert epochs[4:10] == [("stage", stage, epoch) for stage in (1, 2, 3) for epoch in (1, 2)]
    assert epochs[10:13] == [("retrain", 3, epoch) for epoch in (1, 2, 3)]


def test_learning_rates_start_anew_in_every_stage(run):
    rates = {}
    for event in events(run, "epoch"):
        key = event["phase"] + str(event["stage"]) + event.get("control", "")
        rates.setdefault(key, []).append(event["lr"])
    for stage in (1, 2, 3):
        assert rates[f"stage{stage}"] == pytest.approx([0.025, 0.0025])
    assert rates["retrain3"] == rates["control3scratch"] == pytest.approx([0.025, 0.025, 0.0025])
    assert len(rates["control3labels"]) == len(rates["control3logits"]) == 3 * 2 + 3


def test_alpha_falls_within_a_stage_and_is_zero_in_retraining(run):
    for event in events(run, "epoch"):
        assert len(event["losses"]) == (2 if event["phase"] == "stage" or event.get("control") == "logits" else 1)
    first, second = (event["losses"][0] for event in events(run, "epoch") if event["phase"] == "stage" and event["stage"] == 2)
    assert second < first


def test_the_test_split_is_read_once_for_every_network(run):
    readings = {event["network"]: event["accuracy"] for event in events(run, "test_reading")}
    assert list(readings) == ["student", "control labels", "control logits", "control scratch"]
    assert len(events(run, "test_reading")) == 4 and readings["student"] == run.test_accuracy
    assert [entry["test_accuracy"] for entry in run.controls] == list(readings.values())[1:]
    assert [(entry["name"], entry["epochs"]) for entry in run.controls] == [("labels", 9), ("logits", 9), ("scratch", 3)]


@pytest.mark.parametrize("fold", [True, False])
def test_accuracies_are_those_of_the_network_as_it_is_loaded(run, fold):
    network = odn_fast.load(run.folder / "model", fold=fold)
    given, data = odn_fast.export.describe(run.folder).input, load("digits")
    normalise = Normalisation(given.scale, given.mean, given.std)
    for split, expected in ((data.validation, run.validation_accuracy), (data.test, run.test_accuracy)):
        assert accuracy(confusion(network, [(normalise(split.images), split.labels)], 10)) == pytest.approx(expected)


def test_the_best_epoch_of_retraining_is_kept(run):
    reached = [event["validation_accuracy"] for event in events(run, "epoch") if event["phase"] == "retrain"]
    assert run.validation_accuracy == pytest.approx(max(reached))


def test_the_same_seed_gives_the_same_student_and_another_one_another(tmp_path):
    runs = [small(tmp_path, str(number), seed=seed) for number, seed in enumerate((5, 5, 6))]
    weights = [(run.folder / "model" / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1] != weights[2]


def test_memory_for_maps_changes_speed_only(tmp_path):
    kept, computed = small(tmp_path, "kept"), small(tmp_path, "computed", cache_gib=0)
    for one, other in zip(events(kept, "stage"), events(computed, "stage")):
        assert one["graph"] == other["graph"]
        assert one["nodes"][0]["R"] == pytest.approx(other["nodes"][0]["R"], rel=1e-2)


def test_growth_runs_on_the_references_of_its_ops_too(tmp_path):
    with on_references():
        plain = small(tmp_path, "plain")
    fused = small(tmp_path, "fused")
    assert plain.stages == fused.stages and plain.params == fused.params
    one, other = (events(result, "stage")[0] for result in (plain, fused))
    assert one["nodes"][0]["R"] == pytest.approx(other["nodes"][0]["R"], rel=1e-2)


@pytest.mark.parametrize("settings, how", [
    ({}, "computed once and kept"),
    ({"cache_gib": 0}, "computed at every step, because it would not fit into what is left of --cache-gib 0"),
    ({"augment": "stages"}, "computed at every step, because images are augmented")])
def test_how_every_map_is_had_is_said_once(tmp_path, capsys, settings, how):
    result = small(tmp_path, progress=True, **settings)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("teacher's map")]
    wanted = dict.fromkeys(node["q"] for stage in events(result, "stage") for node in stage["nodes"])
    assert len(wanted) > 1 and [re.sub(r"0\.\d MiB", "", line) for line in said] == [
        f"teacher's map {q},  for all images: {how}" for q in wanted]


@pytest.mark.parametrize("settings", [{"score": "random"}, {"score": "r"}, {"score": "relative", "c": 0.25}, {"augment": "both"},
                                      {"skip": "always"}, {"retrain_from": "scratch"}, {"precision": "bf16"}, {"width": 0.5},
                                      {"augment": "retrain", "controls": ["logits"]}, {"cache_gib": 0, "augment": "stages"}])
def test_variants_fill_their_budget(tmp_path, settings):
    result = small(tmp_path, **settings)
    assert result.params <= 2100 and result.stages >= 3
    names = {node["node"]: node for node in events(result, "stage")[-1]["nodes"]}
    scores = {int(node): value for node, value in events(result, "split")[-1]["scores"].items()}
    if settings.get("score") in ("r", "relative"):
        field = {"r": "R", "relative": "relative"}[settings["score"]]
        weight = {node: 1 if field == "R" else entry["out_degree"] / entry["in_degree"] for node, entry in names.items()}
        assert scores == {node: pytest.approx(weight[node] * entry[field]) for node, entry in names.items()}
    if settings.get("score") == "random":
        assert all(0 <= value < 1 for value in scores.values())


def test_a_budget_of_flops(tmp_path):
    result = small(tmp_path, budget=None, max_flops=None, budget_flops="20k")
    assert result.flops <= 20_000 and result.stages >= 1
    assert events(result, "result")[0]["budget_unit"] == "flops"


def test_flops_bound_a_budget_of_parameters_too(tmp_path):
    free = small(tmp_path, "free", budget=2000)
    bound = small(tmp_path, "bound", budget=2000, max_flops=free.flops // 2)
    assert bound.flops <= free.flops // 2 and bound.params < free.params


def test_a_budget_that_the_first_student_fills_needs_no_stage(tmp_path):
    first = count(StudentGraph.from_dict(events(small(tmp_path, "first"), "stage")[0]["graph"])).params
    result = small(tmp_path, budget=first, controls=["labels"])
    assert result.stages == 0 and result.params == first and result.controls[0]["epochs"] == 2


@pytest.mark.parametrize("standardize", [True, False])
def test_the_literal_formula_shrinks_a_student_to_zero_and_that_is_said(tmp_path, standardize):
    result = grow("resnet20", "digits", limit_train=600, budget="40k", controls=[], out=tmp_path / "run", standardize=standardize,
                  **{**QUICK, "teacher_epochs": 8, "stage_epochs": 6})
    said = [event["text"] for event in events(result, "warning")]
    assert result.collapsed == events(result, "result")[0]["collapsed"] == (not standardize)
    if standardize:
        assert not said
    else:
        assert "stage 1: node 1 has collapsed: its map is close to zero" in said[0] and "leave --no-standardize out" in said[0]


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(RunError, match="stage 1: the loss is not finite any more; start again with a smaller --lr"):
        small(tmp_path, lr=1e30)


def test_retraining_that_diverges_keeps_its_best_epoch_and_says_so(tmp_path, monkeypatch):
    fit = sys.modules["odn_fast.engine.fit"]
    looked, finite = [], fit._finite
    monkeypatch.setattr(fit, "_finite", lambda model: looked.append(1) or finite(model) and len(looked) < 3)
    result = small(tmp_path, budget=203, retrain_epochs=4)
    reached = [event["validation_accuracy"] for event in events(result, "epoch")]
    assert result.stages == 0 and len(reached) == 3 and reached[2] is None
    assert result.validation_accuracy == pytest.approx(max(reached[:2]))
    best = events(result, "retrain")[0]["best_epoch"]
    assert [event["text"] for event in events(result, "warning")] == [
        f"retraining: the loss is not finite any more after epoch 3 of 4; the best epoch before, {best}, is kept"]


def test_a_teacher_that_diverges(tmp_path):
    with pytest.raises(RunError, match="teacher: the loss is not finite"):
        grow("resnet20", "digits", out=tmp_path / "run", **{**QUICK, "teacher_epochs": 2, "teacher_lr": 1e30})


@pytest.mark.parametrize("settings, words", [
    ({"budget": 100}, r"budget: 100 parameters are too few: the smallest student has \d+ parameters"),
    ({"budget": None, "max_flops": None, "budget_flops": 100}, "budget_flops: 100 FLOPs are too few: the smallest student has"),
    ({"max_flops": 100}, "max_flops: 100 FLOPs are too few"),
    ({"budget_flops": 1000, "max_flops": None}, "give one budget"),
    ({"controls": ["labels", "labels"]}, "names one twice"), ({"score": "best"}, "growth.score"),
    ({"device": "abacus"}, "device: abacus is not usable here"), ({"patience": 3}, "patience: no such setting")])
def test_impossible_requests_are_one_line_before_anything_is_made(tmp_path, settings, words):
    with pytest.raises(ConfigError, match=words) as error:
        small(tmp_path, **settings)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("teacher, words", [
    (lambda: teacher_of(Blocks(), ["parts.0"], (2, 8, 8), "blocks"), "teacher: takes images of 2x8x8, the data has 2x6x6"),
    (lambda: teacher_of(torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()),
                        ["0"], (2, 6, 6), "four"), "teacher: has 4 classes, the data has 5")])
def test_a_teacher_that_does_not_fit_the_data(tmp_path, teacher, words):
    with pytest.raises(ConfigError, match=words):
        small(tmp_path, teacher=teacher())


def test_a_teacher_from_a_file(tmp_path):
    with pytest.raises(ValueError, match="none.th: cannot be read"):
        grow("none.th", "digits", out=tmp_path / "run")
    network = CifarResNet(20, 10, 1)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "teacher.th")
    result = grow(tmp_path / "teacher.th", "digits", budget="6k", limit_train=100, out=tmp_path / "run", controls=[], **QUICK)
    assert result.teacher["name"] == "ResNet-20" and result.stages == 0
    assert not [event for event in events(result, "epoch") if event["phase"] == "teacher"]


def test_teachers_of_bottleneck_blocks_get_narrow_students(tmp_path):
    class Bottlenecks(Blocks):
        def __init__(self):
            super().__init__()
            for part in self.parts:
                part.add_module("conv3", torch.nn.Conv2d(part[0].out_channels, part[0].out_channels, 1))

    teacher = teacher_of(Bottlenecks(), ["parts.0", "parts.1", "parts.2"], (2, 6, 6), "bottlenecks")
    widths = [small(tmp_path, str(width), teacher=teacher, budget=150, width=width).config.growth.width for width in (None, 0.5)]
    assert widths == [0.25, 0.5]
    assert small(tmp_path).config.growth.width == 1


def test_data_without_a_test_split(tmp_path):
    result = grow(blocks(), train=images(80, 0), validation=images(40, 1), out=tmp_path / "run", budget=500, max_flops=10**6,
                  stage_epochs=1, retrain_epochs=1, threads=1, controls=["labels"])
    assert result.test_accuracy is None and result.controls[0]["test_accuracy"] is None and not events(result, "test_reading")
    assert events(result, "result")[0]["confusion_split"] == "validation"


def test_a_run_without_its_checkpoints_is_not_begun_anew(tmp_path):
    result = small(tmp_path)
    for path in (result.folder / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(RunError, match="nothing to go on from"):
        resume(result.folder, teacher=blocks(), train=images(80, 0), validation=images(40, 1), test=images(35, 2))


def test_the_callers_teacher_threads_and_random_state_are_left_alone(tmp_path):
    teacher = blocks()
    weights = {name: value.clone() for name, value in teacher.state_dict().items()}
    torch.manual_seed(11)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    small(tmp_path, teacher=teacher)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    assert all(torch.equal(value, weights[name]) for name, value in teacher.state_dict().items())


def test_a_finished_run_gives_its_result_again(grown):
    again = resume(grown.folder, teacher=blocks(), train=images(80, 0), validation=images(40, 1), test=images(35, 2))
    assert again == grown


def test_a_run_from_python_is_resumed_from_python_with_the_same_teacher(grown):
    data = {"train": images(80, 0), "validation": images(40, 1), "test": images(35, 2)}
    with pytest.raises(ConfigError, match="resume it from there"):
        resume(grown.folder, **data)
    torch.manual_seed(9)
    other = teacher_of(Blocks(), ["parts.0", "parts.1", "parts.2"], (2, 6, 6), "blocks")
    with pytest.raises(ConfigError, match="the teacher is not the one the run was made with"):
        resume(grown.folder, teacher=other, **data)


def test_every_reading_of_the_test_split_stays_on_record(tmp_path, monkeypatch):
    """Stopped between reading the split and saving the checkpoint: the resumed run reads again, and both are recorded."""
    class Stopped(Exception):
        pass

    saved, reading = Recorder.checkpoint, []

    def checkpoint(recorder):
        if recorder._state.reading and not reading:
            reading.append(1)
            raise Stopped
        saved(recorder)

    monkeypatch.setattr(Recorder, "checkpoint", checkpoint)
    with pytest.raises(Stopped):
        small(tmp_path)
    result = resume(tmp_path / "run", teacher=blocks(), train=images(80, 0), validation=images(40, 1), test=images(35, 2))
    assert len(events(result, "test_reading")) == 2 and len(events(result, "result")) == 1
