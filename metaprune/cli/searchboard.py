"""What a user sees of a campaign: its space, a live table while it runs, and its front."""

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from metaprune.cli.screen import Screen
from metaprune.report import numbers

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from metaprune.search.campaign import Campaign, Job

_ROWS = 8  # of the front, while it changes
_REDRAW_S = 1.0
_TELL_EVERY_S = 20.0
_WIDEST = 24  # axes that are printed one by one


class Board:
    """A live table of rungs and front, with the time that is left; plain lines where no table can be drawn.

    A thread looks at the storage, because trials may take long, and others end some meanwhile.

    Args:
        screen: Where it is drawn.
        campaign: For this thread alone.
    """

    def __init__(self, screen: Screen, campaign: "Campaign") -> None:
        self._screen, self._campaign = screen, campaign
        self._began = time.monotonic()
        self._done_before = self._settled()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(5)

    def told(self, job: "Job", how: str) -> None:
        """A trial has ended here."""
        if how not in ("done", "dropped"):
            self._screen.warn(f"trial {job.trial.number} failed: {how}")

    def _run(self) -> None:
        if not self._screen.err.is_terminal:
            while not self._over.wait(_TELL_EVERY_S):
                with suppress(Exception):  # a storage that is away: nothing is drawn, that is all
                    self._screen.say(self._headline())
            return
        from rich.live import Live

        with Live(console=self._screen.err, transient=True, auto_refresh=False) as live:
            while not self._over.wait(_REDRAW_S):
                with suppress(Exception):
                    live.update(self._table(), refresh=True)

    def _settled(self) -> int:
        return sum(task.settled for queue in self._campaign.queues for task in queue.tasks().values())

    def _headline(self) -> str:
        tasks = [list(queue.tasks().values()) for queue in self._campaign.queues]
        most = self._campaign.settings.stop.trials
        settled = sum(task.settled for task in tasks[0])
        text = f"{settled} of {most} trials"
        for number, own in enumerate(tasks[1:], 1):
            if own:
                name = self._campaign.settings.fidelity(number)
                text += f", {sum(task.settled for task in own)} of {len(own)} on {name}"
        gained = self._settled() - self._done_before
        if gained > 0 and settled < most:
            left = (time.monotonic() - self._began) / gained * (most - settled)
            text += f", about {numbers.duration(left)} left on this rung"
        return text

    def _table(self) -> "RenderableType":
        from rich.console import Group
        from rich.text import Text

        front = [point.row() for point in self._campaign.result() if point.front]
        return Group(
            Text(self._headline(), style="bold"), front_table(front, self._campaign.settings.objectives, _ROWS)
        )


def front_table(front: Sequence[Mapping[str, Any]], objectives: Sequence[str], most: int | None = None) -> Any:
    """The points of a front, the best in the first objective first."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    for name in ("trial", *objectives, "budget", "by", "gain"):
        table.add_column(name, no_wrap=True, justify="right" if name in ("trial", *objectives, "gain") else "left")
    down = objectives[0] != "accuracy"
    ordered = sorted(front, key=lambda row: row.get(objectives[0]) or 0.0, reverse=not down)
    for row in ordered[:most]:
        gain = row.get("gain_over_uniform")
        table.add_row(
            str(row["trial"]),
            *(numbers.quantity(name, row.get(name)) for name in objectives),
            str(row["budget"]),
            f"{row['criterion']}, {row['allocator']}, {row['recovery']}",
            "" if gain is None else f"{gain:+.2f}",
        )
    return table


def draw_space(told: Mapping[str, Any], console: "Console") -> None:
    """The space, at most 80 columns wide."""
    from rich.table import Table

    axes = told["axes"]
    console.print(
        f"{told['model']}: {len(axes)} axes may be cut, {len(told['frozen'])} must stay, 10^"
        f"{told['configurations_log10']:g} configurations."
    )
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    for name in ("axis", "kind", "units", "levels"):
        table.add_column(name, no_wrap=name != "levels", overflow="ellipsis")
    for axis in axes[:_WIDEST]:
        levels = axis["levels"]
        few = ", ".join(map(str, levels)) if len(levels) <= 9 else f"{levels[0]}, {levels[1]}, … {levels[-1]}"
        table.add_row(axis["name"], axis["kind"], str(axis["size"]), f"{len(levels)}: {few}")
    console.print(table)
    if len(axes) > _WIDEST:
        console.print(f"… and {len(axes) - _WIDEST} more (--json has all).")
    if told["branches"]:
        console.print(f"Branches that may leave: {', '.join(told['branches'])}.")
    console.print()
    for name, values in told["choices"].items():
        if isinstance(values, dict):  # a range of budgets
            values = [f"{quantity} from {low:g} to {high:g}" for quantity, (low, high) in values.items()]
        console.print(f"{name:<11}{', '.join(map(str, values))}")
    console.print()
    ranges = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    for name in ("cost", "least", "", "dense"):
        ranges.add_column(name, justify="left" if name == "cost" else "right")
    for name, found in told["ranges"].items():
        ranges.add_row(
            name,
            numbers.quantity(name, found["least"]),
            numbers.ratio(found["least_share"]),
            numbers.quantity(name, found["most"]),
        )
    console.print(ranges)


def draw_status(told: Mapping[str, Any], console: "Console") -> None:
    """Where a campaign stands."""
    for rung in told["rungs"]:
        states = ("done", "running", "waiting", "failed", "lost", "quarantined")
        parts = [f"{rung[state]} {state}" for state in states if rung[state]]
        console.print(f"{rung['name']}: {', '.join(parts) or 'nothing yet'}")
        for failure in rung["failures"]:
            console.print(f"  trial {failure['trial']} failed: {failure['why']}", markup=False)
    if told["closed"]:
        console.print(f"No trial is proposed any more: {told['closed']}.")
    console.print("It is over." if told["over"] else "It is not over.")
    console.print()
    console.print(front_table(told["front"], told["objectives"]))


def draw_tested(networks: Sequence[Mapping[str, Any]], console: "Console") -> None:
    """What the networks that were written give on test images, which chose nothing; nothing without networks."""
    from rich.table import Table

    if not networks:
        return
    images, names = networks[0]["test_images"], sorted({name for one in networks for name in one["gains"]})
    console.print(f"On {images} test images; gains in points at the same budget, with 95 % intervals:")
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    for column in ("trial", "accuracy", *(f"over {name}" for name in names)):
        table.add_column(column, no_wrap=True, justify="right")
    for network in networks:
        gains = (network["gains"].get(name) for name in names)
        table.add_row(
            str(network["trial"]),
            numbers.quantity("accuracy", network["accuracy"]),
            *("" if gain is None else numbers.gain(gain["value"], gain["low"], gain["high"]) for gain in gains),
        )
    console.print(table)
    console.print()


def draw_end(told: Mapping[str, Any], console: "Console") -> None:
    """What a campaign found."""
    draw_status(told, console)
    console.print()
    draw_tested(told["networks"], console)
    for name, path in told["files"].items():
        console.print(f"{name:<12}{path}", soft_wrap=True)
    console.print(f"More trials: {told['reproduce']} --trials N", soft_wrap=True)
