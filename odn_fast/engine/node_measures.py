"""How far every node of a student is from its teacher's map, on a whole split: the signal that steers growth."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..models import StudentGraph, StudentNetwork
from ..models.teachers import Teacher
from ..ops import channel_attention_loss
from ..reference.channel_attention import attention_weights

COLLAPSED_LOSS, COLLAPSED_ENTROPY, COLLAPSED_SIZE = 0.99, 0.99, 1e-3


@dataclass(frozen=True)
class NodeMeasure:
    """One node over a split, in eval mode; of a radiance field a hidden layer, over points.

    Attributes:
        node, q: its number, and that of the teacher's map.
        R: inner loss, mean over elements; R_zero: its value for a map of zeros; relative: over the teacher's mean square.
        mean_square, teacher_mean_square: of the maps' elements.
        entropy: of attention, from 0 (one teacher channel each) to 1 (all alike); peak: its largest weight.
        distinct: teacher channels that weigh most with some student channel, per image.
        dead: student channels that are zero everywhere.
    """

    node: int
    q: int
    R: float
    R_zero: float
    relative: float
    mean_square: float
    teacher_mean_square: float
    entropy: float
    peak: float
    distinct: float
    dead: int

    @property
    def collapsed(self) -> bool:
        """Whether the node has shrunk towards a map of zeros. Dead channels alone are no sign of it."""
        return (self.R >= COLLAPSED_LOSS * self.R_zero and self.entropy > COLLAPSED_ENTROPY
                and self.mean_square < COLLAPSED_SIZE * self.teacher_mean_square)

    def to_dict(self) -> dict:
        return asdict(self)


@torch.inference_mode()
def measure(network: StudentNetwork, teacher: Teacher, batches: Iterable[tuple[Tensor, Tensor]],
            standardize: bool) -> tuple[float, list[NodeMeasure]]:
    """Percent of correct images, and the measure of every supervised node, older first, over all batches.

    network: put in eval mode; batches: (x, y) on its device, in a fixed order.
    """
    graph: StudentGraph = network.graph
    network.eval()
    sums = {node.id: NodeSums(node.id, node.q) for node in graph.supervised}
    correct, images = 0, 0
    for x, y in batches:
        logits, maps = network(x)
        taught = teacher.maps(x, [node.q for node in graph.supervised])
        for node, given in zip(graph.supervised, taught):
            sums[node.id].add(maps[node.id], given, standardize)
        correct += (logits.argmax(1) == y).sum()
        images += len(y)
    return 100.0 * int(correct) / images, [each.measure() for each in sums.values()]


class NodeSums:
    """What accumulates over batches for one node."""

    def __init__(self, node: int, q: int):
        self.node, self.q, self.images, self.total, self.largest = node, q, 0, 0, None

    def add(self, student: Tensor, teacher: Tensor, standardize: bool):
        """student: (N, C_s, H, W), of the teacher's size; teacher: (N, C_t, H, W)."""
        loss = channel_attention_loss(student, teacher, standardize=standardize)
        weights = attention_weights(student, teacher, standardize)
        chosen = torch.zeros_like(weights[:, 0]).scatter_(1, weights.argmax(2), 1.0)
        entropy = torch.special.entr(weights).sum(2).mean() / max(math.log(weights.shape[2]), 1e-9)
        means = torch.stack([loss, teacher.mean(1).square().mean(), student.square().mean(), teacher.square().mean(),
                             entropy, weights.amax(2).mean(), chosen.sum(1).mean()])
        self.total = self.total + means.double() * len(student)
        self.images += len(student)
        largest = student.amax((0, 2, 3))
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)

    def measure(self) -> NodeMeasure:
        loss, zero, mean_square, teacher_mean_square, entropy, peak, distinct = (self.total / self.images).tolist()
        return NodeMeasure(
            node=self.node, q=self.q, R=loss, R_zero=zero, relative=loss / max(teacher_mean_square, 1e-30),
            mean_square=mean_square, teacher_mean_square=teacher_mean_square, entropy=entropy, peak=peak, distinct=distinct,
            dead=int((self.largest <= 0).sum()))
