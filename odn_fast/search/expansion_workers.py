"""Trainings of several depths at once, each in a thread of its own, in one process: the data is there once.

A thread of its own has its own copy of the network, optimizer, state and recorder, its own number of OpenMP threads (a
thread-local setting), autocast and gradient modes (thread-local, too), and on a GPU its own stream. So a depth comes to the
same bits as alone. Everything else (choosing depths, tracing networks, measuring, writing models) is done by the thread that
coordinates them, while they stand still where that matters.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

import torch

_WAIT = 0.2  # seconds after which the coordinating thread looks up: signals are handled in it


class Cancelled(Exception):
    """A training is not needed any more."""


class Pause:
    """Lets trainings run, or the coordinating thread alone.

    `torch.fx` patches `nn.Module` while it traces, so no other thread may call a module then; and latency is that of a
    machine with nothing else to do.
    """

    def __init__(self):
        self._changed = threading.Condition()
        self._running, self._asked = 0, False

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around everything that a training does in its thread."""
        self._enter()
        try:
            yield
        finally:
            self._leave()

    def look_up(self):
        """Called by a training where it can stand still; waits while the coordinating thread wants to be alone."""
        if self._asked:
            self._leave()
            self._enter()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """In the coordinating thread: entered when every training stands still or has ended."""
        with self._changed:
            self._asked = True
        try:
            with self._changed:
                while self._running:
                    self._changed.wait(_WAIT)
            yield
        finally:
            with self._changed:
                self._asked = False
                self._changed.notify_all()

    def _enter(self):
        with self._changed:
            self._changed.wait_for(lambda: not self._asked)
            self._running += 1

    def _leave(self):
        with self._changed:
            self._running -= 1
            self._changed.notify_all()


@dataclass
class Crew:
    """The trainings under way, by depth, and how they are told to stop.

    Attributes:
        threads: OpenMP threads of each.
        device: where they run.
    """

    threads: int
    device: str
    pause: Pause = field(default_factory=Pause)
    _running: dict[int, threading.Thread] = field(default_factory=dict)
    _cancelled: set[int] = field(default_factory=set)
    _stopping: bool = False
    _ended: SimpleQueue = field(default_factory=SimpleQueue)

    @property
    def depths(self) -> set[int]:
        return set(self._running)

    def start(self, depth: int, train: Callable[[], str]):
        """Train in a thread; its result comes from `next_ended`."""
        thread = threading.Thread(target=self._work, args=(depth, train), name=f"depth {depth}", daemon=True)
        self._running[depth] = thread
        thread.start()

    def cancel(self, depth: int):
        """Let the training of a depth end at its next step, with `Cancelled`."""
        self._cancelled.add(depth)

    def look_up(self, depth: int):
        """Called by the training of `depth` after every step: waits in a pause; raises `Cancelled`."""
        if self._stopping or depth in self._cancelled:
            raise Cancelled
        self.pause.look_up()

    def next_ended(self) -> tuple[int, str | BaseException]:
        """Wait for a training to end: its depth, and its outcome or what it raised."""
        while True:
            with contextlib.suppress(Empty):
                depth, outcome = self._ended.get(timeout=_WAIT)
                self._running.pop(depth).join()
                return depth, outcome

    def stop(self):
        """Let every training end at its next step, without saving; returns when all have."""
        self._stopping = True
        while self._running:
            self.next_ended()

    def _work(self, depth: int, train: Callable[[], str]):
        outcome: Any
        try:
            torch.set_num_threads(self.threads)
            with self.pause.running(), _own_stream(self.device):
                outcome = train()
        except BaseException as error:  # goes to the coordinating thread, whatever it is
            outcome = error
        self._ended.put((depth, outcome))


@contextlib.contextmanager
def _own_stream(device: str) -> Iterator[None]:
    """On a GPU, a stream beside those of other threads; what it was given is done when this is left."""
    if torch.device(device).type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):
        try:
            yield
        finally:
            stream.synchronize()
