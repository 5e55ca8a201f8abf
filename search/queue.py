"""Tasks that are never lost: trials of one Optuna study, each with all of its parameters from the start.

A task is known by a key, the hash of what is to be done. A worker says that it wants a waiting trial, claims it by
Optuna's compare-and-swap, writes its lease, and renews that while it works. Whoever finds a lease that has run out, or
whose process is gone, fails the trial and files the task again. Every step may be the last one of a killed process, and
any number of workers may take it: what is missing is added by the next, and what is there twice is dropped when it is
claimed.
"""

import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, Self

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

LEASE = "metaprune:lease"
WANTED = "metaprune:wanted:"  # and the name of a worker: between a claim and its lease a kill must leave a trace
KEY, ORIGIN, RESULT = "key", "origin", "result"
FAILURE, DROPPED, RELEASED = "failure", "dropped", "released"  # why a trial failed; without any, its worker died
RETRIES = 3
LEASE_S = 30.0

State = Literal["waiting", "running", "done", "failed", "lost", "quarantined"]
_OPEN = {TrialState.WAITING: "waiting", TrialState.RUNNING: "running", TrialState.COMPLETE: "done"}


@dataclass(frozen=True, eq=False)
class Task:
    """All trials of one key.

    Args:
        key: What it is known by.
        state: Where it stands. A lost task waits to be filed again; one whose workers died too often is quarantined.
        trial: The trial that decides that: the one that lives, is complete or said why it failed, else the last.
        deaths: How many workers died of it.
    """

    key: str
    state: State
    trial: FrozenTrial
    deaths: int = 0

    @property
    def settled(self) -> bool:
        """Nothing more will happen to it."""
        return self.state in ("done", "failed", "quarantined")

    @property
    def result(self) -> dict[str, Any]:
        """What came out."""
        return dict(self.trial.user_attrs.get(RESULT, {}))

    @property
    def failure(self) -> str:
        """Why nothing came out."""
        if self.state == "quarantined":
            return f"{self.deaths} workers died of it"
        return str(self.trial.user_attrs.get(FAILURE, ""))


def tasks_of(trials: Iterable[FrozenTrial]) -> dict[str, Task]:
    """The tasks that trials belong to, by key, in the order in which they were filed; dropped trials are no tasks."""
    by_key: dict[str, list[FrozenTrial]] = {}
    for trial in trials:
        if DROPPED not in trial.user_attrs:
            by_key.setdefault(str(trial.user_attrs.get(KEY, trial.number)), []).append(trial)
    return {key: _task(key, own) for key, own in by_key.items()}


def _task(key: str, trials: Sequence[FrozenTrial]) -> Task:
    deaths = sum(trial.state == TrialState.FAIL and not {FAILURE, RELEASED} & set(trial.user_attrs) for trial in trials)
    for state in (TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING):
        for trial in trials:
            if trial.state == state:
                return Task(key, _OPEN[state], trial, deaths)  # type: ignore[arg-type]
    for trial in trials:
        if FAILURE in trial.user_attrs:
            return Task(key, "failed", trial, deaths)
    return Task(key, "quarantined" if deaths > RETRIES else "lost", trials[-1], deaths)


@dataclass(frozen=True)
class Worker:
    """A process that works, as its leases name it.

    Args:
        name: Unique among all workers of all times.
        place: Machine and process space, where processes can be looked up; None where they cannot.
        pid: The process.
        began: When that process began, in ticks of the machine.
    """

    name: str
    place: str | None
    pid: int
    began: int | None

    @classmethod
    def here(cls) -> Self:
        """This process."""
        pid = os.getpid()
        return cls(f"{os.uname().nodename}:{pid}:{os.urandom(3).hex()}", _place(), pid, _began(pid))

    def lease(self) -> dict[str, Any]:
        """What it writes to a trial that it works on."""
        return {"owner": self.name, "place": self.place, "pid": self.pid, "began": self.began, "beat": time.time()}


def _dead(trial: FrozenTrial, patience_s: float) -> bool:
    """Whether nobody works on a running trial any more."""
    attrs = trial.system_attrs
    leases = [attrs[LEASE]] if LEASE in attrs else [attrs[name] for name in attrs if name.startswith(WANTED)]
    if not leases:
        begun = trial.datetime_start
        return begun is None or time.time() - begun.timestamp() > patience_s
    return all(_over(lease, patience_s) for lease in leases)


def _over(lease: Mapping[str, Any], patience_s: float) -> bool:
    if lease["place"] is not None and lease["place"] == _place() and _began(lease["pid"]) != lease["began"]:
        return True
    return bool(time.time() - lease["beat"] > patience_s)


@cache
def _place() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"  # noqa: PTH116
    except OSError:  # not Linux: leases run out, nothing else
        return None


def _began(pid: int) -> int | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


