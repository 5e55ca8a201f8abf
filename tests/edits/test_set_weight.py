"""SetWeight."""

import pytest
import torch

from metaprune.edits import Keep, SetWeight
from metaprune.graph import trace
from metaprune.plans import Plan
from tests.graph import oracle
from tests.graph.cases import CASES


@pytest.fixture(scope="module")
def net():
    return trace(*oracle.build(CASES["plain"]))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (SetWeight("nowhere", torch.zeros(3)), "no parameter or buffer 'nowhere'"),
        (SetWeight("b.bias", torch.zeros(5)), "shape (6,)"),
        (SetWeight("b.bias", torch.tensor([float("nan")] * 6)), "finite"),
        (SetWeight("b.bias", torch.tensor([float("inf")] * 6)), "finite"),
    ],
)
def test_refusals(edit, reason, net):
    assert reason in edit.check(net)


def test_values_are_cut_with_the_axis(net):
    value = torch.randn(8)
    slim = net.apply(Plan((Keep("a", 8, (1, 4)), SetWeight("a.bias", value))))
    assert torch.equal(slim.a.bias, value[[1, 4]])
    assert slim.a.bias.requires_grad


def test_the_last_value_counts(net):
    slim = net.apply(Plan((SetWeight("b.bias", torch.zeros(6)), SetWeight("b.bias", torch.ones(6)))))
    assert torch.equal(slim.b.bias, torch.ones(6))
    assert not torch.equal(net.model.b.bias, torch.ones(6))


def test_a_buffer_can_be_set(net):
    slim = net.apply(
        Plan((SetWeight("bn.running_var", torch.full((8,), 2.0)), SetWeight("bn.num_batches_tracked", torch.tensor(7))))
    )
    assert slim.bn.running_var.tolist() == [2.0] * 8
    assert slim.bn.num_batches_tracked.item() == 7
    assert slim.bn.num_batches_tracked.dtype == torch.int64
