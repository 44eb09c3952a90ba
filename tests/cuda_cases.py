"""Calls of every public op on CUDA tensors, as networks make them: maps of one dtype, parameters in float32."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from odn_fast.ops import (
    batch_norm_act,
    channel_attention,
    channel_attention_loss,
    exit_heads,
    separable_conv_infer,
    separable_conv_train,
    separable_unit_train,
    teacher_statistics,
)


@dataclass
class Case:
    """function(*tensors) gives tensors. The first is differentiated with respect to tensors[i] for i in `leaves`."""

    op: str  # the dispatcher op it ends in
    function: Callable[..., Sequence[Tensor]]
    tensors: list[Tensor]
    leaves: Sequence[int] = ()

    def run(self, function: Callable | None = None, tensors: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Results and gradients."""
        tensors = [t.detach().requires_grad_(i in self.leaves) for i, t in enumerate(tensors or self.tensors)]
        results = (function or self.function)(*tensors)
        gradients = []
        if self.leaves:
            leaves = [tensors[index] for index in self.leaves]
            gradients = torch.autograd.grad(results[0], leaves, slope(results[0]), retain_graph=False)
        return [result.detach() for result in results] + list(gradients)

    def in_float64(self) -> "Case":
        tensors = [t.double() if t.is_floating_point() else t for t in self.tensors]
        return Case(self.op, self.function, tensors, self.leaves)


def slope(x: Tensor) -> Tensor:
    """A gradient that is the same in every dtype and different everywhere."""
    flat = torch.arange(x.numel(), device=x.device).remainder(13).sub(6).div(4).to(x.dtype)
    return flat.view([x.shape[i] for i in (0, 2, 3, 1)]).permute(0, 3, 1, 2) if x.dim() == 4 else flat.view(x.shape)


def _map(dtype, *shape):
    return torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)


def _separable(c_in, c_out):
    return [torch.randn(c_in, 1, 3, 3, device="cuda") / 3, torch.randn(c_out, c_in, 1, 1, device="cuda") / c_in**0.5, *_norm(c_out)]


def _norm(c):
    return [0.5 + torch.rand(c, device="cuda"), torch.randn(c, device="cuda") / 2]


