"""Every step of a queue may be the last of a killed worker, and any worker may take the next."""

import os
import time
from pathlib import Path

import pytest
from optuna.trial import FrozenTrial, TrialState

from metaprune.search.queue import DROPPED, LEASE, RELEASED, RETRIES, Keeper, Queue, Worker
from tests.search.player import begun, settings

AWAY = "another-machine"


def worker(name: str, place: str | None = AWAY, pid: int = 1) -> Worker:
    return Worker(name, place, pid, None)


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    """An empty one."""
    campaign = begun(tmp_path, settings(baselines=()))
    own = campaign.queues[0]
    return Queue(own.storage, own.study, worker("ours"), lease_s=1000.0)


def filed(queue: Queue, *keys: str) -> Queue:
    for key in keys:
        queue.add(key, {}, {}, "test")
    return queue


def other(queue: Queue, name: str = "theirs", lease_s: float = 1000.0) -> Queue:
    return Queue(queue.storage, queue.study, worker(name), lease_s)


def claimed(queue: Queue) -> FrozenTrial:
    trial = queue.claim()
    assert trial is not None
    return trial


def states(queue: Queue) -> dict[str, str]:
    return {key: task.state for key, task in queue.tasks().items()}


def test_a_task_is_claimed_once(queue: Queue) -> None:
    filed(queue, "a", "b")
    first, second = claimed(queue), claimed(other(queue))
    assert (first.user_attrs["key"], second.user_attrs["key"]) == ("a", "b")
    assert queue.claim() is None
    assert queue.trials()[1].system_attrs[LEASE]["owner"] == "theirs"


def test_what_comes_out_is_told_with_its_constraints(queue: Queue) -> None:
    trial = claimed(filed(queue, "a"))
    assert queue.finish(trial, [1.0, 2.0], {"macs": -0.5}, {"metrics": {"x": 1}})
    task = queue.tasks()["a"]
    assert (task.state, task.trial.values, task.trial.constraints) == ("done", [1.0, 2.0], {"macs": -0.5})
    assert task.result == {"metrics": {"x": 1}}


def test_a_failure_is_named_and_not_tried_again(queue: Queue) -> None:
    queue.fail(claimed(filed(queue, "a")), "accuracy is nan")
    assert queue.reap() == []
    task = queue.tasks()["a"]
    assert (task.state, task.failure, task.trial.state) == ("failed", "accuracy is nan", TrialState.FAIL)


def test_a_trial_whose_lease_ran_out_is_filed_again_once(queue: Queue) -> None:
    claimed(filed(queue, "a"))
    hasty = other(queue, lease_s=-1.0)
    assert hasty.reap() == ["a"]
    assert hasty.reap() == []
    assert [trial.state for trial in queue.trials()] == [TrialState.FAIL, TrialState.WAITING]
    assert LEASE not in queue.trials()[1].system_attrs


def test_a_worker_whose_lease_was_taken_tells_nothing(queue: Queue) -> None:
    trial = claimed(filed(queue, "a"))
    theirs = other(queue, lease_s=-1.0)
    theirs.reap()
    again = claimed(theirs)
    assert not queue.finish(trial, [1.0, 1.0], {}, {"from": "ours"})
    assert not queue.fail(trial, "too late")
    assert not queue.renew(trial)
    assert theirs.finish(again, [2.0, 2.0], {}, {"from": "theirs"})
    assert queue.tasks()["a"].result == {"from": "theirs"}
    assert sum(trial.state == TrialState.COMPLETE for trial in queue.trials()) == 1


def test_a_kill_between_failing_and_filing_again_loses_nothing(queue: Queue) -> None:
    trial = claimed(filed(queue, "a"))
    queue.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)  # by a reaper that then died
    assert states(queue) == {"a": "lost"}
    assert other(queue).file_again() == ["a"]
    assert states(queue) == {"a": "waiting"}


def test_what_two_reapers_filed_is_worked_on_once(queue: Queue) -> None:
    filed(queue, "a", "a", "b")
    assert claimed(queue).user_attrs["key"] == "a"
    second = claimed(other(queue))
    assert second.user_attrs["key"] == "b"
    assert [DROPPED in trial.user_attrs for trial in queue.trials()] == [False, True, False]
    assert states(queue) == {"a": "running", "b": "running"}


def test_tasks_beyond_what_was_asked_for_are_dropped_for_good(queue: Queue) -> None:
    filed(queue, "a", "b", "c")
    assert [claimed(queue).user_attrs["key"], queue.claim(most=2) is not None, queue.claim(most=2)] == ["a", True, None]
    assert list(states(queue)) == ["a", "b"]
    assert queue.reap() == []


def test_what_kills_every_worker_is_quarantined_and_named(queue: Queue) -> None:
    filed(queue, "a", "b")
    hasty = other(queue, lease_s=-1.0)
    for _ in range(RETRIES + 1):
        while (trial := queue.claim()) is not None and trial.user_attrs["key"] != "a":
            queue.finish(trial, [0.0, 0.0], {}, {})
        hasty.reap()
    assert states(queue) == {"a": "quarantined", "b": "done"}
    assert queue.tasks()["a"].failure == f"{RETRIES + 1} workers died of it"
    assert hasty.reap() == []
    assert queue.claim() is None


def test_a_trial_that_is_given_back_costs_no_retry(queue: Queue) -> None:
    filed(queue, "a")
    for _ in range(RETRIES + 3):
        queue.release(claimed(queue))
    assert RELEASED in queue.trials()[0].user_attrs
    assert queue.tasks()["a"].deaths == 0
    assert claimed(queue).user_attrs["key"] == "a"


def test_a_dead_process_of_this_machine_is_noticed_at_once(queue: Queue) -> None:
    here = Worker.here()
    assert here.place is not None
    gone = Queue(queue.storage, queue.study, Worker("gone", here.place, 2**22 + 1, 5), 1000.0)
    claimed(filed(gone, "a", "b"))
    reused = Queue(queue.storage, queue.study, Worker("reused", here.place, here.pid, 5), 1000.0)
    claimed(reused)
    assert sorted(queue.reap()) == ["a", "b"]
    alive = Queue(queue.storage, queue.study, here, 1000.0)
    claimed(alive)
    assert queue.reap() == []


def test_a_trial_without_a_lease_is_given_time(queue: Queue) -> None:
    filed(queue, "a")
    trial = queue.trials()[0]
    queue.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)  # claimed by Optuna's own hand
    assert queue.reap() == []
    assert other(queue, lease_s=-1.0).reap() == ["a"]


def test_a_keeper_renews_and_notices_that_the_trial_was_taken(queue: Queue) -> None:
    quick = other(queue, lease_s=0.09)
    trial = claimed(filed(quick, "a"))
    first = queue.trials()[0].system_attrs[LEASE]["beat"]
    with Keeper(quick, trial) as keeper:
        time.sleep(0.2)
        assert queue.trials()[0].system_attrs[LEASE]["beat"] > first
        assert not keeper.lost
        other(queue, lease_s=-1.0).reap()
        time.sleep(0.2)
        assert keeper.lost


def test_workers_have_names_of_their_own() -> None:
    assert Worker.here().name != Worker.here().name
    assert Worker.here().pid == os.getpid()
