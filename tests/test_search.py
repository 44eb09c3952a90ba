"""The depth search as a whole, on a small network and data that it can learn in a second."""

import json
import signal

import pytest
import torch
from test_models import tiny

import odn_fast
from odn_fast.config import ConfigError, from_values
from odn_fast.data import Normalisation
from odn_fast.data.dataset import measured_normalisation
from odn_fast.engine import Interrupted, accuracy, confusion
from odn_fast.export import ModelError
from odn_fast.record import RunError, RunFolder
from odn_fast.search import expand, resume
from odn_fast.search.expansion import estimate
from odn_fast.search.expansion_depths import best_depth
from odn_fast.search.recorder import Recorder


def images(count, seed, learnable=True):
    """(x, y): uint8 (N, 2, 6, 6) whose bright pixels tell one of five classes, or nothing."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 5
    x = torch.randint(0, 200, (count, 2, 6, 6), generator=generator, dtype=torch.uint8)
    if learnable:
        x[torch.arange(count), 0, y] = 255
    return x, y


def search(tmp_path, name="run", model=None, learnable=True, **settings):
    defaults = {"target": 90, "tolerance": 0, "epochs_cap": 12, "batch_size": 16, "warm_up_epochs": 1, "lr": 0.05,
                "precision": "fp32", "threads": 1, "seed": 5}
    return expand(model or tiny(dtype=torch.float32), train=images(80, 0, learnable), validation=images(40, 1, learnable),
                  test=images(35, 2, learnable), out=tmp_path / name, **{**defaults, **settings})


def events(result, kind=None):
    lines = (result.folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if kind in (None, event["event"])]


@pytest.fixture(scope="module")
def met(tmp_path_factory):
    return search(tmp_path_factory.mktemp("met"))


@pytest.fixture(scope="module")
def missed(tmp_path_factory):
    return search(tmp_path_factory.mktemp("missed"), learnable=False, epochs_cap=3, target=99, baseline="full")


def test_the_first_depth_that_passes_is_taken(met):
    searched = [event for event in events(met, "depth") if event["phase"] == "search"]
    assert met.target_met and met.depth == searched[-1]["depth"] and searched[-1]["outcome"] == "passed"
    assert [event["depth"] for event in searched] == list(range(1, met.depth + 1))
    assert all(event["outcome"] == "cap" for event in searched[:-1])
    assert all(0 < event["first_step_seconds"] < events(met, "result")[0]["seconds"] for event in searched)
    assert [event["first_step_seconds"] for event in events(met, "depth") if event["phase"] == "fine_tune"] == [
        searched[-1]["first_step_seconds"]]  # it goes on with the same training
    passing = [event for event in events(met, "epoch") if event["phase"] == "search" and event["depth"] == met.depth]
    assert all(round(event["validation_accuracy"], 1) < 90 for event in passing[:-1])


def test_fine_tuning_goes_on_until_23_epochs_bring_nothing(met):
    epochs = [event for event in events(met, "epoch") if event["depth"] == met.depth and event["phase"] != "warm_up"]
    assert [event["epoch"] for event in epochs] == list(range(1, len(epochs) + 1))
    tuned = [event for event in epochs if event["phase"] == "fine_tune"]
    assert tuned[-1]["counter"] == 23 and all(event["counter"] < 23 for event in tuned[:-1])
    assert met.validation_accuracy == pytest.approx(max(event["validation_accuracy"] for event in epochs))


def test_learning_rates(met, missed):
    first = {event["depth"]: event["lr"] for event in reversed(events(missed, "epoch")) if event["phase"] == "search"}
    assert first == {1: 0.05, 2: 0.025, 3: 0.025}
    assert [event["lr"] for event in events(met, "epoch") if event["phase"] == "warm_up"] == [1e-3]


def test_learning_rates_in_tensors_are_numbers_in_events(tmp_path, monkeypatch):
    """A GPU's optimizer keeps its rate on the device."""
    monkeypatch.setattr("odn_fast.engine.step._rate", lambda lr, device: torch.tensor(lr))
    result = search(tmp_path, learnable=False, max_depth=1, epochs_cap=6)
    rates = [event["lr"] for event in events(result, "epoch") if event["phase"] == "search"]
    assert rates[0] == pytest.approx(0.05) and len(rates) == 6


