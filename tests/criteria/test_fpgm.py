"""Distances between filters."""

import torch

from tests.criteria.nets import scored, two_layers


def test_it_is_the_sum_of_distances() -> None:
    model = two_layers()
    rows = model[0].weight.detach().double()
    expected = torch.stack([(rows - row).norm(dim=1).sum() for row in rows])
    torch.testing.assert_close(scored("fpgm", model), expected / expected.mean(), rtol=1e-6, atol=1e-9)


def test_where_the_filters_lie_and_their_scale_play_no_part() -> None:
    model = two_layers()
    before = scored("fpgm", model)
    with torch.no_grad():
        model[0].weight.mul_(4).add_(torch.randn(5))
    torch.testing.assert_close(scored("fpgm", model), before, rtol=1e-5, atol=1e-9)


def test_the_filter_in_the_middle_is_worth_least() -> None:
    model = two_layers()
    with torch.no_grad():
        model[0].weight[4] = model[0].weight[[0, 1, 2, 3, 5, 6]].mean(0)
    assert int(scored("fpgm", model).argmin()) == 4
