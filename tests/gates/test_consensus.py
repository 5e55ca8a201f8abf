import copy

import pytest
import torch
from torch import nn

from metaprune.edits import DropBlock
from metaprune.errors import ConfigError
from metaprune.gates import Consensus
from metaprune.gates.consensus import SampleGate, SampleGates, _Agreeing, _Costs, _sites, polarisation
from metaprune.graph import Network, trace
from metaprune.plans import Plan
from tests.gates.conftest import COURSE, build


@pytest.fixture(params=["cifar_resnet20", "vit_tiny"])
def net(request) -> Network:
    return trace(*build(request.param))


@pytest.fixture
def lesson(net, context) -> _Agreeing:
    sites = _sites(net)
    costs = _Costs(net, [name for name, *_ in sites], "macs=0.7")
    return _Agreeing(Consensus(training=COURSE), sites, costs, copy.deepcopy(net.model), context)


def test_every_branch_has_a_gate(net):
    assert [name for name, *_ in _sites(net)] == [block.name for block in net.blocks]


def test_gates_are_binary_for_each_sample_and_learn(lesson, context):
    with torch.no_grad():
        for gate in lesson.gates.each:  # some open, some closed
            gate.fc2.weight.normal_(0, 3)
            gate.fc2.bias.zero_()
    loss = lesson.loss(next(context.train.batches(64)))
    gates = torch.stack([gate.detach() for gate in lesson.gates_now.values()])
    assert set(gates.unique().tolist()) == {0.0, 1.0}
    loss.backward()
    assert all(bool(gate.fc2.bias.grad.any()) for gate in lesson.gates.each)
    assert any(bool(gate.fc1.weight.grad.any()) for gate in lesson.gates.each)


def test_polarisation():
    assert float(polarisation(torch.tensor([0.0, 1.0, 1.0]))) == 0
    assert float(polarisation(torch.tensor([0.5, 0.5]))) == 0.25
    drawn = torch.rand(50)
    assert 0 < float(polarisation(drawn)) <= 0.25


def test_in_consensus_the_static_network_gives_what_the_gated_one_does(lesson, net, context):
    lesson.settle(1, 2)
    names = [name for (name, *_), stays in zip(lesson._sites, lesson.gates.open_K.tolist()) if not stays]
    assert names
    slim = net.apply(Plan(tuple(map(DropBlock, names)))).eval()
    lesson.plain.eval()
    for images, _ in context.train.batches(128):
        with torch.no_grad():
            gated, static = lesson.plain(images), slim(images)
        torch.testing.assert_close(static, gated, rtol=1e-5, atol=1e-6)
    lesson.finished()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lesson.plain.modules())


def test_samples_that_agree_give_what_the_network_without_their_closed_branches_gives(lesson, net, context):
    """Each sample still decides for itself."""
    closed = [name for k, (name, *_) in enumerate(lesson._sites) if k % 2]
    with torch.no_grad():
        for k, gate in enumerate(lesson.gates.each):  # open or closed by more than any input can say
            gate.fc2.weight.mul_(0.01)
            gate.fc2.bias.fill_(-1.0 if k % 2 else 1.0)
    lesson.plain.eval()
    lesson.gates.eval()
    slim = net.apply(Plan(tuple(map(DropBlock, closed)))).eval()
    for images, _ in context.train.batches(128):
        with torch.no_grad():
            gated, static = lesson.plain(images), slim(images)
        assert not bool(lesson.gates.fixed)
        for k, (name, *_) in enumerate(lesson._sites):
            assert lesson.gates_now[name].tolist() == [float(k % 2 == 0)] * len(images)
        torch.testing.assert_close(static, gated, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            assert (slim(images) - net.model(images)).abs().max() > 1e-2


def test_which_stay(net):
    costs = _Costs(net, [block.name for block in net.blocks], "macs=1")
    count = len(net.blocks)
    mean = torch.ones(count)
    mean[1] = 0.5
    assert costs.staying(mean, mean).tolist() == [k != 1 for k in range(count)]
    tight = _Costs(net, [block.name for block in net.blocks], "macs=0.6")
    likely = torch.linspace(1, 0.6, count)  # the last are the least likely
    stays = tight.staying(torch.ones(count), likely).tolist()
    assert stays == sorted(stays, reverse=True)
    left = [name for name, stay in zip(tight.names, stays) if not stay]
    assert net.cost_of(Plan(tuple(map(DropBlock, left)))).macs <= 0.6 * net.cost().macs
    assert net.cost_of(Plan(tuple(map(DropBlock, left[1:])))).macs > 0.6 * net.cost().macs


@pytest.mark.parametrize("shape", [(3, 5), (3, 7, 5), (3, 5, 4, 4)])
def test_a_gate_reads_the_mean_over_positions(shape):
    assert SampleGate(5, 4)(torch.randn(shape)).shape == (3,)


@pytest.mark.parametrize("options", [{"polarise": -1.0}, {"activate": -1.0}, {"hidden": 0}, {"until": 0.0}])
def test_bad_options(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Consensus(**options)


def test_without_branches():
    net = trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 4))
    with pytest.raises(ConfigError, match="residual branch"):
        _sites(net)


def test_gates_remember_only_what_they_saw():
    """One batch that closes a branch is all there is; later ones count for less."""
    torch.manual_seed(0)
    gates = SampleGates([3], Consensus(training=COURSE)).train()
    for bias, open_for in ((-9.0, 0.0), (9.0, 0.5), (9.0, 2 / 3)):
        torch.nn.init.constant_(gates.each[0].fc2.bias, bias)
        gates.gate(0, torch.zeros(4, 3))
        assert float(gates.mean_K[0]) == pytest.approx(open_for)
