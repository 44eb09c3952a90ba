"""The run folder: whole files or none, checksums, the fall-back to the checkpoint before, the lock."""

import errno
import fcntl
import json
import os
import threading

import pytest
import torch

from odn_fast.record import FolderError, RunError, RunFolder, write_atomically


@pytest.fixture
def run(tmp_path):
    with RunFolder.create(tmp_path / "run", "model: resnet18\n") as folder:
        yield folder


def checkpoints(run):
    return sorted(path.name for path in (run.path / "checkpoints").iterdir())


def reopened(run):
    run.close()
    return RunFolder.open(run.path)


def failing(number):
    """A system call that fails with this error number."""
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


def test_checkpoints_come_back_and_two_are_kept(run):
    for step in range(4):
        run.save_checkpoint({"step": step, "weights": torch.full((3,), float(step))})
    run.settle()
    assert checkpoints(run) == ["000003.ckpt", "000004.ckpt"]
    with reopened(run) as again:
        state = again.load_checkpoint()
    assert state["step"] == 3 and torch.equal(state["weights"], torch.full((3,), 3.0)) and not again.warnings


def test_memory_format_survives(run):
    weights = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    run.save_state("warm-up", {"weights": weights})
    assert run.load_state("warm-up")["weights"].stride() == weights.stride()


@pytest.mark.parametrize("damage", [
    lambda data: data[:-1], lambda data: b"", lambda data: data[:40], lambda data: data[:-9] + b"\0" + data[-8:],
    lambda data: b"X" + data[1:]], ids=["shorter", "empty", "head only", "one byte", "magic"])
def test_damaged_newest_checkpoint_falls_back_and_says_so(run, damage):
    run.event("epoch", epoch=1)
    run.save_checkpoint({"step": 1})
    run.event("epoch", epoch=2)
    run.save_checkpoint({"step": 2})
    run.settle()
    path = run.path / "checkpoints" / "000002.ckpt"
    path.write_bytes(damage(path.read_bytes()))
    with reopened(run) as again:
        assert again.load_checkpoint() == {"step": 1}
        assert len(again.warnings) == 1 and "000002.ckpt: is damaged" in again.warnings[0]
        assert [event["epoch"] for event in again.events()] == [1]
        again.save_checkpoint({"step": 22})
    with RunFolder.open(run.path) as third:
        assert third.load_checkpoint() == {"step": 22}


def test_all_damaged_is_an_error(run):
    run.save_checkpoint({"step": 1})
    run.settle()
    (run.path / "checkpoints" / "000001.ckpt").write_bytes(b"nothing")
    with reopened(run) as again, pytest.raises(RunError, match="none of 1 can be read"):
        again.load_checkpoint()


def test_a_pickle_is_not_executed(run, tmp_path):
    import hashlib
    import io
    import pickle

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    buffer = io.BytesIO()
    torch.save({"weights": Attack()}, buffer, pickle_module=pickle)
    content = buffer.getvalue()
    head = b"odn_fast checkpoint 1\n" + hashlib.sha256(content).hexdigest().encode() + b"\n"
    (run.path / "checkpoints" / "warm-up.ckpt").write_bytes(head + content)
    with pytest.raises(RunError, match="cannot be read"):
        run.load_state("warm-up")
    assert not (tmp_path / "executed").exists()


def test_events_are_cut_back_to_the_checkpoint_and_a_torn_line_is_dropped(run):
    run.event("epoch", epoch=1)
    run.save_checkpoint({})
    run.event("epoch", epoch=2)
    with (run.path / "events.jsonl").open("ab") as file:
        file.write(b'{"event": "epo')
    with reopened(run) as again:
        again.load_checkpoint()
        again.event("epoch", epoch=3)
        assert [event["epoch"] for event in again.events()] == [1, 3]


def test_without_a_checkpoint_the_run_begins_anew(run):
    run.event("start")
    with reopened(run) as again:
        assert again.load_checkpoint() is None and again.events() == []


def test_left_overs_of_a_killed_write_are_removed(run):
    (run.path / "checkpoints" / ".000009.ckpt.tmp").write_bytes(b"half")
    with reopened(run):
        assert checkpoints(run) == []


def test_second_process_is_kept_out(run):
    with pytest.raises(RunError, match="another process is at work"):
        RunFolder.open(run.path)


def test_a_file_system_without_locks_is_named_as_such(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    with pytest.raises(FolderError, match="cannot be locked .No locks available.; name a folder on another file system"):
        RunFolder.create(tmp_path / "run", "")


def test_a_damaged_event_is_named_by_its_line(run):
    run.event("start")
    with (run.path / "events.jsonl").open("ab") as file:
        file.write(b"\0\0\0\n")
    run.event("epoch")
    with pytest.raises(RunError, match="events.jsonl: line 2 is damaged; restore the file from a copy"):
        run.events()


def test_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="is not empty"):
        RunFolder.create(tmp_path, "")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be made"):
        RunFolder.create(tmp_path / "file" / "run", "")


def test_full_disk_at_the_start_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", failing(errno.ENOSPC))
    with pytest.raises(FolderError, match="cannot be written .No space left on device.; name a folder with room"):
        RunFolder.create(tmp_path / "run", "model: resnet18")
    assert not list(tmp_path.iterdir())


def test_no_run_folder(tmp_path):
    with pytest.raises(RunError, match="is not a run folder"):
        RunFolder.open(tmp_path)


@pytest.mark.parametrize("noticed", ["settle", "close", "load_checkpoint", "save_checkpoint"])
def test_full_disk_leaves_the_last_checkpoint(run, monkeypatch, noticed):
    run.save_checkpoint({"step": 1})
    run.settle()

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing(errno.ENOSPC))
        run.save_checkpoint({"step": 2})
        with pytest.raises(RunError, match="No space left.*free space, then go on with --resume"):
            getattr(run, noticed)(*[{"step": 3}] * (noticed == "save_checkpoint"))
    assert checkpoints(run) == ["000001.ckpt"]
    with reopened(run) as again:
        assert again.load_checkpoint() == {"step": 1}


def test_a_state_may_change_while_it_is_written(run, monkeypatch):
    weights, written, fsync = torch.zeros(3), threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: written.wait(10) and fsync(file))
    run.save_checkpoint({"weights": weights})
    weights.add_(1)
    run.event("later")
    assert not checkpoints(run)
    written.set()
    with reopened(run) as again:
        assert not again.load_checkpoint()["weights"].any() and again.events() == []


def test_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def broken(_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old" and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_event_lines_are_json(run):
    run.event("epoch", loss=1.5, name="a\nb")
    line, = (run.path / "events.jsonl").read_text().splitlines()
    assert json.loads(line)["name"] == "a\nb"
