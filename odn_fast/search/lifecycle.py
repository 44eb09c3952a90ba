"""How a run begins, goes on in another process, and is stopped; shared by all searches."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__, _extension
from ..config import (
    Config, ConfigError, DataConfig, ExpandConfig, GrowConfig, GrowViewsConfig, absolute_paths, flat, from_values, kind_named,
    read_yaml, to_yaml)
from ..data import DataSet, arrays_with, from_arrays
from ..data.views import Scene
from ..engine import FitConfig, Interrupted, Interrupts, Training, check_device, resolve_precision, tune_allocator
from ..machine import environment
from ..record import RunFolder
from .display import Display, Silent
from .recorder import Recorder
from .setup import check_apart, load_data, run_environment
from .state import State

# Settings that a resumed run may be given anew: files may have moved (their checksum is compared), and more damaged pictures may
# turn up than were allowed for (the others that stand in for them do not depend on the limit).
_MAY_CHANGE = ("data.data_dir", "data.corrupt_limit")


@dataclass(frozen=True)
class Session:
    """What a process at work in a run folder has: the recorder, how steps are computed, whether the allocator is tuned."""

    recorder: Recorder
    fit_config: FitConfig
    tuned: bool


@dataclass(frozen=True)
class Reopened:
    """A run folder with what it was made with, and the state its newest checkpoint holds, or None."""

    folder: RunFolder
    config: ExpandConfig | GrowConfig
    data: DataSet
    checksum: str
    saved: dict | None


def kind_of(path: str | Path) -> type[ExpandConfig] | type[GrowConfig] | type[GrowViewsConfig]:
    """Which search the run in folder `path` is of. A folder that is none is refused where it is opened."""
    file = Path(path) / "config.yaml"
    return kind_named(read_yaml(file).get("kind") if file.is_file() else None)


def settings_of(path: str | Path) -> dict[str, Any]:
    """The settings of the run in folder `path`, as dotted paths. Raises ConfigError."""
    return flat(from_values({}, read_yaml(Path(path) / "config.yaml"), kind_of(path)))


def from_settings(settings: dict[str, Any], kind: type[Config]) -> dict[str, Any]:
    """Dotted values from settings named as tolerance or search_tolerance. Raises ConfigError for an unknown one."""
    leaves = {path.rsplit(".", 1)[-1]: path for path in flat(kind())}  # lr, of two sections, is the later one's
    names = {path.replace(".", "_"): path for path in flat(kind())} | leaves
    unknown = [name for name in settings if name not in names]
    if unknown:
        raise ConfigError(f"{unknown[0]}: no such setting; settings are {', '.join(leaves)}")
    return {names[name]: value for name, value in settings.items()}


def given_data(dataset: DataSet | None, train, validation, test, class_names, values: dict[str, Any]) -> DataSet | None:
    """The data set that was handed over, or that arrays make; None where a name is to be loaded."""
    seed, limit = values.get("run.seed", 0), values.get("data.limit_train")
    if train is None:
        if validation is not None or test is not None or class_names is not None:
            raise ConfigError("validation, test and class_names: go with train, which is missing")
        given = dataset
    else:
        if dataset is not None or values.get("data.dataset", "arrays") != "arrays":
            raise ConfigError("train: does not go with dataset; give one of them")
        fraction = values.get("data.val_fraction")
        if fraction is not None and validation is not None:
            raise ConfigError("val_fraction: makes no sense where validation is given")
        given = from_arrays(train, validation, test, class_names, seed=seed,
                            **({} if fraction is None else {"val_fraction": fraction}))
    if given is not None:
        for name in ("image_size", "test_fraction", "crop", "corrupt_limit"):
            default = getattr(DataConfig(), name)
            if values.get(f"data.{name}", default) != default:
                raise ConfigError(f"{name}: makes no sense for data from Python")
        loader = values.get("data.loader", "auto")
        if loader not in ("auto", given.loader):
            if given.damage is not None:
                raise ConfigError(f"loader: the data set has its own, {given.loader}; give it to odn_fast.data.load")
            given = arrays_with(given, loader)
    return given.limit_train(limit, seed) if given is not None and limit else given


def with_threads(config: Config) -> Config:
    """The configuration with the number of threads that it is to be resumed with."""
    return from_values({"run.threads": config.run.threads or torch.get_num_threads()}, config.model_dump(), type(config))


def with_loader(config: Config, data: DataSet) -> Config:
    """The configuration with the loader that it is to be resumed with."""
    return from_values({"data.loader": data.loader}, config.model_dump(), type(config))


def checksum_of(data: DataSet | Scene, display: Display | Silent) -> str:
    """The data's checksum; where files have to be read for it, it is said before."""
    if isinstance(data, DataSet) and data.decodes:
        count = sum(len(split) for _, split in data.splits())
        display.message(f"checksum of the data: reading {count:,} picture files once")
    return data.checksum()


