"""Zeroth-order slopes."""

import math

import pytest
import torch

from metaprune.allocate import ALLOCATORS, Problem
from metaprune.errors import ConfigError
from metaprune.task import CustomLoss
from tests.allocate.problems import allocated, chain, drawn

NETWORK = chain(6, 20, 20, 4)
X = torch.randn(16, 6, generator=torch.Generator().manual_seed(2))
TASK = CustomLoss(lambda out, _: out.sum())


def batches() -> object:
    return iter([(X, torch.zeros(16))] * 4)


def test_the_slope_is_that_of_the_gradient_along_the_noise() -> None:
    """E|g z| = sqrt(2 / pi) |g|; the loss is linear in the weights near the point where no unit changes sign."""
    asked = Problem(NETWORK, drawn(NETWORK), {"macs": 1e9}, batches=lambda: iter([(X, X)] * 300), task=TASK)
    axis = next(axis for axis in NETWORK.axes if axis.prunable)
    slope = ALLOCATORS["ecoflap"](batches=300, epsilon=1e-4).slope(asked, axis)  # type: ignore[attr-defined]
    weights = dict(NETWORK.model.named_parameters())
    gradients = torch.autograd.grad(NETWORK.model(X).sum(), [weights[name] for name, _ in axis.bindings])
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert slope == pytest.approx(math.sqrt(2 / math.pi) * float(norm), rel=0.15)


def test_the_network_stays_bit_for_bit_and_steeper_axes_keep_more() -> None:
    before = {name: tensor.clone() for name, tensor in NETWORK.model.state_dict().items()}
    scores, options = drawn(NETWORK), {"batches": batches, "task": TASK}
    kept = allocated("ecoflap", NETWORK, scores, 0.5, **options)
    asked = Problem(NETWORK, scores, {"macs": 1e9}, **options)  # type: ignore[arg-type]
    slopes = {name: ALLOCATORS["ecoflap"]().slope(asked, NETWORK.axis(name)) for name in scores}  # type: ignore[attr-defined]
    assert max(kept, key=lambda name: kept[name]) == max(slopes, key=lambda name: slopes[name])
    assert all(torch.equal(before[name], tensor) for name, tensor in NETWORK.model.state_dict().items())


def test_no_axis_loses_more_than_the_spread_beyond_the_even_share() -> None:
    even = allocated("uniform", NETWORK, drawn(NETWORK), 0.5)
    for spread in (0.05, 0.2):
        given = {"batches": batches, "task": TASK, "spread": spread}
        kept = allocated("ecoflap", NETWORK, drawn(NETWORK), 0.5, **given)
        assert all(kept[name] >= even[name] - math.ceil(20 * spread) - 1 for name in kept)


@pytest.mark.parametrize("options", [{"spread": 0.0}, {"epsilon": 0.0}])
def test_numbers_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must hold"):
        ALLOCATORS["ecoflap"](**options)
