"""ResNets (He et al., 2016). Those to search in are for small images (3x3 stem of stride 1, no max-pool), with an exit head per
block; the others are teachers."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import norm_act
from .depth_network import DepthNetwork

CIFAR_DEPTHS = (20, 32, 44, 56, 110)  # 6 n + 2


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm; the input is added before the last ReLU. (N, C_in, H, W) -> (N, C, H/s, W/s).

    shortcut: brings the input to the output's shape; by default a 1x1 convolution with batch norm, where that takes anything.
    """

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: nn.Module | None = None):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride) if shortcut is None else shortcut
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = norm_act(self.bn1, self.conv1(x), self.relu)
        return norm_act(self.bn2, self.conv2(y), self.relu, lambda: self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with batch norm; the output has four times `channels`."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = norm_act(self.bn1, self.conv1(x), self.relu)
        y = norm_act(self.bn2, self.conv2(y), self.relu)
        return norm_act(self.bn3, self.conv3(y), self.relu, lambda: self.shortcut(x))


class ConvNormAct(nn.Sequential):
    """A convolution, its batch norm and, where there is a third module, its ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        conv, norm, *relu = self
        return norm_act(norm, conv(x), *relu)


def resnet(block: type, blocks_per_stage: list[int], in_channels: int, num_classes: int) -> DepthNetwork:
    """A ResNet with stages of 64, 128, 256, 512 channels; every stage but the first begins with stride 2."""
    stem = ConvNormAct(nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True))
    blocks, widths, width = [], [], 64
    for stage, count in enumerate(blocks_per_stage):
        for position in range(count):
            stride = 2 if stage > 0 and position == 0 else 1
            blocks.append(block(width, 64 << stage, stride))
            width = (64 << stage) * block.expansion
            widths.append(width)
    return DepthNetwork(stem, blocks, widths, num_classes)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return ConvNormAct(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class CifarResNet(nn.Module):
    """ResNet of depth 6 n + 2 for 32x32 images (section 4.2) with shortcuts without parameters (option A).

    Three stages of n basic blocks with 16, 32 and 64 channels; submodules are named as in the public checkpoints of
    akamaster/pytorch_resnet_cifar10. Initialised from PyTorch's global generator. Raises ValueError for a depth that is not
    in `CIFAR_DEPTHS`.
    """

    def __init__(self, depth: int, classes: int, in_channels: int = 3):
        super().__init__()
        if depth not in CIFAR_DEPTHS:
            raise ValueError(f"teacher: depth is {depth}, expected one of {', '.join(map(str, CIFAR_DEPTHS))}")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks = (depth - 2) // 6
        self.layer1 = nn.Sequential(*(BasicBlock(16, 16, 1) for _ in range(blocks)))
        self.layer2, self.layer3 = (
            nn.Sequential(BasicBlock(half, 2 * half, 2, _PaddedShortcut(half // 2)),
                          *(BasicBlock(2 * half, 2 * half, 1) for _ in range(blocks - 1)))
            for half in (16, 32))
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = norm_act(self.bn1, self.conv1(x), F.relu)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class ImageNetResNet50(nn.Module):
    """ResNet-50 for 224x224 images (table 1), its stride in the 3x3 convolution of a block. Drawn as PyTorch draws layers.

    A teacher by its structure: `models.teachers.teacher_of` takes the outputs of its 16 blocks as maps.
    """

    def __init__(self, classes: int = 1000, in_channels: int = 3):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        width, stages = 64, []
        for channels, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            whole = channels * Bottleneck.expansion
            stages.append(nn.Sequential(Bottleneck(width, channels, stride),
                                        *(Bottleneck(whole, channels, 1) for _ in range(blocks - 1))))
            width = whole
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.linear = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(norm_act(self.bn1, self.conv1(x), self.relu))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(x.mean((2, 3)))


class _PaddedShortcut(nn.Module):
    """Every second pixel, with `added` channels of zeros before and after its own."""

    def __init__(self, added: int):
        super().__init__()
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added, self.added))
