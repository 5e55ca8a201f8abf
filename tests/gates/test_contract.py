"""What every gating promises, for every registered name: the budget is met, and the shrunk network is the gated one."""

from dataclasses import replace

import pytest
import torch

from metaprune.errors import BudgetError, ConfigError
from metaprune.gates import GATES, Gating
from metaprune.graph import trace
from metaprune.plans import Plan
from metaprune.recovery import NoProgress
from tests.gates.conftest import COURSE, build
from tests.graph import oracle


@pytest.fixture(params=list(GATES))
def gating(request: pytest.FixtureRequest) -> Gating:
    return GATES[request.param](training=COURSE)


@pytest.fixture
def net(gating):
    return trace(*build("cifar_resnet20"))


def test_names_are_file_names():
    for name in GATES:
        assert GATES[name].__module__ == f"metaprune.gates.{name}"
        assert GATES[name].name == name


def test_the_budget_is_met_and_nothing_given_changes(gating, net, context, tmp_path):
    before = oracle.footprint(net.model)
    gated = gating.prune(net, "macs=0.6", context)
    oracle.same_footprint(before, oracle.footprint(net.model))
    dense = net.cost().macs
    assert net.cost_of(gated.plan).macs <= 0.6 * dense
    assert trace(gated.model, net.example_inputs).cost().macs == net.cost_of(gated.plan).macs
    assert gated.verification.passed(1e-5)
    assert len(gated.history) == COURSE.epochs
    again = net.apply(Plan.load(gated.plan.save(tmp_path / "plan.json"))).eval()
    with torch.no_grad():
        assert torch.equal(again(net.example_inputs), gated.model(net.example_inputs))


def test_the_same_twice(gating, net, context):
    one, other = (gating.prune(net, "macs=0.7", context) for _ in range(2))
    assert one.plan == other.plan


class Stop(NoProgress):
    def __init__(self, step: int) -> None:
        self.left = step

    def advance(self, amount: int = 1, status: str = "") -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [3, 8, 12])
def test_after_a_kill_it_goes_on_bit_for_bit(step, gating, net, context, tmp_path):
    whole = gating.prune(net, "macs=0.7", replace(context, calibration=None) if not COURSE.recalibrate else context)
    context = replace(context, folder=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        gating.prune(net, "macs=0.7", replace(context, progress=Stop(step + 1)))  # the first is the re-estimation
    resumed = gating.prune(net, "macs=0.7", replace(context, resume=True))
    assert resumed.plan == whole.plan


def test_a_budget_out_of_reach_is_refused_before_any_work(gating, net, context):
    with pytest.raises(BudgetError, match="macs must reach"):
        gating.prune(net, "macs=0.000001", replace(context, train=None))


def test_missing_samples_are_refused(gating, net, context):
    with pytest.raises(ConfigError, match="samples to train on"):
        gating.prune(net, "macs=0.7", replace(context, train=None))


def test_a_network_without_anything_to_gate_is_refused(gating, context):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    with pytest.raises(ConfigError, match="but it has none"):
        gating.prune(trace(model, torch.randn(2, 1, 8, 8)), "macs=0.5", context)


def test_budget_one_is_everything(gating, net, context):
    """Nothing leaves: no unit, and no branch, whose gates are open to begin with and may close only for the task."""
    gated = gating.prune(net, "macs=1", context)
    assert {edit.kind for edit in gated.plan.edits} <= {"set_weight"}
    assert net.cost_of(gated.plan) == net.cost()
    if gating.name == "ecodiff":  # weights stay too
        assert gated.plan.edits == ()
        for name, tensor in gated.model.state_dict().items():
            assert torch.equal(tensor, net.model.state_dict()[name])
