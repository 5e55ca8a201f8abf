"""Does the cut network do what the dense one did, with the predicted sizes and nothing else changed?

Call by call: the same function, the same operands (by number), the same constants, except that an integer that counts
labelled positions must have become the number of those that are left; results of the predicted shape and the same type;
and constants that the code made must hold the same numbers, at the positions that are left.
"""

from typing import Any

import torch
from torch import Tensor

from metaprune.errors import UnsupportedModelError
from metaprune.graph.axes import Alive, Dim
from metaprune.graph.layout import Layout
from metaprune.graph.record import Op, Path, Trace


class OtherCallsError(UnsupportedModelError):
    """The code of the cut network makes other calls: whether they compute the same, numbers must decide."""


def check_calls(layout: Layout, alive: Alive, after: Trace, *, by_module: bool = True) -> None:
    """Compare the trace of the cut network with the dense one.

    Args:
        layout: The dense network.
        alive: Which units stay.
        after: The cut network.
        by_module: Calls must be made by the modules of the same paths.

    Raises:
        OtherCallsError: The code takes another way.
        UnsupportedModelError: Names the first call that differs, what it should be and what it is.
    """
    before = layout.trace
    numbers = _numbering(before, after)
    checked: set[int] = set()
    for old, new in (*zip(before.ops, after.ops), *zip(before.further_ops, after.further_ops)):
        _same_call(old, new, by_module)
        _same_operands(old, new, numbers)
        _right_constants(layout, alive, old, new)
        for number in old.inputs:
            if number not in checked:
                checked.add(number)
                _same_numbers(layout, alive, old, number, before, after, numbers[number])
        for number, twin in zip(old.outputs, new.outputs, strict=True):
            _right_result(layout, alive, old, number, after, twin)
            numbers[number] = twin
    _same_memory(before, after, numbers)
    if len(before.ops) != len(after.ops):
        raise OtherCallsError(
            f"the cut network must make {len(before.ops)} calls as the dense one does, but makes {len(after.ops)}."
        )
    if [numbers[number] for number in before.outputs] != list(after.outputs):
        raise UnsupportedModelError("the cut network must return what the dense one does, but returns other tensors.")


def _numbering(before: Trace, after: Trace) -> dict[int, int]:
    """Which value of the cut network stands for which of the dense one: parameters by name, inputs by place."""
    numbers: dict[int, int] = {}
    for name, value in before.parameters.items():
        twin = after.parameters.get(after.aliases.get(name, name))
        if twin is not None:
            numbers[value.index] = twin.index
    numbers.update(zip(before.inputs, after.inputs, strict=True))
    return numbers


def _same_call(old: Op, new: Op, by_module: bool) -> None:
    if old.name != new.name or (by_module and old.module != new.module):
        raise OtherCallsError(
            f"the cut network must make the same calls, but makes {new} where the dense one makes {old}: "
            "its code takes another way for another size."
        )


def _same_operands(old: Op, new: Op, numbers: dict[int, int]) -> None:
    for k, (number, twin) in enumerate(zip(old.inputs, new.inputs)):
        # A value met for the first time here (a constant of the code) is paired by this very call.
        if numbers.setdefault(number, twin) != twin:
            raise UnsupportedModelError(
                f"{old} must get the same operands once cut, but operand {k} is another tensor."
            )
    if len(old.inputs) != len(new.inputs):
        raise UnsupportedModelError(f"{old} must get {len(old.inputs)} tensors once cut, but gets {len(new.inputs)}.")


def _right_constants(layout: Layout, alive: Alive, old: Op, new: Op) -> None:
    for path in dict.fromkeys((*old.constants, *new.constants)):
        number, seen = old.constants.get(path), new.constants.get(path)
        wanted = number
        if path in old.sizes:
            left = layout.count(old.sizes[path].labels_NK, alive)
            wanted = -left if isinstance(number, int) and number < 0 else left
        if not _equal(seen, wanted):
            raise UnsupportedModelError(
                f"{old} must get {_name(path)}={wanted} once cut, but gets {seen} (dense: {number}): the number is "
                "written or computed in code, and no attribute holds it."
            )


