"""One training of a run, from its start or from where the run's state stands; shared by all searches."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn, optim

from ..data import DataSet, Source, Split, evaluation_batches
from ..engine import FitConfig, FitData, Loss, StoppingRule, Training, confusion, fit, load_optimizer
from .recorder import Recorder
from .state import State

_EVALUATION_BATCH = {"cpu": 512, "cuda": 4096}  # what fits a processor's caches; what fills a GPU


@dataclass(frozen=True)
class Plan:
    """One training.

    Attributes:
        key: names it; with the seed and the epoch it decides order and augmentation.
        title, goal: what the screen calls it, and says that it is after.
        loss, batches, rule, optimizer: as `fit` takes them.
        validate: percent of correct validation images, given a function to call between batches; None for none.
        before_epoch: called with the number of epochs finished, where the loss changes from epoch to epoch.
    """

    key: str
    title: str
    goal: Callable[[Training], str]
    loss: Loss
    batches: Source
    rule: StoppingRule
    optimizer: optim.Optimizer
    validate: Callable[[Callable[[], None]], float] | None = None
    before_epoch: Callable[[int], None] = lambda epoch: None


def train(state: State, recorder: Recorder, fit_config: FitConfig, network: nn.Module, plan: Plan) -> str:
    """Train until the plan's rule says why to stop; returns that outcome. At any time the state can be stored."""
    since = None
    if state.training is None:
        since = state.decided or time.perf_counter()
        state.training = Training(plan.optimizer.defaults["lr"])
    else:
        network.load_state_dict(state.model)
        load_optimizer(plan.optimizer, state.optimizer)
        for name in ("loss_sum", "correct"):  # a checkpoint is read into the processor's memory
            value = getattr(state.training, name)
            setattr(state.training, name, None if value is None else value.to(fit_config.device))
    recorder.begin(plan.batches, plan.rule, plan.title, plan.goal)
    with recorder.interrupts.deferred():
        outcome = fit(network, FitData(plan.batches, plan.key, plan.validate, plan.before_epoch, since), plan.loss, plan.optimizer,
                      fit_config, recorder, plan.rule, state.training)
    state.model, state.optimizer = network.state_dict(), plan.optimizer.state_dict()
    return outcome


def best_so_far(training: Training) -> str:
    """A goal that the screen can show of any training."""
    return "best none yet" if training.best_accuracy is None else f"best {training.best_accuracy:.2f} %"


def confusion_of(network: nn.Module, data: DataSet, split: Split, device: str,
                 after_batch: Callable[[], None] = lambda: None) -> Tensor:
    """Counts (K, K) of a network in eval mode over one of the data's splits."""
    return confusion(network, split_batches(data, split, device), data.num_classes, after_batch)


def split_batches(data: DataSet, split: Split, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """One of the data's splits in order, in batches of a size to evaluate."""
    return evaluation_batches(split, data.normalisation, _EVALUATION_BATCH[torch.device(device).type])
