"""The separable convolution's CUDA kernels as implementations of its ops, and what they cannot take."""

import functools

import torch
from torch import Tensor

from odn_fast.ops._choose import cuda


def _why_not(x: Tensor, pw: Tensor, stride: int, parameters: dict[str, Tensor | None], residual: Tensor | None) -> list[str]:
    if x.device.type != "cuda":
        return [f"tensors are on {x.device}, expected a CUDA device"]
    reasons = [
        f"{name} is {map.dtype}; the CUDA kernels take torch.bfloat16 maps"
        for name, map in (("x", x), ("residual", residual))
        if map is not None and map.dtype != torch.bfloat16
    ]
    for name, parameter in parameters.items():
        if parameter is not None and parameter.dtype not in (torch.bfloat16, torch.float32):
            reasons.append(f"{name} is {parameter.dtype}; the CUDA kernels take torch.float32 and torch.bfloat16 parameters")
    outputs = x.shape[0] * -(-x.shape[2] // stride) * -(-x.shape[3] // stride) * pw.shape[0]
    if max(x.numel(), outputs) > 2**31 - 1:
        reasons.append(f"maps have up to {max(x.numel(), outputs)} elements; the CUDA kernels index at most {2**31 - 1}")
    reason = _of_channels(x.device.index, x.shape[1], pw.shape[0], stride)
    return reasons + [f"x has {x.shape[1]} channels and pw {pw.shape[0]}: {reason}"] if reason else reasons


@functools.cache
def _of_channels(device: int, inputs: int, outputs: int, stride: int) -> str:
    with torch.cuda.device(device):
        return torch.ops.odn_fast.separable_conv_cuda_why_not(inputs, outputs, stride)


def _why_not_train(x, dw, pw, bn_weight, bn_bias, residual, stride, eps, relu):
    return _why_not(x, pw, stride, {"dw": dw, "pw": pw, "bn_weight": bn_weight, "bn_bias": bn_bias}, residual)


def _why_not_infer(x, dw, dw_bias, pw, pw_bias, residual, stride, act_dw, act_pw):
    return _why_not(x, pw, stride, {"dw": dw, "dw_bias": dw_bias, "pw": pw, "pw_bias": pw_bias}, residual)


train = cuda("separable_conv_train_cuda", _why_not_train)
infer = cuda("separable_conv_infer_cuda", _why_not_infer)
