"""Command line of the searches: `python -m odn_fast.search [expand] [options]`."""

import argparse
import sys
import warnings
from collections.abc import Callable
from typing import Any

from .. import models
from .. import data as data_sets
from ..config import ConfigError, ExpandConfig, flat, from_values, parse_value, read_yaml
from ..engine import Interrupted
from ..record import FolderError, RunError
from .display import Display
from .expansion import Result, resume_expansion, run_expansion

_EPILOG = """examples:
  python -m odn_fast.search                                   digits, on the CPU, about a minute
  python -m odn_fast.search --dataset mnist --data-dir ~/data --target-accuracy 99
  python -m odn_fast.search --dataset imagefolder:photos --image-size 64 --test-fraction 0.1 --target-accuracy 90
  python -m odn_fast.search --resume runs/expand-mnist-resnet18-20260131-101500

exit status: 0 the run ended (1 if --require-target and the target was not met); 1 the run could not go on, it can be
resumed; 2 something asked for cannot be; 130 or 143 stopped by Ctrl-C or SIGTERM, state saved.
"""

# option, setting, type, metavar, help
_OPTIONS: list[tuple[str, str, Callable, str, str]] = [
    ("--model", "model", str, "NAME", f"network to split by depth: {', '.join(models.NAMES)}"),
    ("--dataset", "data.dataset", str, "NAME", ', '.join(data_sets.NAMES)),
    ("--data-dir", "data.data_dir", str, "DIR", "folder with the official files, in torchvision's layout; what is missing "
                                                "is downloaded there"),
    ("--image-size", "data.image_size", int, "PIXELS", "height and width that images of an image folder are brought to (default: 64)"),
    ("--val-fraction", "data.val_fraction", float, "SHARE", "share of the training images used for validation, 0 to 1, where "
                                                            "the data has no validation part (default: 0.1)"),
    ("--test-fraction", "data.test_fraction", float, "SHARE", "share of the images used as test split, 0 to 1, where the data "
                                                              "has none"),
    ("--limit-train", "data.limit_train", int, "N", "use only N training images, every class in its proportion"),
    ("--target-accuracy", "search.target_accuracy", float, "PERCENT", "accuracy wanted on validation"),
    ("--tolerance", "search.tolerance", float, "POINTS", "a depth passes at target - tolerance, in points of percent"),
    ("--initial-depth", "search.initial_depth", int, "D", "first depth that is trained, in blocks"),
    ("--max-depth", "search.max_depth", int, "D", "last depth that is trained, in blocks (default: the model's full depth)"),
    ("--epochs-cap", "search.epochs_cap", int, "N", "most epochs per depth while searching (fine-tuning is not bound)"),
    ("--epochs-per-depth", "search.epochs_per_depth", lambda text: [int(part) for part in text.split(",")], "N,N,..",
     "exact epochs for the first, second, ... depth in place of the stopping rule, without fine-tuning"),
    ("--warm-up-epochs", "training.warm_up_epochs", int, "N", "epochs of training all depths at once; 0 for none"),
    ("--batch-size", "training.batch_size", int, "N", "images per step"),
    ("--lr", "training.lr", float, "RATE", "learning rate at the initial depth"),
    ("--seed", "run.seed", int, "N", "decides initial weights, data order, augmentation and drawn splits"),
    ("--threads", "run.threads", int, "N", "processor threads (default: as many as PyTorch takes, the number of cores)"),
    ("--precision", "run.precision", str, "FORMAT", "auto, fp32 or bf16; auto takes bf16 where the processor computes in it"),
    ("--device", "run.device", str, "DEVICE", "cpu or cuda"),
    ("--checkpoint-minutes", "run.checkpoint_minutes", float, "MIN", "longest time between checkpoints, in minutes; one is "
                                                                     "written at every epoch anyway"),
    ("--baseline", "search.baseline", str, "WHICH", "none or full: train the full depth too, to compare accuracy"),
]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0].startswith("-"):
        arguments.insert(0, "expand")
    options = vars(_parser().parse_args(arguments))
    display = Display()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: display.warning(str(message))  # without its place in the code
            return _expand(options, display)
    except Interrupted as stop:
        display.close()
        print(f"stopped by {stop}; go on with: python -m odn_fast.search --resume "
              f"{stop.folder}", file=sys.stderr)
        return stop.exit_status
    except KeyboardInterrupt:  # where no run was at work
        display.close()
        print("stopped", file=sys.stderr)
        return 130
    except (FolderError, ValueError) as error:  # ConfigError, DataError and ModelError are ValueErrors
        return _fail(display, error, 2)
    except RunError as error:
        return _fail(display, error, 1)
    except MemoryError:
        return _fail(display, "memory is used up; take a smaller --batch-size or --image-size, then go on with --resume", 1)
    except OSError as error:
        return _fail(display, f"{error.filename or 'a file'}: {error.strerror}", 1)


