"""MobileNetV2 for CIFAR, narrow: depthwise convolutions inside inverted residuals.

Source: Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018, arXiv:1801.04381, table 2.
Differs from it: strides for images of 32 pixels, and fewer, narrower blocks.
"""

from torch import Tensor, nn

from metaprune.errors import ConfigError
from metaprune.zoo._base import MODELS, ZooModel, init_convolutions, random_values

STRIDES = (1, 1, 2, 2, 1, 2)


def _conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class InvertedResidual(nn.Module):
    """1x1 up, 3x3 depthwise, 1x1 down without activation; a shortcut where the shape stays."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion > 1:
            layers += [*_conv_bn(in_channels, hidden, 1), nn.ReLU6()]
        layers += [*_conv_bn(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6()]
        layers += _conv_bn(hidden, out_channels, 1)
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """(n, in, h, w) to (n, out, ceil(h / stride), ceil(w / stride))."""
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """Stem, six stages of :class:`InvertedResidual`, 1x1 head, mean over the pixels, dropout, one linear layer."""

    def __init__(
        self,
        widths: tuple[int, ...],
        repeats: tuple[int, ...],
        expansion: int,
        dropout: float,
        in_channels: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        stem, *stages, head = widths
        self.stem = nn.Sequential(*_conv_bn(in_channels, stem, 3), nn.ReLU6())
        blocks: list[nn.Module] = []
        channels = stem
        for index, (width, count, stride) in enumerate(zip(stages, repeats, STRIDES, strict=True)):
            for repeat in range(count):
                blocks.append(
                    InvertedResidual(channels, width, stride if repeat == 0 else 1, expansion if index else 1)
                )
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(*_conv_bn(channels, head, 1), nn.ReLU6())
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(head, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, in_channels, h, w) to logits (n, num_classes)."""
        x = self.head(self.blocks(self.stem(x)))
        logits: Tensor = self.linear(self.dropout(x.mean(dim=(2, 3))))
        return logits


def cifar_mobilenet_v2(
    *,
    widths: tuple[int, ...] = (16, 8, 12, 16, 32, 48, 80, 160),
    repeats: tuple[int, ...] = (1, 2, 3, 3, 2, 2),
    expansion: int = 6,
    dropout: float = 0.1,
    in_channels: int = 3,
    num_classes: int = 10,
) -> MobileNetV2:
    """A narrow MobileNetV2.

    Args:
        widths: Channels of the stem, of the six stages, and of the head.
        repeats: Blocks of each of the six stages.
        expansion: Channels inside a block per channel at its input (1 in the first stage).
        dropout: Probability before the linear layer, in [0, 1].
        in_channels: Channels of the images.
        num_classes: Number of logits.

    Raises:
        ConfigError: There are not eight widths or six repeats, or `dropout` is above 1.
    """
    if len(widths) != 8:
        raise ConfigError(f"`widths` must be eight numbers (stem, six stages, head), but it is {tuple(widths)}.")
    if len(repeats) != len(STRIDES):
        raise ConfigError(f"`repeats` must be six numbers, one for each stage, but it is {tuple(repeats)}.")
    if dropout > 1:
        raise ConfigError(f"`0 <= dropout <= 1` must hold, but dropout={dropout}.")
    return MobileNetV2(tuple(widths), tuple(repeats), expansion, dropout, in_channels, num_classes)


MODELS.register("cifar_mobilenet_v2")(ZooModel(build=cifar_mobilenet_v2, example_inputs=random_values(2, 3, 32, 32)))
