"""The one training loop, shared by all searches."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..data import Source
from .convergence import StoppingRule, Training
from .step import FitConfig, Loss, TrainStep, set_learning_rate, train_step


@dataclass(frozen=True)
class FitData:
    """What a training sees.

    Attributes:
        batches: the training split.
        key: names this training; with the seed and the epoch it decides order and augmentation.
        validate: percent of correct validation images; it is given a function to call between batches. None: no validation.
        before_epoch: called with the number of epochs finished, where a loss changes from epoch to epoch.
        since: `time.perf_counter()` when this network was decided on; its first step's latency counts from there.
    """

    batches: Source
    key: str
    validate: Callable[[Callable[[], None]], float] | None = None
    before_epoch: Callable[[int], None] = lambda epoch: None
    since: float | None = None


class FitRecord(Protocol):
    """Where a training reports to. `step` and `waiting` may raise to stop it; its state is whole at either call."""

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, training: Training): ...

    def waiting(self, model: nn.Module, optimizer: torch.optim.Optimizer, training: Training): ...

    def epoch(self, model: nn.Module, optimizer: torch.optim.Optimizer, training: Training, summary: dict): ...


def fit(model: nn.Module, data: FitData, loss: Loss, optimizer: torch.optim.Optimizer, config: FitConfig,
        record: FitRecord, stop: StoppingRule, training: Training) -> str:
    """Train `model` from where `training` stands until `stop` says why it ends; returns that outcome.

    Args:
        model: trained in place.
        loss: (model, x, y) -> losses (D,), correct (D,); the sum of the losses is minimised.
        optimizer: over the parameters to train.
        record: told of every step and epoch.
        training: updated in place; the best weights on validation are kept in it.

    A loss or a weight that is not finite after an epoch ends the training with the outcome "diverged"; the weights are
    then the best ones so far (where there are none, as they are).
    """
    step = train_step(model, loss, optimizer, data.batches, config)
    while (outcome := stop.finished(training)) is None:
        lr = stop.learning_rate(training)
        set_learning_rate(optimizer, lr)
        data.before_epoch(training.epoch)
        resumed, first_step = time.perf_counter(), training.step
        started = resumed - training.epoch_seconds  # as if the epoch had not been interrupted
        images = train_epoch(step, data, record, training)
        step.wait()
        trained = time.perf_counter()
        if not (torch.isfinite(training.loss_sum).all() and _finite(model)):
            training.diverged = True
        accuracy = None
        if data.validate is not None and not training.diverged:
            accuracy = data.validate(lambda: record.waiting(model, optimizer, training))
        ended = time.perf_counter()
        training.seconds += ended - started
        summary = {
            "losses": (training.loss_sum / training.images).tolist(),
            "train_accuracies": (100 * training.correct.double() / training.images).tolist(),
            "validation_accuracy": accuracy,
            "lr": lr,
            "seconds": ended - started,
            "images_per_second": images / (trained - resumed) if training.step > first_step else None,
        }
        training.epoch += 1
        training.step, training.images, training.loss_sum, training.correct, training.epoch_seconds = 0, 0, None, None, 0.0
        improved = not training.diverged and stop.after_epoch(training, accuracy)
        if improved:
            training.best_weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if training.diverged and training.best_weights is not None:
            model.load_state_dict(training.best_weights)
        record.epoch(model, optimizer, training, summary | {"improved": improved})
    return outcome


def train_epoch(step: TrainStep, data: FitData, record: FitRecord, training: Training) -> int:
    """The rest of the epoch that `training` is in; returns the images seen here. Nothing is read back from the device."""
    started = time.perf_counter() - training.epoch_seconds
    step.model.train()
    step.begin_epoch(training)
    before = training.images
    for inputs in data.batches.inputs(data.key, training.epoch, start=training.step):
        step(inputs, training)
        if training.first_step_seconds is None and data.since is not None:
            step.wait()
            training.first_step_seconds = time.perf_counter() - data.since
        training.epoch_seconds = time.perf_counter() - started
        record.step(step.model, step.optimizer, training)
    return training.images - before


def _finite(model: nn.Module) -> bool:
    """Whether all weights and buffers are. Sums of absolute values tell, in one or two launches for all of them."""
    tensors = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    return not tensors or bool(torch.stack(torch._foreach_norm(tensors, 1)).isfinite().all())


def classification_loss(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy (1,) of the logits in fp32, and the number of correct images (1,)."""
    logits = model(x).float()
    correct = (logits.detach().argmax(1) == y).sum()
    return nn.functional.cross_entropy(logits, y)[None], correct[None]
