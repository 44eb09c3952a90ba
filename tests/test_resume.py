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
CAPPED = ["--epochs-cap", "2", "--limit-train", "100", "--batch-size", "5"]  # with fine-tuning, on fewer images, in as many steps
OFTEN = ["--checkpoint-minutes", "0.0005"]  # every 30 ms: kills fall between steps of an epoch, too


def command(*arguments):
    return [sys.executable, "-m", "odn_fast.search", *map(str, arguments)]


def finish(*arguments, status=0):
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def start(*arguments):
    """A child that heeds Ctrl-C, also where these tests run with it ignored."""
    return subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))


def wait_for_events(child, run, count):
    """Until events.jsonl has `count` lines or the child has ended."""
    path = run / "events.jsonl"
    while child.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < count):
        time.sleep(0.005)


def events(run):
    """The events so far, a torn last line left out."""
    path = run / "events.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def wait_for_step(child, run):
    """Until a checkpoint has been written within an epoch: the second after an event, as the first may be of the epoch it ended."""
    def seen():
        return sorted((run / "checkpoints").glob("0*.ckpt"))[-1:], (run / "events.jsonl").stat().st_size
    (newest, size), written = seen(), 0
    while child.poll() is None and written < 2:
        before, (newest, size) = (newest, size), seen()
        written = 0 if size != before[1] else written + (newest != before[0])
        time.sleep(0.002)


def wait_for_resume(child, run, resumed_at):
    """Until the child has said where it goes on, or has ended; adds that event to `resumed_at`."""
    while child.poll() is None:
        if found := [event for event in events(run) if event["event"] == "resume"]:
            resumed_at.append(found[-1])
            return
        if any(event["event"] == "table" for event in events(run)) and not list((run / "checkpoints").glob("0*.ckpt")):
            return  # killed before the first checkpoint, it begins anew
        time.sleep(0.01)


def weights(run):
    found = {path.relative_to(run): path.read_bytes() for path in run.glob("**/model.safetensors")}
    assert len(found) >= 2
    return found


def epochs(run):
    """Every epoch's figures without its times."""
    keep = ("phase", "depth", "epoch", "losses", "train_accuracies", "validation_accuracy", "lr", "counter", "improved")
    return [{key: event[key] for key in keep} for event in events(run) if event["event"] == "epoch"]


@pytest.mark.parametrize("precision, arguments, phase", [("auto", EXACT, "search"), ("fp32", CAPPED, "fine_tune")],
                         ids=["exact-auto", "capped-fp32"])
def test_killed_at_random_points_gives_the_same_bits(tmp_path, precision, arguments, phase):
    """Four kills: early ones by the count of events, the last in the phase named; all within steps, not at their ends."""
    base = [*ARGUMENTS, "--limit-train", "400", *arguments, *OFTEN, "--precision", precision]
    finish(*base, "--out", tmp_path / "straight")
    seed = random.randrange(10**6)
    print("kill points drawn with seed", seed)
    draw, run, kills, resumed_at = random.Random(seed), tmp_path / "killed", 0, []
    child = start(*base, "--out", run)
    late = 3 + sum(event["event"] == "epoch" and event["phase"] != phase for event in events(tmp_path / "straight"))
    for count in [*sorted(draw.sample(range(2, 8), 3)), draw.randrange(late + 1, late + 5)]:
        wait_for_events(child, run, count)
        time.sleep(draw.uniform(0, 0.15))
        if kills:
            wait_for_step(child, run)
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            kills += 1
        child.communicate()
        child = start("--resume", run)
        wait_for_resume(child, run, resumed_at)
    output, errors = child.communicate(timeout=300)
    assert child.returncode == 0, output + errors
    assert kills >= 3
    assert any(event["step"] > 0 for event in resumed_at), resumed_at  # one at least went on within an epoch
    assert weights(run) == weights(tmp_path / "straight")
    assert epochs(run) == epochs(tmp_path / "straight")


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_and_says_how_to_go_on(tmp_path, number, status):
    run = tmp_path / "run"
    child = start(*ARGUMENTS, *EXACT, "--limit-train", "1000", "--out", run)  # 50 steps an epoch
    wait_for_events(child, run, 4)
    time.sleep(0.1)
    child.send_signal(number)
    output, errors = child.communicate(timeout=60)
    assert child.returncode == status, output + errors
    assert f"--resume {run}" in errors and "Traceback" not in errors
    with RunFolder.open(run) as folder:
        training = folder.load_checkpoint()["state"]["training"]
    assert training["step"] > 0  # no checkpoint of an epoch's end


@pytest.mark.parametrize("count", [0, 1])
def test_a_signal_before_training_is_no_traceback(tmp_path, count):
    """While the data is read, and while depths are timed."""
    run = tmp_path / "run"
    child = start(*ARGUMENTS, *EXACT, "--out", run)
    while child.poll() is None and not (run / "config.yaml").exists():
        time.sleep(0.005)
    wait_for_events(child, run, count)
    child.send_signal(signal.SIGTERM)
    output, errors = child.communicate(timeout=60)
    assert child.returncode == 143 and f"--resume {run}" in errors and "Traceback" not in errors, output + errors


def stopped_run(tmp_path, *arguments):
    run = tmp_path / "run"
    child = start(*ARGUMENTS, *(arguments or EXACT), "--out", run)
    wait_for_events(child, run, 6)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    return run


def test_resume_refuses_what_contradicts_and_falls_back_from_damage(tmp_path, monkeypatch):
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
    monkeypatch.chdir(tmp_path)  # a run is resumed from any folder
    done = finish("--resume", run, "--threads", "1")
    assert f"{newest.name}: is damaged" in done.stdout and "falling back to the one before" in done.stdout
    assert any("is damaged" in event["text"] for event in events(run) if event["event"] == "warning")
    again = finish("--resume", run)
    assert "is finished" in again.stdout


def test_a_full_disk_loses_nothing(tmp_path):
    """A limit on the size of files stands in for the disk: checkpoints of depth 1 fit, the next depth's does not."""
    run = stopped_run(tmp_path, "--warm-up-epochs", "0", "--epochs-per-depth", "20,2")
    before = {path.name for path in run.glob("checkpoints/0*.ckpt")}
    largest = max(path.stat().st_size for path in run.glob("checkpoints/0*.ckpt"))
    limited = subprocess.run(["bash", "-c", f'ulimit -f {largest * 3 // 2 // 1024}; exec "$@"', "bash", *command("--resume", run)],
                             capture_output=True, text=True, timeout=300)
    assert limited.returncode == 1 and "Traceback" not in limited.stderr, limited.stdout + limited.stderr
    assert "cannot be written (File too large); nothing before it is lost" in limited.stderr
    assert not list(run.glob("**/.*.tmp")) and before
    done = finish("--resume", run)
    assert "resumed in phase search" in done.stdout and "report:" in done.stdout


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
    writing = run / "checkpoints" / ".000099.ckpt.tmp"
    writing.write_bytes(b"half of a checkpoint")
    refused = finish("--resume", run, status=1)
    still_there = writing.exists()
    child.kill()
    child.communicate()
    assert "another process is at work in this run" in refused.stderr and still_there
