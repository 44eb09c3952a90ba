"""What a student learns from a frozen teacher: its inner maps through channel attention (SEArch, Eq. 2), or its logits.

The losses are given positions in the training split in place of labels, so that what is known of an image beforehand (its
label, the teacher's maps) is gathered and not computed again.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..data import Normalisation, Split, evaluation_batches
from ..models import StudentGraph, StudentNetwork
from ..models.teachers import Teacher
from ..ops import TeacherStatistics, channel_attention_loss, teacher_statistics
from .precision import autocast
from .step import Loss

_BATCH = 256  # images that a teacher is given at once


def numbered(split: Split) -> Split:
    """The same images with every one's position in the split for a label."""
    return split.relabelled(torch.arange(len(split), device=split.labels.device))


class TeacherMaps:
    """A frozen teacher's maps over a split, computed once where there is memory for them.

    Args:
        split, normalisation: the images as the student sees them, without augmentation.
        limit: bytes that may be kept; 0 computes every map when it is asked for.
        precision: "fp32" or "bf16" (autocast), as the student is trained in.

    Which maps are kept depends on the limit and on the order in which they were wanted, and on nothing else. Their
    statistics are kept beside them where the limit would hold those of every map.
    """

    def __init__(self, teacher: Teacher, split: Split, normalisation: Normalisation, limit: int, precision: str, device: str):
        self.teacher = teacher
        self._split, self._normalisation, self._left = split, normalisation, limit
        self._precision, self._device = precision, device
        self._kept: dict[int, list[Tensor]] = {}
        self._refused: set[int] = set()
        self._room_for_statistics = True  # for all that follows to be asked of `bytes`
        self._room_for_statistics = sum(map(self.bytes, range(1, len(teacher.map_shapes) + 1))) <= limit

    @property
    def kept(self) -> list[int]:
        """Numbers q of the maps that are kept."""
        return sorted(self._kept)

    def want(self, qs: Sequence[int]) -> list[int]:
        """Compute and keep the maps `qs` where they fit, earlier ones first; returns those that do not, the first time."""
        fresh, refused = [], []
        for q in dict.fromkeys(qs):
            if q in self._kept or q in self._refused:
                continue
            size = self.bytes(q)
            if size > self._left:
                refused.append(q)
                continue
            self._left -= size
            fresh.append(q)
        self._refused |= set(refused)
        if fresh:
            self._kept |= self._computed(fresh)
        return refused

    def at(self, x: Tensor, positions: Tensor, qs: Sequence[int]) -> list[tuple[Tensor, TeacherStatistics | None]]:
        """The maps (N, C_q, H_q, W_q) of images x at `positions` (N,), with their statistics where those are kept."""
        missing = [q for q in dict.fromkeys(qs) if q not in self._kept]
        computed = dict(zip(missing, self.teacher.maps(x, missing))) if missing else {}
        return [self._gathered(q, positions) if q in self._kept else (computed[q], None) for q in qs]

    def _gathered(self, q: int, positions: Tensor) -> tuple[Tensor, TeacherStatistics | None]:
        rows, *statistics = (kept.index_select(0, positions) for kept in self._kept[q])
        return rows.permute(0, 3, 1, 2), TeacherStatistics(*statistics) if statistics else None

    def bytes(self, q: int) -> int:
        """Memory that map q takes with what is kept beside it."""
        channels, height, width = self.teacher.map_shapes[q - 1]
        size = channels * height * width * (2 if self._precision == "bf16" else 4)
        return len(self._split) * (size + (4 * channels * (channels + 2) if self._with_statistics(q) else 0))

    def _with_statistics(self, q: int) -> bool:
        """Their Gram matrix has C x C entries: beside a map of fewer positions, reading it costs more than it spares."""
        channels, height, width = self.teacher.map_shapes[q - 1]
        return self._room_for_statistics and channels <= height * width

    @torch.no_grad()
    def _computed(self, qs: list[int]) -> dict[int, list[Tensor]]:
        """Maps as (images, H, W, C), whose rows are gathered fastest, and the fields of their statistics."""
        kept: dict[int, list[Tensor]] = {}
        first = 0
        for x, _ in evaluation_batches(self._split, self._normalisation, _BATCH):
            with autocast(self._precision, self._device):
                maps = self.teacher.maps(x.to(self._device), qs)
            for q, values in zip(qs, maps):
                values = values.to(torch.bfloat16 if self._precision == "bf16" else torch.float32)
                parts = [values.permute(0, 2, 3, 1), *(teacher_statistics(values) if self._with_statistics(q) else ())]
                if q not in kept:
                    kept[q] = [part.new_empty(len(self._split), *part.shape[1:]) for part in parts]
                for whole, part in zip(kept[q], parts):
                    whole[first:first + len(part)] = part
            first += len(x)
        return kept


def inner_loss(student: Sequence[Tensor], teacher: Sequence[tuple[Tensor, TeacherStatistics | None]],
               standardize: bool) -> Tensor:
    """Mean of R over supervised nodes: student's maps, and the teacher's with their statistics."""
    losses = [channel_attention_loss(map_, given, statistics=statistics, standardize=standardize)
              for map_, (given, statistics) in zip(student, teacher, strict=True)]
    return torch.stack(losses).mean()


def growth_loss(graph: StudentGraph, maps: TeacherMaps, labels: Tensor, alpha: Tensor, standardize: bool) -> Loss:
    """The loss of a stage: alpha * (mean of R over supervised nodes) and cross-entropy, in this order.

    labels: (images,), of the training split; alpha: (), read at every step on the device.
    """
    nodes = [(node.id, node.q) for node in graph.supervised]

    def loss(model: StudentNetwork, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        logits, student = model(x)
        classified, correct = _classified(logits, labels[positions])
        taught = maps.at(x, positions, [q for _, q in nodes])
        inner = inner_loss([student[node] for node, _ in nodes], taught, standardize)
        return torch.stack([alpha * inner, classified]), correct

    return loss


def label_loss(labels: Tensor) -> Loss:
    """Cross-entropy alone, of a student."""
    def loss(model: StudentNetwork, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        classified, correct = _classified(model(x)[0], labels[positions])
        return classified[None], correct

    return loss


TEMPERATURE, SOFT_SHARE = 4.0, 0.9


def logit_loss(labels: Tensor, soft: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """Distillation of logits (Hinton et al. 2015): 0.9 * T^2 * KL divergence at T = 4 and 0.1 * cross-entropy.

    soft: (x, positions) -> the teacher's logits (N, classes).
    """
    def loss(model: StudentNetwork, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(x)[0].float()
        classified, correct = _classified(logits, labels[positions])
        given = torch.log_softmax(soft(x, positions).float() / TEMPERATURE, 1)
        taught = nn.functional.kl_div(torch.log_softmax(logits / TEMPERATURE, 1), given, reduction="batchmean", log_target=True)
        return torch.stack([SOFT_SHARE * TEMPERATURE ** 2 * taught, (1 - SOFT_SHARE) * classified]), correct

    return loss


@torch.no_grad()
def teacher_logits(teacher: Teacher, split: Split, normalisation: Normalisation, precision: str, device: str) -> Tensor:
    """A teacher's logits (images, classes) over a whole split."""
    logits = []
    for x, _ in evaluation_batches(split, normalisation, _BATCH):
        with autocast(precision, device):
            logits.append(teacher(x.to(device)).float())
    return torch.cat(logits)


def _classified(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy, a scalar, and the number of correct images (1,)."""
    logits = logits.float()
    correct = (logits.detach().argmax(1) == labels).sum()
    return nn.functional.cross_entropy(logits, labels), correct[None]
