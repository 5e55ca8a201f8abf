"""What a trace is made of: values, calls, and where integers came from. Data only."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metaprune.graph.axes import Dim, Labels, Units

if TYPE_CHECKING:
    from metaprune.graph.blocks import Block

Dims = tuple[Dim, ...]
Path = tuple[str, int | None]  # an argument of a call, and inside a list the entry


@dataclass(frozen=True)
class Source:
    """A plain integer attribute of a module: ``blocks.0.attn`` . ``num_heads``, or one entry of a tuple of them.

    The attribute may be one of an object that the module holds: ``blocks.0.attn`` . ``config.num_heads``.
    """

    module: str
    attribute: str
    index: int | None = None

    def __str__(self) -> str:
        entry = "" if self.index is None else f"[{self.index}]"
        return f"{self.module}.{self.attribute}{entry}".lstrip(".")


@dataclass(frozen=True, eq=False)
class SharedSource:
    """An integer attribute of an object that several modules may hold, as they do a configuration.

    Attributes:
        holders: Path of each of these modules -> the attribute that leads to the object.
        attribute: The attribute of the object.
        index: The entry, where it is a tuple or list.
    """

    holders: Mapping[str, str]
    attribute: str
    index: int | None = None

    def at(self, module: str) -> Source | None:
        """As the attribute of the module that runs, or of the nearest one around it that holds the object."""
        while module not in self.holders and module:
            module = module.rpartition(".")[0]
        if module not in self.holders:
            return None
        return Source(module, f"{self.holders[module]}.{self.attribute}", self.index)


@dataclass(frozen=True, eq=False)
class Formula:
    """A number that code computed from integers that remember where they live.

    Attributes:
        function: The method of ``int``, e.g. ``__mul__``.
        left: First operand.
        right: Second operand.
        depth: Largest number of steps between it and an attribute.
    """

    function: str
    left: "int | Source | SharedSource | Formula"
    right: "int | Source | SharedSource | Formula"
    depth: int = 1

    def at(self, module: str) -> "Formula | None":
        """The same with every shared source as the attribute of the module that runs."""
        left, right = _at(self.left, module), _at(self.right, module)
        return None if left is None or right is None else Formula(self.function, left, right, self.depth)

    def sources(self) -> set[Source]:
        """The attributes that it was computed from."""
        found: set[Source] = set()
        for item in (self.left, self.right):
            found |= item.sources() if isinstance(item, Formula) else {item} if isinstance(item, Source) else set()
        return found

    def value(self, numbers: Mapping[Source, int]) -> int | None:
        """The result for other numbers in the attributes; None where there is none."""
        operands: list[int | None] = []
        for item in (self.left, self.right):
            if isinstance(item, Formula):
                operands.append(item.value(numbers))
            else:
                operands.append(numbers.get(item) if isinstance(item, Source) else item)  # type: ignore[arg-type]
        if None in operands:
            return None
        try:
            out = getattr(int, self.function)(*operands)
        except ZeroDivisionError:
            return None
        return out if type(out) is int else None


Origin = Source | SharedSource | Formula
_FORMULA_DEPTH = 6


def _at(item: int | Origin, module: str) -> int | Origin | None:
    return item.at(module) if isinstance(item, (SharedSource, Formula)) else item


class TracedInt(int):
    """An integer that remembers the attribute it was read from, or how it was computed from such ones."""

    source: Origin

    def __new__(cls, value: int, source: Origin) -> "TracedInt":
        """The same number, with its source."""
        self = super().__new__(cls, value)
        self.source = source
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "TracedInt":
        return self

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)

    def _compute(self, function: str, other: Any) -> Any:
        out = getattr(int, function)(self, other)
        right = getattr(other, "source", int(other)) if type(other) in (int, TracedInt) else None
        depth = 1 + max((item.depth for item in (self.source, right) if isinstance(item, Formula)), default=0)
        if type(out) is not int or right is None or depth > _FORMULA_DEPTH:
            return out
        return TracedInt(out, Formula(function, self.source, right, depth))

    def __add__(self, other: Any) -> Any:
        return self._compute("__add__", other)

    def __radd__(self, other: Any) -> Any:
        return self._compute("__radd__", other)

    def __sub__(self, other: Any) -> Any:
        return self._compute("__sub__", other)

    def __rsub__(self, other: Any) -> Any:
        return self._compute("__rsub__", other)

    def __mul__(self, other: Any) -> Any:
        return self._compute("__mul__", other)

    def __rmul__(self, other: Any) -> Any:
        return self._compute("__rmul__", other)

    def __floordiv__(self, other: Any) -> Any:
        return self._compute("__floordiv__", other)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._compute("__rfloordiv__", other)


@dataclass(slots=True)
class Value:
    """What is known of one tensor.

    Attributes:
        index: Number in the trace; parameters, buffers and inputs come first.
        dims: One entry a dimension.
        dtype: Its type.
        name: Name of the parameter or buffer, or empty.
        known: The numbers themselves, where they do not depend on inputs or parameters.
        storage: Number of the memory it lies in; views share it.
        parameter: A parameter, rather than a buffer or a tensor on the way.
        foreign: The tensor itself, if it comes from outside of the network: a closure, a global.
        seen: The numbers for the example, where they depend on integers and truth values of the input alone.
    """

    index: int
    dims: Dims
    dtype: torch.dtype
    name: str = ""
    known: Tensor | None = None
    storage: int = -1
    parameter: bool = False
    foreign: Tensor | None = None
    seen: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Ref:
    """Stands for a tensor, by its number, inside recorded arguments."""

    number: int


@dataclass(frozen=True, slots=True)
class SizeArgument:
    """An integer argument of a call that counts positions.

    Attributes:
        value: The number seen.
        labels_NK: The positions it counts; it must become the number of those still alive, with the sign it has.
    """

    value: int
    labels_NK: Labels


@dataclass(frozen=True, slots=True)
class Lookup:
    """A constant operand whose numbers are positions of a dimension.

    Attributes:
        number: The operand.
        labels_NK: The dimension; the numbers must become the ranks of those positions among the ones alive.
    """

    number: int
    labels_NK: Labels


@dataclass(slots=True)
class Op:
    """One call of the trace.

    Attributes:
        index: Its place in the trace.
        func: The ATen overload.
        name: Its name, without namespace and overload; other namespaces stay.
        module: Path of the module that made it.
        arguments: All arguments by name, tensors as :class:`Ref`.
        inputs: Numbers of its tensor arguments, in order.
        outputs: Numbers of its results.
        result: Its results as they were returned, tensors as :class:`Ref`.
        constants: Its other arguments, by path.
        sizes: Those that count labelled positions.
        lookups: Operands that hold positions.
        attributes: Attributes of the module that count labelled positions but reach no argument, e.g. ``num_features``.
        sources: The integers that Python passed, with the attributes that they were read from or computed from.
        macs: Its multiply-accumulates, as products of dimensions.
        consumed: Dimensions of its operands that are multiplied and added up, as (value, dimension).
        statistics: Dimensions over which it computes more than a sum.
        computed_from: Dimensions from whose size it computes a number that must stay what it is.
        allocates: Its results lie in memory of their own.
    """

    index: int
    func: Any
    name: str
    module: str
    arguments: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    result: Any = None
    constants: dict[Path, Any] = field(default_factory=dict)
    sizes: dict[Path, SizeArgument] = field(default_factory=dict)
    lookups: list[Lookup] = field(default_factory=list)
    attributes: dict[str, Labels] = field(default_factory=dict)
    sources: tuple[tuple[int, Source | Formula | None], ...] = ()
    macs: list[Dims] = field(default_factory=list)
    consumed: list[tuple[int, int]] = field(default_factory=list)
    statistics: list[Dim] = field(default_factory=list)
    computed_from: list[Dim] = field(default_factory=list)
    allocates: bool = True

    def __str__(self) -> str:
        return f"{self.name} at {self.module or 'the top level'}"

    def written(self) -> list[int]:
        """The operands that it writes into."""
        schema = self.func._schema.arguments
        named = [item.name for item in schema if item.alias_info and item.alias_info.is_write]
        return [number for name in named for number in refs_in(self.arguments[name])]

    def sources_of(self, path: Path, value: int) -> list[Source | Formula]:
        """Where an argument comes from: by place where the call passes its integers on, else by value."""
        placed = self.placed_sources()
        if placed is not None:
            source = placed.get(path)
            return [source] if source else []
        return list({source: None for number, source in self.sources if source and number == value})

    def placed_sources(self) -> dict[Path, Source | Formula | None] | None:
        """Where each integer argument comes from, or None where the call does not pass its integers on as they are."""
        integers = {place: number for place, number in self.constants.items() if type(number) is int}
        if list(integers.values()) != [number for number, _ in self.sources]:
            return None
        return dict(zip(integers, (source for _, source in self.sources)))


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """One call of a module: what it got and gave, tensors as :class:`Ref`, and the ops ``start..stop-1`` it made."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    start: int
    stop: int


