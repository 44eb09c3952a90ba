"""The options of the command line: what each sets, and what its help says."""

import argparse
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from .. import data as data_sets
from .. import models
from ..config import Config, ConfigError, flat, parse_value, views_dataset
from ..data.views import ANALYTIC_SIZE
from ..models.teachers import NETWORKS


class Option(NamedTuple):
    """One option: its name, the setting it is for, how its text is read, the word for its value, its help."""

    name: str
    setting: str
    kind: Callable[[str], Any]
    metavar: str
    help: str


def _listed(text: str) -> list[str]:
    return [] if text == "none" else text.split(",")


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 20,15, got {text!r}") from None


_DATA = [
    Option("--dataset", "data.dataset", str, "NAME", ", ".join(data_sets.NAMES)),
    Option("--data-dir", "data.data_dir", str, "DIR", "folder with the official files, in torchvision's layout; what is missing "
                                                      "is downloaded there"),
    Option("--image-size", "data.image_size", int, "PIXELS", "height and width that images of an image folder are brought to "
                                                             "(default: 64)"),
    Option("--val-fraction", "data.val_fraction", float, "SHARE", "share of the training images used for validation, 0 to 1, "
                                                                  "where the data has no validation part (default: 0.1)"),
    Option("--test-fraction", "data.test_fraction", float, "SHARE", "share of the images used as test split, 0 to 1, where the "
                                                                    "data has none"),
    Option("--limit-train", "data.limit_train", int, "N", "use only N training images, every class in its proportion"),
    Option("--loader", "data.loader", str, "NAME", "resident, all images decoded in memory, the fastest; torch or dali, pictures of an "
                                                   "image folder decoded as they are needed, by Pillow or by NVIDIA DALI (dali takes "
                                                   "arrays, too); auto, resident up to half of the memory, else dali where it is "
                                                   "installed, else torch"),
    Option("--crop", "data.crop", str, "WHICH", "of image folders: centre, or random, for training on random-resized and flipped crops"),
    Option("--corrupt-limit", "data.corrupt_limit", int, "N", "most damaged pictures of an image folder; each is named, and another of "
                                                              "its class stands in for it"),
]
_RUN = [
    Option("--seed", "run.seed", int, "N", "decides initial weights, data order, augmentation and drawn splits"),
    Option("--threads", "run.threads", int, "N", "processor threads (default: as many as PyTorch takes, the number of cores{})"),
    Option("--precision", "run.precision", str, "FORMAT", "auto, fp32 or bf16; auto takes bf16 where the processor computes in it"),
    Option("--device", "run.device", str, "DEVICE", "cpu or cuda"),
    Option("--checkpoint-minutes", "run.checkpoint_minutes", float, "MIN",
           "longest time between checkpoints, in minutes; one is written at every epoch anyway"),
]


def _run_options(threads: str = "") -> list[Option]:
    return [option._replace(help=option.help.format(threads)) for option in _RUN]


