"""Variants of layers against least squares from scratch, and configurations against networks that are really cut."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from metaprune import zoo
from metaprune.allocate import Problem, Sizes
from metaprune.edits import Keep, SetWeight
from metaprune.errors import ConfigError, InputError
from metaprune.graph import Network, trace
from metaprune.plans import Plan
from metaprune.search import supernet as module
from metaprune.search.supernet import Supernet
from metaprune.task import FeatureMatching

RIDGE = 1e-3


def problem(network: Network, x: Tensor, **options: Any) -> Problem:
    """Random scores, half of the multiply-accumulates, one batch."""
    generator = torch.Generator().manual_seed(0)
    scores = {axis.name: torch.rand(axis.size, generator=generator).double() for axis in network.axes if axis.prunable}
    given = {"batches": lambda: iter([(x,)]), "task": FeatureMatching(network.model), **options}
    return Problem(network, scores, {"macs": network.cost().macs / 2}, **given)


def quarters(asked: Problem) -> dict[str, Sizes]:
    return {
        axis.name: np.unique([asked.aligned(axis, axis.size * share) for share in (0.25, 0.5, 0.75, 1)])
        for axis in asked.axes
    }


def drawn(asked: Problem, levels: dict[str, Sizes], seed: int) -> Sizes:
    sizes, random = asked.full.copy(), np.random.default_rng(seed)
    for name, sizes_L in levels.items():
        sizes[asked.network.index(name)] = random.choice(sizes_L)
    return sizes


@pytest.mark.parametrize("name", ["digits_cnn", "vit_tiny", "gru_classifier", "cifar_resnext29"])
def test_a_configuration_is_the_network_that_is_cut_and_healed_there(name: str) -> None:
    example = zoo.example_inputs(name)
    network, x = trace(zoo.build(name).eval(), example), torch.randn(4, *example.shape[1:])
    asked = problem(network, x)
    levels = quarters(asked)
    net = Supernet(asked, levels, samples=4, chunk=4, rows=256)
    for seed in range(3):
        sizes = drawn(asked, levels, seed)
        alive = net.put(sizes)
        with net._statistics(alive), torch.no_grad():
            seen = net.model(x)
        healed: dict[str, Tensor] = {}
        for layer in net.layers.values():
            healed |= net.variant(layer, layer.key(sizes))
        kept = {axis: int(sizes[network.index(axis.name)]) for axis in asked.axes}
        keeps = (Keep(axis.name, axis.size, asked.best(axis, left)) for axis, left in kept.items() if left < axis.size)
        slim = network.apply(Plan((*(SetWeight(key, value.clone()) for key, value in healed.items()), *keeps)))
        with torch.no_grad():
            wanted = slim.eval()(x)
        assert float((seen - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def chain() -> tuple[Network, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    return trace(model.double().eval(), torch.zeros(2, 5).double()), torch.randn(64, 5).double()


def least_squares(x_BD: Tensor, layer: nn.Linear, wanted_BO: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias for the inputs that stay, from scratch; the ridge draws towards the layer's own weights."""
    far_BD = x_BD - x_BD.mean(0)
    h_DD = far_BD.T @ far_BD / len(x_BD)
    ridge_DD = RIDGE * h_DD.diagonal().mean() * torch.eye(len(h_DD)).double()
    aim_DO = far_BD.T @ (wanted_BO - wanted_BO.mean(0)) / len(x_BD) + ridge_DD @ layer.weight.T
    weight_OD = torch.zeros_like(layer.weight)
    weight_OD[:, kept] = torch.linalg.solve((h_DD + ridge_DD)[kept][:, kept], aim_DO[kept]).T
    return weight_OD, wanted_BO.mean(0) - x_BD.mean(0) @ weight_OD.T


