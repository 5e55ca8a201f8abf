"""A small convolutional network with residual blocks for the 8x8 digits; the demo trains it in seconds."""

import torch.nn.functional as F
from torch import Tensor, nn

from metaprune.errors import ConfigError
from metaprune.zoo._base import MODELS, ZooModel, init_convolutions, random_values


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions inside a shortcut that keeps the shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) to (n, channels, h, w)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(y)))


class DigitsCnn(nn.Module):
    """Two stages of convolution and :class:`ResidualBlock`, the mean over the pixels, one linear layer."""

    def __init__(self, widths: tuple[int, ...], in_channels: int, num_classes: int) -> None:
        super().__init__()
        first, second = widths
        self.conv1 = nn.Conv2d(in_channels, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.block1 = ResidualBlock(first)
        self.conv2 = nn.Conv2d(first, second, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(second)
        self.block2 = ResidualBlock(second)
        self.linear = nn.Linear(second, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, in_channels, h, w) to logits (n, num_classes)."""
        x = self.block1(F.relu(self.bn1(self.conv1(x))))
        x = self.block2(F.relu(self.bn2(self.conv2(x))))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def digits_cnn(*, widths: tuple[int, ...] = (16, 32), in_channels: int = 1, num_classes: int = 10) -> DigitsCnn:
    """A network for the 8x8 digits.

    Args:
        widths: Channels of the two stages.
        in_channels: Channels of the images.
        num_classes: Number of logits.

    Raises:
        ConfigError: There are not two widths.
    """
    if len(widths) != 2:
        raise ConfigError(f"`widths` must be two numbers, but it is {tuple(widths)}.")
    return DigitsCnn(tuple(widths), in_channels, num_classes)


MODELS.register("digits_cnn")(ZooModel(build=digits_cnn, example_inputs=random_values(2, 1, 8, 8)))
