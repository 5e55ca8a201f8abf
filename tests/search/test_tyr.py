"""The allocator that evolves sizes on a supernet."""

from dataclasses import replace
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from torch import nn

import metaprune as mp
from metaprune import zoo
from metaprune.allocate import ALLOCATORS, Problem
from metaprune.edits import Keep
from metaprune.errors import ConfigError, InputError
from metaprune.graph import trace
from metaprune.measure import output_error
from metaprune.recovery import Context, Reconstruct
from metaprune.search.tyr import Tyr
from metaprune.task import FeatureMatching

QUICK = Tyr(samples=32, rated=32, first=8, generations=6, children=4, healed=0)


def problem(name: str = "digits_cnn", budget: float = 0.5, **options: Any) -> Problem:
    example = zoo.example_inputs(name)
    network, x = trace(zoo.build(name).eval(), example), torch.randn(32, *example.shape[1:])
    generator = torch.Generator().manual_seed(0)
    scores = {axis.name: torch.rand(axis.size, generator=generator).double() for axis in network.axes if axis.prunable}
    given = {"batches": lambda: iter([(x,)]), "task": FeatureMatching(network.model), **options}
    return Problem(network, scores, {"macs": budget * network.cost().macs}, **given)


@pytest.mark.parametrize("name", ["digits_cnn", "vit_tiny"])
def test_nothing_is_worse_than_the_best_start(name: str) -> None:
    asked = problem(name)
    found = QUICK.find(asked)
    assert set(found.starts) == {"rd", "uniform", "global"}
    assert found.error < min(found.starts.values())
    assert asked.fits(found.sizes)
    assert found.evaluations > 20


@pytest.mark.parametrize("name", ["digits_cnn", "vit_tiny", "gru_classifier"])
def test_in_the_end_healed_networks_compare(name: str) -> None:
    asked = problem(name)
    found = replace(QUICK, healed=16).find(asked)
    assert found.error <= min(found.starts.values())
    even, network = asked.full.copy(), asked.network
    for axis, ranks in ALLOCATORS["uniform"]().allocate(asked).items():
        even[network.index(axis)] = len(ranks)
    assert asked.batches is not None
    (x,) = next(asked.batches())
    plan = mp.Plan(tuple(
        Keep(axis.name, axis.size, asked.best(axis, even[network.index(axis.name)])) for axis in asked.axes
    ))  # fmt: skip
    task = FeatureMatching(network.model)
    context = Context(
        calibration=lambda: iter([(x[:16],)]), dense=network.model, network=network, plan=plan, task=task
    )  # fmt: skip
    slim = Reconstruct(samples=16).recover(network.apply(plan), context).model.eval()
    with torch.no_grad():
        error = output_error([network.model(x[16:])], [slim(x[16:])])
    assert found.starts["uniform"] == pytest.approx(error, rel=1e-4)


def test_without_generations_the_best_start_is_given() -> None:
    asked = problem()
    found = replace(QUICK, generations=0, starts=("uniform", "global")).find(asked)
    assert found.error == min(found.starts.values())
    name = min(found.starts, key=lambda name: found.starts[name])
    assert sum(map(len, ALLOCATORS[name]().allocate(asked).values())) == found.sizes[
        [asked.network.index(axis.name) for axis in asked.axes]
    ].sum()  # fmt: skip


def test_the_same_seed_gives_the_same_sizes() -> None:
    asked = problem()
    first, again = QUICK.find(asked), QUICK.find(asked)
    assert (first.sizes == again.sizes).all()
    assert first.error == again.error


def test_rounds_go_from_coarse_to_fine() -> None:
    """Until every size was there."""
    asked, options = problem(), Tyr(interval=0.5, reach=4)
    axis = max(asked.axes, key=lambda axis: axis.size)
    coarse = options._levels(asked, axis, 0.5, [], [])
    assert coarse.tolist() == [asked.lowest(axis), axis.size // 2, axis.size]
    best = asked.full.copy()
    best[asked.network.index(axis.name)] = axis.size // 2
    fine = options._levels(asked, axis, 1 / axis.size, [best], [best])
    assert fine.tolist() == list(range(axis.size // 2 - 4, axis.size // 2 + 5))


@pytest.mark.parametrize("options", [{"round_to": 4}, {"ceiling": 0.75}, {"grid": 0.25}])
def test_sizes_are_legal(options: dict[str, Any]) -> None:
    asked = problem(**options)
    found = QUICK.find(asked)
    for axis in asked.axes:
        assert found.sizes[asked.network.index(axis.name)] in asked.levels(axis)


def test_an_interrupt_gets_through() -> None:
    asked, runs = problem(), []

    class Interrupted(FeatureMatching):
        def outputs(self, model: Any, batch: Any) -> Any:
            runs.append(1)
            if len(runs) == 20:
                raise KeyboardInterrupt
            return model(batch[0])

    said = optuna.logging.get_verbosity()
    with pytest.raises(KeyboardInterrupt):
        QUICK.find(replace(asked, task=Interrupted(nn.Identity())))
    assert optuna.logging.get_verbosity() == said


def test_outputs_that_are_not_finite_are_refused() -> None:
    asked = problem()
    with torch.no_grad():
        next(asked.network.model.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="must be finite"):
        QUICK.find(asked)


def test_a_plan_can_be_made_with_it() -> None:
    example = zoo.example_inputs("digits_cnn")
    network = mp.trace(zoo.build("digits_cnn").eval(), example)
    batches = [(torch.randn(32, 1, 8, 8), torch.arange(32) % 10)]
    plan = mp.plan(network, "macs=0.5", "obs", QUICK, data=batches)
    assert network.cost_of(plan).macs <= 0.5 * network.cost().macs
    assert network.verify(plan).passed()
    assert "tyr" in ALLOCATORS


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"samples": 0}, "samples >= 1"),
        ({"children": 0}, "children >= 1"),
        ({"generations": -1}, "generations >= 0"),
        ({"interval": 0.0}, "0 < interval"),
        ({"ridge": 0.0}, "ridge > 0"),
        ({"starts": ()}, "there must be a start"),
        ({"starts": ("laptop",)}, "'laptop' is not"),
        ({"starts": ("unifrom",)}, "Did you mean 'uniform'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        Tyr(**options)


def test_it_goes_through_any_order_of_stages() -> None:
    """A single stage, and more survivors than children."""
    for options in (replace(QUICK, first=32), replace(QUICK, survivors=9)):
        found = replace(options, rounds=1, generations=2).find(problem())
        assert np.isfinite(found.error)
