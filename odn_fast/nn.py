"""Modules that hold parameters in torch.nn layers and compute with the fused ops.

Parameters, buffers, state-dict keys and initialisation are those of the torch.nn layers inside; forward hooks on those
layers do not run, because the fused ops take their tensors.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odn_fast.ops import (
    TeacherStatistics,
    channel_attention_loss,
    separable_conv_infer,
    separable_conv_train,
    separable_unit_train,
)
from odn_fast.reference.separable_unit import STRIDES

SKIPS = ("auto", "always", "none")


class SeparableConvBNReLU(nn.Module):
    """relu(bn(pointwise(depthwise(x))) + residual): depthwise 3x3 with padding 1, pointwise 1x1, batch norm.

    Args:
        in_channels, out_channels: C_in and C_out.
        stride: 1 or 2, of the depthwise convolution.
        relu: False leaves the ReLU out.
        eps, momentum: of the batch norm, as `torch.nn.BatchNorm2d` takes them.

    Submodules `depthwise`, `pointwise` (`nn.Conv2d` without bias) and `bn` (`nn.BatchNorm2d`) hold the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        relu: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ):
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"SeparableConvBNReLU: stride is {stride}, expected 1 or 2")
        self.stride, self.relu = stride, relu
        self.depthwise = nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: (N, C_in, H, W); residual: (N, C_out, H_out, W_out) or None; returns (N, C_out, H_out, W_out).

        Raises ValueError on shapes and dtypes that do not fit, and in training where a channel has only one value.
        """
        dw, pw = self.depthwise.weight, self.pointwise.weight
        if uses_batch_statistics(self.bn):
            y, mean, var = separable_conv_train(
                x, dw, pw, self.bn.weight, self.bn.bias, residual, self.stride, self.bn.eps, self.relu
            )
            update_running_statistics(self.bn, mean, var, y.numel() // y.shape[1])
            return y
        if needs_gradient(self, x, residual):
            y = self.bn(self.pointwise(self.depthwise(x)))
            y = y if residual is None else y + residual
            return y.relu() if self.relu else y
        pw, bias = folded(pw, self.bn)
        return separable_conv_infer(x, dw, None, pw, bias, residual, self.stride, "none", "relu" if self.relu else "none")

    def extra_repr(self) -> str:
        return f"relu={self.relu}"


class ResidualSeparableUnit(nn.Module):
    """relu(second(relu(first(x))) + s): two separable convolutions with batch norm, and a skip connection s.

    Args:
        in_channels, out_channels: C_in and C_out; channels change in the first pointwise convolution.
        stride: 1; 2, in the first depthwise convolution; 4, 2 in both; or a multiple of 4, whose quotient by 4 an
            average pool takes before the unit. Sizes are rounded up.
        skip: "auto" for s = x where the shape holds, else the average pool of x by the stride, 1x1 convolution and
            batch norm; "always" for the latter everywhere; "none" for no s.

    Submodules `first` and `second` are `SeparableConvBNReLU`; `skip` holds `pointwise` and `bn`, or is None.

    Raises ValueError for any other stride or skip.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, skip: str = "auto"):
        super().__init__()
        if stride not in STRIDES and (stride < 4 or stride % 4):
            raise ValueError(f"ResidualSeparableUnit: stride is {stride}, expected 1, 2 or a multiple of 4")
        if skip not in SKIPS:
            raise ValueError(f"ResidualSeparableUnit: skip is {skip!r}, expected one of {', '.join(SKIPS)}")
        self.pool, self.stride = (stride // 4, 4) if stride > 4 else (1, stride)
        self.identity = skip == "auto" and stride == 1 and in_channels == out_channels
        first, second = STRIDES[self.stride]
        self.first = SeparableConvBNReLU(in_channels, out_channels, first)
        self.second = SeparableConvBNReLU(out_channels, out_channels, second)
        self.skip = None
        if skip != "none" and not self.identity:
            pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
            self.skip = nn.ModuleDict({"pointwise": pointwise, "bn": nn.BatchNorm2d(out_channels)})

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C_in, H, W); returns (N, C_out, ceil(H / stride), ceil(W / stride)).

        Raises ValueError on shapes and dtypes that do not fit, and in training where a channel has only one value.
        """
        if self.pool > 1:
            x = F.avg_pool2d(x, self.pool, ceil_mode=True)
        norms = [self.first.bn, self.second.bn, *([self.skip["bn"]] if self.skip else [])]
        if not (all(map(uses_batch_statistics, norms)) and len({norm.eps for norm in norms}) == 1):
            return self.second(self.first(x), self._skip(x))
        first, second = (
            [part.depthwise.weight, part.pointwise.weight, part.bn.weight, part.bn.bias]
            for part in (self.first, self.second)
        )
        skip = [self.skip["pointwise"].weight, self.skip["bn"].weight, self.skip["bn"].bias] if self.skip else []
        y, means, variances = separable_unit_train(x, first, second, skip, self.identity, self.stride, norms[0].eps)
        values = y.numel() // y.shape[1]
        between = x.shape[0] * -(-x.shape[2] // self.first.stride) * -(-x.shape[3] // self.first.stride)
        for norm, mean, var, count in zip(norms, means, variances, (between, values, values), strict=False):
            update_running_statistics(norm, mean, var, count)
        return y

    def _skip(self, x: Tensor) -> Tensor | None:
        """What is added before the last ReLU."""
        if self.skip is None:
            return x if self.identity else None
        x = F.avg_pool2d(x, self.stride, ceil_mode=True) if self.stride > 1 else x
        pointwise, bn = self.skip["pointwise"], self.skip["bn"]
        if uses_batch_statistics(bn) or needs_gradient(self.skip, x):
            return bn(pointwise(x))
        weight, bias = folded(pointwise.weight, bn)
        return F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype))

    def extra_repr(self) -> str:
        return f"stride={self.pool * self.stride}, identity={self.identity}"


class ChannelAttentionLoss(nn.Module):
    """Mean squared difference between a student's map and its channel-attention projection of a teacher's.

    The inner loss R of SEArch (Eq. 1 and 2), as `odn_fast.ops.channel_attention_loss` defines it.

    Args:
        standardize: False takes Eq. 1 literally, which shrinks the student towards a map of zeros.
    """

    def __init__(self, standardize: bool = True):
        super().__init__()
        self.standardize = standardize

    def forward(self, student: Tensor, teacher: Tensor, statistics: TeacherStatistics | None = None) -> Tensor:
        """student: (N, C_s, H, W); teacher: (N, C_t, H', W'), without gradient; statistics: `teacher_statistics` of the
        teacher, which spares computing them again. Returns a scalar.

        Raises ValueError on shapes and dtypes that do not fit.
        """
        return channel_attention_loss(student, teacher, statistics=statistics, standardize=self.standardize)

    def extra_repr(self) -> str:
        return f"standardize={self.standardize}"


def uses_batch_statistics(bn: nn.BatchNorm2d) -> bool:
    return bn.training or bn.running_mean is None


def needs_gradient(module: nn.Module, *inputs: Tensor | None) -> bool:
    tensors = (*inputs, *module.parameters())
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


@torch.no_grad()
def update_running_statistics(bn: nn.BatchNorm2d, mean: Tensor, var: Tensor, values: int) -> None:
    """Do what `bn` does after a training batch with `values` values per channel; nothing if there are none.

    mean, var: (C,), of the batch, var biased.
    """
    if not (bn.training and bn.track_running_stats and values):
        return
    bn.num_batches_tracked.add_(1)
    factor = 1 / float(bn.num_batches_tracked) if bn.momentum is None else bn.momentum
    unbiased = var * (values / (values - 1))
    for running, batch in ((bn.running_mean, mean), (bn.running_var, unbiased)):
        running.lerp_(batch.to(running.dtype), factor)


def folded(weight: Tensor, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """A pointwise weight (C_out, C_in, 1, 1) and a bias (C_out,) with the batch norm after it, in at least float32."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    scale = bn.weight.to(dtype) * torch.rsqrt(bn.running_var.to(dtype) + bn.eps)
    return weight.to(dtype) * scale[:, None, None, None], bn.bias.to(dtype) - bn.running_mean.to(dtype) * scale
