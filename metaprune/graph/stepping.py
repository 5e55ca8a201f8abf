"""Forwards that stop before each of their calls, so that many can go on side by side, layer by layer.

A forward runs in a thread of its own, which only runs the network's Python code: every call to torch is handed to
whoever holds the :class:`Steps`, who makes it and gives back the result. Kernels thus run in one thread. What a forward
keeps alive between two calls is what its code keeps alive, so that stopping costs no memory.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch

from metaprune.errors import UnsupportedModelError
from metaprune.graph.dispatch import bind
from metaprune.graph.lockstep import Lockstep, below_autograd
from metaprune.graph.record import Op, Trace

_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


class _Abandoned(BaseException):
    """Ends the thread of a forward that nobody wants to finish."""


@dataclass
class Pending:
    """A call that a forward is about to make.

    Attributes:
        op: The call as it was recorded when the network was traced; None for one that the trace does not know.
        func: The overload.
        arguments: By name; they may be changed.
    """

    op: Op | None
    func: Any
    arguments: dict[str, Any]

    def make(self, **other: Any) -> Any:
        """The result; with other arguments than those of the call, if any are given."""
        with (
            below_autograd(),
            torch._C._ExcludeDispatchKeyGuard(_VIEWS),
        ):  # views are noted in the forward's own thread
            return self.func(**{**self.arguments, **other})


class Steps:
    """A forward that stops before each call.

    Calls of one name are paired with those of the trace by their order.

    Args:
        forward: Runs the network, in evaluation mode.
        trace: What was recorded of it, or of the dense network that it was cut from.

    Attributes:
        result: What the forward returned, once it has ended.
    """

    def __init__(self, forward: Callable[[], Any], trace: Trace) -> None:
        self.result: Any = None
        self._calls: SimpleQueue[Pending | BaseException | None] = SimpleQueue()
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(forward, trace), daemon=True)
        self._thread.start()
        self.pending = self._next()

    def answer(self, out: Any) -> None:
        """Give the result of the pending call, and let the code run on to the next."""
        self._answers.put(out)
        self.pending = self._next()

    def run_until(self, op: Op | None, watch: Callable[[Pending, Any], None] = lambda call, out: None) -> None:
        """Make all calls before one, or all that are left.

        Args:
            op: Stop before this one.
            watch: Sees every call that is made, with its result, before the code goes on.

        Raises:
            UnsupportedModelError: The forward ends without it: it makes other calls than when it was traced.
        """
        while self.pending is not None and (op is None or self.pending.op is not op):
            out = self.pending.make()
            watch(self.pending, out)
            self.answer(out)
        if op is not None and self.pending is None:
            raise UnsupportedModelError(
                f"the network must make the calls that it made when it was traced, but does not call {op} on this "
                "batch. Give batches like the example input."
            )

    def close(self) -> None:
        """End the forward where it is."""
        if self.pending is not None:
            self._answers.put(_Abandoned())
        self._thread.join()

    def _next(self) -> Pending | None:
        call = self._calls.get()
        if isinstance(call, BaseException):
            self.pending = None
            raise call
        return call

    def _run(self, forward: Callable[[], Any], trace: Trace) -> None:
        try:
            with below_autograd(), _Hand(trace, self._made):
                self.result = forward()
            self._calls.put(None)
        except _Abandoned:
            pass
        except BaseException as error:  # raised again by the one who waits for the next call
            self._calls.put(error)

    def _made(self, call: Pending) -> Any:
        self._calls.put(call)
        out = self._answers.get()
        if isinstance(out, BaseException):
            raise out
        return out


class _Hand(Lockstep):
    """Hands on every call."""

    def __init__(self, trace: Trace, made: Callable[[Pending], Any]) -> None:
        super().__init__(trace)
        self._made = made

    def call(self, op: Op | None, func: Any, args: Any, kwargs: Any) -> Any:
        return self._made(Pending(op, func, bind(func, args, kwargs)))


@contextmanager
def side_by_side(forwards: Sequence[Callable[[], Any]], trace: Trace) -> Iterator[list[Steps]]:
    """Several forwards at their first call; those that have not ended are abandoned at the end."""
    steps: list[Steps] = []
    try:
        for forward in forwards:
            steps.append(Steps(forward, trace))
        yield steps
    finally:
        for one in steps:
            one.close()
