"""The options of methods: the fields of their dataclasses, read by their types, with what their docstrings say of them.

A criterion, an allocator or a recovery is a frozen dataclass in a registry. What is asked of it from outside, as text
on a command line, as values in YAML or as keyword arguments, is read here and nowhere else.
"""

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, Union

from pydantic import ConfigDict, TypeAdapter, ValidationError

from metaprune.config import rule_of
from metaprune.errors import ConfigError, did_you_mean
from metaprune.registry import Registry

T = TypeVar("T")

KINDS = ("criterion", "allocator", "recovery")  # of methods whose options can be given from outside
_ENTRY = re.compile(r"    (\w+): (.*)")
_MARKUP = re.compile(r"(?::[a-z]+:`~?|``?)([^`]+)``?")  # roles and code of reStructuredText
_READING = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Option:
    """One option of a method.

    Args:
        name: Its name.
        default: Its default as text that is read back as the same; None where it must be given.
        type: What it may be, as it is annotated.
        about: What it means, in one line; empty where the docstring does not say.
    """

    name: str
    default: str | None
    type: str
    about: str


def options(method: type) -> dict[str, Option]:
    """The options of a method by name, in the order of its fields."""
    said = _said(method)
    return {
        part.name: Option(
            part.name,
            None if part.default is dataclasses.MISSING else spelt(part.default),
            inspect.formatannotation(_hint(method, part)),
            said.get(part.name, ""),
        )
        for part in _fields(method)
    }


def by_kind(entries: Mapping[str, Any], where: Callable[[str], str] = "`{}`".format) -> dict[str, dict[str, Any]]:
    """Values by ``KIND.option`` or ``KIND.name.option``, as one mapping a kind, for :func:`deal`.

    Raises:
        ConfigError: A key does not begin with a kind.

    >>> by_kind({"criterion.samples": 256, "recovery.perp.rank": 8})
    {'criterion': {'samples': 256}, 'allocator': {}, 'recovery': {'perp.rank': 8}}
    """
    found: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
    for key, value in entries.items():
        kind, _, option = key.partition(".")
        if kind not in KINDS or not option:
            raise ConfigError(
                f"{where(key)} must name an option of the {', '.join(KINDS)}, e.g. recovery.epochs."
                f"{did_you_mean(kind, KINDS)} `metaprune list recoveries NAME` shows those of one."
            )
        found[kind][option] = value
    return found


def deal(
    registry: Registry[type[T]],
    names: Sequence[str],
    given: Mapping[str, Any],
    where: Callable[[str], str] = "`{}`".format,
) -> tuple[dict[str, T], dict[str, Any]]:
    """The methods that were chosen, each with those of the options given that are its own.

    Args:
        registry: Where they are.
        names: Their names there, each once.
        given: Values, or texts that spell them, by ``option`` for every method that has it, or by ``name.option`` for
            one of them, which goes over the other.
        where: The place of a key, for messages.

    Returns:
        The methods by name, and the values by key as they were read.

    Raises:
        ConfigError: A key goes to none of the methods, or a value does not fit.

    >>> from metaprune.recovery import RECOVERIES
    >>> deal(RECOVERIES, ["recalibrate_norm"], {"recalibrate_norm.passes": "2"})
    ({'recalibrate_norm': RecalibrateNorm(passes=2)}, {'recalibrate_norm.passes': 2})
    """
    fields = {name: {part.name: part for part in _fields(registry[name])} for name in names}
    dealt: dict[str, dict[str, Any]] = {name: {} for name in names}
    read: dict[str, Any] = {}
    for key in sorted(given, key=lambda key: "." in key):  # those of one method after those of all
        name, _, option = key.rpartition(".")
        takers = [taker for taker in ([name] if name else names) if option in fields.get(taker, ())]
        if not takers:
            raise ConfigError(f"{where(key)}: {_untaken(registry, fields, name, option)}")
        for taker in takers:
            read[key] = dealt[taker][option] = _value(registry[taker], fields[taker][option], given[key], where(key))
    for key in given:
        name, _, option = key.rpartition(".")
        own = [f"{taker}.{option}" for taker in names if option in fields[taker]]
        if not name and set(own) <= given.keys():
            raise ConfigError(
                f"an option may be given once, but {where(key)} and {' and '.join(map(where, own))} say the same. "
                "Leave out one of them."
            )
    return {name: _made(registry, name, dealt[name]) for name in names}, {key: read[key] for key in given}


