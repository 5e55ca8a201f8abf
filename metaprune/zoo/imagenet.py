"""Networks for images of 224 pixels in their published sizes, for measurements rather than for training here.

They are factories without a name in the registry, made of the blocks of the small networks where those fit. On the
command line: ``--model metaprune.zoo.imagenet:resnet50 --input-shape 1,3,224,224``.

Sources: He et al., CVPR 2016, arXiv:1512.03385, table 1 (with the stride in the 3x3, as usual since); Huang et al.,
CVPR 2017, arXiv:1608.06993, table 1; Howard et al., Searching for MobileNetV3, ICCV 2019, arXiv:1905.02244, table 1;
Dosovitskiy et al., ICLR 2021, arXiv:2010.11929, table 1.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from metaprune.zoo._base import init_convolutions
from metaprune.zoo.densenet import DenseLayer, Transition
from metaprune.zoo.resnext import GroupedBlock
from metaprune.zoo.vit import VisionTransformer, vit_tiny

# Kernel, inner and outer channels, squeeze and excitation, hard-swish, stride of each block of MobileNetV3-Large.
MOBILENET_V3 = (
    (3, 16, 16, False, False, 1),
    (3, 64, 24, False, False, 2),
    (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2),
    (5, 120, 40, True, False, 1),
    (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2),
    (3, 200, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 480, 112, True, True, 1),
    (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2),
    (5, 960, 160, True, True, 1),
    (5, 960, 160, True, True, 1),
)


class Stem(nn.Sequential):
    """7x7 and a maximum over 3x3, each with stride 2."""

    def __init__(self, channels: int) -> None:
        conv = nn.Conv2d(3, channels, 7, 2, padding=3, bias=False)
        super().__init__(conv, nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1))


class Pooled(nn.Module):
    """Features, the mean over the pixels, a classifier."""

    def __init__(self, features: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.features, self.classifier = features, classifier
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, 3, h, w) to logits (n, num_classes)."""
        logits: Tensor = self.classifier(self.features(x).mean(dim=(2, 3)))
        return logits


class SqueezeExcitation(nn.Module):
    """Scales every channel by a gate that is computed from the means of all channels."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) to the same shape."""
        return x * F.hardsigmoid(self.up(F.relu(self.down(x.mean(dim=(2, 3), keepdim=True)))))


class InvertedResidualV3(nn.Module):
    """1x1 up where it widens, depthwise, squeeze and excitation, 1x1 down; a shortcut where the shape stays."""

    def __init__(self, inputs: int, kernel: int, hidden: int, outputs: int, gated: bool, hard: bool, stride: int):
        super().__init__()
        layers = [] if hidden == inputs else _conv_bn(inputs, hidden, 1, hard=hard)
        layers += _conv_bn(hidden, hidden, kernel, stride, groups=hidden, hard=hard)
        if gated:
            layers.append(SqueezeExcitation(hidden, _multiple_of_8(hidden / 4)))
        layers += _conv_bn(hidden, outputs, 1, hard=None)
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) to (n, outputs, ceil(h / stride), ceil(w / stride))."""
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


def resnet50(*, num_classes: int = 1000) -> Pooled:
    """ResNet-50: 25.6 million parameters."""
    layers: list[nn.Module] = [Stem(64)]
    channels = 64
    for stage, repeats in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for repeat in range(repeats):
            layers.append(GroupedBlock(channels, width, 4 * width, 2 if stage and repeat == 0 else 1, groups=1))
            channels = 4 * width
    return Pooled(nn.Sequential(*layers), nn.Linear(channels, num_classes))


def densenet121(*, num_classes: int = 1000) -> Pooled:
    """DenseNet-121: 8 million parameters."""
    return _densenet((6, 12, 24, 16), num_classes)


def densenet201(*, num_classes: int = 1000) -> Pooled:
    """DenseNet-201: 20 million parameters."""
    return _densenet((6, 12, 48, 32), num_classes)


def mobilenet_v3(*, num_classes: int = 1000) -> Pooled:
    """MobileNetV3-Large: 5.5 million parameters."""
    layers: list[nn.Module] = _conv_bn(3, 16, 3, 2, hard=True)
    channels = 16
    for kernel, hidden, outputs, gated, hard, stride in MOBILENET_V3:
        layers.append(InvertedResidualV3(channels, kernel, hidden, outputs, gated, hard, stride))
        channels = outputs
    layers += _conv_bn(channels, 960, 1, hard=True)
    head = nn.Sequential(nn.Linear(960, 1280), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(1280, num_classes))
    return Pooled(nn.Sequential(*layers), head)


def vit_b(*, num_classes: int = 1000) -> VisionTransformer:
    """ViT-B/16: 86.6 million parameters."""
    return vit_tiny(
        width=768, depth=12, num_heads=12, hidden=3072, patch_size=16, image_size=224, num_classes=num_classes
    )


def _densenet(blocks: Sequence[int], num_classes: int, growth: int = 32) -> Pooled:
    channels = 64
    layers: list[nn.Module] = [Stem(channels)]
    for stage, repeats in enumerate(blocks):
        if stage:
            layers.append(Transition(channels, channels // 2))
            channels //= 2
        layers += [DenseLayer(channels + k * growth, growth) for k in range(repeats)]
        channels += repeats * growth
    layers += [nn.BatchNorm2d(channels), nn.ReLU()]
    return Pooled(nn.Sequential(*layers), nn.Linear(channels, num_classes))


def _conv_bn(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, *, hard: bool | None
) -> list[nn.Module]:
    """Convolution, BatchNorm, and hard-swish, ReLU or (None) nothing."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    norm = nn.BatchNorm2d(outputs, eps=0.001, momentum=0.01)
    return [conv, norm] if hard is None else [conv, norm, nn.Hardswish() if hard else nn.ReLU()]


def _multiple_of_8(channels: float) -> int:
    """The nearest multiple of 8 that is at least nine tenths of `channels`."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest
