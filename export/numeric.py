"""Is a file much worse than torch itself? Both are judged against a float64 copy of the network.

Elementwise relative error says nothing (outputs near zero make it huge on perfect files) and a fixed tolerance depends
on the network. So: ``e_file <= 10 * e_torch + 1e-6 * scale``, with the largest absolute errors against float64 and the
largest absolute output. Good exports were measured at 1.6 to 2.7 times torch's own error.
"""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from metaprune.errors import UnsupportedModelError
from metaprune.export.example import Example, as_arrays
from metaprune.modes import default_dtype

_TIMES, _SHARE = 10.0, 1e-6
_SHARE_ALONE = 1e-5  # where no float64 copy runs, torch's own error is unknown
_MOST = 1e-2  # of the scale: where float32 itself is off by more, an equal file proves nothing


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """How far outputs are from the truth, and how far they may be.

    Args:
        error: Largest absolute error over all outputs whose tolerance is strained most, in units of the output.
        torch_error: The same of torch in float32; 0 where float64 was impossible.
        scale: Largest absolute value of that output.
        tolerance: Largest error that passes.
        output: Name of that output.
        reference: What the truth comes from, e.g. ``"float64 copy"``.
    """

    error: float
    torch_error: float
    scale: float
    tolerance: float
    output: str
    reference: str

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance

    @property
    def relative(self) -> float:
        """Error as a share of the scale."""
        return self.error / self.scale if self.scale else self.error

    def __str__(self) -> str:
        if np.isinf(self.error):
            return (
                f"{self.output} has another shape than that of the {self.reference}, or is no number where that is one"
            )
        return (
            f"error {self.error:.2e} where {self.tolerance:.2e} may be, at a scale of {self.scale:.3g}, "
            f"against the {self.reference} (torch itself: {self.torch_error:.2e})"
        )

    def to_json(self) -> dict[str, Any]:
        """The numbers as plain data."""
        numbers = {**asdict(self), "relative": self.relative, "passed": self.passed}
        # JSON has no infinity; an error that is none stands for outputs that cannot be compared.
        return {name: None if value == np.inf else value for name, value in numbers.items()}


@dataclass(frozen=True, eq=False, kw_only=True)
class Truth:
    """Outputs on one batch that others are held against.

    Args:
        single: Outputs by name, in float32.
        double: The same in float64, or None where that does not run.
        source: What the outputs come from, for messages.
    """

    single: Mapping[str, NDArray[Any]]
    double: Mapping[str, NDArray[Any]] | None = None
    source: str = "float32 network"

    @property
    def finite(self) -> bool:
        """Whether every output is a number."""
        return all(bool(np.isfinite(value).all()) for value in self.single.values())

    def deviation(self, outputs: Mapping[str, NDArray[Any]], rows: int | None = None) -> Deviation:
        """How far `outputs` are from the truth, where the tolerance is strained most.

        Outputs of another number or shape are infinitely far. Integers and booleans must be equal.

        Args:
            outputs: Outputs in the same order; names do not count, as every exporter gives others.
            rows: They belong to the first samples only; the tolerance stays that of the whole batch, because torch's
                own error on a few samples may be small by luck.
        """
        values = list(outputs.values()) if len(outputs) == len(self.single) else [None] * len(self.single)
        return max((self._one(name, got, rows) for name, got in zip(self.single, values)), key=_strain)

    def _one(self, name: str, got: NDArray[Any] | None, rows: int | None) -> Deviation:
        single = self.single[name]
        exact = single.dtype.kind not in "fc"
        doubled = self.double is not None and not exact
        truth = self.double[name] if self.double is not None and doubled else single
        torch_error = largest_difference(single, truth)
        scale = _largest(truth)
        tolerance = min(_TIMES * torch_error, _MOST * scale) + (_SHARE if doubled else _SHARE_ALONE) * scale
        target = truth[:rows] if rows is not None and truth.ndim else truth
        return Deviation(
            error=np.inf if got is None or got.shape != target.shape else largest_difference(got, target),
            torch_error=torch_error,
            scale=scale,
            tolerance=0.0 if exact else tolerance,
            output=name,
            reference=self.source,
        )


class Judge:
    """A network, still, on the processor, and its float64 copy.

    Args:
        model: The network; it stays as it is.

    Raises:
        UnsupportedModelError: It cannot be copied.
    """

    def __init__(self, model: nn.Module) -> None:
        try:
            self.single = copy.deepcopy(model).cpu().eval().requires_grad_(False)
        except Exception as error:  # tensors with a history (the old weight_norm keeps one), locks, open files
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UnsupportedModelError(
                f"a network must be copyable, but {type(model).__name__} is not: {reason} "
                "If it uses weight_norm, remove it first (torch.nn.utils.remove_weight_norm)."
            ) from error
        self._double: nn.Module | None = copy.deepcopy(self.single).double()

    def truth(self, example: Example) -> Truth:
        """Outputs on one batch."""
        single = as_arrays(example.call(self.single))
        double = None
        if self._double is not None:
            try:
                with default_dtype(torch.float64):
                    double = as_arrays(example.double().call(self._double))
            except RuntimeError:  # a float32 constant of the forward meets a float64 weight
                self._double = None
        if double is not None and {k: v.shape for k, v in double.items()} != {k: v.shape for k, v in single.items()}:
            double = None
        return Truth(single=single, double=double, source="float32 network" if double is None else "float64 copy")

    def check_repeats(self, truth: Truth, example: Example) -> None:
        """Run the network again: what draws numbers would pass for rounding of torch, and nothing be held against it.

        Raises:
            UnsupportedModelError: It gives something else than before.
        """
        if not Truth(single=truth.single).deviation(as_arrays(example.call(self.single))).passed:
            raise UnsupportedModelError(
                "outputs must be the same every time, but two runs of the network on the same inputs differ. Let it "
                "draw random numbers (dropout, noise) in training alone, e.g. `F.dropout(x, training=self.training)`, "
                "or get them as an input."
            )


def largest_difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Largest absolute difference; infinite where only one of the two is a number.

    >>> largest_difference(np.array([1.0, np.nan]), np.array([1.5, np.nan]))
    0.5
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    usual = np.isfinite(a) & np.isfinite(b)
    if not np.array_equal(a[~usual], b[~usual], equal_nan=True):
        return float("inf")
    return float(np.abs(a[usual] - b[usual]).max()) if usual.any() else 0.0


def _largest(values: NDArray[Any]) -> float:
    numbers = np.asarray(values, np.float64)
    numbers = numbers[np.isfinite(numbers)]
    return float(np.abs(numbers).max()) if numbers.size else 0.0


def _strain(deviation: Deviation) -> tuple[float, float]:
    beyond = deviation.error / deviation.tolerance if deviation.tolerance else (np.inf if deviation.error else 0.0)
    return beyond, deviation.error
