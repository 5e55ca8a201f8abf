"""Whole residual branches: what they cost and lose, and which leave."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import metaprune as mp
from metaprune import zoo
from metaprune.allocate import ALLOCATORS, Problem
from metaprune.allocate._branches import Branch, Outputs, find_branches, sizes_without
from metaprune.allocate.laptop import _knapsacks
from metaprune.edits import DropBlock
from metaprune.errors import ConfigError
from metaprune.graph import Network, trace
from metaprune.measure import distortion
from metaprune.plans import Plan
from metaprune.task import FeatureMatching


class Blocks(nn.Module):
    """Branches of different width around a stream, the third of which adds nothing."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        widths = widths or (24, 8, 16, 12, 20)
        self.up = nn.ModuleList(nn.Linear(8, width) for width in widths)
        self.down = nn.ModuleList(nn.Linear(width, 8) for width in widths)
        nn.init.zeros_(self.down[2].weight)
        nn.init.zeros_(self.down[2].bias)
        self.head = nn.Linear(8, 16)  # a good part of the cost stays

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down):
            x = x + down(up(x).relu())
        out: Tensor = self.head(x)
        return out


X = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))


def problem(network: Network, share: float, x: Tensor = X) -> Problem:
    scores = {axis.name: torch.ones(axis.size).double() for axis in network.axes if axis.prunable}
    limits = {"macs": share * network.cost().macs}
    task = FeatureMatching(network.model)
    return Problem(network, scores, limits, floor=0.0, batches=lambda: iter([(x,)]), task=task)


@pytest.mark.parametrize("name", ["cifar_resnet14", "vit_tiny", "llama_tiny"])
def test_a_loss_and_a_cost_are_those_of_the_network_without_the_branch(name: str) -> None:
    x = zoo.example_inputs(name)
    network = trace(zoo.build(name).eval(), x)
    asked = problem(network, 0.5, x)
    branches = find_branches(asked)
    assert [branch.block for branch in branches] == list(network.blocks)
    for branch in branches[:3]:
        plan = Plan((DropBlock(branch.block.name),))
        slim = network.apply(plan).eval()
        with torch.no_grad():
            expected = distortion(network.model(x), slim(x))
        assert Outputs(asked, 1).loss([branch]) == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert network.cost(sizes_without(asked, [branch])).macs == network.cost_of(plan).macs


def test_the_knapsack_is_the_best_of_all_sets() -> None:
    network = trace(Blocks().eval(), X)
    for share in torch.linspace(0.95, 0.2, 24).tolist():
        asked = problem(network, share)
        branches, outputs = find_branches(asked), Outputs(asked, 1)
        losses = {branch: outputs.loss([branch]) for branch in branches}
        sets = [chosen for count in range(6) for chosen in combinations(branches, count)]
        fitting = [chosen for chosen in sets if asked.fits(sizes_without(asked, chosen))]
        best = min(sum(losses[branch] for branch in chosen) for chosen in fitting)
        kept = ALLOCATORS["laptop"]().allocate(asked)
        dropped = [b for b in branches if not kept[network.axes[b.places[0]].name]]
        assert sum(losses[branch] for branch in dropped) == pytest.approx(best, rel=1e-9)


@cache
def all_sets() -> tuple[Network, np.ndarray, np.ndarray]:
    """A network of twelve branches, every set of them by its bits, and its cost without them."""
    widths = np.random.default_rng(0).integers(4, 32, 12).tolist()
    network = trace(Blocks(*widths).eval(), X.expand(30, 40, 8))  # costs of more steps than the knapsack has bins
    asked = problem(network, 1.0)
    sets_SK = (np.arange(2**12)[:, None] >> np.arange(12)) & 1
    sizes_SA = np.repeat(asked.full[None], 2**12, axis=0)
    for k, branch in enumerate(find_branches(asked)):
        sizes_SA[np.ix_(sets_SK[:, k] == 1, branch.places)] = 0
    return network, sets_SK, network.cost_many(sizes_SA)["macs"]


