"""The phases of growth: the teacher, the stages, retraining, controls, and what each of them leaves."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .. import __version__, export
from ..config import GrowConfig
from ..data import DataSet, Source, evaluation_batches, training_batches
from ..data.batches import keyed_generator
from ..engine import (
    CosineEpochs, FitConfig, Loss, NodeMeasure, SteppedEpochs, TeacherMaps, Training, accuracy, classification_loss, growth_loss,
    label_loss, logit_loss, make_sgd, measure, measure_latency, numbered, teacher_logits)
from ..machine import environment
from ..models import FoldedNetwork, StudentGraph, StudentNetwork, count, extract, grown, plain, profile
from ..models.teachers import Teacher
from ..record import RunError, RunFolder
from .display import Display, Silent
from .growth_controls import begin_next_control
from .growth_rules import Limits, Split, alpha, can_grow, choose_split, modification_value, one_sided, shares
from .growth_setup import limits_of, teacher_network, trained_teacher
from .growth_state import GrowState
from .lifecycle import conclude, duration
from .recorder import Recorder
from .training import Plan, best_so_far, confusion_of, train

_MEASURED = 128  # images at once while nodes are measured


@dataclass
class Growth:
    """What the phases of one growth work with; everything that changes is in `state`.

    Attributes:
        teacher: the teacher, which is untrained, and good for its shapes only, while the phase is "teacher" and it is to be
            trained.
        first: the graph that growth starts from.
    """

    config: GrowConfig
    teacher: Teacher
    first: StudentGraph
    data: DataSet
    data_checksum: str
    folder: RunFolder
    display: Display | Silent
    state: GrowState
    recorder: Recorder
    fit_config: FitConfig

    @property
    def limits(self) -> Limits:
        return limits_of(self.config, self.teacher)


# ---- teacher


def prepare_teacher(growth: Growth):
    """Train the teacher where it is to be trained, and say how good it is."""
    state, data, settings = growth.state, growth.data, growth.config.teacher
    if settings.train is not None:
        network = teacher_network(growth.config, data).to(growth.config.run.device, memory_format=torch.channels_last)
        growth.display.message(f"teacher: {settings.train}, {growth.teacher.params:,} parameters, {settings.epochs} epochs")
        outcome = _train(growth, network, "teacher", "teacher", CosineEpochs(settings.epochs, settings.lr), classification_loss,
                         settings, augment=data.augment, validate=_validation(growth, FoldedNetwork(network)), positions=False,
                         goal=lambda training: f"learning rate falling from {settings.lr:g}")
        if outcome == "diverged":
            raise RunError("teacher: the loss is not finite any more; start again with a smaller --set teacher.lr")
        growth.folder.save_state("teacher", {"model": network.state_dict()})
        growth.teacher = trained_teacher(growth.config, data, network)
    teacher = growth.teacher.to(growth.config.run.device)
    reached = accuracy(confusion_of(teacher, data, data.validation, growth.config.run.device))
    state.teacher = {"name": teacher.name, "params": teacher.params, "flops": teacher.flops,
                     "maps": [list(shape) for shape in teacher.map_shapes], "validation_accuracy": reached,
                     "seconds": state.training.seconds if state.training else 0.0}
    growth.folder.event("teacher", **state.teacher)
    seen = "" if settings.train is not None else " (it may have been trained on these images)"
    growth.display.message(f"teacher {teacher.name}: {reached:.2f} % on validation{seen}, {teacher.params:,} parameters, "
                           f"{teacher.flops / 1e6:.2f} M FLOPs, {len(teacher.map_shapes)} maps")
    state.begin_stage(growth.first, None)
    growth.recorder.checkpoint()


def restore_teacher(growth: Growth):
    """The teacher that an earlier process trained."""
    if growth.config.teacher.train is not None:
        network = teacher_network(growth.config, growth.data)
        network.load_state_dict(growth.folder.load_state("teacher")["model"])
        growth.teacher = trained_teacher(growth.config, growth.data, network)
    growth.teacher.to(growth.config.run.device)


# ---- stages


def grow_stages(growth: Growth):
    """Train, measure and split, stage after stage, until the budget is reached or nothing fits (section 3.4, Algorithm 1)."""
    state, settings = growth.state, growth.config.growth
    limit = 0 if settings.augment in ("stages", "both") else int(settings.cache_gib * 2**30)
    maps = TeacherMaps(growth.teacher, growth.data.train, growth.data.normalisation, limit, growth.fit_config.precision,
                       growth.fit_config.device)
    while can_grow(state.student, growth.teacher.map_shapes, growth.limits, settings.c, settings.width):
        network = _network(growth, state.student, state.weights)
        _train_stage(growth, network, maps)
        measures = _measure_stage(growth, network)
        split = _split(growth, measures)
        state.stages += 1
        state.begin_stage(split.graph, grown(network, split.graph, growth.config.run.seed).state_dict())
        growth.recorder.checkpoint()
    node = one_sided(state.split_nodes)
    if node is not None:
        share = shares(state.split_nodes)[node]
        growth.recorder.warn(f"node {node} took {100 * share:.0f} % of the {state.stages} splits: growth was one-sided")
    state.begin("retrain", state.weights if settings.retrain_from == "grown" else None)
    _say_what_grew(growth)
    growth.recorder.checkpoint()


def _say_what_grew(growth: Growth):
    state, settings, cost = growth.state, growth.config.growth, count(growth.state.student)
    growth.display.message(f"growth ends after {state.stages} stages at {cost.params:,} parameters, {cost.flops / 1e6:.2f} M FLOPs")
    if state.stages:
        epochs = settings.retrain_epochs + sum(_control_epochs(growth, name) for name in settings.controls)
        seconds = epochs * _batches(growth, False).steps_per_epoch * state.step_seconds
        what = f"retraining{' and controls' if settings.controls else ''}"
        growth.display.message(f"estimated: {what}, {epochs} epochs, {duration(seconds)} or somewhat more")


def _train_stage(growth: Growth, network: StudentNetwork, maps: TeacherMaps):
    """E epochs on L_cls + alpha * (mean of R over supervised nodes)."""
    state, settings, epochs = growth.state, growth.config.growth, growth.config.growth.stage_epochs

    present = torch.zeros((), device=growth.config.run.device)

    def set_alpha(epoch: int):
        present.fill_(alpha(epoch, epochs))

    def shown_alpha(training: Training) -> str:
        return f"alpha {alpha(training.epoch - (training.step == 0), epochs):.2f}"  # of the epoch that has just ended, at its end

    _keep_maps(growth, network.graph, maps)
    loss = growth_loss(network.graph, maps, growth.data.train.labels, present, settings.standardize)
    outcome = _train(growth, network, f"stage {state.stage}", f"stage {state.stage} ({count(network.graph).params:,} parameters)",
                     SteppedEpochs(epochs, growth.config.training.lr), loss, growth.config.training,
                     augment=settings.augment in ("stages", "both"), goal=shown_alpha, before_epoch=set_alpha)
    if outcome == "diverged":
        raise RunError(f"stage {state.stage}: the loss is not finite any more; start again with a smaller --lr")


def _keep_maps(growth: Growth, graph: StudentGraph, maps: TeacherMaps):
    """Have the teacher's maps of a stage kept where there is room; says of every one that is new how it is had."""
    settings, known = growth.config.growth, maps.kept
    refused = maps.want([node.q for node in graph.supervised])
    why = ("images are augmented" if settings.augment in ("stages", "both") else
           f"it would not fit into what is left of --cache-gib {settings.cache_gib:g}")
    for qs, how in (([q for q in maps.kept if q not in known], "computed once and kept"),
                    (refused, f"computed at every step, because {why}")):
        for q in qs:
            growth.display.message(f"teacher's map {q}, {maps.bytes(q) / 2**20:,.1f} MiB for all images: {how}")


