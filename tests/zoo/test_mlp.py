import torch
from torch import nn

from metaprune.zoo import build


def test_widths():
    model = build("mlp", in_features=6, widths=(5, 4, 3))
    sizes = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]
    assert sizes == [(6, 5), (5, 4), (4, 3), (3, 10)]
    assert model(torch.randn(2, 1, 2, 3)).shape == (2, 10)
