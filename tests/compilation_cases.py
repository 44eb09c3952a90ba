"""What test_kernel_compilation compiles: one function per op, named by its stem, calling its launchers.

Each takes the device of its tensors ("meta" where there is no GPU: then launches compile and run nothing) and
`everything`: all typical shapes in bfloat16 and float32, or only one set of channels in bfloat16 and one in float32, which
should compile in a few seconds. Forward and backward. Launchers are imported inside.
"""

import torch
from torch import Tensor


def feature_map(device: str, n: int, c: int, h: int, w: int, dtype: torch.dtype) -> Tensor:
    """A channels_last map without values."""
    return torch.empty(n, c, h, w, dtype=dtype, device=device, memory_format=torch.channels_last)


def exit_heads(device: str, everything: bool) -> None:
    from odn_fast.kernels.exit_heads import exit_heads, exit_heads_backward

    networks = {
        "ResNet-18 on 28x28, one exit": ([(64, 28)], 10),
        "ResNet-18 on 28x28": ([(64, 28)] * 2 + [(128, 14)] * 2 + [(256, 7)] * 2 + [(512, 4)] * 2, 10),
        "ResNet-101 on 32x32": ([(256, 32)] * 3 + [(512, 16)] * 4 + [(1024, 8)] * 23 + [(2048, 4)] * 3, 10),
        "100 classes": ([(512, 4)], 100),
        "1000 classes": ([(2048, 7)], 1000),
    }
    for name, (maps, classes) in networks.items():
        for dtype in (torch.bfloat16, torch.float32):
            if everything or name == "ResNet-18 on 28x28, one exit":
                features = [feature_map(device, 128, c, size, size, dtype) for c, size in maps]
                weights = [torch.empty(classes, c, device=device) for c, _ in maps]
                biases = [torch.empty(classes, device=device) for _ in maps]
                target = torch.zeros(128, dtype=torch.int64, device=device)
                losses, _, pooled, gradients = exit_heads(features, weights, biases, target)
                exit_heads_backward(losses, pooled, gradients, weights, [size * size for _, size in maps], dtype)


def augment(device: str, everything: bool) -> None:
    from odn_fast.kernels.augment import augment

    for channels, size in [(3, 32), (1, 28), (3, 33)] if everything else [(3, 32)]:
        images = torch.zeros(200, channels, size, size, dtype=torch.uint8, device=device)
        index = torch.zeros(128, dtype=torch.int64, device=device)
        scale, key = torch.ones(channels, device=device), torch.zeros(2, dtype=torch.int64, device=device)
        for dtype in (torch.bfloat16, torch.float32):
            augment(images, index, scale, scale, key, 4, True, dtype)
            augment(images, index, scale, scale, None, 0, False, dtype)


def batch_norm_act(device: str, everything: bool) -> None:
    from odn_fast.kernels.batch_norm_act import batch_norm_act_train, batch_norm_act_train_backward

    resnet18, resnet50 = [(64, 28), (128, 14), (256, 7), (512, 4)], [(64, 32), (256, 32), (512, 16), (1024, 8), (2048, 4)]
    odd = [(20, 9)]
    for channels, size in [*resnet18, *resnet50, *odd] if everything else resnet18[:1]:
        for dtype in (torch.bfloat16, torch.float32):
            x = feature_map(device, 128, channels, size, size, dtype)
            vector = torch.empty(channels, device=device)
            for residual in (None, x):
                y, mean, var = batch_norm_act_train(x, vector, vector, residual, 1e-5, True)
                saved = None if residual is None else y
                batch_norm_act_train_backward(y, x, vector, vector, saved, mean, var, 1e-5, True, True)


# C_in, C_out, size, stride
SEPARABLE = [(16, 16, 32, 1), (64, 64, 8, 1), (32, 32, 16, 1), (16, 32, 32, 2), (32, 64, 112, 1), (128, 128, 28, 1)]


def separable_parameters(device: str, c_in: int, c_out: int, turned: bool = False) -> list[Tensor]:
    """dw, pw, bn_weight, bn_bias; dw as layers have it, or turned, with taps by channels in memory."""
    dw = torch.empty(c_in, 1, 3, 3, device=device)
    dw = torch.empty(3, 3, c_in, device=device).permute(2, 0, 1).unsqueeze(1) if turned else dw
    return [dw, *(torch.empty(shape, device=device) for shape in ((c_out, c_in, 1, 1), (c_out,), (c_out,)))]


def separable_conv(device: str, everything: bool) -> None:
    from odn_fast.kernels.separable_conv import separable_conv_train
    from odn_fast.kernels.separable_conv_backward import separable_conv_train_backward
    from odn_fast.kernels.separable_conv_infer import separable_conv_infer

    for c_in, c_out, size, stride in SEPARABLE if everything else SEPARABLE[1:2]:
        for dtype in (torch.bfloat16, torch.float32):
            x = feature_map(device, 128 if size < 112 else 1, c_in, size, size, dtype)
            dw, pw, *norm = separable_parameters(device, c_in, c_out)
            y, _, var, z, z_mean = separable_conv_train(x, dw, pw, *norm, None, stride, 1e-5, True)
            for saved, x_needs_grad in ((None, True), (y, False)):
                arguments = (y, x, dw, pw, *norm, saved, z, z_mean, var, stride, 1e-5, True, x_needs_grad)
                separable_conv_train_backward(*arguments)
            separable_conv_train(x, dw, pw, *norm, z, stride, 1e-5, True)
            separable_conv_infer(x, dw, None, pw, norm[1], None, stride, "none", "relu")


def separable_unit(device: str, everything: bool) -> None:
    from odn_fast.kernels.separable_unit import separable_unit_train, separable_unit_train_backward

    units = [(16, 16, 32, "identity", 1), (64, 64, 8, "identity", 1), (32, 32, 16, "identity", 1),
             (16, 32, 32, "projection", 2), (32, 64, 16, "projection", 4), (16, 32, 32, "none", 1)]  # fmt: skip
    for c_in, c_out, size, skip, stride in units if everything else units[3:4]:
        for dtype in (torch.bfloat16, torch.float32):
            x = feature_map(device, 128, c_in, size, size, dtype)
            first, second = separable_parameters(device, c_in, c_out), separable_parameters(device, c_out, c_out, turned=True)
            projection = first[1:] if skip == "projection" else []
            inputs, settings = (x, first, second, projection), (skip == "identity", stride, 1e-5)
            y, _, variances, zs, z_means = separable_unit_train(*inputs, *settings)
            separable_unit_train_backward(y, *inputs, y, zs, z_means, variances, *settings, True)


def channel_attention(device: str, everything: bool) -> None:
    from odn_fast.kernels import channel_attention as kernels

    sizes = [(16, 64, 8), (16, 16, 32), (32, 32, 16), (64, 64, 8), (256, 512, 14), (17, 3, 9)]
    for student_channels, teacher_channels, size in sizes if everything else sizes[:1]:
        for dtype in (torch.bfloat16, torch.float32):
            student = feature_map(device, 128, student_channels, size, size, dtype)
            teacher = feature_map(device, 128, teacher_channels, size, size, dtype)
            projected = kernels.channel_attention(student, teacher, True)
            kernels.channel_attention_backward(projected, student, teacher, True)
            for statistics in ((None, None, None), kernels.channel_attention_statistics(teacher)):
                loss, gradient = kernels.channel_attention_loss(student, teacher, *statistics, True, True)
                kernels.channel_attention_loss_backward(loss, gradient)


# Functions (device, everything) -> None.
CASES = [augment, batch_norm_act, channel_attention, exit_heads, separable_conv, separable_unit]
