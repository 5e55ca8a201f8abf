"""What can be chosen and what it can cost, against networks that were really built."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from metaprune import zoo
from metaprune.errors import BudgetError
from metaprune.graph import Network, trace
from metaprune.planning import allot, judge, plan
from metaprune.search.settings import Choices, SpaceOptions
from metaprune.search.space import Space
from tests.search.player import settings


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return trace(zoo.build("cifar_resnet8", widths=[8, 16, 16]).eval(), torch.randn(2, 3, 16, 16))


def space(network: Network, budget: Any = ("macs=0.5",), grid: float | None = None, **choices: Any) -> Space:
    asked = settings(choices=Choices(budget=budget, **choices), limits=None)
    return Space.of(network, replace(asked, space=SpaceOptions(grid=grid)))


def test_levels_follow_floor_alignment_and_grid(network: Network) -> None:
    def levels(**options: Any) -> dict[str, list[int]]:
        return {axis["name"]: axis["levels"] for axis in space(network, **options).to_json()["axes"]}

    name = next(name for name, own in levels().items() if own[-1] == 16)
    assert levels(floor=(0.2, 0.25))[name] == list(range(4, 17))
    assert levels(round_to=(4, 8))[name] == [4, 8, 12, 16]
    assert levels(grid=0.25)[name] == [4, 8, 12, 16]
    assert levels(grid=0.125, floor=(0.5,))[name] == [8, 10, 12, 14, 16]


def test_ranges_are_reached_and_not_exceeded(network: Network) -> None:
    found = space(network, floor=(0.25,))
    ranges = found.ranges()
    draw = np.random.default_rng(0)
    problem = found.problem
    for _ in range(100):
        sizes = problem.full.copy()
        for axis in found.axes:
            sizes[network.index(axis.name)] = draw.choice(problem.levels(axis))
        cost = network.cost(sizes)
        for name, (least, most) in ranges.items():
            assert least <= cost[name] <= most
    assert {name: least for name, (least, _) in ranges.items()} == {
        name: network.cost(problem.smallest)[name] for name in ranges
    }


def test_branches_live_or_leave_where_an_allocator_may_drop_them(network: Network) -> None:
    assert space(network).branches == ()
    found = space(network, allocator=("laptop",))
    assert set(found.branches) == {block.name for block in network.blocks}
    assert found.ranges()["macs"][0] < space(network).ranges()["macs"][0]


def test_limits_out_of_reach_are_refused_and_the_least_cost_is_named(network: Network) -> None:
    with pytest.raises(BudgetError, match=r"macs must reach .* cannot go below \d+"):
        space(network, budget=("macs=0.5", "macs=0.001"))
    with pytest.raises(BudgetError, match="metaprune search space"):
        space(network, budget=("macs=0.3",), floor=(0.9,))
    space(network, budget=("macs=0.3",), floor=(0.9, 0.1))  # some can


def test_a_grid_holds_for_what_is_cut(network: Network) -> None:
    decided = allot(network, judge(network, "l2"), "macs=0.5", "rd", floor=0.1, grid=0.25)
    for axis, size in zip(network.axes, network.sizes(decided).tolist()):
        assert not axis.prunable or size % (axis.size // 4) == 0
    assert decided.made_by["grid"] == 0.25
    assert network.cost_of(decided).macs <= 0.5 * network.cost().macs


def test_judging_and_allotting_is_planning(network: Network) -> None:
    once = plan(network, "macs=0.4", "l2", "rd", floor=0.2)
    assert allot(network, judge(network, "l2"), "macs=0.4", "rd", floor=0.2) == once
