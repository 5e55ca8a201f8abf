"""Pictures as plain geometry in percent of their box; the template draws them as SVG.

Labels are HTML beside the boxes, so that text keeps its size on a phone while the boxes shrink.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from metaprune.measure import Accuracy, Latency
from metaprune.report import numbers
from metaprune.report.treemap import SQUARE, Polygon, area, breadth, centre, treemap

_TILES = 120  # modules that have an area of their own
_LEGIBLE, _LETTER = 300, 2.4  # an area that a word fits into, and the width of a letter, of 100 x 100


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


@dataclass(frozen=True)
class Tile:
    """One module in a map of costs.

    Args:
        points: ``x,y`` pairs of an SVG polygon in a box of 100 x 100.
        name: Path of the module, or what is gathered.
        text: What it costs, in words.
        kept: Share of its cost that stays, from 0 to 1.
        label: What is written on it; empty where there is no room.
        x: Where.
        y: Where.
    """

    points: str
    name: str
    text: str
    kept: float
    label: str
    x: float
    y: float


@dataclass(frozen=True)
class Map:
    """One quantity of a network, its modules as areas; the network with less of it has a smaller area.

    Args:
        title: What it shows.
        tiles: The modules.
        side: Length of its side, in percent of that of the larger network.
    """

    title: str
    tiles: tuple[Tile, ...]
    side: float


@dataclass(frozen=True)
class Dot:
    """One network between two quantities, in percent of the plot.

    Args:
        label: Which network.
        text: Both numbers in words.
        x: Where; `left` and `right` are the ends of its interval.
        y: Where, from below; `low` and `high` are the ends of its interval.
    """

    label: str
    text: str
    x: float
    y: float
    left: float
    right: float
    low: float
    high: float


def cost_maps(
    name: str, before: Mapping[str, float], after: Mapping[str, float], words: Callable[[float], str]
) -> tuple[Map, Map] | None:
    """Where a quantity of the dense and of the pruned network lies, to one scale; None where one has nothing of it.

    Args:
        name: Of the quantity.
        before: By path of the module.
        after: Likewise.
        words: Writes an amount.
    """
    most = {path: max(before.get(path, 0.0), after.get(path, 0.0)) for path in {**before, **after}}
    largest = sorted(most, key=lambda path: -most[path])[:_TILES]
    dense, small = _gathered(before, largest), _gathered(after, largest)
    whole, rest = sum(dense.values()), sum(small.values())
    if not whole or not rest:
        return None

    def drawn(which: str, amounts: Mapping[str, float]) -> Map:
        total = sum(amounts.values())
        side = math.sqrt(total / max(whole, rest))
        tiles = []
        for path, polygon in treemap(amounts, SQUARE * side).items():
            was, now = dense.get(path, 0.0), small.get(path, 0.0)
            text = f"{path}: {words(was)} before, {words(now)} after" + (f" ({now / was:.0%})" if was else "")
            points = " ".join(f"{px:.2f},{py:.2f}" for px, py in polygon)
            x, y = centre(polygon)
            kept = min(now / was, 1.0) if was else 1.0
            tiles.append(Tile(points, path, text, kept, _label(path, polygon), round(x, 2), round(y, 2)))
        return Map(f"{name}, {which}: {words(total)}", tuple(tiles), round(100 * side, 2))

    return drawn("dense", dense), drawn("pruned", small)


def _label(path: str, polygon: Polygon) -> str:
    """As much of the end of a path as there is room for: two parts, one, or nothing."""
    if area(polygon) <= _LEGIBLE:
        return ""
    ends = (".".join(path.split(".")[-parts:]) for parts in (2, 1))
    return next((end for end in ends if _LETTER * len(end) <= breadth(polygon)), "")


def _gathered(amounts: Mapping[str, float], largest: Sequence[str]) -> dict[str, float]:
    """The largest modules, and what is left of each part of the network together."""
    out: dict[str, float] = {}
    for path, amount in amounts.items():
        if amount > 0:
            name = path or "the network itself"
            name = name if path in largest else f"{name.partition('.')[0]}.others"
            out[name] = out.get(name, 0.0) + amount
    return out


def tradeoff(accuracies: Sequence[Accuracy], latency: Latency, labels: Sequence[str]) -> tuple[Dot, ...]:
    """Accuracy over latency, one dot a network, from 0 ms and from the accuracy that no interval reaches."""
    longest = 1.1 * max(arm.p50.high or arm.p50.value for arm in latency.arms)
    floor = _floor(accuracies)

    def across(milliseconds: float | None) -> float:
        return round(100 * (milliseconds or 0.0) / longest, 2)

    def up(percent: float) -> float:
        return round(100 * (percent - floor) / (100 - floor), 2)

    return tuple(
        Dot(
            label=label,
            text=f"{numbers.percent(found.top1)} at {numbers.milliseconds(arm.p50.value)}",
            x=across(arm.p50.value),
            y=up(found.top1),
            left=across(arm.p50.low),
            right=across(arm.p50.high),
            low=up(found.low),
            high=up(found.high),
        )
        for label, found, arm in zip(labels, accuracies, latency.arms)
    )


def _floor(accuracies: Iterable[Accuracy]) -> int:
    """The ten percent below every interval."""
    lowest = min((accuracy.low for accuracy in accuracies), default=0.0)
    return min(90, 10 * math.floor(lowest / 10))


def accuracy_spans(accuracies: Mapping[str, Accuracy], labels: Mapping[str, str]) -> Spans:
    """Accuracies with their intervals, on an axis that leaves out what no interval touches."""
    floor = _floor(accuracies.values())

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
