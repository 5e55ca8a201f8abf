"""Command lines that are run in this process."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema

from metaprune.cli.answer import schema
from metaprune.cli.app import run

TINY = ["--model", "zoo:digits_cnn", "--model-arg", "widths=[4,8]", "--data", "digits", "--calibration", "64"]


@dataclass(frozen=True)
class Answer:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on standard output, valid under the schema of its verb."""
        (line,) = self.out.splitlines()
        told = json.loads(line)
        jsonschema.validate(told, json.loads(schema("error" if "error" in told else told["command"])))
        return dict(told)

    @property
    def said(self) -> str:
        """Standard error in one line, however it was wrapped."""
        return " ".join(self.err.split())


def command(*words: Any) -> Answer:
    """Run one command line as the entry point does."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(word) for word in words])
    return Answer(code, out.getvalue(), err.getvalue())


def entries(folder: Path) -> list[str]:
    """Everything below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
