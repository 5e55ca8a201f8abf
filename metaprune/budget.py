"""Budgets: what the cut network may cost.

``macs=0.5`` is half of the dense network, ``macs=40M`` an absolute number, ``params=0.3,bytes=256KB`` several at once.
``latency=0.6`` and ``latency_ms=0.8`` are times, for networks that have a table of this machine.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from metaprune.errors import BudgetError, did_you_mean

QUANTITIES = ("macs", "params", "bytes", "activations")
TIMES = {"latency": "latency_ms", "latency_ms": "latency_ms"}  # a share of the dense time, and milliseconds
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_BINARY = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "b": 1}
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

    def absolute(self, dense: Mapping[str, float]) -> dict[str, float]:
        """Each limit in units of its quantity.

        Args:
            dense: Cost of the dense network by quantity.

        Raises:
            BudgetError: An absolute limit is above the dense cost, or is of a cost that is not known.
        """
        limits: dict[str, float] = {}
        for limit in self.limits:
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
        known = (*QUANTITIES, *TIMES)
        if name not in known:
            hint = did_you_mean(name, known)
            raise BudgetError(f"a budget must be in one of {', '.join(known)}, but {part!r} is in {name!r}.{hint}")
        limits.append(Limit(name, _number(part, number)))
    return Budget(tuple(limits))


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