@dataclass
class Trace:
    """Everything read off one run.

    Attributes:
        units: The algebra, with all that was learnt.
        values: Every tensor seen, by number.
        ops: Every call in evaluation mode, in order.
        further_ops: Calls of further runs, in training mode or on other inputs, made where the first run left
            parameters unused; else empty.
        calls: Every call of a module, in the order in which they ended.
        parameters: Name of each parameter and buffer -> its value; tied ones once, under their first name.
        aliases: Further names of tied parameters and buffers -> the first name.
        given: Positional and keyword arguments, tensors as :class:`Ref`.
        inputs: Numbers of the tensors given.
        outputs: Numbers of the tensors returned.
        result: What the network returned, tensors as :class:`Ref`.
        state: Type of an object in it that is neither a tensor nor plain data (a cache, which later calls get back), or
            empty. Such a network cannot be rebuilt from its calls.
        batch: Size of the first dimension of the first tensor given.
        failed_rules: Calls whose rule raised, which froze what they touch; each is a defect to report.
        own_rules: Calls that a rule of the user's was used for.
        value_dependent: Calls that turn numbers computed from the input into Python values or sizes.
        decides: Python gets numbers that the network has computed, so that other inputs may take another way; some
            were tried.
        input_dependent: The same, out of integers and truth values of the input alone, which cutting does not change.
        real: Run on real tensors, because something failed on meta ones; `real_reason` says what.
        real_reason: That reason, or empty.
        dropped: Residual branches that were taken out since, see :mod:`metaprune.graph.blocks`.
        gone: Path of each module that left with them -> a call of it.
    """

    units: Units
    values: list[Value]
    ops: list[Op]
    parameters: dict[str, Value]
    aliases: dict[str, str]
    further_ops: list[Op] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    given: tuple[tuple[Any, ...], dict[str, Any]] = field(default_factory=lambda: ((), {}))
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    result: Any = None
    state: str = ""
    batch: int = 1
    failed_rules: tuple[str, ...] = ()
    own_rules: tuple[str, ...] = ()
    value_dependent: tuple[str, ...] = ()
    decides: bool = False
    input_dependent: tuple[str, ...] = ()
    real: bool = False
    real_reason: str = ""
    dropped: tuple["Block", ...] = ()
    gone: Mapping[str, ModuleCall] = field(default_factory=dict)

    @property
    def needs_code(self) -> str:
        """Why the recorded calls cannot stand for the code; empty where they can."""
        if self.value_dependent or self.input_dependent:
            return f"they depend on values of the input ({(*self.value_dependent, *self.input_dependent)[0]})"
        return f"the network returns a {self.state}, which only its own code can make" if self.state else ""


