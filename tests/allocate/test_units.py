"""The same allocators over units that are no axes of a network: ranks of matrices, and entries of weights."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from metaprune.allocate import ALLOCATORS, GlobalMinimumThreshold, Problem
from metaprune.errors import BudgetError, ConfigError
from metaprune.graph import Axis, Entries, trace

from .problems import chain

WEIGHING = ("uniform", "global", "global_mt", "erk", "lamp", "isomorphic", "rd", "sap", "flap")


class Ranks:
    """Matrices as products of thin ones: k ranks of an (m, n) matrix cost k (m + n) numbers."""

    def __init__(self, *shapes: tuple[int, int]) -> None:
        self.shapes: Mapping[str, tuple[int, ...]] = {str(k): shape for k, shape in enumerate(shapes)}
        self.axes = tuple(
            Axis(name, min(shape), True, "", ((name, 0), (name, 1)), kind="rank") for name, shape in self.shapes.items()
        )

    def index(self, name: str) -> int:
        return int(name)

    def cost(self, sizes: npt.ArrayLike | None = None) -> dict[str, Any]:
        full = [axis.size for axis in self.axes]
        return {"params": int(self.cost_many(full if sizes is None else sizes)["params"][0])}

    def cost_many(self, sizes: npt.ArrayLike) -> dict[str, Any]:
        return {"params": np.atleast_2d(np.asarray(sizes)) @ np.array([sum(shape) for shape in self.shapes.values()])}


def low_rank(budget: float) -> tuple[Problem, list[torch.Tensor]]:
    torch.manual_seed(0)
    ranks = Ranks((12, 8), (8, 20), (6, 6))
    matrices = [torch.randn(shape, dtype=torch.float64) * (k + 1) for k, shape in enumerate(ranks.shapes.values())]
    energy = {str(k): torch.linalg.svdvals(matrix).square() for k, matrix in enumerate(matrices)}
    return Problem(ranks, energy, {"params": budget * ranks.cost()["params"]}, True, floor=0.0), matrices


@pytest.mark.parametrize("name", WEIGHING)
def test_ranks_leave_until_the_limit_holds(name: str) -> None:
    asked, _ = low_rank(0.5)
    kept = ALLOCATORS[name]().allocate(asked)
    sizes = np.array([len(kept[axis.name]) for axis in asked.axes])
    limit = asked.limits["params"]
    assert 0 < asked.network.cost(sizes)["params"] <= limit
    assert all(ranks == tuple(range(len(ranks))) for ranks in kept.values())  # singular values fall
    for k, axis in enumerate(asked.axes):  # and nothing more would fit
        more = sizes + np.eye(len(sizes), dtype=np.int64)[k]
        assert sizes[k] == axis.size or asked.network.cost(more)["params"] > limit


def test_the_knapsack_finds_the_ranks_of_least_error() -> None:
    """Against every choice of ranks: what the best of them leaves out of the matrices is least."""
    asked, matrices = low_rank(0.5)
    kept = ALLOCATORS["rd"]().allocate(asked)

    def lost(sizes: tuple[int, ...]) -> float:
        spectra = [torch.linalg.svdvals(matrix) for matrix in matrices]
        return sum(float(s[k:].square().sum()) for s, k in zip(spectra, sizes, strict=True))

    choices = [tuple(c) for c in np.ndindex(8, 8, 6)]
    fitting = [
        tuple(k + 1 for k in choice) for choice in choices if asked.fits(np.array([k + 1 for k in choice], np.int64))
    ]
    assert lost(tuple(len(kept[axis.name]) for axis in asked.axes)) <= 1.02 * min(map(lost, fitting))


@pytest.mark.parametrize("name", [name for name in ALLOCATORS if name not in (*WEIGHING, "ecoflap")])
def test_what_needs_a_network_says_so(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"allocator {name!r} needs a network.*Ranks\. Take one.*global"):
        ALLOCATORS[name]().allocate(low_rank(0.5)[0])


def entry_problem(budget: float) -> Problem:
    entries = Entries(chain(6, 20, 12, 4))
    scores = {name: weight.double().abs().flatten() for name, weight in entries.weights.items()}
    return Problem(entries, scores, {"nonzeros": budget * entries.cost()["nonzeros"]}, floor=0.0)


@pytest.mark.parametrize("name", WEIGHING)
@pytest.mark.parametrize("budget", [0.9, 0.37, 0.1])
def test_entries_leave_to_the_exact_number(name: str, budget: float) -> None:
    asked = entry_problem(budget)
    assert sum(len(kept) for kept in ALLOCATORS[name]().allocate(asked).values()) == int(asked.limits["nonzeros"])


def test_one_threshold_is_that_of_torch() -> None:
    """torch.nn.utils.prune.global_unstructured, where the minimum of Global MT does not bind."""
    asked = entry_problem(0.3)
    entries = asked.network
    assert isinstance(entries, Entries)
    every = torch.cat(list(asked.scores.values()))
    lowest = every.kthvalue(len(every) - int(asked.limits["nonzeros"])).values
    for allocator in (ALLOCATORS["global"](), GlobalMinimumThreshold(minimum=0.0)):
        kept = allocator.allocate(asked)
        for name, score_U in asked.scores.items():
            assert kept[name] == tuple((score_U > lowest).nonzero().flatten().tolist()), name


def test_the_minimum_of_global_mt_is_kept() -> None:
    asked = entry_problem(0.1)
    scores = {name: score * (1e-3 if name.startswith("0") else 1) for name, score in asked.scores.items()}
    small = Problem(asked.network, scores, asked.limits, floor=0.0)
    least = int(0.02 * sum(axis.size for axis in asked.axes))
    kept = GlobalMinimumThreshold(minimum=0.02).allocate(small)
    assert len(ALLOCATORS["global"]().allocate(small)["0.weight"]) < least  # it binds
    assert all(len(kept[axis.name]) >= min(axis.size, least) for axis in asked.axes)


def test_a_row_costs_what_it_holds_and_a_group_its_share() -> None:
    network = chain(8, 20, 4)
    rows, groups = Entries(network, "row"), Entries(network, "n:4")
    assert [axis.size for axis in rows.axes] == [8, 20]
    assert [axis.size for axis in groups.axes] == [4, 4]
    assert rows.cost([3, 5]) == {"nonzeros": 20 * 3 + 4 * 5}
    assert groups.cost([1, 4]) == {"nonzeros": 160 // 4 + 80}
    weight = network.weights["0.weight"]
    assert torch.equal(rows.grouped("0.weight", weight), weight)
    assert torch.equal(groups.grouped("0.weight", weight)[1], weight[0, 4:])
    for entries in (rows, groups):
        assert torch.equal(entries.ungrouped("0.weight", entries.grouped("0.weight", weight)), weight)


def test_frozen_modules_and_what_multiplies_nothing_are_left_out() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
    x = torch.randn(2, 4)
    assert Entries(trace(model, x)).names == ("0.weight", "2.weight")
    assert Entries(trace(model, x, freeze="2")).names == ("0.weight",)
    assert Entries(trace(model, x, only="2")).names == ("2.weight",)
    with pytest.raises(ConfigError, match="Freeze less"):
        Entries(trace(model, x, freeze=["0", "2"]))


def test_what_cannot_be_reached() -> None:
    with pytest.raises(BudgetError, match="nonzeros must reach"):
        entry_problem(0.001)