EXPAND = [
    Option("--model", "model", str, "NAME", f"network to split by depth: {', '.join(models.NAMES)}"),
    *_DATA,
    Option("--target-accuracy", "search.target_accuracy", float, "PERCENT", "accuracy wanted on validation"),
    Option("--tolerance", "search.tolerance", float, "POINTS", "a depth passes at target - tolerance, in points of percent"),
    Option("--initial-depth", "search.initial_depth", int, "D", "first depth that is trained, in blocks"),
    Option("--max-depth", "search.max_depth", int, "D", "last depth that is trained, in blocks (default: the model's full depth)"),
    Option("--epochs-cap", "search.epochs_cap", int, "N", "most epochs per depth while searching (fine-tuning is not bound)"),
    Option("--epochs-per-depth", "search.epochs_per_depth", _whole_numbers, "N,N,..",
           "exact epochs for the first, second, ... depth in place of the stopping rule, without fine-tuning"),
    Option("--strategy", "search.strategy", str, "NAME",
           "in which order depths are trained, each from the same warmed-up weights. linear: from shallow to deep, until one passes. "
           "parallel: the same with several depths at once; one that passes ends the deeper ones. The same network, sooner where cores "
           "or a GPU would be idle; work on deeper depths is lost when a shallow one passes. bisect: the middle of the depths that are "
           "left, again and again. About log2 as many trainings; linear's answer only if accuracy grows with depth; networks and "
           "accuracies of the depths it trained, no others"),
    Option("--workers", "search.workers", int, "N",
           "depths that --strategy parallel trains at once, in one process, each with its own --threads (default: as many as there "
           "are cores for, at most the number of depths, on a GPU at most 4)"),
    Option("--warm-up-epochs", "training.warm_up_epochs", int, "N", "epochs of training all depths at once; 0 for none"),
    Option("--batch-size", "training.batch_size", int, "N", "images per step"),
    Option("--lr", "training.lr", float, "RATE", "learning rate at the initial depth"),
    *_run_options("; with --strategy parallel, cores / workers. Bits depend on it, so warm-up and fine-tuning take as many"),
    Option("--baseline", "search.baseline", str, "WHICH", "none or full: train the full depth too, to compare accuracy"),
]
GROW = [
    Option("--teacher", "teacher.file", str, "FILE", "a trained CIFAR ResNet to learn from, as PyTorch checkpoints hold it "
                                                     "(default: one is trained)"),
    Option("--train-teacher", "teacher.train", str, "NAME", f"network to train as the teacher: {', '.join(NETWORKS)} "
                                                            "(default: resnet20 for digits, else resnet56)"),
    *_DATA,
    Option("--budget", "growth.budget", str, "SIZE", "most parameters of the student, such as 400000, 85k or 0.4M "
                                                     "(default: 85k for digits, else 0.4M)"),
    Option("--budget-flops", "growth.budget_flops", str, "SIZE", "most FLOPs of the student for one image, such as 63M, in place of "
                                                                 "--budget; counted as multiply-adds + 2 per batch-norm output"),
    Option("--max-flops", "growth.max_flops", str, "SIZE", "most FLOPs beside a budget of parameters (default: the teacher's)"),
    Option("--stage-epochs", "growth.stage_epochs", int, "N", "epochs of training before every split"),
    Option("--retrain-epochs", "growth.retrain_epochs", int, "N", "epochs of training the grown student on labels alone "
                                                                  "(default: 20 for digits, else 400)"),
    Option("--retrain-from", "growth.retrain_from", str, "WHICH", "grown or scratch: what weights retraining starts from"),
    Option("--score", "growth.score", str, "WHICH", "what nodes are ranked by: s, the modification value, successors / precursors * "
                                                    "R; r, R alone; relative, s with R over the teacher's mean square; random"),
    Option("--c", "growth.c", float, "C", "place of a new node on its edge, 0 to 1; the larger, the nearer to the images"),
    Option("--skip", "growth.skip", str, "WHICH", "skip connections of units: auto, the identity where shapes allow it; always, a "
                                                  "1x1 convolution everywhere"),
    Option("--width", "growth.width", float, "FACTOR", "a node's channels over its teacher map's (default: 1, for teachers of "
                                                       "bottleneck blocks 0.25)"),
    Option("--augment", "growth.augment", str, "WHEN", "none, stages, retrain or both: random crops and flips of the student's images"),
    Option("--cache-gib", "growth.cache_gib", float, "GIB", "memory for the teacher's maps, computed once, in GiB; what does not fit "
                                                            "is computed at every step"),
    Option("--controls", "growth.controls", _listed, "NAMES", "the same graph trained otherwise, to compare with: none, or some of "
                                                              "labels,logits,scratch"),
    Option("--batch-size", "training.batch_size", int, "N", "images per step (default: 64 for digits, else 128)"),
    Option("--lr", "training.lr", float, "RATE", "learning rate at the start of every stage and of retraining; x 0.1 after a half and "
                                                 "after three quarters of the epochs"),
    *_run_options(", 1 for digits"),
]
GROW_VIEWS = [
    Option("--views", "data.dataset", views_dataset, "DIR", "folder in nerf_synthetic's layout (transforms_train.json, ...), or "
                                                           "analytic: a scene of spheres and boxes that needs no data"),
    Option("--size", "data.size", int, "PIXELS", "height and width that views are brought to by averaging "
                                                 f"(default: {ANALYTIC_SIZE} for analytic, else as they are)"),
    Option("--teacher", "growth.teacher", str, "LxW", "hidden layers and width of the field to train as the teacher; the paper's is 8x256"),
    Option("--start", "growth.start", int, "N", "width of the student's hidden layers at the start (default: an eighth of the teacher's)"),
    Option("--step", "growth.step", int, "N", "neurons that a layer grows by (default: an eighth of the teacher's width)"),
    Option("--budget-share", "growth.budget_share", float, "SHARE", "most parameters of the student, as a share of the teacher's"),
    Option("--score", "growth.score", str, "WHICH", "what layers are ranked by: r, R; relative, R over the teacher's mean square; random"),
    Option("--teacher-epochs", "growth.teacher_epochs", int, "N", "epochs of training the teacher"),
    Option("--stage-epochs", "growth.stage_epochs", int, "N", "epochs of training before every growth of a layer"),
    Option("--retrain-epochs", "growth.retrain_epochs", int, "N", "epochs of training the grown student on colours alone"),
    Option("--controls", "growth.controls", _listed, "NAMES", "fields to compare with, trained on colours for as many epochs: none, or "
                                                              "some of random,half,narrow"),
    Option("--rays", "training.rays", int, "N", "rays per step"),
    Option("--samples", "training.samples", int, "N", "samples along a ray"),
    Option("--steps-per-epoch", "training.steps_per_epoch", int, "N", "steps that make an epoch"),
    Option("--lr", "training.lr", float, "RATE", "learning rate of Adam at the start of every training (default: 5e-3 up to width 128, "
                                                 "else 5e-4)"),
    *[option for option in _run_options() if option.name != "--precision"],
    Option("--precision", "run.precision", str, "FORMAT", "auto, fp32 or bf16; auto takes fp32"),
]
_FROM_RECIPE = ("search.target_accuracy", "search.epochs_cap", "training.lr", "training.warm_up_epochs")