@torch.no_grad()
def test_layers_read_the_expectation_over_the_variants_before_them() -> None:
    network, x_BD = chain()
    asked = problem(network, x_BD)
    levels = {axis.name: np.array([2, 4, 8]) for axis in asked.axes}
    net = Supernet(asked, levels, samples=64, chunk=64, rows=1 << 20, ridge=RIDGE)
    model = network.model
    assert isinstance(model, nn.Sequential)
    reads_BD = dense_BD = torch.relu(model[0](x_BD))
    for place, (axis, layer) in enumerate(zip(asked.axes, net.layers.values(), strict=True)):
        linear = model[2 * place + 2]
        assert isinstance(linear, nn.Linear)
        gives = []
        for size in (2, 4, 8):
            kept = torch.tensor(asked.best(axis, size))
            weight_OD, bias_O = least_squares(reads_BD, linear, linear(dense_BD), kept)
            variant = net.variant(layer, (size,))
            torch.testing.assert_close(variant[layer.call.weight], weight_OD, rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(variant[layer.call.intercept], bias_O, rtol=1e-6, atol=1e-8)
            gives.append(reads_BD @ weight_OD.T + bias_O)
        share_E = torch.tensor([2, 4, 8]).double() / 14  # (1 - S_e) / sum (1 - S_e)
        reads_BD = torch.relu(sum(share * given for share, given in zip(share_E, gives, strict=True)))
        dense_BD = torch.relu(linear(dense_BD))
    assert len(net.layers) == 3


def test_the_dense_configuration_has_no_error_and_others_leave_no_trace() -> None:
    network, x = chain()
    asked = problem(network, x)
    levels = quarters(asked)
    net = Supernet(asked, levels, samples=64, chunk=16)
    one, other = drawn(asked, levels, 1), drawn(asked, levels, 2)
    first = net.rate(one)
    assert net.rate(asked.full) == 0
    assert first > 0
    assert net.rate(other) != first
    assert net.rate(one) == first
    for name, tensor in network.model.state_dict().items():
        assert torch.equal(tensor, net.dense[name])
    net.rate(asked.full)
    assert all(torch.equal(net.own[name], tensor) for name, tensor in net.dense.items())


def test_what_a_ceiling_takes_is_gone() -> None:
    network, x = chain()
    asked = problem(network, x, ceiling=0.5)
    levels = {axis.name: np.array([2, 4]) for axis in asked.axes}
    net = Supernet(asked, levels, samples=64, chunk=16)
    other = asked.full.copy()
    other[network.index(asked.axes[0].name)] = 2
    first = net.rate(asked.full)  # four of eight units of every axis
    assert first > 0
    assert net.rate(other) != first == net.rate(asked.full)


def test_parts_of_the_data_are_rated_alone() -> None:
    network, x = chain()
    asked = problem(network, x)
    levels = quarters(asked)
    net = Supernet(asked, levels, samples=64, chunk=16)
    sizes = drawn(asked, levels, 1)
    assert len(net.chunks) == 4
    parts = [net.rate(sizes, [part]) for part in range(4)]
    assert min(parts) < net.rate(sizes) < max(parts)


def test_variants_of_layers_that_read_several_axes_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only so many are kept, and what was let go of comes back as it was."""
    monkeypatch.setattr(module, "_KEPT", 2)
    example = zoo.example_inputs("vit_tiny")
    network = trace(zoo.build("vit_tiny").eval(), example)
    asked = problem(network, torch.randn(4, *example.shape[1:]))
    levels = quarters(asked)
    net = Supernet(asked, levels, samples=4, chunk=4, rows=256)
    first = net.rate(drawn(asked, levels, 0))
    for seed in range(1, 5):
        net.rate(drawn(asked, levels, seed))
    several = [layer for layer in net.layers.values() if len(layer.units) > 1]
    assert several
    assert all(len(layer.variants) <= 2 for layer in several)
    assert net.rate(drawn(asked, levels, 0)) == first


def test_bad_data_are_refused() -> None:
    network, x = chain()
    for rule, batches in {"at least one batch": [], "must be finite": [(x / 0,)]}.items():
        with pytest.raises(InputError, match=rule):
            Supernet(problem(network, x, batches=lambda batches=batches: iter(batches)), {})


def test_sizes_between_levels_are_refused() -> None:
    network, x = chain()
    asked = problem(network, x)
    net = Supernet(asked, {axis.name: np.array([2, 4, 8]) for axis in asked.axes}, samples=64)
    sizes = asked.full.copy()
    sizes[network.index(asked.axes[0].name)] = 3
    with pytest.raises(ConfigError, match=r"must be at levels of the supernet, but .* has no variant for \(3,\)"):
        net.rate(sizes)
