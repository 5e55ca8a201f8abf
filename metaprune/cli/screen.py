"""What a user sees: results on standard output, progress and messages on standard error."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from metaprune.cli.failure import Failure

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

_REFRESH = 8.0  # pictures per second
_BAR = 28  # columns for spinner, bar and time that is left
_TELL_EVERY_S = 20.0  # where no bar can be drawn, a line about long work comes this often


class Screen:
    """The two streams of one command.

    Args:
        as_json: Standard output gets one JSON object and nothing else.
    """

    def __init__(self, as_json: bool) -> None:
        from rich.console import Console

        self.as_json = as_json
        self.out = Console(highlight=False)
        self.err = Console(stderr=True, highlight=False)

    def say(self, text: str = "") -> None:
        """A message for a human who watches."""
        self.err.print(text, markup=False)

    def warn(self, text: str) -> None:
        """Something that the user should know, although the work goes on."""
        from rich.text import Text

        self.err.print(Text.assemble(("note ", "yellow"), text))

    def show(self, answer: Mapping[str, Any], draw: "Callable[[Console], None]") -> None:
        """The result: as JSON, or drawn."""
        if self.as_json:
            print(json.dumps(finite(answer), allow_nan=False))
        else:
            draw(self.out)

    @contextmanager
    def watch(self) -> "Iterator[Watch]":
        """Steps and bars of long work."""
        watch = Watch(self.err)
        try:
            yield watch
        except BaseException:
            watch.stop()
            raise
        watch.end()


class Watch:
    """Steps of a command as they end, and a bar with an ETA for the work at hand.

    It is a :class:`metaprune.recovery.Progress`. Without a terminal there are plain lines, and few of them.
    """

    def __init__(self, console: "Console") -> None:
        self.console = console
        self._step: str | None = None
        self._bars: Progress | None = None
        self._bar: TaskID | None = None
        self._total = self._done = self._first = 0
        self._unit = self._description = ""

    def step(self, description: str) -> None:
        """The next step begins, and with it the one before has ended."""
        self.end()
        self._step, self._began = description, time.perf_counter()
        if self.console.is_terminal:
            self._bars = _bars(self.console)
            self._bars.start()
            self._waiting = self._bars.add_task(description, total=None, numbers="")

    def end(self) -> None:
        """The step at hand has ended."""
        self.stop()
        if self._step is not None:
            seconds = time.perf_counter() - self._began
            self.console.print(f"  {self._step} [dim]{seconds:.1f} s[/]", markup=True)
            self._step = None

    def stop(self) -> None:
        """Nothing is drawn any more; the step at hand has not ended well."""
        self.close()
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def note(self, text: str) -> None:
        """A line beside the work at hand."""
        self.console.print(text, markup=False)

    def start(self, total: int, unit: str, description: str, done: int = 0) -> None:
        """A piece of work begins; see `recovery.Progress`."""
        self._total, self._unit, self._description, self._done, self._first = total, unit, description, done, done
        self._work_began = self._told = time.perf_counter()
        if self._bars is not None:
            self._bars.update(self._waiting, visible=False)
            self._bar = self._bars.add_task(description, total=total, completed=done, numbers=f"{done}/{total}")

    def advance(self, amount: int = 1, status: str = "") -> None:
        """Units of it are done."""
        self._done += amount
        if self._bars is not None and self._bar is not None:
            shown = f"{self._done}/{self._total} {status or self._unit}"
            room = max(self.console.width - len(self._description) - _BAR, len(shown) - len(status))
            numbers = shown if len(shown) <= room else f"{shown[: room - 1]}…"
            self._bars.update(self._bar, completed=self._done, numbers=numbers)
        elif not self.console.is_terminal and time.perf_counter() - self._told >= _TELL_EVERY_S:
            self._told = time.perf_counter()
            pace = (self._told - self._work_began) / max(1, self._done - self._first)
            left = pace * (self._total - self._done)
            self.console.print(
                f"    {self._description}: {self._done} of {self._total} {self._unit}, {left:.0f} s left"
                f"{f' ({status})' if status else ''}",
                markup=False,
            )

    def close(self) -> None:
        """It is over."""
        if self._bars is not None and self._bar is not None:
            self._bars.remove_task(self._bar)
            self._bars.update(self._waiting, visible=True)
        self._bar = None

    def share(self, description: str) -> Callable[[float], None]:
        """A function that draws a bar from the share that is done, 0 to 1."""
        self.start(100, "%", description)

        def tell(share: float) -> None:
            self.advance(max(0, round(100 * share) - self._done))

        return tell

    def samples(self, description: str, unit: str = "images") -> Callable[[int, int], None]:
        """A function that draws a bar from the samples done and the samples in all."""
        self.close()

        def tell(done: int, total: int) -> None:
            if self._description != description:
                self.start(total, unit, description)
            self.advance(done - self._done)

        return tell


def _bars(console: "Console") -> "Progress":
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[numbers]}", markup=False),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        refresh_per_second=_REFRESH,
    )


def say_failure(failure: Failure) -> None:
    """An error on standard error, in words."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    label = () if failure.kind == "Interrupted" else (("error ", "bold red"),)
    console.print(Text.assemble(*label, failure.message))
    if failure.again is not None:
        console.print(Text(f"  {failure.again}"), soft_wrap=True)  # never broken, so that it can be copied


def finite(value: Any) -> Any:
    """The same plain data with None for numbers that JSON has no word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(part) for key, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, list | tuple) else value