def add_options(command: argparse.ArgumentParser, options: list[Option], kind: type[Config]):
    """Add the options of a search, and those that all have, with their defaults."""
    defaults = flat(kind())
    for option in options:
        default = defaults[option.setting]
        said = "(default:" in option.help
        note = "depends on the data set" if default is None and option.setting in _FROM_RECIPE and not said else default
        note = ",".join(note) if isinstance(note, list) else note
        note = "" if note is None else f" (default: {note})"
        command.add_argument(option.name, dest=option.setting, type=option.kind, metavar=option.metavar, help=option.help + note)
    command.add_argument("--no-malloc-tuning", dest="run.malloc_tuning", action="store_false",
                         help="leave the C library's allocator as it is (default: tuned to keep large blocks)")
    path = os.path.expanduser  # a shell leaves the ~ of --out=~/runs as it is
    command.add_argument("--out", type=path, metavar="DIR", help="run folder to make (default: a new one in runs/)")
    command.add_argument("--resume", type=path, metavar="RUN", help="go on with the run in this folder; give nothing else")
    command.add_argument("--config", type=path, metavar="FILE",
                         help="YAML file with settings, such as a run's config.yaml; options go first")
    command.add_argument("--set", metavar="SETTING=VALUE", action="append",
                         help="any setting by its path, such as training.weight_decay=1e-4; may be repeated")


def given_settings(options: dict[str, Any]) -> dict[str, Any]:
    """The settings that parsed options name, those of --set last. Raises ConfigError."""
    given = {name: value for name, value in options.items() if name not in ("out", "resume", "config", "set", "command")}
    for text in options.get("set", []):
        path, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"set {text}: expected SETTING=VALUE, such as training.momentum=0.8")
        given[path] = parse_value(path, value)
    return given