def test_no_depth_passes(missed):
    searched = [event for event in events(missed, "depth") if event["phase"] == "search"]
    assert not missed.target_met and [event["depth"] for event in searched] == [1, 2, 3]
    rounded = [round(event["best_accuracy"], 1) for event in searched]
    assert missed.depth == 1 + rounded.index(max(rounded))
    assert events(missed, "chosen")[0]["target_met"] is False


def test_the_shallower_of_equals_is_taken():
    entries = [{"depth": 1, "best_accuracy": 40.0}, {"depth": 2, "best_accuracy": 50.01}, {"depth": 3, "best_accuracy": 50.04},
               {"depth": 4, "best_accuracy": None}]
    assert best_depth(entries) == 2
    with pytest.raises(RunError, match="every depth diverged"):
        best_depth(entries[3:])


def test_test_split_is_read_once_for_the_result_and_never_for_by_products(met, missed):
    assert [event["network"] for event in events(met, "test_reading")] == ["found"]
    baseline = [] if missed.depth == 3 else ["baseline"]
    assert [event["network"] for event in events(missed, "test_reading")] == ["found", *baseline]
    for result in (met, missed):
        for folder in sorted((result.folder / "depths").iterdir()):
            manifest = json.loads((folder / "manifest.json").read_text())
            assert manifest["test_accuracy"] is None and manifest["validation_accuracy"] > 0


@pytest.mark.parametrize("fold", [True, False])
def test_accuracies_are_those_of_the_network_as_it_is_loaded(met, fold):
    network = odn_fast.load(met.folder / "model", fold=fold)
    given = odn_fast.export.describe(met.folder).input
    normalise = Normalisation(given.scale, given.mean, given.std)
    for split, expected in [(images(40, 1), met.validation_accuracy), (images(35, 2), met.test_accuracy)]:
        assert accuracy(confusion(network, [(normalise(split[0]), split[1])], 5)) == pytest.approx(expected)


def test_every_trained_depth_is_kept(missed):
    for depth in (1, 2, 3):
        network = odn_fast.load(missed.folder / "depths" / f"depth-{depth:02}")
        assert sum("conv" not in name and name.endswith("0.weight") for name in network.state_dict()) == depth + 1
    rows = missed.depths
    assert [row["depth"] for row in rows] == [1, 2, 3] and all(row["trained"] and row["latency_ms"] > 0 for row in rows)


def test_untrained_depths_have_size_and_latency_but_no_accuracy(met):
    for row in met.depths[met.depth:]:
        assert not row["trained"] and row["validation_accuracy"] is None and row["params"] > 0 and row["latency_ms"] > 0


def test_every_depth_starts_from_the_warmed_up_weights(tmp_path):
    result = search(tmp_path, lr=1e-12, epochs_cap=1, target=99.9, warm_up_epochs=2, max_depth=2, epochs_per_depth=None)
    with RunFolder.open(result.folder) as folder:
        warm = folder.load_state("warm-up")["model"]
    for depth in (1, 2):
        trained = dict(odn_fast.load(result.folder / "depths" / f"depth-{depth:02}").named_parameters())
        weights = {name for name in trained if name.startswith(("stem", "blocks"))}
        assert weights
        for name in weights:
            torch.testing.assert_close(trained[name].detach(), warm[name], rtol=0, atol=1e-9, msg=name)


def test_given_epochs_replace_the_stopping_rule(tmp_path):
    result = search(tmp_path, learnable=False, target=99.9, epochs_cap=None, epochs_per_depth=[3, 2])
    searched = [(event["depth"], event["epochs"], event["outcome"]) for event in events(result, "depth") if event["phase"] == "search"]
    assert searched == [(1, 3, "epochs"), (2, 2, "epochs")]
    assert not [event for event in events(result, "epoch") if event["phase"] == "fine_tune"]


