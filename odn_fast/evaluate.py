"""Accuracy of a trained network on a split of a data set: `python -m odn_fast.evaluate NETWORK`."""

import argparse
import json
import math
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from .config import ConfigError, DataConfig, ExpandConfig, absolute_paths, from_values, read_yaml
from .data import NAMES, DataSet, Normalisation, Split, evaluation_batches, load_configured
from .engine import accuracy, check_device, confusion, tune_allocator
from .export import ModelError, describe, load, model_folder
from .models.teachers import load_teacher

FEW_CLASSES = 30  # up to which the accuracy of every class is printed
PUBLIC_SIZE = 32  # pixels of the images that public checkpoints were trained on
SPLITS = ("test", "validation", "train")
_EPILOG = """examples:
  python -m odn_fast.search --out runs/digits && python -m odn_fast.evaluate runs/digits
  python -m odn_fast.evaluate resnet56-4bfd9763.th --dataset cifar10 --data-dir ~/data

Networks that are chosen by their test accuracy have none any more: to choose, use --split validation.

exit status: 0 evaluated; 2 something asked for cannot be; 130 stopped by Ctrl-C.
"""


@dataclass(frozen=True)
class Subject:
    """A network in eval mode, with what it is called and how images are brought to it."""

    network: nn.Module
    title: str
    normalisation: Normalisation


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)  # without its place in the code
            _evaluate(options)
        return 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError:
        error = f"batch-size: the device has no memory for {options.batch_size} images at once; take fewer"
    except (ValueError, OSError) as caught:  # ConfigError, DataError and ModelError are ValueErrors
        error = caught
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _evaluate(options: argparse.Namespace):
    for name in ("batch_size", "threads"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ConfigError(f"{name.replace('_', '-')}: expected at least 1, got {value}")
    check_device(options.device)
    tune_allocator()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    path = Path(options.network).expanduser()
    if not path.exists():
        raise ModelError(f"network {path}: does not exist; give a run's folder, or a checkpoint")
    data = load_data(path, options.dataset, options.data_dir, options.device)
    subject = stored_network(path, data) if path.is_dir() else public_network(path, data)
    name, split = chosen_split(data, options.split)
    print(f"network: {subject.title}, fp32, batch norm folded")
    print(f"data:    {data.name}, {name} split, {len(split):,} images of {_by(data.input_shape)}, {data.num_classes} classes", flush=True)
    started = time.perf_counter()
    counts = counted(subject, data, split, options.batch_size, options.device)
    print("\n".join(lines(counts, data.class_names, time.perf_counter() - started)))


def load_data(path: Path, dataset: str | None, data_dir: str | None, device: str) -> DataSet:
    """The data set called `dataset`, or that of the run that a network's folder belongs to, as the run had it.

    Which images are held out may depend on a run's seed and settings: its own data set is split as it was. Raises
    ConfigError where no data set is known, DataError where it cannot be read.
    """
    values = {name: value for name, value in (("data.dataset", dataset), ("data.data_dir", data_dir)) if value is not None}
    config, run = absolute_paths(from_values(values)), run_config(path)
    pixels = describe(path).input.shape[1] if path.is_dir() else PUBLIC_SIZE
    own = run is not None and (dataset is None or config.data.dataset == run.data.dataset)
    if own:
        config = run if data_dir is None else from_values({"data.data_dir": config.data.data_dir}, run.model_dump())
    if config.data.dataset == "arrays" or dataset is None and not own:
        raise ConfigError("dataset: is not known from the network; give --dataset NAME, one of " + ", ".join(NAMES))
    given = config.data
    size = pixels if given.dataset.startswith("imagefolder:") else None
    data = load_configured(given.model_copy(update={"image_size": size, "loader": _loader(given)}), config.run.seed, device)
    if own and data.checksum() != _manifest(path).get("data_checksum"):
        warnings.warn(f"{data.name}: is not the data set that the network was made with (its checksum differs): images it was trained "
                      "on may be in any split")
    return data


def _loader(given: DataConfig) -> str:
    """That of the run; in place of DALI, the plain reader, which needs nothing installed and reads the same files."""
    if given.loader != "dali":
        return given.loader
    return "torch" if given.dataset.startswith("imagefolder:") else "resident"


def run_config(path: Path) -> ExpandConfig | None:
    """Data and seed of the run that a folder belongs to: the run's own, its `model`, or one in `depths`; None for any other."""
    if not path.is_dir():
        return None
    for folder in (path, *path.resolve().parents[:2]):
        if (folder / "config.yaml").is_file():
            values = read_yaml(folder / "config.yaml")
            if values.get("kind") == "grow-views":
                raise ModelError(f"network {path}: is a radiance field, which has no accuracy; its report holds its PSNR")
            return from_values({}, {section: values[section] for section in ("data", "run") if section in values})
    return None


def stored_network(path: Path, data: DataSet) -> Subject:
    """The network in a model folder. Raises ModelError where it cannot be used, or is for other images or classes."""
    description = describe(path)
    given, classes = description.input, description.class_names
    if given.shape != data.input_shape:
        raise ModelError(f"network {path}: is for images of {_by(given.shape)}, {data.name} has {_by(data.input_shape)}; "
                         "give the data set it was made for")
    if len(classes) != data.num_classes:
        raise ModelError(f"network {path}: has {len(classes)} classes, {data.name} has {data.num_classes}; "
                         "give the data set it was made for")
    if classes != data.class_names:
        different = next(pair for pair in zip(classes, data.class_names) if pair[0] != pair[1])
        warnings.warn(f"{data.name}: its classes are called otherwise than the network's ({different[1]!r} where that has "
                      f"{different[0]!r}); they are compared by number")
    parameters = sum(parameter.numel() for parameter in load(path).parameters())
    title = f"{description.model}, depth {description.depth}, {parameters:,} parameters"
    return Subject(load(path, fold=True), title, Normalisation(data.normalisation.scale, given.mean, given.std))


def public_network(path: Path, data: DataSet) -> Subject:
    """A CIFAR ResNet from a public checkpoint. Raises ValueError where it cannot be used, or is for other images or classes."""
    how = data.normalisation
    network = load_teacher(path, data.num_classes, data.input_shape, (how.mean, how.std))
    return Subject(network, f"{network.name}, {network.params:,} parameters", how)


def chosen_split(data: DataSet, name: str | None) -> tuple[str, Split]:
    """The split of that name; without one, test, or validation where there is no test split. Raises ConfigError."""
    found = {"train": data.train, "validation": data.validation} | ({"test": data.test} if data.test is not None else {})
    if name is None:
        name = "test" if "test" in found else "validation"
    if name not in found:
        raise ConfigError(f"split: {data.name} has no test split; choose --split validation")
    return name, found[name]


def counted(subject: Subject, data: DataSet, split: Split, batch_size: int, device: str) -> Tensor:
    """Counts (K, K): rows are true classes, columns predicted ones. Progress and time left are shown on a terminal."""
    network = subject.network.to(device)
    batches = evaluation_batches(split.to(device), subject.normalisation, batch_size)
    console = Console(file=sys.stdout)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        shown = progress.track(batches, total=math.ceil(len(split) / batch_size), description="batches")
        return confusion(network, shown, data.num_classes)


def lines(counts: Tensor, class_names: tuple[str, ...], seconds: float) -> list[str]:
    """What is printed of a confusion matrix (K, K): accuracy and images a second, and few classes one by one."""
    total, correct = int(counts.sum()), counts.diagonal().tolist()
    said = [f"accuracy {accuracy(counts):.2f} % ({sum(correct):,} of {total:,} correct), {total / seconds:,.0f} images/s, {seconds:.1f} s"]
    if len(class_names) <= FEW_CLASSES:
        width = max(map(len, class_names))
        for name, right, images in zip(class_names, correct, counts.sum(1).tolist()):
            share = f"{100 * right / images:6.2f} %" if images else "     -  "
            said.append(f"  {name:{width}}  {share}  {right:,} of {images:,}")
    return said


def _manifest(path: Path) -> dict:
    """What is written about a model folder, {} where nothing is; `load` says what is wrong with it."""
    try:
        manifest = json.loads((model_folder(path) / "manifest.json").read_text())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m odn_fast.evaluate", epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        description="Print the accuracy of a trained network on a split of a data set, in all and by class. Images are brought to "
                    "the network as it was trained on them: a run's network by its own mean and std, a public checkpoint by those of "
                    "its training.")
    parser.add_argument("network", metavar="NETWORK", help="a run's folder, or a model folder in it (model, depths/...); or the file of a "
                                                           "CIFAR ResNet, as PyTorch checkpoints hold it")
    parser.add_argument("--dataset", metavar="NAME", help=f"{', '.join(NAMES)} (default: the run's own, split as it was there)")
    parser.add_argument("--data-dir", metavar="DIR", help="folder with the official files, in torchvision's layout; what is missing is "
                                                          "downloaded there (default: the run's own, else data)")
    parser.add_argument("--split", choices=SPLITS, help="which images (default: test; validation where there is no test split)")
    parser.add_argument("--batch-size", type=int, default=512, metavar="N", help="images at once (default: 512)")
    parser.add_argument("--threads", type=int, metavar="N", help="processor threads (default: as many as PyTorch takes, the "
                                                                     "number of cores)")
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu or cuda (default: cpu)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
