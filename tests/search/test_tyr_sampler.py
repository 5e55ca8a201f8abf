"""Evolution of levels against brute force and dynamic programming."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest

from metaprune.allocate.knapsack import knapsack
from metaprune.errors import ConfigError
from metaprune.search.samplers.tyr import Grid, Levels, TyrSampler, Worth, evolve

optuna.logging.set_verbosity(optuna.logging.ERROR)
Loss = Callable[[Levels], float]


def toy(seed: int, axes: int = 54, count: int = 9, limits: int = 1) -> tuple[Grid, Loss, np.ndarray, np.ndarray]:
    """Convex losses and uneven costs that add up, half of the cost; also the tables of both."""
    random = np.random.default_rng(seed)
    lack_L = 1 - np.arange(count) / (count - 1)
    loss_AL = np.exp(random.normal(0, 1, (axes, 1))) * lack_L ** random.uniform(1.5, 4, (axes, 1))
    cost_QAL = np.rint(20 * np.exp(random.normal(0, 0.7, (limits, axes, 1)))) * np.arange(count)
    rows = np.arange(axes)

    def usage(sizes_NA: np.ndarray) -> np.ndarray:
        return cost_QAL[:, rows, sizes_NA].sum(-1) / (cost_QAL[..., -1].sum(-1) / 2)[:, None]

    grid = Grid(tuple(f"a{k}" for k in rows), tuple(np.arange(count) for _ in rows), usage)
    return grid, lambda levels_A: float(loss_AL[rows, levels_A].sum()), loss_AL, cost_QAL[0]


def run(grid: Grid, loss: Loss, generations: int, **options: Any) -> optuna.Study:
    sampler = TyrSampler(grid, **options)
    study = optuna.create_study(sampler=sampler)
    evolve(study, sampler, lambda some, generation, stage: [loss(one) for one in some], generations)
    return study


def values(study: optuna.Study) -> list[float]:
    return [trial.value for trial in study.trials]


def test_regret_from_uniform_is_below_half_a_percent() -> None:
    grid, loss, loss_AL, cost_AL = toy(0)
    best = knapsack(list(loss_AL), list(cost_AL), cost_AL[:, -1].sum() / 2, bins=100_000)
    found, least = min(values(run(grid, loss, 80, seed=0))), loss(np.array(best))
    assert (found - least) / (loss(grid.uniform()) - least) <= 0.005


@pytest.mark.parametrize("seed", range(4))
def test_it_finds_what_trying_everything_finds(seed: int) -> None:
    grid, loss, _, _ = toy(seed, axes=4, count=4, limits=1 + seed % 2)
    every = [np.array(levels) for levels in itertools.product(range(4), repeat=4)]
    least = min(loss(levels_A) for levels_A in every if grid.fits(levels_A))
    assert min(values(run(grid, loss, 40, population_size=4, seed=seed))) == pytest.approx(least)


@pytest.mark.parametrize("limits", [1, 3])
def test_no_trial_exceeds_a_limit_and_none_is_there_twice(limits: int) -> None:
    grid, loss, _, _ = toy(0, axes=12, limits=limits)
    study = run(grid, loss, 25)
    sampler = study.sampler
    assert isinstance(sampler, TyrSampler)
    seen = [sampler.levels(trial) for trial in study.trials]
    assert all(grid.fits(levels_A) for levels_A in seen)
    assert len({levels_A.tobytes() for levels_A in seen}) == len(seen) == 201


def test_mutations_use_up_what_the_limits_leave() -> None:
    grid, loss, _, _ = toy(1, axes=12)
    study = run(grid, loss, 10, guided=0.0)
    for trial in study.trials[1:]:
        levels_A = np.array([trial.params[name] for name in grid.names])
        raised = [levels_A + (np.arange(12) == k) for k in range(12) if levels_A[k] < 8]
        fitting = [more for more in raised if grid.fits(more)]
        assert len(fitting) <= 4  # those that were switched down


def test_generations_descend_from_the_best_so_far() -> None:
    grid, loss, _, _ = toy(2, axes=12)
    study = run(grid, loss, 20)
    assert isinstance(study.sampler, TyrSampler)
    parents = [study.sampler.get_parent_population(study, generation)[0].value for generation in range(1, 20)]
    lowest = np.minimum.accumulate(values(study))[[8 * k for k in range(19)]]
    assert parents == lowest.tolist()


def test_what_exceeds_the_limits_is_nobodys_parent() -> None:
    grid, loss, _, _ = toy(0, axes=6)
    sampler = TyrSampler(grid)
    study = optuna.create_study(sampler=sampler)
    study.enqueue_trial(dict.fromkeys(grid.names, 8))  # everything stays: loss 0, and too dear
    study.optimize(lambda trial: loss(np.array([trial.suggest_int(name, 0, 8) for name in grid.names])), 30)
    assert study.best_trial.number == 0
    assert all(grid.fits(sampler.levels(trial)) for trial in study.trials[1:])
    assert sampler.get_parent_population(study, 2)[0].number > 0


def test_the_same_seed_gives_the_same_trials() -> None:
    grid, loss, _, _ = toy(0, axes=12)
    assert values(run(grid, loss, 8, seed=3)) == values(run(grid, loss, 8, seed=3))
    assert values(run(grid, loss, 8, seed=3)) != values(run(grid, loss, 8, seed=4))


def test_a_study_goes_on_with_a_new_sampler_as_with_the_old() -> None:
    grid, loss, _, _ = toy(0, axes=12)

    def objective(trial: optuna.Trial) -> float:
        return loss(np.array([trial.suggest_int(name, 0, 8) for name in grid.names]))

    whole, parts = optuna.create_study(sampler=TyrSampler(grid)), optuna.create_study(sampler=TyrSampler(grid))
    whole.optimize(objective, 40)
    parts.optimize(objective, 21)
    parts.sampler = TyrSampler(grid)
    parts.optimize(objective, 19)
    assert values(parts) == values(whole)
    assert min(values(whole)) < values(whole)[0]


def test_a_sampler_keeps_studies_apart() -> None:
    grid, loss, _, _ = toy(0, axes=12)
    sampler, seen = TyrSampler(grid), []
    for _ in range(3):
        study = optuna.create_study(sampler=sampler)
        study.optimize(lambda trial: loss(np.array([trial.suggest_int(name, 0, 8) for name in grid.names])), 12)
        seen.append(values(study))
        del study
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize(("direction", "sign"), [("minimize", 1), ("maximize", -1)])
def test_maximising_is_minimising_the_negative(direction: str, sign: int) -> None:
    grid, loss, _, _ = toy(0, axes=12)

    def objective(trial: optuna.Trial) -> float:
        return sign * loss(np.array([trial.suggest_int(name, 0, 8) for name in grid.names]))

    study = optuna.create_study(sampler=TyrSampler(grid), direction=direction)
    study.optimize(objective, 30)
    found = [sign * value for value in values(study)]
    study = optuna.create_study(sampler=TyrSampler(grid))
    study.optimize(lambda trial: sign * objective(trial), 30)
    assert found == values(study)


def test_where_nothing_is_new_it_ends() -> None:
    grid, loss, _, _ = toy(0, axes=2, count=2)
    assert len(run(grid, loss, 50).trials) <= 4
    study = optuna.create_study(sampler=TyrSampler(grid))
    study.optimize(lambda trial: loss(np.array([trial.suggest_int(name, 0, 1) for name in grid.names])), 20)
    assert len(study.trials) == 20


def test_stages_rate_fewer_and_fewer() -> None:
    grid, loss, _, _ = toy(0, axes=12)
    asked: list[tuple[int, int, int]] = []

    def rate(some: Any, generation: int, stage: int) -> list[float]:
        asked.append((generation, stage, len(some)))
        return [loss(one) + stage for one in some]

    sampler = TyrSampler(grid, population_size=8)
    study = optuna.create_study(sampler=sampler)
    best = evolve(study, sampler, rate, 3, survivors=[4, 2], starts=[grid.uniform(), grid.uniform()])
    assert asked == [(0, 2, 1)] + [(k, stage, n) for k in (1, 2, 3) for stage, n in enumerate((8, 4, 2))]
    states = [trial.state.name for trial in study.trials]
    assert states.count("COMPLETE") == 1 + 3 * 2
    assert states.count("PRUNED") == 3 * 6
    for trial in study.trials[1:]:
        first = loss(sampler.levels(trial))
        assert trial.intermediate_values[0] == first
        assert trial.value is None or trial.value == first + 2
    assert best.value == min(trial.value for trial in study.trials if trial.value is not None)


def test_patience_ends_a_search_that_stands_still() -> None:
    grid, _, _, _ = toy(0, axes=12)
    sampler = TyrSampler(grid)
    study = optuna.create_study(sampler=sampler)
    evolve(study, sampler, lambda some, generation, stage: [1.0] * len(some), 50, patience=3)
    assert len(study.trials) == 1 + 3 * 8


def test_what_is_no_number_never_wins() -> None:
    grid, loss, _, _ = toy(0, axes=12)
    sampler = TyrSampler(grid)
    study = optuna.create_study(sampler=sampler)

    def rate(some: Any, generation: int, stage: int) -> list[float]:
        return [float("nan") if k % 2 else loss(one) for k, one in enumerate(some)]

    best = evolve(study, sampler, rate, 10)
    assert best.value is not None
    assert best.value < loss(grid.uniform())
    assert sum(np.isinf(trial.value) for trial in study.trials) == 40


def test_what_steps_are_worth_is_found_by_regression() -> None:
    _, loss, loss_AL, _ = toy(0, axes=3, count=4)
    random, worth = np.random.default_rng(0), Worth(np.array([4, 4, 4]))
    for number in range(60):
        levels_A = random.integers(0, 4, 3)
        worth.add(levels_A, loss(levels_A) + 5 * (number % 2), group=number % 2)  # values of two kinds
    worth.fit()
    np.testing.assert_allclose(worth.mean_S, -np.diff(loss_AL, axis=1).ravel(), atol=1e-3)
    curves = worth.draw(random)
    np.testing.assert_allclose(curves, loss_AL - loss_AL[:, :1], atol=0.05)


def test_a_prior_counts_up_to_a_factor() -> None:
    _, loss, loss_AL, _ = toy(0, axes=3, count=4)
    worth = Worth(np.array([4, 4, 4]), [7 * loss_L for loss_L in loss_AL])
    for levels in ((0, 0, 0), (3, 1, 2)):
        worth.add(np.array(levels), loss(np.array(levels)))
    worth.fit()
    np.testing.assert_allclose(worth.mean_S, -np.diff(loss_AL, axis=1).ravel(), rtol=1e-6)


@pytest.mark.parametrize("options", [{"population_size": 0}, {"guided": 1.5}, {"switches": 0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must hold"):
        TyrSampler(toy(0, axes=3)[0], **options)


def test_what_cannot_fit_is_refused() -> None:
    grid = toy(0, axes=3)[0]
    with pytest.raises(ConfigError, match=r"the start must meet the limits, but uses 2\.0000 of one"):
        TyrSampler(grid, start=np.full(3, 8))
    with pytest.raises(ConfigError, match="the smallest level of every axis must meet the limits"):
        Grid(("a",), (np.array([1, 2]),), lambda sizes_NA: np.full((1, len(sizes_NA)), 2.0))


def test_several_objectives_are_refused() -> None:
    grid = toy(0, axes=3)[0]
    study = optuna.create_study(sampler=TyrSampler(grid), directions=["minimize", "minimize"])
    with pytest.raises(ConfigError, match="must have one objective, but has 2"):
        study.ask().suggest_int("a0", 0, 8)