def _measure_stage(growth: Growth, network: StudentNetwork) -> list[NodeMeasure]:
    """Accuracy, and R of every supervised node, on the whole validation split; writes the event of the stage."""
    state, data, graph = growth.state, growth.data, network.graph
    training = state.training
    batches = evaluation_batches(data.validation, data.normalisation, _MEASURED)
    reached, measures = measure(network, growth.teacher, batches, growth.config.growth.standardize)
    cost, nodes = count(graph), []
    for each in measures:
        if not math.isfinite(each.R):
            raise RunError(f"stage {state.stage}: R of node {each.node} is {each.R}; start again with a smaller --lr")
        nodes.append(each.to_dict() | {"in_degree": graph.in_degree(each.node), "out_degree": graph.out_degree(each.node),
                                       "S": modification_value(graph, each.node, each.R)})
    steps = training.epoch * _batches(growth, False).steps_per_epoch
    state.step_seconds = training.seconds / steps
    growth.folder.event("stage", stage=state.stage, graph=graph.to_dict(), params=cost.params, flops=cost.flops,
                        validation_accuracy=reached, epochs=training.epoch, seconds=training.seconds,
                        first_step_seconds=training.first_step_seconds, step_ms=1e3 * state.step_seconds, nodes=nodes)
    growth.display.message(f"stage {state.stage}: {cost.params:,} parameters, {cost.flops / 1e6:.2f} M FLOPs, validation "
                           f"{reached:.2f} %, {1e3 * state.step_seconds:.1f} ms a step")
    _look_for_collapse(growth, reached, measures)
    return measures


