"""Searches for one level an axis, side by side: Týr's sampler, its published settings, TPE, NSGA-II, the knapsack.

    python benchmarks/search.py synthetic interactions
    python benchmarks/search.py curves --data cifar10:FOLDER --weights FILE.safetensors --curves resnet56.npz
    python benchmarks/search.py network --data cifar10:FOLDER --weights FILE.safetensors --seeds 1 --images 2000

`synthetic`: 54 axes of nine levels, convex losses that add up, once with equal and once with uneven costs, half of the
cost; everyone starts from the uniform configuration. Regret is 0 % at the optimum of the knapsack and 100 % at the
uniform configuration. `interactions`: pairs of axes add to that; here losses are printed. `curves`: the curves that the
criterion `obs` measures on a ResNet-56, with its multiply-accumulates, on a grid of 12.5 %; the optimum is that of the
allocator `rd`. TPE and NSGA-II propose anything, which is brought into the budget before it is rated. Milliseconds are
those of the processor, the objective (microseconds) included.

`network`: accuracy of a ResNet-56 cut to a share of its multiply-accumulates and reconstructed, with nothing trained,
by allocator. Units and sizes are chosen on augmented training images; test images decide nothing.

One JSON line a result.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch

import metaprune as mp
from metaprune import data, zoo
from metaprune.allocate import ALLOCATORS, Problem
from metaprune.allocate.knapsack import knapsack
from metaprune.criteria import CRITERIA, Calibration
from metaprune.edits import Keep
from metaprune.graph import Axis, Network
from metaprune.measure import accuracy
from metaprune.planning import calibration_batches
from metaprune.recovery import Context, resolve
from metaprune.search.samplers.tyr import Grid, Levels, Numbers, TyrSampler, evolve
from metaprune.task import Classification

AXES, LEVELS, MARKS = 54, 9, (200, 500, 1000, 2000)
STRENGTHS = (0.01, 0.03, 0.1)  # mean weight of a pair
PARTS = ("synthetic", "interactions", "curves", "network")
Loss = Callable[[Levels], float]


@dataclass(frozen=True, eq=False)
class Toy:
    """A grid, what is to be small on it, and what it is there at the best and at the uniform configuration."""

    name: str
    grid: Grid
    loss: Loss
    optimum: Levels
    curves: list[Numbers]


def synthetic(seed: int, *, even: bool, pairs: float = 0.0) -> Toy:
    """Convex losses ``s (1 - x)^p`` of levels x in [0, 1], and products of what pairs of axes lack."""
    random = np.random.default_rng(seed)
    scale_A, power_A = np.exp(random.normal(0, 1, AXES)), random.uniform(1.5, 4, AXES)
    price_A = np.ones(AXES) if even else np.rint(20 * np.exp(random.normal(0, 0.7, AXES)))
    lack_L = 1 - np.arange(LEVELS) / (LEVELS - 1)
    curve_AL, cost_AL = scale_A[:, None] * lack_L ** power_A[:, None], price_A[:, None] * np.arange(LEVELS)
    weight_AA = np.triu(random.exponential(pairs, (AXES, AXES)) * (random.random((AXES, AXES)) < 0.1), 1)
    limit, axes = cost_AL[:, -1].sum() / 2, np.arange(AXES)

    def usage(sizes_NA: Levels) -> Numbers:
        return np.asarray(cost_AL[axes, sizes_NA].sum(axis=1)[None] / limit)

    def loss(levels_A: Levels) -> float:
        lack_A = lack_L[levels_A]
        return float(curve_AL[axes, levels_A].sum() + lack_A @ weight_AA @ lack_A)

    grid = Grid(tuple(f"axis{k}" for k in axes), tuple(np.arange(LEVELS) for _ in axes), usage)
    optimum = knapsack(list(curve_AL), list(cost_AL), limit, bins=100_000)
    return Toy(f"synthetic, {'even' if even else 'uneven'} costs", grid, loss, np.array(optimum), list(curve_AL))


@dataclass(frozen=True, eq=False)
class Coarse(Problem):
    """A problem whose sizes are multiples of a share of each axis."""

    share: float = 0.125

    def aligned(self, axis: Axis, wanted: float) -> int:
        """The nearest such size at or above `wanted` and the floor."""
        sizes = np.unique(np.rint(np.arange(1, round(1 / self.share) + 1) * self.share * axis.size).astype(int))
        return int(sizes[np.searchsorted(sizes, max(self.lowest(axis), wanted))])


def measured(options: argparse.Namespace) -> Toy:
    """Curves of a ResNet-56, and its multiply-accumulates."""
    network, images = loaded(options)
    file = Path(options.curves)
    if not file.exists():
        batches = calibration_batches(images, 2048, 0)
        verdict = CRITERIA["obs"]().judge(network, Calibration(batches, Classification(), 0, 0.5))
        np.savez(file, **{name: curve_K.numpy() for name, curve_K in verdict.curves.items()})
    curves = {name: torch.from_numpy(curve_K) for name, curve_K in np.load(file).items()}
    scores = {name: torch.ones(len(curve_K) - 1).double() for name, curve_K in curves.items()}
    problem = Coarse(network, scores, {"macs": network.cost().macs / 2}, True, curves=curves)
    grid = Grid.of(problem, {axis.name: problem.levels(axis) for axis in problem.axes})
    found = ALLOCATORS["rd"]().allocate(problem)
    optimum = grid.nearest({name: len(ranks) for name, ranks in found.items()})
    losses = [problem.curve(network.axis(name))[sizes_L] for name, sizes_L in zip(grid.names, grid.levels)]

    def loss(levels_A: Levels) -> float:
        return float(sum(loss_L[level] for loss_L, level in zip(losses, levels_A)))

    return Toy("curves of a ResNet-56", grid, loss, optimum, losses)


def evolved(toy: Toy, seed: int, count: int, **options: Any) -> list[float]:
    """What Týr's sampler rates, in order."""
    sampler = TyrSampler(toy.grid, seed=seed, **options)
    study = optuna.create_study(sampler=sampler)
    size = sampler.population_size or 1
    evolve(study, sampler, lambda some, generation, stage: [toy.loss(one) for one in some], -(-count // size))
    return [float(trial.value or 0) for trial in study.get_trials(deepcopy=False)][:count]


def proposed(toy: Toy, sampler: optuna.samplers.BaseSampler, count: int) -> list[float]:
    """What another sampler of Optuna rates, each proposal brought into the budget, from the uniform one on."""
    study, grid = optuna.create_study(sampler=sampler), toy.grid
    study.enqueue_trial(dict(zip(grid.names, grid.uniform().tolist())))

    def objective(trial: optuna.Trial) -> float:
        levels_A = np.array([trial.suggest_int(name, 0, int(n) - 1) for name, n in zip(grid.names, grid.counts)])
        while not grid.fits(levels_A):
            levels_A[int(levels_A.argmax())] -= 1
        return toy.loss(grid.filled(levels_A, np.ones(len(levels_A), bool), lambda free: int(free[0])))

    study.optimize(objective, n_trials=count)
    return [float(trial.value or 0) for trial in study.get_trials(deepcopy=False)]


METHODS: dict[str, Callable[[Toy, int, int], list[float]]] = {
    "tyr": lambda toy, seed, count: evolved(toy, seed, count),
    "tyr, nothing guided": lambda toy, seed, count: evolved(toy, seed, count, guided=0.0),
    "tyr, published (128 children)": lambda toy, seed, count: evolved(
        toy, seed, count, guided=0.0, population_size=128
    ),
    "NSGA-II": lambda toy, seed, count: proposed(toy, optuna.samplers.NSGAIISampler(seed=seed), count),
    "TPE": lambda toy, seed, count: proposed(toy, optuna.samplers.TPESampler(seed=seed), min(count, 600)),
}


def regrets(toy: Toy, seed: int, methods: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One line a method."""
    best, even = toy.loss(toy.optimum), toy.loss(toy.grid.uniform())
    for method in methods:
        start = time.process_time()
        losses = METHODS[method](toy, seed, MARKS[-1])
        spent = (time.process_time() - start) / len(losses)
        marks = sorted({min(mark, len(losses)) for mark in MARKS})
        percent = {str(mark): round(100 * (min(losses[:mark]) - best) / (even - best), 3) for mark in marks}
        yield {"on": toy.name, "method": method, "seed": seed, "regret_%": percent, "ms": round(1000 * spent, 2)}


def interactions(seed: int, strength: float) -> dict[str, Any]:
    """Ten generations from the knapsack, and fifty from the uniform configuration."""
    toy = synthetic(seed, even=False, pairs=strength)
    line: dict[str, Any] = {"on": f"interactions {strength}", "seed": seed, "uniform": toy.loss(toy.grid.uniform())}
    line["knapsack"] = toy.loss(toy.optimum)
    for name, options in (("tyr", {}), ("tyr, nothing guided", {"guided": 0.0})):
        line[f"{name}, 10 generations from the knapsack"] = min(
            evolved(toy, seed, 81, start=toy.optimum, prior=toy.curves, **options)  # type: ignore[arg-type]
        )
        line[f"{name}, 50 generations from uniform"] = min(evolved(toy, seed, 401, **options))  # type: ignore[arg-type]
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()}


def loaded(options: argparse.Namespace) -> tuple[Network, data.Dataset]:
    """A trained ResNet-56 and its images."""
    images = data.load(options.data)
    module = zoo.build("cifar_resnet56").eval()
    zoo.load_weights(module, options.weights)
    return mp.trace(module, next(images.train.batches(2))[0]), images


def on_network(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line an allocator and seed."""
    network, images = loaded(options)
    test = images.test.subset(options.images, 0) if options.images else images.test
    for seed in range(options.seeds):
        batches, start = calibration_batches(images, 2048, seed), time.perf_counter()
        judge = CRITERIA["obs"]()
        verdict = judge.judge(network, Calibration(batches, Classification(), seed, options.macs))
        judged = time.perf_counter() - start
        limits = {"macs": options.macs * network.cost().macs}
        problem = Problem(
            network, verdict.scores, limits, True, curves=verdict.curves, batches=batches, task=Classification(),
            seed=seed,
        )  # fmt: skip
        for name in options.allocators:
            start = time.perf_counter()
            kept = ALLOCATORS[name]().allocate(problem)
            seconds = time.perf_counter() - start
            sizes = {axis: network.axis(axis).size for axis in kept}
            plan = mp.Plan(tuple(Keep(axis, sizes[axis], kept[axis]) for axis in kept if len(kept[axis]) < sizes[axis]))
            slim = network.apply(plan)
            context = Context(calibration=batches, dense=network.model, network=network, plan=plan, seed=seed)
            for way in resolve("reconstruct"):
                slim = way.recover(slim, context).model
            yield {
                "on": "ResNet-56, CIFAR-10",
                "allocator": name,
                "seed": seed,
                "macs": round(network.cost_of(plan).macs / network.cost().macs, 4),
                "accuracy": round(accuracy(slim.eval(), test).top1, 3),
                "split": "test",
                "images": len(test),
                "criterion_s": round(judged, 1),
                "allocation_s": round(seconds, 1),
            }


def lines(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All that was asked for."""
    for part in options.parts:
        if part == "network":
            yield from on_network(options)
        for seed in range(options.seeds if part != "network" else 0):
            if part == "interactions":
                yield from (interactions(seed, strength) for strength in STRENGTHS)
            for toy in [synthetic(seed, even=even) for even in (True, False)] if part == "synthetic" else []:
                yield from regrets(toy, seed, options.methods)
            if part == "curves":
                yield from regrets(measured(options), seed, options.methods)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--data", help="cifar10:FOLDER")
    parser.add_argument("--weights", help="of a ResNet-56")
    parser.add_argument("--curves", default="resnet56_curves.npz", help="where its curves are, or go")
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--images", type=int, default=0, help="of the test split; 0 for all")
    parser.add_argument("--allocators", nargs="+", default=["uniform", "global", "rd", "tyr"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    versions = {"optuna": optuna.__version__, "torch": torch.__version__, "machine": platform.machine()}
    for line in lines(options):
        print(json.dumps({**line, **versions}), flush=True)


if __name__ == "__main__":
    main()
