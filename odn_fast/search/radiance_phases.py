"""The phases of a radiance field's growth: the teacher, the stages, retraining, controls, and what each of them leaves.

SEArch, section 4.5: every hidden layer is a node; the one that is furthest from the teacher's grows by some neurons.
"""

import base64
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import __version__
from ..config import GrowViewsConfig
from ..data.batches import keyed_generator
from ..data.views import RayBatches, Scene, Views
from ..engine import CosineEpochs, FitConfig, Loss, NodeMeasure, make_adam
from ..engine.radiance import distilled_loss, measure_layers, photometric_loss, rays_psnr
from ..machine import environment
from ..models.radiance import (
    RadianceField, RadianceShape, create_field, keep_neurons, narrow_widths, psnr, rendered, widen_layer)
from ..record import RunError, RunFolder
from .display import Display, Silent
from .growth_controls import begin_next_control
from .growth_rules import alpha
from .growth_state import GrowState
from .lifecycle import conclude
from .recorder import Recorder
from .training import Plan, train

ENOUGH = 0.98  # of the budget: growth ends
_FOLLOWED = 2048  # validation rays that an epoch and a stage are measured on
_VALIDATED = 512  # rays at once
_SHOWN = 256  # pixels


@dataclass
class RadianceGrowth:
    """What the phases of one growth work with; everything that changes is in `state`."""

    config: GrowViewsConfig
    scene: Scene
    checksum: str
    folder: RunFolder
    display: Display | Silent
    state: GrowState
    recorder: Recorder
    fit_config: FitConfig

    @property
    def teacher_shape(self) -> RadianceShape:
        return teacher_shape(self.config)

    @property
    def budget(self) -> int:
        """Most parameters of the student."""
        return budget_of(self.config)

    @property
    def shape(self) -> RadianceShape:
        """Of the student under training."""
        return RadianceShape.from_dict(self.state.graph)


def teacher_shape(config: GrowViewsConfig) -> RadianceShape:
    layers, width = map(int, config.growth.teacher.split("x"))
    return RadianceShape.uniform(layers, width, config.growth.point_frequencies, config.growth.direction_frequencies)


def first_shape(config: GrowViewsConfig) -> RadianceShape:
    """The student that growth starts from: narrow hidden layers, the teacher's heads."""
    full = teacher_shape(config)
    return full.with_widths([config.growth.start] * len(full.widths))


def budget_of(config: GrowViewsConfig) -> int:
    return math.floor(config.growth.budget_share * teacher_shape(config).params)


def room(shape: RadianceShape, full: RadianceShape, step: int, budget: int) -> dict[int, RadianceShape | str]:
    """For every hidden layer the shape it would grow to, or why it cannot: `step` neurons more, no wider than the teacher's
    (`full`), within the budget; nothing grows from 98 % of it on."""
    grown: dict[int, RadianceShape | str] = {}
    for layer, (width, most) in enumerate(zip(shape.widths, full.widths)):
        wider = min(width + step, most)
        larger = shape.with_widths([*shape.widths[:layer], wider, *shape.widths[layer + 1:]])
        if wider == width:
            grown[layer] = "it is as wide as the teacher's"
        elif shape.params >= ENOUGH * budget:
            grown[layer] = "the budget is used"
        elif larger.params > budget:
            grown[layer] = f"{larger.params:,} parameters would be beyond the budget"
        else:
            grown[layer] = larger
    return grown


# ---- teacher


def prepare_teacher(growth: RadianceGrowth):
    """Train the full field on the views' colours."""
    state, settings, full = growth.state, growth.config.growth, growth.teacher_shape
    network = create_field(full, growth.config.run.seed).to(growth.config.run.device)
    growth.display.message(f"teacher: {settings.teacher}, {full.params:,} parameters, {settings.teacher_epochs} epochs")
    _train(growth, network, "teacher", "teacher", settings.teacher_epochs, _on_colours(growth))
    growth.folder.save_state("teacher", {"model": network.state_dict()})
    reading = _read(growth, network, "teacher")
    state.teacher = {"name": settings.teacher, "params": full.params, "widths": list(full.widths), **reading,
                     "epochs": state.training.epoch, "seconds": state.training.seconds}
    growth.folder.event("teacher", **state.teacher)
    growth.display.message(f"teacher {settings.teacher}: {reading['validation_psnr']:.2f} dB on validation, {full.params:,} parameters")
    state.begin_stage(first_shape(growth.config), None)
    growth.recorder.checkpoint()