def _expand(options: dict[str, Any], display: Display) -> int:
    given = {setting: options[setting] for _, setting, *_ in _OPTIONS if setting in options}
    if options.get("require_target"):
        given["search.require_target"] = True
    if options.get("no_malloc_tuning"):
        given["run.malloc_tuning"] = False
    for text in options.get("set", []):
        path, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"set {text}: expected SETTING=VALUE, such as training.momentum=0.8")
        given[path] = parse_value(path, value)
    if "resume" in options:
        if "config" in options or "out" in options:
            raise ConfigError("resume: takes neither --config nor --out; the run folder holds both")
        from_values(given)
        result = resume_expansion(options["resume"], given, display=display)
    else:
        base = read_yaml(options["config"]) if "config" in options else {}
        result = run_expansion(from_values(given, base), options.get("out"), display=display)
    _conclude(result, display)
    return 1 if result.config.search.require_target and not result.target_met else 0


def _conclude(result: Result, display: Display):
    config = result.config
    cap = f" within {config.search.epochs_cap} epochs" if config.search.epochs_cap else ""
    need = config.search.target_accuracy - config.search.tolerance
    full, found = result.depths[-1], result.depths[result.depth - 1]
    trained = [row["depth"] for row in result.depths if row["trained"]]
    if result.target_met:
        untried = f" (depths below {trained[0]} were not tried)" if trained[0] > 1 else ""
        display.message(f"\nfound: depth {result.depth} of {full['depth']} is the smallest that reaches {need:g} %{cap}{untried}")
    else:
        display.message(f"\nNOT MET: no depth from {trained[0]} to {trained[-1]} reached {need:g} %{cap}; the best, depth "
                        f"{result.depth}, was kept")
    test = "no test split" if result.test_accuracy is None else f"test accuracy {result.test_accuracy:.2f} %"
    display.message(f"validation accuracy {result.validation_accuracy:.2f} %, {test}")
    compared = " (size only)" if result.baseline is None else (
        f", which reached {result.baseline['validation_accuracy']:.2f} % on validation")
    display.message(f"{found['params']:,} parameters, {found['state_bytes'] / 1e6:.2f} MB: "
                    f"{100 * (1 - found['state_bytes'] / full['state_bytes']):.1f} % smaller than full depth{compared}")
    display.message(f"model:  {result.folder / 'model'}")
    display.message(f"report: {result.folder / 'report.html'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m odn_fast.search", epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Search the smallest network that meets a target. `expand` is the default.")
    commands = parser.add_subparsers(dest="command", metavar="expand")
    expand = commands.add_parser(
        "expand", help="find the smallest depth of a network that meets a target accuracy (Optimally Deep Networks)",
        description="Find the smallest depth of a network that meets a target accuracy: warm up all depths in one pass, "
                    "train from shallow to deep until the target is met, fine-tune, extract.",
        epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS,
        allow_abbrev=False)
    defaults = flat(ExpandConfig())
    for option, setting, kind, metavar, text in _OPTIONS:
        default = defaults[setting]
        note = "depends on the data set" if default is None and setting in _FROM_RECIPE else default
        note = "" if note is None else f" (default: {note})"
        expand.add_argument(option, dest=setting, type=kind, metavar=metavar, help=text + note)
    expand.add_argument("--require-target", action="store_true", help="exit with status 1 if no depth meets the target")
    expand.add_argument("--no-malloc-tuning", action="store_true",
                        help="leave the C library's allocator as it is (default: tuned to keep large blocks)")
    expand.add_argument("--out", metavar="DIR", help="run folder to make (default: a new one in runs/)")
    expand.add_argument("--resume", metavar="RUN", help="go on with the run in this folder; give nothing else")
    expand.add_argument("--config", metavar="FILE", help="YAML file with settings, such as a run's config.yaml; options go first")
    expand.add_argument("--set", metavar="SETTING=VALUE", action="append",
                        help="any setting by its path, such as training.weight_decay=1e-4; may be repeated")
    return parser


_FROM_RECIPE = ("search.target_accuracy", "search.epochs_cap", "training.lr", "training.warm_up_epochs")


def _fail(display: Display, error: Exception | str, status: int) -> int:
    display.close()
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
