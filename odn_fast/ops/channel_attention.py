"""Channel attention of SEArch: a teacher's map projected onto a student's channels, and the loss taken from it.

The loss writes the student's gradient in its forward call, while both maps are in cache, and only when the student
needs one; backward hands it over, multiplied by the incoming gradient unless that is 1.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from odn_fast.ops._choose import register_cuda, triton
from odn_fast.ops._library import define, library, refuse_second_derivative
from odn_fast.reference import channel_attention as reference
from odn_fast.reference.channel_attention import TeacherStatistics


def channel_attention(student: Tensor, teacher: Tensor, *, standardize: bool = True) -> Tensor:
    """The teacher's map projected onto the student's channels: Atten(student, teacher, teacher), SEArch Eq. 1.

    student: (N, C_s, H, W), Q; teacher: (N, C_t, H', W'), K; any strides, each float32, bfloat16 or float64. Where
    sizes differ both are average-pooled (adaptively) to the smaller height and the smaller width.
    Per image A = softmax over C_t of Q' K'^T / sqrt(H W), where primes mark channels standardised over positions,
    (x - mean) / (std + 1e-3), std uncorrected. standardize=False takes Q and K themselves, Eq. 1 to the letter: as a
    training signal it shrinks the student to zero.

    Returns A K, (N, C_s, H, W) in the student's dtype and channels_last, differentiable once with respect to the
    student; the teacher is a constant. Autocast changes nothing.

    Raises ValueError on shapes, dtypes or devices that do not fit.
    """
    reference.check("channel_attention", student, teacher, pooled=False)
    size, dtype = reference.pooled_size(student, teacher), reference.compute_dtype(student, teacher)
    projected = _channel_attention(
        reference.pool(student, size, dtype), reference.pool(teacher, size, dtype), standardize
    )
    return projected.to(student.dtype)


def channel_attention_loss(
    student: Tensor, teacher: Tensor, *, statistics: TeacherStatistics | None = None, standardize: bool = True
) -> Tensor:
    """Mean squared difference of the student's map and the projected teacher's, SEArch Eq. 2 as a mean.

    student, teacher, standardize: as in `channel_attention`.
    statistics: `teacher_statistics(teacher)`, computed once for a teacher's map that is used again, in the dtype of
    arithmetic (float64 if either map is float64). A teacher larger than the student must be pooled before.

    Returns a scalar in float32 (float64 if either map is float64), also under autocast, differentiable once with
    respect to the student; the teacher is a constant. An empty batch has loss NaN.

    Raises ValueError on shapes, dtypes or devices that do not fit, and on statistics of a teacher that this call
    pools; RuntimeError on a second backward pass, and on create_graph=True.
    """
    reference.check("channel_attention_loss", student, teacher, statistics, pooled=False)
    size, dtype = reference.pooled_size(student, teacher), reference.compute_dtype(student, teacher)
    mean, std, gram = (None, None, None) if statistics is None else statistics
    student, teacher = reference.pool(student, size, dtype), reference.pool(teacher, size, dtype)
    return _channel_attention_loss(student, teacher, mean, std, gram, standardize, False)[0]


def teacher_statistics(teacher: Tensor) -> TeacherStatistics:
    """What `channel_attention_loss` can reuse of a teacher's map (N, C_t, H, W): mean, std and Gram matrix per image.

    Constants, in float32 (float64 for a float64 teacher). They pay off where the same maps meet several students
    or come back every epoch.

    Raises ValueError on a shape or dtype that does not fit.
    """
    reference.check_map("teacher_statistics", "teacher", teacher)
    return TeacherStatistics(*_channel_attention_statistics(teacher.detach()))


def _fake_statistics(teacher):
    reference.check_map("teacher_statistics", "teacher", teacher)
    batch, channels = teacher.shape[:2]
    mean = teacher.new_empty(batch, channels, dtype=reference.compute_dtype(teacher))
    return mean, torch.empty_like(mean), mean.new_empty(batch, channels, channels)


def _fake(student, teacher, standardize):
    reference.check("channel_attention", student, teacher)
    return torch.empty_like(student, memory_format=torch.channels_last)


def _fake_backward(grad, student, teacher, standardize):
    _check_backward(grad, student, teacher, standardize)
    return torch.empty_like(student, memory_format=torch.channels_last)


def _fake_loss(student, teacher, mean, std, gram, standardize, with_gradient):
    _check_loss(student, teacher, mean, std, gram)
    loss = student.new_empty((), dtype=reference.compute_dtype(student, teacher))
    if not with_gradient:
        return loss, student.new_empty(0)
    return loss, torch.empty_like(student, memory_format=torch.channels_last)


def _fake_loss_backward(grad_loss, gradient):
    reference.check_slope(grad_loss, gradient)
    return torch.empty_like(gradient)


_channel_attention_statistics = define(
    "channel_attention_statistics(Tensor teacher) -> (Tensor mean, Tensor std, Tensor gram)",
    reference.channel_attention_statistics,
    _fake_statistics,
)
_channel_attention = define(
    "channel_attention(Tensor student, Tensor teacher, bool standardize) -> Tensor",
    reference.channel_attention,
    _fake,
)
_channel_attention_backward = define(
    "channel_attention_backward(Tensor grad, Tensor student, Tensor teacher, bool standardize) -> Tensor",
    reference.channel_attention_backward,
    _fake_backward,
)
_channel_attention_loss = define(
    "channel_attention_loss(Tensor student, Tensor teacher, Tensor? mean, Tensor? std, Tensor? gram,"
    " bool standardize, bool with_gradient) -> (Tensor loss, Tensor gradient)",
    reference.channel_attention_loss,
    _fake_loss,
)
_channel_attention_loss_backward = define(
    "channel_attention_loss_backward(Tensor grad_loss, Tensor gradient) -> Tensor",
    reference.channel_attention_loss_backward,
    _fake_loss_backward,
)


class _ChannelAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, standardize):
        ctx.save_for_backward(student, teacher)
        ctx.standardize = standardize
        with torch._C._AutoDispatchBelowAutograd():
            return _channel_attention(student, teacher, standardize)

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative("channel_attention")
        student, teacher = ctx.saved_tensors
        return _channel_attention_backward(grad, student, teacher, ctx.standardize), None, None


class _ChannelAttentionLoss(torch.autograd.Function):
    """Keeps the gradient itself, not among saved tensors, so that backward can hand over the only reference to it:
    whoever adds to it next may then do so in place."""

    @staticmethod
    def forward(ctx, student, teacher, mean, std, gram, standardize):
        with torch._C._AutoDispatchBelowAutograd():
            loss, gradient = _channel_attention_loss(student, teacher, mean, std, gram, standardize, True)
        ctx.mark_non_differentiable(gradient)
        ctx.set_materialize_grads(False)  # no map of zeros for the second output
        ctx.gradient = gradient
        return loss, gradient

    @staticmethod
    def backward(ctx, grad_loss, _):
        refuse_second_derivative("channel_attention_loss")
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError(
                "channel_attention_loss gives its gradient away in the first backward pass, so there is no second one"
            )
        if not (type(grad_loss) is Tensor and grad_loss.device.type == "cpu" and grad_loss.item() == 1):
            gradient = _channel_attention_loss_backward(grad_loss, gradient)
        return gradient, None, None, None, None, None


def _autograd_loss(student, teacher, mean, std, gram, standardize, with_gradient):
    if student.requires_grad and torch.is_grad_enabled():
        return _ChannelAttentionLoss.apply(student, teacher, mean, std, gram, standardize)
    with torch._C._AutoDispatchBelowAutograd():
        return _channel_attention_loss(student, teacher, mean, std, gram, standardize, with_gradient)


def _autograd(student, teacher, standardize):
    if student.requires_grad and torch.is_grad_enabled():
        return _ChannelAttention.apply(student, teacher, standardize)
    with torch._C._AutoDispatchBelowAutograd():
        return _channel_attention(student, teacher, standardize)


library.impl("channel_attention", _autograd, "Autograd")
library.impl("channel_attention_loss", _autograd_loss, "Autograd")


def _product(student_shape, teacher_shape) -> int:
    """Of one batched product of size (C_s, H W, C_t)."""
    batch, channels, height, width = student_shape
    return 2 * batch * channels * height * width * teacher_shape[1]


@register_flop_formula(torch.ops.odn_fast.channel_attention)
def _flops(student_shape, teacher_shape, *args, out_shape=None, **kwargs) -> int:
    """As Q' K'^T and A K, PyTorch's two batched products."""
    return 2 * _product(student_shape, teacher_shape)


