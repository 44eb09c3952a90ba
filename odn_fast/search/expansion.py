"""Progressive depth expansion: the smallest depth of a network that meets a target accuracy.

Optimally Deep Networks, section III and Algorithm 1: warm all depths up in one shared pass, train from shallow to deep
until the target is met, fine-tune, extract.
"""

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import export
from ..config import ExpandConfig, from_values, resolve
from ..data import DataSet
from ..engine import check_device
from ..models import DepthNetwork
from ..record import RunFolder
from .display import Display, Silent
from .expansion_depths import search_depths
from .expansion_phases import Search, baseline, fine_tune, last_depth, warm_up
from .expansion_preview import depth_rows
from .expansion_state import RunState
from .expansion_strategies import in_words, longest, share_out
from .lifecycle import (
    Session, announce, announce_resumption, at_hand, at_work, checksum_of, described, duration, from_settings, given_data, go_through,
    new_folder, record_start, reopened, with_loader, with_threads)
from .setup import check_depths, create_model, default_folder, load_data


@dataclass(frozen=True)
class Result:
    """What a search found. Accuracies are percent, of the folded fp32 network.

    `depths` has one entry per depth, with its size and latency; `outcome` says how its training ended, None without one.
    """

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
            `batch_size`, `seed`, `strategy`, `workers`, `threads`, `precision`, `val_fraction`.

    Raises:
        ConfigError, DataError, ValueError: something asked for cannot be; the message is one line.
        RunError: the run cannot go on (disk full, every depth diverged, ...); it can be resumed from its folder.
        Interrupted: a signal stopped it after its state was saved.
    """
    values = from_settings(settings, ExpandConfig)
    if target is not None:
        values["search.target_accuracy"] = target
    values["model"] = model if isinstance(model, str) else None
    if isinstance(dataset, str):
        values["data.dataset"] = dataset
    given = given_data(None if isinstance(dataset, str) else dataset, train, validation, test, class_names, values)
    if given is not None:
        values["data.dataset"] = given.name
    return run_expansion(from_values(values), out, model=None if isinstance(model, str) else model, data=given,
                         display=Display() if progress else Silent())


def run_expansion(config: ExpandConfig, out: str | Path | None, *, model: DepthNetwork | None = None,
                  data: DataSet | None = None, display: Display | Silent) -> Result:
    """A new search in a new run folder. `model` and `data` stand in for those that the configuration names."""
    config = resolve(config)
    check_device(config.run.device)
    data = data or load_data(config)
    model = copy.deepcopy(model) if model is not None else create_model(config, data)
    check_depths(config, model, data)
    config = with_loader(with_threads(_with_workers(config, model)), data)
    checksum = checksum_of(data, display)
    folder = new_folder(out or default_folder("expand", config.data.dataset, config.model or "model"), config)
    return _run(config, model, data, checksum, folder, RunState(), display, resumed=False)


def resume_expansion(path: str | Path, given: dict[str, Any] | None = None, *, model: DepthNetwork | None = None,
                     data: DataSet | None = None, display: Display | Silent) -> Result:
    """Go on with the run in folder `path` to the same bits that an uninterrupted run would have given.

    Args:
        given: settings the user repeated, as dotted paths; one that differs from the run's is refused.
        model, data: again what the run was started with, where that came from Python.
    """
    with reopened(path, given or {}, ExpandConfig, data, model is not None, display) as run:
        state = RunState.from_dict(run.saved["state"]) if run.saved else RunState()
        model = copy.deepcopy(model) if model is not None else create_model(run.config, run.data)
    return _run(run.config, model, run.data, run.checksum, run.folder, state, display, resumed=run.saved is not None)


def _run(config: ExpandConfig, model: DepthNetwork, data: DataSet, checksum: str, folder: RunFolder, state: RunState,
         display: Display | Silent, resumed: bool) -> Result:
    with at_work(config, checksum, folder, state, display) as session:
        model.to(config.run.device, memory_format=torch.channels_last)
        data = at_hand(data, config.run.device, folder, display)
        search = Search(config, model, data, checksum, folder, display, state, session.recorder, session.fit_config)
        _phases(search, session, resumed)
        return _result(search)


def _with_workers(config: ExpandConfig, model: DepthNetwork) -> ExpandConfig:
    """The configuration with the number of workers, and of threads for each, that it is to be resumed with."""
    if config.search.strategy != "parallel":
        return config
    depths = last_depth(config, model.max_depth) - config.search.initial_depth + 1
    workers, threads = share_out(torch.get_num_threads(), depths, torch.device(config.run.device).type == "cuda",
                                 config.search.workers, config.run.threads)
    return from_values({"search.workers": workers, "run.threads": threads}, config.model_dump())


def _phases(search: Search, session: Session, resumed: bool):
    phases = {"warm_up": warm_up, "search": search_depths, "fine_tune": fine_tune, "baseline": baseline}
    go_through({name: partial(phase, search) for name, phase in phases.items()}, search.state,
               partial(_announce, search, session, resumed), search.folder, search.display)


def _place(state: RunState) -> str:
    """Where a run goes on, after its phase."""
    if state.under_way:
        return " at depths " + ", ".join(map(str, sorted(state.under_way)))
    return f" at depth {state.depth}" if state.depth else ""


def _announce(search: Search, session: Session, resumed: bool):
    """First screen: what runs on what, and the table of depths."""
    config, data, state, say = search.config, search.data, search.state, search.display.message
    need = config.search.target_accuracy - config.search.tolerance
    cap = f" within {config.search.epochs_cap} epochs" if config.search.epochs_cap else ""
    announce(f"expand {config.model or 'a model from Python'}", config, data, session, search.display)
    say(f"wanted: the smallest depth that reaches {need:g} % on validation{cap} "
        f"(target {config.search.target_accuracy:g} %, tolerance {config.search.tolerance:g})")
    if config.search.strategy != "linear":
        say(f"strategy {in_words(config.search.strategy, config.search.workers, config.run.threads)}")
    say(f"run folder: {search.folder.path}")
    if resumed:
        where = f"in phase {state.phase.replace('_', '-')}" + _place(state)
        place = {"phase": state.phase, "depth": state.depth}
        announce_resumption(where, place, state.training, search.folder, search.display)
        return
    record_start(config, described(data, search.data_checksum), search.folder, session, model=config.model)
    rows = depth_rows(search.model, data, config.training.batch_size, session.fit_config.precision,
                      config.run.device)
    search.folder.event("table", rows=rows)
    search.display.depths(rows)
    say(estimate(config, rows, rows[config.search.initial_depth - 1:search.last_depth]))


def estimate(config: ExpandConfig, rows: list[dict], depths: list[dict]) -> str:
    """How long the search may take, from the estimated time of an epoch at every depth."""
    seconds = {row["depth"]: row["seconds_per_epoch"] for row in depths}
    most = partial(longest, config.search.strategy, workers=config.search.workers or 1)
    epochs = config.training.warm_up_epochs
    begin = f"estimated: warm-up {duration(epochs * rows[-1]['seconds_per_epoch'])}, " if epochs else "estimated: "
    if config.search.epochs_per_depth:
        given = dict(zip(seconds, config.search.epochs_per_depth))
        return f"{begin}search at most {duration(most({depth: given[depth] * seconds[depth] for depth in given}))}"
    if config.search.epochs_cap:
        whole = duration(config.search.epochs_cap * most(seconds))
        return f"{begin}search at most {whole} over all depths, then fine-tuning until it converges"
    return (f"{begin}a depth trains until 23 epochs bring no improvement, at least {duration(24 * seconds[depths[0]['depth']])} "
            f"at depth {depths[0]['depth']}")


def _result(search: Search) -> Result:
    state = search.state
    found = state.readings["found"]
    return Result(folder=search.folder.path, depth=state.found, target_met=state.target_met,
                  validation_accuracy=found["validation_accuracy"], test_accuracy=found["test_accuracy"],
                  depths=state.readings["depths"]["rows"], baseline=state.baseline, config=search.config)
