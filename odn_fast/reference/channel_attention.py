"""Channel attention in plain PyTorch: a teacher's map projected onto a student's channels, and the loss of SEArch.

Per image, the student's map is Q (C_s, P), the teacher's K (C_t, P), P = H W positions. The weights are
A = softmax over C_t of Q' K'^T / sqrt(P); primes mark rows standardised over positions, (x - mean) / (std + EPSILON).
The projected map is A K (SEArch, Eq. 1), the loss the mean of (Q - A K)^2 (Eq. 2).

`check` is the one place where arguments are validated; the public functions, the fakes and these references all
call it.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from odn_fast.reference._arguments import FLOATING, check_given, check_map, check_tensor, compute_dtype

EPSILON = 1e-3


class TeacherStatistics(NamedTuple):
    """What the attention needs of a teacher's map, per image; float32, or float64 for float64 maps.

    mean (N, C_t) over positions; std (N, C_t) over positions, uncorrected and without EPSILON, which is added where
    std divides; gram (N, C_t, C_t), the Gram matrix of the rows less their mean: K K^T = gram + P mean mean^T.
    """

    mean: Tensor
    std: Tensor
    gram: Tensor


def check(
    op: str, student: Tensor, teacher: Tensor, statistics: TeacherStatistics | None = None, pooled: bool = True
) -> None:
    """Raise ValueError naming the first argument that breaks the contract of `op`.

    pooled: the maps must have one size already.
    """
    check_map(op, "student", student)
    check_map(op, "teacher", teacher)
    batch, size = student.shape[0], tuple(student.shape[2:])
    if teacher.shape[0] != batch or (pooled and teacher.shape[2:] != student.shape[2:]):
        expected = f"({batch}, C_t, {size[0]}, {size[1]})" if pooled else f"({batch}, C_t, H', W')"
        raise ValueError(f"{op}: teacher has shape {tuple(teacher.shape)}, expected {expected} as student")
    check_tensor(op, "teacher", teacher, teacher.shape, student.device, leader="student")
    if statistics is None:
        return
    if pooled_size(student, teacher) != tuple(teacher.shape[2:]):
        raise ValueError(
            f"{op}: statistics are those of teacher of shape {tuple(teacher.shape)}, which is pooled to the size of"
            f" student, {size}; expected a teacher pooled before its statistics are taken"
        )
    channels, exact = teacher.shape[1], (compute_dtype(student, teacher),)
    shapes = ((batch, channels), (batch, channels), (batch, channels, channels))
    named = zip(TeacherStatistics._fields, statistics, shapes, strict=True)
    check_given(op, student.device, [(f"statistics.{name}", tensor, shape, exact) for name, tensor, shape in named])


def pooled_size(student: Tensor, teacher: Tensor) -> tuple[int, int]:
    """The size both maps are average-pooled to: the smaller height and the smaller width."""
    return min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])


def pool(x: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """`x` average-pooled to `size` in `dtype`, or as it is if it has this size."""
    return x if x.shape[2:] == size else F.adaptive_avg_pool2d(x.to(dtype), size)


def channel_attention_statistics(teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of TeacherStatistics of `teacher` (N, C_t, H, W)."""
    check_map("teacher_statistics", "teacher", teacher)
    rows = teacher.to(compute_dtype(teacher)).flatten(2)
    mean = rows.mean(2)
    centred = rows - mean[:, :, None]
    return mean, rows.std(2, correction=0), centred @ centred.mT


def channel_attention(student: Tensor, teacher: Tensor, standardize: bool) -> Tensor:
    """The projected map A K, (N, C_s, H, W) channels_last in the dtype of `student` (N, C_s, H, W).

    teacher: (N, C_t, H, W); standardize: False takes Q and K for Q' and K', Eq. 1 to the letter.
    """
    check("channel_attention", student, teacher)
    q, k = _rows(student, teacher)
    return _as_map(_Weights(q, k, standardize).values @ k, student)


def attention_weights(student: Tensor, teacher: Tensor, standardize: bool) -> Tensor:
    """The weights A (N, C_s, C_t) themselves, for looking at; student: (N, C_s, H, W); teacher: (N, C_t, H, W)."""
    check("attention_weights", student, teacher)
    return _Weights(*_rows(student, teacher), standardize).values


