"""Fluctuation of what is read."""

import pytest
import torch
from torch import nn

from metaprune.edits import Keep
from metaprune.plans import Plan
from metaprune.recovery import Context, Reconstruct
from tests.criteria.nets import X, batches, hidden, of, scored, two_layers


def test_it_is_what_removal_costs_once_the_mean_is_kept() -> None:
    model = two_layers()
    x, weight = hidden(model), model[2].weight.detach().double()
    expected = torch.stack([((x[:, [u]] - x[:, u].mean()) * weight[:, u]).square().sum(1).mean() for u in range(7)])
    torch.testing.assert_close(scored("flap", model), expected)


@pytest.mark.parametrize("gone", [[0], [1, 4], [0, 2, 3, 6]])
def test_a_set_costs_the_trace_of_its_covariance_once_the_bias_has_the_mean(gone: list[int]) -> None:
    """tr(W_g Cov_gg W_g'), of which scores are the diagonal; and the bias is b + W_g mean_g, equation 9."""
    model = two_layers()
    network, kept = of(model), tuple(unit for unit in range(7) if unit not in gone)
    plan = Plan((Keep("0", 7, kept),))
    context = Context(calibration=batches, dense=model, network=network, plan=plan)
    healed = Reconstruct(only_bias=True).recover(network.apply(plan), context).model
    x, weight, bias = hidden(model), model[2].weight.detach().double(), model[2].bias.detach().double()
    part, mean = weight[:, gone], x[:, gone].mean(0)
    torch.testing.assert_close(healed[2].bias.double(), bias + part @ mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(healed[2].weight, model[2].weight[:, list(kept)], rtol=0, atol=0)
    with torch.no_grad():
        lost = (healed(X) - model(X)).double()
    covariance = (x[:, gone] - mean).T @ (x[:, gone] - mean) / len(X)
    assert float(lost.mean(0).abs().max()) < 1e-6
    assert float(lost.square().sum(1).mean()) == pytest.approx(float((part @ covariance @ part.T).trace()), rel=1e-5)
    diagonal = float((part.square().sum(0) * covariance.diag()).sum())
    assert float(scored("flap", model)[gone].sum()) == pytest.approx(diagonal, rel=1e-6)


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
