"""What was done to a network and what came of it, as one page for people.

The page must open from a disk, in a mail, and in the frame of MLflow that runs no script: so everything is inside it,
and its own security policy forbids to fetch anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from metaprune import __version__
from metaprune.files import write_atomically
from metaprune.graph.show import axis_rows
from metaprune.measure import Latency
from metaprune.measure.host import host
from metaprune.pipeline import TOLERANCE, Result
from metaprune.report import charts, numbers
from metaprune.run import versions

LATENCIES = ("dense", "pruned", "refused: sizes of any number")
ACCURACIES = {"dense": "dense", "cut": "directly after the cut", "recovered": "after recovery"}


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the page tells.

    Args:
        result: The smaller network and how it came about.
        model: What named the network.
        data: What named the data, or None.
        budget: What was asked for.
        recoveries: Names of the recoveries that ran, in order.
        latency: Dense and smaller file timed in pairs, where that was done.
        times: Milliseconds of the dense and of the smaller file by path of the module, where that was done.
        checks: All checks, each with `name`, `passed` (None where it could not be made) and `detail`.
        notes: Sentences that a reader should not miss.
        commands: Command lines that reproduce the result, or go on from it.
        files: What lies beside the page: name to what it is.
    """

    result: Result
    model: str
    data: str | None
    budget: str
    recoveries: Sequence[str] = ()
    latency: Latency | None = None
    times: tuple[Mapping[str, float], Mapping[str, float]] | None = None
    checks: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()
    commands: Sequence[str] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def headline(self) -> str:
        """What was achieved, in one sentence."""
        result = self.result
        macs = result.after.macs / result.before.macs
        parts = [f"{self.model} needs {1 / macs:.2f} times fewer MACs ({numbers.count(result.after.macs)})"]
        difference = result.difference
        if difference is not None:
            accuracy = numbers.percent(result.after.metrics["accuracy"])
            parts.append(f"and is right on {accuracy} of {difference.n} {difference.split} images")
            if difference.low <= 0 <= difference.high:
                parts.append("; no difference to the dense network is proved")
            elif difference.high < 0:
                parts.append(f", {-difference.difference:.2f} points below the dense network")
            else:
                parts.append(f", {difference.difference:.2f} points above the dense network")
        return " ".join(parts).replace(" ,", ",").replace(" ;", ";") + "."


def render(findings: Findings) -> str:
    """The page as HTML."""
    result = findings.result
    sizes = result.network.sizes(result.plan).tolist()
    kept = dict(zip((axis.name for axis in result.network.axes), sizes, strict=True))
    groups = charts.axis_bars(axis_rows(result.network), kept)
    return template("report.html").render(
        findings=findings,
        result=result,
        version=__version__,
        numbers=numbers,
        tolerance=TOLERANCE,
        rows=_rows(findings),
        accuracies=charts.accuracy_spans(result.accuracy, ACCURACIES),
        latencies=None if findings.latency is None else charts.latency_spans(findings.latency, LATENCIES),
        maps=_maps(findings),
        dots=_dots(findings),
        groups=groups,
        axes=sum(not bar.note for bars in groups.values() for bar in bars),
        cut=sum(bar.kept < bar.size for bars in groups.values() for bar in bars),
        recoveries=[
            (name, done, charts.loss_curve(done.history))
            for name, done in zip(findings.recoveries, result.recovered, strict=True)
        ],
        host=host(),
        versions=versions(),
        comparison=findings.latency.comparisons[0] if findings.latency is not None else None,
    )


def _maps(findings: Findings) -> list[tuple[charts.Map, charts.Map]]:
    """Where MACs, parameters and latency lie, dense beside pruned."""
    network = findings.result.network
    before, after = network.cost_by_module(), network.cost_by_module(findings.result.plan)
    drawn = [
        charts.cost_maps(
            name,
            {path: cost[place] for path, cost in before.items()},
            {path: cost[place] for path, cost in after.items()},
            numbers.count,
        )
        for place, name in enumerate(("MACs", "parameters"))
    ]
    if findings.times is not None:
        drawn.append(charts.cost_maps("latency (measured)", *findings.times, numbers.milliseconds))
    return [pair for pair in drawn if pair is not None]


def _dots(findings: Findings) -> tuple[charts.Dot, ...]:
    measured = list(findings.result.accuracy.values())
    if findings.latency is None or not measured:
        return ()
    return charts.tradeoff((measured[0], measured[-1]), findings.latency, LATENCIES)


def write(findings: Findings, path: str | Path) -> Path:
    """Write the page.

    Args:
        findings: What it tells.
        path: The file.

    Returns:
        The file.

    Raises:
        InputError: Its folder cannot be written.
    """
    path = Path(path)
    write_atomically(path, render(findings).encode())
    return path


def _rows(findings: Findings) -> list[tuple[str, str, str, str]]:
    """Name, dense, pruned and change of every quantity of the table."""
    before, after = findings.result.before, findings.result.after
    rows = []
    difference = findings.result.difference
    if difference is not None:
        rows.append(
            (
                f"accuracy on {difference.n} {difference.split} images",
                numbers.percent(before.metrics["accuracy"]),
                numbers.percent(after.metrics["accuracy"]),
                numbers.points(difference.difference, difference.low, difference.high),
            )
        )
    for name, quantity, words in (
        ("MACs per sample", "macs", numbers.count),
        ("parameters", "params", numbers.count),
        ("bytes in memory", "bytes", numbers.size),
    ):
        dense, small = getattr(before, quantity), getattr(after, quantity)
        rows.append((name, words(dense), words(small), numbers.ratio(small / dense)))
    if findings.latency is not None:
        arms, comparison = findings.latency.arms, findings.latency.comparisons[0]
        ratio = comparison.ratio
        rows.append(
            (
                f"latency, batch {findings.latency.batch}",
                numbers.milliseconds(arms[0].p50.value),
                numbers.milliseconds(arms[1].p50.value),
                numbers.ratio(ratio.value, ratio.low, ratio.high),
            )
        )
    return rows


@cache
def template(name: str) -> jinja2.Template:
    """A page of this room."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("metaprune.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
