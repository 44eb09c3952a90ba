"""Command line of the searches: `python -m odn_fast.search [expand|grow|grow-views] [options]`."""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from ..config import Config, ConfigError, ExpandConfig, GrowConfig, GrowViewsConfig, from_values, kind_named, read_yaml
from ..engine import Interrupted
from ..record import FolderError, RunError
from .display import Display
from .expansion import Result, resume_expansion, run_expansion
from .expansion_strategies import none_of
from .growth import GrowResult, resume_growth, run_growth
from .lifecycle import kind_of
from .options import EXPAND, GROW, GROW_VIEWS, add_options, given_settings
from .radiance_growth import ViewsResult, resume_views_growth, run_views_growth

_STATUS = """exit status: 0 the run ended{}; 1 the run could not go on, it can be
resumed; 2 something asked for cannot be; 130 or 143 stopped by Ctrl-C or SIGTERM, state saved.
"""
_EXPAND_EPILOG = """examples:
  python -m odn_fast.search                                   digits, on the CPU, half a minute
  python -m odn_fast.search --dataset mnist --data-dir ~/data --target-accuracy 99
  python -m odn_fast.search --dataset imagefolder:photos --image-size 64 --test-fraction 0.1 --target-accuracy 90
  python -m odn_fast.search --strategy parallel --workers 2 --threads 1
  python -m odn_fast.search --resume runs/expand-mnist-resnet18-20260131-101500
  python -m odn_fast.search grow --help                       another search, as is grow-views

""" + _STATUS.format(" (1 if --require-target and the target was not met)")
_GROW_EPILOG = """examples:
  python -m odn_fast.search grow                              digits, teacher and controls included, about a minute
  python -m odn_fast.search grow --dataset cifar10 --data-dir ~/data --teacher resnet56.th --budget 0.4M
  python -m odn_fast.search grow --dataset cifar10 --train-teacher resnet20 --budget-flops 20M --score random
  python -m odn_fast.search --resume runs/grow-cifar10-resnet-56-20260131-101500

"""  + _STATUS.format("")
_VIEWS_EPILOG = """examples:
  python -m odn_fast.search grow-views                        a scene that needs no data, a few minutes
  python -m odn_fast.search grow-views --views ~/data/nerf_synthetic/lego_100x100 --size 50
  python -m odn_fast.search --resume runs/grow-views-analytic-4x64-20260131-101500

""" + _STATUS.format("")


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
            return _SEARCHES[_kind(options)](options, display)
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
    except torch.OutOfMemoryError:
        return _fail(display, "the GPU's memory is used up; start again with a smaller --batch-size (or fewer --workers, or a smaller "
                              "--cache-gib)", 1)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):  # as PyTorch says it of the processor's
            raise
        return _fail(display, "memory is used up; take a smaller --batch-size or --image-size, then go on with --resume", 1)
    except OSError as error:
        return _fail(display, f"{error.filename or 'standard output'}: {error.strerror}; a run that had begun goes on with --resume", 1)


def _kind(options: dict[str, Any]) -> type[Config]:
    """Which search is meant: a run that is to go on says so itself, and so does its config.yaml."""
    if "resume" in options:
        return kind_of(options["resume"])
    named = options["command"]
    if named == "expand" and "config" in options:
        named = read_yaml(options["config"]).get("kind")
    return kind_named(named)


def _expand(options: dict[str, Any], display: Display) -> int:
    result = _run(options, ExpandConfig, run_expansion, resume_expansion, display)
    _conclude(result, display)
    return 1 if result.config.search.require_target and not result.target_met else 0


def _grow(options: dict[str, Any], display: Display) -> int:
    _conclude_growth(_run(options, GrowConfig, run_growth, resume_growth, display), display)
    return 0


def _grow_views(options: dict[str, Any], display: Display) -> int:
    _conclude_views(_run(options, GrowViewsConfig, run_views_growth, resume_views_growth, display), display)
    return 0


_SEARCHES = {ExpandConfig: _expand, GrowConfig: _grow, GrowViewsConfig: _grow_views}


def _run(options: dict[str, Any], kind: type[Config], run, resume, display: Display):
    """A new run, or an earlier one that goes on."""
    given = given_settings(options)
    if "resume" in options:
        if "config" in options or "out" in options:
            raise ConfigError("resume: takes neither --config nor --out; the run folder holds both")
        from_values(given, kind=kind)
        return resume(options["resume"], given, display=display)
    base = read_yaml(options["config"]) if "config" in options else {}
    return run(from_values(given, base, kind), options.get("out"), display=display)


def _conclude(result: Result, display: Display):
    config = result.config
    cap = f" within {config.search.epochs_cap} epochs" if config.search.epochs_cap else ""
    need = config.search.target_accuracy - config.search.tolerance
    full, found = result.depths[-1], result.depths[result.depth - 1]
    trained = [row["depth"] for row in result.depths if row["trained"]]
    if result.target_met:
        display.message(f"\nfound: depth {result.depth} of {full['depth']} {_reached(result, trained, f'{need:g} %{cap}')}")
    else:
        display.message(f"\nNOT MET: {none_of(trained)} reached {need:g} %{cap}; the best, depth {result.depth}, was kept")
    test = "no test split" if result.test_accuracy is None else f"test accuracy {result.test_accuracy:.2f} %"
    display.message(f"validation accuracy {result.validation_accuracy:.2f} %, {test}")
    compared = " (size only)" if result.baseline is None else (
        f", which reached {result.baseline['validation_accuracy']:.2f} % on validation")
    display.message(f"{found['params']:,} parameters, {found['state_bytes'] / 1e6:.2f} MB: "
                    f"{100 * (1 - found['state_bytes'] / full['state_bytes']):.1f} % smaller than full depth{compared}")
    _say_where(result.folder, display)