def at_hand(data: DataSet, device: str, folder: RunFolder, display: Display | Silent) -> DataSet:
    """The data on the device where it is needed. Pictures found damaged from now on become events of the run."""
    def tell(text: str):
        display.warning(text)
        folder.event("warning", text=text)

    if data.damage is not None:
        data.damage.tell = tell
    return data.to(device)


def new_folder(path: str | Path, config: Config) -> RunFolder:
    """A new run folder. A signal that comes while it is made is heard as soon as there is a run that can be resumed."""
    check_apart(path, config)
    with Interrupts() as interrupts, interrupts.deferred():
        folder = RunFolder.create(path, to_yaml(config))
    if interrupts.pending is not None:
        with folder, _naming(folder):
            raise Interrupted(interrupts.pending)
    return folder


@contextlib.contextmanager
def reopened(path: str | Path, given: dict[str, Any], kind: type[Config], data: DataSet | None, handed_over: bool,
             display: Display | Silent) -> Iterator[Reopened]:
    """The run in folder `path`, checked against what it was made with; closed again if what happens inside fails.

    Args:
        given: settings the user repeated, as dotted paths; one that differs from the run's is refused.
        data: again what the run was started with, where that came from Python.
        handed_over: whether the model (or teacher) was given again in Python.
    """
    with contextlib.ExitStack() as on_error:
        folder = on_error.enter_context(RunFolder.open(path))
        config = from_values({}, read_yaml(folder.path / "config.yaml"), kind)
        ours = flat(config)
        repeated = flat(absolute_paths(from_values(given, kind=kind)))
        for name in given:
            if ours[name] != repeated[name] and name not in _MAY_CHANGE:
                raise ConfigError(f"resume {path}: {name} = {repeated[name]} contradicts the run's {ours[name]}; "
                                  "give --resume alone, or start a new run")
        check_device(config.run.device)
        saved = folder.load_checkpoint()
        warnings = list(folder.warnings)
        if _needs_python(config) and not handed_over or data is None and config.data.dataset == "arrays":
            raise ConfigError(f"resume {path}: the run was given its model or data in Python; resume it from there")
        if saved and saved["config"] != ours:
            name = next(name for name in ours if saved["config"].get(name) != ours[name])
            raise ConfigError(f"{folder.path / 'config.yaml'}: {name} = {ours[name]} differs from the "
                              f"{saved['config'].get(name)} that the run was made with; put it back, or start a new run")
        changed = {name: repeated[name] for name in _MAY_CHANGE if name in given}
        data = data or load_data(from_values(changed, config.model_dump(), kind))
        checksum = checksum_of(data, display)
        if saved and saved["data"] != checksum:
            raise ConfigError(f"resume {path}: the data set {config.data.dataset} is not the one the run was made with "
                              "(its checksum differs); put the files back, or start a new run")
        for name, ours_now in run_environment(config).items():
            if saved and saved["environment"].get(name) != ours_now:
                warnings.append(f"{name} is {ours_now}, the run was made with {saved['environment'].get(name)}: "
                                "it goes on, but not to the same bits")
        for text in warnings:
            display.warning(text)
            folder.event("warning", text=text)
        yield Reopened(folder, config, data, checksum, saved)
        on_error.pop_all()


def _needs_python(config: ExpandConfig | GrowConfig) -> bool:
    """Whether the model, or the teacher, has no name."""
    if isinstance(config, GrowConfig):
        return config.teacher.file is None and config.teacher.train is None
    return isinstance(config, ExpandConfig) and config.model is None


