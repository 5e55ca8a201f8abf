"""Run one script in a fresh Python process: nothing that this process has loaded can colour the numbers.

The script gets one JSON object on its standard input and answers with lines on its standard output: ``progress 0.4``
any number of times, then one JSON object. ``{"refused": "why"}`` says that the job itself was at fault.
"""

import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from metaprune.errors import InputError, ResourceError


def in_fresh_process(
    script: Path,
    job: Mapping[str, Any],
    *,
    limit_s: float,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """What `script` answers to `job`.

    Args:
        script: A Python file that needs nothing of this package.
        job: Plain data, sent as JSON.
        limit_s: Wall-clock limit in seconds; the process is ended after it.
        progress: Called with the share that is done, 0 to 1.

    Raises:
        InputError: The script refused the job, or died by a signal of its own making (a file that breaks the runtime).
        ResourceError: It ran past the limit, or was killed for memory.
    """
    # -P: the script's folder stays off the path, so that none of our file names can hide a library.
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(
            [sys.executable, "-P", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
        ) as child,
    ):
        timer = threading.Timer(limit_s, child.kill)
        timer.start()
        try:
            answer = _talk(child, json.dumps(job), progress)
        except BaseException:  # an interrupt of the user too: never leave the child behind
            child.kill()
            raise
        finally:
            expired = not timer.is_alive()
            timer.cancel()
        code = child.wait()
        errors.seek(0)
        trouble = errors.read().strip().splitlines()
    if code == 0 and "refused" in answer:
        raise InputError(str(answer["refused"]))
    if code == 0 and answer:
        return answer
    if expired:
        raise ResourceError(f"a measuring process must end within {limit_s:g} s, but it did not. Allow more time.")
    if code == -signal.SIGKILL:
        raise ResourceError("a measuring process was killed, most likely for memory. Free some, or use a smaller file.")
    raise InputError(f"a measuring process ended with code {code}: {trouble[-1] if trouble else 'no message'}")


def _talk(child: subprocess.Popen[str], job: str, progress: Callable[[float], None] | None) -> dict[str, Any]:
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(job)
        child.stdin.close()
    except BrokenPipeError:
        return {}
    answer: dict[str, Any] = {}
    for line in child.stdout:
        if line.startswith("progress "):
            if progress is not None:
                progress(float(line.split()[1]))
        elif line.startswith("{"):
            answer = json.loads(line)
    return answer
