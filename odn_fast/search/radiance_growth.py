"""Growth of a radiance field: a narrow NeRF grown under a trained one's guidance until it fills a share of its size.

SEArch, section 4.5: train a teacher on views of a scene, distil its hidden layers into a narrow student through channel
attention, widen the layer that is furthest from the teacher's, repeat until the budget is reached; retrain.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .. import __version__
from ..config import ConfigError, GrowViewsConfig, from_values, resolve, views_dataset
from ..data.errors import first_line
from ..data.views import Scene
from ..engine import check_device
from ..models.radiance import RadianceField, RadianceShape
from ..record import RunFolder
from .display import Display, Silent
from .growth_controls import run_controls
from .growth_state import GrowState
from .lifecycle import (
    Session, announce_computing, announce_resumption, at_work, from_settings, go_through, new_folder, record_start, reopened,
    with_threads)
from .radiance_phases import (
    RadianceGrowth, budget_of, finish, first_shape, followed, grow_stages, prepare_teacher, retrain, teacher_shape, train_control)
from .setup import default_folder, load_data


@dataclass(frozen=True)
class ViewsResult:
    """What growth came to. PSNR in dB, the mean over views.

    Attributes:
        params, widths: of the student.
        controls: other fields of that size: {"name", "params", "widths", "epochs", "validation_psnr", "test_psnr"}.
        teacher: {"name", "params", "widths", "epochs", "seconds", "validation_psnr", "test_psnr"}.
    """

    folder: Path
    params: int
    widths: tuple[int, ...]
    stages: int
    validation_psnr: float
    test_psnr: float
    controls: list[dict]
    teacher: dict
    config: GrowViewsConfig

    @property
    def network(self) -> RadianceField:
        """The student."""
        return load_field(self.folder / "model")


def load_field(folder: str | Path) -> RadianceField:
    """The radiance field that a growth left in `folder`, its `model`. Raises ValueError for missing or damaged files."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        description = json.loads((Path(folder) / "radiance.json").read_text(encoding="utf-8"))
        weights = load_file(Path(folder) / "model.safetensors")
        network = RadianceField(RadianceShape.from_dict(description["shape"]))
        network.load_state_dict(weights)
    except (ValueError, KeyError, TypeError, RecursionError, RuntimeError, OSError, SafetensorError) as error:
        raise ValueError(f"{folder}: holds no radiance field that can be read ({first_line(error)})") from None
    return network


def grow_views(views: str | Path = "analytic", *, out: str | Path | None = None, progress: bool = False,
               **settings: Any) -> ViewsResult:
    """Grow a student of a radiance field that is trained first.

    Args:
        views: a folder in nerf_synthetic's layout, or "analytic" for a scene that needs no data.
        out: the run folder to make (default: a new one in `runs/`).
        progress: print what happens.
        settings: any setting of `GrowViewsConfig` by the last part of its name, such as `teacher` ("8x256"),
            `budget_share`, `size`, `rays`, `seed`.

    Raises:
        ConfigError, DataError: something asked for cannot be; the message is one line.
        RunError: the run cannot go on; it can be resumed from its folder.
        Interrupted: a signal stopped it after its state was saved.
    """
    values = from_settings(settings, GrowViewsConfig) | {"data.dataset": views_dataset(views)}
    return run_views_growth(from_values(values, kind=GrowViewsConfig), out, display=Display() if progress else Silent())


def run_views_growth(config: GrowViewsConfig, out: str | Path | None, *, display: Display | Silent) -> ViewsResult:
    """A new growth in a new run folder."""
    config = with_threads(resolve(config))
    if config.run.precision == "auto":  # a field this narrow gains nothing from bf16
        config = from_values({"run.precision": "fp32"}, config.model_dump(), GrowViewsConfig)
    check_device(config.run.device)
    _check_sizes(config)
    scene = load_data(config)
    checksum = scene.checksum()
    folder = new_folder(out or default_folder("grow-views", scene.name, config.growth.teacher), config)
    return _run(config, scene, checksum, folder, GrowState(), display, resumed=False)


