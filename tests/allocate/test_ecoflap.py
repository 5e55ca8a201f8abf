"""Zeroth-order slopes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from metaprune.allocate import ALLOCATORS, Problem
from metaprune.allocate._paths import by_share
from metaprune.errors import ConfigError
from metaprune.graph import trace
from metaprune.task import CustomLoss
from tests.allocate.problems import allocated, chain, drawn

NETWORK = chain(6, 20, 20, 4)
DEEP = chain(6, 20, 20, 20, 20, 20, 4)
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


def test_the_slope_of_a_linear_loss_is_exact() -> None:
    """Two linear layers in a row: of what a step changes in both, the even part is the same at both ends."""
    torch.manual_seed(0)
    net = trace(nn.Sequential(nn.Linear(6, 20), nn.Linear(20, 4)).double().eval(), X.double())
    axis = net.axis("0")
    data = [(x.double(), x) for x in X.split(8)]
    asked = Problem(net, drawn(net), {"macs": 1e9}, batches=lambda: iter(data), task=TASK, seed=3)
    names = sorted({name for name, _ in axis.bindings})
    weights = [net.model.get_parameter(name) for name in names]
    random, expected = torch.Generator().manual_seed(3), []
    for x, _ in data:
        gradients = torch.autograd.grad(net.model(x).sum(), weights)
        expected.append(abs(sum(float((g * torch.randn(g.shape, generator=random).double()).sum()) for g in gradients)))
    slope = ALLOCATORS["ecoflap"](batches=2).slope(asked, axis)  # type: ignore[attr-defined]
    assert slope == pytest.approx(np.mean(expected), rel=1e-8)


def with_slopes(monkeypatch: pytest.MonkeyPatch, slopes: dict[str, float]) -> None:
    monkeypatch.setattr(ALLOCATORS["ecoflap"], "slope", lambda self, problem, axis: slopes[axis.name])


@pytest.mark.parametrize("slope", [0.0, 0.3, 70.0])
def test_equal_slopes_give_the_even_allocation(slope: float, monkeypatch: pytest.MonkeyPatch) -> None:
    uneven = chain(6, 10, 40, 20, 4)
    with_slopes(monkeypatch, dict.fromkeys(drawn(uneven), slope))
    for budget in (0.1, 0.35, 0.6, 0.85):
        kept = allocated("ecoflap", uneven, drawn(uneven), budget, batches=batches, task=TASK)
        assert kept == allocated("uniform", uneven, drawn(uneven), budget)


@settings(max_examples=40, deadline=None)
@given(
    slopes=st.lists(st.floats(0, 10), min_size=5, max_size=5), budget=st.floats(0.1, 0.95), spread=st.floats(0.01, 1)
)
def test_shares_rise_with_the_slope_and_none_loses_more_than_the_spread_beyond_the_even_share(
    slopes: list[float], budget: float, spread: float
) -> None:
    """Before what is left over is given back, which goes by the scores."""
    asked = Problem(DEEP, drawn(DEEP), {"macs": budget * DEEP.cost().macs}, floor=0.0, batches=batches, task=TASK)  # type: ignore[arg-type]
    by_slope = dict(zip(drawn(DEEP), slopes, strict=True))
    with pytest.MonkeyPatch.context() as patched:
        with_slopes(patched, by_slope)
        sizes = ALLOCATORS["ecoflap"](spread=spread)._sizes(asked)  # type: ignore[call-arg]
    assert asked.fits(sizes)
    left = {name: int(sizes[DEEP.index(name)]) for name in by_slope}
    ordered = [left[name] for name in sorted(left, key=lambda name: (by_slope[name], left[name]))]
    assert ordered == sorted(ordered)
    assert all(left[one] == left[other] for one in left for other in left if by_slope[one] == by_slope[other])
    even = by_share(asked, lambda place: dict.fromkeys(left, place))
    share = np.mean([even[DEEP.index(name)] / 20 for name in left])
    assert min(left.values()) >= math.ceil(20 * (share - spread) - 1e-9)


@pytest.mark.parametrize("options", [{"spread": 0.0}, {"epsilon": 0.0}])
def test_numbers_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must hold"):
        ALLOCATORS["ecoflap"](**options)
