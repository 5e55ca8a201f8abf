"""The slow truth."""

import torch
from torch import nn

from metaprune.criteria import CRITERIA
from metaprune.edits import Keep
from metaprune.plans import Plan
from tests.criteria.nets import X, calibration, of, scored, two_layers


def test_it_is_what_the_cut_network_loses() -> None:
    """Also where a norm runs over the axis, so that zeroing a unit is not removing it."""
    torch.manual_seed(0)
    normed = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 4)).eval()
    for model in (two_layers(), normed):
        net = of(model)
        scores = CRITERIA["distortion"]().score(net, calibration())["0"]
        for rank in range(len(scores)):
            kept = tuple(other for other in range(len(scores)) if other != rank)
            slim = net.apply(Plan((Keep("0", len(scores), kept),)))
            with torch.no_grad():
                expected = (slim(X) - model(X)).double().square().sum() / model(X).double().square().sum()
            torch.testing.assert_close(scores[rank], expected, rtol=1e-4, atol=1e-9)


def test_a_dead_unit_is_worth_nothing() -> None:
    model = two_layers()
    with torch.no_grad():
        model[0].bias[5] = -100
    scores = scored("distortion", model)
    assert scores[5] == 0
    assert int((scores == 0).sum()) == 1
