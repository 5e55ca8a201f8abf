"""Budgets: what the cut network may cost.

``macs=0.5`` is half of the dense network, ``macs=40M`` an absolute number, ``params=0.3,bytes=256KB`` several at once.
``latency=0.6`` and ``latency_ms=0.8`` are times, for networks that have a table of this machine. ``nonzeros=0.5`` keeps
half of the entries of all weights, which then stay as large as they are.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from metaprune.errors import BudgetError, ConfigError, did_you_mean

QUANTITIES = ("macs", "params", "bytes", "activations")
NONZEROS = "nonzeros"  # entries of weights that stay
TIMES = {"latency": "latency_ms", "latency_ms": "latency_ms"}  # a share of the dense time, and milliseconds
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_BINARY = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "b": 1}
_PATTERNS = "'any' (anywhere in a weight), 'row' (as many in every row), 'N:4' (N by the budget) or e.g. '2:4'"
_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Limit:
    """One limit: a fraction of the dense network up to 1, an absolute number above it."""

    quantity: str
    value: float

    @property
    def of(self) -> str:
        """The cost that it limits."""
        return TIMES.get(self.quantity, self.quantity)

    def absolute(self, dense: float) -> float:
        """The limit in units of the quantity, given the dense cost."""
        return self.value * dense if self.value <= 1 and self.quantity != "latency_ms" else self.value

    def __str__(self) -> str:
        return f"{self.quantity}={self.value:g}"


@dataclass(frozen=True)
class Budget:
    """Limits that must all hold."""

    limits: tuple[Limit, ...]

    def __str__(self) -> str:
        return ",".join(map(str, self.limits))

    @property
    def timed(self) -> bool:
        """Whether a limit is a time."""
        return any(limit.quantity in TIMES for limit in self.limits)

    @property
    def sparse(self) -> bool:
        """Whether entries of weights leave, not units."""
        return any(limit.quantity == NONZEROS for limit in self.limits)

    def absolute(self, dense: Mapping[str, float]) -> dict[str, float]:
        """Each limit in units of its quantity.

        Args:
            dense: Cost of the dense network by quantity.

        Raises:
            BudgetError: An absolute limit is above the dense cost, or is of a cost that is not known.
        """
        limits: dict[str, float] = {}
        for limit in self.limits:
            if (limit.of == NONZEROS) != (NONZEROS in dense):
                raise BudgetError(
                    f"{limit} is a cost of {'single entries' if limit.of == NONZEROS else 'whole units'}, but here "
                    f"{'units' if limit.of == NONZEROS else 'entries'} leave. Give a budget in one of "
                    f"{', '.join(dense)}, or take `metaprune.sparsify` for entries and `metaprune.plan` for units."
                )
            if limit.of not in dense:
                raise BudgetError(
                    f"{limit} needs a table of what the network takes on this machine, but it has none. Give a budget "
                    f"in one of {', '.join(dense)}."
                )
            full = dense[limit.of]
            value = limit.absolute(full)
            if value > full:
                raise BudgetError(
                    f"a budget must be at most the dense network, but {limit} is above its {full:.12g} "
                    f"{limit.quantity}. Fractions go up to 1; numbers above 1 are absolute."
                )
            limits[limit.of] = min(value, limits.get(limit.of, value))
        return limits


def parse_budget(text: "str | Budget") -> Budget:
    """Read a budget.

    Raises:
        BudgetError: It is empty, names no known quantity, or a value is no positive number.

    >>> parse_budget("macs=0.5,bytes=256KB")
    Budget(limits=(Limit(quantity='macs', value=0.5), Limit(quantity='bytes', value=256000.0)))
    """
    if isinstance(text, Budget):
        return text
    limits = []
    for part in str(text).split(","):
        name, equals, number = part.partition("=")
        name = name.strip()
        if not equals:
            raise BudgetError(f"a budget must read quantity=number, e.g. macs=0.5, but is {part!r}.")
        known = (*QUANTITIES, *TIMES, NONZEROS)
        if name not in known:
            hint = did_you_mean(name, known)
            raise BudgetError(f"a budget must be in one of {', '.join(known)}, but {part!r} is in {name!r}.{hint}")
        limits.append(Limit(name, _number(part, number)))
    budget = Budget(tuple(limits))
    if budget.sparse and any(limit.quantity != NONZEROS for limit in limits):
        raise BudgetError(
            f"a budget is of units or of single entries, but {text!r} is of both. Cut units first, then set entries of "
            "the smaller network to zero."
        )
    return budget


@dataclass(frozen=True)
class Pattern:
    """Where the entries of a weight may stay.

    Args:
        text: ``any``, ``row``, ``N:M`` with two numbers, or ``N:M`` with the letter N, which a budget decides.

    Raises:
        ConfigError: It is none of these.

    >>> Pattern("2:4").kept, Pattern("2:4").every, Pattern("N:8").every
    (2, 4, 8)
    """

    text: str = "any"

    def __post_init__(self) -> None:
        if self.text not in ("any", "row") and not (self.every and (self.kept or self.text[0] in "nN")):
            raise ConfigError(f"a pattern must be {_PATTERNS}, with 1 <= N <= M, but is {self.text!r}.")

    @property
    def every(self) -> int:
        """M; 0 where there is none."""
        match = re.fullmatch(r"(?:[nN]|0*[1-9]\d*):(\d+)", self.text)
        return 0 if match is None or self.kept > int(match[1]) else int(match[1])

    @property
    def kept(self) -> int:
        """N; 0 where the budget decides."""
        first = self.text.partition(":")[0]
        return int(first) if first.isdecimal() else 0


def entry_budget(text: "str | Budget | None", pattern: str | None) -> Budget | None:
    """The budget of entries that is asked for, by itself or by a pattern such as 2:4; None if units are to leave.

    Raises:
        BudgetError: The budget is none, or one of units that comes with a pattern, or lacks where the pattern needs it.
        ConfigError: The pattern is none.

    >>> str(entry_budget(None, "2:4"))
    'nonzeros=0.5'
    """
    budget = None if text is None or text == "" else parse_budget(text)
    if pattern is None:
        return budget if budget is not None and budget.sparse else None
    shape = Pattern(pattern)
    if budget is not None and not budget.sparse:
        raise BudgetError(
            f"a pattern says where single entries stay, but {budget} is a budget of units. Give nonzeros=0.5 or the "
            "like, or no pattern."
        )
    if budget is None and not shape.kept:
        raise BudgetError(f"pattern {pattern!r} does not say how many entries stay. Give a budget, e.g. nonzeros=0.5.")
    return budget or Budget((Limit(NONZEROS, shape.kept / shape.every),))


def amount(text: str) -> float:
    """A number with a unit, e.g. of bytes.

    Raises:
        BudgetError: It is none, or not above 0.

    >>> amount("256KiB"), amount("1GB"), amount("12")
    (262144.0, 1000000000.0, 12.0)
    """
    return _number(text, text)


def _number(part: str, text: str) -> float:
    match = _NUMBER.fullmatch(text)
    unit = match[2].lower() if match else ""
    if not match or (unit not in _UNITS and unit not in _BINARY):
        raise BudgetError(f"a budget must be a number such as 0.5, 40M or 256KB, but {part!r} is none.")
    value = float(match[1]) * (_UNITS.get(unit) or _BINARY[unit])
    if not 0 < value < float("inf"):
        raise BudgetError(f"a budget must be above 0, but {part!r} is {value:g}. Give a fraction up to 1, or a count.")
    return value
