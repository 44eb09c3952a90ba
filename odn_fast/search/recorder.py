"""What happens at every step and epoch of a training: events, checkpoints, progress, and a clean stop."""

import time

from torch import nn, optim

from ..config import ExpandConfig
from ..data import Batches
from ..engine import Convergence, CosineEpochs, Interrupted, Interrupts, Training
from ..record import RunFolder
from .display import Display, Silent
from .state import RunState


class Recorder:
    """Follows the trainings of one run; given to `fit` as its record.

    Args:
        header: stored with every checkpoint, to be compared on resume (config, environment, data).
    """

    def __init__(self, folder: RunFolder, display: Display | Silent, interrupts: Interrupts, state: RunState,
                 header: dict, config: ExpandConfig):
        self.interrupts = interrupts
        self._folder, self._display, self._state = folder, display, state
        self._header, self._config = header, config
        self._started = self._saved = time.monotonic()
        self._before = state.seconds

    def begin(self, batches: Batches, rule: Convergence | CosineEpochs):
        """Tell of the training to come, so that progress can be shown."""
        self._batches, self._rule = batches, rule
        self._epoch_started, self._first_step = None, 0

    def seconds(self) -> float:
        """Time spent on this run so far, in all its processes."""
        return self._before + time.monotonic() - self._started

    def step(self, model: nn.Module, optimizer: optim.Optimizer, training: Training):
        self.waiting(model, optimizer, training)
        now = time.monotonic()
        if now - self._saved > 60 * self._config.run.checkpoint_minutes:
            self._save(model, optimizer)
        if self._epoch_started is None:
            self._epoch_started, self._first_step = now, training.step
            return
        steps = training.step - self._first_step
        rate = steps / max(now - self._epoch_started, 1e-9)
        self._display.step(f"{self._where(training.epoch + 1)}, step {training.step}/{self._batches.steps_per_epoch}, "
                           f"{rate * self._batches.images_per_epoch / self._batches.steps_per_epoch:,.0f} images/s, "
                           f"{self._goal(training)}, {(self._batches.steps_per_epoch - training.step) / rate:.0f} s to "
                           "the end of the epoch" if steps else "")

    def waiting(self, model: nn.Module, optimizer: optim.Optimizer, training: Training):
        if self.interrupts.pending is not None:
            self._save(model, optimizer)
            raise Interrupted(self.interrupts.pending)

    def epoch(self, model: nn.Module, optimizer: optim.Optimizer, training: Training, summary: dict):
        state = self._state
        self._epoch_started = None
        self._folder.event("epoch", phase=state.phase, depth=state.depth, epoch=training.epoch, **summary,
                           best_accuracy=training.best_accuracy, counter=training.counter)
        self._save(model, optimizer)
        loss = summary["losses"][-1]
        line = f"{self._where(training.epoch)}: loss {loss:.4f}"
        if summary["validation_accuracy"] is not None:
            line += f", validation {summary['validation_accuracy']:.2f} %"
        line += f", {self._goal(training)}"
        if summary["images_per_second"]:
            line += f", {summary['images_per_second']:,.0f} images/s"
        self._display.epoch(line + self._time_left(training, summary["seconds"]))
        self.waiting(model, optimizer, training)

    def checkpoint(self):
        """Save the state as it stands, outside a training."""
        self._state.seconds = self.seconds()
        self._folder.save_checkpoint({**self._header, "state": self._state.to_dict()})
        self._saved = time.monotonic()

    def _save(self, model: nn.Module, optimizer: optim.Optimizer):
        self._state.model, self._state.optimizer = model.state_dict(), optimizer.state_dict()
        self.checkpoint()

    def _where(self, epoch: int) -> str:
        name = {"warm_up": "warm-up", "fine_tune": f"fine-tune depth {self._state.depth}",
                "baseline": f"baseline depth {self._state.depth}"}.get(self._state.phase, f"depth {self._state.depth}")
        last = self._epochs()
        return f"{name}, epoch {epoch}" + (f"/{last}" if last else "")

    def _goal(self, training: Training) -> str:
        if isinstance(self._rule, CosineEpochs):
            return "all depths"
        best = "none yet" if training.best_accuracy is None else f"{training.best_accuracy:.2f} %"
        need = f" of {self._rule.need:g} % needed" if self._rule.need is not None else ""
        return f"best {best}{need}"

    def _epochs(self) -> int | None:
        """Most epochs of this training, where they are bounded."""
        if isinstance(self._rule, CosineEpochs):
            return self._rule.epochs
        return self._rule.exactly or self._rule.cap

    def _time_left(self, training: Training, seconds: float) -> str:
        last = self._epochs()
        if last is not None:
            bound = "" if isinstance(self._rule, CosineEpochs) else "at most "
            return f", {bound}{max(0, last - training.epoch) * seconds:.0f} s left here"
        return f", at least {(self._rule.patience - training.counter) * seconds:.0f} s left here"
