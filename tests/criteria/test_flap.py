"""Fluctuation of what is read."""

import torch
from torch import nn

from tests.criteria.nets import X, hidden, scored, two_layers


def test_it_is_what_removal_costs_once_the_mean_is_kept() -> None:
    model = two_layers()
    x, weight = hidden(model), model[2].weight.detach().double()
    expected = torch.stack([((x[:, [u]] - x[:, u].mean()) * weight[:, u]).square().sum(1).mean() for u in range(7)])
    torch.testing.assert_close(scored("flap", model), expected)


def test_units_that_never_change_are_worth_nothing() -> None:
    model = two_layers()
    with torch.no_grad():
        model[0].weight[2] = 0
    assert scored("flap", model)[2] < 1e-12
    assert len(X) == 24


def test_a_shift_plays_no_part() -> None:
    model = two_layers(nn.Identity())
    before = scored("flap", model)
    with torch.no_grad():
        model[0].bias += 3
    torch.testing.assert_close(scored("flap", model), before, rtol=1e-5, atol=1e-9)