def test_same_seed_same_bits_and_another_seed_others(tmp_path):
    weights = []
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        result = search(tmp_path, name, seed=seed, max_depth=1, epochs_cap=2)
        weights.append((result.folder / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_the_callers_threads_and_random_state_are_left_alone(tmp_path):
    torch.manual_seed(11)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    expand("resnet18", train=images(40, 0), validation=images(20, 1), out=tmp_path / "run", target=99, max_depth=1,
           epochs_per_depth=[1], warm_up_epochs=0, threads=1, batch_size=16)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads


def test_every_depth_diverges(tmp_path):
    with pytest.raises(RunError, match="every depth diverged: start again with a smaller --lr"):
        search(tmp_path, lr=1e30)
    outcomes = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["outcome"] for event in outcomes if event["event"] == "depth"] == ["diverged"] * 3


def test_warm_up_diverges(tmp_path):
    with pytest.raises(RunError, match="warm-up: the loss is not finite"):
        search(tmp_path, warm_up_lr=1e30, warm_up_epochs=2)


def test_a_finished_run_gives_its_result_again(met):
    again = resume(met.folder, model=tiny(dtype=torch.float32), train=images(80, 0), validation=images(40, 1), test=images(35, 2))
    assert (again.depth, again.test_accuracy, again.depths) == (met.depth, met.test_accuracy, met.depths)


def test_a_run_from_python_is_resumed_from_python(met):
    with pytest.raises(ConfigError, match="resume it from there"):
        resume(met.folder)


def test_other_data_is_refused(met):
    with pytest.raises(ConfigError, match="checksum differs"):
        resume(met.folder, model=tiny(dtype=torch.float32), train=images(80, 9), validation=images(40, 1), test=images(35, 2))


@pytest.mark.parametrize("settings, words", [
    ({"max_depth": 4}, "max_depth: expected at most 3"), ({"initial_depth": 3, "max_depth": 2}, "initial_depth: expected at most 2"),
    ({"epochs_cap": None, "epochs_per_depth": [1, 1, 1, 1]}, "epochs_per_depth: expected at most 3 numbers"),
    ({"model": tiny(num_classes=7, dtype=torch.float32)}, "model: has 7 classes, the data has 5"),
    ({"test_fraction": 0.2}, "test_fraction: makes no sense for data from Python"),
    ({"val_fraction": 0.2}, "val_fraction: makes no sense where validation is given"),
    ({"device": "abacus"}, "device: abacus is not usable here"), ({"patience": 3}, "patience: no such setting")])
def test_impossible_requests_are_one_line_before_anything_is_made(tmp_path, settings, words):
    with pytest.raises(ConfigError, match=words):
        search(tmp_path, **settings)
    assert not (tmp_path / "run").exists()


def test_accuracy_of_bf16_is_that_of_fp32_within_noise(tmp_path):
    best = {precision: search(tmp_path, precision, precision=precision, target=95).validation_accuracy
            for precision in ("fp32", "bf16")}
    assert min(best.values()) >= 92.5, best


def test_a_model_that_cannot_be_stored_is_refused_before_the_run(tmp_path):
    model = tiny(dtype=torch.float32)
    model.blocks[2].append(torch.nn.PReLU())
    with pytest.raises(ModelError, match="module blocks.2.3: PReLU cannot be stored"):
        search(tmp_path, model=model)
    assert not (tmp_path / "run").exists()


def test_the_callers_model_is_left_alone(tmp_path):
    model = tiny(dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    search(tmp_path, model=model, epochs_cap=1, max_depth=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_smaller_training_split_is_what_is_trained_on(tmp_path):
    result = search(tmp_path, limit_train=20, epochs_cap=1, max_depth=1)
    assert events(result, "start")[0]["dataset"]["train"] == 20


def test_a_diverging_baseline_does_not_withhold_the_result(tmp_path):
    result = search(tmp_path, deeper_lr_scale=1e32, baseline="full", max_depth=1, epochs_cap=2)
    assert result.baseline is None and [event["outcome"] for event in events(result, "depth")][-1] == "diverged"
    assert (result.folder / "report.html").exists() and len(result.depths) == 3


def test_every_reading_of_the_test_split_stays_on_record(tmp_path, monkeypatch):
    """Stopped between reading the split and saving the checkpoint: the resumed run reads again, and both are recorded."""
    class Stopped(Exception):
        pass

    def stop(*_):
        raise Stopped

    saved, reading = Recorder.checkpoint, []

    def checkpoint(recorder):
        if recorder._state.readings and not reading:
            reading.append(1)
            stop()
        saved(recorder)

    monkeypatch.setattr(Recorder, "checkpoint", checkpoint)
    with pytest.raises(Stopped):
        search(tmp_path)
    result = resume(tmp_path / "run", model=tiny(dtype=torch.float32), train=images(80, 0), validation=images(40, 1),
                    test=images(35, 2))
    assert len(events(result, "test_reading")) == 2 and len(events(result, "result")) == 1
    assert len([event for event in events(result, "depth") if event["phase"] == "fine_tune"]) == 1


def test_a_signal_while_the_folder_is_made_names_a_run_that_can_be_resumed(tmp_path, monkeypatch):
    created = RunFolder.create.__func__

    def create(kind, path, text):
        folder = created(kind, path, text)
        signal.raise_signal(signal.SIGTERM)
        return folder

    monkeypatch.setattr(RunFolder, "create", classmethod(create))
    with pytest.raises(Interrupted) as stop:
        search(tmp_path)
    assert (stop.value.exit_status, stop.value.folder) == (143, tmp_path / "run")
    RunFolder.open(tmp_path / "run").close()  # not locked any more


def test_a_finished_run_without_its_checkpoints_is_not_begun_anew(tmp_path):
    result = search(tmp_path, epochs_cap=1, max_depth=1)
    lines = len(events(result))
    for path in (result.folder / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(RunError, match="nothing to go on from"):
        resume(result.folder, model=tiny(dtype=torch.float32), train=images(80, 0), validation=images(40, 1), test=images(35, 2))
    assert len(events(result)) == lines


def test_every_depth_can_be_measured_after_warm_up(tmp_path):
    result = search(tmp_path, measure_warm_up=True, epochs_cap=1)
    reached = events(result, "exits")[0]["validation_accuracies"]
    model = tiny(dtype=torch.float32)
    with RunFolder.open(result.folder) as folder:
        model.load_state_dict(folder.load_state("warm-up")["model"])
    x, y = images(40, 1)
    batch = measured_normalisation(images(80, 0)[0])(x)
    expected = [accuracy(confusion(odn_fast.models.FoldedNetwork(model.at_depth(depth)), [(batch, y)], 5)) for depth in (1, 2, 3)]
    assert reached == expected
    assert "After warm-up, depths 1 to 3 were right about" in (result.folder / "report.html").read_text()


@pytest.mark.parametrize("settings, words", [
    ({"search.epochs_cap": 5}, "estimated: warm-up 12 s, search at most 30 s over all depths, then fine-tuning until it converges"),
    ({"search.epochs_cap": 5, "training.warm_up_epochs": 0}, "estimated: search at most 30 s over all depths, then fine-tuning"),
    ({"search.epochs_per_depth": [3, 2], "training.warm_up_epochs": 0}, "estimated: search at most 14 s"),
    ({}, "estimated: warm-up 12 s, a depth trains until 23 epochs bring no improvement, at least 48 s at depth 1")])
def test_the_estimate_is_made_of_epochs(settings, words):
    rows = [{"depth": depth, "seconds_per_epoch": 2.0 * depth} for depth in (1, 2)]
    config = from_values({"training.warm_up_epochs": 3} | settings)
    assert estimate(config, rows, rows).startswith(words)