def _equal(seen: Any, wanted: Any) -> bool:
    if isinstance(seen, float) and isinstance(wanted, float) and seen != seen:
        return wanted != wanted
    return type(seen) is type(wanted) and bool(seen == wanted)


def _same_numbers(layout: Layout, alive: Alive, op: Op, number: int, before: Trace, after: Trace, twin: int) -> None:
    """A constant must hold the same numbers, at the positions that are left; positions of a dimension, their ranks."""
    known = before.values[number].known
    if known is None:
        return
    for k, dim in enumerate(before.values[number].dims):
        kept = layout.kept(dim, alive)
        if kept is not None and not kept.all():
            known = known.index_select(k, torch.from_numpy(kept.nonzero()[0]))
    for lookup in op.lookups:
        if lookup.number == number:
            ranks = layout.ranks(lookup.labels_NK, alive, known.long().numpy())
            known = torch.from_numpy(ranks).to(known.dtype)
    seen: Tensor | None = after.values[twin].known
    if seen is None or seen.shape != known.shape or not torch.allclose(seen, known, rtol=0, atol=0, equal_nan=True):
        raise UnsupportedModelError(
            f"{op} must get the same constant once cut, but its numbers are computed from a size that has changed."
        )


def _right_result(layout: Layout, alive: Alive, op: Op, number: int, after: Trace, twin: int) -> None:
    old, new = layout.trace.values[number], after.values[twin]
    wanted = tuple(size_left(layout, alive, op, dim) for dim in old.dims)
    shape = tuple(dim.size for dim in new.dims)
    if shape != wanted or old.dtype != new.dtype:
        raise UnsupportedModelError(
            f"{op} must give shape {wanted} of {old.dtype} once cut, but gives {shape} of {new.dtype}."
        )


def size_left(layout: Layout, alive: Alive, op: Op, dim: Dim) -> int:
    """Positions of a dimension that are left.

    Raises:
        UnsupportedModelError: The dimension stands for parts that have become unlike.
    """
    if dim.grid is None or dim.place == dim.grid.direction:
        return dim.size if dim.labels_NK is None else layout.count(dim.labels_NK, alive)
    place = dim.place - (dim.place > (dim.grid.direction or 0))
    sizes = {size_left(layout, alive, op, part[place]) for part in dim.grid.picked.values()}
    if len(sizes) > 1:
        raise UnsupportedModelError(
            f"{op} must give parts of one size, but they would become {' and '.join(map(str, sorted(sizes)))}."
        )
    return sizes.pop()


def _same_memory(before: Trace, after: Trace, numbers: dict[int, int]) -> None:
    """What a call changes in place must be read as often: a reshape may copy at one size and give a view at another."""
    writing = [(old, new) for old, new in zip(before.ops, after.ops) if old.written()]
    if not writing:
        return
    dense, slim, known = _Memory(before), _Memory(after), set(numbers.values())
    for old, new in writing:
        for number in old.written():
            changed = {numbers[other] for other in dense.changed(old, number)}
            if changed != slim.changed(new, numbers[number]) & known:
                raise UnsupportedModelError(
                    f"{old} must change the same tensors in place once cut, but changes others: something before it "
                    "copies at one size and gives a view at another. Keep more units, or write `clone()` there."
                )


class _Memory:
    """Which values share memory, when each is made, and when it is read last."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._made = {number: op.index for op in trace.ops for number in op.outputs}
        self._last = {number: op.index for op in trace.ops for number in op.inputs}
        self._last |= dict.fromkeys(trace.outputs, len(trace.ops))
        self._sharing: dict[int, list[int]] = {}
        for value in trace.values:
            self._sharing.setdefault(value.storage, []).append(value.index)

    def changed(self, op: Op, number: int) -> set[int]:
        """Values made before a call that writes into `number`, in the same memory, and read after it."""
        sharing = self._sharing[self._trace.values[number].storage]
        return {other for other in sharing if self._made.get(other, -1) < op.index < self._last.get(other, -1)}


def _name(path: Path) -> str:
    name, entry = path
    return name if entry is None else f"{name}[{entry}]"
