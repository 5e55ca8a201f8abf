"""A campaign: one Optuna study a rung, baselines first, then what the sampler proposes, then what climbs.

Every worker runs the same code on the same storage, and none of them is needed more than another. Nothing here knows
what a network is: an evaluator finds numbers for a configuration on a rung, and the study of that rung is told.
"""

import math
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from typing import Any, Self

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from metaprune import __version__
from metaprune.errors import ConfigError, InputError
from metaprune.search.pareto import Numbers, Point, best, ranks, unchanged
from metaprune.search.queue import ORIGIN, Queue, Task, Worker
from metaprune.search.results import digest
from metaprune.search.settings import CHOICES, DIRECTIONS, STEP, Settings, Stop, sign_of

ABOUT, STOP, BEGAN, CLOSED = "metaprune", "metaprune:stop", "metaprune:began", "metaprune:closed"
REFERENCES = ("rd", "uniform", "global")  # allocators that what climbs is held against
PREDICTED = "predicted_loss"  # stands for accuracy and loss where nothing is measured
SAMPLER = "sampler"
_ATTEMPTS = (4, 64)  # proposals of the sampler, then random ones, until one is new
MAJOR = optuna.__version__.partition(".")[0]


@dataclass(frozen=True, eq=False)
class Job:
    """A trial that is to be evaluated on a rung."""

    rung: int
    trial: FrozenTrial
    key: str
    config: Mapping[str, Any]


