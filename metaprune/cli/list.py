"""``metaprune list``: every name that options take, with one line about each."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaprune import __version__
from metaprune.cli.options import AsJson, Debug
from metaprune.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from metaprune.registry import Registry


def list_(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="[KIND]",
            help="models, datasets, metanets, criteria, allocators, recoveries, edits, gates, tasks, configs or "
            "devices. [all]",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="One criterion, allocator or recovery, with its options (`--set`)."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Show what there is to choose from, plug-ins included."""
    from metaprune.cli.screen import Screen

    if kind is not None and kind not in KINDS:
        raise ConfigError(f"nothing is listed under {kind!r}.{did_you_mean(kind, KINDS)} Known: {', '.join(KINDS)}.")
    if name is not None and kind not in METHODS:
        raise ConfigError(
            f"a name is for {', '.join(METHODS)}, which have options, but {name!r} was given with {kind!r}."
        )
    chosen = KINDS if kind is None else {kind: KINDS[kind]}
    found = {key: [_item(key, *item) for item in read().items()] for key, read in chosen.items()}
    if kind is not None and name is not None:
        known = [item["name"] for item in found[kind]]
        if name not in known:
            raise ConfigError(
                f"none of the {kind} is called {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}."
            )
        found = {kind: [item for item in found[kind] if item["name"] == name]}

    def draw(console: "Console") -> None:
        from rich.text import Text

        for key, items in found.items():
            console.print(Text(key, style="bold"))
            rows = [(item["name"], item["about"]) for item in items]
            console.print(_table(rows) if rows else "  none ships")
            if name is not None:
                options = items[0]["options"]
                console.print(Text("options", style="bold"))
                console.print(_table([_row(option) for option in options]) if options else "  none")

    Screen(as_json).show({"command": "list", "version": __version__, "items": found}, draw)
    return 0


def _item(kind: str, name: str, about: str) -> dict[str, Any]:
    """One name as plain data; of a method, with its options."""
    item: dict[str, Any] = {"name": name, "about": about}
    if kind in METHODS:
        from dataclasses import asdict

        from metaprune.methods import options

        item["options"] = [asdict(option) for option in options(METHODS[kind]()[name]).values()]
    return item


def _row(option: Mapping[str, Any]) -> tuple[str, str]:
    """An option with its default, and what it means."""
    default = "needed" if option["default"] is None else option["default"] or "nothing"
    return option["name"], f"{option['about']} [{default}]".strip()


def _table(rows: Sequence[tuple[str, str]]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 2), show_header=False)
    table.add_column(no_wrap=True, style="green")
    table.add_column()
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _described(registry: "Registry[Any]", of: Callable[[Any], Any] = lambda item: item) -> dict[str, str]:
    return {name: _first_line(of(registry[name])) for name in registry}


def _first_line(item: Any) -> str:
    """First line of a docstring as plain text; of a partial, that of its function and the arguments that it fixes."""
    fixed = ""
    if isinstance(item, functools.partial):
        arguments = inspect.signature(item.func).bind_partial(*item.args, **item.keywords).arguments
        fixed, item = f" ({', '.join(f'{key}={value}' for key, value in arguments.items())})", item.func
    from metaprune.methods import plain

    return plain((inspect.getdoc(item) or "no description").splitlines()[0]).replace("::", ".") + fixed


def _models() -> Mapping[str, str]:
    from metaprune.zoo import MODELS

    return _described(MODELS, lambda model: model.build)


def _datasets() -> Mapping[str, str]:
    from metaprune.data import DATASETS

    return _described(DATASETS)


def _metanets() -> Mapping[str, str]:
    from metaprune.metanet import load_checkpoint, shipped

    return {name: str(load_checkpoint(name).card.get("about", "no description")) for name in shipped()}


def _criteria() -> "Registry[Any]":
    from metaprune.criteria import CRITERIA

    return CRITERIA


def _allocators() -> "Registry[Any]":
    from metaprune.allocate import ALLOCATORS

    return ALLOCATORS


def _recoveries() -> "Registry[Any]":
    from metaprune.recovery import RECOVERIES

    return RECOVERIES


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


METHODS: dict[str, Callable[[], "Registry[Any]"]] = {
    "criteria": _criteria,
    "allocators": _allocators,
    "recoveries": _recoveries,
}
KINDS: dict[str, Callable[[], Mapping[str, str]]] = {
    "models": _models,
    "datasets": _datasets,
    "metanets": _metanets,
    "criteria": lambda: _described(_criteria()),
    "allocators": lambda: _described(_allocators()),
    "recoveries": lambda: _described(_recoveries()),
    "edits": _edits,
    "gates": _gates,
    "tasks": _tasks,
    "configs": _configs,
    "devices": _devices,
}
