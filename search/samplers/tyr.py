"""Týr: evolution of one level an axis, inside a budget, as a sampler of Optuna.

Array suffixes: A axes, L levels of an axis, N configurations, S steps (from each level of each axis to the next).
"""

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseGASampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from scipy.linalg import cho_solve, cholesky, solve_triangular

from metaprune.allocate import Problem, Sizes
from metaprune.errors import ConfigError

Levels = npt.NDArray[np.int64]  # (A,): the place of the chosen level of each axis, 0 the smallest
Numbers = npt.NDArray[np.float64]
Rate = Callable[[Sequence[Levels], int, int], Sequence[float]]  # candidates, generation, stage -> what is to be small

_HALVINGS = 20  # to find the price of cost
_TRIES = 20  # to find a child that is new
_STEPS = 3000  # more than so many are too many for a model of them
_RIDGE = 1e-3  # noise over the variance of neighbouring steps
_BOLD = 0.3  # of the uncertainty that a drawn model shows


@dataclass(frozen=True, eq=False)
class Grid:
    """Configurations of some axes by levels, and what they cost.

    Args:
        names: Of the axes.
        levels: Sizes of each axis, ascending, shape (L,); L may differ.
        usage: Sizes (N, A) -> cost over its limit, shape (limits, N). It never falls when a size grows.

    Raises:
        ConfigError: Even the smallest sizes cost more than a limit.
    """

    names: tuple[str, ...]
    levels: tuple[Sizes, ...]
    usage: Callable[[Sizes], Numbers]

    def __post_init__(self) -> None:
        if not self.fits(np.zeros(len(self.names), np.int64)):
            raise ConfigError("the smallest level of every axis must meet the limits, but does not. Give smaller ones.")

    @classmethod
    def of(cls, problem: Problem, levels: Mapping[str, Sizes]) -> "Grid":
        """The axes of a problem that have several levels; the others keep their only one, or all units."""
        index = problem.network.index
        full = problem.full.copy()
        for name, sizes_L in levels.items():
            full[index(name)] = sizes_L[-1]
        free = [axis.name for axis in problem.axes if len(levels.get(axis.name, ())) > 1]
        places = [index(name) for name in free]

        def usage(sizes_NA: Sizes) -> Numbers:
            rows = np.repeat(full[None], len(sizes_NA), axis=0)
            rows[:, places] = sizes_NA
            costs = problem.network.cost_many(rows)
            return np.stack([costs[quantity] / limit for quantity, limit in problem.limits.items()])

        return cls(tuple(free), tuple(levels[name] for name in free), usage)

    @cached_property
    def counts(self) -> Levels:
        """Levels of each axis, shape (A,)."""
        return np.array([len(sizes_L) for sizes_L in self.levels], np.int64)

    @cached_property
    def _table_AL(self) -> Sizes:
        widest = int(self.counts.max(initial=1))
        return np.array([np.pad(sizes_L, (0, widest - len(sizes_L)), "edge") for sizes_L in self.levels], np.int64)

    def sizes(self, levels_NA: Levels) -> Sizes:
        """Sizes at these levels, of the same shape."""
        return np.asarray(self._table_AL[np.arange(len(self.names)), levels_NA])

    def used(self, levels_NA: Levels) -> Numbers:
        """The largest share of a limit that each configuration uses, shape (N,)."""
        return np.asarray(self.usage(self.sizes(levels_NA)).max(axis=0))

    def fits(self, levels_A: Levels) -> bool:
        """Every limit holds."""
        return bool(self.used(levels_A[None])[0] <= 1) if len(self.names) else True

    def nearest(self, sizes: Mapping[str, int]) -> Levels:
        """The largest levels that exceed none of these sizes, or the smallest ones."""
        wanted = (np.searchsorted(sizes_L, sizes[n], "right") - 1 for n, sizes_L in zip(self.names, self.levels))
        return np.maximum(np.array(list(wanted), np.int64), 0)

    def uniform(self) -> Levels:
        """The largest share of its levels that every axis can have alike."""
        low, high = 0.0, 1.0
        for _ in range(30):
            share = (low + high) / 2
            low, high = (share, high) if self.fits(self._at(share)) else (low, share)
        return self._at(1.0) if self.fits(self._at(1.0)) else self._at(low)

    def _at(self, share: float) -> Levels:
        return np.floor(share * (self.counts - 1) + 1e-9).astype(np.int64)

    def filled(self, levels_A: Levels, may_A: npt.NDArray[np.bool_], choose: Callable[[Levels], int]) -> Levels:
        """Raise levels, one step at a time, until no axis that may rise fits.

        Args:
            levels_A: Levels that fit.
            may_A: Axes that may rise.
            choose: Gets the axes that can rise, gives one of them.
        """
        levels_A, may_A = levels_A.copy(), may_A.copy()
        while True:
            open_N = np.flatnonzero(may_A & (levels_A < self.counts - 1))
            if not len(open_N):
                return levels_A
            fits_N = self.used(levels_A + (open_N[:, None] == np.arange(len(levels_A)))) <= 1
            may_A[open_N[~fits_N]] = False  # costs only grow: what does not fit once does not fit later
            if fits_N.any():
                levels_A[choose(open_N[fits_N])] += 1


