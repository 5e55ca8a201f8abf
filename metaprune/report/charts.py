"""Pictures as plain geometry in percent of their box; the template draws them as SVG.

Labels are HTML beside the boxes, so that text keeps its size on a phone while the boxes shrink.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from metaprune.measure import Accuracy, Latency
from metaprune.report import numbers


@dataclass(frozen=True)
class Span:
    """One row: a value with its interval, on an axis from 0 to 100.

    Args:
        label: What it is.
        text: The number in words.
        value: Where it stands.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    label: str
    text: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bar:
    """One axis of the network.

    Args:
        name: Its name.
        size: Units before.
        kept: Units after.
        note: Why it must stay, or what it takes part in.
        width: Length of the bar: its size against the largest axis of the page, in percent.
        filled: Kept part of the bar, in percent of the bar.
        macs: Share of the dense MACs that has the axis as a factor, in percent.
        params: The same for parameters.
    """

    name: str
    size: int
    kept: int
    note: str
    width: float
    filled: float
    macs: float
    params: float


@dataclass(frozen=True)
class Curve:
    """A line over epochs.

    Args:
        points: ``x,y`` pairs of an SVG polyline in a box of 100 x 100.
        first: Label of the left end.
        last: Label of the right end.
        top: Label of the upper end.
        bottom: Label of the lower end.
    """

    points: str
    first: str
    last: str
    top: str
    bottom: str


@dataclass(frozen=True)
class Spans:
    """Rows on one axis.

    Args:
        rows: The rows.
        first: Label of the left end.
        last: Label of the right end.
        from_zero: The left end is 0, so that lengths can be compared and bars be drawn.
    """

    rows: tuple[Span, ...]
    first: str
    last: str
    from_zero: bool


def accuracy_spans(accuracies: Mapping[str, Accuracy], labels: Mapping[str, str]) -> Spans:
    """Accuracies with their intervals, on an axis that leaves out what no interval touches."""
    lowest = min((accuracy.low for accuracy in accuracies.values()), default=0.0)
    floor = min(90, 10 * math.floor(lowest / 10))

    def place(percent: float) -> float:
        return round(100 * (percent - floor) / (100 - floor), 2)

    rows = [
        Span(
            labels.get(name, name),
            numbers.percent(found.top1),
            place(found.top1),
            place(found.low),
            place(found.high),
        )
        for name, found in accuracies.items()
    ]
    return Spans(tuple(rows), f"{floor} %", "100 %", floor == 0)


def latency_spans(latency: Latency, labels: Sequence[str]) -> Spans:
    """Median latencies with their intervals, on an axis that begins at 0."""
    longest = max(arm.p50.high or arm.p50.value for arm in latency.arms) or 1.0

    def place(value: float | None) -> float:
        return round(100 * (value or 0.0) / longest, 2)

    rows = [
        Span(
            label,
            f"{numbers.milliseconds(arm.p50.value)} [{arm.p50.low:.3g}, {arm.p50.high:.3g}]",
            place(arm.p50.value),
            place(arm.p50.low),
            place(arm.p50.high),
        )
        for label, arm in zip(labels, latency.arms)
    ]
    return Spans(tuple(rows), "0 ms", numbers.milliseconds(longest), from_zero=True)


def axis_bars(rows: Sequence[Mapping[str, object]], kept: Mapping[str, int]) -> dict[str, list[Bar]]:
    """Axes in groups by the first part of their name, those that nothing was cut from included."""
    widest = max((int(str(row["size"])) for row in rows), default=1)
    groups: dict[str, list[Bar]] = {}
    for row in rows:
        name, size = str(row["name"]), int(str(row["size"]))
        stays = kept.get(name, size)
        bar = Bar(
            name=name,
            size=size,
            kept=stays,
            note="" if row["prunable"] else str(row["reason"]),
            width=round(max(2.0, 100 * math.sqrt(size / widest)), 2),  # by root, so that narrow axes stay visible
            filled=round(100 * stays / max(size, 1), 2),
            macs=round(100 * float(str(row["macs_share"])), 1),
            params=round(100 * float(str(row["params_share"])), 1),
        )
        groups.setdefault(name.partition(".")[0].partition("#")[0], []).append(bar)
    return groups


def loss_curve(history: Sequence[Mapping[str, float]]) -> Curve | None:
    """The training loss by epoch, or None for fewer than two epochs."""
    losses = [entry["train/loss"] for entry in history if math.isfinite(entry.get("train/loss", math.nan))]
    if len(losses) < 2:
        return None
    top, bottom = max(losses), min(losses)
    spread = (top - bottom) or 1.0
    points = " ".join(
        f"{100 * k / (len(losses) - 1):.2f},{100 * (top - loss) / spread:.2f}" for k, loss in enumerate(losses)
    )
    return Curve(points, "epoch 1", f"epoch {len(losses)}", f"{top:.3g}", f"{bottom:.3g}")