def _reached(result: Result, trained: list[int], wanted: str) -> str:
    """What the search says of the found depth, and of smaller ones that it did not train."""
    untried = [depth for depth in range(1, result.depth) if depth not in trained]
    if untried and result.config.search.strategy == "bisect":
        return (f"reaches {wanted}; it is the smallest that does if accuracy grows with depth (not tried: "
                f"{', '.join(map(str, untried))})")
    return f"is the smallest that reaches {wanted}" + (f" (depths below {trained[0]} were not tried)" if untried else "")


def _conclude_growth(result: GrowResult, display: Display):
    def accuracies(validation: float | None, test: float | None) -> str:
        if validation is None:
            return "diverged"
        return f"validation {validation:.2f} %, " + ("no test split" if test is None else f"test {test:.2f} %")

    teacher = result.teacher
    display.message(f"\ngrown: {result.params:,} parameters ({100 * result.params / teacher['params']:.1f} % of the teacher's), "
                    f"{result.flops / 1e6:.2f} M FLOPs ({100 * result.flops / teacher['flops']:.1f} %), after {result.stages} stages")
    rows = [("student", result.validation_accuracy, result.test_accuracy, ""),
            *((f"control {entry['name']}", entry["validation_accuracy"], entry["test_accuracy"], f", {entry['epochs']} epochs")
              for entry in result.controls)]
    width = max(len(name) for name, *_ in rows)
    for name, validation, test, note in rows:
        display.message(f"{name:{width}}  {accuracies(validation, test)}{note}")
    display.message(f"{'teacher':{width}}  validation {teacher['validation_accuracy']:.2f} %, test not read")
    as_good = [entry["name"] for entry in result.controls
               if entry["validation_accuracy"] is not None and entry["validation_accuracy"] >= result.validation_accuracy]
    if as_good:
        display.message(f"as good or better on validation: {', '.join(as_good)}; so these figures do not show that growing the "
                        "student brought more than training its graph")
    _say_where(result.folder, display)


def _conclude_views(result: ViewsResult, display: Display):
    teacher = result.teacher
    display.message(f"\ngrown: {result.params:,} parameters ({100 * result.params / teacher['params']:.1f} % of the teacher's) after "
                    f"{result.stages} stages, hidden layers of {', '.join(map(str, result.widths))}")
    student = {"params": result.params, "validation_psnr": result.validation_psnr, "test_psnr": result.test_psnr}
    rows = {"teacher": teacher, "student": student, **{f"control {each['name']}": each for each in result.controls}}
    width = max(map(len, rows))
    for name, each in rows.items():
        display.message(f"{name:{width}}  validation {each['validation_psnr']:.2f} dB, test {each['test_psnr']:.2f} dB, "
                        f"{each['params']:,} parameters")
    _say_where(result.folder, display)


def _say_where(folder: Path, display: Display):
    display.message(f"model:  {folder / 'model'}\nreport: {folder / 'report.html'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m odn_fast.search", epilog=_EXPAND_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Search the smallest network that meets a target. `expand` is the default.")
    commands = parser.add_subparsers(dest="command", metavar="expand|grow|grow-views")
    common = {"formatter_class": argparse.RawDescriptionHelpFormatter, "argument_default": argparse.SUPPRESS, "allow_abbrev": False}
    expand = commands.add_parser(
        "expand", help="find the smallest depth of a network that meets a target accuracy (Optimally Deep Networks)",
        description="Find the smallest depth of a network that meets a target accuracy: warm up all depths in one pass, "
                    "train from shallow to deep until the target is met, fine-tune, extract.", epilog=_EXPAND_EPILOG, **common)
    add_options(expand, EXPAND, ExpandConfig)
    expand.add_argument("--require-target", dest="search.require_target", action="store_true",
                        help="exit with status 1 if no depth meets the target")
    grow = commands.add_parser(
        "grow", help="grow a teacher's student until it fills a budget of parameters or FLOPs (SEArch)",
        description="Grow a student for a teacher: from one unit on, distil the teacher's inner maps into it, find the node with "
                    "most to gain, split its edge, until the budget is filled; retrain on labels; train controls to compare with.",
        epilog=_GROW_EPILOG, **common)
    add_options(grow, GROW, GrowConfig)
    grow.add_argument("--no-standardize", dest="growth.standardize", action="store_false",
                      help="take the paper's attention literally (Eq. 1); it is known to shrink students to zero (default: queries "
                           "and keys are standardised)")
    views = commands.add_parser(
        "grow-views", help="grow a radiance field (NeRF) under a trained one's guidance (SEArch)",
        description="Train a radiance field on views of a scene, distil its hidden layers into a narrow student, widen the layer that "
                    "is furthest from the teacher's, until a share of its parameters is used; retrain; train controls to compare with.",
        epilog=_VIEWS_EPILOG, **common)
    add_options(views, GROW_VIEWS, GrowViewsConfig)
    return parser


def _fail(display: Display, error: Exception | str, status: int) -> int:
    display.close()
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
