"""Growth from the command line: help, errors of one line, a run, its folder, its network used."""

import json

import pytest
import yaml
from test_command_line import as_image

from odn_fast import data as data_sets
from odn_fast.config import GrowConfig, flat
from odn_fast.predict import Predictor
from odn_fast.search.__main__ import main

QUICK = ["--limit-train", "100", "--batch-size", "20", "--set", "teacher.epochs=1", "--stage-epochs", "1", "--retrain-epochs", "1",
         "--budget", "40k", "--controls", "labels,scratch", "--precision", "fp32"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    import contextlib
    import io
    folder, output = tmp_path_factory.mktemp("runs") / "digits", io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main(["grow", *QUICK, "--out", str(folder)]) == 0
    return folder, output.getvalue()


def test_first_screen_and_last_lines(run):
    folder, output = run
    assert "grow a student of resnet20 on digits (100 training, 300 validation, 300 test images of 1x8x8, 10 classes)" in output
    assert "at most 40,000 parameters and 2.54 M FLOPs; the teacher has 269,434 parameters" in output
    assert "1 threads, training in fp32" in output  # of the recipe
    assert "stage 1 (5,843 parameters), epoch 1/1: loss" in output and "alpha 1.00" in output
    assert "stage 1: 5,843 parameters" in output and "split: node 1 (q 9) gets 3 more units at the end of edge 0, 0 to 1" in output
    assert "grown: 34,643 parameters (12.9 % of the teacher's), 0.14 M FLOPs" in output
    assert "student          validation" in output and "control labels   validation" in output and "control scratch  validation" in output
    assert f"report: {folder / 'report.html'}" in output and "\x1b" not in output


def test_run_folder_holds_what_was_promised(run):
    folder, _ = run
    assert {path.name for path in folder.iterdir()} >= {"config.yaml", "events.jsonl", "checkpoints", "model", "report.html"}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["kind"] == "grow" and config["teacher"]["train"] == "resnet20" and config["growth"]["controls"] == ["labels", "scratch"]
    manifest = json.loads((folder / "model" / "manifest.json").read_text())
    for key in ("seed", "torch", "threads", "precision", "data_checksum", "validation_accuracy", "test_accuracy", "params", "flops",
                "state_bytes", "macs", "latency_ms", "latency_low_ms", "latency_high_ms", "teacher", "student", "budget", "stages"):
        assert manifest[key] is not None, key
    assert manifest["student"]["edges"] == [{"id": 0, "source": 0, "target": 1, "units": 4}]


def test_predict_reads_the_student(run, tmp_path):
    folder, _ = run
    digits, predictor = data_sets.load("digits"), Predictor(folder)
    right = 0
    for image, label in zip(digits.test.images, digits.test.labels):
        right += predictor.probabilities(predictor.read(as_image(image[0], tmp_path / "digit.png"))).argmax().item() == label.item()
    manifest = json.loads((folder / "model" / "manifest.json").read_text())
    assert 100 * right / len(digits.test) == pytest.approx(manifest["test_accuracy"])


def test_config_of_a_run_starts_another_of_its_kind(run, tmp_path, capsys):
    folder, _ = run
    assert main(["--config", str(folder / "config.yaml"), "--out", str(tmp_path / "again"), "--set", "growth.controls=[]"]) == 0
    config = yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())
    assert config["growth"]["budget"] == 40_000 and config["growth"]["controls"] == []
    assert "control" not in capsys.readouterr().out.split("run folder")[1]


@pytest.mark.parametrize("arguments, words", [
    (["--budget", "1k"], "budget: 1,000 parameters are too few: the smallest student has 5,843 parameters"),
    (["--budget", "0.4 MB"], "growth.budget: expected a number such as 400000, 85k or 0.4M"),
    (["--budget", "40k", "--budget-flops", "1M"], "give one budget"),
    (["--budget-flops", "1k"], "budget_flops: 1,000 FLOPs are too few"),
    (["--teacher", "none.th"], "none.th: cannot be read"),
    (["--teacher", "none.th", "--train-teacher", "resnet20"], "does not go with teacher.file"),
    (["--train-teacher", "resnet18"], "teacher.train"),
    (["--score", "best"], "growth.score"), (["--skip", "none"], "growth.skip"), (["--c", "2"], "growth.c"),
    (["--controls", "label"], "growth.controls"), (["--augment", "always"], "growth.augment"),
    (["--retrain-from", "zero"], "growth.retrain_from"), (["--width", "-1"], "growth.width"), (["--cache-gib", "-1"], "growth.cache_gib"),
    (["--set", "search.tolerance=1"], "search.tolerance: no such setting"),
    (["--dataset", "minst"], "no data set is called 'minst'"),
    (["--device", "cuda:77"], "device: cuda:77 is not usable here")])
def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert main(["grow", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: ") and words in captured.err
    assert not list(tmp_path.iterdir())


def test_help_names_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        main(["grow", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option in ("--teacher", "--train-teacher", "--dataset", "--data-dir", "--limit-train", "--budget", "--budget-flops", "--max-flops",
                   "--stage-epochs", "--retrain-epochs", "--retrain-from", "--score", "--c", "--skip", "--no-standardize", "--augment",
                   "--cache-gib", "--controls", "--width", "--batch-size", "--lr", "--seed", "--threads", "--precision", "--device",
                   "--out", "--resume", "--config", "--set", "--checkpoint-minutes"):
        assert f" {option} " in text, option
    for setting in ("growth.stage_epochs", "growth.c", "growth.cache_gib", "growth.score", "growth.retrain_from", "training.lr"):
        assert f"(default: {flat(GrowConfig())[setting]})" in text, setting
    assert "in GiB" in text and "(default: labels,logits)" in text and "(default: the teacher's)" in text
