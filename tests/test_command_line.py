"""The command line as a user meets it: help, errors of one line, a search, a report, a prediction."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from PIL import Image

from odn_fast import data as data_sets
from odn_fast.config import ExpandConfig, flat
from odn_fast.export import describe
from odn_fast.predict import Predictor
from odn_fast.predict import main as predict
from odn_fast.search import __main__ as command
from odn_fast.search.__main__ import main

QUICK = ["--limit-train", "100", "--batch-size", "20", "--warm-up-epochs", "0", "--max-depth", "1", "--epochs-per-depth", "2",
         "--threads", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    done = subprocess.run([sys.executable, "-m", "odn_fast.search", *QUICK, "--out", str(folder)],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_first_screen_table_and_last_lines(run):
    folder, output = run
    assert "expand resnet18 on digits (100 training, 300 validation, 300 test images of 1x8x8, 10 classes)" in output
    assert "11,172,810" in output and "latency ms" in output and "est. s/epoch" in output
    assert "NOT MET" in output and f"report: {folder / 'report.html'}" in output
    assert "depth 1, epoch 2/2: loss" in output and "images/s" in output
    assert "\x1b" not in output  # no terminal, no escapes


def test_run_folder_holds_what_was_promised(run):
    folder, _ = run
    assert {path.name for path in folder.iterdir()} >= {"config.yaml", "events.jsonl", "checkpoints", "model", "report.html"}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["training"]["lr"] == 0.01 and config["run"]["threads"] == 2
    assert len(list((folder / "checkpoints").glob("0*.ckpt"))) == 2
    manifest = json.loads((folder / "model" / "manifest.json").read_text())
    for key in ("seed", "torch", "threads", "precision", "data_checksum", "validation_accuracy", "test_accuracy", "params",
                "state_bytes", "macs", "latency_ms", "latency_low_ms", "latency_high_ms"):
        assert manifest[key] is not None, key
    page = (folder / "report.html").read_text()
    assert "<svg" in page and "digits" in page


def test_config_of_a_run_starts_another(run, tmp_path):
    folder, _ = run
    assert main(["--config", str(folder / "config.yaml"), "--out", str(tmp_path / "again"), "--set", "training.momentum=0.5"]) == 0
    config = yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())
    assert config["training"]["momentum"] == 0.5 and config["data"]["limit_train"] == 100


def test_a_run_outlives_whoever_reads_its_output(tmp_path):
    """As behind `| head -1`."""
    child = subprocess.Popen([sys.executable, "-m", "odn_fast.search", *QUICK, "--out", str(tmp_path / "run")],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline().startswith("odn_fast")
    child.stdout.close()
    said = child.stderr.read()
    assert child.wait(timeout=300) == 0, said
    assert said == "warning: nobody reads what is printed any more; the run goes on, and its folder holds what it finds\n"
    assert (tmp_path / "run" / "report.html").exists()


def test_names_that_the_terminal_has_no_letters_for_end_no_run(tmp_path):
    """Neither those of an old locale nor bytes that are no UTF-8."""
    out = os.fsdecode(bytes(tmp_path) + b"/run-\xff-\xc3\xa9")
    done = subprocess.run([sys.executable, "-m", "odn_fast.search", *QUICK, "--out", out], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert r"run-\udcff-\xe9/report.html" in done.stdout and os.path.exists(f"{out}/report.html")


def test_output_that_cannot_be_written_is_named(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "odn_fast.search", *QUICK, "--out", str(tmp_path / "run")], stdout=full,
                              stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 1
    assert "error: standard output: No space left on device; a run that had begun goes on with --resume" in done.stderr


def test_require_target_gives_status_1(tmp_path):
    assert main([*QUICK, "--out", str(tmp_path / "run"), "--require-target"]) == 1


@pytest.mark.parametrize("arguments, words", [
    (["--model", "resnet19"], "model: expected one of resnet18"),
    (["--dataset", "minst"], "no data set is called 'minst'"),
    (["--target-accuracy", "150"], "search.target_accuracy"),
    (["--target-accuracy", "0.97"], "search.target_accuracy: expected percent from 1 to 100, such as 97, got 0.97"),
    (["--target-accuracy", "90", "--tolerance", "90"], "search.tolerance: expected less than the target, 90, or any depth would pass"),
    (["--initial-depth", "0"], "search.initial_depth"),
    (["--max-depth", "9"], "max_depth: expected at most 8"),
    (["--dataset", "imagefolder:EMPTY"], "EMPTY"),
    (["--dataset", "npz:none.npz"], "none.npz"),
    (["--set", "training.momentum"], "expected SETTING=VALUE"),
    (["--set", "training.speed=3"], "training.speed: no such setting"),
    (["--set", "run.seed=[1"], "set run.seed"),
    (["--config", "none.yaml"], "config none.yaml: cannot be read"),
    (["--resume", "nowhere"], "resume nowhere: is not a run folder"),
    (["--device", "cuda:77"], "device: cuda:77 is not usable here"),
    (["--device", "tpu", "--dataset", "imagefolder:EMPTY"], "device: tpu is not usable here"),  # before data is read for it
    (["--limit-train", "5000"], "5000"),
    (["--precision", "fp8"], "run.precision"),
    (["--threads", "0"], "run.threads"),
    (["--val-fraction", "0.3"], "val_fraction makes no sense for digits"),
    (["--epochs-cap", "3", "--epochs-per-depth", "2"], "does not go with"),
])
def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: ") and words in captured.err
    assert {path.name for path in tmp_path.iterdir()} == {"EMPTY"}


@pytest.mark.parametrize("arguments, words", [
    (["--batch-size", "many"], "--batch-size: invalid int value: 'many'"), (["--unknown"], "--unknown"), (["shrink"], "shrink"),
    (["--epochs-per-depth", "3,x"], "--epochs-per-depth: expected whole numbers such as 20,15, got '3,x'")])
def test_what_argparse_refuses_is_status_2(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "error" in said and words in said


@pytest.mark.parametrize("option", ["--resume", "--config"])
def test_a_path_that_the_shell_did_not_expand_begins_at_home(tmp_path, monkeypatch, capsys, option):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main([f"{option}=~/nowhere"]) == 2
    assert str(tmp_path / "nowhere") in capsys.readouterr().err


def test_out_that_is_not_empty_is_status_2_and_untouched(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main([*QUICK, "--out", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err and (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate")])
def test_memory_that_is_used_up_is_one_line_and_status_1(monkeypatch, capsys, error):
    def full(*_):
        raise error

    monkeypatch.setitem(command._SEARCHES, ExpandConfig, full)
    assert main([]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "memory is used up" in said and "--batch-size" in said


def test_help_names_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option in ("--model", "--dataset", "--data-dir", "--image-size", "--val-fraction", "--test-fraction", "--target-accuracy",
                   "--tolerance", "--initial-depth", "--max-depth", "--warm-up-epochs", "--epochs-per-depth", "--epochs-cap",
                   "--limit-train", "--batch-size", "--lr", "--seed", "--threads", "--precision", "--device", "--out", "--resume",
                   "--strategy", "--workers", "--require-target", "--checkpoint-minutes", "--baseline", "--config", "--set"):
        assert option in text, option
    for setting in ("search.tolerance", "training.batch_size", "run.checkpoint_minutes"):
        assert f"(default: {flat(ExpandConfig())[setting]})" in text, setting


def as_image(levels, path):
    """A digit of levels 0..16 as a PNG of levels 0..255."""
    Image.fromarray((levels.double() * 255 / 16).round().byte().numpy()).save(path)
    return str(path)


def test_predict_agrees_with_the_manifest_on_the_whole_test_split(run, tmp_path):
    folder, _ = run
    digits, predictor = data_sets.load("digits"), Predictor(folder)
    right = 0
    for index, (image, label) in enumerate(zip(digits.test.images, digits.test.labels)):
        levels = predictor.read(as_image(image[0], tmp_path / "digit.png"))
        assert (levels == image).all(), index
        right += predictor.probabilities(levels).argmax().item() == label.item()
    manifest = json.loads((folder / "model" / "manifest.json").read_text())
    assert 100 * right / len(digits.test) == pytest.approx(manifest["test_accuracy"])


def test_predict_prints_class_and_probability_and_names_bad_files(run, tmp_path, capsys):
    folder, _ = run
    image = as_image(data_sets.load("digits").test.images[0, 0], tmp_path / "digit.png")
    (tmp_path / "text.png").write_text("no image")
    assert predict([str(folder), image, str(tmp_path / "text.png")]) == 1
    captured = capsys.readouterr()
    path, name, probability = captured.out.strip().split("\t")
    assert path == image and name in describe(folder).class_names and 0 < float(probability.rstrip(" %")) <= 100
    assert captured.err.count("\n") == 1 and "text.png" in captured.err


def test_predict_ends_quietly_where_nobody_reads_on(run, tmp_path):
    folder, _ = run
    image = as_image(data_sets.load("digits").test.images[0, 0], tmp_path / "digit.png")
    piped = f'"{sys.executable}" -m odn_fast.predict "{folder}" "{image}" | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", piped], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_predict_without_a_model_is_status_2(tmp_path, capsys):
    assert predict([str(tmp_path), "x.png"]) == 2
    assert "no network.json" in capsys.readouterr().err


def test_doctor_names_what_is_there(capsys):
    from odn_fast.doctor import main as doctor
    assert doctor([]) == 0
    output = capsys.readouterr().out
    assert "odn_fast" in output and "C++ ops" in output and "CUDA" in output
