"""A plan made in several rounds is one plan on the dense network."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import metaprune as mp
from metaprune import planning, zoo
from metaprune.criteria import Calibration, MetanetScore, Scores
from metaprune.edits import Keep, SetWeight
from metaprune.errors import ConfigError
from metaprune.graph import Network, trace
from metaprune.metanet import Metanet, Shape, save_checkpoint
from metaprune.plans import Plan
from metaprune.rounds import in_rounds


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return trace(zoo.build("digits_cnn").eval(), zoo.example_inputs("digits_cnn"))


def images() -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(32, 1, 8, 8, generator=generator), torch.arange(32) % 10) for _ in range(2)]


def sizes(network: Network, plan: Plan) -> dict[str, int]:
    return {axis.name: int(size) for axis, size in zip(network.axes, network.sizes(plan)) if axis.prunable}


def test_ranks_of_later_rounds_are_those_of_the_dense_network(network: Network) -> None:
    axis = next(axis for axis in network.axes if axis.prunable)
    told: list[Any] = []
    own = SetWeight(*next(network.model.named_parameters()))
    steps = iter([tuple(range(0, axis.size, 2)), (1, 2, 4)])

    def decide(left: Network, limits: Any, floors: Any) -> Plan:
        told.append((left.axis(axis.name).size, limits["macs"], floors[axis.name]))
        edits: tuple[Any, ...] = (Keep(axis.name, told[-1][0], next(steps)),)
        made_by = {"round": len(told)}
        return Plan((*([own] if left is network else []), *edits), made_by=made_by)

    plan = in_rounds(network, {"macs": 0.25 * network.cost().macs}, {axis.name: 2}, 2, decide, network.apply)
    assert plan.edits[-1] == Keep(axis.name, axis.size, (2, 4, 8))
    assert [type(edit) for edit in plan.edits] == [SetWeight, Keep]  # what was set in the first round stays set
    assert plan.made_by == {"round": 1}
    dense = network.cost().macs
    assert told == [(axis.size, dense / 2, 2 / axis.size), (axis.size // 2, dense / 4, 4 / axis.size)]


@pytest.mark.parametrize(("criterion", "between"), [("taylor", "recalibrate_norm"), ("obs", "reconstruct")])
def test_rounds_meet_the_budget_and_the_floors(network: Network, criterion: str, between: str) -> None:
    plan = mp.plan(
        network, "macs=0.3", criterion, "rd", data=images(), rounds=3, between=between, floor=0.3, round_to=2
    )
    left = sizes(network, plan)
    assert network.cost_of(plan).macs <= 0.3 * network.cost().macs
    for axis in network.axes:
        if axis.prunable:
            assert left[axis.name] >= 0.3 * axis.size
            assert left[axis.name] % 2 == 0
    assert network.verify(plan).passed(1e-5)
    assert plan.made_by["rounds"] == 3
    assert plan.made_by["between"] == [between]
    assert plan.made_by["budget"] == "macs=0.3"


def test_a_later_round_sees_what_healing_made(network: Network) -> None:
    options: Any = {"data": images(), "criterion": "taylor", "allocator": "global", "between": "reconstruct"}
    once, twice = (mp.plan(network, "macs=0.3", rounds=rounds, **options) for rounds in (1, 2))
    assert once.edits != twice.edits
    assert twice == mp.plan(network, "macs=0.3", rounds=2, **options)
    unhealed = mp.plan(network, "macs=0.3", rounds=2, **{**options, "between": None})
    assert unhealed.edits != twice.edits


@pytest.mark.parametrize("options", [{"allocator": "uniform", "round_to": 8}, {"allocator": "laptop"}])
def test_a_round_that_went_too_far_leaves_the_next_one_less(options: dict[str, Any]) -> None:
    """Coarse steps overshoot: what the next round may cost is then not more than what is left."""
    name = "vit_tiny" if options["allocator"] == "laptop" else "digits_cnn"
    network = mp.trace(zoo.build(name).eval(), zoo.example_inputs(name))
    shape = tuple(network.example_inputs.shape[1:])
    data = [(torch.randn(16, *shape), torch.arange(16) % 10)]
    plan = mp.plan(network, "macs=0.6", "l2", data=data, rounds=6, **options)
    assert network.cost_of(plan).macs <= 0.6 * network.cost().macs
    assert network.verify(plan).passed(1e-5)


def test_a_budget_that_the_network_meets_changes_nothing(network: Network) -> None:
    assert not mp.plan(network, "macs=1", "taylor", data=images(), rounds=2).edits


def test_prune_heals_between_rounds_by_what_does_not_train() -> None:
    model: nn.Module = zoo.build("digits_cnn").eval()
    example, options = zoo.example_inputs("digits_cnn"), {"data": images(), "rounds": 2, "ceiling": 0.75}
    result = mp.prune(model, example, "macs=0.5", recovery="reconstruct", **options)
    assert result.plan.made_by["between"] == ["reconstruct"]
    assert result.verification.passed(1e-5)
    left = sizes(result.network, result.plan)
    assert all(left[axis.name] <= 0.75 * axis.size for axis in result.network.axes if axis.prunable)


@pytest.mark.parametrize("options", [{"rounds": 0, "data": images()}, {"rounds": 2}])
def test_what_rounds_need_is_said(network: Network, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="`rounds >= 1` must hold, and more than 1 need data"):
        mp.plan(network, "macs=0.5", "l2", **options)


def test_all_rounds_ask_the_metanetwork_that_was_given(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "metanet.safetensors"
    save_checkpoint(Metanet(Shape(hidden=8, layers=1, heads=2, rank=2)), file)
    asked: list[tuple[str, float]] = []

    class Noted(MetanetScore):
        def _score(self, network: Network, calibration: Calibration) -> Scores:
            asked.append((self.checkpoint, round(calibration.share, 2)))
            return super()._score(network, calibration)

    monkeypatch.setattr(planning, "MetanetScore", Noted)
    options: Any = {"data": images(), "metanet": str(file), "rounds": 2, "ceiling": 0.9}
    plan = mp.plan(network, "macs=0.36", "metanet", **options)
    assert asked == [(str(file), 0.6), (str(file), pytest.approx(0.6, abs=0.05))]
    assert plan.made_by["criterion"] == "metanet"
    assert plan.made_by["metanet"] == str(file)
    assert plan.made_by["ceiling"] == 0.9
    assert plan.made_by["budget"] == "macs=0.36"