def _look_for_collapse(growth: Growth, reached: float, measures: list[NodeMeasure]):
    state = growth.state
    for each in measures:
        if each.collapsed:
            state.collapsed = True
            remedy = "" if growth.config.growth.standardize else "; leave --no-standardize out"
            growth.recorder.warn(f"stage {state.stage}: node {each.node} has collapsed: its map is close to zero (R {each.R:.3g} of "
                                 f"{each.R_zero:.3g} for a map of zeros), so R steers nothing{remedy}")
    chance = 100 * torch.bincount(growth.data.validation.labels).max().item() / len(growth.data.validation)
    if reached <= chance:
        growth.recorder.warn(f"stage {state.stage}: validation accuracy {reached:.2f} % is no better than chance")


def _split(growth: Growth, measures: list[NodeMeasure]) -> Split:
    """Choose the next split, and write its event."""
    state, settings, graph = growth.state, growth.config.growth, growth.state.student
    scores = _scores(growth, graph, measures)
    split = choose_split(graph, scores, growth.teacher.map_shapes, growth.limits, settings.c, settings.width)
    state.split_nodes.append(split.node)
    growth.folder.event("split", stage=state.stage, **split.to_dict(), scores=scores, shares=shares(state.split_nodes))
    edge, q = graph.edge(split.edge), graph.node(split.node).q
    what = (f"{split.units} more {'unit' if split.units == 1 else 'units'} at the end of edge {split.edge}" if split.kind == "deepen" else
            f"a new node {split.graph.nodes[-1].id} (q {split.q}) beside edge {split.edge}")
    growth.display.message(f"split: node {split.node} (q {q}) gets {what}, {edge.source} to {edge.target}")
    return split


def _scores(growth: Growth, graph: StudentGraph, measures: list[NodeMeasure]) -> dict[int, float]:
    """What nodes are ranked by."""
    score = growth.config.growth.score
    if score == "random":
        drawn = torch.rand(len(measures), generator=keyed_generator(growth.config.run.seed, "split", growth.state.stage))
        return {each.node: value for each, value in zip(measures, drawn.tolist())}
    if score == "r":
        return {each.node: each.R for each in measures}
    return {each.node: modification_value(graph, each.node, each.R if score == "s" else each.relative) for each in measures}


# ---- retraining and controls


