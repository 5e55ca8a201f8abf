"""Verification must tell a right network from one with a planted fault."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metaprune.edits import Keep, SetWeight
from metaprune.errors import InputError
from metaprune.graph import trace
from metaprune.plans import Plan
from tests.graph import oracle
from tests.graph.cases import CASES


@pytest.fixture
def cut():
    """A network of two normalised convolutions, a plan for it, and what came out."""
    model, inputs = oracle.build(CASES["plain"])
    net = trace(model, inputs)
    plan = oracle.random_plan(net, 0)
    return net, plan, net.apply(plan)


def test_a_right_network_passes(cut):
    net, plan, slim = cut
    found = net.verify(plan, slim=slim)
    assert found.max_error < 1e-5
    assert found.passed()
    assert found.samples == 2
    assert found.scale > 0
    assert net.verify(plan).max_error < 1e-5


def swap_channels(slim):
    slim.a.weight[[0, 1]] = slim.a.weight[[1, 0]]


def swap_consumer(slim):
    slim.b.weight[:, [0, 1]] = slim.b.weight[:, [1, 0]]


def other_epsilon(slim):
    slim.bn.eps = 1e-2


def other_statistics(slim):
    slim.bn.running_var *= 1.01


def forgotten_bias(slim):
    slim.b.bias.zero_()


def one_weight(slim):
    slim.head.out.weight[0, 0] += 1.0


def not_a_number(slim):
    slim.head.out.weight[0, 0] = float("nan")


def infinite(slim):
    slim.head.out.bias[0] = float("inf")


def other_padding(slim):
    slim.a.padding_mode = "reflect"
    slim.a._reversed_padding_repeated_twice = [1, 1, 1, 1]


def other_activation(slim):
    slim.b.register_forward_hook(lambda module, args, out: out * 1.001)


FAULTS = [
    swap_channels,
    swap_consumer,
    other_epsilon,
    other_statistics,
    forgotten_bias,
    one_weight,
    not_a_number,
    infinite,
    other_padding,
    other_activation,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_caught(cut, fault):
    net, plan, slim = cut
    with torch.no_grad():
        fault(slim)
    assert not net.verify(plan, slim=slim).passed(1e-4)


def test_the_dense_network_is_no_cut_one(cut):
    net, plan, _ = cut
    assert not net.verify(plan, slim=copy.deepcopy(net.model)).passed(1e-4)


def test_the_result_of_another_plan_is_caught(cut):
    net, plan, _ = cut
    assert not net.verify(plan, slim=net.apply(oracle.random_plan(net, 5))).passed(1e-4)


def test_an_output_that_is_missing_or_of_another_shape_is_no_pass(cut):
    net, plan, slim = cut
    slim.head.out = nn.Linear(6 if slim.head.out.in_features == 6 else slim.head.out.in_features, 2)
    with pytest.raises(Exception):  # noqa: B017, PT011  it must not pass, however it says so
        assert net.verify(plan, slim=slim).passed(1e-4)


def test_modes_come_back(cut):
    net, plan, slim = cut
    slim.train()
    slim.bn.eval()
    before = [module.training for module in slim.modules()]
    state = copy.deepcopy(slim.state_dict())
    net.verify(plan, slim=slim)
    assert [module.training for module in slim.modules()] == before
    assert all(torch.equal(tensor, slim.state_dict()[name]) for name, tensor in state.items())


def test_modes_come_back_after_a_failure(cut):
    net, plan, slim = cut
    slim.train()
    with pytest.raises(Exception):  # noqa: B017, PT011  whatever the forward raises
        net.verify(plan, torch.randn(2, 5, 6, 6), slim=slim)
    assert slim.training


def test_given_inputs_of_another_batch_and_size(cut):
    net, plan, slim = cut
    found = net.verify(plan, torch.randn(5, 3, 9, 7), slim=slim)
    assert found.max_error < 1e-5
    assert found.samples == 5


def test_inputs_stay_as_they_are(cut):
    net, plan, slim = cut
    inputs = torch.randn(2, 3, 6, 6)
    given = inputs.clone()
    net.verify(plan, inputs, slim=slim)
    assert torch.equal(inputs, given)


def test_a_network_that_writes_into_its_input():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.b(F.relu(self.a(x.mul_(2))))

    inputs = torch.randn(4, 8)
    given = inputs.clone()
    net = trace(Writes().eval(), inputs)
    plan = oracle.random_plan(net, 0)
    assert net.verify(plan).max_error < 1e-5
    assert torch.equal(inputs, given)


def test_new_weights_of_the_plan_count():
    model, inputs = oracle.build(CASES["plain"])
    net = trace(model, inputs)
    plan = Plan((SetWeight("b.weight", torch.randn(6, 8, 3, 3)), *oracle.random_plan(net, 0).edits))
    slim = net.apply(plan)
    assert net.verify(plan, slim=slim).max_error < 1e-5
    assert not net.verify(Plan(plan.edits[1:]), slim=slim).passed(1e-4)


def test_random_numbers_in_the_forward_do_not_count_as_an_error():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.b(F.relu(self.a(x + torch.randn_like(x))))

    net = trace(Noisy(), torch.randn(4, 8))
    assert net.verify(oracle.random_plan(net, 0)).max_error < 1e-5


def test_integer_outputs_are_compared_too():
    class Classes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.b(F.relu(self.a(x))).argmax(-1)

    torch.manual_seed(0)
    net = trace(Classes(), torch.randn(64, 8))
    plan = oracle.random_plan(net, 0)
    slim = net.apply(plan)
    with torch.no_grad():
        slim.b.weight.neg_()
    assert not net.verify(plan, slim=slim).passed(1e-4)


def test_a_network_without_weights_is_refused():
    net = trace(CASES["plain"].make().to("meta"), torch.randn(2, 3, 6, 6, device="meta"))
    plan = oracle.random_plan(net, 0)
    slim = net.cut(plan).module
    assert slim.a.weight.is_meta
    with pytest.raises(InputError, match=r"'a\.weight' is on the meta device.*--stream"):
        net.apply(plan)
    with pytest.raises(InputError, match="real weights and inputs"):
        net.verify(plan, slim=slim)


@pytest.mark.parametrize("name", ["layer_norm_after_permute", "softmax_over_channels", "rms_norm", "group_norm_of_one"])
def test_statistics_of_the_dense_network_are_caught(name):
    """Zeroing alone, without statistics over the kept units, gives another network; the checker knows the two apart."""
    model, inputs = oracle.build(CASES[name])
    net = trace(model, inputs)
    plan = oracle.random_plan(net, 0)
    slim = net.apply(plan)
    kept = oracle.kept_positions(model, slim)
    with torch.no_grad():
        zeroed = oracle.call(oracle.masked(model, kept), inputs)
        assert oracle.difference(zeroed, oracle.call(slim, inputs)) > 1e-4
    assert net.verify(plan, slim=slim).max_error < 1e-5


def test_an_identity_plan_changes_nothing():
    model, inputs = oracle.build(CASES["residual"])
    net = trace(model, inputs)
    keep = Plan(tuple(Keep(axis.name, axis.size, tuple(range(axis.size))) for axis in net.axes))
    for plan in (Plan(()), keep):
        slim = net.apply(plan)
        with torch.no_grad():
            assert torch.equal(oracle.call(slim, inputs)[0], oracle.call(model, inputs)[0])
        assert net.verify(plan, slim=slim).max_error == 0


class Cancelling(nn.Module):
    """Returns a difference that is hardly larger than what rounding makes of its terms."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 512), nn.Linear(512, 1)
        nn.init.normal_(self.b.weight, 1.0, 1e-5)

    def forward(self, x):
        hidden = self.a(x).relu()
        return self.b(hidden) - hidden.sum(1, keepdim=True)


def test_float64_tells_rounding_from_a_fault():
    torch.manual_seed(0)
    net = trace(Cancelling(), torch.randn(4, 8))
    plan = Plan((Keep("a", 512, tuple(range(0, 512, 3))),))
    slim = net.apply(plan)
    found = net.verify(plan, slim=slim)
    assert found.doubled
    assert found.max_error < 1e-9
    slim.b.bias.data += 1e-4
    faulty = net.verify(plan, slim=slim)
    assert not faulty.doubled
    assert not faulty.passed()
