"""From a configuration to a network and a data set, with every refusal before anything is made."""

import os
import time
from pathlib import Path

import torch

from .. import data as data_sets
from .. import export, models
from ..config import ConfigError, ExpandConfig
from ..data import DataSet
from ..engine import resolve_precision
from ..machine import environment
from ..models import DepthNetwork, profile


def create_model(config: ExpandConfig, data: DataSet) -> DepthNetwork:
    """The named network, initialised from the seed without touching the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        return models.create(config.model, data.input_shape[0], data.num_classes)


def load_data(config: ExpandConfig) -> DataSet:
    given = config.data
    data = data_sets.load(given.dataset, given.data_dir, image_size=given.image_size, val_fraction=given.val_fraction,
                          test_fraction=given.test_fraction, seed=config.run.seed)
    return data.limit_train(given.limit_train, config.run.seed) if given.limit_train else data


def check_depths(config: ExpandConfig, model: DepthNetwork, data: DataSet):
    """Refuse what would fail later: depths that do not exist, a network that cannot be stored."""
    initial, last = config.search.initial_depth, config.search.max_depth or model.max_depth
    if last > model.max_depth:
        raise ConfigError(f"max_depth: expected at most {model.max_depth}, the depths of this model, got {last}")
    if initial > last:
        raise ConfigError(f"initial_depth: expected at most {last}, got {initial}")
    profile(model, data.input_shape, model.max_depth)
    export.graph_to_data(model.extract(initial))


def check_device(device: str):
    try:
        usable = torch.device(device).type == "cpu" or (torch.device(device).type == "cuda" and torch.cuda.is_available())
    except RuntimeError:
        usable = False
    if not usable:
        raise ConfigError(f"device: {device} is not usable here; expected cpu" +
                          (" or cuda" if torch.cuda.is_available() else " (PyTorch sees no CUDA device)"))


def run_environment(config: ExpandConfig) -> dict:
    """What the bits of a training depend on, beside the configuration."""
    here = environment()
    return {"processor": here["processor"], "torch": here["torch"], "cores": len(os.sched_getaffinity(0)),
            "precision": resolve_precision(config.run.precision, config.run.device)}


def default_folder(config: ExpandConfig) -> Path:
    name = f"expand-{config.data.dataset.split(':')[0]}-{config.model or 'model'}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Path("runs") / name
