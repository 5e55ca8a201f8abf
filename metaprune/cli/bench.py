"""``metaprune bench``: which of several ONNX files is faster on this machine, by how much, and how sure that is."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from metaprune.cli.answer import answer
from metaprune.cli.options import AsJson, Debug

if TYPE_CHECKING:
    from rich.console import Console

    from metaprune.measure import Node


def bench(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="ONNX files, the one to compare with first.")],
    batch: Annotated[int, typer.Option(metavar="N", help="Samples per call. [1]")] = 1,
    threads: Annotated[int, typer.Option(metavar="N", help="Threads per session. [1]")] = 1,
    rounds: Annotated[int, typer.Option(metavar="N", help="Rounds of calls at least. [200]")] = 200,
    seconds: Annotated[float, typer.Option(metavar="S", help="Time of measuring at least. [4]")] = 4.0,
    limit: Annotated[float, typer.Option(metavar="S", help="Time of measuring at most. [60]")] = 60.0,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Also measure load time and memory.")] = True,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also show where the time of the files goes, node by node.")
    ] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the order and the inputs. [0]")] = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Time ONNX files against each other on this machine.

    In fresh processes and random order, with the first file against itself as a
    control. A machine too noisy for a verdict ends with exit code 7.
    """
    from metaprune import export as room
    from metaprune.cli.screen import Screen
    from metaprune.errors import ResourceError
    from metaprune.measure import latency as time_files
    from metaprune.measure import profile as look_inside
    from metaprune.report import numbers

    screen = Screen(as_json)
    start = time.perf_counter()
    with screen.watch() as watch:
        watch.step("Timing in fresh processes")
        tell = watch.share("calls in random order")
        if memory:
            found = room.bench(
                files, batch=batch, threads=threads, rounds=rounds, seconds=seconds, limit_s=limit, seed=seed,
                progress=tell,
            )  # fmt: skip
            speed, weights = found.latency, found.memory
        else:
            for file in files:
                room.open_session(file, threads=1)  # all are read before the first is timed
            speed, weights = (
                time_files(
                    files, batch=batch, threads=threads, rounds=rounds, seconds=seconds, limit_s=limit, seed=seed,
                    progress=tell,
                ),
                (),
            )  # fmt: skip
        nodes = []
        if profile:
            watch.step("Timing every node")
            nodes = [look_inside(file, batch=batch, threads=threads, seed=seed) for file in files]
    names = [_name(file) for file in files]
    if len(set(names)) < len(names):
        names = list(files)  # two folders with a model.onnx each
    told = answer(
        "bench",
        files=dict(zip(names, files)),
        seconds={"total": round(time.perf_counter() - start, 3)},
        latency=speed.to_json(),
        memory=[one.to_json() for one in weights],
        profile=[[node.to_json() for node in of_file] for of_file in nodes],
    )

    def draw(console: "Console") -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("file", overflow="fold")
        for name in ("median", "95th", "size", "load", "memory") if weights else ("median", "95th"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("against the first", no_wrap=True)
        for k, arm in enumerate(speed.arms):
            against = "-"
            if k:
                ratio = speed.comparisons[k - 1].ratio
                against = numbers.ratio(ratio.value, ratio.low, ratio.high)
            own = []
            if weights:
                peak = weights[k].peak
                load = f"{weights[k].load.value:.1f} ms"
                own = [numbers.size(weights[k].size.value), load, "-" if peak is None else numbers.size(peak.value)]
            cells = [numbers.milliseconds(arm.p50.value), numbers.milliseconds(arm.p95.value), *own]
            table.add_row(Text(arm.file), *cells, against)
        console.print(table)
        control = numbers.ratio(speed.control.value, speed.control.low, speed.control.high)
        console.print(
            Text(
                f"{speed.rounds} rounds in {speed.processes} processes, batch {speed.batch}, threads {speed.threads}, "
                f"{speed.runtime}. The first file against itself: {control}."
            )
        )
        for name, of_file in zip(names, nodes):
            _draw_nodes(name, of_file, console)
        for name, one in zip(names[1:], speed.comparisons):
            said = _SAID[one.verdict]
            console.print(Text.assemble(f"{name}: ", said, f", {one.reason}."))

    screen.show(told, draw)
    noisy = [name for name, one in zip(names[1:], speed.comparisons) if one.verdict == "too noisy"]
    if not noisy:
        return 0
    screen.say(f"the machine is too noisy for a verdict on {', '.join(noisy)}. Quieten it, or give more --seconds.")
    return ResourceError.exit_code


_SHOWN = 10
_SAID = {
    "faster": ("faster", "green"),
    "slower": ("slower", "red"),
    "no difference": ("no difference", "cyan"),
    "too noisy": ("too noisy to tell", "yellow"),
}


def _draw_nodes(name: str, nodes: "Sequence[Node]", console: "Console") -> None:
    """The slowest nodes; those that could run on blocks of channels and do not are marked."""
    from rich.table import Table
    from rich.text import Text

    from metaprune.measure.profile import module_of, node_name

    table = Table(box=None, padding=(0, 2, 0, 0), title=Text(f"Slowest nodes of {name}", "bold"), title_justify="left")
    for title in ("node", "operator", "time", "share", "output"):
        table.add_column(title, justify="right" if title in ("time", "share") else "left", overflow="fold")
    for node in sorted(nodes, key=lambda node: -node.time.value)[:_SHOWN]:
        plain = node.operator in ("Conv", "FusedConv") and not node.blocked
        shape = "x".join(map(str, node.outputs[0])) if node.outputs else ""
        told = Text(node.operator + (" (not in blocks)" if plain else ""), "yellow" if plain else "")
        named = node.module is None or node.module == module_of(node.name)
        where = node.name if named else node_name(str(node.module), node.name)
        table.add_row(Text(where), told, f"{node.time.value:.0f} us", f"{node.share:.0%}", shape)
    console.print(table)


def _name(file: str) -> str:
    return file.rpartition("/")[2]
