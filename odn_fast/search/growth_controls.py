"""What both growths do about their controls: one after another, to compare the student with."""

from collections.abc import Callable
from typing import Protocol

from ..config import GrowConfig, GrowViewsConfig
from ..record import RunFolder
from .growth_state import GrowState
from .recorder import Recorder


class Growing(Protocol):
    """What a growth's phases work with, of images or of views."""

    config: GrowConfig | GrowViewsConfig
    folder: RunFolder
    state: GrowState
    recorder: Recorder


def begin_next_control(growth: Growing):
    """Move on to the first control that has not ended, or to the result where all have."""
    state = growth.state
    done = [entry["name"] for entry in state.controls]
    left = [name for name in growth.config.growth.controls if name not in done]
    if left:
        state.begin("control", control=left[0])
    else:
        state.begin("result")
    growth.recorder.checkpoint()


def run_controls(growth: Growing, train: Callable[[str], dict]):
    """Train the controls that have not ended, and keep what is said of them. train: trains one, and says what came of it."""
    state = growth.state
    while state.phase == "control":
        entry = {"name": state.control, **train(state.control)}
        growth.folder.event("control", **entry, seconds=state.training.seconds)
        state.controls.append(entry)
        begin_next_control(growth)
