"""CIFAR-style ResNets (He et al., 2016): 3x3 stem of stride 1, no max-pool, one exit head per residual block."""

from torch import Tensor, nn

from ..nn import norm_act
from .depth_network import DepthNetwork


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm; the input is added before the last ReLU. (N, C_in, H, W) -> (N, C, H/s, W/s)."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)
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
