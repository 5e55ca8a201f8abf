"""Residual branches as wholes: which there are, and the trace without some of them.

A branch ends where it is added to something that lives. Without it, that addition gives its other operand, and what
only the branch needed is not computed: calls, parameters and modules leave, whatever the code around them looks like.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import accumulate
from typing import Any

from metaprune.errors import ConfigError
from metaprune.graph.record import ModuleCall, Op, Ref, Trace, refs_in

JOINS = {"add", "add_", "sub", "sub_"}
_RETURNS_ITS_INPUT = {"to", "contiguous", "type_as", "dropout", "feature_dropout", "alpha_dropout"}


@dataclass(frozen=True)
class Block:
    """A residual branch that can leave whole.

    Attributes:
        name: The module that holds it: the innermost one around all of its parameters, or where several branches share
            that, the part of it with most of the branch's parameters.
        join: Index of the call that adds it to what lives.
        side: Which of the two operands it is.
        parameters: Parameters and buffers that leave with it, by first name.
    """

    name: str
    join: int
    side: int
    parameters: tuple[str, ...]


def find_blocks(trace: Trace) -> tuple[Block, ...]:
    """Every branch with parameters of its own that runs beside a shortcut, in the order in which they end."""
    graph, same = _Graph(trace), _same_tensors(trace, trace.ops)
    whole = _indices(_live(trace, same))
    found = []
    for op in trace.ops:
        for side in (0, 1):
            if op.index in whole and graph.may_leave(op, side):
                live = _indices(_live(trace, _stand_ins(trace, [(op.index, side)], same)))
                dead = whole - live
                parameters = _left_alone(trace, dead, live)
                if parameters and graph.share_an_input(dead, op.inputs[1 - side]):
                    found.append(Block("", op.index, side, parameters))
    sizes = {name: _entries(trace, name) for block in found for name in block.parameters}
    return tuple(replace(block, name=name) for block, name in zip(found, _names(found, sizes), strict=True))


def without(trace: Trace, blocks: Sequence[Block]) -> Trace:
    """The trace of the network without these branches: their calls, parameters and modules' calls are gone.

    Raises:
        ConfigError: Both operands of an addition would leave.
    """
    _refuse_loose_ends(trace, blocks)
    joins, same = [(block.join, block.side) for block in blocks], _same_tensors(trace, trace.ops)
    stands_for = _stand_ins(trace, joins, same)
    kept = _indices(_live(trace, stands_for))
    gone = _dropped_modules(trace, kept, _indices(_live(trace, same)) - kept, stands_for)
    # Calls that give back what they get stay, except with their modules.
    stands_for = _stand_ins(trace, joins, _same_tensors(trace, (op for op in trace.ops if _inside(op.module, gone))))
    live = _live(trace, stands_for)
    kept = _indices(live)
    dead = _indices(trace.ops) - kept
    names = set(_left_alone(trace, dead, kept)) | _unread(trace, gone)
    place = [0, *accumulate(int(op.index in kept) for op in trace.ops)]
    calls = [
        replace(
            call, start=place[call.start], stop=place[call.stop],
            args=_with(call.args, stands_for), kwargs=_with(call.kwargs, stands_for),
            result=_with(call.result, stands_for),
        )
        for call in trace.calls
        if not _inside(call.path, gone)
    ]  # fmt: skip
    ops = [
        replace(
            op, index=k, arguments=_with(op.arguments, stands_for),
            inputs=tuple(stands_for.get(number, number) for number in op.inputs),
        )
        for k, op in enumerate(live)
    ]  # fmt: skip
    return replace(
        trace,
        ops=ops,
        further_ops=[op for op in trace.further_ops if not _inside(op.module, gone)],
        calls=calls,
        parameters={name: value for name, value in trace.parameters.items() if name not in names},
        outputs=tuple(stands_for.get(number, number) for number in trace.outputs),
        result=_with(trace.result, stands_for),
        dropped=tuple(blocks),
        gone=gone,
    )


def live_part(trace: Trace) -> Trace:
    """The calls whose results reach an output, numbered anew, without what further runs saw."""
    ops = [replace(op, index=k) for k, op in enumerate(_live(trace, {}))]
    return replace(trace, ops=ops, further_ops=[])


def _indices(ops: Iterable[Op]) -> set[int]:
    return {op.index for op in ops}


def _dropped_modules(
    trace: Trace, live: set[int], dead: set[int], stands_for: Mapping[int, int]
) -> dict[str, ModuleCall]:
    """The largest modules that only dead calls were made in and whose results nothing reads, with one call of each."""
    needed = {stands_for.get(number, number) for number in trace.outputs}
    needed |= {stands_for.get(number, number) for index in live for number in trace.ops[index].inputs}
    alive: set[str] = set()
    last: dict[str, ModuleCall] = {}
    for call in trace.calls:
        made = range(call.start, call.stop)
        gives = {stands_for.get(number, number) for number in refs_in(call.result)}
        if any(index in live for index in made) or gives & needed:
            alive.add(call.path)
        elif any(index in dead for index in made):
            last[call.path] = call
    gone: dict[str, ModuleCall] = {}
    for path in sorted(set(last) - alive - {""}, key=lambda path: path.count(".")):
        if not _inside(path, gone):
            gone[path] = last[path]
    return gone


def _stand_ins(trace: Trace, joins: Iterable[tuple[int, int]], same: Mapping[int, int]) -> dict[int, int]:
    """What each sum is without the branch: number -> number of what lives on; and `same` with it."""
    lives_on = {trace.ops[index].outputs[0]: trace.ops[index].inputs[1 - side] for index, side in joins} | dict(same)
    stands_for: dict[int, int] = {}
    for number in sorted(lives_on):  # numbers grow with time, so what stands for an operand is known
        survivor = lives_on[number]
        stands_for[number] = stands_for.get(survivor, survivor)
    return stands_for


def _same_tensors(trace: Trace, ops: Iterable[Op]) -> dict[int, int]:
    """Results of calls that give back the very tensor that they get, as ``x.float()`` does for floats."""
    same: dict[int, int] = {}
    for op in ops:
        if op.name in _RETURNS_ITS_INPUT and len(op.outputs) == 1 and op.inputs:
            given, back = trace.values[op.inputs[0]], trace.values[op.outputs[0]]
            if given.storage == back.storage and given.dtype == back.dtype:
                same[back.index] = same.get(given.index, given.index)
    return same


def _live(trace: Trace, stands_for: Mapping[int, int]) -> list[Op]:
    """Calls whose results reach an output, or that write into memory which a later one of them reads; in order."""
    needed = {stands_for.get(number, number) for number in trace.outputs}
    storages = {trace.values[number].storage for number in needed}
    live = []
    for op in reversed(trace.ops):
        if op.outputs and op.outputs[0] in stands_for:
            continue
        writes = (trace.values[number].storage for number in op.written())
        if not needed.isdisjoint(op.outputs) or any(storage in storages for storage in writes):
            inputs = [stands_for.get(number, number) for number in op.inputs]
            needed.update(inputs)
            storages.update(trace.values[number].storage for number in inputs)
            live.append(op)
    return live[::-1]


def _left_alone(trace: Trace, dead: set[int], live: set[int]) -> tuple[str, ...]:
    """Parameters that calls read which leave, and none that stays."""
    read_by = {number for index in dead for number in trace.ops[index].inputs}
    still = {number for index in live for number in trace.ops[index].inputs}
    return tuple(
        name for name, value in trace.parameters.items() if value.index in read_by and value.index not in still
    )


def _unread(trace: Trace, gone: Mapping[str, ModuleCall]) -> set[str]:
    """Parameters and buffers in modules that leave and that nothing reads, as counters of batches are."""
    read = {number for op in trace.ops for number in op.inputs}
    return {name for name, value in trace.parameters.items() if value.index not in read and _inside(name, gone)}


def _inside(path: str, modules: Iterable[str]) -> bool:
    return any(path == module or path.startswith(f"{module}.") for module in modules)


def _refuse_loose_ends(trace: Trace, blocks: Sequence[Block]) -> None:
    first: dict[int, Block] = {}
    for block in blocks:
        other = first.setdefault(block.join, block)
        if other.side != block.side:
            raise ConfigError(
                f"something must reach {trace.ops[block.join]}, but {other.name!r} and {block.name!r} are all that is "
                "added there, so that without both the network is disconnected. Keep one of them."
            )


class _Graph:
    """What hangs on what in a trace."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.producer = {number: op for op in trace.ops for number in op.outputs}
        made = {*self.producer, *(value.index for value in trace.parameters.values())}
        self.depends = {value.index for value in trace.values if value.index not in made}  # on the network's input
        for op in trace.ops:
            if self.depends.intersection(op.inputs):
                self.depends.update(op.outputs)

    def may_leave(self, op: Op, side: int) -> bool:
        """Whether an addition without one of its operands is the other one as it is."""
        if op.name not in JOINS or len(op.inputs) != 2 or op.inputs[0] == op.inputs[1]:
            return False
        values = self.trace.values
        survivor, sum_ = values[op.inputs[1 - side]], values[op.outputs[0]]
        plain = side == 1 or (op.name.startswith("add") and op.constants.get(("alpha", None), 1) == 1)
        same = survivor.dtype == sum_.dtype and [d.size for d in survivor.dims] == [d.size for d in sum_.dims]
        return plain and same and self.depends.issuperset(op.inputs) and not self._seen_elsewhere(op, side)

    def _seen_elsewhere(self, op: Op, side: int) -> bool:
        """The sum is written into the memory of the branch, and read there under another name."""
        if side == 1 or not op.name.endswith("_"):
            return False
        storage, sums = self.trace.values[op.inputs[0]].storage, set(op.outputs)
        later = (number for other in self.trace.ops[op.index + 1 :] for number in other.inputs)
        return any(number not in sums and self.trace.values[number].storage == storage for number in later)

    def share_an_input(self, dead: set[int], survivor: int) -> bool:
        """Whether the branch reads what the other operand is, or is computed from; a second stem does not."""
        inside = {number for index in dead for number in self.trace.ops[index].outputs}
        reads = {number for index in dead for number in self.trace.ops[index].inputs} & self.depends - inside
        queue, seen = [survivor], {survivor}
        while queue:
            number = queue.pop()
            if number in reads:
                return True
            op = self.producer.get(number)
            more = set(op.inputs) - seen if op is not None else set()
            seen |= more
            queue.extend(more)
        return False


