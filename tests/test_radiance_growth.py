"""Growth of a radiance field: its rules, its run folder, its result page, and that a killed run comes to the same bits."""

import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from odn_fast.config import ConfigError, GrowViewsConfig, flat, from_values, resolve
from odn_fast.data import DataError
from odn_fast.data.views import analytic_scene
from odn_fast.engine.radiance import CHUNK, chunked, distilled_loss, inner_loss, measure_layers, photometric_loss
from odn_fast.models.radiance import RadianceShape, create_field
from odn_fast.ops import channel_attention
from odn_fast.report import write_report
from odn_fast.report.grow_views import spread
from odn_fast.search import grow_views, load_field, radiance_phases, resume
from odn_fast.search.__main__ import main
from odn_fast.search.recorder import Recorder
from odn_fast.search.radiance_phases import budget_of, followed, room
from odn_fast.search.setup import load_data

TINY = ["--teacher", "4x16", "--start", "4", "--step", "6", "--size", "8", "--teacher-epochs", "3", "--stage-epochs", "2",
        "--retrain-epochs", "2", "--rays", "32", "--samples", "8", "--steps-per-epoch", "4", "--threads", "1", "--budget-share", "0.6"]
SETTINGS = {"teacher": "4x16", "start": 4, "step": 6, "size": 8, "teacher_epochs": 3, "stage_epochs": 2, "retrain_epochs": 2, "rays": 32,
            "samples": 8, "steps_per_epoch": 4, "threads": 1, "budget_share": 0.6}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return grow_views(out=tmp_path_factory.mktemp("runs") / "views", controls=["random", "half", "narrow"], **SETTINGS)


def events(folder, name=None):
    path = folder / "events.jsonl"
    found = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
    return [event for event in found if name in (None, event["event"])]


# ---- rules


FULL = RadianceShape.uniform(4, 16, 2, 1)


def test_a_layer_grows_by_a_step_up_to_the_teacher_s_width():
    shape = FULL.with_widths((4, 14, 16, 4))
    grown = room(shape, FULL, 6, FULL.params)
    assert grown[0].widths == (10, 14, 16, 4) and grown[1].widths == (4, 16, 16, 4)
    assert grown[2] == "it is as wide as the teacher's"


def test_the_budget_is_never_exceeded_and_the_end_is_near_it():
    shape = FULL.with_widths((4, 4, 4, 4))
    larger = shape.with_widths((4, 10, 4, 4)).params
    assert room(shape, FULL, 6, larger)[1].params == larger
    assert "would be beyond the budget" in room(shape, FULL, 6, larger - 1)[1]
    assert set(room(shape, FULL, 6, int(shape.params / 0.98)).values()) == {"the budget is used"}


def test_defaults_are_the_paper_s_proportions():
    config = resolve(from_values({"growth.teacher": "8x256"}, kind=GrowViewsConfig))
    assert (config.growth.start, config.growth.step, config.training.lr) == (32, 32, 5e-4)
    small = resolve(GrowViewsConfig())
    assert (small.growth.start, small.growth.step) == (8, 8) and budget_of(small) == RadianceShape.uniform(4, 64, 6, 2).params // 2


# ---- losses and measures


def test_chunks_hold_points_as_positions():
    layer = torch.randn(2 * CHUNK + 3, 5)
    maps = chunked(layer)
    assert maps.shape == (2, 5, CHUNK, 1) and maps.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(maps[1, :, 7, 0], layer[CHUNK + 7])
    assert chunked(layer[:10]).shape == (1, 5, 10, 1)


def test_r_is_the_distance_from_the_projected_teacher():
    student, teacher = torch.randn(CHUNK, 3).relu(), torch.randn(CHUNK, 7).relu()
    projected = channel_attention(chunked(student), chunked(teacher))
    torch.testing.assert_close(inner_loss(student, teacher), (chunked(student) - projected).square().mean())