def load_teacher(growth: RadianceGrowth) -> RadianceField:
    """The teacher that this run trained, frozen."""
    network = RadianceField(growth.teacher_shape)
    network.load_state_dict(growth.folder.load_state("teacher")["model"])
    return network.requires_grad_(False).to(growth.config.run.device)


# ---- stages


def grow_stages(growth: RadianceGrowth):
    """Train, measure and widen, stage after stage, until the budget is used or nothing fits."""
    state, settings, full, teacher = growth.state, growth.config.growth, growth.teacher_shape, load_teacher(growth)
    while any(isinstance(larger, RadianceShape) for larger in room(growth.shape, full, settings.step, growth.budget).values()):
        network = _field(growth, growth.shape, state.weights)
        _train_stage(growth, network, teacher)
        layer, larger = _choose(growth, _measure_stage(growth, network, teacher))
        seed = keyed_generator(growth.config.run.seed, "widen", state.stage).initial_seed() % 2**63
        wide = widen_layer(network, layer, larger.widths[layer] - network.shape.widths[layer], seed)
        state.stages += 1
        state.begin_stage(larger, wide.state_dict())
        growth.recorder.checkpoint()
    growth.display.message(f"growth ends after {state.stages} stages at {growth.shape.params:,} parameters of {growth.budget:,}: "
                           f"widths {', '.join(map(str, growth.shape.widths))}")
    state.begin("retrain", state.weights)
    growth.recorder.checkpoint()


def _train_stage(growth: RadianceGrowth, network: RadianceField, teacher: RadianceField):
    """E epochs on the colours + alpha * (mean of R over hidden layers)."""
    state, epochs = growth.state, growth.config.growth.stage_epochs
    present = torch.zeros((), device=growth.config.run.device)
    loss = distilled_loss(growth.scene.near, growth.scene.far, teacher, present)
    title = f"stage {state.stage} ({network.shape.params:,} parameters)"
    _train(growth, network, f"stage {state.stage}", title, epochs, loss, lambda epoch: present.fill_(alpha(epoch, epochs)))


def _measure_stage(growth: RadianceGrowth, network: RadianceField, teacher: RadianceField) -> list[NodeMeasure]:
    """R of every hidden layer, and PSNR, on the validation views; writes the event of the stage."""
    state, shape, training = growth.state, network.shape, growth.state.training
    rays, colours = followed(growth.scene.validation)
    scene, samples = growth.scene, growth.config.training.samples
    layers = measure_layers(network, teacher, rays, scene.near, scene.far, samples)
    for each in layers:
        if not math.isfinite(each.R):
            raise RunError(f"stage {state.stage}: R of layer {each.node + 1} is {each.R}; start again with a smaller --lr")
    reached = rays_psnr(network, rays, colours, scene.near, scene.far, samples)
    share = shape.params / growth.teacher_shape.params
    growth.folder.event("stage", stage=state.stage, shape=shape.to_dict(), params=shape.params, share=share, validation_psnr=reached,
                        epochs=training.epoch, seconds=training.seconds, first_step_seconds=training.first_step_seconds,
                        layers=[_layer(each, shape.widths[each.node]) for each in layers])
    growth.display.message(
        f"stage {state.stage}: {shape.params:,} parameters ({100 * share:.1f} % of the teacher), validation {reached:.2f} dB, R "
        + ", ".join(f"{each.R:.3g}" for each in layers))
    for each in layers:
        if each.collapsed:
            growth.recorder.warn(f"stage {state.stage}: layer {each.node + 1} has collapsed: it says next to nothing (R {each.R:.3g} of "
                                 f"{each.R_zero:.3g} for silence), so R steers nothing")
    return layers


def _layer(measure: NodeMeasure, width: int) -> dict:
    """A layer's measures, as events have them."""
    figures = measure.to_dict()
    return {"layer": figures.pop("node"), "width": width, **{name: value for name, value in figures.items() if name != "q"}}


