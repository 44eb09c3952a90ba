"""The phases around a depth search (warm-up, fine-tuning, baseline), and what training at a depth takes and leaves.

The search itself is in expansion_depths.py.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import fx, nn

from .. import __version__, export
from ..config import ExpandConfig
from ..data import DataSet, Split, training_batches
from ..engine import (
    Convergence, CosineEpochs, FitConfig, Training, accuracy, classification_loss, exit_confusions, make_sgd)
from ..machine import environment
from ..models import DepthNetwork, FoldedNetwork, NetworkAtAllDepths
from ..record import RunError, RunFolder
from .display import Display, Silent
from .expansion_state import RunState
from .lifecycle import conclude
from .recorder import Recorder
from .training import Plan, best_so_far, confusion_of, split_batches, train

_SIZE = ("params", "state_bytes", "macs")
_LATENCY = ("latency_ms", "latency_low_ms", "latency_high_ms")


@dataclass
class Search:
    """What the phases of one search work with; everything that changes is in `state`."""

    config: ExpandConfig
    model: DepthNetwork
    data: DataSet
    data_checksum: str
    folder: RunFolder
    display: Display | Silent
    state: RunState
    recorder: Recorder
    fit_config: FitConfig

    @cached_property
    def rows(self) -> list[dict]:
        """Size and latency of every depth, measured together as the run began, so that one can be compared with another."""
        tables = [event["rows"] for event in self.folder.events() if event["event"] == "table"]
        if not tables:
            raise RunError(f"{self.folder.path}/events.jsonl: has no table of depths; restore the file from a copy")
        return tables[-1]

    @property
    def last_depth(self) -> int:
        return last_depth(self.config, self.model.max_depth)


def last_depth(config: ExpandConfig, max_depth: int) -> int:
    """The deepest depth that the search of a model with `max_depth` depths may train."""
    settings = config.search
    last = settings.max_depth or max_depth
    if settings.epochs_per_depth:
        last = min(last, settings.initial_depth + len(settings.epochs_per_depth) - 1)
    return last


def warm_up(search: Search):
    """All depths at once with a small learning rate (section III-B); leaves the weights as the state `warm-up`."""
    state, model, settings = search.state, search.model, search.config.training
    if settings.warm_up_epochs:
        state.depth = model.max_depth
        search.display.message(f"warm-up: {settings.warm_up_epochs} epochs, all {model.max_depth} depths in one pass")
        with warm_up_momentum(model):
            outcome = _train(search, model, DepthNetwork.exit_losses, "warm-up",
                             CosineEpochs(settings.warm_up_epochs, settings.warm_up_lr), settings.warm_up_lr)
        if outcome == "diverged":
            raise RunError("warm-up: the loss is not finite any more; start again with a smaller "
                           "--set training.warm_up_lr, or without warm-up (--warm-up-epochs 0)")
    if search.config.search.measure_warm_up:
        _measure_exits(search)
    search.folder.save_state("warm-up", {"model": model.state_dict()})
    state.begin("search", search.config.search.initial_depth)


def _measure_exits(search: Search):
    """Validation accuracy of every depth, all from one pass of the folded network."""
    folded = FoldedNetwork(NetworkAtAllDepths(search.model)).to(search.config.run.device)
    batches = split_batches(search.data, search.data.validation, search.config.run.device)
    reached = list(map(accuracy, exit_confusions(folded, batches, search.data.num_classes)))
    search.folder.event("exits", validation_accuracies=reached)
    search.display.message("after warm-up, on validation: " + ", ".join(
        f"depth {depth} {each:.2f} %" for depth, each in enumerate(reached, 1)))


@contextlib.contextmanager
def warm_up_momentum(model: DepthNetwork) -> Iterator[None]:
    """Batch norm's momentum 1 - (1 - m)^k while entered, k = number of exits at or beyond the layer.

    Then running statistics after one shared pass equal those after one pass per depth at momentum m.
    """
    depth = model.max_depth
    layers = {layer: exits for part, exits in [(model.stem, depth), *zip(model.blocks, range(depth, 0, -1))]
              for layer in part.modules() if isinstance(layer, nn.BatchNorm2d) and layer.momentum is not None}
    before = {layer: layer.momentum for layer in layers}
    try:
        for layer, exits in layers.items():
            layer.momentum = 1 - (1 - before[layer]) ** exits
        yield
    finally:
        for layer, momentum in before.items():
            layer.momentum = momentum


def fine_tune(search: Search):
    """Go on at the found depth until it converges (section III-D), extract the best weights, read the test split once."""
    state = search.state
    if state.training is None:
        state.go_on_from(search.folder.load_state(f"depth-{state.depth:02}"))
    if "found" not in state.readings:
        searched = next(entry["epochs"] for entry in state.trained if entry["depth"] == state.found)
        # With given epochs there is no fine-tuning: they are all there are.
        rule = Convergence(digits=2, exactly=searched if search.config.search.epochs_per_depth else None)
        outcome = train_depth(search, rule, state.training.lr)
        record_end(search, outcome)
        if state.training.epoch > searched:
            search.display.message(f"fine-tuning took {state.training.epoch - searched} epochs ({outcome}): best validation "
                                   f"accuracy {state.training.best_accuracy:.2f} %")
    _read_and_save(search, "found", "model")
    if search.config.search.baseline == "full" and state.found < search.model.max_depth:
        state.begin("baseline", search.model.max_depth)
        search.recorder.checkpoint()
    else:
        _finish(search)


def baseline(search: Search):
    """The full depth trained until it converges, for comparison."""
    state = search.state
    if state.training is None:
        search.display.message(f"baseline: depth {state.depth}, trained until it converges")
        if any(entry["depth"] == state.depth for entry in state.trained):
            state.go_on_from(search.folder.load_state(f"depth-{state.depth:02}"))
    if "baseline" not in state.readings:
        outcome = train_depth(search, Convergence(digits=2), depth_lr(search, state.depth))
        record_end(search, outcome)
    if state.training.best_weights is None:
        search.display.warning("the baseline diverged (the loss is not finite any more); there is nothing to compare with")
    else:
        _read_and_save(search, "baseline", "baseline")
    _finish(search)


def record_end(search: Search, outcome: str) -> dict:
    """Write the event of a training that has ended; returns its figures."""
    training = search.state.training
    entry = {"depth": search.state.depth, "outcome": outcome, "epochs": training.epoch, "best_accuracy": training.best_accuracy,
             "best_epoch": training.best_epoch, "seconds": training.seconds, "first_step_seconds": training.first_step_seconds}
    search.folder.event("depth", phase=search.state.phase, **entry)
    return entry


def _read_and_save(search: Search, name: str, place: str):
    """Write the artefact of the training that has ended, with its accuracies; the test split is read once, here."""
    state, data = search.state, search.data
    if name not in state.readings:
        network = FoldedNetwork(_extracted(search, state.depth, state.training.best_weights)).to(search.config.run.device)
        validation = _confusion(search, network, data.validation)
        reading = {"depth": state.depth, "validation_accuracy": accuracy(validation), "test_accuracy": None,
                   "confusion": validation.tolist(), "confusion_split": "validation"}
        if data.test is not None:
            test = _confusion(search, network, data.test)
            reading |= {"test_accuracy": accuracy(test), "confusion": test.tolist(), "confusion_split": "test"}
            search.folder.event("test_reading", network=name, depth=state.depth, correct=int(test.trace()),
                                total=int(test.sum()), accuracy=accuracy(test))
        state.readings[name] = reading
        search.recorder.checkpoint()
    reading = state.readings[name]
    save_network(search, place, state.training.best_weights,
                  {key: reading[key] for key in ("validation_accuracy", "test_accuracy")})


def save_network(search: Search, place: str, weights: dict, accuracies: dict):
    """Write an artefact, with its size, work and latency in the manifest."""
    config, data, depth = search.config, search.data, search.state.depth
    network = _extracted(search, depth, weights)
    row = search.rows[depth - 1]
    manifest = {"odn_fast": __version__, **environment(), "seed": config.run.seed, "threads": config.run.threads,
                "precision": search.fit_config.precision, "precision_requested": config.run.precision,
                "model": config.model, "depth": depth, "dataset": data.name, "data_checksum": search.data_checksum,
                "target_accuracy": config.search.target_accuracy, "tolerance": config.search.tolerance,
                "target_met": search.state.target_met, **accuracies,
                **{key: row[key] for key in (*_SIZE, *_LATENCY, "latency_runs")}}
    normalisation = data.normalisation
    description = export.Description(
        export.NetworkInput(data.input_shape, normalisation.scale, normalisation.mean, normalisation.std),
        data.class_names, config.model or type(search.model).__name__, depth)
    with search.folder.reporting(place):
        export.save_model(search.folder.path / place, network, description, manifest)


def _finish(search: Search):
    """Last event, report, last checkpoint."""
    state, settings = search.state, search.config.search
    state.begin("finished", state.found)
    seconds = search.recorder.seconds()
    trained = {entry["depth"]: entry for entry in state.trained}
    cancelled = {entry["depth"]: entry for entry in state.cancelled}
    depths = []
    for row in search.rows:
        entry = trained.get(row["depth"], {})
        ended = entry or cancelled.get(row["depth"], {})
        depths.append({**{key: row[key] for key in ("depth", *_SIZE, *_LATENCY)}, "trained": bool(entry),
                       "validation_accuracy": entry.get("best_accuracy"),
                       **{key: ended.get(key) for key in ("outcome", "epochs", "seconds")}})
    found = state.readings["found"]
    state.readings["depths"] = {"rows": depths}
    search.folder.event(
        "result", depth=state.found, max_depth=search.model.max_depth, target_met=state.target_met,
        target_accuracy=settings.target_accuracy, tolerance=settings.tolerance, epochs_cap=settings.epochs_cap,
        validation_accuracy=found["validation_accuracy"], test_accuracy=found["test_accuracy"], seconds=seconds,
        depths=depths, baseline=state.baseline, confusion=found["confusion"], confusion_split=found["confusion_split"],
        class_names=list(search.data.class_names))
    conclude(search.folder, search.recorder)
    search.folder.drop_states("depth-*")  # what fine-tuning might have gone on from; the networks are in depths/


def train_depth(search: Search, rule: Convergence, lr: float) -> str:
    """Train the depth that the state names, from the warmed-up weights or from where the state stands."""
    return prepared_training(search, rule, lr)()


def prepared_training(search: Search, rule: Convergence, lr: float) -> Callable[[], str]:
    """What trains the depth that the state names. Networks are traced here, which no other thread may train beside."""
    if search.state.training is None:
        search.model.load_state_dict(search.folder.load_state("warm-up")["model"])
    network = search.model.at_depth(search.state.depth)
    folded = FoldedNetwork(network).to(search.config.run.device)

    def validate(after_batch) -> float:
        return accuracy(_confusion(search, folded.refresh(), search.data.validation, after_batch))

    return partial(_train, search, network, classification_loss, f"depth {search.state.depth}", rule, lr, validate)


def _train(search: Search, network: nn.Module, loss, key: str, rule, lr: float, validate=None) -> str:
    settings, data = search.config.training, search.data
    optimizer = make_sgd(network, lr, settings.momentum, settings.weight_decay, search.config.run.device)
    batches = training_batches(data, settings.batch_size, search.config.run.seed, data.augment)
    plan = Plan(key, _title(search.state), _goal(rule), loss, batches, rule, optimizer, validate)
    return train(search.state, search.recorder, search.fit_config, network, plan)


def _title(state: RunState) -> str:
    return {"warm_up": "warm-up", "fine_tune": f"fine-tune depth {state.depth}",
            "baseline": f"baseline depth {state.depth}"}.get(state.phase, f"depth {state.depth}")


def _goal(rule: Convergence | CosineEpochs) -> Callable[[Training], str]:
    """What the screen says that a training is after."""
    if isinstance(rule, CosineEpochs):
        return lambda training: "all depths"
    need = f" of {rule.need:g} % needed" if rule.need is not None else ""
    return lambda training: best_so_far(training) + need


def _confusion(search: Search, network: nn.Module, split: Split, after_batch=lambda: None) -> torch.Tensor:
    return confusion_of(network, search.data, split, search.config.run.device, after_batch)


def _extracted(search: Search, depth: int, weights: dict) -> fx.GraphModule:
    network = search.model.extract(depth)
    network.load_state_dict(weights)
    return network.eval()


def depth_lr(search: Search, depth: int) -> float:
    settings = search.config.training
    return settings.lr * (settings.deeper_lr_scale if depth > search.config.search.initial_depth else 1.0)
