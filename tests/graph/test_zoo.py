"""Every network of the zoo, cut at random: against the masked one, against the oracle, and with its costs counted."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from metaprune import zoo
from metaprune.graph import Network, trace
from tests.graph import oracle
from tests.graph.cases import Case

every_model = pytest.mark.parametrize("name", list(zoo.MODELS))


@cache
def traced(name: str) -> tuple[Case, nn.Module, Tensor, Network]:
    case = Case(name, lambda: zoo.build(name), lambda: zoo.example_inputs(name))
    model, inputs = oracle.build(case)
    return case, model, inputs, trace(model, inputs)


@every_model
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_cut_network_is_the_masked_one_and_costs_what_was_said(name, seed):
    _, model, inputs, net = traced(name)
    plan = oracle.random_plan(net, seed, fraction=(0.2, 0.4, 0.6)[seed])
    cut = net.cut(plan)
    assert cut.way == "attributes"
    assert net.verify(plan, slim=cut.module).max_error <= 1e-5
    for network, cost in ((model, net.cost()), (cut.module, net.cost(net.sizes(plan)))):
        assert cost.macs * len(inputs) == oracle.counted_macs(network, inputs)
        assert cost.params == sum(parameter.numel() for parameter in network.parameters())


@every_model
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long)])
def test_an_oracle_that_shares_no_code_says_the_same(name, seed):
    """Where no norm or softmax is taken over an axis; the others are in `cases.py`, against modules made by hand."""
    case, model, inputs, net = traced(name)
    plan = oracle.random_plan(net, seed, axes=[axis for axis in net.axes if not axis.changes])
    slim = net.apply(plan)
    with torch.no_grad():
        wanted = oracle.call(oracle.masked(oracle.build(case)[0], oracle.kept_positions(model, slim)), inputs)
        assert oracle.difference(wanted, oracle.call(slim, inputs)) <= 1e-5


@every_model
def test_nearly_everything_is_prunable(name):
    """All but the inputs, the outputs and kernel positions; a parameter counts where any dimension of it is free."""
    _, model, _, net = traced(name)
    free = {parameter for axis in net.axes if axis.prunable for parameter, _ in axis.bindings}
    sizes = {parameter: tensor.numel() for parameter, tensor in oracle.named(model).items()}
    assert sum(sizes[parameter] for parameter in free) >= 0.99 * sum(sizes.values())