@register_flop_formula(torch.ops.odn_fast.channel_attention_backward)
def _flops_backward(grad_shape, student_shape, teacher_shape, *args, out_shape=None, **kwargs) -> int:
    """As PyTorch's two products for the gradients of A and Q'."""
    return 2 * _product(student_shape, teacher_shape)


@register_flop_formula(torch.ops.odn_fast.channel_attention_loss)
def _flops_loss(
    student_shape, teacher_shape, mean, std, gram, standardize, with_gradient, *args, out_shape=None, **kwargs
) -> int:
    """As PyTorch's two products, and the two of its backward pass where the gradient is written along."""
    return (4 if with_gradient else 2) * _product(student_shape, teacher_shape)


def _check_loss(student, teacher, mean, std, gram, *flags):
    reference.check("channel_attention_loss", student, teacher, reference.given_statistics(mean, std, gram))


def _check_backward(grad, student, teacher, standardize):
    reference.check("channel_attention_backward", student, teacher)
    reference.check_grad(grad, student)


for _name, _check in {
    "channel_attention_statistics": lambda teacher: reference.check_map("teacher_statistics", "teacher", teacher),
    "channel_attention": lambda student, teacher, _: reference.check("channel_attention", student, teacher),
    "channel_attention_backward": _check_backward,
    "channel_attention_loss": _check_loss,
    "channel_attention_loss_backward": reference.check_slope,
}.items():
    register_cuda(_name, [triton("channel_attention", _name)], _check)
