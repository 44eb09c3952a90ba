"""Whole searches on a GPU: every phase of them runs there, captured or not, and a run that was killed goes on there."""

import json

import pytest

import odn_fast.report
from odn_fast.search import expand, grow, grow_views, resume
from odn_fast.search.recorder import Recorder

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
EXPAND = {"model": "resnet18", "dataset": "digits", "limit_train": 150, "batch_size": 32, "max_depth": 2, "epochs_cap": 2, "target": 100,
          "warm_up_epochs": 1, "measure_warm_up": True}
GROW = {"teacher": "resnet20", "dataset": "digits", "limit_train": 150, "batch_size": 32, "teacher_epochs": 2, "stage_epochs": 2,
        "retrain_epochs": 2, "budget": "40k", "controls": ["logits"]}


class Killed(Exception):
    """In place of a signal that leaves no time."""


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(odn_fast.report, "write_report", lambda folder: folder)


def losses(result):
    """By what was trained, in order, the losses of every epoch; one that was begun again counts once."""
    events = map(json.loads, (result.folder / "events.jsonl").read_text().splitlines())
    return {tuple(event.get(key) for key in ("phase", "depth", "stage", "control", "epoch")): event["losses"]
            for event in events if event["event"] == "epoch"}


def check_near(got, wanted):
    """A GPU's libraries need not add up in one order."""
    assert got.keys() == wanted.keys() and wanted
    for place, each in wanted.items():
        assert got[place] == pytest.approx(each, rel=0.1, abs=0.05), place


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_depths_captured_and_step_by_step(tmp_path, precision):
    captured, eager = (expand(**EXPAND, precision=precision, device=DEVICE, capture=capture, out=tmp_path / str(capture))
                       for capture in (True, False))
    assert captured.network is not None and 0 <= captured.test_accuracy <= 100
    searched = {place: each for place, each in losses(eager).items() if place[0] != "fine_tune"}  # which may end earlier
    check_near({place: each for place, each in losses(captured).items() if place in searched}, searched)


@pytest.mark.parametrize("augment", ["none", "both"])
def test_growth_captured_and_step_by_step(tmp_path, augment):
    captured, eager = (grow(**GROW, augment=augment, device=DEVICE, capture=capture, out=tmp_path / str(capture))
                       for capture in (True, False))
    assert captured.stages == eager.stages >= 1 and captured.params > 0
    first = {place: each for place, each in losses(eager).items() if place[0] in ("teacher", "stage") and not place[2]}
    check_near({place: each for place, each in losses(captured).items() if place in first}, first)


def test_radiance_fields_grow(tmp_path):
    result = grow_views(teacher="4x16", start=4, step=6, size=8, rays=32, samples=8, steps_per_epoch=4, teacher_epochs=2, stage_epochs=2,
                        retrain_epochs=2, budget_share=0.6, device=DEVICE, out=tmp_path / "run")
    assert result.stages >= 1 and all(len(each) for each in losses(result).values())


@pytest.mark.parametrize("search, settings", [(expand, EXPAND), (grow, GROW)], ids=["depths", "growth"])
def test_a_killed_run_goes_on(tmp_path, monkeypatch, search, settings):
    straight, steps, step = search(**settings, device=DEVICE, out=tmp_path / "straight"), [], Recorder.step

    def killed_in_its_second_epoch(self, model, optimizer, training):
        step(self, model, optimizer, training)
        steps.append(training.step)
        if len(steps) == 8:
            raise Killed

    monkeypatch.setattr(Recorder, "step", killed_in_its_second_epoch)
    with pytest.raises(Killed):
        search(**settings, device=DEVICE, checkpoint_minutes=1e-9, out=tmp_path / "run")
    monkeypatch.setattr(Recorder, "step", step)
    result = resume(tmp_path / "run")
    first = dict(list(losses(straight).items())[:2])
    check_near({place: each for place, each in losses(result).items() if place in first}, first)
