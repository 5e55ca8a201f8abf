"""A global threshold with a minimum: water-filling."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.prune import L1Unstructured, global_unstructured

from metaprune.allocate import ALLOCATORS, Problem
from metaprune.errors import ConfigError
from metaprune.graph import Network
from tests.allocate.problems import allocated, chain, drawn

NETWORK = chain(6, 20, 20, 20, 4)


def weak_first(scale: float = 1e-3) -> dict:
    scores = drawn(NETWORK)
    return {axis: score_U * (scale if k == 0 else 1) for k, (axis, score_U) in enumerate(scores.items())}


def test_without_a_minimum_it_is_the_global_threshold() -> None:
    uneven = chain(6, 10, 40, 20, 4)  # units cost differently, which counts for losses
    for budget in (0.2, 0.5, 0.8):
        for additive in (False, True):
            plain = allocated("global", uneven, drawn(uneven), budget, additive=additive)
            assert allocated("global_mt", uneven, drawn(uneven), budget, additive=additive, minimum=0.0) == plain


def kept_of(scores: dict[str, torch.Tensor], network: Network, count: int, **options: float) -> dict[str, set[int]]:
    """So many units stay where each costs the same activations."""
    asked = Problem(network, scores, {}, floor=0.0)
    full, least = network.cost(asked.full).activations, network.cost(asked.smallest).activations
    units = sum(map(len, scores.values()))
    limit = full - (units - count) * (full - least) // (units - len(scores))
    asked = Problem(network, scores, {"activations": limit}, floor=0.0)
    return {name: set(ranks) for name, ranks in ALLOCATORS["global_mt"](**options).allocate(asked).items()}


@pytest.mark.parametrize("count", [69, 50, 30, 12])
def test_units_of_one_cost_stay_as_single_weights_do(count: int) -> None:
    uneven = chain(6, 10, 40, 20, 4)
    scores = drawn(uneven)
    layers = {name: nn.Linear(len(score_U), 1, bias=False).double() for name, score_U in scores.items()}
    for name, layer in layers.items():
        layer.weight.data[0] = scores[name]
    global_unstructured([(layer, "weight") for layer in layers.values()], L1Unstructured, amount=70 - count)
    masks = {name: set(layer.weight_mask[0].nonzero().flatten().tolist()) for name, layer in layers.items()}
    assert min(map(len, masks.values())) >= 1
    assert kept_of(scores, uneven, count, minimum=0.0) == masks


def test_the_order_of_layers_plays_no_part() -> None:
    uneven, other = chain(6, 10, 40, 20, 4), chain(6, 20, 10, 40, 4)
    scores = drawn(uneven)
    first, second, third = scores.values()
    moved = dict(zip(drawn(other), (third, first, second), strict=True))
    for count in (60, 35, 12):
        for minimum in (0.0, 0.1):
            one = list(kept_of(scores, uneven, count, minimum=minimum).values())
            assert list(kept_of(moved, other, count, minimum=minimum).values()) == [one[2], one[0], one[1]]


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.sampled_from([1e-3, 0.1, 1.0, 1e3]), min_size=3, max_size=3),
    budget=st.floats(0.05, 0.95), minimum=st.floats(0, 0.35),
)  # fmt: skip
def test_every_axis_keeps_the_minimum_where_the_budget_has_room(
    weights: list[float], budget: float, minimum: float
) -> None:
    uneven = chain(6, 10, 40, 20, 4)
    scores = {name: weight * score_U for weight, (name, score_U) in zip(weights, drawn(uneven).items())}
    least = {name: min(len(score_U), math.ceil(minimum * 70 - 1e-9)) for name, score_U in scores.items()}
    asked = Problem(uneven, scores, {"macs": budget * uneven.cost().macs}, floor=0.0)
    if asked.fits(asked.sizes(least)):
        kept = allocated("global_mt", uneven, scores, budget, minimum=minimum)
        assert all(kept[name] >= least[name] for name in kept), (kept, least)


def test_the_minimum_keeps_an_axis_from_collapsing() -> None:
    collapsed = allocated("global", NETWORK, weak_first(), 0.4)
    kept = allocated("global_mt", NETWORK, weak_first(), 0.4, minimum=0.1)
    weakest = min(collapsed, key=lambda axis: collapsed[axis])
    assert collapsed[weakest] == 1
    assert kept[weakest] >= math.ceil(0.1 * 60)


def test_a_minimum_that_costs_too_much_gives_way_to_the_budget() -> None:
    kept = allocated("global_mt", NETWORK, weak_first(), 0.05, minimum=0.3)
    assert max(kept.values()) < 0.3 * 60


def test_a_minimum_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 <= minimum <= 1"):
        allocated("global_mt", NETWORK, drawn(NETWORK), 0.5, minimum=2.0)
