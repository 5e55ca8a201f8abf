"""Ranks of feature maps."""

import pytest
import torch
from torch import nn

from metaprune.criteria import CRITERIA, Calibration
from metaprune.errors import ConfigError
from metaprune.graph import trace
from tests.criteria.nets import scored, two_layers


def test_maps_have_the_rank_that_they_have() -> None:
    """A unit that copies the image, one that is constant, one that is zero, and one that is half of the image."""
    make, read = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 3)
    with torch.no_grad():
        make.weight.copy_(torch.tensor([1.0, 0, 0, 2]).view(4, 1, 1, 1))
        make.bias.copy_(torch.tensor([0.0, 1, 0, 0]))
    images = torch.rand(6, 1, 5, 7) + torch.eye(5, 7)
    model = nn.Sequential(make, nn.ReLU(), read)
    given = Calibration(lambda: iter([(images[:4],), (images[4:],)]))
    scores = CRITERIA["hrank"]().score(trace(model, images), given)
    assert scores["0"].tolist() == [5, 1, 0, 5]
    assert CRITERIA["hrank"](samples=2).score(trace(model, images), given)["0"].tolist() == [5, 1, 0, 5]


def test_vectors_have_no_rank() -> None:
    with pytest.raises(ConfigError, match="Take 'wanda'"):
        scored("hrank", two_layers())
