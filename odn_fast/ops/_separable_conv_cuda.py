"""The CUDA kernels of separable convolutions and units as implementations of their ops, and what they cannot take."""

import functools

import torch
from torch import Tensor

from odn_fast.ops._choose import cuda
from odn_fast.reference.separable_unit import STRIDES


def _why_not(
    maps: dict[str, Tensor | None], parameters: dict[str, Tensor | None], layers: list[tuple[int, Tensor, int]], kernels: str
) -> list[str]:
    """maps: x first. layers: pixels of x, pw and stride of each. kernels: the op that knows which channels they take."""
    x = maps["x"]
    if x.device.type != "cuda":
        return [f"tensors are on {x.device}, expected a CUDA device"]
    reasons = [
        f"{name} is {map.dtype}; the CUDA kernels take torch.bfloat16 maps"
        for name, map in maps.items()
        if map is not None and map.dtype != torch.bfloat16
    ]
    for name, parameter in parameters.items():
        if parameter is not None and parameter.dtype not in (torch.bfloat16, torch.float32):
            reasons.append(f"{name} is {parameter.dtype}; the CUDA kernels take torch.float32 and torch.bfloat16 parameters")
    for pixels, pw, stride in layers:
        outputs, inputs = pw.shape[:2]
        largest = pixels * max(inputs, outputs)
        if largest > 2**31 - 1:
            reasons.append(f"maps have up to {largest} elements; the CUDA kernels index at most {2**31 - 1}")
        if reason := _of_channels(kernels, x.device.index, inputs, outputs, stride):
            reasons.append(f"a layer has {inputs} channels and pw {outputs}: {reason}")
    return reasons


@functools.cache
def _of_channels(kernels: str, device: int, inputs: int, outputs: int, stride: int) -> str:
    with torch.cuda.device(device):
        return getattr(torch.ops.odn_fast, kernels)(inputs, outputs, stride)


FORWARD, BACKWARD = "separable_conv_cuda_why_not", "separable_conv_cuda_backward_why_not"


def _pixels(map: Tensor) -> int:
    return map.shape[0] * map.shape[2] * map.shape[3]


def _why_not_train(x, dw, pw, bn_weight, bn_bias, residual, stride, eps, relu):
    parameters = {"dw": dw, "pw": pw, "bn_weight": bn_weight, "bn_bias": bn_bias}
    return _why_not({"x": x, "residual": residual}, parameters, [(_pixels(x), pw, stride)], FORWARD)


def _why_not_infer(x, dw, dw_bias, pw, pw_bias, residual, stride, act_dw, act_pw):
    parameters = {"dw": dw, "dw_bias": dw_bias, "pw": pw, "pw_bias": pw_bias}
    return _why_not({"x": x, "residual": residual}, parameters, [(_pixels(x), pw, stride)], FORWARD)


def _why_not_train_backward(grad_y, x, dw, pw, bn_weight, bn_bias, y, z, z_mean, var, stride, eps, relu, x_needs_grad):
    maps = {"x": x, "grad_y": grad_y, "y": y, "z": z}
    parameters = {"dw": dw, "pw": pw, "bn_weight": bn_weight, "bn_bias": bn_bias}
    return _why_not(maps, parameters, [(_pixels(x), pw, stride)], BACKWARD)


def _of_unit(maps, first, second, skip, stride, kernels):
    if skip:
        return ["there is a skip with weights, which the CUDA kernels do not take"]
    first_stride, second_stride = STRIDES[stride]
    x = maps["x"]
    layers = [(_pixels(x), first[1], first_stride), (_pixels(x), second[1], second_stride)]
    names = [f"{name}[{index}]" for name in ("first", "second") for index in range(4)]
    return _why_not(maps, dict(zip(names, [*first, *second], strict=True)), layers, kernels)


def _why_not_unit_train(x, first, second, skip, identity, stride, eps):
    return _of_unit({"x": x}, first, second, skip, stride, FORWARD)


def _why_not_unit_train_backward(
    grad_y, x, first, second, skip, y, zs, z_means, vars, identity, stride, eps, x_needs_grad
):
    maps = {"x": x, "grad_y": grad_y, "y": y, **{f"zs[{index}]": z for index, z in enumerate(zs)}}
    return _of_unit(maps, first, second, skip, stride, BACKWARD)


train = cuda("separable_conv_train_cuda", _why_not_train)
train_backward = cuda("separable_conv_train_backward_cuda", _why_not_train_backward)
infer = cuda("separable_conv_infer_cuda", _why_not_infer)
unit_train = cuda("separable_unit_train_cuda", _why_not_unit_train)
unit_train_backward = cuda("separable_unit_train_backward_cuda", _why_not_unit_train_backward)
