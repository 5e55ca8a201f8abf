"""A number that can be trusted or doubted: with its unit, its sample size, its spread, and where it comes from."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Label = Literal["measured", "emulated", "projected"]


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """One number of a report.

    Args:
        value: The number, in `unit`.
        unit: Its unit, e.g. ``"ms"``, ``"bytes"``, ``"%"``; ``"x"`` for a ratio.
        n: How many samples stand behind it.
        low: Lower end of the spread, in `unit`; None where there is none.
        high: Upper end of the spread, in `unit`; None where there is none.
        spread: What `low` and `high` are, e.g. ``"95 % bootstrap interval over blocks"``.
        label: ``measured`` on this machine, ``emulated`` under a constraint applied here, ``projected`` by a formula.

    >>> str(Quantity(value=0.5, unit="x", n=200, low=0.49, high=0.52, spread="95 % interval"))
    '0.5 x [0.49, 0.52] (n=200, measured)'
    """

    value: float
    unit: str
    n: int
    low: float | None = None
    high: float | None = None
    spread: str = "none"
    label: Label = "measured"

    def __post_init__(self) -> None:
        assert self.label in get_args(Label), self.label
        assert (self.low is None) == (self.high is None), "a spread has two ends"

    def __str__(self) -> str:
        ends = "" if self.low is None else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.value:.4g} {self.unit}{ends} (n={self.n}, {self.label})"

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)
