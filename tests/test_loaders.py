"""Searches whose pictures are decoded as they are needed: the same run whichever loader, interrupted or not."""

import json
import shutil
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from picture_cases import cut_short
from torch import nn

from odn_fast.data import load, streaming
from odn_fast.data.pictures import thread_count
from odn_fast.doctor import dali_line
from odn_fast.engine import Interrupted
from odn_fast.models import DepthNetwork
from odn_fast.search import expand, grow, resume
from odn_fast.search.__main__ import main
from odn_fast.search.expansion_preview import depth_rows
from odn_fast.search.recorder import Recorder


def has_dali():
    try:
        import nvidia.dali
    except ImportError:
        return False
    return bool(nvidia.dali)


WITHOUT_DALI = "NVIDIA DALI is not installed: pip install nvidia-dali-cuda130"
DALI = pytest.param("dali", marks=pytest.mark.skipif(not has_dali(), reason=WITHOUT_DALI))
COMMAND = ["--image-size", "8", "--max-depth", "1", "--warm-up-epochs", "1", "--epochs-per-depth", "2", "--batch-size", "8",
           "--threads", "1", "--precision", "fp32"]
SETTINGS = {"target": 99, "tolerance": 0, "epochs_per_depth": [3], "batch_size": 8, "warm_up_epochs": 1, "lr": 0.05,
            "precision": "fp32", "threads": 1, "seed": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Dark pictures and light ones; one of the dark ones is damaged."""
    root, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 6), ("test", 4)):
        for name, light in (("dark", 0), ("light", 120)):
            place = root / split / name
            place.mkdir(parents=True)
            for number in range(count):
                size = (10 + number % 3, 12 - number % 2, 3)
                Image.fromarray((generator.integers(0, 130, size) + light).astype(np.uint8)).save(place / f"{number:02}.png")
    cut_short(root / "train" / "dark" / "03.png")
    return root


def events(run, kind):
    return [event for event in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if event["event"] == kind]


def weights(result):
    return result.network.state_dict()


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def network():
    """One block over (N, 3, 6, 6), of two classes."""
    torch.manual_seed(0)
    stem, block = (nn.Sequential(nn.Conv2d(wide, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()) for wide in (3, 4))
    return DepthNetwork(stem, [block], [4], 2)


def searched(folder, out, loader, **options):
    data = load(f"imagefolder:{folder}", image_size=6, loader=loader, **options)
    return expand(network(), data, out=out, **SETTINGS)


@pytest.mark.parametrize("loader", ["resident", "torch", DALI])
def test_a_search_from_the_command_line(folder, tmp_path, capsys, loader):
    assert main(["--dataset", f"imagefolder:{folder}", "--loader", loader, "--out", str(tmp_path / "run"), *COMMAND]) == 0
    said = capsys.readouterr().out
    assert f"loader {loader}: asked for" in said and "dark/03.png" in said and "(1 of at most 10)" in said
    start, = events(tmp_path / "run", "start")
    assert start["dataset"]["loader"] == loader and [name.endswith("dark/03.png") for name in start["dataset"]["damaged"]] == [True]
    assert f"loader: {loader}" in (tmp_path / "run" / "config.yaml").read_text()
    result, = events(tmp_path / "run", "result")
    assert result["test_accuracy"] >= 50 and (tmp_path / "run" / "report.html").exists()


def test_a_run_that_met_too_many_damaged_pictures_goes_on_with_a_higher_limit(folder, tmp_path, capsys):
    """Those of the test split are met at the very end."""
    pictures, run = tmp_path / "pictures", tmp_path / "run"
    shutil.copytree(folder, pictures)
    cut_short(pictures / "test" / "light" / "02.png")
    assert main(["--dataset", f"imagefolder:{pictures}", "--loader", "torch", "--corrupt-limit", "1", "--out", str(run), *COMMAND]) == 2
    assert "raise --corrupt-limit (a run goes on with it and --resume)" in capsys.readouterr().err and not (run / "model").exists()
    assert main(["--resume", str(run)]) == 2
    assert main(["--resume", str(run), "--corrupt-limit", "2"]) == 0
    assert "resumed in phase" in capsys.readouterr().out and (run / "model" / "manifest.json").exists()


def test_a_run_folder_among_the_classes_is_refused(folder, tmp_path, capsys):
    """Read again, the data would have a class more."""
    assert main(["--dataset", f"imagefolder:{folder / 'train'}", "--out", str(folder / "train" / "runs" / "first"), *COMMAND]) == 2
    assert "lies among the classes" in capsys.readouterr().err and not (folder / "train" / "runs").exists()


@pytest.mark.filterwarnings("ignore:.*stands in for it")
def test_the_loader_does_not_change_the_network(folder, tmp_path):
    resident, streamed = (searched(folder, tmp_path / loader, loader) for loader in ("resident", "torch"))
    assert same(weights(resident), weights(streamed)) and resident.test_accuracy == streamed.test_accuracy >= 75
    assert streamed.config.data.loader == "torch"


@pytest.mark.filterwarnings("ignore:.*stands in for it")
@pytest.mark.parametrize("loader", ["torch", DALI])
def test_a_run_stopped_within_an_epoch_goes_on_to_the_same_bits(folder, tmp_path, loader, monkeypatch):
    options = {"loader": loader, "crop": "random"}
    whole = searched(folder, tmp_path / "whole", **options)
    step, taken = Recorder.step, []

    def interrupted(self, model, optimizer, training):
        taken.append(training.step)
        if len(taken) == 12:  # the second epoch of depth 1: the epochs have five steps
            self.interrupts.pending = 15
        step(self, model, optimizer, training)

    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "step", interrupted)
        with pytest.raises(Interrupted):
            searched(folder, tmp_path / "stopped", **options)
    assert taken[-1] == 2
    data = load(f"imagefolder:{folder}", image_size=6, **options)
    gone_on = resume(tmp_path / "stopped", model=network(), dataset=data)
    assert same(weights(whole), weights(gone_on)) and whole.validation_accuracy == gone_on.validation_accuracy
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pictures")]


def test_a_picture_that_is_damaged_while_it_runs_is_an_event_and_too_many_stop_the_run(folder, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    arguments = ["--dataset", f"imagefolder:{folder}", "--loader", "torch", "--out", str(run), *COMMAND]
    kept = {name: (folder / "train" / "light" / name).read_bytes() for name in ("05.png", "06.png")}
    step = Recorder.step

    def damaging(self, *given):
        for name in kept:
            (folder / "train" / "light" / name).write_bytes(b"gone")
        step(self, *given)

    monkeypatch.setattr(Recorder, "step", damaging)
    try:
        assert main([*arguments, "--corrupt-limit", "2"]) == 2
    finally:
        for name, content in kept.items():
            (folder / "train" / "light" / name).write_bytes(content)
    said = capsys.readouterr()
    assert "so far 3 cannot be, and corrupt_limit is 2" in said.err and said.err.count("\n") == 1
    assert [event["text"].split("; ")[1] for event in events(run, "warning")] == [
        "another picture of its class stands in for it (2 of at most 2)"]


@pytest.mark.filterwarnings("ignore:.*stands in for it")
def test_a_student_grows_on_pictures(folder, tmp_path):
    runs = []
    for loader in ("resident", "torch"):
        data = load(f"imagefolder:{folder}", image_size=8, loader=loader)
        runs.append(grow("resnet20", data, budget="20k", out=tmp_path / loader, teacher_epochs=1, stage_epochs=1, retrain_epochs=1,
                         controls=["logits"], batch_size=16, threads=1, precision="fp32", augment="retrain"))
    assert same(*map(weights, runs)) and runs[0].controls == runs[1].controls


def test_loaders_that_cannot_be_are_refused_in_one_line(folder, capsys):
    for arguments, said in (
            (["--dataset", "digits", "--loader", "torch"], "error: loader: torch decodes picture files"),
            (["--dataset", f"imagefolder:{folder}", "--loader", "resident", "--crop", "random"], "error: loader: resident keeps"),
            (["--loader", "quick"], "error: data.loader: input should be 'auto', 'resident', 'dali' or 'torch'")):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith(said) and error.count("\n") == 1


@pytest.mark.filterwarnings("ignore:.*stands in for it")
def test_the_estimate_counts_the_reading_of_pictures(folder, monkeypatch):
    resident, streamed = (load(f"imagefolder:{folder}", image_size=6, loader=loader) for loader in ("resident", "torch"))
    read = streaming.read_picture
    monkeypatch.setattr(streaming, "read_picture", lambda file, mode: time.sleep(0.02) or read(file, mode))
    without, reading = (depth_rows(network(), data, 8, "fp32", "cpu")[0]["seconds_per_epoch"] for data in (resident, streamed))
    assert reading > without and reading > 52 * 0.02 / thread_count()


def test_the_doctor_names_dali_and_how_to_get_it(monkeypatch):
    if has_dali():
        assert dali_line().startswith("DALI: 2")
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert dali_line().startswith("DALI: not installed") and dali_line().endswith("pip install nvidia-dali-cuda130")
