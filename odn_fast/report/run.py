"""A run folder read back: its configuration, and its events by name."""

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..record import RunError

_START = "version torch python processor threads device precision precision_requested malloc_tuned extension dataset"
_READING = "network correct total accuracy"
# What the page of each kind of run takes from every event; an event without it was written by another version.
_FIELDS = {
    "expand": {
        "start": f"{_START} model",
        "table": "rows",
        "resume": "phase depth",
        "epoch": "phase depth epoch losses train_accuracies validation_accuracy lr seconds images_per_second improved",
        "depth": "phase depth outcome epochs best_accuracy first_step_seconds",
        "exits": "validation_accuracies",
        "chosen": "depth target_met",
        "test_reading": _READING,
        "warning": "text",
        "result": "depth target_met target_accuracy tolerance epochs_cap validation_accuracy test_accuracy seconds depths baseline "
                  "confusion confusion_split class_names",
    },
    "grow": {
        "start": f"{_START} teacher limits",
        "teacher": "name params flops maps validation_accuracy",
        "resume": "",
        "epoch": "phase stage epoch losses train_accuracies validation_accuracy lr seconds images_per_second improved",
        "stage": "stage graph params flops validation_accuracy epochs seconds first_step_seconds step_ms nodes",
        "split": "stage kind node edge scores skipped",
        "retrain": "epochs retrain_from first_step_seconds",
        "control": "name validation_accuracy test_accuracy epochs",
        "test_reading": _READING,
        "warning": "text",
        "result": "params flops stages validation_accuracy test_accuracy controls collapsed seconds "
                  "latency_ms latency_low_ms latency_high_ms confusion confusion_split class_names",
    },
    "grow-views": {
        "start": f"{_START} teacher",
        "teacher": "name params widths validation_psnr test_psnr epochs",
        "resume": "",
        "epoch": "phase stage epoch seconds images_per_second",
        "stage": "stage shape params share validation_psnr epochs first_step_seconds layers",
        "widen": "stage layer by",
        "retrain": "epochs",
        "control": "name params widths validation_psnr test_psnr epochs",
        "test_reading": "network views psnr first_view_psnr picture truth",
        "warning": "text",
        "result": "params widths budget stages validation_psnr test_psnr teacher controls seconds",
    },
}
# Settings without which a configuration is of no such run.
_NEEDED = {"expand": ("search", "target_accuracy", "tolerance"), "grow": ("growth", "budget", "budget_flops"),
           "grow-views": ("growth", "budget_share")}


@dataclass(frozen=True)
class Run:
    """What a run folder says: its configuration, and its events by name in order. `kind` is expand, grow or grow-views."""

    name: str
    kind: str
    config_text: str
    config: dict
    events: dict[str, list[dict]]

    def last(self, name: str) -> dict | None:
        return self.events[name][-1] if self.events[name] else None

    @property
    def result(self) -> dict | None:
        return self.last("result")

    @property
    def warnings(self) -> list[str]:
        """What the run warned of, each once."""
        return list(dict.fromkeys(event["text"] for event in self.events["warning"]))

    @property
    def images(self) -> int:
        """Images in the validation split."""
        return self.events["start"][-1]["dataset"]["validation"]


def read_run(folder: Path) -> Run:
    """Read a run folder; unknown events and a torn last line are passed over. Raises RunError."""
    try:
        config_text = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
        path = folder / "events.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        config = yaml.safe_load(config_text)
    except FileNotFoundError:
        raise RunError(f"{folder}: is not a run folder (no config.yaml in it); give the folder that a run printed") from None
    except OSError as error:
        raise RunError(f"{folder}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise RunError(f"{folder}/config.yaml: is not YAML ({str(error).splitlines()[0]})") from None
    kind = _kind(folder, config)
    return Run(folder.resolve().name, kind, config_text, config, _events(folder, lines, _FIELDS[kind]))


def _kind(folder: Path, config: object) -> str:
    kind = config.get("kind", "expand") if isinstance(config, dict) else "expand"
    if not isinstance(kind, str) or kind not in _NEEDED:
        raise RunError(f"{folder}/config.yaml: is of kind {kind!r}, for which there is no report")
    section, *needed = _NEEDED[kind]
    settings = config.get(section) if isinstance(config, dict) else None
    if not isinstance(settings, dict) or not set(needed) <= set(settings):
        names = " and ".join(f"{section}.{name}" for name in needed)
        raise RunError(f"{folder}/config.yaml: has no {names}; is this the folder of a run?")
    return kind


def _events(folder: Path, lines: list[bytes], fields: dict[str, str]) -> dict[str, list[dict]]:
    events: dict[str, list[dict]] = {name: [] for name in fields}
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            events.get(event["event"], []).append(event)
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise RunError(f"{folder}/events.jsonl: line {number} is damaged; restore the file from a copy") from None
            break
        missing = [field for field in fields.get(event["event"], "").split() if field not in event]
        if missing:
            raise RunError(f"{folder}/events.jsonl: line {number} ({event['event']}) lacks {missing[0]!r}; "
                           "make the report with the version of odn_fast that made the run")
    return events