def separable_conv(dtype, n, c_in, c_out, size, stride=1):
    residual = _map(dtype, n, c_out, -(-size // stride), -(-size // stride))
    return Case(
        "separable_conv_train",
        lambda *tensors: separable_conv_train(*tensors, stride=stride),
        [_map(dtype, n, c_in, size, size), *_separable(c_in, c_out), residual],
        range(6),
    )


def separable_infer(dtype, n, c_in, c_out, size, stride=1):
    dw, pw, _, pw_bias = _separable(c_in, c_out)
    return Case(
        "separable_conv_infer",
        lambda *tensors: [separable_conv_infer(*tensors, stride=stride, act_dw="relu6")],
        [_map(dtype, n, c_in, size, size), dw, torch.randn(c_in, device="cuda"), pw, pw_bias],
    )


def unit(dtype, n, c_in, c_out, size, stride=1):
    identity = c_in == c_out and stride == 1

    def function(x, *parameters):
        y, means, variances = separable_unit_train(
            x, parameters[:4], parameters[4:8], parameters[8:], identity=identity, stride=stride
        )
        return [y, *means, *variances]

    tensors = [_map(dtype, n, c_in, size, size), *_separable(c_in, c_out), *_separable(c_out, c_out)]
    tensors += [] if identity else _separable(c_in, c_out)[1:]
    return Case("separable_unit_train", function, tensors, range(len(tensors)))


def attention(dtype, n, c_student, c_teacher, size):
    maps = [_map(dtype, n, c, size, size).relu_() for c in (c_student, c_teacher)]
    return Case("channel_attention", lambda *maps: [channel_attention(*maps)], maps, [0])


def attention_loss(dtype, n, c_student, c_teacher, size):
    maps = attention(dtype, n, c_student, c_teacher, size).tensors
    return Case("channel_attention_loss", lambda *maps: [channel_attention_loss(*maps)], maps, [0])


def attention_loss_cached(dtype, n, c_student, c_teacher, size):
    maps = attention(dtype, n, c_student, c_teacher, size).tensors

    def function(student, teacher):
        return [channel_attention_loss(student, teacher, statistics=teacher_statistics(teacher))]

    return Case("channel_attention_loss", function, maps, [0])


def batch_norm(dtype, n, c, size, residual=True):
    maps = [_map(dtype, n, c, size, size) for _ in range(2 if residual else 1)]
    tensors = [maps[0], *_norm(c), *maps[1:]]
    return Case("batch_norm_act_train", batch_norm_act, tensors, range(len(tensors)))


def heads(dtype, n, *maps):
    """maps: (channels, size) of every depth."""
    features = [_map(dtype, n, c, size, size).relu_() for c, size in maps]
    weights = [torch.randn(10, c, device="cuda") / c**0.5 for c, _ in maps]
    biases = [torch.randn(10, device="cuda") for _ in maps]
    depths = len(maps)

    def function(*tensors):
        lists = [list(tensors[start : start + depths]) for start in range(0, 3 * depths, depths)]
        return exit_heads(*lists, tensors[-1])

    tensors = [*features, *weights, *biases, torch.randint(10, (n,), device="cuda")]
    return Case("exit_heads", function, tensors, range(3 * depths))


# Many programs a launch, small enough to be repeated; every public op.
CASES = {
    "separable_conv": lambda dtype: separable_conv(dtype, 64, 32, 32, 16),
    "separable_conv_stride_2": lambda dtype: separable_conv(dtype, 64, 16, 32, 17, 2),
    "separable_infer": lambda dtype: separable_infer(dtype, 64, 32, 64, 16),
    "unit_identity": lambda dtype: unit(dtype, 64, 16, 16, 16),
    "unit_projection": lambda dtype: unit(dtype, 64, 16, 32, 16, 2),
    "attention": lambda dtype: attention(dtype, 64, 32, 32, 16),
    "attention_loss": lambda dtype: attention_loss(dtype, 64, 16, 32, 16),
    "attention_loss_cached": lambda dtype: attention_loss_cached(dtype, 64, 32, 64, 8),
    "batch_norm": lambda dtype: batch_norm(dtype, 64, 64, 16),
    "batch_norm_alone": lambda dtype: batch_norm(dtype, 64, 96, 7, residual=False),
    "exit_heads": lambda dtype: heads(dtype, 64, (64, 16), (128, 8), (256, 4)),
}

TYPICAL = {
    "conv 16 32x32": lambda dtype: separable_conv(dtype, 128, 16, 16, 32),
    "conv 32 16x16": lambda dtype: separable_conv(dtype, 128, 32, 32, 16),
    "conv 64 8x8": lambda dtype: separable_conv(dtype, 128, 64, 64, 8),
    "conv 64 32x32": lambda dtype: separable_conv(dtype, 128, 64, 64, 32),
    "conv 16 to 32 stride 2": lambda dtype: separable_conv(dtype, 128, 16, 32, 32, 2),
    "conv 128 28x28": lambda dtype: separable_conv(dtype, 32, 128, 128, 28),
    "conv 32 to 64 112x112": lambda dtype: separable_conv(dtype, 1, 32, 64, 112),
    "infer 64 32x32": lambda dtype: separable_infer(dtype, 128, 64, 64, 32),
    "infer 128 28x28": lambda dtype: separable_infer(dtype, 32, 128, 128, 28),
    "unit 16 32x32": lambda dtype: unit(dtype, 128, 16, 16, 32),
    "unit 32 16x16": lambda dtype: unit(dtype, 128, 32, 32, 16),
    "unit 64 8x8": lambda dtype: unit(dtype, 128, 64, 64, 8),
    "unit 32 to 64 stride 2": lambda dtype: unit(dtype, 128, 32, 64, 16, 2),
    "attention 16 16 32x32": lambda dtype: attention(dtype, 128, 16, 16, 32),
    "loss 16 16 32x32": lambda dtype: attention_loss(dtype, 128, 16, 16, 32),
    "loss 32 32 16x16": lambda dtype: attention_loss(dtype, 128, 32, 32, 16),
    "loss 64 64 8x8": lambda dtype: attention_loss(dtype, 128, 64, 64, 8),
    "loss 16 64 8x8": lambda dtype: attention_loss(dtype, 128, 16, 64, 8),
    "loss 256 512 14x14": lambda dtype: attention_loss(dtype, 32, 256, 512, 14),
    "cached 64 64 8x8": lambda dtype: attention_loss_cached(dtype, 128, 64, 64, 8),
    "norm 64 28x28": lambda dtype: batch_norm(dtype, 128, 64, 28),
    "norm 128 14x14": lambda dtype: batch_norm(dtype, 128, 128, 14, residual=False),
    "norm 512 4x4": lambda dtype: batch_norm(dtype, 128, 512, 4),
    "norm 2048 4x4": lambda dtype: batch_norm(dtype, 128, 2048, 4),
    "heads of ResNet-18": lambda dtype: heads(dtype, 128, (64, 28), (64, 28), (128, 14), (128, 14), (256, 7), (256, 7), (512, 4), (512, 4)),
}
