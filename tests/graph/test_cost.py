"""Costs: polynomials against networks that were really built."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metaprune as mp
from metaprune import zoo
from metaprune.edits import Keep
from metaprune.errors import ConfigError
from metaprune.graph import Cost, trace
from metaprune.plans import Plan
from tests.graph import oracle
from tests.graph.cases import CASES

BUILT = (
    "residual concat_of_concat dense_blocks depthwise_multiplier grouped shuffle_by_view pixel_shuffle unfold_linear "
    "raw_einsum lstm_deep_both_ways attention_unbind grouped_query_llama rotary_halves experts_fused mamba_like unet "
    "mlp_mixer tied_embedding flatten_to_linear conv_3d"
).split()


def random_sizes(net, count, seed=0):
    random = np.random.default_rng(seed)
    return np.stack(
        [random.integers(2, axis.size + 1, count) if axis.prunable else np.full(count, axis.size) for axis in net.axes],
        1,
    )


@pytest.mark.parametrize("name", BUILT)
def test_any_size_costs_what_the_network_of_that_size_costs(name):
    model, inputs = oracle.build(CASES[name])
    net = trace(model, inputs)
    sizes = random_sizes(net, 4, seed=len(name))
    many = net.cost_many(sizes)
    for k, row in enumerate(sizes):
        edits = (Keep(axis.name, axis.size, tuple(range(size))) for axis, size in zip(net.axes, row.tolist()))
        plan = Plan(tuple(edits))
        assert net.sizes(plan).tolist() == row.tolist()
        slim, one = net.apply(plan), net.cost(row)
        batch = len(oracle.tensors(inputs)[0])
        assert one.params == many.params[k] == sum(tensor.numel() for tensor in slim.parameters())
        assert one.macs == many.macs[k]
        if "lstm" not in name:
            assert one.macs * batch == pytest.approx(oracle.counted_macs(slim, inputs), abs=batch / 2)
        assert one.bytes == many.bytes[k]
        assert one.activations == many.activations[k] == trace(slim, inputs).cost().activations


@pytest.mark.parametrize("name", BUILT)
def test_a_smaller_network_never_costs_more(name):
    net = trace(*oracle.build(CASES[name]))
    big = random_sizes(net, 20)
    small = big - 1
    small[:, [not axis.prunable for axis in net.axes]] = big[:, [not axis.prunable for axis in net.axes]]
    for quantity in ("macs", "params", "bytes", "activations"):
        assert (net.cost_many(small)[quantity] <= net.cost_many(big)[quantity]).all()


def test_plain_network_by_hand():
    model, inputs = oracle.build(CASES["plain"])
    cost = trace(model, inputs).cost()
    assert cost.params == 8 * 27 + 8 + 16 + 6 * 72 + 6 + 3 * 6 + 3
    assert cost.macs == 36 * 8 * 27 + 36 * 6 * 72 + 3 * 6
    assert cost.bytes == 4 * (cost.params + 16) + 8


def test_costs_are_whole_numbers_of_python_or_arrays():
    net = trace(*oracle.build(CASES["plain"]))
    one, many = net.cost(), net.cost_many([[axis.size for axis in net.axes]] * 3)
    assert isinstance(one, Cost)
    assert isinstance(one.macs, int)
    assert many.macs.shape == (3,)
    assert many.macs.dtype == np.int64
    assert net.cost_many(np.zeros((0, len(net.axes)), int)).macs.shape == (0,)
    with pytest.raises(ConfigError, match="macs"):
        one["flops"]


def test_more_configurations_than_one_chunk():
    net = trace(*oracle.build(CASES["residual"]))
    sizes = random_sizes(net, 10_000)
    many = net.cost_many(sizes)
    for k in (0, 4095, 4096, 9999):
        assert net.cost(sizes[k]).macs == many.macs[k]


@pytest.mark.parametrize("change", [-100, 100])
def test_sizes_outside_of_an_axis_are_refused(change):
    net = trace(*oracle.build(CASES["plain"]))
    sizes = [axis.size for axis in net.axes]
    sizes[0] += change
    with pytest.raises(ConfigError, match=rf"<= {net.axes[0].size}`.*{net.axes[0].name!r}.*size={sizes[0]}"):
        net.cost(sizes)


@pytest.mark.parametrize("sizes", [[1], [[1, 2]], [[[1]]], 3])
def test_sizes_of_another_shape_are_refused(sizes):
    net = trace(*oracle.build(CASES["plain"]))
    with pytest.raises(ConfigError, match="shape"):
        net.cost(sizes)


@pytest.mark.parametrize("sizes", [[1.5] * 9, ["a"] * 9, [float("nan")] * 9, [None] * 9])
def test_sizes_that_are_no_whole_numbers_are_refused(sizes):
    net = trace(*oracle.build(CASES["plain"]))
    with pytest.raises(ConfigError):
        net.cost(sizes[: len(net.axes)])


def test_a_frozen_axis_keeps_its_size():
    """A size below the full one on an axis that can never be cut costs a network that cannot exist."""
    net = trace(*oracle.build(CASES["plain"]))
    sizes = np.array([axis.size for axis in net.axes])
    frozen = next(k for k, axis in enumerate(net.axes) if not axis.prunable and axis.size > 1)
    sizes[frozen] -= 1
    with pytest.raises(ConfigError):
        net.cost(sizes)


class Branched(nn.Module):
    def __init__(self, inner=True):
        super().__init__()
        self.stem, self.out, self.inner = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 3), inner
        if inner:
            self.a, self.bn, self.b = nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Conv2d(5, 6, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        if self.inner:
            x = x + self.b(F.relu(self.bn(self.a(x))))
        return self.out(x.mean((2, 3)))


def test_size_zero_drops_the_branch():
    inputs = torch.randn(2, 3, 6, 6)
    net, short = trace(Branched(), inputs), trace(Branched(inner=False), inputs)
    droppable = [k for k, axis in enumerate(net.axes) if axis.droppable]
    assert [net.axes[k].bindings[0][0] for k in droppable] == ["a.weight"]
    sizes = np.array([axis.size for axis in net.axes])
    sizes[droppable] = 0
    left, wanted = net.cost(sizes), short.cost()
    assert (left.macs, left.params) == (wanted.macs, wanted.params)
    assert left.bytes == wanted.bytes
    assert left.activations == wanted.activations


def test_the_batch_does_not_change_the_cost_of_a_sample():
    model = CASES["residual"].make()
    costs = {trace(model, torch.randn(batch, 3, 6, 6)).cost() for batch in (1, 2, 5)}
    assert len(costs) == 1


@pytest.mark.parametrize("name", ["cifar_resnet8", "vit_tiny", "cifar_mobilenet_v2"])
def test_costs_of_modules_add_up_to_the_cost(name: str) -> None:
    network = mp.trace(zoo.build(name), zoo.example_inputs(name))
    plan = mp.plan(network, "macs=0.6")
    for modules, cost in (
        (network.cost_by_module(), network.cost()),
        (network.cost_by_module(plan), network.cost_of(plan)),
    ):
        assert sum(macs for macs, _ in modules.values()) == pytest.approx(cost.macs)
        assert sum(params for _, params in modules.values()) == pytest.approx(cost.params)
        assert set(modules) <= {path for path, _ in network.model.named_modules()}
