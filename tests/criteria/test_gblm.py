"""Weights, activations and gradients."""

import pytest
import torch
import torch.nn.functional as F

from metaprune.criteria import Calibration
from metaprune.criteria._activations import Moments
from metaprune.errors import ConfigError
from metaprune.graph import Network
from metaprune.graph.reads import Read
from metaprune.task import Classification
from tests.criteria.nets import LABELS, X, hidden, scored, two_layers


def test_it_is_the_published_sum() -> None:
    model = two_layers()
    weight, total = model[2].weight, torch.zeros(4, 7, dtype=torch.float64)
    for x, label in zip(X, LABELS):
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x[None]), label[None]), weight)
        total += (100 * gradient.double()).square()
    norm = (hidden(model).square().sum(0) / len(X)).sqrt()
    expected = (weight.detach().double().abs() * (norm + total.sqrt())).sum(0)
    torch.testing.assert_close(scored("gblm", model), expected / expected.mean(), rtol=1e-5, atol=1e-8)


def test_without_gradients_it_is_wanda() -> None:
    torch.testing.assert_close(scored("gblm", two_layers(), scale=0.0), scored("wanda", two_layers()))


def test_without_activations_it_is_weights_times_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_layers()
    weight, total = model[2].weight, torch.zeros(4, 7, dtype=torch.float64)
    for x, label in zip(X, LABELS):
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x[None]), label[None]), weight)
        total += gradient.double().square()
    expected = (weight.detach().double() * total.sqrt()).abs().sum(0)

    def silent(network: Network, calibration: Calibration, reads: list[Read]) -> tuple[dict[Read, Moments], int]:
        return {read: Moments(len(X), torch.zeros(7), torch.zeros(7)) for read in reads}, len(X)

    monkeypatch.setattr("metaprune.criteria.gblm.read_moments", silent)
    for scale in (1.0, 100.0):
        torch.testing.assert_close(scored("gblm", model, scale=scale), expected / expected.mean(), rtol=1e-5, atol=1e-8)


def test_samples_count_one_by_one_in_any_order() -> None:
    alone = Calibration(lambda: iter([(X.flip(0), LABELS.flip(0))]), Classification())
    torch.testing.assert_close(scored("gblm", two_layers(), alone), scored("gblm", two_layers()), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("options", [{"samples": 0}, {"scale": -1.0}])
def test_numbers_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must hold"):
        scored("gblm", two_layers(), **options)
