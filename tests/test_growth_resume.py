"""Growth killed at any moment and resumed: the same bits; and what a resumed run says and refuses."""

import json
import random
import signal
import time

import pytest
from test_resume import events, finish, start, wait_for_events

from odn_fast.record import RunFolder

ARGUMENTS = ["grow", "--limit-train", "100", "--batch-size", "20", "--set", "teacher.epochs=2", "--stage-epochs", "2",
             "--retrain-epochs", "2", "--budget", "65k", "--threads", "1", "--seed", "3"]
OFTEN = ["--checkpoint-minutes", "0.0002"]  # every 12 ms: kills fall between steps of an epoch, too
TIMES = ("time", "seconds", "first_step_seconds", "step_ms", "images_per_second", "latency_ms", "latency_low_ms", "latency_high_ms")


def without_times(run):
    """All events but those of stopping and going on, without what differs from run to run."""
    def kept(value):
        if isinstance(value, dict):
            return {key: kept(entry) for key, entry in value.items() if key not in TIMES}
        return value
    found = [kept(event) for event in events(run) if event["event"] not in ("resume", "warning")]
    readings = [event for event in found if event["event"] == "test_reading"]  # done again where a kill fell right behind it
    return [event for event in found if event not in readings], {json.dumps(event) for event in readings}


def student(run):
    """The artefact's weights, byte for byte."""
    return (run / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("arguments", [
    ["--precision", "fp32", "--controls", "labels"],
    ["--precision", "auto", "--controls", "logits", "--augment", "both", "--score", "random", "--cache-gib", "0"]], ids=["fp32", "auto"])
def test_killed_at_random_points_gives_the_same_bits(tmp_path, arguments):
    base = [*ARGUMENTS, *arguments, *OFTEN]
    finish(*base, "--out", tmp_path / "straight")
    expected = without_times(tmp_path / "straight")
    seed = random.randrange(10**6)
    print("kill points drawn with seed", seed)
    draw, run, kills = random.Random(seed), tmp_path / "killed", 0
    child = start(*base, "--out", run)
    for count in sorted(draw.sample(range(1, len(expected[0]) - 1), 4)):
        wait_for_events(child, run, count)
        time.sleep(draw.uniform(0, 0.05))
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            kills += 1
        child.communicate()
        child = start("--resume", run)
    output, errors = child.communicate(timeout=300)
    assert child.returncode == 0, output + errors
    assert kills >= 2
    assert student(run) == student(tmp_path / "straight")
    assert without_times(run) == expected


def test_a_signal_saves_the_step_and_the_run_goes_on_without_naming_its_kind(tmp_path):
    run = tmp_path / "run"
    child = start(*ARGUMENTS, "--controls", "none", "--limit-train", "1000", "--out", run)  # 50 steps an epoch
    wait_for_events(child, run, 6)
    child.send_signal(signal.SIGTERM)
    output, errors = child.communicate(timeout=60)
    assert child.returncode == 143, output + errors
    assert f"--resume {run}" in errors and "Traceback" not in errors
    with RunFolder.open(run) as folder:
        assert folder.load_checkpoint()["state"]["phase"] in ("teacher", "stage")

    refused = finish("--resume", run, "--set", "growth.c=0.7", status=2)
    assert "growth.c = 0.7 contradicts the run's 0.5" in refused.stderr
    refused = finish("--resume", run, "--set", "search.tolerance=1", status=2)
    assert "search.tolerance: no such setting; settings are kind" in refused.stderr
    config = run / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("stage_epochs: 2", "stage_epochs: 3"))
    refused = finish("--resume", run, status=2)
    assert "growth.stage_epochs = 3 differs from the 2 that the run was made with" in refused.stderr
    config.write_text(text)

    done = finish("--resume", run)
    assert "resumed at " in done.stdout and "grown: " in done.stdout and "report:" in done.stdout
    again = finish("grow", "--resume", run)
    assert "is finished" in again.stdout
