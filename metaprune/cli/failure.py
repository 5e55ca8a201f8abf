"""From an exception to what a user reads: what happened, why, and what to do."""

import errno
import os
import sys
import traceback
from dataclasses import dataclass
from typing import Any

import typer

from metaprune.errors import MetapruneError

BROKEN_PIPE = 141  # what a shell reports for a program that writes to a closed pipe
_RESOURCE, _BUG = 7, 1
# Typer has a copy of click inside or imports it, depending on its version; its public errors know their family.
_USAGE = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


class Interrupted(Exception):
    """The user pressed Ctrl-C.

    Args:
        again: The command that goes on with the work.
        kept: Something was written that the command goes on with.
    """

    exit_code = 130

    def __init__(self, again: str, *, kept: bool) -> None:
        super().__init__(
            "interrupted; what was done is kept. Go on with:"
            if kept
            else "interrupted before anything was written. Start again with:"
        )
        self.again = again


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a command did not do what it was asked to.

    Args:
        kind: Class of the error.
        message: What happened, why, and what to do.
        exit_code: Of the process.
        usage: The command line itself was wrong.
        again: The command line to go on with, where there is one.
    """

    kind: str
    message: str
    exit_code: int
    usage: bool = False
    again: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields that scripts need."""
        return {"kind": self.kind, "message": self.message, "exit_code": self.exit_code, "again": self.again}


def failure_of(error: BaseException, again: str = "metaprune") -> Failure:
    """What an exception means to the user.

    Args:
        error: The exception.
        again: The command line that it ended.
    """
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        error = Interrupted(again, kept=False)  # verbs that keep something say so themselves
    kind = type(error).__name__
    if isinstance(error, MetapruneError | Interrupted):
        way_on = error.again if isinstance(error, Interrupted) else None
        return Failure(kind=kind, message=str(error), exit_code=error.exit_code, again=way_on)
    if isinstance(error, _USAGE):
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "metaprune"
        said = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        message = f"{said}{'' if said.endswith('?') else '.'} See `{command} --help`."
        return Failure(kind=kind, message=message, exit_code=2, usage=True)
    if isinstance(error, BrokenPipeError):
        # Nobody reads any more: what is still buffered must go nowhere, or the interpreter complains when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Failure(kind=kind, message="", exit_code=BROKEN_PIPE)
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError":
        message = f"there was not enough memory ({_line(error)}). Lower --batch-size or --calibration, or free some."
        return Failure(kind="ResourceError", message=message, exit_code=_RESOURCE)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        message = f"the disk is full ({_line(error)}). Free some space, and go on with --resume."
        return Failure(kind="ResourceError", message=message, exit_code=_RESOURCE)
    message = (
        f"this is a bug in metaprune: {kind}: {_line(error)}. The same command with --debug shows the traceback; "
        "please report it with that."
    )
    return Failure(kind=kind, message=message, exit_code=_BUG)


def traceback_of(error: BaseException) -> str:
    """The whole traceback, for --debug."""
    return "".join(traceback.format_exception(error)).rstrip()


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else "no message"
