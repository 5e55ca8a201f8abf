"""Plain integer attributes that hold sizes: which there are, and what they become."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from metaprune.errors import UnsupportedModelError
from metaprune.graph.axes import Alive
from metaprune.graph.layout import Layout
from metaprune.graph.record import Op, Path, Source


def new_attributes(layout: Layout, alive: Alive, ops: Iterable[Op], *, agreed: bool = True) -> dict[Source, int]:
    """Attributes that hold sizes which these calls read, with their new values; if `agreed`, all want the same.

    Raises:
        UnsupportedModelError: One attribute would have to hold two sizes.
    """
    new: dict[Source, tuple[int, Op]] = {}
    for op in ops:
        for name, labels_NK in op.attributes.items():
            new.setdefault(Source(op.module, name), (layout.count(labels_NK, alive), op))
        for path, size in op.sizes.items():
            left = layout.count(size.labels_NK, alive)
            wanted = -left if size.value < 0 else left
            for source in sources(op, path, size.value):
                known, first = new.setdefault(source, (wanted, op))
                if agreed and known != wanted:
                    raise UnsupportedModelError(
                        f"attribute {source} must hold one size, but would become {known} for {first} and {wanted} for "
                        f"{op}."
                    )
    return {source: size for source, (size, _) in new.items()}


def sources(op: Op, path: Path, value: int) -> list[Source]:
    """The attributes that an argument was read from: by place where the call passes its integers on, else by value."""
    integers = [(place, number) for place, number in op.constants.items() if type(number) is int]
    if [number for _, number in integers] == [number for number, _ in op.sources]:
        source = op.sources[[place for place, _ in integers].index(path)][1]
        return [source] if source else []
    return list({source: None for number, source in op.sources if source and number == value})


def set_attributes(model: nn.Module, new: Mapping[Source, int]) -> None:
    """Give attributes their new values, in place."""
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    for source, size in new.items():
        held = vars(modules[source.module])
        if source.attribute not in held:
            continue
        if source.index is None:
            held[source.attribute] = size
        else:
            entries = list(held[source.attribute])
            entries[source.index] = size
            held[source.attribute] = type(held[source.attribute])(entries)