def retrain(growth: Growth):
    """Train the grown student on labels alone, read the test split once, write the artefact."""
    state, settings, training = growth.state, growth.config.growth, growth.config.training
    network = _network(growth, state.student, state.weights)
    if state.reading is None:
        epochs = settings.retrain_epochs
        growth.display.message(f"retraining: {epochs} epochs on labels, from {settings.retrain_from} weights")
        outcome = _train_on_labels(growth, network, "retrain", "retraining", SteppedEpochs(epochs, training.lr))
        if state.training.best_weights is None:
            raise RunError("retraining: the loss is not finite any more; start again with a smaller --lr")
        growth.folder.event("retrain", outcome=outcome, retrain_from=settings.retrain_from, epochs=state.training.epoch,
                            best_accuracy=state.training.best_accuracy, best_epoch=state.training.best_epoch,
                            seconds=state.training.seconds, first_step_seconds=state.training.first_step_seconds)
        state.reading = _read(growth, network, "student")
        growth.recorder.checkpoint()
    network.load_state_dict(state.training.best_weights)
    _save_student(growth, network)
    begin_next_control(growth)


def train_control(growth: Growth, name: str) -> dict:
    """Train the same graph otherwise for as many epochs; its accuracies on validation and test."""
    state, epochs = growth.state, _control_epochs(growth, name)
    network = _network(growth, state.student, None)
    rule = SteppedEpochs(epochs, growth.config.training.lr)
    title = f"control {name}"
    if state.training is None:
        growth.display.message(f"{title}: {_CONTROLS[name]}, {epochs} epochs")
    if name == "logits":
        _train_on_labels(growth, network, title, title, rule, logit_loss(growth.data.train.labels, _soft_labels(growth)))
    else:
        _train_on_labels(growth, network, title, title, rule)
    reading = {"validation_accuracy": None, "test_accuracy": None}
    if state.training.best_weights is None:
        growth.recorder.warn(f"{title} diverged (the loss is not finite any more); there is nothing to compare with")
    else:
        reading = _read(growth, network, title)
    return {key: reading[key] for key in ("validation_accuracy", "test_accuracy")} | {"epochs": state.training.epoch}


_CONTROLS = {"labels": "the same graph from drawn weights, on labels, for as many epochs in all",
             "logits": "the same graph from drawn weights, on the teacher's logits, for as many epochs in all",
             "scratch": "the same graph from drawn weights, on labels, for the epochs of retraining"}


def _control_epochs(growth: Growth, name: str) -> int:
    settings = growth.config.growth
    return settings.retrain_epochs + (0 if name == "scratch" else growth.state.stages * settings.stage_epochs)


def _soft_labels(growth: Growth) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The teacher's logits of a batch: computed once, or from the augmented images."""
    if growth.config.growth.augment in ("retrain", "both"):
        return lambda x, positions: growth.teacher(x)
    logits = teacher_logits(growth.teacher, growth.data.train, growth.data.normalisation, growth.fit_config.precision,
                            growth.fit_config.device)
    return lambda x, positions: logits[positions]


def _train_on_labels(growth: Growth, network: StudentNetwork, key: str, title: str, rule: SteppedEpochs,
                     loss: Loss | None = None) -> str:
    """Train with validation after every epoch; the network is then the best of them."""
    validate = _validation(growth, FoldedNetwork(plain(network)))
    outcome = _train(growth, network, key, title, rule, loss or label_loss(growth.data.train.labels), growth.config.training,
                     augment=growth.config.growth.augment in ("retrain", "both"), validate=validate)
    training = growth.state.training
    if training.best_weights is not None:
        if outcome == "diverged":
            growth.recorder.warn(f"{title}: the loss is not finite any more after epoch {training.epoch} of {rule.epochs}; the best epoch "
                                 f"before, {training.best_epoch}, is kept")
        network.load_state_dict(training.best_weights)
    return outcome


