"""What happens at every step and epoch of a training: events, checkpoints, progress, and a clean stop."""

import copy
import threading
import time
from collections.abc import Callable
from typing import Any

from torch import nn, optim

from ..data import Source
from ..engine import Convergence, Interrupted, Interrupts, StoppingRule, Training
from ..record import RunFolder
from .display import Display, Silent
from .state import State


class Recorder:
    """Follows the trainings of one run; given to `fit` as its record.

    Args:
        header: stored with every checkpoint, to be compared on resume (config, environment, data).
        checkpoint_minutes: longest time between checkpoints within an epoch.

    Attributes:
        lock: held while events are written that belong together with a checkpoint, where trainings run beside each other.
    """

    def __init__(self, folder: RunFolder, display: Display | Silent, interrupts: Interrupts, state: State,
                 header: dict, checkpoint_minutes: float):
        self.interrupts, self.lock = interrupts, threading.RLock()
        self._folder, self._display, self._state = folder, display, state
        self._header, self._minutes = header, checkpoint_minutes
        self._started = self._saved = time.monotonic()
        self._before = state.seconds
        self._things, self._unit = "images", "%"
        self._store: Callable[[], None] | None = None
        self._look_up: Callable[[], None] = lambda: None

    def beside(self, state: State, store: Callable[[], None], look_up: Callable[[], None]) -> "Recorder":
        """A recorder of the same run for a training in a thread of its own, one of several.

        Args:
            state: of that training alone.
            store: makes part of the run's state of it, and writes the checkpoint; called with `lock` held.
            look_up: called after every step, without `lock`; may wait, or raise to end the training.
        """
        other = copy.copy(self)
        other._state, other._store, other._look_up = state, store, look_up
        other._saved = time.monotonic()
        return other

    def measured_in(self, things: str, unit: str):
        """What a run's batches are made of, and the unit of what it reads on validation."""
        self._things, self._unit = things, unit

    def begin(self, batches: Source, rule: StoppingRule, title: str, goal: Callable[[Training], str]):
        """Tell of the training to come, so that progress can be shown: its name, and what it is after."""
        self._batches, self._rule, self._title, self._goal = batches, rule, title, goal
        self._epoch_started, self._first_step = None, 0

    def seconds(self) -> float:
        """Time spent on this run so far, in all its processes."""
        return self._before + time.monotonic() - self._started

    def step(self, model: nn.Module, optimizer: optim.Optimizer, training: Training):
        self.waiting(model, optimizer, training)
        now = time.monotonic()
        if now - self._saved > 60 * self._minutes:
            self._save(model, optimizer)
        if self._epoch_started is None:
            self._epoch_started, self._first_step = now, training.step
            return
        steps = training.step - self._first_step
        rate = steps / max(now - self._epoch_started, 1e-9)
        self._display.step(self._title,
                           f"{self._where(training.epoch + 1)}, step {training.step}/{self._batches.steps_per_epoch}, "
                           f"{rate * self._batches.images_per_epoch / self._batches.steps_per_epoch:,.0f} {self._things}/s, "
                           f"{self._goal(training)}, {(self._batches.steps_per_epoch - training.step) / rate:.0f} s to "
                           "the end of the epoch" if steps else "")

    def waiting(self, model: nn.Module, optimizer: optim.Optimizer, training: Training):
        self._look_up()
        if self.interrupts.pending is not None:
            self._save(model, optimizer)
            raise Interrupted(self.interrupts.pending)

    def epoch(self, model: nn.Module, optimizer: optim.Optimizer, training: Training, summary: dict):
        self._epoch_started = None
        with self.lock:
            self._folder.event("epoch", **self._state.place, epoch=training.epoch, **summary,
                               best_accuracy=training.best_accuracy, counter=training.counter)
            self._save(model, optimizer)
        loss = summary["losses"][-1]
        line = f"{self._where(training.epoch)}: loss {loss:.4f}"
        if summary["validation_accuracy"] is not None:
            line += f", validation {summary['validation_accuracy']:.2f} {self._unit}"
        line += f", {self._goal(training)}"
        if summary["images_per_second"]:
            line += f", {summary['images_per_second']:,.0f} {self._things}/s"
        self._display.epoch(self._title, line + self._time_left(training, summary["seconds"]))
        self.waiting(model, optimizer, training)

    def warn(self, text: str):
        """On the screen and in the events."""
        self._display.warning(text)
        self._folder.event("warning", text=text)

    def checkpoint(self):
        """Save the state as it stands, outside a training."""
        self._state.seconds = self.seconds()
        self._folder.save_checkpoint({**self._header, "state": self._state.to_dict()})
        self._saved = time.monotonic()

    def _save(self, model: nn.Module, optimizer: optim.Optimizer):
        self._state.model, self._state.optimizer = model.state_dict(), optimizer.state_dict()
        with self.lock:
            (self._store or self.checkpoint)()
        self._saved = time.monotonic()

    def _where(self, epoch: int) -> str:
        last = self._rule.epochs
        return f"{self._title}, epoch {epoch}" + (f"/{last}" if last else "")

    def _time_left(self, training: Training, seconds: float) -> str:
        last, may_end_before = self._rule.epochs, isinstance(self._rule, Convergence)
        if last is not None:
            return f", {'at most ' if may_end_before else ''}{max(0, last - training.epoch) * seconds:.0f} s left here"
        return f", at least {(self._rule.patience - training.counter) * seconds:.0f} s left here"