def test_losses_fall_and_the_teacher_stays():
    scene = analytic_scene(8, train=2, validation=1, test=1)
    teacher = create_field(FULL, 0).requires_grad_(False)
    student = create_field(FULL.with_widths((4,) * 4), 1)
    rays, colours = followed(scene.train)
    x = torch.cat([rays, torch.full((len(rays), 8), 0.5)], 1)
    share = torch.tensor(1.0)
    loss = distilled_loss(2.0, 6.0, teacher, share)
    optimizer = torch.optim.Adam(student.parameters(), 5e-3)
    before = measure_layers(student, teacher, rays, 2.0, 6.0, 8)
    first = loss(student, x, colours)[0].detach()
    for _ in range(60):
        optimizer.zero_grad()
        loss(student, x, colours)[0].sum().backward()
        optimizer.step()
    last, after = loss(student, x, colours)[0].detach(), measure_layers(student, teacher, rays, 2.0, 6.0, 8)
    assert (last < first).all() and sum(each.R for each in after) < sum(each.R for each in before)
    torch.testing.assert_close(last[0].item(), sum(each.R for each in after) / 4, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(last[1:], photometric_loss(2.0, 6.0)(student, x, colours)[0].detach())
    share.zero_()
    assert loss(student, x, colours)[0][0] == 0 and all(parameter.grad is None for parameter in teacher.parameters())


def test_measures_do_not_depend_on_the_batch_and_know_nothing():
    rays, _ = followed(analytic_scene(16, train=1, validation=1, test=1).train)
    teacher, student = create_field(FULL, 0), create_field(FULL.with_widths((4,) * 4), 1)
    with torch.no_grad():
        student.hidden[1].weight.zero_(), student.hidden[1].bias.fill_(-1)
    one, other = (measure_layers(student, teacher, rays, 2.0, 6.0, 8, batch) for batch in (64, 128))
    for a, b in zip(one, other):
        assert a.to_dict() == pytest.approx(b.to_dict(), rel=1e-4)
    assert one[1].dead == 4 and one[1].mean_square == 0 and one[1].R == pytest.approx(one[1].R_zero)
    assert [each.collapsed for each in one] == [False, True, False, False]
    assert one[0].relative == pytest.approx(one[0].R / one[0].teacher_mean_square)


# ---- a run


def test_a_run_keeps_every_rule(result):
    folder, full = result.folder, RadianceShape.uniform(4, 16, 6, 2)
    stages, widened = events(folder, "stage"), events(folder, "widen")
    assert len(stages) == len(widened) == result.stages >= 2
    for stage, step, after in zip(stages, widened, [*stages[1:], None]):
        shape = RadianceShape.from_dict(stage["shape"])
        assert shape.params == stage["params"] <= budget_of(result.config)
        options = room(shape, full, 6, budget_of(result.config))
        able = [layer for layer, larger in options.items() if isinstance(larger, RadianceShape)]
        assert step["layer"] == max(able, key=lambda layer: stage["layers"][layer]["R"])
        assert tuple(step["widths"]) == options[step["layer"]].widths
        assert after is None or after["shape"]["widths"] == step["widths"]
    final = full.with_widths(result.widths)
    assert final.params == result.params <= budget_of(result.config) and tuple(widened[-1]["widths"]) == result.widths
    assert not any(isinstance(larger, RadianceShape) for larger in room(final, full, 6, budget_of(result.config)).values())


def test_controls_are_no_larger_and_trained_as_long(result):
    assert [each["name"] for each in result.controls] == ["random", "half", "narrow"]
    epochs = 2 * result.stages + 2
    for each in result.controls:
        assert each["params"] <= result.params and each["epochs"] == epochs and len(set(each["widths"])) == 1
        trained = [event for event in events(result.folder, "epoch") if event.get("control") == each["name"]]
        assert len(trained) == epochs
    assert result.controls[1]["widths"] == [8] * 4 and result.controls[0]["widths"] == result.controls[2]["widths"]


def test_test_views_are_read_once_by_every_field(result):
    assert [event["network"] for event in events(result.folder, "test_reading")] == [
        "teacher", "student", "control random", "control half", "control narrow"]


def test_the_artefact_is_the_student(result):
    from odn_fast.models.radiance import psnr, rendered

    field, views = load_field(result.folder / "model"), analytic_scene(8).test
    assert field.shape.widths == result.widths and sum(each.numel() for each in field.parameters()) == result.params
    images = rendered(field, views.rays(), 2.0, 6.0, 8).view_as(views.images)
    errors = (images - views.images).square().mean((1, 2, 3))
    assert sum(map(psnr, errors.tolist())) / len(errors) == pytest.approx(result.test_psnr, abs=1e-4)
    (result.folder / "elsewhere").mkdir()
    for name in ("radiance.json", "model.safetensors"):
        (result.folder / "elsewhere" / name).write_bytes((result.folder / "model" / name).read_bytes()[:200])
    for folder in (result.folder / "elsewhere", result.folder / "nothing"):
        with pytest.raises(ValueError, match="holds no radiance field that can be read"):
            load_field(folder)


def test_the_page_shows_every_field_and_every_stage(result):
    page = (result.folder / "report.html").read_text()
    assert page.count("<img") == 6 and page.count("data:image/png;base64,") == 6 and "http" not in page.replace("http-equiv", "")
    assert "mathdefault" not in page
    for words in ("A student of", f"{result.params:,}", "control random", "control narrow", "R layer 4 (width)", "first step ms", "rays/s"):
        assert words in page, words
    assert len(re.findall(r"<tr><td class='number'>\d+</td>", page)) == result.stages


def test_an_unfinished_run_has_a_page_that_says_so(result, tmp_path):
    lines = (result.folder / "events.jsonl").read_text().split("\n")[:-1]
    (tmp_path / "config.yaml").write_text((result.folder / "config.yaml").read_text())
    for count in (0, 1, 3, 5, 8, len(lines) - 3):
        (tmp_path / "events.jsonl").write_text("".join(line + "\n" for line in lines[:count]))
        assert "unfinished" in write_report(tmp_path).read_text()


@pytest.mark.parametrize("heights, apart", [
    ([0.2, 0.5, 0.51, 0.9], [0.2, 0.5, 0.58, 0.9]), ([0.96, 0.97, 1.0], [0.84, 0.92, 1.0]), ([], [])])
def test_names_of_layers_are_kept_apart(heights, apart):
    assert spread(heights, 0.08) == pytest.approx(apart)


def test_controls_larger_than_the_student_are_no_rivals(result, tmp_path):
    (tmp_path / "config.yaml").write_text((result.folder / "config.yaml").read_text())
    found = events(result.folder)
    larger = result.controls[0] | {"params": result.params + 1, "test_psnr": result.test_psnr + 1}
    worse = result.controls[2] | {"test_psnr": result.test_psnr - 1}
    for controls, words in (([larger], "no control of its size was trained"), ([larger, worse], "no control of its size did as well")):
        changed = [event | {"controls": controls} if event["event"] == "result" else event for event in found]
        (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in changed))
        assert words in write_report(tmp_path).read_text()


