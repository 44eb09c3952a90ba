"""Calls of every public op on CUDA tensors, as networks make them: maps of one dtype, parameters in float32."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import test_batch_norm_act
import test_separable_conv
import test_separable_conv_infer
import test_separable_unit
from cases import typical_sum
from odn_fast.ops import (
    augment,
    batch_norm_act,
    channel_attention,
    channel_attention_loss,
    exit_heads,
    separable_conv_infer,
    separable_conv_train,
    separable_unit_train,
    teacher_statistics,
)


DEVICE = "cuda"


@dataclass
class Case:
    """function(*tensors) gives tensors. The first is differentiated with respect to tensors[i] for i in `leaves`.

    plain: the same by PyTorch's own layers in the maps' dtype; relu=False leaves the last ReLU out. None for ops that
    compute in float32 whatever the maps are, where the reference is just that.
    """

    op: str  # the dispatcher op it ends in
    function: Callable[..., Sequence[Tensor]]
    tensors: list[Tensor]
    leaves: Sequence[int] = ()
    plain: Callable[..., Sequence[Tensor]] | None = None
    settings: tuple = ()  # what the dispatcher op takes after the tensors, where that depends on the case

    def run(
        self, function: Callable | None = None, tensors: Sequence[Tensor] | None = None, grad: Tensor | None = None
    ) -> list[Tensor]:
        """Results, and gradients of the first times `grad`."""
        tensors = [t.detach().requires_grad_(i in self.leaves) for i, t in enumerate(tensors or self.tensors)]
        results = (function or self.function)(*tensors)
        gradients = []
        if self.leaves:
            leaves = [tensors[index] for index in self.leaves]
            grad = slope(results[0]) if grad is None else grad.to(results[0].dtype)
            gradients = torch.autograd.grad(results[0], leaves, grad, retain_graph=False)
        return [result.detach() for result in results] + list(gradients)

    def in_float64(self) -> "Case":
        tensors = [t.double() if t.is_floating_point() else t for t in self.tensors]
        return replace(self, tensors=tensors)

    def sizes(self, results: list[Tensor], grad: Tensor | None) -> list[float]:
        """What rounding counts against in each of the float64 results and gradients: their norms.

        But a mean is a sum that may cancel, as is a parameter's gradient behind batch norm: there, the norm of
        deviations, and of typical partial sums.
        """
        sizes = [result.double().norm().item() for result in results]
        y, *statistics = results[: len(results) - len(self.leaves)]
        means = len(statistics) // 2
        if means and self.plain:
            variances = statistics[means:]
            for index, variance in enumerate(variances, 1):
                sizes[index] = max(sizes[index], variance.sqrt().norm().item())
            summand = typical_sum(grad, torch.cat(variances))
            for index, leaf in enumerate(self.leaves, len(results) - len(self.leaves)):
                tensor = self.tensors[leaf]
                if leaf > 0 and tensor.shape != y.shape:  # neither x nor a residual
                    sizes[index] = max(sizes[index], summand * tensor.numel() ** 0.5)
        return sizes


def slope(x: Tensor) -> Tensor:
    """A gradient that is the same in every dtype and different everywhere."""
    flat = torch.arange(x.numel(), device=x.device).remainder(13).sub(6).div(4).to(x.dtype)
    return flat.view([x.shape[i] for i in (0, 2, 3, 1)]).permute(0, 3, 1, 2) if x.dim() == 4 else flat.view(x.shape)


def _map(dtype, *shape):
    return torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)


def _separable(c_in, c_out):
    return [torch.randn(c_in, 1, 3, 3, device=DEVICE) / 3, torch.randn(c_out, c_in, 1, 1, device=DEVICE) / c_in**0.5, *_norm(c_out)]


def _norm(c):
    return [0.5 + torch.rand(c, device=DEVICE), torch.randn(c, device=DEVICE) / 2]


def separable_conv(dtype, n, c_in, c_out, size, stride=1):
    residual = _map(dtype, n, c_out, -(-size // stride), -(-size // stride))
    return Case(
        "separable_conv_train",
        lambda *tensors: separable_conv_train(*tensors, stride=stride),
        [_map(dtype, n, c_in, size, size), *_separable(c_in, c_out), residual],
        range(6),
        lambda *tensors, **settings: test_separable_conv.plain(*tensors, stride=stride, **settings),
    )


def separable_infer(dtype, n, c_in, c_out, size, stride=1):
    dw, pw, _, pw_bias = _separable(c_in, c_out)
    return Case(
        "separable_conv_infer",
        lambda *tensors: [separable_conv_infer(*tensors, stride=stride, act_dw="relu6")],
        [_map(dtype, n, c_in, size, size), dw, torch.randn(c_in, device=DEVICE), pw, pw_bias],
        plain=lambda *tensors: [test_separable_conv_infer.plain(*tensors, stride=stride, act_dw="relu6")],
    )


def unit(dtype, n, c_in, c_out, size, stride=1):
    identity = c_in == c_out and stride == 1

    def by(op):
        def function(*tensors, **settings):
            y, means, variances = op(*test_separable_unit.grouped(tensors), identity=identity, stride=stride, **settings)
            return [y, *means, *variances]

        return function

    x, first = _map(dtype, n, c_in, size, size), _separable(c_in, c_out)
    first[3] = test_separable_unit.zeros_in_gaps(x, first, min(stride, 2)).float()
    tensors = [x, *first, *_separable(c_out, c_out), *([] if identity else _separable(c_in, c_out)[1:])]
    plain = by(test_separable_unit.plain)
    return Case("separable_unit_train", by(separable_unit_train), tensors, range(len(tensors)), plain)


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
    return Case("batch_norm_act_train", batch_norm_act, tensors, range(len(tensors)), test_batch_norm_act.plain)


def augmented(dtype, n, c, size):
    """Cropped and flipped images of a set of 2 n."""
    images = torch.randint(256, (2 * n, c, size, size), dtype=torch.uint8, device=DEVICE)
    scale, shift = torch.rand(c, device=DEVICE) / 64, torch.randn(c, device=DEVICE)
    tensors = [images, torch.randint(2 * n, (n,), device=DEVICE), scale, shift, torch.tensor([7, 3], device=DEVICE)]
    settings = 4, True, dtype
    return Case("augment", lambda *tensors: [augment(*tensors, *settings)], tensors, settings=settings)


def heads(dtype, n, *maps):
    """maps: (channels, size) of every depth."""
    features = [_map(dtype, n, c, size, size).relu_() for c, size in maps]
    weights = [torch.randn(10, c, device=DEVICE) / c**0.5 for c, _ in maps]
    biases = [torch.randn(10, device=DEVICE) for _ in maps]
    depths = len(maps)

    def function(*tensors):
        lists = [list(tensors[start : start + depths]) for start in range(0, 3 * depths, depths)]
        return exit_heads(*lists, tensors[-1])

    tensors = [*features, *weights, *biases, torch.randint(10, (n,), device=DEVICE)]
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
    "augment": lambda dtype: augmented(dtype, 64, 3, 32),
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
