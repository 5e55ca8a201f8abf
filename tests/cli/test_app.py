"""Parsing, help, and the one place where errors become messages and exit codes."""

import errno
import inspect
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer

import metaprune
from metaprune.cli import doctor as doctor_module
from metaprune.cli.answer import schema
from metaprune.cli.app import app, app_verbs
from metaprune.cli.failure import BROKEN_PIPE, failure_of
from metaprune.cli.prune import prune
from metaprune.config import PruneOptions
from tests.cli.commands import command

ENTRY = [sys.executable, "-c", "import sys; sys.argv[0] = 'metaprune'; from metaprune.cli import main; main()"]
HEAVY = ("torch", "numpy", "mlflow", "onnx", "onnxruntime", "jinja2", "sklearn", "rich", "pydantic", "metaprune.config")


def fastest(*words: str, tries: int = 6) -> float:
    """Processor seconds of the quickest of several runs: other work on the machine can only add to it."""
    took = []
    for _ in range(tries):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*ENTRY, *words], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(took)


def test_version_comes_in_150_ms() -> None:
    done = subprocess.run([*ENTRY, "--version"], check=True, capture_output=True, text=True)
    assert done.stdout == f"metaprune {metaprune.__version__}\n"
    assert command("--version").out == done.stdout
    assert fastest("--version") < 0.15


@pytest.mark.parametrize("words", [["--help"], ["prune", "--help"]])
def test_help_comes_in_300_ms(words: list[str]) -> None:
    assert fastest(*words) < 0.3


@pytest.mark.parametrize(
    "words", [["--help"], ["prune", "--help"], ["metatrain", "--help"], ["search", "run", "--help"], ["--version"], []]
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\n"
        "from metaprune.cli.app import run\n"
        f"assert run({words!r}) == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("verb", ["", *app_verbs()])
def test_help_fits_into_80_columns(verb: str) -> None:
    done = command(*verb.split(), "--help")
    assert done.code == 0
    assert done.err == ""
    assert max(map(len, done.out.splitlines())) <= 80
    assert "Args:" not in done.out


def test_verbs_are_those_promised() -> None:
    promised = {"demo", "inspect", "prune", "metatrain", "export", "validate", "bench", "ui", "list", "doctor"}
    searches = {"space", "run", "resume", "status", "worker", "sync", "export"}
    assert set(app_verbs()) == promised | {f"search {verb}" for verb in searches}


@pytest.mark.parametrize("verb", [verb for verb in app_verbs() if verb != "ui"])
def test_every_verb_speaks_json_and_has_a_schema(verb: str) -> None:
    assert "--json" in command(*verb.split(), "--help").out
    jsonschema.Draft202012Validator.check_schema(json.loads(schema(verb)))


def test_schemas_are_of_verbs_alone() -> None:
    shipped = {path.stem for path in (Path(doctor_module.__file__).parent / "schema").iterdir()}
    assert shipped == {*(verb.replace(" ", "-") for verb in app_verbs()), "error"} - {"ui"}


def test_flags_of_prune_are_the_keys_of_a_recipe() -> None:
    flags = set(inspect.signature(prune).parameters) - {"config", "force", "resume", "as_json", "debug"}
    assert {f"{name}s" if name == "model_arg" else name for name in flags} == set(PruneOptions.model_fields)


def test_defaults_in_the_help_are_those_of_the_options() -> None:
    said = " ".join(command("prune", "--help").out.split())
    for name in ("allocator", "floor", "calibration", "seed", "accelerator"):
        assert f"[{PruneOptions.model_fields[name].default}]" in said.partition(f"--{name} ")[2].partition(" --")[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prun"], "Did you mean 'prune'"),
        (["prune", "--budgte", "macs=0.5"], "--budget"),
        (["prune", "--epochs", "many"], "--epochs"),
        (["bench"], "metaprune bench --help"),
    ],
)
def test_a_wrong_command_line_is_usage(words: list[str], said: str) -> None:
    done = command(*words)
    assert done.code == 2
    assert done.out == ""
    assert said in done.said
    told = command(*words, "--json").json
    assert told["error"]["exit_code"] == 2


def test_no_words_show_the_help() -> None:
    done = command()
    assert done.code == 0
    assert done.out == command("--help").out


def test_an_unexpected_error_is_called_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(clean: bool) -> dict[str, Any]:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(doctor_module, "_cache", broken)
    done = command("doctor", "--cache")
    assert done.code == 1
    assert "this is a bug in metaprune: ZeroDivisionError: by nothing" in done.said
    assert "--debug" in done.said
    assert "Traceback" not in done.err
    assert "Traceback" in command("doctor", "--cache", "--debug").err
    told = command("doctor", "--cache", "--json").json
    assert told["command"] == "doctor"
    assert told["error"] == {"kind": "ZeroDivisionError", "message": done.said[6:], "exit_code": 1, "again": None}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), 7),
        (OSError(errno.ENOSPC, "No space left on device"), 7),
        (KeyboardInterrupt(), 130),
        (typer.Abort(), 130),
        (RuntimeError("odd"), 1),
    ],
)
def test_errors_of_the_machine_have_codes(error: BaseException, code: int) -> None:
    failure = failure_of(error)
    assert failure.exit_code == code
    assert failure.message


def test_ctrl_c_names_the_command_that_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(clean: bool) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor_module, "_cache", interrupted)
    done = command("doctor", "--cache", "--json")
    assert done.code == 130
    assert done.json["error"]["kind"] == "Interrupted"
    assert done.json["error"]["again"] == "metaprune doctor --cache --json"


def test_a_reader_that_goes_away_is_no_error() -> None:
    with subprocess.Popen([*ENTRY, "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        said = child.stderr.read()
        assert child.wait() == BROKEN_PIPE
    assert said == ""


def test_no_color_and_pipes_get_plain_text() -> None:
    environment = {**os.environ, "NO_COLOR": "1"}
    done = subprocess.run(
        [*ENTRY, "list", "nothing"], capture_output=True, text=True, env=environment, check=False
    )  # fmt: skip
    assert done.returncode == 3
    assert "\x1b" not in done.stderr
    assert app.info.epilog
