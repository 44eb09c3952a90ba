"""Growth: the student of a teacher, grown until it fills a budget of parameters or FLOPs.

SEArch: start from two nodes and one unit, distil the teacher's inner maps into it through channel attention, find the
node with most to gain, split its edge, repeat until the budget is reached; retrain.
"""

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from .. import export
from ..config import ConfigError, GrowConfig, from_values, resolve
from ..data import DataSet
from ..engine import check_device
from ..models.teachers import NETWORKS, Teacher
from ..record import RunFolder
from .display import Display, Silent
from .growth_controls import run_controls
from .growth_phases import Growth, finish, grow_stages, prepare_teacher, restore_teacher, retrain, train_control
from .growth_setup import check_teacher, create_teacher, first_student, limits_of, natural_width, teacher_checksum
from .growth_state import GrowState
from .lifecycle import (
    Session, announce, announce_resumption, at_hand, at_work, checksum_of, described, from_settings, given_data, go_through, new_folder,
    record_start, reopened, with_loader, with_threads)
from .setup import default_folder, load_data


@dataclass(frozen=True)
class GrowResult:
    """What growth came to. Accuracies are percent, of the folded fp32 network.

    Attributes:
        params, flops: of the student; FLOPs are multiply-adds + 2 per batch-norm output element.
        stages: trainings, and splits.
        controls: the same graph trained otherwise: {"name", "validation_accuracy", "test_accuracy", "epochs"}.
        teacher: {"name", "params", "flops", "maps", "validation_accuracy", "seconds"}.
        collapsed: whether some node shrank towards a map of zeros on the way.
    """

    folder: Path
    params: int
    flops: int
    stages: int
    validation_accuracy: float
    test_accuracy: float | None
    controls: list[dict]
    teacher: dict
    collapsed: bool
    config: GrowConfig

    @property
    def network(self) -> nn.Module:
        """The student, in eval mode."""
        return export.load(self.folder / "model")


def grow(teacher: str | Path | Teacher | None = None, dataset: str | DataSet | None = None, *, train=None, validation=None,
         test=None, class_names=None, budget: int | str | None = None, out: str | Path | None = None, progress: bool = False,
         **settings: Any) -> GrowResult:
    """Grow a student for a teacher until it fills a budget.

    Args:
        teacher: the name of a network to train first, one of `odn_fast.models.teachers.NETWORKS`; the file of a trained
            one; or a `Teacher`, such as `odn_fast.models.teachers.teacher_of` makes of any network.
        dataset: a name such as "cifar10" or "imagefolder:PATH", or a `DataSet`; or give arrays:
        train, validation, test: pairs (x, y) of images (N, C, H, W) and labels (N,), arrays or tensors, or torch
            datasets. Without `validation` a tenth of `train` is set apart.
        class_names: names of the classes of arrays.
        budget: most parameters of the student, such as 400_000 or "0.4M"; or give budget_flops.
        out: the run folder to make (default: a new one in `runs/`).
        progress: print what happens.
        settings: any setting of `GrowConfig` by the last part of its name, such as `budget_flops`, `stage_epochs`, `score`,
            `lr`, `seed`; the teacher's as `teacher_lr`, `teacher_epochs`.

    Raises:
        ConfigError, DataError, ValueError: something asked for cannot be; the message is one line.
        RunError: the run cannot go on (disk full, diverged, ...); it can be resumed from its folder.
        Interrupted: a signal stopped it after its state was saved.
    """
    values = from_settings(settings, GrowConfig)
    if isinstance(teacher, (str, Path)):
        values["teacher.train" if teacher in NETWORKS else "teacher.file"] = str(teacher)
    if budget is not None:
        values["growth.budget"] = budget
    if isinstance(dataset, str):
        values["data.dataset"] = dataset
    given = given_data(None if isinstance(dataset, str) else dataset, train, validation, test, class_names, values)
    if given is not None:
        values["data.dataset"] = given.name
    return run_growth(from_values(values, kind=GrowConfig), out, teacher=teacher if isinstance(teacher, Teacher) else None,
                      data=given, display=Display() if progress else Silent())


