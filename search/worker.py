"""A worker: takes a task, evaluates it, tells what came out, until nothing is left."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

from metaprune.errors import MetapruneError
from metaprune.search.campaign import Campaign, Job
from metaprune.search.queue import Keeper
from metaprune.search.store import disk_is_full

PAUSE_S = 0.2  # between two looks at the storage while others work


class Evaluator(Protocol):
    """Finds numbers for a configuration."""

    def __call__(self, key: str, config: Mapping[str, Any], rung: int) -> dict[str, Any]:
        """What a network of this configuration gives on this rung.

        Returns:
            ``metrics`` by name, ``limits`` on those that are known before anything runs, in their units, and what else
            is worth keeping, as plain data.
        """
        ...


def work(
    campaign: Campaign,
    evaluate: Evaluator,
    told: Callable[[Job, str], None] = lambda job, how: None,
    idle: Callable[[], None] = lambda: None,
) -> int:
    """Work until the campaign is over.

    Args:
        campaign: Where the tasks are.
        evaluate: Finds numbers.
        told: Is called after every trial with ``done``, ``dropped``, or why it failed.
        idle: Is called while there is nothing to do but wait for others.

    Returns:
        How many trials were evaluated.

    Raises:
        ResourceError: The disk is full. The trial was given back, or will be when its lease has run out.
    """
    done = 0
    while True:
        for queue in campaign.queues:
            queue.reap()
        job = campaign.next()
        if job is not None:
            told(job, _carry_out(campaign, evaluate, job))
            done += 1
        elif campaign.over:
            return done
        else:
            idle()
            time.sleep(PAUSE_S)


def _carry_out(campaign: Campaign, evaluate: Evaluator, job: Job) -> str:
    """Evaluate one trial and tell; a trial whose lease was taken tells nothing."""
    queue = campaign.queues[job.rung]
    try:
        with Keeper(queue, job.trial) as keeper:
            found = evaluate(job.key, job.config, job.rung)
        values, constraints = campaign.values(job, found), campaign.constraints(job, found)
    except KeyboardInterrupt:
        queue.release(job.trial)
        raise
    except Exception as error:
        if disk_is_full(error):  # no fault of this trial: all others would fail too
            with suppress(Exception):
                queue.release(job.trial)
            raise
        why = reason(error)
        return why if queue.fail(job.trial, why) else "dropped"
    if keeper.lost or not queue.finish(job.trial, values, constraints, found):
        return "dropped"
    return "done"


def reason(error: Exception) -> str:
    """Why a trial failed, in one line."""
    said = (str(error).strip().splitlines() or ["no message"])[0]
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {said}"
    if isinstance(error, MetapruneError):
        return said
    return f"{type(error).__name__}: {said}"
