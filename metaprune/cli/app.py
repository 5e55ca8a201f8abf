"""All verbs under one roof: help, parsing, and the one place where errors become messages and exit codes."""

import json
import shlex
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from metaprune import __version__
from metaprune.cli import bench, demo, doctor, export, inspect, metatrain, prune, search, ui, validate
from metaprune.cli import list as list_
from metaprune.cli.failure import BROKEN_PIPE, Interrupted, failure_of, traceback_of
from metaprune.cli.screen import say_failure

_OPTIONS = "Options"


class _Verb(TyperCommand):
    """Help in plain text, options under headings: rich's panels would double the time that help takes."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                heading = "Arguments" if parameter.param_type_name == "argument" else _OPTIONS
                sections.setdefault(getattr(parameter, "rich_help_panel", None) or heading, []).append(record)
        common = sections.pop(_OPTIONS, [])
        for heading, records in [*sections.items(), (_OPTIONS, common)]:
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


class _Verbs(TyperGroup):
    """Verbs in the order of a first day with metaprune, not of the alphabet."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)
        if option is not None:
            option.default = False  # typer imports pydantic to make a truth value of a flag that is neither on nor off
        return option


app = typer.Typer(
    cls=_Verbs,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with `metaprune demo`. Every command explains itself: metaprune prune --help.",
)
_search = typer.Typer(
    cls=_Verbs, rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True
)
for _part in search.VERBS:
    _search.command(_part.__name__, cls=_Verb)(_part)
for _verb in (
    demo.demo,
    inspect.inspect,
    prune.prune,
    metatrain.metatrain,
    export.export,
    validate.validate,
    bench.bench,
    ui.ui,
    list_.list_,
    doctor.doctor,
):
    app.command(_verb.__name__.strip("_"), cls=_Verb)(_verb)
app.add_typer(_search, name="search", help="Search for the best trade-offs by many prunings.")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"metaprune {__version__}")
        raise typer.Exit


@app.callback()
def _metaprune(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Make a trained PyTorch network smaller and faster, and prove that it still works."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line.

    Args:
        arguments: What stands behind ``metaprune``.

    Returns:
        The exit code: 0 ok, 1 bug, 2 usage, 3 config or input, 4 a gate failed, 5 unsupported model, 6 missing extra,
        7 resource or noise, 130 interrupted.
    """
    try:
        code = int(app(list(arguments) or ["--help"], prog_name="metaprune", standalone_mode=False) or 0)
        if code == Interrupted.exit_code:  # how typer passes on a Ctrl-C that no verb took care of
            raise KeyboardInterrupt
        return code
    except SystemExit:  # typer ends the process itself where nobody reads what a command prints
        return BROKEN_PIPE
    except (Exception, KeyboardInterrupt) as error:
        failure = failure_of(error, again=shlex.join(["metaprune", *arguments]))
        if failure.exit_code == BROKEN_PIPE:
            return BROKEN_PIPE
        if "--debug" in arguments and not failure.usage:
            print(traceback_of(error), file=sys.stderr)
        if "--json" in arguments:
            words = [*arguments, *map(" ".join, pairwise(arguments))]
            verb = next((word for word in words if word in app_verbs()), None)
            print(json.dumps({"command": verb, "version": __version__, "error": failure.to_json()}))
        say_failure(failure)
        return failure.exit_code


def app_verbs() -> tuple[str, ...]:
    """Names of all verbs, those of a family behind its name."""
    own = tuple(str(command.name) for command in app.registered_commands)
    return own + tuple(f"search {command.name}" for command in _search.registered_commands)