class Worth:
    """What each step is worth, by linear regression on what configurations were seen to lose.

    The loss is taken for a sum over axes. Neighbouring steps of an axis are worth about the same until something else
    is seen (a random walk as prior), so that one evaluation says something about steps that nobody has taken. Values
    that do not compare (other samples) are of different groups, each with a constant of its own.

    Args:
        counts: Levels of each axis.
        prior: Loss of each axis at its levels, shape (L,) each, up to a common factor; None for nothing known.
    """

    def __init__(self, counts: Levels, prior: Sequence[Numbers] | None = None) -> None:
        self.counts, self.ends = counts, np.cumsum(counts - 1)
        steps = int(self.ends[-1]) if len(counts) else 0
        self.axis_S = np.repeat(np.arange(len(counts)), counts - 1)
        self.step_S = np.concatenate([np.arange(count - 1) for count in counts] or [np.zeros(0, np.int64)])
        self.prior_S = np.zeros(steps) if prior is None else np.concatenate([-np.diff(loss_L) for loss_L in prior])
        self.xx_SS, self.xy_S = np.zeros((steps, steps)), np.zeros(steps)  # sums over all that was seen
        self._groups: dict[Any, tuple[int, Numbers, float]] = {}  # number, sum of steps taken, sum of losses
        self._new: list[Numbers] = []
        apart_S = np.full(steps, 0.05)  # a little towards the prior
        self._walk_SS = np.diag(apart_S)
        for left, right in pairwise(range(steps)):
            if self.axis_S[left] == self.axis_S[right]:
                self._walk_SS[np.ix_([left, right], [left, right])] += [[1, -1], [-1, 1]]

    def add(self, levels_A: Levels, loss: float, group: Any = None) -> None:
        """Take one more evaluation in."""
        x_S = (levels_A[self.axis_S] > self.step_S).astype(np.float64)
        self._new.append(x_S)
        self.xy_S += loss * x_S
        count, sum_S, total = self._groups.get(group, (0, np.zeros_like(x_S), 0.0))
        self._groups[group] = count + 1, sum_S + x_S, total + loss

    def fit(self) -> None:
        """Make what is known ready to be drawn from; something must be."""
        if self._new:
            new_NS = np.stack(self._new)
            self.xx_SS += new_NS.T @ new_NS
            self._new.clear()
        counts_G, sums_GS, totals_G = (np.array(column) for column in zip(*self._groups.values()))
        means_GS = sums_GS / counts_G[:, None]
        xx_SS, lowers_S = self.xx_SS - means_GS.T @ sums_GS, totals_G @ means_GS - self.xy_S
        given, seen = float(self.prior_S @ lowers_S), float(self.prior_S @ xx_SS @ self.prior_S)
        known_S = max(given / seen, 0.0) * self.prior_S if seen > 0 else self.prior_S
        self._factor = cholesky(xx_SS + _RIDGE * self._walk_SS, lower=True, check_finite=False)
        missing_S = lowers_S - xx_SS @ known_S
        self.mean_S = known_S + cho_solve((self._factor, True), missing_S, check_finite=False)
        self.spread = float(np.sqrt(_RIDGE * np.mean(self.mean_S**2)))

    def draw(self, random: np.random.Generator) -> Numbers:
        """Loss of each axis at its levels against its smallest, shape (A, most levels), as far as it is known."""
        noise_S = random.standard_normal(len(self.mean_S))
        unsure_S = solve_triangular(self._factor, noise_S, trans="T", lower=True, check_finite=False)
        loss_AL = np.zeros((len(self.counts), int(self.counts.max(initial=1))))
        loss_AL[self.axis_S, self.step_S + 1] = -(self.mean_S + _BOLD * self.spread * unsure_S)
        return np.cumsum(loss_AL, axis=1)