def channel_attention_backward(grad: Tensor, student: Tensor, teacher: Tensor, standardize: bool) -> Tensor:
    """Gradient of sum(grad * channel_attention(student, teacher, standardize)) with respect to `student`."""
    check("channel_attention_backward", student, teacher)
    check_grad(grad, student)
    q, k = _rows(student, teacher)
    weights = _Weights(q, k, standardize)
    return _as_map(weights.gradient(grad.to(q.dtype).flatten(2) @ k.mT), student)


def check_grad(grad: Tensor, student: Tensor) -> None:
    """Raise ValueError unless `grad` is a gradient of the projected map."""
    check_given("channel_attention_backward", student.device, [("grad", grad, student.shape, FLOATING)])


def channel_attention_loss(
    student: Tensor,
    teacher: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    gram: Tensor | None,
    standardize: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The loss, a scalar, and its gradient with respect to `student`.

    student: (N, C_s, H, W); teacher: (N, C_t, H, W); mean, std, gram: its TeacherStatistics, or None, all three.
    The gradient is shaped as student, channels_last; of shape (0,) unless `with_gradient`. The statistics spare
    work and change no value.
    """
    check("channel_attention_loss", student, teacher, given_statistics(mean, std, gram))
    q, k = _rows(student, teacher)
    weights = _Weights(q, k, standardize, mean, std)
    difference = q - weights.values @ k
    loss = difference.square().mean()
    if not with_gradient:
        return loss, student.new_empty(0)
    slope = difference * (2 / max(difference.numel(), 1))
    return loss, _as_map(slope + weights.gradient(-slope @ k.mT), student)


def given_statistics(mean: Tensor | None, std: Tensor | None, gram: Tensor | None) -> TeacherStatistics | None:
    """Three tensors as TeacherStatistics, three Nones as None; ValueError for a mixture."""
    given = [x is not None for x in (mean, std, gram)]
    if any(given) and not all(given):
        raise ValueError("channel_attention_loss: expected all of mean, std and gram of the teacher, or none of them")
    return TeacherStatistics(mean, std, gram) if all(given) else None


def channel_attention_loss_backward(grad_loss: Tensor, gradient: Tensor) -> Tensor:
    """grad_loss * gradient, in the dtype of gradient."""
    check_slope(grad_loss, gradient)
    return (grad_loss.to(compute_dtype(gradient)) * gradient).to(gradient.dtype)


def check_slope(grad_loss: Tensor, gradient: Tensor) -> None:
    """Raise ValueError unless the arguments are those of `channel_attention_loss_backward`."""
    check_map("channel_attention_loss_backward", "gradient", gradient)
    check_given("channel_attention_loss_backward", gradient.device, [("grad_loss", grad_loss, (), FLOATING)])


def _rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(student, teacher)
    return student.to(dtype).flatten(2), teacher.to(dtype).flatten(2)


def _as_map(rows: Tensor, student: Tensor) -> Tensor:
    return rows.reshape(student.shape).to(student.dtype, memory_format=torch.channels_last)


class _Weights:
    """The weights A (N, C_s, C_t) of rows q (N, C_s, P) and k (N, C_t, P), and how q changes with them."""

    def __init__(self, q, k, standardize, k_mean=None, k_std=None):
        self.standardize = standardize
        if standardize:
            self.centred = q - q.mean(2, keepdim=True)
            self.q_std = q.std(2, correction=0, keepdim=True)
            k_mean = k.mean(2) if k_mean is None else k_mean
            k_std = k.std(2, correction=0) if k_std is None else k_std
            q, k = self.centred / (self.q_std + EPSILON), (k - k_mean[:, :, None]) / (k_std[:, :, None] + EPSILON)
        self.q, self.k, self.root = q, k, math.sqrt(q.shape[2])
        self.values = torch.softmax(q @ k.mT / self.root, 2)

    def gradient(self, grad):
        """Gradient with respect to q of sum(grad * A)."""
        through_softmax = self.values * (grad - (self.values * grad).sum(2, keepdim=True))
        slope = through_softmax @ self.k / self.root
        if not self.standardize:
            return slope
        # q' = centred / (std + EPSILON); as in PyTorch, a std of zero passes no gradient on.
        spread = self.q_std + EPSILON
        through_std = -(slope * self.q).sum(2, keepdim=True) / spread
        through_std = (through_std / (self.q_std * slope.shape[2])).masked_fill(self.q_std == 0, 0)
        slope = slope / spread
        return slope - slope.mean(2, keepdim=True) + through_std * self.centred
