"""When a training ends, and its learning rate on the way (Optimally Deep Networks, Algorithm 1)."""

import math
from dataclasses import dataclass, field, fields
from typing import Protocol

from torch import Tensor


@dataclass
class Training:
    """Where one training stands; beside model and optimizer, all that a checkpoint holds of it.

    Attributes:
        epoch, step: finished epochs, and finished steps of the epoch under way.
        loss_sum, correct, images: of the epoch under way; (D,) sums over images, on the training device, and their number.
        epoch_seconds: time spent on the epoch under way, up to its last step.
        lr: present learning rate.
        counter: epochs since the last improvement.
        best_accuracy, best_epoch, best_weights: on validation, unrounded, with the state dict that reached it.
        diverged: a loss was not finite.
        seconds: time spent on finished epochs.
        first_step_seconds: from the decision for this network until its first step had ended, in the process that took it.
    """

    lr: float
    epoch: int = 0
    step: int = 0
    loss_sum: Tensor | None = None
    correct: Tensor | None = None
    images: int = 0
    epoch_seconds: float = 0.0
    counter: int = 0
    best_accuracy: float | None = None
    best_epoch: int = 0
    best_weights: dict[str, Tensor] | None = field(default=None, repr=False)
    diverged: bool = False
    seconds: float = 0.0
    first_step_seconds: float | None = None

    def to_dict(self) -> dict:
        """The arguments that make this training again; tensors are not copied."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}


class StoppingRule(Protocol):
    """Sets the learning rate before an epoch, takes note of its accuracy after it, and says why a training ends."""

    def learning_rate(self, training: Training) -> float: ...

    def after_epoch(self, training: Training, accuracy: float | None) -> bool:
        """Update counter, best and lr; True if this epoch is the best so far."""

    def finished(self, training: Training) -> str | None:
        """The outcome in a word, or None while training goes on."""

    @property
    def epochs(self) -> int | None:
        """After how many epochs training ends at the latest, where that is known."""


def _after(epochs: int, training: Training) -> str | None:
    """The outcome of a training of so many epochs, or None while it goes on."""
    if training.diverged:
        return "diverged"
    return "epochs" if training.epoch >= epochs else None


@dataclass(frozen=True)
class CosineEpochs:
    """A fixed number of epochs, the learning rate annealed by half a cosine, once an epoch (warm-up)."""

    epochs: int
    lr: float

    def learning_rate(self, training: Training) -> float:
        return self.lr * 0.5 * (1 + math.cos(math.pi * training.epoch / self.epochs))

    def after_epoch(self, training: Training, accuracy: float | None) -> bool:
        return False

    def finished(self, training: Training) -> str | None:
        return _after(self.epochs, training)


@dataclass(frozen=True)
class SteppedEpochs:
    """A fixed number of epochs, the learning rate x 0.1 after a half and after three quarters of them (growth).

    Validated epochs are compared by accuracy; of equals the later is the best, its learning rate being no higher.
    """

    epochs: int
    lr: float
    factor: float = 0.1

    def learning_rate(self, training: Training) -> float:
        drops = sum(training.epoch >= math.ceil(share * self.epochs) for share in (0.5, 0.75))
        return self.lr * self.factor ** drops

    def after_epoch(self, training: Training, accuracy: float | None) -> bool:
        if accuracy is None or training.best_accuracy is not None and accuracy < training.best_accuracy:
            return False
        training.best_accuracy, training.best_epoch = accuracy, training.epoch
        return True

    def finished(self, training: Training) -> str | None:
        return _after(self.epochs, training)


@dataclass(frozen=True)
class Convergence:
    """Train until validation accuracy no longer improves (section III-C, Algorithm 1 lines 23-30).

    Accuracies are compared after rounding to `digits` decimals of a percent. An epoch that is no better than the best
    so far adds one to the counter; every fifth such epoch multiplies the learning rate by 0.6, the 23rd ends the
    training. (The text speaks of a reduction by 60 %; line 28 and the authors' code multiply by 0.6.)

    Attributes:
        digits: 1 while searching, 2 in fine-tuning.
        need: target - tolerance in percent: the training ends at once when the best accuracy reaches it; or None.
        cap: most epochs, or None.
        exactly: a fixed number of epochs in place of every other end, or None.
    """

    digits: int = 1
    need: float | None = None
    cap: int | None = None
    exactly: int | None = None
    patience: int = 23
    drop_every: int = 5
    drop_factor: float = 0.6

    def learning_rate(self, training: Training) -> float:
        return training.lr

    def after_epoch(self, training: Training, accuracy: float) -> bool:
        best = training.best_accuracy
        if best is None or round(accuracy, self.digits) > round(best, self.digits):
            training.best_accuracy, training.best_epoch, training.counter = accuracy, training.epoch, 0
            return True
        training.counter += 1
        if training.counter % self.drop_every == 0:
            training.lr *= self.drop_factor
        return False

    def passed(self, training: Training) -> bool:
        """Whether the best accuracy, rounded, reaches `need`."""
        if self.need is None or training.best_accuracy is None:
            return False
        return round(training.best_accuracy, self.digits) >= self.need - 1e-9

    def finished(self, training: Training) -> str | None:
        if self.exactly is not None:
            return _after(self.exactly, training)
        if training.diverged:
            return "diverged"
        if self.passed(training):
            return "passed"
        if training.counter >= self.patience:
            return "converged"
        if self.cap is not None and training.epoch >= self.cap:
            return "cap"
        return None

    @property
    def epochs(self) -> int | None:
        return self.exactly or self.cap
