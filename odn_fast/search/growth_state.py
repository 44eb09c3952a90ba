"""Everything that growth has to remember between two processes."""

from dataclasses import dataclass, field
from typing import Any

from ..models import StudentGraph
from .state import State


@dataclass
class GrowState(State):
    """Where a run stands. With the state `teacher`, of one that was trained, it is all that a resumed process needs.

    Attributes:
        phase: teacher, stage, retrain, control, result or finished.
        stages: stages that have ended in a split.
        graph: the student under training, as `StudentGraph.to_dict` gives it.
        weights: the state dict from which that training started, or None where it started from drawn weights.
        control: the control under training.
        teacher: what the event `teacher` says.
        split_nodes: the node that each split so far went to.
        collapsed: whether some node shrank towards a map of zeros.
        reading: of the student: accuracies, and the test split's confusion matrix, read once.
        controls: what the events `control` say.
        step_seconds: time of a step in the last stage.
    """

    phase: str = "teacher"
    stages: int = 0
    graph: dict | None = None
    weights: dict[str, Any] | None = None
    control: str | None = None
    teacher: dict | None = None
    split_nodes: list[int] = field(default_factory=list)
    collapsed: bool = False
    reading: dict | None = None
    controls: list[dict] = field(default_factory=list)
    step_seconds: float = 0.0

    @property
    def stage(self) -> int:
        """Number of the stage under training, from 1; after the last, the number of stages."""
        return self.stages + (self.phase == "stage")

    @property
    def place(self) -> dict[str, Any]:
        return super().place | {"stage": self.stage} | ({"control": self.control} if self.control else {})

    @property
    def where(self) -> str:
        """The phase in words, with the number or name of what is under training."""
        return {"stage": f"stage {self.stage}", "control": f"control {self.control}"}.get(self.phase, self.phase)

    @property
    def student(self) -> StudentGraph:
        return StudentGraph.from_dict(self.graph)

    def begin(self, phase: str, weights: dict[str, Any] | None = None, control: str | None = None):
        """Move on to a phase with a fresh training, which starts from `weights`."""
        super().begin(phase)
        self.weights, self.control = weights, control

    def begin_stage(self, graph: StudentGraph, weights: dict[str, Any] | None):
        """Move on to the next stage."""
        self.begin("stage", weights)
        self.graph = graph.to_dict()
