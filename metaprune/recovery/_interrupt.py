"""Ctrl-C at a moment of our choosing: between two steps, when all that makes up the state fits together."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_back_interrupt() -> Iterator[Callable[[], bool]]:
    """Within it, Ctrl-C is noted instead of raised; what it yields tells whether that happened.

    A second Ctrl-C is raised at once, and one that nobody acted upon is raised at the end. Where Ctrl-C does not mean
    :class:`KeyboardInterrupt` (another thread, or a program with a handler of its own) nothing is changed.
    """
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt
