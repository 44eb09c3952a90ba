"""Progressive depth expansion: the smallest depth of a network that meets a target accuracy.

Optimally Deep Networks, section III and Algorithm 1: warm all depths up in one shared pass, train from shallow to deep
until the target is met, fine-tune, extract.
"""

import contextlib
import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__, _extension, export
from ..config import ConfigError, ExpandConfig, absolute_paths, flat, from_values, read_yaml, resolve, to_yaml
from ..data import DataSet, from_arrays
from ..engine import FitConfig, Interrupted, Interrupts, resolve_precision, tune_allocator
from ..machine import environment
from ..models import DepthNetwork
from ..record import RunFolder
from .display import Display, Silent
from .phases import Search, baseline, fine_tune, search_depths, warm_up
from .preview import depth_rows
from .recorder import Recorder
from .setup import check_depths, check_device, create_model, default_folder, load_data, run_environment
from .state import RunState


@dataclass(frozen=True)
class Result:
    """What a search found. Accuracies are percent, of the folded fp32 network; `depths` has one entry per depth."""

    folder: Path
    depth: int
    target_met: bool
    validation_accuracy: float
    test_accuracy: float | None
    depths: list[dict]
    baseline: dict | None
    config: ExpandConfig

    @property
    def network(self) -> nn.Module:
        """The extracted network, in eval mode."""
        return export.load(self.folder / "model")


def expand(model: str | DepthNetwork = "resnet18", dataset: str | DataSet | None = None, *, train=None, validation=None,
           test=None, class_names=None, target: float | None = None, out: str | Path | None = None,
           progress: bool = False, **settings: Any) -> Result:
    """Search the smallest depth of `model` that meets a target accuracy.

    Args:
        model: a name from `odn_fast.models.NAMES`, or a `DepthNetwork`.
        dataset: a name such as "mnist" or "imagefolder:PATH", or a `DataSet`; or give arrays:
        train, validation, test: pairs (x, y) of images (N, C, H, W) and labels (N,), arrays or tensors, or torch
            datasets. Without `validation` a tenth of `train` is set apart.
        class_names: names of the classes of arrays.
        target: accuracy wanted, in percent.
        out: the run folder to make (default: a new one in `runs/`).
        progress: print what happens.
        settings: any setting of `ExpandConfig` by the last part of its name, such as `tolerance`, `epochs_cap`,
            `batch_size`, `seed`, `threads`, `precision`, `val_fraction`.

    Raises:
        ConfigError, DataError, ValueError: something asked for cannot be; the message is one line.
        RunError: the run cannot go on (disk full, every depth diverged, ...); it can be resumed from its folder.
        Interrupted: a signal stopped it after its state was saved.
    """
    leaves = {path.rsplit(".", 1)[-1]: path for path in flat(ExpandConfig())}
    unknown = [name for name in settings if name not in leaves]
    if unknown:
        raise ConfigError(f"{unknown[0]}: no such setting; settings are {', '.join(leaves)}")
    values = {leaves[name]: value for name, value in settings.items()}
    if target is not None:
        values["search.target_accuracy"] = target
    values["model"] = model if isinstance(model, str) else None
    if isinstance(dataset, str):
        values["data.dataset"] = dataset
    given = _given_data(None if isinstance(dataset, str) else dataset, train, validation, test, class_names, values)
    if given is not None:
        values["data.dataset"] = given.name
    return run_expansion(from_values(values), out, model=None if isinstance(model, str) else model, data=given,
                         display=Display() if progress else Silent())


def resume(folder: str | Path, *, model: DepthNetwork | None = None, dataset: DataSet | None = None, train=None,
           validation=None, test=None, class_names=None, progress: bool = False) -> Result:
    """Go on with the run in `folder`, to the same bits that an uninterrupted run would have given.

    Args:
        model, dataset, train, validation, test, class_names: again what `expand` was given, where it was no name.

    Raises:
        ConfigError, RunError, Interrupted: as `expand`.
    """
    config = from_values({}, read_yaml(Path(folder) / "config.yaml"))
    given = _given_data(dataset, train, validation, test, class_names, flat(config))
    return resume_expansion(folder, model=model, data=given, display=Display() if progress else Silent())


def _given_data(dataset: DataSet | None, train, validation, test, class_names, values: dict[str, Any]) -> DataSet | None:
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
        for name in ("image_size", "test_fraction"):
            if values.get(f"data.{name}") is not None:
                raise ConfigError(f"{name}: makes no sense for data from Python")
    return given.limit_train(limit, seed) if given is not None and limit else given


def run_expansion(config: ExpandConfig, out: str | Path | None, *, model: DepthNetwork | None = None,
                  data: DataSet | None = None, display: Display | Silent) -> Result:
    """A new search in a new run folder. `model` and `data` stand in for those that the configuration names."""
    config = resolve(config)
    config = from_values({"run.threads": config.run.threads or torch.get_num_threads()}, config.model_dump())
    data = data or load_data(config)
    check_device(config.run.device)
    model = copy.deepcopy(model) if model is not None else create_model(config, data)
    check_depths(config, model, data)
    checksum = data.checksum()
    folder = RunFolder.create(out or default_folder(config), to_yaml(config))
    return _run(config, model, data, checksum, folder, RunState(), display, resumed=False)


def resume_expansion(path: str | Path, given: dict[str, Any] | None = None, *, model: DepthNetwork | None = None,
                     data: DataSet | None = None, display: Display | Silent) -> Result:
    """Go on with the run in folder `path` to the same bits that an uninterrupted run would have given.

    Args:
        given: settings the user repeated, as dotted paths; one that differs from the run's is refused.
        model, data: again what the run was started with, where that came from Python.
    """
    with contextlib.ExitStack() as on_error:
        folder = on_error.enter_context(RunFolder.open(path))
        config = from_values({}, read_yaml(folder.path / "config.yaml"))
        ours = flat(config)
        repeated = flat(absolute_paths(from_values(given or {})))
        for name in given or {}:
            if ours[name] != repeated[name] and name != "data.data_dir":  # files may have moved: their checksum is compared
                raise ConfigError(f"resume {path}: {name} = {repeated[name]} contradicts the run's {ours[name]}; "
                                  "give --resume alone, or start a new run")
        check_device(config.run.device)
        saved = folder.load_checkpoint()
        warnings = list(folder.warnings)
        if config.model is None and model is None or data is None and config.data.dataset == "arrays":
            raise ConfigError(f"resume {path}: the run was given its model or data in Python; resume it from there")
        if saved and saved["config"] != ours:
            name = next(name for name in ours if saved["config"].get(name) != ours[name])
            raise ConfigError(f"{folder.path / 'config.yaml'}: {name} = {ours[name]} differs from the "
                              f"{saved['config'].get(name)} that the run was made with; put it back, or start a new run")
        place = {"data.data_dir": repeated["data.data_dir"]} if "data.data_dir" in (given or {}) else {}
        data = data or load_data(from_values(place, config.model_dump()))
        checksum = data.checksum()
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
        state = RunState.from_dict(saved["state"]) if saved else RunState()
        model = copy.deepcopy(model) if model is not None else create_model(config, data)
        on_error.pop_all()
    return _run(config, model, data, checksum, folder, state, display, resumed=saved is not None)


def _run(config: ExpandConfig, model: DepthNetwork, data: DataSet, checksum: str, folder: RunFolder, state: RunState,
         display: Display | Silent, resumed: bool) -> Result:
    threads = torch.get_num_threads()
    with folder, _naming(folder), Interrupts() as interrupts, contextlib.ExitStack() as after:
        after.callback(torch.set_num_threads, threads)
        after.callback(display.close)
        torch.set_num_threads(config.run.threads)
        precision = resolve_precision(config.run.precision, config.run.device)
        model.to(config.run.device, memory_format=torch.channels_last)
        header = {"config": flat(config), "environment": run_environment(config), "data": checksum}
        recorder = Recorder(folder, display, interrupts, state, header, config)
        search = Search(config, model, data, checksum, folder, display, state, recorder, FitConfig(precision, config.run.device))
        tuned = config.run.malloc_tuning and tune_allocator()
        _phases(search, tuned, resumed)
        return _result(search)


@contextlib.contextmanager
def _naming(folder: RunFolder):
    """Say in an interruption which run can be resumed."""
    try:
        yield
    except Interrupted as stop:
        stop.folder = folder.path
        raise


