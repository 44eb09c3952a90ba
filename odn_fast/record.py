"""The run folder: configuration, events, and checkpoints that survive a kill at any moment.

    config.yaml      the resolved configuration
    events.jsonl     one JSON object a line: every epoch and decision
    checkpoints/     NNNNNN.ckpt, the last two kept, and named states that are written once (warm-up, depth-01, ...)

Every file appears whole or not at all: written aside, flushed to disk, renamed. Checkpoints carry a SHA-256; they are
read with `weights_only=True`, so no pickle is executed.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import pickle
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

_MAGIC = b"odn_fast checkpoint 1\n"
_KEPT = 2


class RunError(RuntimeError):
    """A run that cannot go on; the message is one line that says what to do."""


class FolderError(RunError):
    """A folder that cannot hold a run, or does not; nothing was changed."""


class RunFolder:
    """One run's folder, locked against a second process while it is open.

    Attributes:
        path: the folder.
        warnings: what was odd when the folder was opened, one line each (a corrupt checkpoint passed over, ...).
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.warnings: list[str] = []
        self._lock = self._locked()
        self._events = self._opened(self.path / "events.jsonl")
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future | None = None

    @classmethod
    def create(cls, path: str | Path, config_text: str) -> "RunFolder":
        """A new run folder. Raises FolderError if it exists with something in it, or cannot be made."""
        path = Path(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                raise FolderError(f"out {path}: is not empty; name a new folder, or continue that run with --resume {path}")
            (path / "checkpoints").mkdir()
        except OSError as error:
            raise FolderError(f"out {path}: cannot be made ({error.strerror}); name a folder that can be written") from None
        run = cls(path)
        try:
            run.write("config.yaml", config_text.encode())
        except RunError as error:
            run.close()
            shutil.rmtree(path, ignore_errors=True)  # it holds nothing but what was made here
            raise FolderError(f"out {path}: {str(error).split(': ', 1)[1].split(';')[0]}; name a folder with room") from None
        return run

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """The folder of an earlier run. Raises FolderError if there is none, RunError if another process
        is at work in it."""
        path = Path(path)
        if not (path / "config.yaml").is_file():
            raise FolderError(f"resume {path}: is not a run folder (no config.yaml in it); give the folder that a run printed")
        run = cls(path)
        with run.reporting("checkpoints"):
            (path / "checkpoints").mkdir(exist_ok=True)
            for leftover in path.glob("**/.*.tmp"):  # of a process that was killed while it wrote
                leftover.unlink()
        return run

    def close(self):
        try:
            self.settle()
        finally:
            self._writer.shutdown()
            with contextlib.suppress(OSError):  # a full disk was reported when the event was written
                self._events.close()
            self._lock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def event(self, name: str, /, **values: Any):
        """Append one line to events.jsonl."""
        line = json.dumps({"event": name, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **values}, allow_nan=True)
        with self.reporting("events.jsonl"):
            self._events.write(line.encode() + b"\n")
            self._events.flush()

    def events(self) -> list[dict]:
        """All events so far, a torn last line left out. Raises RunError where another one is damaged."""
        events = []
        for number, line in enumerate((self.path / "events.jsonl").read_bytes().split(b"\n")[:-1], 1):
            try:
                events.append(json.loads(line))
            except ValueError:
                raise RunError(f"{self.path}/events.jsonl: line {number} is damaged; restore the file from a copy") from None
        return events

    def write(self, name: str, content: bytes):
        """Write a file of the folder, whole or not at all."""
        with self.reporting(name):
            write_atomically(self.path / name, content)

    def save_state(self, name: str, state: dict):
        """Write `checkpoints/<name>.ckpt`: tensors and plain values, checksummed."""
        self._write_state(name, _packed(state))

    def _write_state(self, name: str, payload: memoryview):
        digest = hashlib.sha256(payload).hexdigest().encode()
        with self.reporting(f"checkpoints/{name}.ckpt"):
            write_atomically(self.path / "checkpoints" / f"{name}.ckpt", _MAGIC, digest + b"\n", payload)

    def load_state(self, name: str) -> dict:
        """Read what `save_state` wrote. Raises RunError if it is missing or its checksum does not match."""
        path = self.path / "checkpoints" / f"{name}.ckpt"
        try:
            content = path.read_bytes()
        except OSError as error:
            raise RunError(f"{path}: cannot be read ({error.strerror})") from None
        head = len(_MAGIC) + 65
        if content[:len(_MAGIC)] != _MAGIC or hashlib.sha256(content[head:]).hexdigest().encode() != content[len(_MAGIC):head - 1]:
            raise RunError(f"{path}: is damaged (its checksum does not match)")
        try:
            return torch.load(io.BytesIO(content[head:]), weights_only=True, map_location="cpu")
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise RunError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None

    def save_checkpoint(self, state: dict):
        """Write the next numbered checkpoint and drop all but the last two. Events up to here belong to it.

        The state is copied before this returns; a thread waits for the disk, which takes longer than all else at an epoch's
        end. What goes wrong there is raised by the next checkpoint, `settle` or `close`.
        """
        payload = _packed({"events_bytes": self._events.tell(), "state": state})
        self.settle()
        self._writing = self._writer.submit(self._write_checkpoint, payload)

    def settle(self):
        """Wait until the last checkpoint is on the disk. Raises RunError where it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write_checkpoint(self, payload: memoryview):
        with self.reporting("events.jsonl"):
            os.fsync(self._events.fileno())
        numbers = self._numbers()
        number = numbers[-1] + 1 if numbers else 1
        self._write_state(f"{number:06}", payload)
        for old in numbers[:1 - _KEPT]:
            (self.path / "checkpoints" / f"{old:06}.ckpt").unlink(missing_ok=True)

    def load_checkpoint(self) -> dict | None:
        """The newest checkpoint that is whole, or None where there is none; events are cut back to it.

        A damaged one is passed over, renamed, and named in `warnings`. Raises RunError if every one is damaged, or if
        there is none although the run had come to a result at some depth or stage.
        """
        self.settle()
        numbers = self._numbers()
        damaged = []
        for number in reversed(numbers):
            try:
                saved = self.load_state(f"{number:06}")
            except RunError as error:
                damaged.append(number)
                self.warnings.append(f"{error}; falling back to the one before")
                continue
            self._cut_events(saved["events_bytes"])
            with self.reporting("checkpoints"):
                for old in damaged:
                    path = self.path / "checkpoints" / f"{old:06}.ckpt"
                    path.replace(path.with_suffix(".damaged"))
            return saved["state"]
        if damaged:
            raise RunError(f"{self.path}/checkpoints: none of {len(damaged)} can be read; start the search again in a new folder")
        if any(event["event"] in ("depth", "stage", "result") for event in self.events()):
            raise RunError(f"{self.path}/checkpoints: is empty, so there is nothing to go on from; its models and report stay "
                           "as they are: start a new run in another folder")
        self._cut_events(0)
        return None

    def drop_states(self, pattern: str):
        """Remove named states that are no longer needed from the last checkpoint on."""
        self.settle()
        for path in (self.path / "checkpoints").glob(f"{pattern}.ckpt"):
            path.unlink(missing_ok=True)

    def _numbers(self) -> list[int]:
        return sorted(int(path.stem) for path in (self.path / "checkpoints").glob("[0-9]*.ckpt") if path.stem.isdigit())

    def _cut_events(self, size: int):
        path = self.path / "events.jsonl"
        with self.reporting("events.jsonl"):
            content = path.read_bytes()
            lines = content[:size].split(b"\n")[:-1]
            # A reading of the test split stays on record even where the work around it is done again.
            lines += [line for line in content[size:].split(b"\n")[:-1] if b'"event": "test_reading"' in line]
            write_atomically(path, b"".join(line + b"\n" for line in lines))
        self._events.close()
        self._events = self._opened(path)

    def _locked(self) -> io.BufferedIOBase:
        lock = self._opened(self.path / ".lock")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise RunError(f"{self.path}: another process is at work in this run; wait for it, or stop it") from None
        except OSError as error:
            lock.close()
            raise FolderError(f"{self.path}: cannot be locked ({error.strerror}); name a folder on another file system") from None
        return lock

    def _opened(self, path: Path) -> io.BufferedIOBase:
        with self.reporting(path.name):
            return path.open("ab")

    @contextlib.contextmanager
    def reporting(self, name: str):
        """Turn an OSError of writing the file `name` into a RunError that says what to do."""
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            remedy = "free space" if full else "make the folder writable"
            raise RunError(f"{self.path / name}: cannot be written ({error.strerror}); nothing before it is lost: "
                           f"{remedy}, then go on with --resume {self.path}") from None


def _packed(state: dict) -> memoryview:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def write_atomically(path: Path, *parts: bytes):
    """Write `path` from byte strings so that it holds all of them or is untouched. Raises OSError."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with aside.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
