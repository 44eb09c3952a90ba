"""Kill a real process at any moment, resume it, and compare the bits."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from odn_fast.record import RunFolder

ARGUMENTS = ["--limit-train", "200", "--batch-size", "20", "--warm-up-epochs", "1", "--max-depth", "2",
             "--target-accuracy", "99.9", "--tolerance", "0", "--threads", "1", "--seed", "3"]
EXACT = ["--epochs-per-depth", "4,3"]  # no fine-tuning
CAPPED = ["--epochs-cap", "2", "--limit-train", "60"]  # with fine-tuning, on fewer images
OFTEN = ["--checkpoint-minutes", "0.0005"]  # every 30 ms: kills fall between steps of an epoch, too


def command(*arguments):
    return [sys.executable, "-m", "odn_fast.search", *map(str, arguments)]


def finish(*arguments, status=0):
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def start(*arguments):
    return subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_events(child, run, count):
    """Until events.jsonl has `count` lines or the child has ended."""
    path = run / "events.jsonl"
    while child.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < count):
        time.sleep(0.005)


def weights(run):
    found = {path.relative_to(run): path.read_bytes() for path in run.glob("**/model.safetensors")}
    assert len(found) >= 2
    return found


def epochs(run):
    """Every epoch's figures without its times."""
    keep = ("phase", "depth", "epoch", "losses", "train_accuracies", "validation_accuracy", "lr", "counter", "improved")
    lines = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [{key: line[key] for key in keep} for line in lines if line["event"] == "epoch"]


@pytest.mark.parametrize("precision, arguments", [("auto", EXACT), ("fp32", CAPPED)], ids=["exact-auto", "capped-fp32"])
def test_killed_at_random_points_gives_the_same_bits(tmp_path, precision, arguments):
    base = [*ARGUMENTS, *arguments, *OFTEN, "--precision", precision]
    finish(*base, "--out", tmp_path / "straight")
    seed = random.randrange(10**6)
    print("kill points drawn with seed", seed)
    draw, run, kills = random.Random(seed), tmp_path / "killed", 0
    child = start(*base, "--out", run)
    for events in sorted(draw.sample(range(2, 10), 4)):
        wait_for_events(child, run, events)
        time.sleep(draw.uniform(0, 0.15))
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            kills += 1
        child.communicate()
        child = start("--resume", run)
    output, errors = child.communicate(timeout=300)
    assert child.returncode == 0, output + errors
    assert kills >= 3
    assert weights(run) == weights(tmp_path / "straight")
    assert epochs(run) == epochs(tmp_path / "straight")


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_and_says_how_to_go_on(tmp_path, number, status):
    run = tmp_path / "run"
    child = start(*ARGUMENTS, *EXACT, "--out", run)
    wait_for_events(child, run, 4)
    child.send_signal(number)
    output, errors = child.communicate(timeout=60)
    assert child.returncode == status, output + errors
    assert f"--resume {run}" in errors and "Traceback" not in errors
    resumed = start("--resume", run)
    wait_for_events(resumed, run, 8)
    resumed.send_signal(signal.SIGTERM)
    output, _ = resumed.communicate(timeout=60)
    assert "resumed in phase" in output


def stopped_run(tmp_path):
    run = tmp_path / "run"
    child = start(*ARGUMENTS, *EXACT, "--out", run)
    wait_for_events(child, run, 6)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    return run


def test_resume_refuses_what_contradicts_and_falls_back_from_damage(tmp_path):
    run = stopped_run(tmp_path)
    refused = finish("--resume", run, "--model", "resnet34", status=2)
    assert "model = resnet34 contradicts the run's resnet18" in refused.stderr
    refused = finish("--resume", run, "--out", tmp_path / "other", status=2)
    assert "takes neither --config nor --out" in refused.stderr

    config = run / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("batch_size: 20", "batch_size: 25"))
    refused = finish("--resume", run, status=2)
    assert "training.batch_size = 25 differs from the 20 that the run was made with" in refused.stderr
    config.write_text(text)

    newest = sorted((run / "checkpoints").glob("0*.ckpt"))[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    done = finish("--resume", run, "--threads", "1")
    assert f"{newest.name}: is damaged" in done.stdout and "falling back to the one before" in done.stdout
    again = finish("--resume", run)
    assert "is finished" in again.stdout


def test_a_full_disk_loses_nothing(tmp_path):
    """A limit on the size of files stands in for the disk: the first checkpoint above it fails to be written."""
    run = tmp_path / "run"
    limited = subprocess.run(
        ["bash", "-c", 'ulimit -f 60000; exec "$@"', "bash", *command(*ARGUMENTS, *EXACT, "--out", run)],
        capture_output=True, text=True, timeout=300)
    assert limited.returncode == 1 and "Traceback" not in limited.stderr, limited.stdout + limited.stderr
    assert "cannot be written (File too large); nothing before it is lost" in limited.stderr
    assert not list(run.glob("**/.*.tmp"))
    done = finish("--resume", run)
    assert "report:" in done.stdout


def test_resume_warns_where_it_cannot_keep_the_promise(tmp_path):
    run = stopped_run(tmp_path)
    with RunFolder.open(run) as folder:
        saved = folder.load_checkpoint()
        saved["environment"]["torch"] = "1.0"
        folder.save_checkpoint(saved)
    done = finish("--resume", run)
    assert f"torch is {torch.__version__}, the run was made with 1.0" in done.stdout


def test_two_processes_do_not_share_a_run(tmp_path):
    run = tmp_path / "run"
    child = start(*ARGUMENTS, *EXACT, "--out", run)
    wait_for_events(child, run, 3)
    refused = finish("--resume", run, status=1)
    child.kill()
    child.communicate()
    assert "another process is at work in this run" in refused.stderr
