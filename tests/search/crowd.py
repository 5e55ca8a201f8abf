"""Processes that work on one campaign, and what must hold of it whatever happened to them."""

import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from optuna.trial import TrialState

from metaprune.search.campaign import Campaign
from metaprune.search.queue import LEASE, RETRIES, Task

SCRIPT = Path(__file__).with_name("player.py")


def player(folder: Path, seconds: float, *words: str) -> "subprocess.Popen[bytes]":
    """A worker in a process of its own."""
    with (folder / "players.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), str(seconds), *words], stdout=log, stderr=log
        )


def evaluated(folder: Path) -> list[tuple[float, str, int]]:
    """When what was evaluated on which rung, in order."""
    try:
        lines = (folder / "evaluated.log").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [(float(when), key, int(rung)) for when, key, rung in map(str.split, lines)]


def until(condition: Callable[..., object], seconds: float = 60.0) -> None:
    """Wait for something."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def killed(campaign: Campaign, folder: Path, kills: int, seconds: float) -> int:
    """Let two workers work, kill one of them at a random moment of its work again and again, and let the rest end.

    A task of which as many workers died as are forgiven is left alone: one more would quarantine it.

    Returns:
        How often one was killed; less than was asked for where the work had ended before.
    """
    draw, done = random.Random(0), 0
    workers = [player(folder, seconds) for _ in range(2)]
    while done < kills and not campaign.over:
        victim = draw.randrange(2)
        pid = workers[victim].pid
        until(lambda pid=pid: works(campaign, pid) or campaign.over)
        time.sleep(draw.uniform(0, 2 * seconds))
        if any(task.deaths == RETRIES for task in worked_on(campaign, pid)):
            continue
        done += workers[victim].poll() is None
        workers[victim].kill()
        workers[victim].wait()
        workers[victim] = player(folder, seconds)
    for worker in workers:
        assert worker.wait(600) == 0, (folder / "players.log").read_text()
    return done


def worked_on(campaign: Campaign, pid: int) -> list[Task]:
    """The tasks that a process has taken."""
    running = [task for queue in campaign.queues for task in queue.tasks().values() if task.state == "running"]
    return [task for task in running if task.trial.system_attrs.get(LEASE, {}).get("pid") == pid]


def works(campaign: Campaign, pid: int) -> bool:
    """Whether a process has a task."""
    return bool(worked_on(campaign, pid))


def check(campaign: Campaign, folder: Path, trials: int, kills: int = 0) -> None:
    """Nothing was lost, nothing lives on, nothing was told twice, nor computed again where no kill lost the result."""
    assert campaign.over
    found = evaluated(folder)
    assert len(found) - len({(key, rung) for _, key, rung in found}) <= kills
    for number, queue in enumerate(campaign.queues):
        tasks = queue.tasks()
        assert {key: task.failure for key, task in tasks.items() if task.state != "done"} == {}
        assert set(tasks) == {key for _, key, rung in found if rung == number}
        states = [trial.state for trial in queue.trials()]
        assert states.count(TrialState.COMPLETE) == len(tasks)
        assert not {TrialState.RUNNING, TrialState.WAITING} & set(states)
    assert len(campaign.queues[0].tasks()) == trials
