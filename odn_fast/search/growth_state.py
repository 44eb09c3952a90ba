"""Everything that growth has to remember between two processes."""

import time
from dataclasses import dataclass, field, fields
from typing import Any

from ..engine import Training
from ..models import StudentGraph


@dataclass
class GrowState:
    """Where a run stands. With the state `teacher`, of one that was trained, it is all that a resumed process needs.

    Attributes:
        phase: teacher, stage, retrain, control, result or finished.
        stages: stages that have ended in a split.
        graph: the student under training, as `StudentGraph.to_dict` gives it.
        weights: the state dict from which that training started, or None where it started from drawn weights.
        control: the control under training.
        training: the training under way, with `model` and `optimizer`, the state dicts it goes on from.
        teacher: what the event `teacher` says.
        split_nodes: the node that each split so far went to.
        collapsed: whether some node shrank towards a map of zeros.
        reading: of the student: accuracies, and the test split's confusion matrix, read once.
        controls: what the events `control` say.
        step_seconds: time of a step in the last stage.
        seconds: time spent before this process.
    """

    phase: str = "teacher"
    stages: int = 0
    graph: dict | None = None
    weights: dict[str, Any] | None = None
    control: str | None = None
    training: Training | None = None
    model: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None
    teacher: dict | None = None
    split_nodes: list[int] = field(default_factory=list)
    collapsed: bool = False
    reading: dict | None = None
    controls: list[dict] = field(default_factory=list)
    step_seconds: float = 0.0
    seconds: float = 0.0

    decided = None  # `time.perf_counter()` when this process moved on to what is under training; not stored

    @property
    def stage(self) -> int:
        """Number of the stage under training, from 1; after the last, the number of stages."""
        return self.stages + (self.phase == "stage")

    @property
    def place(self) -> dict[str, Any]:
        return {"phase": self.phase, "stage": self.stage} | ({"control": self.control} if self.control else {})

    @property
    def where(self) -> str:
        """The phase in words, with the number or name of what is under training."""
        return {"stage": f"stage {self.stage}", "control": f"control {self.control}"}.get(self.phase, self.phase)

    @property
    def student(self) -> StudentGraph:
        return StudentGraph.from_dict(self.graph)

    def begin(self, phase: str, weights: dict[str, Any] | None = None, control: str | None = None):
        """Move on to a phase with a fresh training, which starts from `weights`."""
        self.phase, self.weights, self.control = phase, weights, control
        self.training = self.model = self.optimizer = None
        self.decided = time.perf_counter()

    def begin_stage(self, graph: StudentGraph, weights: dict[str, Any] | None):
        """Move on to the next stage."""
        self.begin("stage", weights)
        self.graph = graph.to_dict()

    def to_dict(self) -> dict:
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values["training"] = self.training.to_dict() if self.training else None
        return values

    @classmethod
    def from_dict(cls, values: dict) -> "GrowState":
        training = values["training"]
        return cls(**{**values, "training": Training(**training) if training else None})