@contextlib.contextmanager
def at_work(config: ExpandConfig | GrowConfig, checksum: str, folder: RunFolder, state: State, display: Display | Silent,
            **header: Any) -> Iterator[Session]:
    """While entered, this process works in the run: threads, allocator and signal handlers are set, and put back after it.

    header: stored with every checkpoint beside configuration, environment and the data's checksum.
    """
    threads = torch.get_num_threads()
    with folder, _naming(folder), Interrupts() as interrupts, contextlib.ExitStack() as after:
        after.callback(torch.set_num_threads, threads)
        after.callback(display.close)
        torch.set_num_threads(config.run.threads)
        if torch.device(config.run.device).type == "cuda":
            after.enter_context(torch.cuda.device(config.run.device))  # what names no device means this one
        stored = {"config": flat(config), "environment": run_environment(config), "data": checksum, **header}
        recorder = Recorder(folder, display, interrupts, state, stored, config.run.checkpoint_minutes)
        fit_config = FitConfig(resolve_precision(config.run.precision, config.run.device), config.run.device, config.run.capture)
        yield Session(recorder, fit_config, config.run.malloc_tuning and tune_allocator())


@contextlib.contextmanager
def _naming(folder: RunFolder):
    """Say in an interruption which run can be resumed."""
    try:
        yield
    except Interrupted as stop:
        stop.folder = folder.path
        raise


def announce(title: str, config: ExpandConfig | GrowConfig, data: DataSet, session: Session, display: Display | Silent):
    """The first lines of the first screen: what runs on what."""
    test = len(data.test) if data.test else 0
    shape = "x".join(map(str, data.input_shape))
    display.message(f"odn_fast {__version__}: {title} on {data.name} ({len(data.train):,} training, {len(data.validation):,} "
                    f"validation, {test:,} test images of {shape}, {data.num_classes} classes)")
    display.message(f"loader {data.loader}: {data.loader_reason}")
    announce_computing(config, session, display)


def go_through(phases: dict[str, Callable[[], None]], state: State, announce: Callable[[], None], folder: RunFolder,
               display: Display | Silent):
    """The phases of a run, by name and in order, from the one that its state is in; each moves the state on."""
    if state.phase == "finished":
        display.message(f"the run in {folder.path} is finished")
        return
    announce()
    for name, phase in phases.items():
        if state.phase == name:
            phase()


def announce_computing(config: ExpandConfig | GrowConfig | GrowViewsConfig, session: Session, display: Display | Silent):
    """The line that says how steps are computed."""
    precision = session.fit_config.precision
    note = " (chosen by auto; weights, statistics and losses stay fp32)" if (
        config.run.precision == "auto" and precision == "bf16") else ""
    display.message(f"{config.run.threads} threads, training in {precision}{note}, allocator "
                    f"{'tuned' if session.tuned else 'as it is'}, C++ ops {_instruction_set() or 'not built (plain PyTorch)'}, "
                    f"seed {config.run.seed}")


def announce_resumption(where: str, place: dict[str, Any], training: Training | None, folder: RunFolder, display: Display | Silent):
    """The line and the event of a process that goes on: `where` in words, `place` as the event has it."""
    folder.event("resume", **place, epoch=training.epoch if training else 0, step=training.step if training else 0)
    display.message(f"resumed {where}" + (f", epoch {training.epoch + 1}, step {training.step}" if training else ""))


def record_start(config: ExpandConfig | GrowConfig | GrowViewsConfig, dataset: dict[str, Any], folder: RunFolder, session: Session,
                 **values: Any):
    """The first event of a run. dataset: what it says of the data, such as `described` gives."""
    folder.event(
        "start", version=__version__, **environment(), threads=config.run.threads, device=config.run.device,
        precision=session.fit_config.precision, precision_requested=config.run.precision, malloc_tuned=session.tuned,
        extension=_instruction_set(), **values, dataset=dataset)


def described(data: DataSet, checksum: str) -> dict[str, Any]:
    """A data set of labelled images, as events have it."""
    return {"name": data.name, "checksum": checksum, "train": len(data.train), "validation": len(data.validation),
            "test": len(data.test) if data.test else None, "input_shape": list(data.input_shape),
            "class_names": list(data.class_names), "loader": data.loader, "loader_reason": data.loader_reason,
            "damaged": sorted(map(str, data.damage.found)) if data.damage else []}


def conclude(folder: RunFolder, recorder: Recorder):
    """After the last event: the report and the last checkpoint."""
    from ..report import write_report  # brings matplotlib, which a search needs only now

    with folder.reporting("report.html"):
        write_report(folder.path)
    recorder.checkpoint()


def _instruction_set() -> str | None:
    return _extension.instruction_set() if _extension.available else None


def duration(seconds: float) -> str:
    """Seconds for people to read."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