@dataclass(frozen=True, eq=False)
class Queue:
    """The tasks of one study.

    Args:
        storage: Where its trials are.
        study: The study.
        worker: Who asks.
        lease_s: A lease that was not renewed for so many seconds has run out.
    """

    storage: BaseStorage
    study: Study
    worker: Worker = field(default_factory=Worker.here)
    lease_s: float = LEASE_S
    _seen: list[FrozenTrial] = field(default_factory=list, init=False, repr=False)

    @cached_property
    def number(self) -> int:
        """Of the study, in its storage."""
        return self.storage.get_study_id_from_name(self.study.study_name)

    def trials(self) -> list[FrozenTrial]:
        """All trials; they are not to be changed."""
        self._seen[:] = self.storage.get_all_trials(self.number, deepcopy=False)
        return list(self._seen)

    def tasks(self, *, seen: bool = False) -> dict[str, Task]:
        """All tasks, by key; those that were `seen` last where that will do, because a database takes its time."""
        return tasks_of(self._seen if seen and self._seen else self.trials())

    def add(
        self,
        key: str,
        params: Mapping[str, Any],
        distributions: Mapping[str, BaseDistribution],
        origin: str,
        system_attrs: Mapping[str, Any] | None = None,
    ) -> None:
        """File a task, in one transaction."""
        trial = create_trial(
            state=TrialState.WAITING,
            params=dict(params),
            distributions=dict(distributions),
            user_attrs={KEY: key, ORIGIN: origin},
            system_attrs=dict(system_attrs or {}),
        )
        self.storage.create_new_trial(self.number, template_trial=trial)
        self._seen.clear()

    def claim(self, most: int | None = None) -> FrozenTrial | None:
        """A waiting trial that is now this worker's, or None.

        Args:
            most: Tasks beyond so many are dropped: several workers may have filed the last one.
        """
        for trial in _waiting(self._seen) or _waiting(self.trials()):
            with suppress(UpdateFinishedTrialError):
                lease = self.worker.lease()
                self.storage.set_trial_system_attr(trial._trial_id, f"{WANTED}{self.worker.name}", lease)
                if not self.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                    continue
                self.storage.set_trial_system_attr(trial._trial_id, LEASE, lease)
                if not self._surplus(trial, most):
                    return trial
                self._fail(trial._trial_id, DROPPED, "filed twice")
        return None

    def _surplus(self, trial: FrozenTrial, most: int | None) -> bool:
        """Whether an earlier trial stands for the same task, or enough tasks were filed before."""
        tasks = tasks_of(other for other in self.trials() if other.number < trial.number)
        same = tasks.get(trial.user_attrs[KEY])
        if same is not None:
            return same.state in ("waiting", "running", "done", "failed")
        return most is not None and len(tasks) >= most

    def renew(self, trial: FrozenTrial) -> bool:
        """Say that this worker still works on a trial; False where it was taken away."""
        try:
            self.storage.set_trial_system_attr(trial._trial_id, LEASE, self.worker.lease())
        except UpdateFinishedTrialError:
            return False
        return True

    def finish(
        self, trial: FrozenTrial, values: Sequence[float], constraints: Mapping[str, float], result: Mapping[str, Any]
    ) -> bool:
        """Write what came out, constraints before the values; False, and nothing is told, where the trial was taken."""
        try:
            told = Trial(self.study, trial._trial_id)
            for name, value in constraints.items():
                told.set_constraint(name, value)
            self.storage.set_trial_user_attr(trial._trial_id, RESULT, dict(result))
            self.storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [float(v) for v in values])
            self._seen.clear()
        except UpdateFinishedTrialError:
            return False
        return True

    def fail(self, trial: FrozenTrial, why: str) -> bool:
        """Write why nothing came out; False where the trial was taken."""
        return self._fail(trial._trial_id, FAILURE, why)

    def release(self, trial: FrozenTrial) -> None:
        """Give a trial back undone, for another worker."""
        self._fail(trial._trial_id, RELEASED, self.worker.name)
        self.file_again()

    def _fail(self, number: int, mark: str | None, why: str = "") -> bool:
        with suppress(UpdateFinishedTrialError):
            if mark is not None:
                self.storage.set_trial_user_attr(number, mark, why)
            self.storage.set_trial_state_values(number, TrialState.FAIL)
            self._seen.clear()
            return True
        return False

    def reap(self) -> list[str]:
        """Fail the trials of dead workers, and file again what has been lost.

        Returns:
            Keys that were filed again.
        """
        for trial in self.trials():
            if trial.state == TrialState.RUNNING and _dead(trial, self.lease_s):
                self._fail(trial._trial_id, None)
        return self.file_again()

    def file_again(self) -> list[str]:
        """File every lost task once more; a second time changes nothing."""
        lost = [task for task in self.tasks(seen=True).values() if task.state == "lost"]
        for task in lost:
            origin = task.trial.user_attrs.get(ORIGIN, "")
            self.add(task.key, task.trial.params, task.trial.distributions, origin, _of_sampler(task.trial))
        return [task.key for task in lost]


def _waiting(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    return [trial for trial in trials if trial.state == TrialState.WAITING]


def _of_sampler(trial: FrozenTrial) -> dict[str, Any]:
    """What a sampler wanted to remember of a trial."""
    ours = (LEASE, WANTED, "constraints")
    return {name: value for name, value in trial.system_attrs.items() if not name.startswith(ours)}


class Keeper:
    """Renews the lease of a trial while the work on it goes on.

    Attributes:
        lost: The trial was taken away; what comes out of the work is to be dropped.
    """

    def __init__(self, queue: Queue, trial: FrozenTrial) -> None:
        self.lost = False
        self._queue, self._trial = queue, trial
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._over.wait(self._queue.lease_s / 3):
            with suppress(Exception):  # a storage that is away for a while: the next beat may reach it
                self.lost = not self._queue.renew(self._trial)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