def _read(growth: Growth, network: StudentNetwork, name: str) -> dict:
    """Accuracies of the folded fp32 network as a user will load it; the test split is read once, here."""
    data, device = growth.data, growth.config.run.device
    folded = FoldedNetwork(plain(network)).to(device)
    counts, split = confusion_of(folded, data, data.validation, device), "validation"
    reading = {"validation_accuracy": accuracy(counts), "test_accuracy": None}
    if data.test is not None:
        counts, split = confusion_of(folded, data, data.test, device), "test"
        reading["test_accuracy"] = accuracy(counts)
        growth.folder.event("test_reading", network=name, correct=int(counts.trace()), total=int(counts.sum()),
                            accuracy=accuracy(counts))
    return reading | {"confusion": counts.tolist(), "confusion_split": split}


# ---- artefact and end


def _save_student(growth: Growth, network: StudentNetwork):
    """Write the artefact, with size, work and latency in the manifest."""
    config, data, state = growth.config, growth.data, growth.state
    extracted = extract(network).eval()
    latency = measure_latency(FoldedNetwork(extracted).to(config.run.device), data.input_shape)
    size, cost = profile(extracted, data.input_shape), count(network.graph)
    state.reading |= {"params": cost.params, "flops": cost.flops, "state_bytes": size.state_bytes, "macs": size.macs,
                      **latency.figures()}
    manifest = {"odn_fast": __version__, **environment(), "seed": config.run.seed, "threads": config.run.threads,
                "precision": growth.fit_config.precision, "precision_requested": config.run.precision,
                "teacher": state.teacher, "student": network.graph.to_dict(), "dataset": data.name,
                "data_checksum": growth.data_checksum, **growth.limits.to_dict(), "stages": state.stages,
                "latency_runs": latency.runs, **{key: value for key, value in state.reading.items() if "confusion" not in key}}
    normalisation = data.normalisation
    description = export.Description(
        export.NetworkInput(data.input_shape, normalisation.scale, normalisation.mean, normalisation.std), data.class_names,
        f"student of {state.teacher['name']}", sum(edge.units for edge in network.graph.edges))
    with growth.folder.reporting("model"):
        export.save_model(growth.folder.path / "model", extracted, description, manifest)


def finish(growth: Growth):
    """Last event, report, last checkpoint."""
    state = growth.state
    state.begin("finished")
    growth.folder.event(
        "result", **state.reading, **growth.limits.to_dict(), stages=state.stages, controls=state.controls,
        collapsed=state.collapsed, teacher=state.teacher, shares=shares(state.split_nodes), seconds=growth.recorder.seconds(),
        class_names=list(growth.data.class_names))
    conclude(growth.folder, growth.recorder)


# ---- what they share


def _train(growth: Growth, network: nn.Module, key: str, title: str, rule: CosineEpochs | SteppedEpochs, loss: Loss, settings, *,
           augment: bool, validate=None, goal: Callable[[Training], str] = best_so_far, positions: bool = True,
           before_epoch: Callable[[int], None] = lambda epoch: None) -> str:
    """settings: momentum and weight decay; positions: the loss takes positions in the training split, not labels."""
    optimizer = make_sgd(network, rule.lr, settings.momentum, settings.weight_decay, growth.config.run.device)
    plan = Plan(key, title, goal, loss, _batches(growth, augment, positions), rule, optimizer, validate, before_epoch)
    return train(growth.state, growth.recorder, growth.fit_config, network, plan)


def _batches(growth: Growth, augment: bool, positions: bool = True) -> Source:
    data = growth.data
    return training_batches(data, growth.config.training.batch_size, growth.config.run.seed, augment,
                            numbered(data.train) if positions else data.train)


def _network(growth: Growth, graph: StudentGraph, weights: dict | None) -> StudentNetwork:
    """The student of a graph, with given weights or drawn from the seed."""
    network = StudentNetwork(graph, growth.config.run.seed)
    if weights is not None:
        network.load_state_dict(weights)
    return network.to(growth.config.run.device, memory_format=torch.channels_last)


def _validation(growth: Growth, folded: FoldedNetwork) -> Callable[[Callable[[], None]], float]:
    folded.to(growth.config.run.device)

    def validate(after_batch: Callable[[], None]) -> float:
        return accuracy(confusion_of(folded.refresh(), growth.data, growth.data.validation, growth.config.run.device, after_batch))

    return validate
