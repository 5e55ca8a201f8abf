"""Masks from a budget or a pattern: exact numbers, where they were asked for."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import metaprune as mp
from metaprune import data, zoo
from metaprune.allocate import GlobalMinimumThreshold
from metaprune.budget import Pattern, entry_budget
from metaprune.criteria import L1
from metaprune.edits import Mask
from metaprune.errors import BudgetError, ConfigError
from metaprune.graph import Network, trace


class Mixed(nn.Module):
    """A convolution with groups, and a matrix whose input is its first dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 12, 3, groups=2, bias=False)
        self.matrix, self.bias = nn.Parameter(torch.randn(12, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, self.conv(x).relu().mean((2, 3)), self.matrix)


@pytest.fixture(scope="module")
def net() -> Network:
    torch.manual_seed(0)
    return trace(Mixed().eval(), torch.randn(2, 8, 5, 5))


BATCHES = [(torch.randn(16, 8, 5, 5, generator=torch.Generator().manual_seed(k)), torch.arange(16) % 6) for k in (0, 1)]


def kept(plan: mp.Plan) -> dict[str, Tensor]:
    return {edit.name: edit.kept for edit in plan.edits if isinstance(edit, Mask)}


@pytest.mark.parametrize("criterion", ["l1", "wanda"])
def test_rows_keep_the_same_exact_number(net: Network, criterion: str) -> None:
    plan = mp.sparsify(net, "nonzeros=0.5", criterion, "uniform", BATCHES, pattern="row")
    masks = kept(plan)
    assert set(masks["conv.weight"].sum((1, 2, 3)).tolist()) == {18}
    assert set(masks["matrix"].sum(0).tolist()) == {6}  # a row of outputs is a column of this one
    assert plan.made_by["nonzeros"] == 12 * 18 + 6 * 6 == sum(int(mask.sum()) for mask in masks.values())
    assert net.verify(plan).passed()


@pytest.mark.parametrize("criterion", ["l1", "wanda", "obs"])
def test_of_every_four_inputs_two_stay(net: Network, criterion: str) -> None:
    plan = mp.sparsify(net, criterion=criterion, data=BATCHES, pattern="2:4")
    masks = kept(plan)
    assert bool((masks["conv.weight"].sum(1) == 2).all())
    assert bool((masks["matrix"].view(3, 4, 6).sum(1) == 2).all())
    assert all(isinstance(edit, Mask) and edit.pattern == "2:4" for edit in plan.edits)
    assert net.verify(plan).passed()


def test_the_budget_decides_how_many_of_every_four(net: Network) -> None:
    plan = mp.sparsify(net, "nonzeros=0.6", "l1", "global", pattern="n:4")
    found = {edit.name: edit.pattern for edit in plan.edits if isinstance(edit, Mask)}
    assert plan.made_by["nonzeros"] <= 0.6 * plan.made_by["entries"]
    assert set(found.values()) <= {"1:4", "2:4", "3:4"}
    assert found
    net.check(plan)


def test_wanda_with_equal_norms_is_magnitude_in_each_row() -> None:
    torch.manual_seed(0)
    network = trace(nn.Linear(16, 6, bias=False), torch.randn(2, 16))
    signs = [((torch.randint(2, (64, 16)) * 2 - 1).float(),)]
    plans = [
        mp.sparsify(network, "nonzeros=0.25", criterion, "uniform", signs, loss=lambda y, _: y.sum(), pattern="row")
        for criterion in ("wanda", "l1")
    ]
    assert torch.equal(kept(plans[0])["weight"], kept(plans[1])["weight"])


def test_anywhere_is_one_threshold(net: Network) -> None:
    """Of torch.nn.utils.prune.global_unstructured, which counts what leaves."""
    weights = {name: net.weights[name].detach() for name in ("conv.weight", "matrix")}
    total = sum(weight.numel() for weight in weights.values())
    masks = kept(mp.sparsify(net, "nonzeros=0.3", "l1", "global"))
    modules = [nn.Linear(1, 1) for _ in weights]
    for module, weight in zip(modules, weights.values(), strict=True):
        module.weight = nn.Parameter(weight.clone())
    places = [(module, "weight") for module in modules]
    prune.global_unstructured(places, prune.L1Unstructured, amount=total - int(0.3 * total))
    for module, (name, _) in zip(modules, weights.items(), strict=True):
        assert torch.equal(masks[name], module.weight_mask.bool()), name


def test_a_plan_names_methods_with_their_options(net: Network) -> None:
    plan = mp.sparsify(net, "nonzeros=0.5", L1(), GlobalMinimumThreshold(minimum=0.1))
    assert (plan.made_by["criterion"], plan.made_by["allocator"]) == ("l1", "global_mt(minimum=0.1)")


def test_equal_entries_leave_first_ones_first() -> None:
    network = trace(nn.Linear(4, 2, bias=False).requires_grad_(False), torch.randn(2, 4))
    network.model.weight.fill_(1.0)
    mask = kept(mp.sparsify(network, "nonzeros=0.5", "l1"))["weight"]
    assert mask.flatten().tolist() == [False] * 4 + [True] * 4
    assert not mp.sparsify(network, "nonzeros=1", "l1").edits


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"budget": "nonzeros=0.5,macs=0.5"}, BudgetError, "of units or of single entries"),
        ({"budget": "macs=0.5"}, BudgetError, "entries leave by a budget of their number"),
        ({"budget": "macs=0.5", "pattern": "2:4"}, BudgetError, r"a budget of units\. Give nonzeros"),
        ({"pattern": "row"}, BudgetError, "does not say how many entries stay"),
        ({"budget": "nonzeros=0.4", "pattern": "2:4"}, BudgetError, "pattern 2:4 keeps 252 entries"),
        ({"pattern": "4:2"}, ConfigError, "1 <= N <= M"),
        ({"pattern": "1:5"}, ConfigError, r"'matrix' \(dimension 0\) that 5 divides, but it is 12"),
        ({"pattern": "1:6"}, ConfigError, r"'conv.weight' \(dimension 1\) that 6 divides.*--freeze conv"),
        ({"budget": "nonzeros=0.5", "criterion": "fpgm"}, ConfigError, "'fpgm' scores whole units.*wanda"),
        ({"budget": "nonzeros=0.5", "allocator": "fedtiny"}, ConfigError, "'fedtiny' needs a network.*Entries"),
    ],
)
def test_refusals(net: Network, options: dict[str, Any], error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        mp.sparsify(net, **options)


def test_a_plan_of_units_refuses_a_budget_of_entries(net: Network) -> None:
    with pytest.raises(BudgetError, match=r"metaprune\.sparsify"):
        mp.plan(net, "nonzeros=0.5")


@pytest.mark.parametrize("options", [{"rounds": 2}, {"round_to": 8}, {"metanet": "default"}])
def test_what_is_for_units_alone_is_refused(net: Network, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"`{next(iter(options))}` is for units that leave whole"):
        mp.prune(net.model, net.example_inputs, pattern="2:4", **options)


def test_the_whole_way_keeps_zeros(net: Network) -> None:
    result = mp.prune(
        net.model, net.example_inputs, pattern="2:4", data=BATCHES, criterion="wanda", recovery="reconstruct"
    )
    for name, mask in kept(result.plan).items():
        assert torch.equal(result.model.get_parameter(name) != 0, mask)
    assert not torch.equal(
        result.model.conv.weight[kept(result.plan)["conv.weight"]],
        net.weights["conv.weight"][kept(result.plan)["conv.weight"]],
    )


@pytest.mark.parametrize("text", ["", "rows", "2:", ":4", "0:4", "5:4", "n:", "x:4", "2:4:8"])
def test_what_is_no_pattern(text: str) -> None:
    with pytest.raises(ConfigError, match="a pattern must be"):
        Pattern(text)


def test_what_asks_for_entries() -> None:
    assert entry_budget("macs=0.5", None) is None
    assert entry_budget(None, None) is None
    assert str(entry_budget("nonzeros=0.3", None)) == "nonzeros=0.3"
    assert str(entry_budget(None, "1:4")) == "nonzeros=0.25"
    assert str(entry_budget("nonzeros=100", "n:4")) == "nonzeros=100"


def test_masks_of_digits_by_every_allocator_that_weighs() -> None:
    torch.manual_seed(0)
    net = trace(zoo.build("digits_cnn", widths=(8, 16)).eval(), zoo.example_inputs("digits_cnn"))
    digits = data.load("digits")
    for name in ("uniform", "erk", "ecoflap"):
        plan = mp.sparsify(net, "nonzeros=0.4", "l1", name, digits, calibration=64)
        assert plan.made_by["nonzeros"] == int(0.4 * plan.made_by["entries"]), name
        assert net.verify(plan).passed()
