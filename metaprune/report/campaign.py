"""A search campaign as one page for people: its front, what it gave to each axis, how it went, who won where.

The page runs no script: points of the front are links to their rows, and show what they are when they are pointed at.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from metaprune import __version__
from metaprune.files import write_atomically
from metaprune.measure.host import host
from metaprune.report import numbers
from metaprune.report.page import template
from metaprune.run import versions
from metaprune.search.pareto import Point, progress
from metaprune.search.settings import DIRECTIONS, sign_of

_MARGIN = 4.0  # percent of the picture that stays free at each side


@dataclass(frozen=True, kw_only=True)
class CampaignFindings:
    """What the page tells.

    Args:
        name: Of the campaign.
        model: What named the network.
        data: What named the data.
        split: What trials were judged on.
        images: How many of its images.
        objectives: What was optimised, the first one is shown upwards.
        dense: Of the dense network: metrics by name.
        sizes: Of the dense network: units by axis.
        closed: Why it ended, or None.
        first: Points of the first rung, in the order of trials.
        last: Points of the highest rung.
        failures: Configuration and reason of each trial that failed.
        networks: What was written of the front: by key, its folder and its checks.
        commands: How to go on.
        files: What lies beside the page.
    """

    name: str
    model: str
    data: str
    split: str
    images: int
    objectives: Sequence[str]
    dense: Mapping[str, float]
    sizes: Mapping[str, int]
    closed: str | None
    first: Sequence[Point]
    last: Sequence[Point]
    failures: Sequence[Mapping[str, Any]] = ()
    networks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    commands: Sequence[str] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def front(self) -> list[Point]:
        """The front of the highest rung, the best in the first objective first."""
        up = DIRECTIONS[self.objectives[0]] == "maximize"
        points = [point for point in self.last if point.front]
        return sorted(points, key=lambda point: point.metrics[self.objectives[0]], reverse=up)


@dataclass(frozen=True)
class Dot:
    """A point of a scatter plot, in percent of its box.

    Args:
        point: What it stands for.
        x: From the left.
        y: From above.
    """

    point: Point
    x: float
    y: float


@dataclass(frozen=True)
class Scatter:
    """Points over two quantities, and the ends of both axes."""

    dots: tuple[Dot, ...]
    steps: str
    across: str
    upwards: str
    left: str
    right: str
    top: str
    bottom: str


def render(findings: CampaignFindings) -> str:
    """The page as HTML."""
    return template("campaign.html").render(
        findings=findings,
        front=findings.front,
        scatter=scatter(findings),
        baselines=baselines(findings),
        growth=growth(findings),
        rivals=sorted({name for one in findings.networks.values() for name in one["gains"]}),
        version=__version__,
        numbers=numbers,
        shown=numbers.quantity,
        host=host(),
        versions=versions(),
    )


def write(findings: CampaignFindings, path: Path) -> Path:
    """Write the page.

    Raises:
        InputError: Its folder cannot be written.
    """
    write_atomically(path, render(findings).encode())
    return path


def scatter(findings: CampaignFindings) -> Scatter | None:
    """The first objective over the second, or over the MACs where there is one alone; None where there is no point."""
    upwards = findings.objectives[0]
    across = findings.objectives[1] if len(findings.objectives) > 1 else "macs"
    points = [point for point in findings.last if upwards in point.metrics and across in point.metrics]
    if not points:
        return None
    x, left, right = _scale([float(point.metrics[across]) for point in points])
    y, bottom, top = _scale([float(point.metrics[upwards]) for point in points])
    up = DIRECTIONS[upwards] == "maximize"
    dots = tuple(Dot(point, round(a, 2), round(100 - b if up else b, 2)) for point, a, b in zip(points, x, y))
    ends = (top, bottom) if up else (bottom, top)
    return Scatter(
        dots=dots,
        steps=" ".join(f"{dot.x},{dot.y}" for dot in sorted(dots, key=lambda dot: dot.x) if dot.point.front),
        across=across,
        upwards=upwards,
        left=numbers.quantity(across, left),
        right=numbers.quantity(across, right),
        top=numbers.quantity(upwards, ends[0]),
        bottom=numbers.quantity(upwards, ends[1]),
    )


def _scale(values: Sequence[float]) -> tuple[list[float], float, float]:
    """Places in percent, within the margins, and the values at the ends."""
    low, high = min(values), max(values)
    width = (high - low) or 1.0
    return [_MARGIN + (100 - 2 * _MARGIN) * (value - low) / width for value in values], low, high


def baselines(findings: CampaignFindings) -> tuple[list[str], list[tuple[str, list[tuple[str, bool]]]]]:
    """By budget, the first objective of every proposer, the best of each budget marked: names, then rows."""
    goal = findings.objectives[0]
    sign = -sign_of(goal)
    best: dict[tuple[str, str], float] = {}
    for point in (point for point in findings.first if point.feasible and goal in point.metrics):
        key = (str(point.config["budget"]), point.origin)
        best[key] = max(best.get(key, -math.inf), sign * point.metrics[goal])
    names = list(dict.fromkeys(name for _, name in best))
    rows = []
    for budget in sorted({budget for budget, _ in best}, reverse=True):
        own = {name: best[budget, name] for name in names if (budget, name) in best}
        top = max(own.values())
        rows.append(
            (
                budget,
                [
                    (numbers.quantity(goal, sign * own[name]) if name in own else "", own.get(name) == top)
                    for name in names
                ],
            )
        )
    return names, rows


def growth(findings: CampaignFindings) -> str | None:
    """What the front of the first rung was worth, trial by trial, as points of a line; None for fewer than two."""
    points = [
        point
        for point in findings.first
        if point.feasible and all(name in point.metrics for name in findings.objectives)
    ]
    if len(points) < 2:
        return None
    rows = [[sign_of(name) * point.metrics[name] for name in findings.objectives] for point in points]
    worth = progress(np.array(rows, np.float64))
    return " ".join(f"{100 * k / (len(worth) - 1):.2f},{100 * (1 - value):.2f}" for k, value in enumerate(worth))
