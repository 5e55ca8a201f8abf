"""Is the cut network the masked one?

*Masked* means: the dense network with the removed units' slices of every parameter and buffer set to zero, and where
the statistics of a norm, or a softmax, run over removed units, they run over the kept ones only. Both networks get the
same real inputs and random numbers; the largest difference over the largest output is the error.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metaprune.errors import UnsupportedModelError
from metaprune.graph.adapt import adapt
from metaprune.graph.axes import Alive
from metaprune.graph.blocks import Block
from metaprune.graph.dispatch import bind
from metaprune.graph.layout import Layout
from metaprune.graph.lockstep import Lockstep, below_autograd
from metaprune.graph.record import Op, Value, tensors_in
from metaprune.graph.surgery import give_bias, like
from metaprune.graph.trace import ExampleInputs, call_arguments
from metaprune.graph.twin import copy_with, named_tensors
from metaprune.modes import default_dtype, evaluating


@dataclass(frozen=True)
class Verification:
    """How far the cut network is from the masked one.

    Attributes:
        max_error: Largest absolute difference over largest absolute output; no unit.
        scale: Largest absolute output of the masked network.
        samples: Number of inputs compared.
        inputs: Where they came from.
        doubled: Compared in float64, because in the network's own type the two differ by more than they may: rounding
            alone made one of them choose otherwise (``topk``, ``sort``, a threshold), or is as large as the outputs.
    """

    max_error: float
    scale: float
    samples: int
    inputs: str
    doubled: bool = False

    def passed(self, tolerance: float = 1e-5) -> bool:
        """The error is at most `tolerance`."""
        return self.max_error <= tolerance


def compare(
    model: nn.Module,
    slim: nn.Module,
    layout: Layout,
    alive: Alive,
    inputs: ExampleInputs,
    tensors: Mapping[str, Tensor],
    source: str,
    dropped: Sequence[Block] = (),
) -> Verification:
    """Run the masked dense network and the cut one on the same inputs, in evaluation mode, without gradients.

    Where they differ by more than rounding usually makes, float64 decides whether it was rounding.
    """
    masked = masked_copy(model, layout, alive, tensors).eval()
    found = _compare(masked, slim, _KeptStatistics(layout, alive, dropped), inputs, source)
    if not found.passed():
        with contextlib.suppress(Exception), default_dtype(torch.float64):  # code may hold constants of its own type
            pair = (_doubled(masked), _doubled(slim))
            kept = _KeptStatistics(layout, alive, dropped)
            exact = _compare(*pair, kept, _clone(inputs, torch.float64), source)
            found = replace(exact, doubled=True) if exact.passed() else found
    return found


def _doubled(model: nn.Module) -> nn.Module:
    return copy_with(model, lambda tensor: like(tensor, _clone(tensor, torch.float64)))[0]


def _compare(
    masked: nn.Module, slim: nn.Module, kept: "_KeptStatistics", inputs: ExampleInputs, source: str
) -> Verification:
    with torch._C._AutoDispatchBelowAutograd(), kept:
        wanted = _run(masked, inputs)
    kept.check_complete()
    with evaluating(slim):
        try:
            seen = _run(slim, inputs)
        except Exception as error:
            raise UnsupportedModelError(
                f"the cut network must run on what the dense one runs on, but raised {type(error).__name__}: {error}."
            ) from error
    pairs = [(a.double(), b.double()) for a, b in zip(wanted, seen, strict=True) if not a.is_complex()]
    pairs += [
        (torch.view_as_real(a).double(), torch.view_as_real(b).double()) for a, b in zip(wanted, seen) if a.is_complex()
    ]
    scale = max((float(a[a.isfinite()].abs().max()) for a, _ in pairs if a.isfinite().any()), default=0.0)
    difference = 0.0
    for a, b in pairs:
        same = (a == b) | (a.isnan() & b.isnan())
        if not bool(same.all()):
            gap = (a - b)[~same].abs()
            difference = max(difference, float(gap.max()) if bool(gap.isfinite().all()) else float("inf"))
    return Verification(difference / scale if scale else difference, scale, len(tensors_in(inputs)[0]), source)


def _run(model: nn.Module, inputs: ExampleInputs) -> list[Tensor]:
    """Outputs for a copy of the inputs (a forward may write into them), always with the same random numbers."""
    args, kwargs = call_arguments(_clone(inputs))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return tensors_in(model(*args, **kwargs))


def _clone(item: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy; with a type, floating-point numbers are of that type."""
    if isinstance(item, Tensor):
        copied = item.detach().clone()
        return copied.to(dtype) if dtype is not None and item.is_floating_point() else copied
    if isinstance(item, Mapping):
        return {key: _clone(entry, dtype) for key, entry in item.items()}
    if isinstance(item, (list, tuple)):
        return tuple(_clone(entry, dtype) for entry in item)
    return item


