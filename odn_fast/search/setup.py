"""From a configuration to a network and a data set, with every refusal before anything is made."""

import itertools
import time
from dataclasses import replace
from pathlib import Path

import torch

from .. import __version__, _extension, export, models
from ..config import ConfigError, ExpandConfig, GrowConfig, GrowViewsConfig
from ..data import DataSet, load_configured
from ..data.image_folder import split_folders
from ..data.views import ANALYTIC_SIZE, Scene, analytic_scene, load_views
from ..engine import resolve_precision
from ..machine import environment
from ..models import DepthNetwork, profile


def create_model(config: ExpandConfig, data: DataSet) -> DepthNetwork:
    """The named network, initialised from the seed without touching the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        return models.create(config.model, data.input_shape[0], data.num_classes)


def load_data(config: ExpandConfig | GrowConfig | GrowViewsConfig) -> DataSet | Scene:
    """What the configuration names: images with labels, or views of a scene."""
    given = config.data
    if isinstance(config, GrowViewsConfig):
        if given.dataset == "analytic":
            return replace(analytic_scene(given.size or ANALYTIC_SIZE), near=given.near, far=given.far)
        return load_views(given.dataset.partition(":")[2], given.size, given.near, given.far)
    return load_configured(given, config.run.seed, config.run.device)


def check_depths(config: ExpandConfig, model: DepthNetwork, data: DataSet):
    """Refuse what would fail later: depths that do not exist, a network that cannot be stored."""
    initial, last = config.search.initial_depth, config.search.max_depth or model.max_depth
    if last > model.max_depth:
        raise ConfigError(f"max_depth: expected at most {model.max_depth}, the depths of this model, got {last}")
    if initial > last:
        raise ConfigError(f"initial_depth: expected at most {last}, got {initial}")
    given = config.search.epochs_per_depth or []
    if len(given) > last - initial + 1:
        raise ConfigError(f"epochs_per_depth: expected at most {last - initial + 1} numbers, one for each of the depths "
                          f"{initial} to {last}, got {len(given)}")
    if model.num_classes != data.num_classes:
        raise ConfigError(f"model: has {model.num_classes} classes, the data has {data.num_classes}; make it with num_classes="
                          f"{data.num_classes}")
    profile(model, data.input_shape, model.max_depth)
    export.graph_to_data(model.extract(model.max_depth))


def run_environment(config: ExpandConfig | GrowConfig) -> dict:
    """What the bits of a training depend on, beside the configuration."""
    here = environment()
    gpu = torch.cuda.get_device_name(config.run.device) if torch.device(config.run.device).type == "cuda" else "none"
    return {"odn_fast": __version__, "processor": here["processor"], "GPU": gpu, "torch": here["torch"],
            "C++ ops": _extension.instruction_set() or "not built",
            "precision": resolve_precision(config.run.precision, config.run.device)}


def check_apart(folder: str | Path, config: ExpandConfig | GrowConfig | GrowViewsConfig):
    """Refuse a run folder among the classes of an image folder: read again, it would be one of them. Raises ConfigError."""
    kind, _, root = config.data.dataset.partition(":")
    if kind == "imagefolder" and Path(root).is_dir():
        for place in split_folders(Path(root)).values():
            if Path(folder).resolve().is_relative_to(place):
                raise ConfigError(f"out {folder}: lies among the classes in {place} and would be taken for one; name a folder elsewhere, "
                                  "with --out")


def default_folder(search: str, dataset: str, model: str) -> Path:
    """A new folder in `runs/`, named after search, data, model and time."""
    name = f"{search}-{dataset.split(':')[0]}-{model}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([name], (f"{name}-{count}" for count in itertools.count(2)))
    return next(path for path in map(Path("runs").joinpath, names) if not path.exists())
