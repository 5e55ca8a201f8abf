"""Which modules a user means: by the pattern of their path, by their class, or by its name."""

import fnmatch
from collections.abc import Sequence

import numpy as np
from torch import nn

from metaprune.errors import ConfigError, did_you_mean
from metaprune.graph.record import Trace, refs_in
from metaprune.graph.twin import named_tensors

Selector = str | type[nn.Module]
Selection = Selector | Sequence[Selector]


def as_patterns(selection: Selection | None, what: str) -> tuple[str, ...]:
    """A selection as texts, so that a plan can record it; a class becomes its full name.

    Args:
        selection: A pattern, a class of modules, or several of these.
        what: Name of the argument, for messages.

    Raises:
        ConfigError: An entry is neither a text nor a class of modules.

    >>> as_patterns(["layer1.*", nn.Conv2d], "freeze")
    ('layer1.*', 'torch.nn.modules.conv.Conv2d')
    """
    entries = [] if selection is None else [selection] if isinstance(selection, str | type) else list(selection)
    patterns = []
    for entry in entries:
        if isinstance(entry, str) and entry:
            patterns.append(entry)
        elif isinstance(entry, type) and issubclass(entry, nn.Module):
            patterns.append(_full_name(entry))
        else:
            raise ConfigError(
                f"`{what}` must hold patterns of module paths or classes of modules, but holds {entry!r}. "
                "Give e.g. 'layer1.*' or torch.nn.Linear."
            )
    return tuple(dict.fromkeys(patterns))


def freeze_selected(trace: Trace, model: nn.Module, freeze: Sequence[str], only: Sequence[str]) -> None:
    """Freeze what the user wants to stay.

    Args:
        trace: A finished trace; its units change.
        model: The model that was traced.
        freeze: Patterns; every unit that a parameter of a matching module mentions, or that a call inside of it makes
            or uses, is frozen.
        only: Patterns; every unit that no parameter of a matching module mentions is frozen.

    Raises:
        ConfigError: A pattern matches no module.
    """
    for pattern in freeze:
        modules = _matching(model, pattern, "freeze")
        reason = f"frozen by the user ({pattern})"
        for name in _parameters_of(model, modules, trace):
            for dim in trace.parameters[name].dims:
                trace.units.freeze(dim, reason)
        paths = {path for path, module in model.named_modules() if id(module) in modules}
        _freeze_values(trace, _met_in(trace, paths), reason)
    if only:
        chosen = set().union(*(_matching(model, pattern, "only") for pattern in only))
        _freeze_others(trace, _parameters_of(model, chosen, trace), f"frozen by the user (only {', '.join(only)})")


def parameters_left_to(trace: Trace, model: nn.Module, freeze: Sequence[str], only: Sequence[str]) -> set[str]:
    """First names of the parameters and buffers that the user leaves free; arguments as for :func:`freeze_selected`."""
    held = {pattern: _parameters_of(model, _matching(model, pattern, "freeze"), trace) for pattern in (*freeze, *only)}
    chosen = set().union(*(held[pattern] for pattern in only)) if only else set(trace.parameters)
    return chosen.difference(*(held[pattern] for pattern in freeze))


def _met_in(trace: Trace, paths: set[str]) -> list[int]:
    """Values that these modules get and give, and those that calls inside of them do."""
    numbers: set[int] = set()
    for op in (*trace.ops, *trace.further_ops):
        if op.module in paths:
            numbers.update(op.inputs, op.outputs)
    for call in trace.calls:
        if call.path in paths:
            numbers.update(refs_in((call.args, call.kwargs, call.result)))
    return sorted(numbers)


def _freeze_values(trace: Trace, numbers: Sequence[int], reason: str) -> None:
    for number in numbers:
        for dim in trace.values[number].dims:
            trace.units.freeze(dim, reason)
            for part in (part for parts in dim.grid.picked.values() for part in parts) if dim.grid else ():
                trace.units.freeze(part, reason)


def _freeze_others(trace: Trace, names: set[str], reason: str) -> None:
    units = trace.units
    free = np.zeros(len(units), bool)
    for dim in (dim for name in names for dim in trace.parameters[name].dims):
        if dim.labels_NK is not None:
            free[units.resolve(dim.labels_NK)] = True
    for dim in (dim for name, value in trace.parameters.items() if name not in names for dim in value.dims):
        if dim.labels_NK is not None:
            rows = units.resolve(dim.labels_NK).ravel()
            units.freeze(rows[~free[rows]][:, None], reason)


def _matching(model: nn.Module, pattern: str, what: str) -> set[int]:
    """Addresses of the modules that a pattern means, and of all modules inside of them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = [module for path, module in modules.items() if _means(pattern, path, module)]
    if not found:
        classes = {type(module).__name__ for module in modules.values()}
        known = [path for path in modules if path] + sorted(classes)
        stem = pattern.rstrip("*?.")
        raise ConfigError(
            f"`{what}` must match a module by its path or class, but {pattern!r} matches none of {len(modules)}."
            f"{did_you_mean(pattern, known) or did_you_mean(stem, known)} Classes: {', '.join(sorted(classes))}."
        )
    return {id(inside) for module in found for inside in module.modules()}


def _means(pattern: str, path: str, module: nn.Module) -> bool:
    if fnmatch.fnmatchcase(path, pattern):
        return True
    bases = [base for base in type(module).__mro__ if issubclass(base, nn.Module)]
    return any(pattern in (base.__name__, _full_name(base)) for base in bases)


def _parameters_of(model: nn.Module, modules: set[int], trace: Trace) -> set[str]:
    """First names of the parameters and buffers that these modules hold, tied ones too."""
    names: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) in modules:
            held = [f"{path}.{name}".lstrip(".") for name in named_tensors(module) if "." not in name]
            names.update(trace.aliases.get(name, name) for name in held)
    return names


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
