"""Rate-distortion against brute force, on networks whose layers cost products of sizes."""

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from torch import nn

from metaprune.allocate import Problem, RateDistortion
from metaprune.errors import ConfigError
from metaprune.graph import Network, trace

SIZE = 6


def chain(layers: int) -> Network:
    """Axes of six units one after the other, each beside its neighbours in a product."""
    sizes = [5, *[SIZE] * layers, 3]
    return trace(nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes))), torch.zeros(2, 5))


CHAIN = chain(5)


def problem(seed: int, budget: float, quantities: tuple[str, ...] = ("macs",), network: Network = CHAIN) -> Problem:
    random = np.random.default_rng(seed)
    axes = [axis for axis in network.axes if axis.prunable]
    scores = {axis.name: torch.from_numpy(random.random(axis.size) ** 2 * random.lognormal(0, 1)) for axis in axes}
    limits = {q: budget * network.cost()[q] for q in quantities}
    return Problem(network, scores, limits, additive=True, floor=0)


def loss(asked: Problem, sizes: np.ndarray) -> float:
    return float(sum(asked.curve(axis)[sizes[asked.network.index(axis.name)]] for axis in asked.axes))


def brute_force(asked: Problem) -> float:
    places = [asked.network.index(axis.name) for axis in asked.axes]
    rows = np.repeat(asked.full[None], SIZE ** len(places), axis=0)
    rows[:, places] = list(product(range(1, SIZE + 1), repeat=len(places)))
    many = asked.network.cost_many(rows)
    fits = np.all([many[q] <= limit for q, limit in asked.limits.items()], axis=0)
    total = sum(asked.curve(axis)[rows[:, k]] for axis, k in zip(asked.axes, places))
    return float(np.asarray(total)[fits].min())


def found(asked: Problem) -> float:
    kept = RateDistortion().allocate(asked)
    sizes = asked.full.copy()
    for name, ranks in kept.items():
        sizes[asked.network.index(name)] = len(ranks)
    assert asked.fits(sizes)
    return loss(asked, sizes)


@pytest.mark.parametrize("quantities", [("macs",), ("macs", "activations")])
def test_coupled_chains_are_near_brute_force(quantities: tuple[str, ...]) -> None:
    excess = []
    for seed in range(24):
        asked = problem(seed, (0.3, 0.5, 0.7)[seed % 3], quantities)
        excess.append(found(asked) / brute_force(asked) - 1)
    assert min(excess) >= -1e-9
    assert max(excess) <= 0.01  # the way back to brute force is the exchange of units between axes at the end


def test_separable_costs_are_solved_exactly() -> None:
    """Activations add up over the axes of a chain."""
    for seed in range(12):
        asked = problem(seed, 0.6, ("activations",))
        assert found(asked) == pytest.approx(brute_force(asked), abs=1e-12)


def test_the_loss_does_not_grow_with_the_budget() -> None:
    losses = [found(problem(3, budget)) for budget in np.linspace(0.2, 1, 17)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0


def test_given_curves_decide() -> None:
    """An axis that loses nothing until its last unit gives them all."""
    asked = problem(0, 0.6)
    free = asked.axes[2]
    curves = {axis.name: torch.linspace(1, 0, SIZE + 1).double() for axis in asked.axes}
    curves[free.name] = torch.tensor([9.0, *[0.0] * SIZE]).double()
    asked = Problem(asked.network, asked.scores, asked.limits, True, 0.0, 1, curves)
    kept = RateDistortion().allocate(asked)
    assert len(kept[free.name]) < min(len(ranks) for name, ranks in kept.items() if name != free.name)


def test_curves_that_do_not_fit_are_refused() -> None:
    asked = problem(0, 0.6)
    with pytest.raises(ConfigError, match="must be 7 finite numbers"):
        Problem(asked.network, asked.scores, asked.limits, True, curves={asked.axes[0].name: torch.zeros(3)})


@pytest.mark.parametrize("options", [{"levels": 1}, {"bins": 0}, {"rounds": 0}])
def test_options_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must hold"):
        RateDistortion(**options)