def test_a_student_that_says_little_is_named(result, tmp_path):
    (tmp_path / "config.yaml").write_text((result.folder / "config.yaml").read_text())
    found = events(result.folder)
    for event in found:
        if event["event"] == "stage":
            event["layers"] = [each | {"mean_square": (1.0, 0.5, 0.01, 0.001)[each["layer"]], "teacher_mean_square": 1.0}
                               for each in event["layers"]]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in found))
    assert "After the last stage layers 3 and 4 said less than 5" in write_report(tmp_path).read_text()


def test_a_layer_that_says_nothing_is_warned_of(tmp_path, monkeypatch):
    def silent(*arguments):
        first, *others = measure_layers(*arguments)
        return [replace(first, R=0.3, R_zero=0.3, entropy=1.0, mean_square=0.0), *others]

    monkeypatch.setattr(radiance_phases, "measure_layers", silent)
    few = SETTINGS | {"budget_share": 0.45, "teacher_epochs": 1, "stage_epochs": 1, "retrain_epochs": 1, "controls": []}
    found = grow_views(out=tmp_path / "run", **few)
    said = [event["text"] for event in events(found.folder, "warning")]
    assert len(said) == found.stages and said[0] == (
        "stage 1: layer 1 has collapsed: it says next to nothing (R 0.3 of 0.3 for silence), so R steers nothing")
    assert said[0] in (found.folder / "report.html").read_text()


def test_a_picture_in_a_foreign_events_file_cannot_leave_its_place(result, tmp_path):
    (tmp_path / "config.yaml").write_text((result.folder / "config.yaml").read_text())
    found = [event | {"picture": "'><script>"} if event["event"] == "test_reading" else event for event in events(result.folder)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in found))
    page = write_report(tmp_path).read_text()
    assert "<script" not in page and "its picture is damaged" in page


def test_a_finished_run_says_so_and_a_contradiction_is_refused(result, capsys):
    assert resume(result.folder).params == result.params
    assert main(["--resume", str(result.folder)]) == 0 and "is finished" in capsys.readouterr().out
    assert main(["grow-views", "--resume", str(result.folder), "--rays", "5"]) == 2
    assert "training.rays = 5 contradicts" in capsys.readouterr().err


