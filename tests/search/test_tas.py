"""Widths that are learnt by gradients."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import metaprune as mp
from metaprune import zoo
from metaprune.allocate import ALLOCATORS, Problem
from metaprune.edits import DropBlock
from metaprune.errors import ConfigError, InputError
from metaprune.graph import Network, trace
from metaprune.search.supernet import Supernet
from metaprune.search.tas import Distributions, Tas
from metaprune.task import FeatureMatching

QUICK = Tas(steps=40, batch=32)
DEEP = Tas(steps=100, batch=32, depth=True, weight_rate=0.0)


def chain() -> tuple[Network, Tensor]:
    """Most units of the first hidden axis are read by nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        model[2].weight[:, :11] = 0
    return trace(model, torch.zeros(2, 5)), torch.randn(256, 5)


def problem(network: Network, x: Tensor, budget: float = 0.6, **options: Any) -> Problem:
    """Units are worth the norm of what reads them."""
    model = network.model
    assert isinstance(model, nn.Sequential)
    hidden = [axis for axis in network.axes if axis.prunable]
    scores = {axis.name: model[2 * k + 2].weight.detach().norm(dim=0).double() for k, axis in enumerate(hidden)}
    given = {"batches": lambda: ((part,) for part in x.split(64)), "task": FeatureMatching(model), **options}
    return Problem(network, scores, {"macs": budget * network.cost().macs}, floor=0.0, **given)


def test_what_nobody_needs_becomes_narrow() -> None:
    network, x = chain()
    asked = problem(network, x)
    first, second = asked.axes
    found = asked.filled(replace(QUICK, weight_rate=0.0).learn(asked).derived())
    assert found[network.index(first.name)] <= 8
    assert found[network.index(second.name)] == 16
    even = asked.full.copy()
    for name, ranks in ALLOCATORS["uniform"]().allocate(asked).items():
        even[network.index(name)] = len(ranks)
    levels = {
        axis.name: np.unique([int(one[network.index(axis.name)]) for one in (even, found)]) for axis in asked.axes
    }
    net = Supernet(asked, levels)
    assert net.rate(found) < 0.2 * net.rate(even)
    assert asked.fits(found)


def test_the_same_seed_gives_the_same_sizes_and_nothing_else_changes() -> None:
    network, x = chain()
    asked = problem(network, x)
    before = {name: tensor.clone() for name, tensor in network.model.state_dict().items()}
    state = torch.get_rng_state()
    first, again = (QUICK.learn(asked) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert (first.derived() == again.derived()).all()
    assert all(torch.equal(*pair) for pair in zip(first.logits, again.logits))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.model.parameters())


def test_two_widths_are_mixed_in_a_draw() -> None:
    network, x = chain()
    asked = problem(network, x)
    chosen = Distributions(asked, (0.25, 0.5, 0.75, 1.0), 2, [])
    for heat in (5.0, 0.1):
        torch.manual_seed(0)
        chosen.draw(heat)
        for axis in asked.axes:
            gate_U = chosen()[axis.name].detach()
            order = asked.scores[axis.name].argsort(descending=True)
            assert (gate_U[order].diff() <= 1e-6).all()  # the best units are in every mask
            assert gate_U.round(decimals=4).unique().numel() <= 3  # in both, in one, in none
            assert float(gate_U.max()) == pytest.approx(1)
    assert float(chosen.expected().detach()[network.index(asked.axes[0].name)]) == pytest.approx(
        float(chosen.logits[0].softmax(0).detach() @ torch.tensor([4.0, 8, 12, 16]).double()), rel=1e-6
    )


def test_all_shrink_alike_where_the_likeliest_cost_too_much() -> None:
    network, x = chain()
    asked = problem(network, x, budget=0.4)
    chosen = Distributions(asked, (0.25, 0.5, 0.75, 1.0), 2, [])
    with torch.no_grad():
        for logit_W in chosen.logits:
            logit_W[-1] = 100.0
    assert not asked.fits(chosen.likely())
    found = chosen.derived()
    shares = [found[network.index(axis.name)] / axis.size for axis in asked.axes]
    assert asked.fits(found)
    assert max(shares) - min(shares) <= 1 / 16


def residual() -> Problem:
    """A network of images, one of whose residual branches adds nothing."""
    example = zoo.example_inputs("digits_cnn")
    torch.manual_seed(0)
    model = zoo.build("digits_cnn").eval()
    network = trace(model, example)
    block = network.blocks[0]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in block.parameters and name.endswith(("bn2.weight", "bn2.bias")):
                parameter.zero_()
    x = torch.randn(128, *example.shape[1:])
    scores = {axis.name: torch.rand(axis.size).double() for axis in network.axes if axis.prunable}
    limits = {"macs": 0.5 * network.cost().macs}
    return Problem(network, scores, limits, batches=lambda: iter([(x,)]), task=FeatureMatching(model))


def test_branches_leave_only_with_depth() -> None:
    asked = residual()
    kept = QUICK.allocate(asked)
    assert all(kept.values())
    found = DEEP.learn(asked)
    assert len(found.branches) == 2
    assert [int(logit_2.argmax()) for logit_2 in found.stays] == [0, 1]  # the first one adds nothing
    sizes = found.derived()
    assert (sizes[list(found.branches[0].places)] == 0).all()
    assert asked.fits(sizes)


def test_a_plan_drops_them() -> None:
    asked = residual()
    network = asked.network
    batches = [(torch.randn(32, 1, 8, 8), torch.arange(32) % 10) for _ in range(4)]
    plan = mp.plan(network, "macs=0.3", "l2", DEEP, data=batches)
    assert any(isinstance(edit, DropBlock) for edit in plan.edits)
    assert network.cost_of(plan).macs <= 0.3 * network.cost().macs
    assert network.verify(plan).passed()
    again = mp.plan(network, "macs=0.3", "l2", QUICK, data=batches)
    assert not any(isinstance(edit, DropBlock) for edit in again.edits)


def test_an_interrupt_gets_through() -> None:
    network, x = chain()
    runs: list[int] = []

    class Interrupted(FeatureMatching):
        def outputs(self, model: Any, batch: Any) -> Any:
            runs.append(1)
            if len(runs) == 9:
                raise KeyboardInterrupt
            return model(batch[0])

    with pytest.raises(KeyboardInterrupt):
        QUICK.allocate(problem(network, x, task=Interrupted(network.model)))


def test_what_diverges_is_refused() -> None:
    network, x = chain()
    with pytest.raises(InputError, match="must be finite"):
        replace(QUICK, weight_rate=1e12).allocate(problem(network, x))


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"steps": 0}, "steps >= 1"),
        ({"sampled": 0}, "sampled >= 1"),
        ({"samples": 1}, "samples >= 2"),
        ({"rate": 0.0}, "0 < rate"),
        ({"cold": float("inf")}, "0 < cold"),
        ({"weight_rate": -1.0}, "weight_rate >= 0"),
        ({"widths": (0.0, 1.0)}, "0 < width"),
        ({"widths": ()}, "0 < width"),
        ({"tolerance": 2.0}, "tolerance <= 1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        Tas(**options)
