import torch

from metaprune.zoo import build
from metaprune.zoo.densenet import DenseLayer


def test_layers_put_their_channels_behind_the_old_ones():
    layer, x = DenseLayer(6, growth=3).eval(), torch.randn(2, 6, 4, 4)
    assert torch.equal(layer(x)[:, :6], x)
    assert layer(x).shape == (2, 9, 4, 4)


def test_depth_and_growth():
    model = build("cifar_densenet40")
    assert sum(isinstance(m, torch.nn.Conv2d | torch.nn.Linear) for m in model.modules()) == 40
    assert {layer.conv2.out_channels for layer in model.modules() if isinstance(layer, DenseLayer)} == {12}
