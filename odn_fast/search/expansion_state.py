"""Everything that a depth search has to remember between two processes."""

from dataclasses import dataclass, field
from typing import Any

from ..engine import Training
from .state import State


@dataclass
class RunState(State):
    """Where a run stands. With the run folder's named states it is all that a resumed process needs.

    Attributes:
        phase: warm_up, search, fine_tune, baseline or finished.
        depth: the depth under training.
        trained: one entry per depth whose training has ended, in order, as the `depth` events say, and whether it passed.
        under_way: where several depths are trained at once: of each, copies of training, model and optimizer to go on from.
        cancelled: one entry per depth that was given up because a shallower one had passed.
        found: the chosen depth; target_met: whether it passed.
        readings: of the found network and the baseline: accuracies, and the test split's confusion matrix, read once.
    """

    phase: str = "warm_up"
    depth: int = 0
    trained: list[dict] = field(default_factory=list)
    under_way: dict[int, dict[str, Any]] = field(default_factory=dict)
    cancelled: list[dict] = field(default_factory=list)
    found: int | None = None
    target_met: bool = False
    readings: dict[str, dict] = field(default_factory=dict)

    @property
    def place(self) -> dict[str, Any]:
        return super().place | {"depth": self.depth}

    def begin(self, phase: str, depth: int = 0):
        """Move on to a phase and depth with a fresh training."""
        super().begin(phase)
        self.depth = depth

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