def test_bf16_and_other_scores_run(tmp_path):
    few = SETTINGS | {"budget_share": 0.45, "teacher_epochs": 1, "stage_epochs": 1, "retrain_epochs": 1}
    for score in ("random", "relative"):
        found = grow_views(out=tmp_path / score, controls=[], precision="bf16", score=score, **few)
        assert found.stages >= 1 and found.controls == [] and found.test_psnr > 0


def test_a_nerf_synthetic_folder_is_read(tmp_path):
    from test_data_views import write

    for split in ("train", "val", "test"):
        write(tmp_path, split, angle=0.7, size=16)
    few = SETTINGS | {"budget_share": 0.45, "teacher_epochs": 1, "stage_epochs": 1, "retrain_epochs": 1}
    found = grow_views(tmp_path, out=tmp_path / "run", controls=["narrow"], **few)
    assert found.config.data.dataset == f"views:{tmp_path}" and "damaged" not in (tmp_path / "run" / "report.html").read_text()
    with pytest.raises(DataError, match="transforms_train.json: cannot be read"):
        grow_views(tmp_path / "nothing", out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


# ---- command line


@pytest.mark.parametrize("arguments, words", [
    (["--teacher", "64"], "growth.teacher: expected LAYERSxWIDTH, such as 4x64, got '64'"),
    (["--budget-share", "1.5"], "growth.budget_share"),
    (["--budget-share", "0.01"], "budget_share: 0.01 of the teacher's 24,420 parameters are too few"),
    (["--start", "65"], "start: expected at most 64"), (["--score", "s"], "growth.score"),
    (["--controls", "random,random"], "names one twice"),
    (["--views", "nowhere"], "transforms_train.json"),
    (["--set", "data.dataset=lego"], "data.dataset: expected analytic or views:FOLDER, got 'lego'"),
    (["--rays", "1"], "training.rays"), (["--set", "data.near=7"], "data.near"),
    (["--lr", "nan"], "training.lr"), (["--device", "cuda:77"], "not usable here")])
def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert main(["grow-views", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and words in error and not list(tmp_path.iterdir())


def test_help_names_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        main(["grow-views", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for setting in ("data.dataset", "growth.teacher", "growth.budget_share", "training.rays", "run.seed"):
        assert f"(default: {flat(GrowViewsConfig())[setting]})" in text, setting


def test_near_and_far_are_those_asked_for():
    scene = load_data(from_values({"data.near": 2.5, "data.far": 5.5, "data.size": 8}, kind=GrowViewsConfig))
    assert (scene.near, scene.far) == (2.5, 5.5)


def test_settings_that_are_none_are_named():
    with pytest.raises(ConfigError, match="speed: no such setting"):
        grow_views(speed=3)


class Killed(BaseException):
    """What happens to a process that gets no time to save anything."""


def test_a_killed_run_comes_to_the_same_bits(tmp_path, monkeypatch):
    """Killed at drawn steps, before their checkpoint, and once as a real process: weights and figures are those of an
    undisturbed run."""
    few = SETTINGS | {"budget_share": 0.45, "controls": ["random"], "checkpoint_minutes": 1e-6}
    steps, dies_at = [0], set()
    step = Recorder.step

    def counted(*arguments):
        steps[0] += 1
        if steps[0] in dies_at:
            raise Killed
        step(*arguments)

    monkeypatch.setattr(Recorder, "step", counted)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    grow_views(out=straight, **few)
    seed = random.randrange(10**6)
    print("kill points drawn with seed", seed)
    dies_at.update(random.Random(seed).sample(range(8, steps[0]), 6))
    steps[0] = 0
    child = subprocess.Popen([sys.executable, "-m", "odn_fast.search", "grow-views", *TINY, "--budget-share", "0.45", "--controls",
                              "random", "--checkpoint-minutes", "1e-6", "--out", str(killed)], stdout=subprocess.DEVNULL)
    while child.poll() is None and len(events(killed, "epoch")) < 2:
        time.sleep(0.002)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    while not events(killed, "result"):
        with contextlib.suppress(Killed):
            resume(killed)
    for name in ("model/model.safetensors", "model/radiance.json"):
        assert (straight / name).read_bytes() == (killed / name).read_bytes(), name
    kept = [[plain(event) for event in events(folder) if event["event"] in ("epoch", "stage", "widen", "control")]
            for folder in (straight, killed)]
    assert kept[0] == kept[1]
    assert any(event["step"] for event in events(killed, "resume"))  # one at least went on within an epoch


def plain(event):
    """An event without its times."""
    return {key: value for key, value in event.items() if key not in ("time", "seconds", "first_step_seconds", "images_per_second")}
