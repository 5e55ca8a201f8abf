"""What a trace is made of: values, calls, and where integers came from. Data only."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from metaprune.graph.axes import Dim, Labels, Units

Dims = tuple[Dim, ...]
Path = tuple[str, int | None]  # an argument of a call, and inside a list the entry


@dataclass(frozen=True)
class Source:
    """A plain integer attribute of a module: ``blocks.0.attn`` . ``num_heads``, or one entry of a tuple of them."""

    module: str
    attribute: str
    index: int | None = None

    def __str__(self) -> str:
        entry = "" if self.index is None else f"[{self.index}]"
        return f"{self.module}.{self.attribute}{entry}".lstrip(".")


class TracedInt(int):
    """An integer that remembers the attribute it was read from; arithmetic on it gives plain integers."""

    source: Source

    def __new__(cls, value: int, source: Source) -> "TracedInt":
        """The same number, with its source."""
        self = super().__new__(cls, value)
        self.source = source
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "TracedInt":
        return self


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
    """

    index: int
    dims: Dims
    dtype: torch.dtype
    name: str = ""
    known: Tensor | None = None
    storage: int = -1
    parameter: bool = False
    foreign: Tensor | None = None


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
        sources: The integers that Python passed, with the attributes that they were read from.
        macs: Its multiply-accumulates, as products of dimensions.
        consumed: Dimensions of its operands that are multiplied and added up, as (value, dimension).
        statistics: Dimensions over which it computes more than a sum.
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
    sources: tuple[tuple[int, Source | None], ...] = ()
    macs: list[Dims] = field(default_factory=list)
    consumed: list[tuple[int, int]] = field(default_factory=list)
    statistics: list[Dim] = field(default_factory=list)
    allocates: bool = True

    def __str__(self) -> str:
        return f"{self.name} at {self.module or 'the top level'}"


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
        batch: Size of the first dimension of the first tensor given.
        failed_rules: Calls whose rule raised, which froze what they touch; each is a defect to report.
        own_rules: Calls that a rule of the user's was used for.
        value_dependent: Calls that turn numbers computed from the input into Python values or sizes.
        decides: Python gets numbers that the network has computed, so that other inputs may take another way; some
            were tried.
        real: Run on real tensors, because something failed on meta ones; `real_reason` says what.
        real_reason: That reason, or empty.
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
    batch: int = 1
    failed_rules: tuple[str, ...] = ()
    own_rules: tuple[str, ...] = ()
    value_dependent: tuple[str, ...] = ()
    decides: bool = False
    real: bool = False
    real_reason: str = ""


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


def constants_in(arguments: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    """Numbers, texts, types and absences among the arguments, by path."""
    for name, item in arguments.items():
        if isinstance(item, (list, tuple)):
            for k, entry in enumerate(item):
                if isinstance(entry, _PLAIN):
                    yield (name, k), entry
        elif isinstance(item, _PLAIN):
            yield (name, None), item