def resume_views_growth(path: str | Path, given: dict[str, Any] | None = None, *, display: Display | Silent) -> ViewsResult:
    """Go on with the run in folder `path` to the same bits that an uninterrupted run would have given.

    given: settings the user repeated, as dotted paths; one that differs from the run's is refused.
    """
    with reopened(path, given or {}, GrowViewsConfig, None, True, display) as run:
        state = GrowState.from_dict(run.saved["state"]) if run.saved else GrowState()
    return _run(run.config, run.data, run.checksum, run.folder, state, display, resumed=run.saved is not None)


def _check_sizes(config: GrowViewsConfig):
    """Refuse a student that is too large before it has grown."""
    full, first, budget = teacher_shape(config), first_shape(config), budget_of(config)
    if config.growth.start > full.widths[0]:
        raise ConfigError(f"start: expected at most {full.widths[0]}, the teacher's width, got {config.growth.start}")
    if first.params > budget:
        raise ConfigError(f"budget_share: {config.growth.budget_share:g} of the teacher's {full.params:,} parameters are too few: "
                          f"the student starts with {first.params:,}")


def _run(config: GrowViewsConfig, scene: Scene, checksum: str, folder: RunFolder, state: GrowState, display: Display | Silent,
         resumed: bool) -> ViewsResult:
    with at_work(config, checksum, folder, state, display) as session:
        session.recorder.measured_in("rays", "dB")
        growth = RadianceGrowth(config, scene, checksum, folder, display, state, session.recorder, session.fit_config)
        _phases(growth, session, resumed)
        return _result(growth)


def _phases(growth: RadianceGrowth, session: Session, resumed: bool):
    phases = {"teacher": partial(prepare_teacher, growth), "stage": partial(grow_stages, growth), "retrain": partial(retrain, growth),
              "control": partial(run_controls, growth, partial(train_control, growth)), "result": partial(finish, growth)}
    go_through(phases, growth.state, partial(_announce, growth, session, resumed), growth.folder, growth.display)


def _announce(growth: RadianceGrowth, session: Session, resumed: bool):
    """First screen: what runs on what, and what is wanted."""
    config, scene, state, say = growth.config, growth.scene, growth.state, growth.display.message
    settings, full = config.growth, growth.teacher_shape
    views = {split: len(getattr(scene, split)) for split in ("train", "validation", "test")}
    size = "x".join(map(str, scene.input_shape[1:]))
    say(f"odn_fast {__version__}: grow-views on {scene.name} ({views['train']:,} training, {views['validation']:,} validation, "
        f"{views['test']:,} test views of {size} pixels)")
    announce_computing(config, session, growth.display)
    say(f"wanted: a student of at most {growth.budget:,} parameters, {100 * settings.budget_share:g} % of the {full.params:,} of the "
        f"teacher, {settings.teacher}; it starts at width {settings.start} and grows by {settings.step}")
    say(f"an epoch is {config.training.steps_per_epoch} steps of {config.training.rays} rays, {config.training.samples} samples "
        f"each; {settings.teacher_epochs} epochs for the teacher, {settings.stage_epochs} a stage, {settings.retrain_epochs} of "
        f"retraining; controls: {', '.join(settings.controls) or 'none'}")
    say(f"run folder: {growth.folder.path}")
    if not resumed:
        dataset = {"name": scene.name, "checksum": growth.checksum, **views, "input_shape": list(scene.input_shape),
                   "followed_rays": len(followed(scene.validation)[0])}
        record_start(config, dataset, growth.folder, session, search="grow-views", teacher=settings.teacher, budget=growth.budget)
        return
    announce_resumption(f"at {state.where}", state.place, state.training, growth.folder, growth.display)


def _result(growth: RadianceGrowth) -> ViewsResult:
    state, shape = growth.state, growth.shape
    return ViewsResult(folder=growth.folder.path, params=shape.params, widths=shape.widths, stages=state.stages,
                       validation_psnr=state.reading["validation_psnr"], test_psnr=state.reading["test_psnr"],
                       controls=state.controls, teacher=state.teacher, config=growth.config)