def run_growth(config: GrowConfig, out: str | Path | None, *, teacher: Teacher | None = None, data: DataSet | None = None,
               display: Display | Silent) -> GrowResult:
    """A new growth in a new run folder. `teacher` and `data` stand in for those that the configuration names."""
    config = with_threads(resolve(config))
    if teacher is not None:
        config = from_values({"teacher.train": None, "teacher.file": None}, config.model_dump(), GrowConfig)
    check_device(config.run.device)
    data = data or load_data(config)
    teacher = _teacher(config, data, teacher)
    if config.growth.width is None:
        config = from_values({"growth.width": natural_width(teacher)}, config.model_dump(), GrowConfig)
    first_student(config, teacher, data)
    config, checksum = with_loader(config, data), checksum_of(data, display)
    folder = new_folder(out or default_folder("grow", config.data.dataset, teacher.name.lower()), config)
    return _run(config, teacher, data, checksum, folder, GrowState(), display, resumed=False)


def resume_growth(path: str | Path, given: dict[str, Any] | None = None, *, teacher: Teacher | None = None,
                  data: DataSet | None = None, display: Display | Silent) -> GrowResult:
    """Go on with the run in folder `path` to the same bits that an uninterrupted run would have given.

    Args:
        given: settings the user repeated, as dotted paths; one that differs from the run's is refused.
        teacher, data: again what the run was started with, where that came from Python.
    """
    with reopened(path, given or {}, GrowConfig, data, teacher is not None, display) as run:
        state = GrowState.from_dict(run.saved["state"]) if run.saved else GrowState()
        teacher = _teacher(run.config, run.data, teacher)
        if run.saved and run.saved["teacher"] != _checksum(run.config, teacher):
            raise ConfigError(f"resume {path}: the teacher is not the one the run was made with (its checksum differs); put its "
                              "file back, or start a new run")
    return _run(run.config, teacher, run.data, run.checksum, run.folder, state, display, resumed=run.saved is not None)


def _teacher(config: GrowConfig, data: DataSet, given: Teacher | None) -> Teacher:
    if given is None:
        return create_teacher(config, data)
    check_teacher(given, data)
    return copy.deepcopy(given)


def _checksum(config: GrowConfig, teacher: Teacher) -> str | None:
    """Of a teacher that comes from outside the run."""
    return None if config.teacher.train else teacher_checksum(teacher)


def _run(config: GrowConfig, teacher: Teacher, data: DataSet, checksum: str, folder: RunFolder, state: GrowState,
         display: Display | Silent, resumed: bool) -> GrowResult:
    with at_work(config, checksum, folder, state, display, teacher=_checksum(config, teacher)) as session:
        data = at_hand(data, config.run.device, folder, display)
        growth = Growth(config, teacher, first_student(config, teacher, data), data, checksum, folder, display, state,
                        session.recorder, session.fit_config)
        _phases(growth, session, resumed)
        return _result(growth)


def _phases(growth: Growth, session: Session, resumed: bool):
    def begin():
        _announce(growth, session, resumed)
        if growth.state.phase != "teacher":
            restore_teacher(growth)

    phases = {"teacher": partial(prepare_teacher, growth), "stage": partial(grow_stages, growth), "retrain": partial(retrain, growth),
              "control": partial(run_controls, growth, partial(train_control, growth)), "result": partial(finish, growth)}
    go_through(phases, growth.state, begin, growth.folder, growth.display)


def _announce(growth: Growth, session: Session, resumed: bool):
    """First screen: what runs on what, and what is wanted."""
    config, state, say = growth.config, growth.state, growth.display.message
    settings, limits = config.growth, limits_of(config, growth.teacher)
    announce(f"grow a student of {growth.teacher.name}", config, growth.data, session, growth.display)
    say(f"wanted: a student of at most {limits}; the teacher has {growth.teacher.params:,} parameters and "
        f"{growth.teacher.flops / 1e6:.2f} M FLOPs (multiply-adds + 2 per batch-norm output)")
    controls = ", ".join(settings.controls) or "none"
    say(f"{settings.stage_epochs} epochs a stage, score {settings.score}, {settings.retrain_epochs} epochs of retraining; "
        f"controls: {controls}")
    say(f"run folder: {growth.folder.path}")
    if not resumed:
        record_start(config, described(growth.data, growth.data_checksum), growth.folder, session, search="grow",
                     teacher=growth.teacher.name, limits=limits.to_dict())
        return
    announce_resumption(f"at {state.where}", state.place, state.training, growth.folder, growth.display)


def _result(growth: Growth) -> GrowResult:
    state, reading = growth.state, growth.state.reading
    return GrowResult(folder=growth.folder.path, params=reading["params"], flops=reading["flops"], stages=state.stages,
                      validation_accuracy=reading["validation_accuracy"], test_accuracy=reading["test_accuracy"],
                      controls=state.controls, teacher=state.teacher, collapsed=state.collapsed, config=growth.config)
