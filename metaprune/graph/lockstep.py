"""Runs a network call by call beside its trace."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metaprune.errors import UnsupportedModelError
from metaprune.graph.dispatch import bind
from metaprune.graph.record import Op, Trace, tensors_in
from metaprune.graph.rules import find_rule

Visit = Callable[[Op, Mapping[int, Tensor]], None]


class Lockstep(TorchDispatchMode):
    """Pairs each call with the one that the trace has in its place; enter it below autograd, as the trace did.

    Calls of one name are paired by their order, because other calls may differ between meta and real tensors.
    """

    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_name: dict[str, list[Op]] = {}
        for op in trace.ops:
            self.by_name.setdefault(op.name, []).append(op)
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if find_rule(func) is None:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        name = func._schema.name.removeprefix("aten::")
        place, self.seen[name] = self.seen[name], self.seen[name] + 1
        ops = self.by_name.get(name, [])
        return self.call(ops[place] if place < len(ops) else None, func, args, kwargs)

    def call(self, op: Op | None, func: Any, args: Any, kwargs: Any) -> Any:
        """Make one call; `op` is what the trace has in its place."""
        return func(*args, **kwargs)

    def unmet(self) -> Iterator[tuple[str, list[Op]]]:
        """Names that were called less or more often than in the trace, and their calls there."""
        for name, ops in self.by_name.items():
            if self.seen[name] != len(ops):
                yield name, ops


class _Watch(Lockstep):
    def __init__(self, trace: Trace, calls: set[int], visit: Visit) -> None:
        super().__init__(trace)
        self.calls, self.visit = calls, visit

    def call(self, op: Op | None, func: Any, args: Any, kwargs: Any) -> Any:
        if op is None or op.index not in self.calls:
            return func(*args, **kwargs)
        before = tensors_in(list(bind(func, args, kwargs).values()))
        out = func(*args, **kwargs)
        after = tensors_in(out)
        self.visit(op, dict(zip((*op.inputs, *op.outputs), (*before, *after), strict=True)))
        return out


@contextmanager
def below_autograd() -> Iterator[None]:
    """Calls come as they are in a trace, without gradients."""
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        yield


@contextmanager
def watching(trace: Trace, calls: set[int], visit: Visit) -> Iterator[None]:
    """Runs of the network in this context show what goes into and out of some of its calls; without gradients.

    Args:
        trace: Of the network.
        calls: Numbers of the calls.
        visit: Gets each of them with its tensors by number. It must not change them.

    Raises:
        UnsupportedModelError: The network made other calls than when it was traced.
    """
    mode = _Watch(trace, calls, visit)
    with below_autograd(), mode:
        yield
    for name, ops in mode.unmet():
        if any(op.index in calls for op in ops):
            raise UnsupportedModelError(
                f"the network must make the calls that it made when it was traced, but calls {name} {mode.seen[name]} "
                f"times instead of {len(ops)}. Give data like the example input."
            )
