"""``metaprune list``: every name that options take, with one line about each."""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaprune import __version__
from metaprune.cli.options import AsJson, Debug
from metaprune.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

    from metaprune.registry import Registry

_MARKUP = re.compile(r"(?::[a-z]+:`~?|``?)([^`]+)``?")  # roles and code of reStructuredText


def list_(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="[KIND]",
            help="models, datasets, metanets, criteria, allocators, recoveries, edits, gates, tasks, configs or "
            "devices. [all]",
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Show what there is to choose from, plug-ins included."""
    from metaprune.cli.screen import Screen

    if kind is not None and kind not in KINDS:
        raise ConfigError(f"nothing is listed under {kind!r}.{did_you_mean(kind, KINDS)} Known: {', '.join(KINDS)}.")
    chosen = KINDS if kind is None else {kind: KINDS[kind]}
    found = {name: [{"name": key, "about": about} for key, about in read().items()] for name, read in chosen.items()}

    def draw(console: "Console") -> None:
        from rich.table import Table
        from rich.text import Text

        for name, items in found.items():
            console.print(Text(name, style="bold"))
            table = Table(box=None, padding=(0, 2, 0, 2), show_header=False)
            table.add_column(no_wrap=True, style="green")
            table.add_column()
            for item in items:
                table.add_row(Text(item["name"]), Text(item["about"]))
            console.print(table if items else "  none ships")

    Screen(as_json).show({"command": "list", "version": __version__, "items": found}, draw)
    return 0


def _described(registry: "Registry[Any]", of: Callable[[Any], Any] = lambda item: item) -> dict[str, str]:
    return {name: _first_line(of(registry[name])) for name in registry}


def _first_line(item: Any) -> str:
    """First line of a docstring as plain text; of a partial, that of its function and the arguments that it fixes."""
    fixed = ""
    if isinstance(item, functools.partial):
        arguments = inspect.signature(item.func).bind_partial(*item.args, **item.keywords).arguments
        fixed, item = f" ({', '.join(f'{key}={value}' for key, value in arguments.items())})", item.func
    line = (inspect.getdoc(item) or "no description").splitlines()[0]
    return _MARKUP.sub(r"\1", line).replace("::", ".") + fixed


def _models() -> Mapping[str, str]:
    from metaprune.zoo import MODELS

    return _described(MODELS, lambda model: model.build)


def _datasets() -> Mapping[str, str]:
    from metaprune.data import DATASETS

    return _described(DATASETS)


def _metanets() -> Mapping[str, str]:
    from metaprune.metanet import load_checkpoint, shipped

    return {name: str(load_checkpoint(name).card.get("about", "no description")) for name in shipped()}


def _criteria() -> Mapping[str, str]:
    from metaprune.criteria import CRITERIA

    return _described(CRITERIA)


def _allocators() -> Mapping[str, str]:
    from metaprune.allocate import ALLOCATORS

    return _described(ALLOCATORS)


def _recoveries() -> Mapping[str, str]:
    from metaprune.recovery import RECOVERIES

    return _described(RECOVERIES)


def _edits() -> Mapping[str, str]:
    from metaprune.plans import EDITS

    return _described(EDITS)


def _gates() -> Mapping[str, str]:
    from metaprune.gates import GATES

    return _described(GATES)


def _tasks() -> Mapping[str, str]:
    from metaprune.task import TASKS, FeatureMatching

    return {**_described(TASKS), "feature_matching": _first_line(FeatureMatching)}


def _devices() -> Mapping[str, str]:
    return _described_files(lambda name: name.startswith("devices/"), "devices/")


def _configs() -> Mapping[str, str]:
    return _described_files(lambda name: not name.startswith("devices/"))


def _described_files(wanted: Callable[[str], bool], prefix: str = "") -> Mapping[str, str]:
    """The first lines of shipped files."""
    from metaprune.config import shipped_recipes

    files = {name: path for name, path in shipped_recipes().items() if wanted(name)}
    firsts = {name: path.read_text(encoding="utf-8").partition("\n")[0] for name, path in files.items()}
    return {name.removeprefix(prefix): first.removeprefix("#").strip() for name, first in firsts.items()}


KINDS: dict[str, Callable[[], Mapping[str, str]]] = {
    "models": _models,
    "datasets": _datasets,
    "metanets": _metanets,
    "criteria": _criteria,
    "allocators": _allocators,
    "recoveries": _recoveries,
    "edits": _edits,
    "gates": _gates,
    "tasks": _tasks,
    "configs": _configs,
    "devices": _devices,
}