@dataclass
class _Memory:
    """What a sampler knows of a study, in step with its trials."""

    worth: Worth | None
    known: set[int] = field(default_factory=set)  # trials whose levels are in `tried`
    tried: set[bytes] = field(default_factory=set)
    learnt: set[int] = field(default_factory=set)  # trials that `worth` was made from
    generation: int = -1  # for which it was made


class TyrSampler(BaseGASampler):  # type: ignore[misc]  # Optuna's types are not followed
    """One level an axis, by evolution that keeps to the budget.

    A generation descends from the best configuration so far. A child by mutation has a few axes switched down or up a
    level, others down until the limits hold, and others up until they are used up, all at the real cost of every level.
    A guided child is the best one within a level of the parent by a linear model of all that was seen (:class:`Worth`),
    drawn as uncertain as it is. No child is evaluated twice. Random numbers hang on the seed and the number of the
    trial alone, and the model on earlier generations, so that a study can go on anywhere.

    It works in ``study.optimize`` with ``trial.suggest_int(name, 0, count - 1)`` for every axis of the grid, and in
    :func:`evolve`, which adds whole generations.

    Source: Li et al., Týr-the-Pruner, NeurIPS 2025, arXiv:2503.09657, section 3.3 (evolution with budget-neutral
    switches); Sieberling et al., EvoPress, ICML 2025, arXiv:2410.14649.
    Differs from it: switches are paid by cost, not one for one among axes of a type; half of the children are guided;
    small generations, which need fewer evaluations where these are made one after another.

    Args:
        grid: The axes and their levels.
        population_size: Children of a generation, at least 1.
        guided: Share of the children that a model of the loss proposes, in [0, 1].
        switches: Most axes that a mutation switches first, at least 1.
        start: Where to start from; the uniform configuration if None.
        prior: For :class:`Worth`.
        seed: Decides all random numbers.

    Raises:
        ConfigError: An option is out of range, or the start does not fit.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        population_size: int = 8,
        guided: float = 0.5,
        switches: int = 4,
        start: Levels | None = None,
        prior: Sequence[Numbers] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(population_size)
        if population_size < 1 or switches < 1 or not 0 <= guided <= 1:
            raise ConfigError(
                "`population_size >= 1`, `switches >= 1` and `0 <= guided <= 1` must hold, but they are "
                f"{population_size}, {switches} and {guided}."
            )
        self.grid, self.guided, self.switches, self.prior, self.seed = grid, guided, switches, prior, seed
        self.start = grid.uniform() if start is None else start
        if not grid.fits(self.start):
            used = grid.used(self.start[None])[0]
            raise ConfigError(f"the start must meet the limits, but uses {used:.4f} of one. Give lower levels.")
        shared = {
            count: IntDistribution(0, count - 1) for count in grid.counts.tolist()
        }  # copied once a trial, not often
        self.space: dict[str, BaseDistribution] = dict(zip(grid.names, map(shared.__getitem__, grid.counts.tolist())))
        self._others = RandomSampler(seed)
        self._memories: WeakKeyDictionary[Any, dict[int, _Memory]] = WeakKeyDictionary()  # by storage, and study

    # ---- what Optuna asks ------------------------------------------------------------------------------------------

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Every axis of the grid."""
        return self.space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The levels of a child of the present generation."""
        generation = self.get_trial_generation(study, trial)
        return self.params(self.propose(study, generation, [trial.number], again=True)[0])

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Anything that is no axis, at random."""
        return self._others.sample_independent(study, trial, param_name, param_distribution)

    def get_trial_generation(self, study: Study, trial: FrozenTrial) -> int:
        """The latest one, or the next if that is full; trials that were pruned count."""
        key = self._get_generation_key()
        if key in trial.system_attrs:
            return int(trial.system_attrs[key])
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        numbers = [self._born(other) for other in done]
        latest = max(numbers, default=0)
        generation = latest + (numbers.count(latest) >= (self.population_size or 1))
        study._storage.set_trial_system_attr(trial._trial_id, key, generation)
        return generation

    def get_population(self, study: Study, generation: int) -> list[FrozenTrial]:
        """The completed trials of a generation, also of those that were added as a whole."""
        key = self._get_generation_key()
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return [trial for trial in done if trial.system_attrs.get(key) == generation]

    def select_parent(self, study: Study, generation: int) -> list[FrozenTrial]:
        """The best trial up to this generation that meets the limits."""
        trials = [*self.get_population(study, generation - 1), *self.get_parent_population(study, generation - 1)]
        fitting = [trial for trial in trials if self.grid.fits(self.levels(trial))]
        return [min(fitting, key=lambda trial: (self._loss(study, trial), trial.number))] if fitting else []

    # ---- children --------------------------------------------------------------------------------------------------

    def params(self, levels_A: Levels) -> dict[str, int]:
        """Levels as parameters of a trial."""
        return dict(zip(self.grid.names, levels_A.tolist()))

    def levels(self, trial: FrozenTrial) -> Levels:
        """The levels of a trial."""
        return np.array([trial.params[name] for name in self.grid.names], np.int64)

    def propose(self, study: Study, generation: int, numbers: Iterable[int], *, again: bool = False) -> list[Levels]:
        """Children of a generation, one a trial number; fewer where nothing new is found.

        Args:
            study: What was seen so far.
            generation: Which one.
            numbers: Of the trials to be.
            again: Where nothing new is found, give what has been there.

        Raises:
            ConfigError: The study has several objectives.
        """
        if len(study.directions) > 1:
            raise ConfigError(f"a study of this sampler must have one objective, but has {len(study.directions)}.")
        memory = self._remembered(study, generation)
        parents = self.get_parent_population(study, generation)
        parent = self.levels(parents[0]) if parents else self.start
        children: list[Levels] = []
        for number in numbers:
            random = np.random.default_rng([self.seed, number])
            child = self._child(parent, memory, random) if memory.tried or parents else self.start
            if again or child.tobytes() not in memory.tried:
                memory.tried.add(child.tobytes())
                children.append(child)
        return children

    def _child(self, parent: Levels, memory: _Memory, random: np.random.Generator) -> Levels:
        guided = memory.worth is not None and len(memory.learnt) > 1 and random.random() < self.guided
        for attempt in range(_TRIES):
            if guided and not attempt:
                assert memory.worth is not None
                child = self._guided(parent, memory.worth.draw(random))
            else:
                child = self._mutated(parent, self.switches + attempt, random)
            if child.tobytes() not in memory.tried:
                return child
        return child

    def _mutated(self, parent: Levels, most: int, random: np.random.Generator) -> Levels:
        """A few switches, and what the limits ask for and leave."""
        levels_A, top_A = parent.copy(), self.grid.counts - 1
        moved_A = np.zeros(len(levels_A), np.int64)
        for _ in range(min(random.integers(1, most + 1, 2))):
            step = 1 if random.random() < 0.5 else -1
            free = np.flatnonzero((moved_A != -step) & ((levels_A < top_A) if step > 0 else (levels_A > 0)))
            if len(free):
                chosen = random.choice(free)
                levels_A[chosen] += step
                moved_A[chosen] = step
        while not self.grid.fits(levels_A):
            free = np.flatnonzero((levels_A > 0) & (moved_A <= 0))
            if not len(free):
                return parent
            chosen = random.choice(free)
            levels_A[chosen] -= 1
            moved_A[chosen] = -1
        return self.grid.filled(levels_A, moved_A >= 0, lambda free: int(random.choice(free)))

    def _guided(self, parent: Levels, loss_AL: Numbers) -> Levels:
        """The best of a model within one level of the parent, at prices that make it meet the limits."""
        axes, top_A = np.arange(len(parent)), self.grid.counts - 1
        near_A3: Levels = np.clip(parent[:, None] + np.array([-1, 0, 1]), 0, top_A[:, None])
        loss_A3, cost_A3 = loss_AL[axes[:, None], near_A3], self._costs(parent, near_A3)

        def best_at(price: float) -> Levels:
            return np.asarray(near_A3[axes, (loss_A3 + price * cost_A3).argmin(axis=1)])

        low, high = 0.0, 1e-6 * float(np.ptp(loss_A3))
        while not self.grid.fits(best_at(high)) and high < 1e12 * float(np.ptp(loss_A3)):
            low, high = high, 10 * high
        for _ in range(_HALVINGS):
            price = (low + high) / 2
            low, high = (low, price) if self.grid.fits(best_at(price)) else (price, high)
        levels_A = best_at(high)
        if not self.grid.fits(levels_A):
            return parent
        # What the model takes for harm is left alone: what all steps are worth together is only seen where limits are
        # not used up.
        step_A = np.maximum(cost_A3[:, 2] - cost_A3[:, 0], 1e-12)

        def gain(free: Levels) -> Numbers:
            return np.asarray((loss_AL[free, levels_A[free]] - loss_AL[free, levels_A[free] + 1]) / step_A[free])

        rising = np.flatnonzero(levels_A < top_A)
        helps_A = np.isin(axes, rising[gain(rising) > 0])
        return self.grid.filled(levels_A, helps_A, lambda free: int(free[gain(free).argmax()]))

    def _costs(self, parent: Levels, near_A3: Levels) -> Numbers:
        """What the limit that the parent comes nearest to is used by, with one axis at another level."""
        rows = np.repeat(parent[None], 3 * len(parent) + 1, axis=0)
        rows[np.arange(3 * len(parent)), np.repeat(np.arange(len(parent)), 3)] = near_A3.ravel()
        usage_QN = self.grid.usage(self.grid.sizes(rows))
        return np.asarray(usage_QN[int(usage_QN[:, -1].argmax()), :-1].reshape(near_A3.shape))

    # ---- memory ----------------------------------------------------------------------------------------------------

    def _memory(self, study: Study) -> _Memory:
        memories = self._memories.setdefault(study._storage, {})
        if study._study_id not in memories:
            small = int((self.grid.counts - 1).sum()) <= _STEPS
            memories[study._study_id] = _Memory(Worth(self.grid.counts, self.prior) if small and self.guided else None)
        return memories[study._study_id]

    def _remembered(self, study: Study, generation: int) -> _Memory:
        """What the study has seen up to now, and a model of what it had seen when a generation began."""
        memory = self._memory(study)
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        for trial in done if len(done) > len(memory.known) else []:
            if trial.number not in memory.known:
                memory.known.add(trial.number)
                if all(name in trial.params for name in self.grid.names):
                    memory.tried.add(self.levels(trial).tobytes())
        if memory.worth is not None and memory.generation != generation:
            memory.generation = generation
            for trial in done:
                if trial.number not in memory.learnt and self._born(trial) < generation:
                    memory.learnt.add(trial.number)
                    self._learn(study, trial, memory.worth)
            if memory.learnt:
                memory.worth.fit()
        return memory

    def _born(self, trial: FrozenTrial) -> int:
        """The generation of a trial; what was given from outside is of the first."""
        return int(trial.system_attrs.get(self._get_generation_key(), 0))

    def _learn(self, study: Study, trial: FrozenTrial, worth: Worth) -> None:
        if any(name not in trial.params for name in self.grid.names):
            return
        levels_A = self.levels(trial)
        for stage, value in trial.intermediate_values.items():
            loss = value if study.direction == StudyDirection.MINIMIZE else -value
            if np.isfinite(loss):
                worth.add(levels_A, loss, (self._born(trial), stage))
        if trial.state == TrialState.COMPLETE and np.isfinite(self._loss(study, trial)):
            worth.add(levels_A, self._loss(study, trial))

    @staticmethod
    def _loss(study: Study, trial: FrozenTrial) -> float:
        assert trial.value is not None
        return trial.value if study.direction == StudyDirection.MINIMIZE else -trial.value


