"""Everything that a depth search has to remember between two processes."""

import time
from dataclasses import dataclass, field, fields
from typing import Any

from ..engine import Training


@dataclass
class RunState:
    """Where a run stands. With the run folder's named states it is all that a resumed process needs.

    Attributes:
        phase: warm_up, search, fine_tune, baseline or finished.
        depth: the depth under training.
        training: the training under way, with `model` and `optimizer`, the state dicts it goes on from.
        trained: one entry per depth whose training has ended, in order, as the `depth` events say, and whether it passed.
        under_way: where several depths are trained at once: of each, copies of training, model and optimizer to go on from.
        cancelled: one entry per depth that was given up because a shallower one had passed.
        found: the chosen depth; target_met: whether it passed.
        readings: of the found network and the baseline: accuracies, and the test split's confusion matrix, read once.
        seconds: time spent before this process.
    """

    phase: str = "warm_up"
    depth: int = 0
    training: Training | None = None
    model: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None
    trained: list[dict] = field(default_factory=list)
    under_way: dict[int, dict[str, Any]] = field(default_factory=dict)
    cancelled: list[dict] = field(default_factory=list)
    found: int | None = None
    target_met: bool = False
    readings: dict[str, dict] = field(default_factory=dict)
    seconds: float = 0.0

    decided = None  # `time.perf_counter()` when this process moved on to what is under training; not stored

    @property
    def place(self) -> dict[str, Any]:
        return {"phase": self.phase, "depth": self.depth}

    def begin(self, phase: str, depth: int = 0):
        """Move on to a phase and depth with a fresh training."""
        self.phase, self.depth = phase, depth
        self.training = self.model = self.optimizer = None
        self.decided = time.perf_counter()

    def go_on_from(self, saved: dict[str, Any]):
        """Take up a training that `stored` gave: its training, model and optimizer."""
        self.training, self.model, self.optimizer = Training(**saved["training"]), saved["model"], saved["optimizer"]

    @property
    def stored(self) -> dict[str, Any]:
        """The training of the present depth, to go on from."""
        return {"training": self.training.to_dict(), "model": self.model, "optimizer": self.optimizer}

    @property
    def ended(self) -> dict[int, bool]:
        """Depths whose training has ended, and whether each passed."""
        return {entry["depth"]: entry["passed"] for entry in self.trained}

    @property
    def baseline(self) -> dict | None:
        """Depth and accuracies of the full network trained for comparison, or None."""
        reading = self.readings.get("baseline")
        return {key: reading[key] for key in ("depth", "validation_accuracy", "test_accuracy")} if reading else None

    def to_dict(self) -> dict:
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values["training"] = self.training.to_dict() if self.training else None
        return values

    @classmethod
    def from_dict(cls, values: dict) -> "RunState":
        training = values["training"]
        return cls(**{**values, "training": Training(**training) if training else None})
