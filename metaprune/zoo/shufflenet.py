"""ShuffleNetV2 for CIFAR, small: channels are split, one part is transformed, and both are shuffled together.

Source: Ma et al., ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design, ECCV 2018,
arXiv:1807.11164, figure 3 (c, d). Differs from it: strides for images of 32 pixels, and half the units.
"""

import torch
from torch import Tensor, nn

from metaprune.errors import ConfigError
from metaprune.zoo._base import MODELS, ZooModel, init_convolutions, random_values


def _pointwise(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def _depthwise(channels: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
    return [conv, nn.BatchNorm2d(channels)]


class SplitUnit(nn.Module):
    """Leaves the first part of the channels alone, transforms the second, and shuffles both together."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.split_sizes = (half, half)
        self.shuffle_groups = 2
        self.branch = nn.Sequential(*_pointwise(half, half), *_depthwise(half, 1), *_pointwise(half, half))

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) to (n, c, h, w)."""
        kept, changed = x.split_with_sizes(self.split_sizes, dim=1)
        x = torch.cat((kept, self.branch(changed)), dim=1)
        n, _, h, w = x.shape
        return x.view(n, self.shuffle_groups, -1, h, w).transpose(1, 2).flatten(1, 2)


class DownUnit(nn.Module):
    """Two branches with stride 2 over all channels, shuffled together."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.shuffle_groups = 2
        self.left = nn.Sequential(*_depthwise(in_channels, 2), *_pointwise(in_channels, half))
        self.right = nn.Sequential(*_pointwise(in_channels, half), *_depthwise(half, 2), *_pointwise(half, half))

    def forward(self, x: Tensor) -> Tensor:
        """(n, in, h, w) to (n, out, ceil(h / 2), ceil(w / 2))."""
        x = torch.cat((self.left(x), self.right(x)), dim=1)
        n, _, h, w = x.shape
        return x.view(n, self.shuffle_groups, -1, h, w).transpose(1, 2).flatten(1, 2)


class ShuffleNetV2(nn.Module):
    """Stem, stages of one :class:`DownUnit` and some :class:`SplitUnit`, a 1x1 head, the mean, one linear layer."""

    def __init__(self, widths: tuple[int, ...], units: tuple[int, ...], in_channels: int, num_classes: int) -> None:
        super().__init__()
        stem, *stages, head = widths
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), nn.ReLU()
        )
        layers: list[nn.Module] = []
        for inputs, width, count in zip((stem, *stages[:-1]), stages, units, strict=True):
            layers += [DownUnit(inputs, width), *(SplitUnit(width) for _ in range(count - 1))]
        self.units = nn.Sequential(*layers)
        self.head = nn.Sequential(*_pointwise(stages[-1], head))
        self.linear = nn.Linear(head, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, in_channels, h, w) to logits (n, num_classes)."""
        x = self.head(self.units(self.stem(x)))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def cifar_shufflenet_v2(
    *,
    widths: tuple[int, ...] = (24, 48, 96, 192, 512),
    units: tuple[int, ...] = (2, 4, 2),
    in_channels: int = 3,
    num_classes: int = 10,
) -> ShuffleNetV2:
    """A small ShuffleNetV2.

    Args:
        widths: Channels of the stem, of each stage (even), and of the head.
        units: Units of each stage.
        in_channels: Channels of the images.
        num_classes: Number of logits.

    Raises:
        ConfigError: Widths and units do not match, or a stage is odd.
    """
    if len(widths) != len(units) + 2:
        raise ConfigError(
            f"`widths` must have two numbers more than `units` (stem and head), but they are {tuple(widths)} and "
            f"{tuple(units)}."
        )
    if any(width % 2 for width in widths[1:-1]):
        raise ConfigError(f"the `widths` of the stages must be even, but they are {tuple(widths[1:-1])}.")
    return ShuffleNetV2(tuple(widths), tuple(units), in_channels, num_classes)


MODELS.register("cifar_shufflenet_v2")(ZooModel(build=cifar_shufflenet_v2, example_inputs=random_values(2, 3, 32, 32)))
