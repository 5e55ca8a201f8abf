"""Evaluations of a real network: what each fidelity measures, and that it is measured once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from metaprune.errors import BudgetError, ConfigError
from metaprune.graph import Network
from metaprune.recovery import RecalibrateNorm
from metaprune.search import fidelity
from metaprune.search.campaign import Campaign
from metaprune.search.fidelity import Laboratory, methods_of
from metaprune.search.latency import Table
from metaprune.search.prepare import read, train
from metaprune.search.results import Results
from metaprune.search.settings import Choices, Rung, Settings, SpaceOptions, Training
from metaprune.search.space import Space
from metaprune.search.store import open_storage
from metaprune.search.worker import work

CONFIG = {
    "criterion": "taylor",
    "allocator": "global",
    "metanet": "off",
    "recovery": "recalibrate_norm",
    "round_to": 1,
    "floor": 0.1,
    "budget": "macs=0.5",
}
RUNGS = (
    Rung(kind="curves", criterion="l2"),
    Rung(kind="evaluate", images=60),
    Rung(kind="finetune", top=1, lr=0.05, batch_size=64),
)


def asked(**given: Any) -> Settings:
    known: dict[str, Any] = {
        "name": "tiny",
        "model": "zoo:digits_cnn",
        "model_args": {"widths": [4, 8]},
        "data": "digits",
        "choices": Choices(budget=("macs=0.5", "macs=0.3")),
        "rungs": RUNGS,
        "calibration": 64,
        "accelerator": "cpu",
    }
    return Settings(**{**known, **given})


def laboratory(folder: Path, **given: Any) -> Laboratory:
    settings = asked(**given)
    return Laboratory(settings, read(settings), folder)


@pytest.fixture
def lab(tmp_path: Path) -> Laboratory:
    return laboratory(tmp_path)


def changed(**choices: Any) -> Mapping[str, Any]:
    return {**CONFIG, **choices}


def test_each_rung_measures_more(lab: Laboratory) -> None:
    curves, evaluated, trained = (lab("key", CONFIG, rung) for rung in range(3))
    assert set(curves["metrics"]) == {"macs", "params", "bytes", "activations", "predicted_loss"}
    assert set(evaluated["metrics"]) == {"macs", "params", "bytes", "activations", "loss", "accuracy"}
    assert trained["metrics"]["loss"] < evaluated["metrics"]["loss"]
    assert curves["sizes"] == trained["sizes"]
    assert evaluated["metrics"]["macs"] <= 0.5 * lab.network.cost().macs
    assert {path.name for path in lab.results.place("key").iterdir()} >= {
        "0-curves.json", "1-evaluate.json", "2-finetune.json", "config.json", "2-weights.safetensors",
    }  # fmt: skip


def test_nothing_is_measured_twice(lab: Laboratory, monkeypatch: pytest.MonkeyPatch) -> None:
    first = lab("key", CONFIG, 1)
    again = laboratory(lab.folder)
    monkeypatch.setattr(Laboratory, "_find", lambda *given: pytest.fail("measured again"))
    assert again("key", CONFIG, 1) == first


def test_a_plan_is_shared_by_what_differs_in_recovery(lab: Laboratory, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, notes = lab.plan(CONFIG)
    monkeypatch.setattr(Laboratory, "_plan", lambda *given: pytest.fail("planned again"))
    assert lab.plan(changed(recovery="reconstruct")) == (plan, notes)
    assert notes == []


def test_everything_is_the_same_when_it_is_measured_again(tmp_path: Path) -> None:
    once, again = (laboratory(tmp_path / name)("key", CONFIG, 2) for name in ("once", "again"))
    assert {**once, "seconds": 0} == {**again, "seconds": 0}


def test_the_dense_network_stays_as_it_was(lab: Laboratory) -> None:
    before = {name: tensor.clone() for name, tensor in lab.network.model.state_dict().items()}
    about = lab.about
    lab("key", changed(metanet="both", criterion="metanet"), 2)
    for name, tensor in lab.network.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert lab.about == about


def test_methods_get_the_options_of_the_campaign(lab: Laboratory, tmp_path: Path) -> None:
    options = {"criterion.taylor.group": 8, "recovery.recalibrate_norm.passes": "2"}
    given = laboratory(tmp_path / "given", set=options)
    plan, _ = given.plan(CONFIG)
    assert plan.made_by["criterion"] == "taylor(group=8)"
    assert given.recoveries("recalibrate_norm") == [RecalibrateNorm(passes=2)]
    assert given.recoveries("none") == []
    assert lab.recoveries("recalibrate_norm") == [RecalibrateNorm()]
    assert given.settings.identity != lab.settings.identity
    assert "set" not in lab.settings.deciding  # campaigns that were begun before there was such a thing go on


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"criterion.samples": 8}, "`set.criterion.samples`: criterion 'taylor,l2' has no option 'samples'"),
        ({"criterion.group": 0}, "`group >= 1` must hold"),
        ({"criterium.group": 1}, "`set.criterium.group` must name an option of the criterion"),
        ({"recovery.perp.rank": 1}, "it is for recovery 'perp', but 'recalibrate_norm' was chosen"),
    ],
)
def test_options_that_nothing_takes_are_refused_before_anything_begins(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        methods_of(asked(set=options))
    assert said in str(caught.value)


@pytest.mark.parametrize("mode", ["edit", "scores", "both"])
def test_a_metanetwork_may_edit_or_judge(lab: Laboratory, mode: str) -> None:
    criterion = "taylor" if mode == "edit" else "metanet"
    plan, _ = lab.plan(changed(metanet=mode, criterion=criterion))
    assert plan.made_by["criterion"] == criterion
    assert ("metanet" in plan.made_by) == (mode != "scores")


def test_where_an_alignment_is_out_of_reach_half_of_it_is_tried(lab: Laboratory) -> None:
    plan, notes = lab.plan(changed(round_to=8, budget="macs=0.05", floor=0.0))
    assert notes[0].startswith("out of reach in multiples of 8: in multiples of ")
    assert plan.made_by["round_to"] < 8
    with pytest.raises(BudgetError, match="cannot go below"):
        lab.plan(changed(round_to=8, budget="macs=0.001"))


def test_limits_hold_on_top_of_every_budget(tmp_path: Path) -> None:
    lab = laboratory(tmp_path, limits="params=0.3")
    found = lab("key", CONFIG, 0)
    assert found["metrics"]["params"] <= found["limits"]["params"] == 0.3 * lab.network.cost().params


def test_what_is_frozen_stays(tmp_path: Path) -> None:
    lab = laboratory(tmp_path, space=SpaceOptions(freeze=("conv1",), grid=0.25))
    found = lab("key", CONFIG, 0)
    assert "conv1" not in found["sizes"]
    assert {size % 1 for size in found["sizes"].values()} == {0}
    for name, size in found["sizes"].items():
        assert size % (lab.network.axis(name).size // 4) == 0


def test_a_killed_training_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rungs = (Rung(kind="finetune", epochs=3, lr=0.05, batch_size=64),)
    whole = laboratory(tmp_path / "whole", rungs=rungs)("key", CONFIG, 0)
    lab = laboratory(tmp_path / "killed", rungs=rungs)
    monkeypatch.setattr(Laboratory, "quality", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        lab("key", CONFIG, 0)
    monkeypatch.undo()
    assert list((tmp_path / "killed" / "results" / "key").rglob("*.safetensors"))
    resumed = laboratory(tmp_path / "killed", rungs=rungs)("key", CONFIG, 0)
    assert resumed["metrics"] == whole["metrics"]


def test_the_dense_network_is_trained_once(tmp_path: Path) -> None:
    settings = asked(train=Training(epochs=1))
    first, second = read(settings), read(settings)

    class Quiet:
        def start(self, total: int, unit: str, description: str, done: int = 0) -> None:
            pass

        def advance(self, amount: int = 1, status: str = "") -> None:
            pass

        def close(self) -> None:
            pass

    train(settings, first, tmp_path, Quiet())
    written = (tmp_path / "dense.safetensors").stat().st_mtime_ns
    train(settings, second, tmp_path, Quiet())
    assert (tmp_path / "dense.safetensors").stat().st_mtime_ns == written
    for one, other in zip(first.module.state_dict().values(), second.module.state_dict().values()):
        assert torch.equal(one, other)


# ---- latency ---------------------------------------------------------------------------------------------------------


def test_measured_latencies_are_told_and_predicted_ones_learn_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[float] = []

    def ratio(self: Laboratory, slim: torch.nn.Module) -> float:
        measured.append(0.3 + 0.7 * sum(part.numel() for part in slim.parameters()) / self.network.cost().params)
        return measured[-1]

    monkeypatch.setattr(Laboratory, "_ratio", ratio)
    monkeypatch.setattr(Laboratory, "_dense_ms", 2.0)
    settings = asked(
        objectives=("accuracy", "latency_ms"), limits="latency_ms=1.9", rungs=(RUNGS[1],), choices=Choices(
            budget=("macs=0.8", "macs=0.6", "macs=0.4", "macs=0.2"), recovery=("none",), floor=(0.1, 0.05)
        ),
    )  # fmt: skip
    lab = Laboratory(settings, read(settings), tmp_path)
    campaign = Campaign.begin(settings, open_storage(None, tmp_path), lab.about)
    campaign.close("enough")
    work(campaign, lab)
    points = campaign.points(0)
    assert len(points) == 20
    assert len(measured) == len({tuple(sorted(point.sizes.items())) for point in points})
    assert {"latency_ms"} == {name for point in points for name in point.metrics if name.endswith("_ms")}
    for point in points:
        guess = lab.latency_ms(point.sizes, lab.plan(point.config)[0], predicted=True)
        assert guess == pytest.approx(point.metrics["latency_ms"], rel=0.05)


def test_a_table_without_measurements_follows_the_macs(tmp_path: Path) -> None:
    assert Table(Results(tmp_path)).predicted([0.4, 0.9, 0.9]) == pytest.approx(0.4)


def test_a_budget_of_time_is_met_by_a_table_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(network: Network, budget: str) -> Network:
        cost = network.cost()  # without times
        return network.with_latency(lambda sizes: 3.0 * network.cost_many(sizes).macs / cost.macs)

    monkeypatch.setattr(fidelity, "with_times", timed)
    lab = laboratory(tmp_path, choices=Choices(budget={"latency": (0.4, 0.6)}))
    Space.of(lab.network, lab.settings)
    found = lab("key", changed(budget="latency=0.5"), 0)
    assert found["metrics"]["macs"] <= 0.5 * lab.network.cost().macs


@pytest.mark.long
def test_onnxruntime_says_how_long_it_takes(tmp_path: Path) -> None:
    lab = laboratory(tmp_path, objectives=("accuracy", "latency_ms"), rungs=(RUNGS[1],))
    found = lab("key", CONFIG, 0)
    assert 0 < found["metrics"]["latency_ms"] < 100
    assert lab("key", CONFIG, 0) == found
