"""Whole residual branches: what they cost and lose, and which leave."""

from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

import metaprune as mp
from metaprune import zoo
from metaprune.allocate import ALLOCATORS, Problem
from metaprune.allocate._branches import Outputs, find_branches, sizes_without
from metaprune.edits import DropBlock
from metaprune.errors import ConfigError
from metaprune.graph import Network, trace
from metaprune.measure import distortion
from metaprune.plans import Plan
from metaprune.task import FeatureMatching


class Blocks(nn.Module):
    """Branches of different width around a stream, one of which adds nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        widths = (24, 8, 16, 12, 20)
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