def named(registry: Registry[type[T]], method: str | T) -> str:
    """What a method is called: its name, and in brackets the options that are not at their defaults.

    >>> from metaprune.recovery import RECOVERIES, Perp
    >>> named(RECOVERIES, "perp"), named(RECOVERIES, Perp(rank=4))
    ('perp', 'perp(rank=4)')
    """
    if isinstance(method, str):
        return method
    name = registry.name_of(type(method))
    if name is None:
        return repr(method)
    values = ((part, getattr(method, part.name)) for part in _fields(type(method)))
    changed = ", ".join(f"{part.name}={spelt(value)}" for part, value in values if value != part.default)
    return f"{name}({changed})" if changed else name


def spelt(value: Any) -> str:
    """A value as text that an option of its type is read from.

    >>> spelt(0.001), spelt(True), spelt(None), spelt(("l2", "fpgm"))
    ('0.001', 'true', 'none', 'l2,fpgm')
    """
    if isinstance(value, tuple | list):
        return ",".join(map(spelt, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def plain(text: str) -> str:
    """A docstring without its markup.

    >>> plain("Of :func:`~metaprune.plan`; ``auto`` or `samples`.")
    'Of metaprune.plan; auto or samples.'
    """
    return _MARKUP.sub(r"\1", text)


def _fields(method: type) -> tuple["dataclasses.Field[Any]", ...]:
    """The fields that can be given; a plug-in may be no dataclass."""
    return tuple(part for part in dataclasses.fields(method) if part.init) if dataclasses.is_dataclass(method) else ()


def _hint(method: type, part: "dataclasses.Field[Any]") -> Any:
    if not isinstance(part.type, str):
        return part.type
    try:
        return typing.get_type_hints(method)[part.name]
    except NameError:  # a name that only type checkers import
        return Any


def _untaken(registry: Registry[Any], fields: Mapping[str, Mapping[str, Any]], name: str, option: str) -> str:
    """Why no method takes an option, and the way out."""
    kind, chosen = registry.kind, ",".join(fields)
    if name and name not in fields:
        way = f" Leave it out, or choose --{kind} {name}." if name in registry else did_you_mean(name, registry)
        return f"it is for {kind} {name!r}, but {repr(chosen) if chosen else 'none'} was chosen.{way}"
    asked = [name] if name else list(fields)
    known = sorted({own for method in asked for own in fields[method]})
    others = [other for other in registry if option in {part.name for part in _fields(registry[other])}]
    found = f" Those that have it: {', '.join(others)}." if others else ""
    whose = f"{kind} {(name or chosen or 'none')!r}"
    return f"{whose} has no option {option!r}.{did_you_mean(option, known)} Known: {', '.join(known) or 'none'}.{found}"


def _value(method: type, part: "dataclasses.Field[Any]", value: Any, place: str) -> Any:
    """What was given, as the type of its field."""
    hint = _hint(method, part)
    either = typing.get_args(hint) if typing.get_origin(hint) in (Union, UnionType) else (hint,)
    listed = any(typing.get_origin(one) is tuple for one in either)
    asked = value
    if isinstance(value, str) and listed:
        asked = tuple(part.strip() for part in value.split(",") if part.strip())
    elif isinstance(value, str) and value.strip().lower() == "none" and NoneType in either:
        asked = None
    try:  # a truth is no number
        return TypeAdapter(hint, config=_READING).validate_python(asked, strict=isinstance(value, bool))
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
        rules = [rule_of(first), *(rule_of(other).removeprefix("must be ") for other in others if len(either) > 1)]
        rules += ["none"] if NoneType in either else []
        raise ConfigError(f"{place} {' or '.join(rules)}, but it is {value!r}.") from error


def _made(registry: Registry[type[T]], name: str, values: Mapping[str, Any]) -> T:
    try:
        return registry[name](**values)
    except TypeError as error:  # one that must be given was not
        raise ConfigError(f"{registry.kind} {name!r} cannot be made of {dict(values)}: {error}.") from error


def _said(method: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say of its options, as plain text."""
    found: dict[str, str] = {}
    for cls in reversed(method.__mro__):
        _, _, section = inspect.cleandoc(cls.__dict__.get("__doc__") or "").partition("\nArgs:\n")
        last = ""
        for line in section.split("\n\n")[0].splitlines():
            entry = _ENTRY.fullmatch(line)
            last = entry[1] if entry else last
            found[last] = entry[2] if entry else f"{found.get(last, '')} {line.strip()}"
    return {name: plain(text) for name, text in found.items()}
