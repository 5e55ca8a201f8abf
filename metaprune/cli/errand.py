"""From the first check of a command to the end of its run, whatever it does in between.

Order is what protects the user: nothing is written before all that can be wrong has been looked at, and what was done
is kept, however it ends.
"""

import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from metaprune.cli.failure import Interrupted
from metaprune.cli.screen import Screen, Watch
from metaprune.cli.summary import OUTCOME
from metaprune.files import read_json
from metaprune.run import Run, check, read
from metaprune.tracking import Tracker, tracker

CHECKPOINTS = "checkpoints"

Subject = TypeVar("Subject")


@dataclass(frozen=True, kw_only=True)
class Errand:
    """A run that a command makes, or goes on with.

    Args:
        command: The verb.
        folder: Where the files go.
        deciding: What the result hangs on: a run goes on with the same alone.
        params: What the tracking store shows of it.
        again: The command line, without ``--force`` and ``--resume``.
        force: Delete what an earlier run left in the folder.
        resume: Go on with it.
        track: Keep it in MLflow.
        tracking_uri: In this store.
    """

    command: str
    folder: Path
    deciding: Mapping[str, Any]
    params: Mapping[str, Any]
    again: str
    force: bool
    resume: bool
    track: bool
    tracking_uri: str | None


def run_errand(
    errand: Errand,
    screen: Screen,
    look: Callable[[Watch], Subject],
    work: Callable[[Subject, Run, Tracker, Watch], dict[str, Any]],
) -> dict[str, Any]:
    """Do it, unless it has been done.

    Args:
        errand: What.
        screen: Where it is told.
        look: Reads all that is given and finds all that can be wrong; it writes nothing.
        work: Makes the answer of what was read, in the folder of the run.

    Returns:
        What the command answers.

    Raises:
        MetapruneError: Something does not fit (nothing was written), or failed on the way (what was done is kept).
        Interrupted: The user pressed Ctrl-C.
    """
    folder, again = errand.folder, {"force": errand.force, "resume": errand.resume}
    check(folder, errand.command, errand.deciding, **again)
    if errand.resume and read(folder)["status"] == "finished":
        screen.say(f"{folder} holds a finished run; here is its result again.")
        return dict(read_json(folder / OUTCOME, "the result of a run"))
    kept = False
    try:
        with screen.watch() as watch, ExitStack() as stack:
            tracked = tracker(errand.tracking_uri, errand.track)
            subject = look(watch)
            if errand.track:
                watch.step("Opening the tracking store")
            tags = {"metaprune.folder": folder.name, "metaprune.resumed": str(errand.resume).lower()}
            stack.enter_context(tracked.start(errand.command, errand.params, tags))
            run = stack.enter_context(Run.open(folder, errand.command, errand.deciding, **again))
            kept = True
            watch.end()
            answer = work(subject, run, tracked, watch)
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # a finished run has no use for them
        if tracked.problem:
            screen.warn(tracked.problem)
    except KeyboardInterrupt:
        raise Interrupted(f"{errand.again}{' --resume' if kept else ''}", kept=kept) from None
    return answer