def _names(blocks: Sequence[Block], sizes: Mapping[str, int]) -> list[str]:
    around = [_common([name.rpartition(".")[0] for name in block.parameters]) for block in blocks]
    names, taken = [], dict[str, int]()
    for block, path in zip(blocks, around, strict=True):
        rivals = (_is_rival(block, path, other, its) for other, its in zip(blocks, around, strict=True))
        name = _largest_part(block, path, sizes) if not path or any(rivals) else path
        taken[name] = taken.get(name, 0) + 1
        names.append(name if taken[name] == 1 else f"{name}#{taken[name]}")
    return names


def _is_rival(block: Block, path: str, other: Block, its: str) -> bool:
    """Whether a module holds another branch too: one that is no part of this one and not the shortcut beside it."""
    if other is block or not _inside(its, [path]) or set(other.parameters) < set(block.parameters):
        return False
    return its == path or other.join != block.join


def _common(paths: Sequence[str]) -> str:
    parts = [path.split(".") for path in paths]
    common = []
    for step in zip(*parts):
        if len(set(step)) > 1:
            break
        common.append(step[0])
    return ".".join(common)


def _largest_part(block: Block, path: str, sizes: Mapping[str, int]) -> str:
    """The module right below `path` that holds most of a branch."""
    depth = path.count(".") + 1 if path else 0
    held: dict[str, int] = {}
    for name in block.parameters:
        part = ".".join(name.split(".")[: depth + 1])
        held[part] = held.get(part, 0) + sizes[name]
    return max(held, key=lambda part: held[part])


def _entries(trace: Trace, name: str) -> int:
    entries = 1
    for dim in trace.parameters[name].dims:
        entries *= dim.size
    return entries


def _with(item: Any, stands_for: Mapping[int, int]) -> Any:
    """A recorded structure with other numbers in it."""
    if isinstance(item, Ref):
        return Ref(stands_for.get(item.number, item.number))
    if type(item) in (list, tuple):
        return type(item)(_with(entry, stands_for) for entry in item)
    if type(item) is dict:
        return {key: _with(entry, stands_for) for key, entry in item.items()}
    if is_dataclass(item) and not isinstance(item, type):
        return replace(
            item, **{part.name: _with(getattr(item, part.name), stands_for) for part in fields(item) if part.init}
        )
    return item