def masked_copy(model: nn.Module, layout: Layout, alive: Alive, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The dense network with the slices of removed units set to zero; where something is divided by them, to one."""
    originals = named_tensors(model)
    divided = divided_by(layout)
    masked: dict[int, Tensor] = {}
    for name, value in layout.trace.parameters.items():
        original = originals[name]
        data = tensors.get(name, original).detach().to(original.device, original.dtype).clone()
        mask_(data, value, layout, alive, divided)
        masked[id(original)] = like(original, data)
    module, _ = copy_with(model, lambda tensor: masked.get(id(tensor), tensor.detach().clone()))
    for name in tensors.keys() - originals.keys():
        give_bias(module, name, tensors[name])
    return adapt(module)


def mask_(data: Tensor, value: Value, layout: Layout, alive: Alive, divided: Collection[tuple[int, int]]) -> None:
    """Set the slices of removed units to zero, in place; where something is divided by them, to one.

    Args:
        data: In the shape of the dense parameter.
        value: The parameter in the trace.
        layout: Of the network.
        alive: Which units stay.
        divided: What :func:`divided_by` gives.
    """
    if not (data.is_floating_point() or data.is_complex()):
        return
    for k, dim in enumerate(value.dims):
        kept = layout.kept(dim, alive)
        if kept is not None and not kept.all():
            removed = torch.from_numpy((~kept).nonzero()[0]).to(data.device)
            data.index_fill_(k, removed, 1 if (value.index, k) in divided else 0)


def divided_by(layout: Layout) -> set[tuple[int, int]]:
    """Values and their dimensions by whose entries, or norms along them, something is divided."""
    trace = layout.trace
    divided: set[tuple[int, int]] = set()
    for op in trace.ops:
        if op.name.startswith("div") and len(op.inputs) > 1:
            divided.update((op.inputs[1], k) for k in range(len(trace.values[op.inputs[1]].dims)))
        elif op.name in ("_weight_norm_interface", "_weight_norm"):
            divided.add((op.inputs[0], op.constants["dim", None]))
    return divided


@contextmanager
def leaving_out(layout: Layout, dropped: Sequence[Block] = (), alive: Alive | None = None) -> Iterator[None]:
    """Runs of the network in this context have zeros where the branches end; without gradients.

    Args:
        layout: Of the network.
        dropped: Branches that leave.
        alive: Units that stay, over which statistics run, in a network whose other units are masked; all if None.

    Raises:
        UnsupportedModelError: The network made other calls than when it was traced.
    """
    kept = _KeptStatistics(layout, np.ones(len(layout.axis_of), bool) if alive is None else alive, dropped)
    with below_autograd(), kept:
        yield
    kept.check_complete()


class _KeptStatistics(Lockstep):
    """Runs the calls of the trace; those whose statistics run over removed positions see the kept ones only.

    Where a dropped branch is added to what lives, zeros are.
    """

    def __init__(self, layout: Layout, alive: Alive, dropped: Sequence[Block] = ()) -> None:
        super().__init__(layout.trace)
        self.layout, self.alive = layout, alive
        self.sides = {block.join: block.side for block in dropped}

    def check_complete(self) -> None:
        """Every call with statistics over removed positions has been met.

        Raises:
            UnsupportedModelError: The network made other calls on these inputs than when it was traced.
        """
        for name, ops in self.unmet():
            if any(self._cut(op) for op in ops):
                raise UnsupportedModelError(
                    f"the network must make the calls that it made when it was traced, but calls {name} "
                    f"{self.seen[name]} times instead of {len(ops)}. Verify on inputs like the example."
                )

    def call(self, op: Op | None, func: Any, args: Any, kwargs: Any) -> Any:
        """Those of the trace, on what is kept."""
        if op is not None and op.index in self.sides:
            return self._without_branch(func, self.sides[op.index], *args, **kwargs)
        if op is not None and self._cut(op):
            return self._on_kept(op, func, args, kwargs)
        return func(*args, **kwargs)

    def _without_branch(self, func: Any, side: int, first: Tensor, second: Tensor, **kwargs: Any) -> Any:
        if side == 1:
            return func(first, torch.zeros_like(second), **kwargs)
        return func(first.zero_() if func._schema.is_mutable else torch.zeros_like(first), second, **kwargs)

    def _cut(self, op: Op) -> bool:
        return op.index in self.sides or any(
            dim.labels_NK is not None and self.layout.count(dim.labels_NK, self.alive) < len(dim.labels_NK)
            for dim in op.statistics
        )

    def _on_kept(self, op: Op, func: Any, args: Any, kwargs: Any) -> Any:
        """Gather the kept positions of all operands, run the call on them, and put the results back among zeros."""
        arguments = bind(func, args, kwargs)
        numbers = iter(op.inputs)

        def gathered(item: Any) -> Any:
            if isinstance(item, Tensor):
                for k, kept in self._kept_positions(next(numbers)):
                    item = item.index_select(k, kept)
                return item
            return type(item)(map(gathered, item)) if isinstance(item, (list, tuple)) else item

        arguments = {name: gathered(item) for name, item in arguments.items()}
        for (name, entry), size in op.sizes.items():
            left = self.layout.count(size.labels_NK, self.alive)
            if entry is None:
                arguments[name] = left
            else:
                arguments[name] = [left if k == entry else number for k, number in enumerate(arguments[name])]
        out = func(**arguments)
        results = []
        for tensor, number in zip(tensors_in(out), op.outputs, strict=True):
            for k, kept in self._kept_positions(number):
                shape = list(tensor.shape)
                shape[k] = self.layout.trace.values[number].dims[k].size
                tensor = tensor.new_zeros(shape).index_copy(k, kept, tensor)
            results.append(tensor)
        return results[0] if isinstance(out, Tensor) else type(out)(results)

    def _kept_positions(self, number: int) -> list[tuple[int, Tensor]]:
        positions = []
        for k, dim in enumerate(self.layout.trace.values[number].dims):
            kept = self.layout.kept(dim, self.alive)
            if kept is not None and not kept.all():
                positions.append((k, torch.from_numpy(kept.nonzero()[0])))
        return positions
