"""What a campaign costs beside its evaluations: how it scales over workers, and how long a killed one is missed.

    python benchmarks/campaign.py scaling
    python benchmarks/campaign.py scaling --busy        # evaluations compute instead of sleep
    python benchmarks/campaign.py overhead --trials 200
    python benchmarks/campaign.py kills --kills 100

Evaluations are formulas, so that all that is measured is the machinery: `scaling` times the same trials by one and by
four workers, from the first evaluation to the last; `overhead` is the time of a trial that evaluates nothing; `kills`
kills workers at random moments and counts what was lost, told twice or left behind, and the time from the start of a
process to its first evaluation.

One JSON line a result.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from optuna.trial import TrialState

from metaprune.search.worker import work
from tests.search.crowd import evaluated, killed, player
from tests.search.player import Player, begun, settings


def scaling(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds by one and by several workers."""
    words = ["busy"] if options.busy else []
    found: dict[str, Any] = {"evaluation_s": options.seconds, "busy": options.busy, "trials": options.trials}
    for workers in (1, options.workers):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            begun(folder, settings(trials=options.trials))
            processes = [player(folder, options.seconds, *words) for _ in range(workers)]
            for process in processes:
                process.wait()
            times = [when for when, _, _ in evaluated(folder)]
            found[f"seconds_{workers}"] = round(max(times) - min(times) + options.seconds, 2)
            found[f"evaluations_{workers}"] = len(times)
    one, several = (found[f"seconds_{k}"] / found[f"evaluations_{k}"] for k in (1, options.workers))
    return found | {"times_faster": round(one / several, 2)}


def overhead(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a trial that evaluates nothing, by sampler; the sampler's own time is in it."""
    found: dict[str, Any] = {"trials": options.trials}
    for sampler in ("random", "nsga2", "tpe"):
        with tempfile.TemporaryDirectory() as place:
            asked = settings(trials=options.trials, sampler=sampler)
            campaign = begun(Path(place), asked, index=0)
            began = time.perf_counter()
            done = work(campaign, Player(Path(place), asked, 0.0))
            found[f"{sampler}_ms"] = round(1000 * (time.perf_counter() - began) / done, 1)
    return found


def kills(options: argparse.Namespace) -> dict[str, Any]:
    """What random kills cost."""
    with tempfile.TemporaryDirectory() as place:
        folder, trials = Path(place), 20 + 8 * options.kills
        campaign = begun(folder, settings(trials=trials, sampler="random"))
        times = killed(campaign, folder, options.kills, 0.15)
        tasks = [task for queue in campaign.queues for task in queue.tasks().values()]
        states = [trial.state for queue in campaign.queues for trial in queue.trials()]
        before = len(evaluated(folder))
        begun(folder, settings(trials=trials + 5, sampler="random"))
        began = time.time()
        player(folder, 0.0).wait()
        return {
            "kills": times,
            "trials": trials,
            "lost": sum(task.state != "done" for task in tasks),
            "zombies": sum(state in (TrialState.RUNNING, TrialState.WAITING) for state in states),
            "told_twice": states.count(TrialState.COMPLETE) - len(tasks),
            "filed_again": sum(task.deaths for task in tasks),
            "restart_s": round(evaluated(folder)[before][0] - began, 2),
        }


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("scaling", "overhead", "kills"))
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--busy", action="store_true")
    options = parser.parse_args()
    parts = {"scaling": scaling, "overhead": overhead, "kills": kills}
    machine = {"cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0], "python": platform.python_version()}
    print(json.dumps({"part": options.part, **parts[options.part](options), **machine}))


if __name__ == "__main__":
    main()
