"""Modules that hold parameters in torch.nn layers and compute with the fused ops.

Parameters, buffers, state-dict keys and initialisation are those of the torch.nn layers inside; forward hooks on those
layers do not run, because the fused ops take their tensors. `norm_act` alone leaves layers with hooks to PyTorch.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from odn_fast import _extension
from odn_fast.ops import (
    TeacherStatistics,
    batch_norm_act,
    channel_attention_loss,
    separable_conv_infer,
    separable_conv_train,
    separable_unit_train,
)
from odn_fast.reference.batch_norm_act import FLOATING
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


def norm_act(
    norm: nn.BatchNorm2d,
    x: Tensor,
    relu: nn.ReLU | Callable[[Tensor], Tensor] | None = None,
    residual: Callable[[], Tensor] | None = None,
) -> Tensor:
    """relu(norm(x) + residual()): in training one fused op where it is the faster, otherwise the modules themselves.

    x: (N, C, H, W); relu: an `nn.ReLU` or `F.relu`, None for none; residual: gives what is added, of x's shape. It is a
    function, since `torch.fx` is to record the batch norm before the shortcut, in the order of the plain network.

    Running statistics become those that `norm` would leave. Gradients can be taken once where the op runs. Recorded by
    `torch.fx`, this is the plain modules.
    """
    if _fuses(norm, x, relu):
        added = None if residual is None else residual()
        y, mean, var = batch_norm_act(x, norm.weight, norm.bias, added, norm.eps, relu is not None)
        update_running_statistics(norm, mean, var, x.numel() // x.shape[1])
        return y
    y = norm(x)
    if residual is not None:
        y = y + residual()
    return y if relu is None else relu(y)


def _fuses(norm: nn.Module, x: Tensor, relu: nn.Module | Callable | None) -> bool:
    """Whether the op does what the modules would, and has a kernel that is faster.

    It is on the CPU, too: a whole training step of ResNet-18 (1x28x28, batch 128) takes plain modules 1.08 (depth 2) and
    1.01 (depth 8) times as much processor time in float32, 1.18 and 1.03 times in bfloat16.
    """
    if isinstance(x, fx.Proxy) or not (x.is_cuda or x.is_cpu and _extension.available) or x.dtype not in FLOATING:
        return False
    if type(norm) is not nn.BatchNorm2d or not (norm.affine and uses_batch_statistics(norm)) or _hooked(norm):
        return False
    return relu is None or relu is F.relu or type(relu) is nn.ReLU and not _hooked(relu)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def uses_batch_statistics(bn: nn.BatchNorm2d) -> bool:
    return bn.training or bn.running_mean is None


def needs_gradient(module: nn.Module, *inputs: Tensor | None) -> bool:
    tensors = (*inputs, *module.parameters())
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def update_running_statistics(bn: nn.BatchNorm2d, mean: Tensor, var: Tensor, values: int) -> None:
    """Do what `bn` does after a training batch with `values` values per channel; nothing if there are none.

    mean, var: (C,), of the batch, var biased. Inside `deferred_statistics` it is done on leaving that.
    """
    if not (bn.training and bn.track_running_stats and values):
        return
    seen = _Seen(bn.running_mean, bn.running_var, bn.num_batches_tracked, bn.momentum, mean, var, values)
    if torch.compiler.is_compiling() or _deferred.seen is None:
        _update_all([seen])
    else:
        _deferred.seen.append(seen)


@contextmanager
def deferred_statistics() -> Iterator[None]:
    """Inside, running statistics of fused layers are only noted; on leaving, all become what they would have been, to the
    bit, in a few launches for all layers instead of a few for each.

    It holds for the thread that entered it. A block within another is part of it. Where the block raises, the statistics
    stay as they were before it.
    """
    if _deferred.seen is not None:
        yield
        return
    _deferred.seen = []
    try:
        yield
        waiting = _deferred.seen
    finally:
        _deferred.seen = None
    while waiting:  # a layer that ran twice has its second turn after the others' first: launches have no order inside
        turn = {id(seen.running_mean): seen for seen in reversed(waiting)}
        waiting = [seen for seen in waiting if turn[id(seen.running_mean)] is not seen]
        groups = defaultdict(list)
        for seen in turn.values():
            groups[seen.running_mean.device, seen.running_mean.dtype, seen.var.dtype].append(seen)
        for group in groups.values():
            _update_all(group)


class _Seen(NamedTuple):
    """A batch norm's buffers and momentum, and the batch it has seen: mean and biased variance of `values` values."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float | None
    mean: Tensor
    var: Tensor
    values: int


class _Deferred(threading.local):
    seen: list[_Seen] | None = None  # None outside of `deferred_statistics`


_deferred = _Deferred()


@torch.no_grad()
def _update_all(batches: list[_Seen]) -> None:
    """Update different layers, all of one device and one dtype, in three launches and what more their number asks for."""
    torch._foreach_add_([seen.num_batches_tracked for seen in batches], 1)
    factors = [1 / float(seen.num_batches_tracked) if seen.momentum is None else seen.momentum for seen in batches]
    unbiased = torch._foreach_mul([seen.var for seen in batches], [seen.values / (seen.values - 1) for seen in batches])
    running = [seen.running_mean for seen in batches] + [seen.running_var for seen in batches]
    new = [tensor.to(running[0].dtype) for tensor in ([seen.mean for seen in batches] + list(unbiased))]
    torch._foreach_lerp_(running, new, factors * 2)


def folded(weight: Tensor, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """A pointwise weight (C_out, C_in, 1, 1) and a bias (C_out,) with the batch norm after it, in at least float32."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    scale = bn.weight.to(dtype) * torch.rsqrt(bn.running_var.to(dtype) + bn.eps)
    return weight.to(dtype) * scale[:, None, None, None], bn.bias.to(dtype) - bn.running_mean.to(dtype) * scale
