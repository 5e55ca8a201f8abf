"""CIFAR ResNets of depth 6n + 2, with parameter-free shortcuts (padding) or with 1x1 projections.

Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv:1512.03385, section 4.2; the padding
shortcut is its option A, the projection its option B.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from metaprune.errors import ConfigError
from metaprune.zoo._base import MODELS, ZooModel, init_convolutions, random_values


class PadShortcut(nn.Module):
    """Takes every `stride`-th pixel and adds channels of zeros before and after those that are there."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.pad_front = (out_channels - in_channels) // 2
        self.pad_back = out_channels - in_channels - self.pad_front

    def forward(self, x: Tensor) -> Tensor:
        """(n, in, h, w) to (n, pad_front + in + pad_back, ceil(h / stride), ceil(w / stride))."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad_front, self.pad_back))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            if projection:
                conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
                self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out_channels))
            else:
                self.downsample = PadShortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in, h, w) to (n, out, ceil(h / stride), ceil(w / stride))."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class CifarResNet(nn.Module):
    """Three stages of :class:`BasicBlock`, the mean over the pixels, one linear layer."""

    def __init__(
        self, blocks: int, widths: tuple[int, ...], in_channels: int, num_classes: int, projection: bool
    ) -> None:
        super().__init__()
        first, second, third = widths
        self.conv1 = nn.Conv2d(in_channels, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = self._stage(first, first, blocks, 1, projection)
        self.layer2 = self._stage(first, second, blocks, 2, projection)
        self.layer3 = self._stage(second, third, blocks, 2, projection)
        self.linear = nn.Linear(third, num_classes)
        init_convolutions(self)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int, stride: int, projection: bool) -> nn.Sequential:
        rest = (BasicBlock(out_channels, out_channels, 1, projection) for _ in range(blocks - 1))
        return nn.Sequential(BasicBlock(in_channels, out_channels, stride, projection), *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, in_channels, h, w) to logits (n, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def cifar_resnet(
    depth: int,
    projection: bool = False,
    *,
    widths: tuple[int, ...] = (16, 32, 64),
    in_channels: int = 3,
    num_classes: int = 10,
) -> CifarResNet:
    """A CIFAR ResNet.

    Args:
        depth: Weighted layers, ``6 * blocks + 2``.
        projection: 1x1 convolutions on the shortcuts that change the shape, instead of padding.
        widths: Channels of the three stages; without `projection` they must not shrink.
        in_channels: Channels of the images.
        num_classes: Number of logits.

    Raises:
        ConfigError: The depth or the widths fit no such network.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ConfigError(f"`depth = 6 * blocks + 2` must hold with blocks of at least 1, but depth={depth}.")
    if len(widths) != 3 or (not projection and list(widths) != sorted(widths)):
        raise ConfigError(
            f"`widths` must be three numbers{'' if projection else ' that do not shrink, since the shortcuts pad'}, "
            f"but it is {tuple(widths)}."
        )
    return CifarResNet((depth - 2) // 6, tuple(widths), in_channels, num_classes, projection)


for _depth in (8, 14, 20, 32, 44, 56):
    _images = random_values(2, 3, 32, 32)
    MODELS.register(f"cifar_resnet{_depth}")(
        ZooModel(build=partial(cifar_resnet, _depth, False), example_inputs=_images)
    )
    MODELS.register(f"cifar_resnet{_depth}_projection")(
        ZooModel(build=partial(cifar_resnet, _depth, True), example_inputs=_images)
    )
