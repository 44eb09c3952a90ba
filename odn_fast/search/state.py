"""What every search has to remember between two processes."""

import time
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from ..engine import Training

Kind = TypeVar("Kind", bound="State")


@dataclass
class State:
    """Where a run stands, as a checkpoint stores it. Every search adds what else it needs.

    Attributes:
        phase: of the search.
        training: the training under way, with `model` and `optimizer`, the state dicts it goes on from.
        seconds: time spent before this process.
    """

    phase: str
    training: Training | None = None
    model: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None
    seconds: float = 0.0

    decided = None  # `time.perf_counter()` when this process moved on to what is under training; not stored

    @property
    def place(self) -> dict[str, Any]:
        """The phase, and what is under training in it, as events name them."""
        return {"phase": self.phase}

    def begin(self, phase: str):
        """Move on to a phase with a fresh training."""
        self.phase = phase
        self.training = self.model = self.optimizer = None
        self.decided = time.perf_counter()

    def to_dict(self) -> dict:
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values["training"] = self.training.to_dict() if self.training else None
        return values

    @classmethod
    def from_dict(cls: type[Kind], values: dict) -> Kind:
        training = values["training"]
        return cls(**{**values, "training": Training(**training) if training else None})
