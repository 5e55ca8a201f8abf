"""Týr: evolution of the sizes on a network of ready-pruned variants, from coarse to fine."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from metaprune.allocate import ALLOCATORS, Allocator, Problem, Sizes
from metaprune.edits import Keep
from metaprune.errors import ConfigError, InputError
from metaprune.graph import Axis
from metaprune.graph.record import tensors_in
from metaprune.measure import output_error
from metaprune.modes import evaluating
from metaprune.plans import Plan
from metaprune.recovery import Context, Reconstruct
from metaprune.search.supernet import Supernet, parts_of
from metaprune.task import Task, on_calibration_data

if TYPE_CHECKING:
    from optuna import Study

    from metaprune.search.samplers.tyr import Levels, TyrSampler


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes:
        sizes: Of every axis of the network.
        error: Of the outputs, once healed; if that is not asked for, in the last stage of the last round.
        starts: The same for each start, by name.
        evaluations: Configurations that were rated, in whatever stage.
    """

    sizes: Sizes
    error: float
    starts: Mapping[str, float]
    evaluations: int


@ALLOCATORS.register("tyr")
@dataclass(frozen=True, kw_only=True)
class Tyr(Allocator):
    """Sizes found by evolution, measured on the network itself with ready-pruned variants of every layer.

    What other allocators propose is really cut, healed by the recovery ``reconstruct`` and compared with the dense
    network on samples that it was not healed on; from the best of it evolution
    (:class:`~metaprune.search.samplers.tyr.TyrSampler`) starts. Candidates are rated by the squared error of the
    outputs with variants (:class:`~metaprune.search.supernet.Supernet`), all of a generation on the same few samples,
    the best of them on more; what stays compares on the same samples all along. Each round makes the variants anew
    around what was found, at half the interval, as long as that makes other sizes. In the end the best of each round is
    healed and compared too, so that nothing is given that is worse there than one of the starts.

    Source: Li et al., Týr-the-Pruner, NeurIPS 2025, arXiv:2503.09657.
    Differs from it: any network and real costs; which units stay is said by the criterion; layers read the expectation
    over variants of those before them, which in the published code a shadowed argument turns off; the knapsack and
    others as starts; half of the children are guided by a model of what was seen; only outputs are compared, and those
    by squared error; a choice by healing in the end.

    Args:
        samples: Calibration samples that variants are made from, at least 1.
        rated: Samples of the last stage, at least 1.
        first: Samples of the first stage, at least 1; as many as `rated` for a single stage.
        interval: Between levels of an axis in the first round, as a share of it, in (0, 1].
        rounds: Each at half the interval of the one before, at least 1.
        reach: Levels below and above what was found, at least 1.
        generations: At most so many a round, at least 0.
        children: Of a generation, at least 1.
        survivors: Of them, that reach the last stage, at least 1.
        patience: Generations without a better configuration that end a round, at least 1.
        starts: Allocators whose proposals are rated first.
        rows: Most samples x places that are looked at for one layer, at least 1.
        ridge: Strength of the ridge relative to the mean square of the inputs, above 0.
        healed: Samples that starts and results are healed on, and as many others on which they compare, at least 0;
            with 0 all starts are in every round, and what is best on the variants of the last one is given.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"data", "network"})
    adds: ClassVar[bool] = True
    samples: int = 512
    rated: int = 256
    first: int = 64
    interval: float = 0.125
    rounds: int = 4
    reach: int = 2
    generations: int = 12
    children: int = 8
    survivors: int = 2
    patience: int = 4
    starts: tuple[str, ...] = ("rd", "uniform", "global")
    rows: int = 16384
    ridge: float = 1e-3
    healed: int = 512

    def __post_init__(self) -> None:
        counts = "samples rated first rounds reach generations children survivors patience rows healed".split()
        for name in counts:
            least = int(name not in ("generations", "healed"))
            if getattr(self, name) < least:
                raise ConfigError(f"`{name} >= {least}` must hold, but {name}={getattr(self, name)}.")
        if not 0 < self.interval <= 1 or not self.ridge > 0:
            raise ConfigError(
                f"`0 < interval <= 1` and `ridge > 0` must hold, but they are {self.interval} and {self.ridge}."
            )
        for name in self.starts:
            if ALLOCATORS[name].whole or name == "tyr":
                raise ConfigError(
                    f"a start must be an allocator of widths, but {name!r} is not. Take 'rd' or 'uniform'."
                )
        if not self.starts:
            raise ConfigError("there must be a start, but `starts` is empty. Give ('rd', 'uniform').")

    def _sizes(self, problem: Problem) -> Sizes:
        return self.find(problem).sizes

    def find(self, problem: Problem) -> Found:
        """Search, and tell what was found.

        Raises:
            InputError: The data cannot be used.
        """
        starts = {name: _sizes_by(problem, name) for name in self.starts}
        final = _Final(problem, self.healed) if self.healed else None
        first, best = list(starts.values()), list[Sizes]()  # what a round begins with, and what each found
        if final:
            first = best = [min(starts.values(), key=final.error)]
        interval, evaluations = self.interval, 0
        offered: dict[str, set[int]] = {axis.name: set() for axis in problem.axes}
        for number in range(self.rounds):
            levels = {axis.name: self._levels(problem, axis, interval, first, best[-1:]) for axis in problem.axes}
            if all(offered[name].issuperset(sizes_L.tolist()) for name, sizes_L in levels.items()):
                break
            for name, sizes_L in levels.items():
                offered[name].update(sizes_L.tolist())
            one = _Round(self, problem, levels, number)
            sizes, errors = one.run(first)
            best, evaluations = [*best, sizes], evaluations + one.evaluations
            first = [sizes] if final else [*starts.values(), sizes]
            interval /= 2
        if not final:
            return Found(sizes, one.errors[sizes.tobytes()], dict(zip(starts, errors)), evaluations)
        chosen = min(best, key=final.error)
        return Found(
            chosen, final.error(chosen), {name: final.error(sizes) for name, sizes in starts.items()},
            evaluations + len(final.known),
        )  # fmt: skip

    def _levels(
        self, problem: Problem, axis: Axis, interval: float, first: Sequence[Sizes], best: Sequence[Sizes]
    ) -> Sizes:
        """Sizes of an axis: a grid over all of it, or one around what was found, and those to begin with."""
        place = problem.traced.index(axis.name)
        around = np.arange(0, round(1 / interval) + 1) * interval * axis.size
        for sizes in best:
            around = sizes[place] + np.arange(-self.reach, self.reach + 1) * interval * axis.size
        inside = [problem.aligned(axis, round(wanted)) for wanted in around if wanted <= axis.size]
        return np.unique(np.array([*inside, *(int(sizes[place]) for sizes in first)], np.int64))


def _sizes_by(problem: Problem, name: str) -> Sizes:
    """What an allocator gives."""
    sizes = problem.full.copy()
    for axis, ranks in ALLOCATORS[name]().allocate(problem).items():
        sizes[problem.traced.index(axis)] = len(ranks)
    return sizes


class _Round:
    """One grid of levels, its supernet, and an evolution on them."""

    def __init__(self, options: Tyr, problem: Problem, levels: Mapping[str, Sizes], number: int) -> None:
        from metaprune.search.samplers.tyr import Grid  # Optuna takes long to import

        self.options, self.problem, self.number = options, problem, number
        self.supernet = Supernet(
            problem, levels, samples=max(options.samples, options.rated), chunk=min(options.first, options.rated),
            rows=options.rows, ridge=options.ridge,
        )  # fmt: skip
        self.parts = min(len(self.supernet.chunks), -(-options.rated // min(options.first, options.rated)))
        self.grid = Grid.of(problem, levels)
        self.places = [problem.traced.index(name) for name in self.grid.names]
        self.fixed = problem.full.copy()
        for name, sizes_L in levels.items():
            self.fixed[problem.traced.index(name)] = sizes_L[-1]
        self.errors: dict[bytes, float] = {}  # in the last stage
        self.evaluations = 0

    def run(self, starts: Sequence[Sizes]) -> tuple[Sizes, list[float]]:
        """The best sizes, and the error of each start."""
        errors = [self._last(sizes) for sizes in starts]
        if not np.isfinite(errors).any():
            raise InputError(
                "the outputs of the cut network must be finite, but are not, whatever was tried. Look for NaN in the "
                "weights and for layers that are singular on these data."
            )
        fit = [sizes for sizes, error in zip(starts, errors) if np.isfinite(error)]
        return (self._evolved(fit) if len(self.places) else fit[0]), errors

    def _evolved(self, starts: Sequence[Sizes]) -> Sizes:
        from metaprune.search.samplers.tyr import TyrSampler, evolve

        options, grid = self.options, self.grid
        first = [grid.nearest(dict(zip(grid.names, sizes[self.places].tolist()))) for sizes in starts]
        curves = [self.problem.curve(self.problem.traced.axis(name)) for name in grid.names]
        known = self.problem.additive or bool(self.problem.curves)
        sampler = TyrSampler(
            grid, population_size=options.children, start=first[0], seed=self.problem.seed + self.number,
            prior=[curve[sizes_L] for curve, sizes_L in zip(curves, grid.levels)] if known else None,
        )  # fmt: skip
        survivors = [options.survivors] if self.parts > 1 and options.survivors < options.children else []

        def rate(candidates: Sequence["Levels"], generation: int, stage: int) -> list[float]:
            return [self._rated(self.sizes(levels_A), generation, stage == len(survivors)) for levels_A in candidates]

        with _new_study(sampler) as study:
            best = evolve(study, sampler, rate, options.generations, survivors, first, options.patience)
        return self.sizes(sampler.levels(best))

    def sizes(self, levels_A: "Levels") -> Sizes:
        """Sizes of all axes of the network at some levels."""
        sizes = self.fixed.copy()
        sizes[self.places] = self.grid.sizes(levels_A)
        return sizes

    def _rated(self, sizes: Sizes, generation: int, last: bool) -> float:
        """The error of a configuration: in the last stage on all parts, else on one that its generation shares."""
        if last:
            return self._last(sizes)
        self.evaluations += 1
        random = np.random.default_rng([self.problem.seed, self.number, generation])
        return self.supernet.rate(sizes, [int(random.integers(self.parts))])

    def _last(self, sizes: Sizes) -> float:
        key = sizes.tobytes()
        if key not in self.errors:
            self.evaluations += 1
            self.errors[key] = self.supernet.rate(sizes, range(self.parts))
        return self.errors[key]


class _Final:
    """Networks that are really cut, healed on some samples, and compared with the dense one on others."""

    def __init__(self, problem: Problem, samples: int) -> None:
        parts = parts_of(problem, min(samples, 64), 2 * samples)
        self.problem, self.samples = problem, samples
        self.healing, self.comparing = parts[::2], parts[1::2] or parts
        self.wanted = self._outputs(problem.traced.model)
        self.known: dict[bytes, float] = {}

    def error(self, sizes: Sizes) -> float:
        """Squared error of the outputs over their square."""
        if sizes.tobytes() not in self.known:
            self.known[sizes.tobytes()] = self._error(sizes)
        return self.known[sizes.tobytes()]

    def _error(self, sizes: Sizes) -> float:
        network, seed = self.problem.traced, self.problem.seed
        left = {axis: int(sizes[network.index(axis.name)]) for axis in self.problem.axes}
        cuts = (Keep(axis.name, axis.size, self.problem.best(axis, k)) for axis, k in left.items() if k < axis.size)
        plan = Plan(tuple(cuts))
        context = Context(
            calibration=lambda: iter(self.healing), task=self._task(), dense=network.model, network=network, plan=plan,
            seed=seed,
        )  # fmt: skip
        slim = Reconstruct(samples=self.samples).recover(network.apply(plan), context).model
        error = output_error(self.wanted, self._outputs(slim))
        return error if np.isfinite(error) else float("inf")

    def _task(self) -> Task:
        assert self.problem.task is not None
        return self.problem.task

    @torch.no_grad()
    def _outputs(self, model: nn.Module) -> list[Tensor]:
        with evaluating(model), on_calibration_data():
            return [tensors_in(self._task().outputs(model, part))[0].float() for part in self.comparing]


@contextmanager
def _new_study(sampler: "TyrSampler") -> Iterator["Study"]:
    """A study in memory, of which Optuna says nothing."""
    import optuna

    said = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield optuna.create_study(sampler=sampler)
    finally:
        optuna.logging.set_verbosity(said)
