"""Forwards that are run once up to some call, and from there on many times, with other weights behind it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metaprune.graph.lockstep import Lockstep, below_autograd
from metaprune.graph.record import Op, Trace, tensors_in

Forward = Callable[[nn.Module], Any]


class _There(BaseException):
    """The call that is looked for is about to be made."""


class Prefix:
    """What forwards have computed before one of their calls.

    A network whose weights change from some layer on computes before it what it has computed already. Its own code runs
    each time, but calls before that place give what they gave, and are not made. Only what is read later is kept: the
    rest is answered with meta tensors. Where the code then asks for their numbers, the forward is run whole.

    Args:
        forwards: Each runs the network that it is given, in evaluation mode, on a batch of its own.
        trace: What was recorded of the network.
    """

    def __init__(self, forwards: Sequence[Forward], trace: Trace) -> None:
        self._forwards, self._trace = tuple(forwards), trace
        self._given: list[dict[int, Any]] = [{} for _ in self._forwards]
        self._needed, self._written = set[int](), set[int]()

    def go_to(self, op: Op, model: nn.Module) -> None:
        """Go on to before a call, with the network as it is; there is no way back."""
        later, storages = self._trace.ops[op.index :], [value.storage for value in self._trace.values]
        read = [number for call in later for number in call.inputs]
        self._needed = {storages[number] for number in (*read, *self._trace.outputs)}
        self._written = {storages[number] for call in later for number in call.written()}
        self._given = [self._until(op, forward, given, model) for forward, given in zip(self._forwards, self._given)]

    def results(self, model: nn.Module) -> list[Any]:
        """What each forward gives.

        Args:
            model: The network, or a copy of it, in which nothing has changed but what calls from this place on read.
        """
        return [self._end(forward, given, model) for forward, given in zip(self._forwards, self._given)]

    def _until(self, op: Op, forward: Forward, given: dict[int, Any], model: nn.Module) -> dict[int, Any]:
        mode = _Skip(self._trace, given, op.index, self._kept)
        try:
            with below_autograd(), mode:
                forward(model)
        except _There:
            return {index: self._kept(self._trace.ops[index], out) for index, out in given.items()} | mode.made
        except Exception:  # the code looks at what was not kept; a fault of its own comes again
            if not given:
                raise
            return self._until(op, forward, {}, model)
        return {}  # on this batch, the code takes another way

    def _end(self, forward: Forward, given: dict[int, Any], model: nn.Module) -> Any:
        kept = [
            (tensor, tensor.clone())
            for index, out in given.items()
            if not self._written.isdisjoint(self._storages(self._trace.ops[index]))
            for tensor in tensors_in(out)
        ]
        try:
            with below_autograd(), _Skip(self._trace, given):
                return forward(model)
        except Exception:  # as above
            if not given:
                raise
            return self._end(forward, {}, model)
        finally:
            for tensor, before in kept:
                tensor.copy_(before)

    def _kept(self, op: Op, out: Any) -> Any:
        """What a call gave, with numbers only where something behind reads their memory."""
        if not self._needed.isdisjoint(self._storages(op)):
            return out
        if isinstance(out, Tensor):
            return torch.empty_like(out, device="meta")
        return type(out)(self._kept(op, item) for item in out) if isinstance(out, (list, tuple)) else out

    def _storages(self, op: Op) -> set[int]:
        return {self._trace.values[number].storage for number in op.outputs}


def _again(out: Any) -> Any:
    """What a call gave, in tensors of their own: autograd notes whose views they are, and refuses to do so twice."""
    if isinstance(out, Tensor):
        return out.detach()
    return type(out)(map(_again, out)) if isinstance(out, (list, tuple)) else out


class _Skip(Lockstep):
    """Gives what calls gave instead of making them, and notes those that it makes before one.

    Args:
        trace: Of the network.
        given: What calls gave, by number.
        stop: Number of the call before which it ends; None for the end.
        keep: What is noted of a result.

    Attributes:
        made: What was noted, by number.
    """

    def __init__(
        self,
        trace: Trace,
        given: dict[int, Any],
        stop: int | None = None,
        keep: Callable[[Op, Any], Any] = lambda op, out: out,
    ) -> None:
        super().__init__(trace)
        self.given, self.stop, self.keep = given, stop, keep
        self.made: dict[int, Any] = {}

    def call(self, op: Op | None, func: Any, args: Any, kwargs: Any) -> Any:
        if op is None:
            return func(*args, **kwargs)
        if op.index == self.stop:
            raise _There
        if op.index in self.given:
            return _again(self.given[op.index])
        out = func(*args, **kwargs)
        if self.stop is not None and op.index < self.stop:
            self.made[op.index] = self.keep(op, out)
        return out