class Campaign:
    """The tasks of all rungs, and the rules by which they come and end.

    Args:
        settings: What was asked for.
        storage: Where the studies are.
        worker: Who asks.
        index: A number for its random draws; None makes one of its name.
    """

    def __init__(
        self, settings: Settings, storage: BaseStorage, worker: Worker | None = None, index: int | None = None
    ) -> None:
        self.settings, self.storage, self._identity = settings, storage, settings.identity
        self.worker = worker or Worker.here()
        self._index = zlib.crc32(self.worker.name.encode()) if index is None else index
        self.queues = [
            Queue(storage, self._study(number), self.worker, settings.lease) for number in range(len(settings.rungs))
        ]

    @classmethod
    def begin(
        cls,
        settings: Settings,
        storage: BaseStorage,
        about: Mapping[str, str],
        worker: Worker | None = None,
        index: int | None = None,
    ) -> Self:
        """Make the studies, or take those that are there, and file the baselines that are missing.

        Args:
            settings: What was asked for.
            storage: Where the studies are.
            about: Fingerprints of network and data, which all workers must share.
            worker: Who asks.
            index: As for the class.

        Raises:
            ConfigError: The storage holds a campaign of that name with other settings, network, data or Optuna.
        """
        for number in range(len(settings.rungs)):
            optuna.create_study(
                study_name=f"{settings.name}/{settings.fidelity(number)}",
                storage=storage,
                directions=[_direction(goal) for goal in goals(settings, number)],
                load_if_exists=True,
            )
        campaign = cls(settings, storage, worker, index)
        campaign.check(about)
        study = campaign.queues[0].study
        study.set_user_attr(ABOUT, campaign._about(about))
        study.set_user_attr(STOP, asdict(settings.stop))
        study.set_user_attr(CLOSED, None)
        campaign._file_baselines()
        study.set_user_attr(BEGAN, time.time())  # before this nobody proposes
        return campaign

    @staticmethod
    def forget(settings: Settings, storage: BaseStorage) -> None:
        """Delete the studies of a campaign."""
        for number in range(len(settings.rungs)):
            with suppress(KeyError):
                optuna.delete_study(study_name=f"{settings.name}/{settings.fidelity(number)}", storage=storage)

    def check(self, about: Mapping[str, str]) -> None:
        """Whether what is there belongs to these settings; see :meth:`begin`."""
        there = self.queues[0].study.user_attrs.get(ABOUT)
        if there is None:
            return
        for name, value in self._about(about).items():
            if there.get(name) != value and name != "metaprune":
                raise ConfigError(
                    f"the storage holds a campaign {self.settings.name!r} with {name} {there.get(name)!r}, but here it "
                    f"is {value!r}. Go on with what it was begun with, or give this one another `name` and folder."
                )

    def _about(self, about: Mapping[str, str]) -> dict[str, str]:
        return {"config": self.settings.identity, "optuna": MAJOR, "metaprune": __version__, **about}

    def _study(self, number: int) -> optuna.Study:
        name = f"{self.settings.name}/{self.settings.fidelity(number)}"
        try:
            return optuna.load_study(study_name=name, storage=self.storage, sampler=RandomSampler(0))
        except KeyError as error:
            raise InputError(
                f"the storage must hold the campaign {self.settings.name!r}, but has no study {name!r}. Begin it with "
                "`metaprune search run`."
            ) from error

    # ---- what there is to choose -------------------------------------------------------------------------------------

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Of every choice that has more than one value."""
        choices = self.settings.choices
        found: dict[str, BaseDistribution] = {}
        for name in CHOICES:
            values = getattr(choices, name)
            if name == "allocator":
                values = tuple(dict.fromkeys((*values, *self.settings.baselines)))
            if len(values) > 1:
                found[name] = CategoricalDistribution(values)
        if not isinstance(choices.budget, Mapping):
            return found | ({"budget": CategoricalDistribution(choices.budget)} if len(choices.budget) > 1 else {})
        ((_, (low, high)),) = choices.budget.items()
        return found | {"budget": IntDistribution(round(100 * low), round(100 * high), step=STEP)}

    def config(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """All that decides what a trial gives: its choices over the first values of the others."""
        choices = self.settings.choices
        config = {name: params.get(name, getattr(choices, name)[0]) for name in CHOICES}
        config["budget"] = params.get("budget", choices.budgets[0])
        if isinstance(choices.budget, Mapping) and not isinstance(config["budget"], str):
            config["budget"] = f"{next(iter(choices.budget))}={config['budget'] / 100:g}"
        if config["metanet"] in ("scores", "both"):
            config["criterion"] = "metanet"  # which is then the judge, whatever was chosen
        return config

    def key(self, params: Mapping[str, Any]) -> str:
        """The hash that such a trial is known by."""
        return digest([self._identity, self.config(params)])

    def _params(self, **chosen: Any) -> dict[str, Any]:
        """Parameters of a trial with some choices made, the others at their first value."""
        choices, params = self.settings.choices, dict[str, Any]()
        for name, distribution in self.distributions.items():
            value = chosen.get(name, choices.budgets[0] if name == "budget" else getattr(choices, name)[0])
            if isinstance(distribution, IntDistribution) and isinstance(value, str):
                value = round(100 * float(value.partition("=")[2]))
            params[name] = value
        return params

    def _file_baselines(self) -> None:
        modes = [mode for mode in self.settings.choices.metanet if mode != "off"]
        proposals = [
            *((name, {"allocator": name}) for name in self.settings.baselines),
            *((f"metanet {mode}", {"metanet": mode}) for mode in modes),
        ]
        there = self.queues[0].tasks()
        for budget in self.settings.choices.budgets:
            for origin, chosen in proposals:
                params = self._params(budget=budget, **chosen)
                if (key := self.key(params)) not in there and len(there) < self.settings.stop.trials:
                    self.queues[0].add(key, params, self.distributions, origin)
                    there = self.queues[0].tasks()

    # ---- what comes next ---------------------------------------------------------------------------------------------

    def next(self) -> Job | None:
        """The next task, now this worker's, or None where there is none at the moment."""
        for number, queue in enumerate(self.queues):
            if number == 0:
                self._propose()
            else:
                self._let_climb(number)
            trial = queue.claim(self._stop.trials if number == 0 else None)
            if trial is not None:
                return Job(number, trial, trial.user_attrs["key"], self.config(trial.params))
            if not self.ended(number):
                return None
        return None

    @property
    def over(self) -> bool:
        """Nothing is left to do."""
        for queue in self.queues:
            queue.trials()
        return all(self.ended(number) for number in range(len(self.queues)))

    def ended(self, number: int) -> bool:
        """Whether nothing more happens on this rung, as far as was seen."""
        if number == 0 and self.closed is None:
            return False
        tasks = self.queues[number].tasks(seen=True)
        missing = number > 0 and not set(self._climbing(number)) <= set(tasks)
        return not missing and all(task.settled for task in tasks.values())

    @property
    def closed(self) -> str | None:
        """Why no trial is proposed any more."""
        return self.queues[0].study.user_attrs.get(CLOSED)

    def close(self, why: str) -> None:
        """Propose no further trial; what was filed goes on, and climbs."""
        self.queues[0].study.set_user_attr(CLOSED, why)

    @property
    def _stop(self) -> Stop:
        return Stop(**self.queues[0].study.user_attrs.get(STOP, asdict(self.settings.stop)))

    def _propose(self) -> None:
        """File a new trial, unless one waits, or it is time to stop."""
        tasks = self.queues[0].tasks(seen=True)
        if any(task.state == "waiting" for task in tasks.values()):
            return
        attrs = self.queues[0].study.user_attrs
        if BEGAN not in attrs or attrs[CLOSED] is not None:
            return
        why = self._reason_to_stop(tasks, Stop(**attrs[STOP]), attrs[BEGAN])
        if why is None:
            found = self._proposal(tasks)
            if found is not None:
                params, remembered = found
                self.queues[0].add(self.key(params), params, self.distributions, SAMPLER, remembered)
                return
            why = "no choice was found that had not been tried"
        self.close(why)

    def _reason_to_stop(self, tasks: Mapping[str, Task], stop: Stop, began: float) -> str | None:
        if len(tasks) >= stop.trials:
            return f"{stop.trials} trials"
        if stop.evaluations is not None and self._evaluations(len(self.queues)) >= stop.evaluations:
            return f"{stop.evaluations} evaluations"
        if stop.seconds is not None and time.time() - began > stop.seconds:
            return f"{stop.seconds:g} s"
        done = sorted((task for task in tasks.values() if self._feasible(task)), key=_completed)
        if stop.plateau is not None and unchanged(self._losses(done, 0)) >= stop.plateau:
            return f"the front has not changed for {stop.plateau} trials"
        return None

    def _evaluations(self, rungs: int) -> int:
        return sum(task.settled for queue in self.queues[:rungs] for task in queue.tasks(seen=True).values())

    def _proposal(self, tasks: Mapping[str, Task]) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Parameters that were not tried yet, and what the sampler wants to remember of them."""
        if not self.distributions:
            return None
        shadow, asked = self._shadow(tasks), len(tasks)
        for attempt in range(sum(_ATTEMPTS)):
            draw = np.random.SeedSequence([self.settings.seed, asked, self._index, attempt]).generate_state(1)
            name = self.settings.sampler if attempt < _ATTEMPTS[0] else "random"
            shadow.sampler = sampler(name, int(draw[0]))
            trial = shadow.ask(dict(self.distributions))
            if self.key(trial.params) not in tasks:
                return dict(trial.params), dict(shadow.trials[trial.number].system_attrs)
        return None

    def _shadow(self, tasks: Mapping[str, Task]) -> optuna.Study:
        """The first rung's study in memory, where asking costs no transaction and leaves no trial behind.

        What waits or runs is running there, so that samplers keep away from it.
        """
        shadow = optuna.create_study(directions=[_direction(goal) for goal in goals(self.settings, 0)])
        for task in tasks.values():
            trial = task.trial
            if task.state == "done":
                shadow.add_trial(trial)
            elif task.state in ("waiting", "running", "lost"):
                shadow.add_trial(
                    create_trial(state=TrialState.RUNNING, params=trial.params, distributions=trial.distributions)
                )
        return shadow

    # ---- who climbs --------------------------------------------------------------------------------------------------

    def _let_climb(self, number: int) -> None:
        if not self.ended(number - 1):
            return
        there = self.queues[number].tasks(seen=True)
        for key, (params, origin) in self._climbing(number).items():
            if key not in there:
                self.queues[number].add(key, params, self.distributions, origin)

    def _climbing(self, number: int) -> dict[str, tuple[dict[str, Any], str]]:
        """Parameters and origin of what climbs to a rung, by key, once the one below has ended.

        Beside each trial, some plain allocators at the same budget climb, so that its gain can be told there too.
        """
        below = [task for task in self.queues[number - 1].tasks(seen=True).values() if self._feasible(task)]
        chosen = best(self._losses(below, number - 1), self.settings.rungs[number].climbing(len(below)))
        found: dict[str, tuple[dict[str, Any], str]] = {}
        for task in (below[row] for row in chosen):
            found[task.key] = (dict(task.trial.params), str(task.trial.user_attrs.get(ORIGIN, "")))
        for params, _ in list(found.values()):
            for name in (name for name in REFERENCES if name in self.settings.baselines):
                budget = {"budget": params["budget"]} if "budget" in params else {}
                sibling = self._params(allocator=name, **budget)
                found.setdefault(self.key(sibling), (sibling, name))
        most = self._stop.evaluations
        left = len(found) if most is None else max(0, most - self._evaluations(number))
        return dict(list(found.items())[:left])

    # ---- what was found ----------------------------------------------------------------------------------------------

    def _feasible(self, task: Task) -> bool:
        return task.state == "done" and all(value <= 0 for value in task.trial.constraints.values())

    def _losses(self, tasks: Sequence[Task], number: int) -> Numbers:
        signs = [sign_of(goal) for goal in goals(self.settings, number)]
        return np.array([task.trial.values for task in tasks], np.float64).reshape(len(tasks), len(signs)) * signs

    def points(self, number: int) -> list[Point]:
        """Everything that was evaluated on a rung, in the order of trials."""
        done = [task for task in self.queues[number].tasks().values() if task.state == "done"]
        feasible = [task for task in done if self._feasible(task)]
        front = {
            task.key for task, rank in zip(feasible, ranks(self._losses(feasible, number)).tolist()) if rank == 0
        }  # fmt: skip
        first, known = goals(self.settings, number)[0], {task.key: task for task in done}
        sign = -sign_of(first)
        plain = cache(self._plain)
        found = []
        for task in done:
            config, metrics = self.config(task.trial.params), task.result["metrics"]
            gains = {
                name: sign * (metrics[first] - known[key].result["metrics"][first]) if key in known else None
                for name, key in plain(config["budget"]).items()
            }
            found.append(
                Point(
                    key=task.key,
                    number=task.trial.number,
                    origin=str(task.trial.user_attrs.get(ORIGIN, "")),
                    fidelity=self.settings.fidelity(number),
                    config=config,
                    metrics=metrics,
                    feasible=self._feasible(task),
                    front=task.key in front,
                    gains=gains,
                    sizes=task.result.get("sizes", {}),
                    finished_ms=round(1000 * _completed(task).timestamp()),
                )
            )
        return found

    def rivals(self, point: Point, among: Sequence[Point]) -> dict[str, Point]:
        """What plain allocators gave at the budget of a point, by their names; without the point itself.

        Args:
            point: One of the rung.
            among: All points of that rung.
        """
        known = {other.key: other for other in among if other.key != point.key}
        return {name: known[key] for name, key in self._plain(point.config["budget"]).items() if key in known}

    def _plain(self, budget: str) -> dict[str, str]:
        """By plain allocator among the baselines, the key of its trial at a budget."""
        names = [name for name in REFERENCES if name in self.settings.baselines]
        return {name: self.key(self._params(allocator=name, budget=budget)) for name in names}

    def spread(self, points: Sequence[Point], count: int) -> list[Point]:
        """So many of the points of one front, far from each other."""
        signs = [sign_of(goal) for goal in self.settings.objectives]
        losses = [
            [sign * point.metrics.get(goal, 0.0) for sign, goal in zip(signs, self.settings.objectives)]
            for point in points
        ]
        return [points[row] for row in best(np.array(losses, np.float64).reshape(len(points), len(signs)), count)]

    def result(self) -> list[Point]:
        """The points of the highest rung that has any."""
        for number in reversed(range(len(self.queues))):
            if points := self.points(number):
                return points
        return []

    def constraints(self, job: Job, found: Mapping[str, Any]) -> dict[str, float]:
        """How far every limit is exceeded, as a share of it; at most 0 where it holds.

        Raises:
            InputError: What a limit is on was not measured.
        """
        exceeded = {}
        for name, limit in found["limits"].items():
            exceeded[name] = found["metrics"][name] / limit - 1
        for name, limit in self.settings.measured.items():
            if self.settings.rungs[job.rung].kind == "curves" and name != "latency_ms":
                continue
            value = finite(found["metrics"], name)
            exceeded[name] = (limit - value if DIRECTIONS[name] == "maximize" else value - limit) / limit
        return exceeded

    def values(self, job: Job, found: Mapping[str, Any]) -> list[float]:
        """The objectives.

        Raises:
            InputError: One is missing, or no finite number.
        """
        return [finite(found["metrics"], goal) for goal in goals(self.settings, job.rung)]


def goals(settings: Settings, number: int) -> list[str]:
    """What is optimised on a rung: where nothing is measured, the predicted loss in place of what would be."""
    if settings.rungs[number].kind != "curves":
        return list(settings.objectives)
    return list(dict.fromkeys(PREDICTED if name in ("accuracy", "loss") else name for name in settings.objectives))


def finite(metrics: Mapping[str, Any], name: str) -> float:
    """One of the numbers.

    Raises:
        InputError: It is missing, or not finite.
    """
    value = metrics.get(name)
    if value is None or not math.isfinite(value):
        raise InputError(f"{name} must be a finite number, but it is {value if name in metrics else 'missing'}.")
    return float(value)


def sampler(name: str, seed: int) -> BaseSampler:
    """A sampler of Optuna by its short name."""
    if name == "gp":
        return GPSampler(seed=seed)
    if name == "nsga2":
        return NSGAIISampler(seed=seed)
    return TPESampler(seed=seed) if name == "tpe" else RandomSampler(seed=seed)


def _direction(goal: str) -> str:
    return DIRECTIONS.get(goal, "minimize")


def _completed(task: Task) -> Any:
    return task.trial.datetime_complete