def _choose(growth: RadianceGrowth, layers: list[NodeMeasure]) -> tuple[int, RadianceShape]:
    """The layer furthest from the teacher's, of those that can grow (of equals the first); writes the event."""
    state, settings = growth.state, growth.config.growth
    drawn = torch.rand(len(layers), generator=keyed_generator(growth.config.run.seed, "score", state.stage)).tolist()
    scores = {"r": [each.R for each in layers], "relative": [each.relative for each in layers], "random": drawn}[settings.score]
    options, skipped = room(growth.shape, growth.teacher_shape, settings.step, growth.budget), []
    for layer in sorted(range(len(layers)), key=lambda layer: -scores[layer]):
        larger = options[layer]
        if isinstance(larger, RadianceShape):
            break
        skipped.append(f"layer {layer + 1}: {larger}")
    state.split_nodes.append(layer)
    by = larger.widths[layer] - growth.shape.widths[layer]
    growth.folder.event("widen", stage=state.stage, layer=layer, by=by, widths=list(larger.widths), scores=scores, skipped=skipped)
    growth.display.message(f"layer {layer + 1} grows by {by} neurons: widths {', '.join(map(str, larger.widths))}")
    return layer, larger


# ---- retraining and controls


def retrain(growth: RadianceGrowth):
    """Train the grown student on colours alone, read the test views once, write the artefact."""
    state, settings = growth.state, growth.config.growth
    network = _field(growth, growth.shape, state.weights)
    if state.reading is None:
        growth.display.message(f"retraining: {settings.retrain_epochs} epochs on colours alone")
        _train(growth, network, "retrain", "retraining", settings.retrain_epochs, _on_colours(growth))
        state.reading = _read(growth, network, "student")
        growth.folder.event("retrain", epochs=state.training.epoch, seconds=state.training.seconds, **state.reading)
        growth.recorder.checkpoint()
    network.load_state_dict(state.model)
    _save_student(growth, network)
    begin_next_control(growth)


def train_control(growth: RadianceGrowth, name: str) -> dict:
    """Train another field on colours for as many epochs as the student in all; its size and PSNR."""
    settings, network, title = growth.config.growth, control_field(growth, name), f"control {name}"
    epochs = growth.state.stages * settings.stage_epochs + settings.retrain_epochs
    if growth.state.training is None:
        growth.display.message(f"{title}: {CONTROLS[name]}, {network.shape.params:,} parameters, {epochs} epochs")
    _train(growth, network, title, title, epochs, _on_colours(growth))
    return {"params": network.shape.params, "widths": list(network.shape.widths), "epochs": epochs, **_read(growth, network, title)}


CONTROLS = {"random": "neurons of the teacher drawn at random, the same share of every layer, as many as the student's size holds",
            "half": "half of the neurons of every layer of the teacher, drawn at random",
            "narrow": "a field of one width from drawn weights, as wide as the student's size holds"}


