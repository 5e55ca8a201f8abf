"""Plain integer attributes that hold sizes: which there are, and what they become."""

import copy
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

from torch import nn

from metaprune.errors import UnsupportedModelError
from metaprune.graph.axes import Alive
from metaprune.graph.layout import Layout
from metaprune.graph.record import Formula, Op, Source


def new_attributes(model: nn.Module, layout: Layout, alive: Alive, ops: Iterable[Op]) -> dict[Source, int]:
    """Attributes that hold sizes which these calls read, with their new values.

    Raises:
        UnsupportedModelError: One attribute would have to hold two sizes.
    """
    new: dict[Source, tuple[int, Op]] = {}
    computed: list[tuple[Formula, int]] = []
    for op in ops:
        for name, labels_NK in op.attributes.items():
            new.setdefault(Source(op.module, name), (layout.count(labels_NK, alive), op))
        for path, size in op.sizes.items():
            left = layout.count(size.labels_NK, alive)
            wanted = -left if size.value < 0 else left
            for source in op.sources_of(path, size.value):
                if isinstance(source, Formula):
                    computed.append((source, wanted))
                    continue
                known, first = new.setdefault(source, (wanted, op))
                if known != wanted:
                    raise UnsupportedModelError(
                        f"attribute {source} must hold one size, but would become {known} for {first} and {wanted} for "
                        f"{op}."
                    )
    sizes = {source: size for source, (size, _) in new.items()}
    return sizes | _solved(model, computed, sizes)


def _solved(model: nn.Module, computed: list[tuple[Formula, int]], sizes: Mapping[Source, int]) -> dict[Source, int]:
    """Attributes that reach no argument themselves: what they must hold for the numbers computed from them to fit.

    Whether the rest of the code agrees, the check of the calls will tell.
    """
    now = {source: number for formula, _ in computed for source in formula.sources() if (number := held(model, source))}
    fitting: dict[Source, int] = {}
    while True:
        known = {**now, **sizes, **fitting}
        found: dict[Source, int] = {}
        for formula, wanted in computed:
            unknown = [source for source in formula.sources() if source not in sizes and source not in fitting]
            if len(unknown) == 1 and unknown[0] in now:
                (source,) = unknown
                candidates = range(now[source], 0, -1)
                fits = (size for size in candidates if formula.value({**known, source: size}) == wanted)
                number = next(fits, None)
                if number is not None:
                    found[source] = number
        if not found:
            return fitting
        fitting |= found


def held(model: nn.Module, source: Source) -> int | None:
    """The number that an attribute holds."""
    item: Any = _module(model, source)
    for name in source.attribute.split("."):
        item = vars(item).get(name)
        if item is None:
            return None
    return item if source.index is None else item[source.index]


def _module(model: nn.Module, source: Source) -> nn.Module:
    """The module that a source names; `get_submodule` does not work on scripted ones."""
    return reduce(getattr, filter(None, source.module.split(".")), model)


def set_attributes(model: nn.Module, new: Mapping[Source, int]) -> None:
    """Write new numbers; an object that a module shares with others is copied for it first."""
    own: set[int] = set()
    for source, size in new.items():
        if held(model, source) in (None, size):
            continue
        item: Any = _module(model, source)
        *way, name = source.attribute.split(".")
        for step in way:
            inner = vars(item)[step]
            if id(inner) not in own:
                inner = vars(item)[step] = copy.copy(inner)
                own.add(id(inner))
            item = inner
        if source.index is not None:
            entries = list(vars(item)[name])
            entries[source.index] = size
            vars(item)[name] = type(vars(item)[name])(entries)
        else:
            vars(item)[name] = size
