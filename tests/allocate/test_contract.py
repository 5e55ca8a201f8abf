"""What every allocator promises, run for every registered name."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metaprune import zoo
from metaprune.allocate import ALLOCATORS, Allocator, Problem
from metaprune.allocate._branches import Outputs, find_branches
from metaprune.allocate._paths import ranked
from metaprune.errors import BudgetError, ConfigError, InputError
from metaprune.graph import Network, trace
from metaprune.task import Classification, FeatureMatching

NETWORKS = {
    name: trace(zoo.build(name), zoo.example_inputs(name)) for name in ("digits_cnn", "vit_tiny", "gru_classifier")
}


WIDTHS = [name for name in ALLOCATORS if not ALLOCATORS[name].whole]
DEPTHS = [name for name in ALLOCATORS if ALLOCATORS[name].whole]


def scores(network: Network, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        axis.name: torch.rand(axis.size, generator=generator, dtype=torch.float64) ** 3
        for axis in network.axes
        if axis.prunable
    }


def evidence(name: str) -> dict[str, Any]:
    """Data and a task, for allocators that run the network."""
    x = zoo.example_inputs(name)
    return {"batches": lambda: iter([(x,), (x,)]), "task": FeatureMatching(NETWORKS[name].model.eval())}


def problem(name: str = "digits_cnn", budget: float = 0.5, quantity: str = "macs", **options: Any) -> Problem:
    network = NETWORKS[name]
    return Problem(network, scores(network), {quantity: budget * network.cost()[quantity]}, **evidence(name), **options)


QUICK: dict[str, dict[str, Any]] = {
    "fedtiny": {"candidates": 2},
    "tas": {"steps": 3},
    "tyr": {
        "samples": 8,
        "rated": 4,
        "first": 2,
        "rounds": 1,
        "generations": 2,
        "children": 2,
        "survivors": 1,
        "healed": 0,
    },
}
MEASURED = ("fedtiny", "tas", "tyr")  # they go by what the network gives


def made(name: str) -> Allocator:
    """An allocator, quick enough for many problems."""
    return ALLOCATORS[name](**QUICK.get(name, {}))


def sizes(problem: Problem, kept: dict[str, tuple[int, ...]]) -> np.ndarray:
    out = problem.full.copy()
    for name, ranks in kept.items():
        out[problem.network.index(name)] = len(ranks)
    return out


@pytest.fixture(params=WIDTHS)
def allocator(request: pytest.FixtureRequest) -> Allocator:
    return made(request.param)


@settings(max_examples=25, deadline=None)
@given(
    which=st.sampled_from(list(NETWORKS)),
    budget=st.floats(0.15, 1),
    quantity=st.sampled_from(["macs", "params", "bytes", "activations"]),
    additive=st.booleans(),
    round_to=st.sampled_from([1, 4, 8]),
    name=st.sampled_from(WIDTHS),
)
def test_every_limit_is_met_from_below(
    which: str, budget: float, quantity: str, additive: bool, round_to: int, name: str
) -> None:
    try:
        asked = problem(which, budget, quantity, additive=additive, round_to=round_to, floor=0.05)
    except BudgetError:
        return
    kept = made(name).allocate(asked)
    left = sizes(asked, kept)
    assert asked.network.cost(left)[quantity] <= asked.limits[quantity]
    for axis in asked.axes:
        ranks = kept[axis.name]
        assert list(ranks) == sorted(set(ranks))
        assert max(1, math.ceil(0.05 * axis.size)) <= len(ranks) <= axis.size
        if axis.kind in ("channel", "hidden"):
            assert len(ranks) % round_to == 0 or len(ranks) == axis.size
        best = asked.scores[axis.name].sort(descending=True).values[: len(ranks)]
        torch.testing.assert_close(asked.scores[axis.name][list(ranks)].sort(descending=True).values, best)


def test_nothing_more_fits(allocator: Allocator) -> None:
    asked = problem(additive=True)
    left = sizes(asked, allocator.allocate(asked))
    for axis in asked.axes:
        grown = left.copy()
        grown[asked.network.index(axis.name)] += 1
        assert left[asked.network.index(axis.name)] == axis.size or not asked.fits(grown)


def test_the_whole_budget_changes_nothing(allocator: Allocator) -> None:
    asked = problem(budget=1.0)
    assert all(len(ranks) == asked.network.axis(name).size for name, ranks in allocator.allocate(asked).items())


def test_several_limits_hold_at_once(allocator: Allocator) -> None:
    network = NETWORKS["digits_cnn"]
    dense = network.cost()
    limits = {"macs": 0.7 * dense.macs, "params": 0.3 * dense.params}
    asked = Problem(network, scores(network), limits, True, **evidence("digits_cnn"))
    cost = network.cost(sizes(asked, allocator.allocate(asked)))
    assert cost.macs <= 0.7 * dense.macs
    assert cost.params <= 0.3 * dense.params


def test_the_same_problem_has_the_same_answer(allocator: Allocator) -> None:
    assert allocator.allocate(problem()) == allocator.allocate(problem())


@pytest.mark.parametrize("which", ["digits_cnn", "vit_tiny"])
@pytest.mark.parametrize("name", [name for name in WIDTHS if name not in MEASURED])
def test_more_budget_loses_no_more(name: str, which: str) -> None:
    """The predicted loss, which is the score of what leaves, does not grow with the budget.

    Those that go by what the network gives do not look at this sum; what they look at is measured on candidates, which
    differ from budget to budget, so that it need not fall. Depth is below.
    """
    losses = []
    for budget in (0.3, 0.45, 0.6, 0.75, 0.9, 1.0):
        asked = problem(which, budget, additive=True)
        kept = made(name).allocate(asked)
        left = (asked.scores[axis][list(ranks)].sum() for axis, ranks in kept.items())
        losses.append(float(sum(score_U.sum() for score_U in asked.scores.values()) - sum(left)))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", [name for name in ALLOCATORS if ALLOCATORS[name].needs])
def test_what_it_needs_is_asked_for(name: str) -> None:
    network = NETWORKS["digits_cnn"]
    asked = Problem(network, scores(network), {"macs": 0.5 * network.cost().macs})
    with pytest.raises(ConfigError, match=f"allocator '{name}' needs data"):
        made(name).allocate(asked)
    task, x = FeatureMatching(network.model), torch.randn(4, 1, 8, 8)
    bad = {"at least one batch": [], "must be finite": [(x / 0,)], "must run on the calibration data": [(x[:, :0],)]}
    for rule, batches in bad.items():
        with pytest.raises(InputError, match=rule):
            made(name).allocate(replace(asked, batches=lambda batches=batches: iter(batches), task=task))
    alike = replace(asked, batches=lambda: iter([(x, torch.full((4,), 3))]), task=Classification())
    with pytest.raises(InputError, match="more than one class, but all samples are of class 3"):
        made(name).allocate(alike)


@pytest.mark.parametrize("which", ["digits_cnn", "vit_tiny"])
@pytest.mark.parametrize("name", DEPTHS)
def test_branches_leave_whole_or_stay(name: str, which: str) -> None:
    network, seen = NETWORKS[which], []
    for budget in (0.95, 0.8, 0.7, 0.65):
        asked = problem(which, budget)
        kept = made(name).allocate(asked)
        assert kept == made(name).allocate(asked)
        assert network.cost(sizes(asked, kept)).macs <= asked.limits["macs"]
        assert all(len(ranks) in (0, network.axis(axis).size) for axis, ranks in kept.items())
        seen.append({axis for axis, ranks in kept.items() if not ranks})
    assert all(seen)
    whole = made(name).allocate(problem(which, 1.0))
    assert all(len(ranks) == network.axis(axis).size for axis, ranks in whole.items())
    several = replace(problem(which, 0.7), limits={q: 0.7 * network.cost()[q] for q in ("macs", "params")})
    assert several.fits(sizes(several, made(name).allocate(several)))


@pytest.mark.parametrize("name", DEPTHS)
def test_more_budget_loses_no_more_of_depth(name: str) -> None:
    """Losses of branches add up for laptop, and this sum falls; finercut drops no branch that a lower budget keeps."""
    sums, gone = [], []
    for budget in (0.6, 0.7, 0.8, 0.9, 1.0):
        asked = problem("digits_cnn", budget, floor=0.0)
        kept, outputs, branches = made(name).allocate(asked), Outputs(asked, 8), find_branches(asked)
        dropped = [branch for branch in branches if not kept[asked.network.axes[branch.places[0]].name]]
        sums.append(sum(outputs.loss([branch]) for branch in dropped))
        gone.append({branch.block.name for branch in dropped})
    assert gone[-1] == set() != gone[0]
    if name == "laptop":
        assert sums == sorted(sums, reverse=True)
    else:
        assert all(more <= fewer for fewer, more in pairwise(gone))


@pytest.mark.parametrize("name", DEPTHS)
def test_too_few_branches_are_refused_with_what_can_be_reached(name: str) -> None:
    with pytest.raises(BudgetError, match="without all 2 residual branches they are"):
        made(name).allocate(problem("digits_cnn", 0.05, floor=0.0))
    with pytest.raises(BudgetError, match="take an allocator of widths"):
        made(name).allocate(problem("gru_classifier", 0.5))


def test_an_axis_without_scores_keeps_its_units(allocator: Allocator) -> None:
    network = NETWORKS["digits_cnn"]
    known = scores(network)
    left_out = next(iter(known))
    del known[left_out]
    limits = {"macs": 0.8 * network.cost().macs}
    kept = allocator.allocate(Problem(network, known, limits, **evidence("digits_cnn")))
    assert left_out not in kept


def test_a_budget_below_the_floors_names_what_can_be_reached() -> None:
    with pytest.raises(BudgetError, match=r"cannot go below \d+ \(0\.\d+ of the dense network\)"):
        problem(budget=0.001)


@pytest.mark.parametrize("options", [{"floor": -0.1}, {"floor": 1.5}, {"round_to": 0}])
def test_numbers_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must hold"):
        problem(**options)  # type: ignore[arg-type]


def test_uniform_keeps_the_same_share() -> None:
    asked = problem("digits_cnn", 0.4)
    kept = ALLOCATORS["uniform"]().allocate(asked)
    shares = [len(kept[axis.name]) / axis.size for axis in asked.axes]
    assert max(shares) - min(shares) < 0.15  # units are whole, and what rounding left is given back


def test_global_removes_the_lowest_scores_first() -> None:
    asked = problem("digits_cnn", 0.6, floor=0.0)
    kept = ALLOCATORS["global"]().allocate(asked)
    removed = [
        float(asked.scores[axis.name][rank])
        for axis in asked.axes
        for rank in set(range(axis.size)) - set(kept[axis.name])
    ]
    stay = [float(asked.scores[name][rank]) for name, ranks in kept.items() for rank in ranks]
    # One threshold, up to what the limit left over and was given back.
    assert np.quantile(removed, 0.9) <= np.quantile(stay, 0.2)


def test_global_weighs_additive_scores_by_cost() -> None:
    """With equal scores, the units that cost most leave first."""
    network = NETWORKS["digits_cnn"]
    equal = {axis.name: torch.ones(axis.size, dtype=torch.float64) for axis in network.axes if axis.prunable}
    asked = Problem(network, equal, {"params": 0.7 * network.cost().params}, additive=True, floor=0.0)
    left = sizes(asked, ALLOCATORS["global"]().allocate(asked))
    saving = {}
    for axis in asked.axes:
        without = asked.full.copy()
        without[network.index(axis.name)] -= 1
        saving[axis.name] = network.cost().params - network.cost(without).params
    dearest = max(saving, key=lambda name: saving[name])
    shares = {axis.name: left[network.index(axis.name)] / axis.size for axis in asked.axes}
    assert shares[dearest] == min(shares.values())


def test_global_weighs_by_the_cost_of_one_unit_under_a_ceiling_too() -> None:
    """Scores that are what a unit saves are worth the same per cost, so that every axis loses the same share."""
    network = NETWORKS["digits_cnn"]
    free = {axis.name: torch.ones(axis.size, dtype=torch.float64) for axis in network.axes if axis.prunable}
    limits = {"params": 0.4 * network.cost().params}
    asked = Problem(network, free, limits, additive=True, floor=0.0, ceiling=0.75)
    values = ranked(asked)
    most = network.cost(asked.full).params
    for axis in asked.axes:
        without = asked.full.copy()
        without[network.index(axis.name)] -= 1
        saved = (most - network.cost(without).params) / limits["params"]
        assert values[axis.name] == pytest.approx(np.full(axis.size, 1 / saved))


def test_floors_and_ceilings_by_axis_hold(allocator: Allocator) -> None:
    network = NETWORKS["digits_cnn"]
    first, second = [axis for axis in network.axes if axis.prunable][:2]
    asked = problem(floor={first.name: 0.8}, ceiling={second.name: 0.4}, budget=0.6)
    kept = allocator.allocate(asked)
    assert asked.fits(sizes(asked, kept))
    assert len(kept[first.name]) >= math.ceil(0.8 * first.size)
    assert len(kept[second.name]) <= math.floor(0.4 * second.size)


def test_a_ceiling_alone_cuts_what_lies_above_it(allocator: Allocator) -> None:
    kept = allocator.allocate(problem(budget=1.0, ceiling=0.5))
    network = NETWORKS["digits_cnn"]
    assert {name: len(ranks) for name, ranks in kept.items()} == {name: network.axis(name).size // 2 for name in kept}


def test_multiples_by_kind_of_axis() -> None:
    asked = problem("vit_tiny", round_to={"head_dim": 4, "channel": 8})
    for axis in asked.axes:
        step = {"head_dim": 4, "channel": 8}.get(axis.kind, 1)
        assert all(size % step == 0 or size == axis.size for size in asked.levels(axis)), axis


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"floor": {"no_such.*": 0.5}}, "every pattern of `floor` must fit an axis, but 'no_such.\\*' fits none"),
        ({"floor": 0.6, "ceiling": 0.3}, "the floor of an axis must not exceed its ceiling"),
        ({"floor": {"*": 1.5}}, "`0 <= floor <= 1` must hold"),
        ({"ceiling": 0.0}, "`0 < ceiling <= 1` must hold"),
        ({"round_to": {"channel": 0}}, "`round_to >= 1` must hold"),
        ({"round_to": {"chanel": 8}}, "none is called 'chanel'. Did you mean 'channel'"),
    ],
)
def test_bounds_that_contradict_are_refused(options: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        problem(**options)


def test_a_budget_that_contradicts_floors_is_refused() -> None:
    with pytest.raises(BudgetError, match="with the floors given of every axis"):
        problem(budget=0.3, floor={"*": 0.9})
