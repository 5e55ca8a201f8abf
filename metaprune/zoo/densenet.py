"""DenseNet-BC for CIFAR: every layer reads the concatenation of all before it.

Source: Huang et al., Densely Connected Convolutional Networks, CVPR 2017, arXiv:1608.06993, section 3 (bottlenecks and
compression by one half).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaprune.errors import ConfigError
from metaprune.zoo._base import MODELS, ZooModel, init_convolutions, random_values


class DenseLayer(nn.Module):
    """BN-ReLU-1x1, BN-ReLU-3x3; its `growth` new channels are put behind those that came in."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in, h, w) to (n, in + growth, h, w)."""
        y = self.conv1(F.relu(self.bn1(x)))
        y = self.conv2(F.relu(self.bn2(y)))
        return torch.cat((x, y), dim=1)


class Transition(nn.Module):
    """BN-ReLU-1x1 to fewer channels, then a 2x2 mean."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in, h, w) to (n, out, h // 2, w // 2)."""
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    """Three dense blocks with transitions between them, the mean over the pixels, one linear layer."""

    def __init__(self, layers: int, growth: int, in_channels: int, num_classes: int) -> None:
        super().__init__()
        channels = 2 * growth
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        for stage in range(3):
            if stage:
                blocks.append(Transition(channels, channels // 2))
                channels //= 2
            blocks.append(nn.Sequential(*(DenseLayer(channels + k * growth, growth) for k in range(layers))))
            channels += layers * growth
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, in_channels, h, w) to logits (n, num_classes)."""
        x = F.relu(self.bn(self.blocks(self.conv(x))))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def cifar_densenet40(*, depth: int = 40, growth: int = 12, in_channels: int = 3, num_classes: int = 10) -> DenseNet:
    """DenseNet-BC.

    Args:
        depth: Weighted layers, ``6 * layers_per_block + 4``.
        growth: Channels that a layer adds.
        in_channels: Channels of the images.
        num_classes: Number of logits.

    Raises:
        ConfigError: The depth fits no such network.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ConfigError(f"`depth = 6 * layers + 4` must hold with layers of at least 1, but depth={depth}.")
    return DenseNet((depth - 4) // 6, growth, in_channels, num_classes)


MODELS.register("cifar_densenet40")(ZooModel(build=cifar_densenet40, example_inputs=random_values(2, 3, 32, 32)))
