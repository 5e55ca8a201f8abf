"""ResNeXt-29 for CIFAR, narrow: bottlenecks around a grouped convolution.

Source: Xie et al., Aggregated Residual Transformations for Deep Neural Networks, CVPR 2017, arXiv:1611.05431,
section 5.3. Differs from it: four channels a group in the first stage instead of 64, and outputs twice as wide as the
grouped convolution.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from metaprune.errors import ConfigError
from metaprune.zoo._base import MODELS, ZooModel, init_convolutions, random_values


class GroupedBlock(nn.Module):
    """1x1 down, grouped 3x3, 1x1 up, with a projection on the shortcut where the shape changes."""

    def __init__(self, in_channels: int, width: int, out_channels: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(n, in, h, w) to (n, out, ceil(h / stride), ceil(w / stride))."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNeXt(nn.Module):
    """Three stages of :class:`GroupedBlock`, the mean over the pixels, one linear layer."""

    def __init__(self, cardinality: int, group_width: int, repeats: int, in_channels: int, num_classes: int) -> None:
        super().__init__()
        width = cardinality * group_width
        channels = 2 * width
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        blocks: list[nn.Module] = []
        for stage in range(3):
            inner = width * 2**stage
            for repeat in range(repeats):
                stride = 2 if stage and repeat == 0 else 1
                blocks.append(GroupedBlock(channels, inner, 2 * inner, stride, cardinality))
                channels = 2 * inner
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(channels, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, in_channels, h, w) to logits (n, num_classes)."""
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def cifar_resnext29(
    *, cardinality: int = 8, group_width: int = 4, depth: int = 29, in_channels: int = 3, num_classes: int = 10
) -> ResNeXt:
    """A narrow ResNeXt, of 29 layers unless told otherwise.

    Args:
        cardinality: Groups of every grouped convolution.
        group_width: Channels of one group in the first stage; doubled in each later one.
        depth: Weighted layers, ``9 * blocks + 2``.
        in_channels: Channels of the images.
        num_classes: Number of logits.

    Raises:
        ConfigError: The depth fits no such network.
    """
    if depth < 11 or (depth - 2) % 9:
        raise ConfigError(f"`depth = 9 * blocks + 2` must hold with blocks of at least 1, but depth={depth}.")
    return ResNeXt(cardinality, group_width, (depth - 2) // 9, in_channels, num_classes)


MODELS.register("cifar_resnext29")(ZooModel(build=cifar_resnext29, example_inputs=random_values(2, 3, 32, 32)))
