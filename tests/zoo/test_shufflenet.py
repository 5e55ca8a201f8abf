import torch
from torch import nn

from metaprune.zoo.shufflenet import DownUnit, SplitUnit


def shuffled(x: torch.Tensor) -> torch.Tensor:
    """The obvious shuffle: first of the left half, first of the right half, second of the left, …"""
    half = x.shape[1] // 2
    return x[:, [index for pair in zip(range(half), range(half, 2 * half)) for index in pair]]


def test_split_unit_leaves_the_first_half_alone():
    unit, x = SplitUnit(6).eval(), torch.randn(2, 6, 4, 4)
    expected = torch.cat((x[:, :3], unit.branch(x[:, 3:])), dim=1)
    assert torch.equal(unit(x), shuffled(expected))


def test_down_unit_halves_the_image():
    unit, x = DownUnit(6, 10).eval(), torch.randn(2, 6, 7, 7)
    expected = torch.cat((unit.left(x), unit.right(x)), dim=1)
    assert torch.equal(unit(x), shuffled(expected))
    assert unit(x).shape == (2, 10, 4, 4)


def test_parts_may_become_unequal():
    """What comes in may be split elsewhere than in the middle, as long as what is shuffled pairs up."""
    unit = SplitUnit(6).eval()
    unit.split_sizes = (2, 3)
    unit.branch = nn.Conv2d(3, 2, 1)
    x = torch.randn(1, 5, 4, 4)
    assert torch.equal(unit(x), shuffled(torch.cat((x[:, :2], unit.branch(x[:, 2:])), dim=1)))