_PLAIN = (int, float, complex, bool, str, type(None), torch.dtype)
_PLAIN_TYPES = frozenset(_PLAIN)


def tensors_in(item: Any) -> list[Tensor]:
    """All tensors inside nested containers and dataclasses, in order."""
    found: list[Tensor] = []
    _gather(item, found)
    return found


def _gather(item: Any, into: list[Tensor]) -> None:
    if type(item) in _PLAIN_TYPES:
        return
    if isinstance(item, Tensor):
        into.append(item)
    elif isinstance(item, (list, tuple)):
        for entry in item:
            _gather(entry, into)
    elif isinstance(item, (dict, Mapping)):
        for entry in item.values():
            _gather(entry, into)
    elif is_dataclass(item) and not isinstance(item, type):
        for part in fields(item):
            _gather(getattr(item, part.name), into)


def refs_in(item: Any) -> list[int]:
    """Numbers of all tensors inside a recorded structure, in order."""
    if isinstance(item, Ref):
        return [item.number]
    if isinstance(item, (list, tuple)):
        return [number for entry in item for number in refs_in(entry)]
    if isinstance(item, Mapping):
        return [number for entry in item.values() for number in refs_in(entry)]
    if is_dataclass(item) and not isinstance(item, type):
        return [number for part in fields(item) for number in refs_in(getattr(item, part.name))]
    return []


def state_in(item: Any) -> str:
    """Type of the first object in a recorded structure that is neither a tensor nor plain data, or empty."""
    if isinstance(item, (Ref, torch.device, torch.layout, torch.memory_format, *_PLAIN)):
        return ""
    if isinstance(item, Mapping):
        parts = list(item.values())
    elif isinstance(item, (list, tuple)):
        parts = list(item)
    elif is_dataclass(item) and not isinstance(item, type):
        parts = [getattr(item, part.name) for part in fields(item)]
    else:
        return type(item).__name__
    return next(filter(None, map(state_in, parts)), "")


def constants_in(arguments: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    """Numbers, texts, types and absences among the arguments, by path."""
    for name, item in arguments.items():
        if isinstance(item, (list, tuple)):
            for k, entry in enumerate(item):
                if isinstance(entry, _PLAIN):
                    yield (name, k), entry
        elif isinstance(item, _PLAIN):
            yield (name, None), item