@pytest.mark.parametrize("seed", range(6))
def test_twelve_branches_leave_as_by_brute_force(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where losses add up, also under limits without slack: no greedy or random way is better, more budget no worse."""
    network, sets_SK, macs_S = all_sets()
    random, branches = np.random.default_rng(seed), find_branches(problem(network, 1.0))
    losses_K = random.random(12) ** 2
    losses, losses_S = dict(zip(branches, losses_K.tolist(), strict=True)), sets_SK @ losses_K
    monkeypatch.setattr(Outputs, "loss", lambda self, dropped: sum(losses[branch] for branch in dropped))
    found = []
    for macs in np.sort(random.choice(macs_S[macs_S > macs_S[0] / 8], 8)):
        dropped = dropped_by("laptop", replace(problem(network, 1.0), limits={"macs": float(macs)}))
        found.append(sum(losses[branch] for branch in dropped))
        assert found[-1] == pytest.approx(losses_S[macs_S <= macs].min(), abs=1e-12)
        for order in (np.argsort(losses_K), *(random.permutation(12) for _ in range(5))):
            ways = np.cumsum([0, *(1 << order)])
            assert found[-1] <= losses_S[next(s for s in ways if macs_S[s] <= macs)] + 1e-12
    assert found == sorted(found, reverse=True)


def test_one_dear_branch_leaves_where_two_cheap_ones_lose_more(monkeypatch: pytest.MonkeyPatch) -> None:
    network = trace(Blocks().eval(), X)
    branches = find_branches(problem(network, 0.5))
    losses = dict(zip(branches, (3.0, 0.5, 2.0, 0.55, 1.0)))  # of widths 24, 8, 16, 12 and 20
    monkeypatch.setattr(Outputs, "loss", lambda self, dropped: sum(losses[branch] for branch in dropped))
    left = network.cost(sizes_without(problem(network, 0.5), [branches[4]])).macs
    kept = ALLOCATORS["laptop"]().allocate(problem(network, left / network.cost().macs))
    assert [losses[b] for b in branches if not kept[network.axes[b.places[0]].name]] == [1.0]


def test_every_step_of_the_greedy_way_is_the_best_one_and_the_way_is_nested() -> None:
    network = trace(Blocks().eval(), X)
    outputs, before = Outputs(problem(network, 0.5), 1), set()
    branches = {b.places: b for b in find_branches(problem(network, 0.5))}
    seen = []
    for share in torch.linspace(0.95, 0.2, 20).tolist():
        kept = ALLOCATORS["finercut"]().allocate(problem(network, share))
        gone = {places for places in branches if not kept[network.axes[places[0]].name]}
        assert before <= gone
        if len(gone) == len(before) + 1:
            best = min(set(branches) - before, key=lambda p: outputs.loss([branches[q] for q in {*before, p}]))
            assert gone - before == {best}
            seen.append(best)
        before = gone
    assert network.axes[seen[0][0]].name == "up.2"  # which adds nothing


@cache
def equally_wide() -> Network:
    return trace(Blocks(12, 12, 12, 12, 12, 12).eval(), X)


def without(network: Network, count: int) -> Problem:
    """The budget that asks for so many of equally wide branches."""
    asked = problem(network, 1.0)
    left = network.cost(sizes_without(asked, find_branches(asked)[:count])).macs
    return problem(network, left / network.cost().macs)


def dropped_by(name: str, asked: Problem) -> list[Branch]:
    kept = ALLOCATORS[name]().allocate(asked)
    return [branch for branch in find_branches(asked) if not kept[asked.network.axes[branch.places[0]].name]]


@pytest.mark.parametrize("name", ["laptop", "finercut"])
def test_a_branch_that_adds_nothing_has_no_distance_and_leaves_first(name: str) -> None:
    asked = without(equally_wide(), 1)
    branches, outputs = find_branches(asked), Outputs(asked, 1)
    losses = [outputs.loss([branch]) for branch in branches]
    assert losses[2] == 0
    assert min(losses[:2] + losses[3:]) > 0
    assert dropped_by(name, asked) == [branches[2]]


def test_greedy_is_the_best_one_but_not_the_best_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the outputs of a network; and where two branches that lose much alone make up for each other."""
    network = equally_wide()
    for count in (1, 2, 3, 4):
        asked = without(network, count)
        branches, outputs = find_branches(asked), Outputs(asked, 1)
        dropped = dropped_by("finercut", asked)
        assert len(dropped) == count
        best = min(outputs.loss(chosen) for chosen in combinations(branches, count))
        assert outputs.loss(dropped) == best if count == 1 else outputs.loss(dropped) >= best
    alone = dict(zip(branches, (5.0, 5.0, 1.0, 2.0, 3.0, 4.0)))
    pairs = {(0, 1): -9.5, (2, 3): 5.0}

    def loss(self: Outputs, chosen: Sequence[Branch]) -> float:
        both = (extra for pair, extra in pairs.items() if {branches[k] for k in pair} <= set(chosen))
        return sum(alone[branch] for branch in chosen) + sum(both)

    monkeypatch.setattr(Outputs, "loss", loss)
    assert dropped_by("finercut", without(network, 2)) == [branches[2], branches[4]]  # 4, where the first two lose 0.5


@pytest.mark.parametrize("name", ["laptop", "finercut"])
def test_plans_drop_modules(name: str) -> None:
    network = trace(zoo.build("cifar_resnet14").eval(), zoo.example_inputs("cifar_resnet14"))
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plan = mp.plan(network, "macs=0.6", "l2", name, data=[(images, torch.arange(16) % 10)])
    assert {edit.kind for edit in plan.edits} == {"drop_block"}
    assert network.verify(plan).passed()
    assert network.cost_of(plan).macs <= 0.6 * network.cost().macs
    with pytest.raises(ConfigError, match="batches >= 1"):
        ALLOCATORS[name](batches=0)


def test_the_knapsack_of_branches_starts_from_the_ceiling() -> None:
    """What a branch saves is counted in the network of narrower branches, or the wrong ones leave."""
    network = trace(Blocks().eval(), X)
    asked = replace(problem(network, 0.6), ceiling=0.5)
    branches = find_branches(asked)
    losses = {branch: 1.0 + 0.1 * k for k, branch in enumerate(branches)}
    (chosen,) = _knapsacks(asked, losses)
    sets = [found for count in range(len(branches) + 1) for found in combinations(branches, count)]
    fitting = [found for found in sets if asked.fits(sizes_without(asked, found))]
    best = min(sum(losses[branch] for branch in found) for found in fitting)
    assert sum(losses[branch] for branch in chosen) == pytest.approx(best)
