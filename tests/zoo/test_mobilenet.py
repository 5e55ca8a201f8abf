from torch import nn

from metaprune.zoo import build
from metaprune.zoo.mobilenet import InvertedResidual


def test_has_depthwise_convolutions_and_shortcuts():
    model = build("cifar_mobilenet_v2")
    blocks = [module for module in model.modules() if isinstance(module, InvertedResidual)]
    depthwise = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1]
    assert len(depthwise) == len(blocks) == 13
    assert 0 < sum(block.residual for block in blocks) < len(blocks)
