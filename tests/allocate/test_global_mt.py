"""A global threshold with a minimum: water-filling."""

import math

import pytest

from metaprune.errors import ConfigError
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