def _phases(search: Search, tuned: bool, resumed: bool):
    state = search.state
    if state.phase == "finished":
        search.display.message(f"the run in {search.folder.path} is finished")
        return
    _announce(search, tuned, resumed)
    if state.phase == "warm_up":
        warm_up(search)
    if state.phase == "search":
        search_depths(search)
    if state.phase == "fine_tune":
        fine_tune(search)
    if state.phase == "baseline":
        baseline(search)


def _announce(search: Search, tuned: bool, resumed: bool):
    """First screen: what runs on what, and the table of depths."""
    config, data, state, say = search.config, search.data, search.state, search.display.message
    extension = _extension.instruction_set() if _extension.available else None
    counts = [len(data.train), len(data.validation), len(data.test) if data.test else None]
    precision = search.fit_config.precision
    note = " (chosen by auto; weights, statistics and losses stay fp32)" if (
        config.run.precision == "auto" and precision == "bf16") else ""
    need = config.search.target_accuracy - config.search.tolerance
    cap = f" within {config.search.epochs_cap} epochs" if config.search.epochs_cap else ""
    shape = "x".join(map(str, data.input_shape))
    say(f"odn_fast {__version__}: expand {config.model or 'a model from Python'} on {data.name} ({counts[0]:,} training, "
        f"{counts[1]:,} validation, {counts[2] or 0:,} test images of {shape}, {data.num_classes} classes)")
    say(f"{config.run.threads} threads, training in {precision}{note}, allocator {'tuned' if tuned else 'as it is'}, "
        f"C++ ops {extension or 'not built (plain PyTorch)'}, seed {config.run.seed}")
    say(f"wanted: the smallest depth that reaches {need:g} % on validation{cap} "
        f"(target {config.search.target_accuracy:g} %, tolerance {config.search.tolerance:g})")
    say(f"run folder: {search.folder.path}")
    if resumed:
        training = state.training
        search.folder.event("resume", phase=state.phase, depth=state.depth, epoch=training.epoch if training else 0,
                            step=training.step if training else 0)
        say(f"resumed in phase {state.phase.replace('_', '-')}" + (f" at depth {state.depth}" if state.depth else "")
            + (f", epoch {training.epoch + 1}, step {training.step}" if training else ""))
        return
    search.folder.event(
        "start", version=__version__, **environment(), threads=config.run.threads, device=config.run.device,
        precision=precision, precision_requested=config.run.precision, malloc_tuned=tuned, extension=extension,
        model=config.model, dataset={
            "name": data.name, "checksum": search.data_checksum, "train": counts[0], "validation": counts[1], "test": counts[2],
            "input_shape": list(data.input_shape), "class_names": list(data.class_names)})
    rows = depth_rows(search.model, data, config.training.batch_size, precision, config.run.device)
    search.folder.event("table", rows=rows)
    search.display.depths(rows)
    say(_estimate(config, rows, rows[config.search.initial_depth - 1:search.last_depth]))


def _estimate(config: ExpandConfig, rows: list[dict], depths: list[dict]) -> str:
    """How long the search may take, from the estimated time of an epoch at every depth."""
    seconds = [row["seconds_per_epoch"] for row in depths]
    warm_up = f"estimated: warm-up {_duration(config.training.warm_up_epochs * rows[-1]['seconds_per_epoch'])}"
    if config.search.epochs_per_depth:
        longest = sum(epochs * each for epochs, each in zip(config.search.epochs_per_depth, seconds))
        return f"{warm_up}, search at most {_duration(longest)}"
    if config.search.epochs_cap:
        longest = config.search.epochs_cap * sum(seconds)
        return f"{warm_up}, search at most {_duration(longest)} over all depths, then fine-tuning until it converges"
    return (f"{warm_up}; a depth trains until 23 epochs bring no improvement, at least {_duration(24 * seconds[0])} "
            f"at depth {depths[0]['depth']}")


def _result(search: Search) -> Result:
    state = search.state
    found = state.readings["found"]
    return Result(folder=search.folder.path, depth=state.found, target_met=state.target_met,
                  validation_accuracy=found["validation_accuracy"], test_accuracy=found["test_accuracy"],
                  depths=state.readings["depths"]["rows"], baseline=state.baseline, config=search.config)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