def control_field(growth: RadianceGrowth, name: str) -> RadianceField:
    """A control before its training."""
    full, seed = growth.teacher_shape, growth.config.run.seed
    widths = [max(1, width // 2) for width in full.widths] if name == "half" else narrow_widths(full, growth.shape.params)
    if name == "narrow":
        return create_field(full.with_widths(widths), seed).to(growth.config.run.device)
    return keep_neurons(load_teacher(growth), widths, seed).requires_grad_(True)


def _read(growth: RadianceGrowth, network: RadianceField, name: str) -> dict:
    """PSNR over validation and test views, the mean over views; the test views are read once, here, and the first is kept."""
    reading = {}
    for split, views in (("validation", growth.scene.validation), ("test", growth.scene.test)):
        images = (_rendered_view(growth, network, views, number) for number in range(len(views)))
        first, errors = None, []
        for image, truth in zip(images, views.images):
            first = image if first is None else first
            errors.append(psnr((image - truth).square().mean().item()))
        reading[f"{split}_psnr"] = sum(errors) / len(errors)
    growth.folder.event("test_reading", network=name, views=len(errors), psnr=reading["test_psnr"], first_view_psnr=errors[0],
                        picture=_picture(first), truth=_picture(views.images[0]))
    return reading


def _rendered_view(growth: RadianceGrowth, network: RadianceField, views: Views, number: int) -> Tensor:
    """(H, W, 3) of one view."""
    pixels = views.pixels // len(views)
    rays = views.rays(torch.arange(number * pixels, (number + 1) * pixels))
    image = rendered(network, rays, growth.scene.near, growth.scene.far, growth.config.training.samples)
    return image.view_as(views.images[number])


def _picture(image: Tensor) -> str:
    """An image (H, W, 3) as PNG in base64, no larger than the report shows it."""
    from PIL import Image

    content, picture = io.BytesIO(), Image.fromarray((image * 255).round().byte().numpy())
    picture.thumbnail((_SHOWN, _SHOWN))
    picture.save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


# ---- artefact and end


def _save_student(growth: RadianceGrowth, network: RadianceField):
    """`model/radiance.json` and `model/model.safetensors`."""
    from safetensors.torch import save

    config, scene = growth.config, growth.scene
    manifest = {"odn_fast": __version__, **environment(), "shape": network.shape.to_dict(), "params": network.shape.params,
                "near": scene.near, "far": scene.far, "samples": config.training.samples, "scene": scene.name,
                "data_checksum": growth.checksum, "seed": config.run.seed, "threads": config.run.threads,
                "precision": growth.fit_config.precision, **growth.state.reading}
    with growth.folder.reporting("model"):
        (growth.folder.path / "model").mkdir(exist_ok=True)
    weights = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    growth.folder.write("model/model.safetensors", save(weights))
    growth.folder.write("model/radiance.json", json.dumps(manifest, indent=1).encode())


def finish(growth: RadianceGrowth):
    """Last event, report, last checkpoint."""
    state, shape = growth.state, growth.shape
    state.begin("finished")
    growth.folder.event(
        "result", **state.reading, params=shape.params, widths=list(shape.widths), budget=growth.budget, stages=state.stages,
        teacher=state.teacher, controls=state.controls, seconds=growth.recorder.seconds())
    conclude(growth.folder, growth.recorder)


# ---- what they share


def _train(growth: RadianceGrowth, network: RadianceField, key: str, title: str, epochs: int, loss: Loss,
           before_epoch: Callable[[int], object] = lambda epoch: None):
    """Adam, its rate annealed over the epochs, PSNR on some validation rays after every one. Raises RunError if it diverges."""
    settings, scene = growth.config.training, growth.scene
    views, seed = scene.train.to(growth.config.run.device), growth.config.run.seed
    batches = RayBatches(views, settings.rays, settings.steps_per_epoch, settings.samples, seed)
    optimizer = make_adam(network, settings.lr, growth.config.run.device)
    rays, colours = followed(scene.validation)

    def validate(after_batch) -> float:
        errors = []
        for some, wanted in zip(rays.split(_VALIDATED), colours.split(_VALIDATED)):
            errors.append((rendered(network, some, scene.near, scene.far, settings.samples) - wanted).square())
            after_batch()
        return psnr(torch.cat(errors).mean().item())

    plan = Plan(key, title, lambda _: f"{network.shape.params:,} parameters", loss, batches, CosineEpochs(epochs, settings.lr),
                optimizer, validate, before_epoch)
    if train(growth.state, growth.recorder, growth.fit_config, network, plan) == "diverged":
        raise RunError(f"{title}: the loss is not finite any more; start again with a smaller --lr than {settings.lr:g}")


def _on_colours(growth: RadianceGrowth) -> Loss:
    return photometric_loss(growth.scene.near, growth.scene.far)


def _field(growth: RadianceGrowth, shape: RadianceShape, weights: dict | None) -> RadianceField:
    """The student of a shape, with given weights or drawn from the seed."""
    network = create_field(shape, growth.config.run.seed)
    if weights is not None:
        network.load_state_dict(weights)
    return network.to(growth.config.run.device)


def followed(views: Views) -> tuple[Tensor, Tensor]:
    """Rays and colours of at most 2,048 pixels, evenly spaced over all views."""
    chosen = torch.linspace(0, views.pixels - 1, min(views.pixels, _FOLLOWED), dtype=torch.float64).round().long()
    return views.rays(chosen), views.colours(chosen)