def evolve(
    study: Study,
    sampler: TyrSampler,
    rate: Rate,
    generations: int,
    survivors: Sequence[int] = (),
    starts: Sequence[Levels] = (),
    patience: int | None = None,
) -> FrozenTrial:
    """Run generations of a sampler, each rated in stages and added to the study as a whole.

    All children of a generation are rated in the first stage, the best of them in the next, and so on; those that drop
    out are pruned trials, with what they were rated as intermediate values. Values of the last stage compare over all
    generations.

    Args:
        study: With one objective, to be minimised.
        sampler: Of the study.
        rate: Rates candidates in a stage of a generation; NaN counts as infinite.
        generations: At most so many.
        survivors: How many of a generation go on from each stage but the last.
        starts: Configurations to begin with, rated in the last stage; that of the sampler if empty.
        patience: Stop after so many generations without a better configuration; None never.

    Returns:
        The best trial.
    """
    key, last = sampler._get_generation_key(), len(survivors)

    def add(levels_A: Levels, generation: int, values: Mapping[int, float], complete: bool) -> None:
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE if complete else TrialState.PRUNED,
                params=sampler.params(levels_A),
                distributions=sampler.space,
                value=values[last] if complete else None,
                intermediate_values={stage: value for stage, value in values.items() if stage < last},
                system_attrs={key: generation},
            )
        )

    first = list({levels_A.tobytes(): levels_A for levels_A in (starts or [sampler.start])}.values())
    values = _numbers(rate(first, 0, last))
    for levels_A, value in zip(first, values, strict=True):
        add(levels_A, 0, {last: value}, complete=True)
    least, since = min(values), 0
    for generation in range(1, generations + 1):
        number = len(study.get_trials(deepcopy=False))
        children = sampler.propose(study, generation, range(number, number + (sampler.population_size or 1)))
        if not children or since == patience:
            break
        seen: list[dict[int, float]] = [{} for _ in children]
        left = list(range(len(children)))
        for stage in range(last + 1):
            for k, value in zip(left, _numbers(rate([children[k] for k in left], generation, stage)), strict=True):
                seen[k][stage] = value
            if stage < last:
                left = heapq.nsmallest(survivors[stage], left, key=lambda k: seen[k][stage])
        for levels_A, rated in zip(children, seen):
            add(levels_A, generation, rated, complete=last in rated)
        best = min(seen[k][last] for k in left)
        least, since = (best, 0) if best < least else (least, since + 1)
    return study.best_trial


def _numbers(values: Iterable[float]) -> list[float]:
    return [float("inf") if np.isnan(value) else float(value) for value in values]
