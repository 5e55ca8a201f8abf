import copy
from dataclasses import replace

import pytest
import torch

from metaprune import zoo
from metaprune.edits import DropBlock, Keep, Mask
from metaprune.errors import ConfigError
from metaprune.graph import trace
from metaprune.measure import accuracy
from metaprune.pipeline import prune
from metaprune.planning import plan as make_plan
from metaprune.plans import Plan
from metaprune.recovery import Gradual
from metaprune.recovery.gradual import _Way

QUICK = Gradual(epochs=2, batch_size=64, cuts=3, precision="fp32")


@pytest.fixture
def cut(trained, context):
    network = trace(copy.deepcopy(trained), zoo.example_inputs("digits_cnn"))
    plan = make_plan(network, "macs=0.4", criterion="l2", allocator="uniform")
    return network.apply(plan), replace(context, dense=network.model, network=network, plan=plan)


def test_it_ends_at_the_planned_network(cut):
    slim, context = cut
    recovered = QUICK.recover(slim, context)
    assert [p.shape for p in recovered.model.parameters()] == [p.shape for p in slim.parameters()]
    assert [entry["epoch"] for entry in recovered.history] == [1, 2]


def test_every_cut_is_smaller_and_keeps_what_was_learnt(cut):
    """What a cut leaves is what the network before it had there."""
    _, context = cut
    way, before, learnt = _Way(context.network, context.plan), None, None
    for share in (0.25, 0.5, 1.0):
        model = way.next(share, learnt)
        if learnt is not None:
            assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in learnt.parameters())
            again = context.network.spread(way.before, model)
            spread = context.network.spread(before, learnt)
            for name, values in context.network.spread(way.before, model).items():
                assert torch.equal(values, again[name])
                assert torch.equal(values, spread[name])  # units that left have the numbers that they had last
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        before, learnt = way.before, model
    assert {edit.axis: edit.kept for edit in way.before.edits if isinstance(edit, Keep)} == context.plan.draft().keep


def test_it_heals(cut, digits):
    slim, context = cut
    recovered = Gradual(epochs=4, batch_size=64, until=0.5).recover(slim, replace(context, train=digits.train))
    assert accuracy(recovered.model, digits.validation).top1 > accuracy(slim, digits.validation).top1 + 10


def test_branches_and_masks_come_too(context):
    model = zoo.build("cifar_resnet20", in_channels=1, widths=(4, 6, 8))
    network = trace(model.eval(), torch.randn(2, 1, 8, 8))
    axis = next(axis for axis in network.axes if axis.prunable and axis.size == 6)
    shape = network.shapes["linear.weight"]
    plan = Plan(
        (DropBlock("layer1.0"), DropBlock("layer3.2"), Keep(axis.name, 6, (1, 2, 5)),
         Mask("linear.weight", torch.arange(shape[0] * shape[1]).view(shape) % 3 > 0))
    )  # fmt: skip
    slim = network.apply(plan)
    masks = network.masks(plan)
    context = replace(context, dense=model, network=network, plan=plan, masks=masks)
    recovered = replace(QUICK, epochs=1).recover(slim, context)
    assert recovered.model.state_dict().keys() == slim.state_dict().keys()
    assert not recovered.model.linear.weight[~masks["linear.weight"]].any()


def test_by_the_whole_way(trained, digits, tmp_path):
    result = prune(
        trained, zoo.example_inputs("digits_cnn"), "macs=0.5", data=digits, recovery="gradual",
        recovery_options={"epochs": 1, "cuts": 2}, folder=tmp_path, criterion="l2", calibration=256,
    )  # fmt: skip
    assert result.accuracy["recovered"].top1 > result.accuracy["cut"].top1 - 5
    assert trace(result.model, zoo.example_inputs("digits_cnn")).cost().macs == result.after.macs


def test_stages_end_with_everything_gone():
    for steps in range(1, 30):
        for recipe in (Gradual(), Gradual(cuts=1), Gradual(cuts=40, until=1.0), Gradual(schedule="cubic")):
            stages = list(recipe.stages(steps))
            assert stages[-1] == (1.0, steps)
            assert [end for _, end in stages] == sorted({end for _, end in stages})
            assert [share for share, _ in stages] == sorted(share for share, _ in stages)


@pytest.mark.parametrize("options", [{"cuts": 0}, {"until": 1.5}, {"schedule": "steep"}])
def test_bad_options(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Gradual(**options)
