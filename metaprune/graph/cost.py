"""Exact cost of any configuration, without building it.

Every cost is a polynomial in the axis sizes. A residual branch whose inner axis has size 0 leaves whole, so what only
that branch computes is multiplied by an indicator of the axis (1 while its size is positive): a variable like others.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metaprune.errors import ConfigError
from metaprune.graph.axes import Dim
from metaprune.graph.branches import Branches
from metaprune.graph.layout import Layout, Polynomial

CHUNK = 4096  # configurations evaluated at once; keeps the working set in cache


@dataclass(frozen=True)
class Cost:
    """What a configuration costs; numbers, or arrays of shape (n,) from ``cost_many``.

    Attributes:
        macs: Multiply-accumulates of matrix products and convolutions, for one sample.
        params: Entries of all parameters, tied ones once.
        bytes: Size of parameters and buffers in memory.
        activations: Bytes of every tensor that the forward allocates for one sample, added up.
        latency_ms: Time of one call as a table predicts it, or None where the network has none.
    """

    macs: Any
    params: Any
    bytes: Any
    activations: Any
    latency_ms: Any = field(default=None, repr=False)

    def __getitem__(self, quantity: str) -> Any:
        if quantity not in self.known:
            raise ConfigError(f"a cost is one of {', '.join(self.known)}, but {quantity!r} was asked for.")
        return getattr(self, quantity)

    @property
    def known(self) -> dict[str, Any]:
        """What is known, by quantity."""
        costs = {quantity: getattr(self, quantity) for quantity in QUANTITIES}
        return costs if self.latency_ms is None else {**costs, "latency_ms": self.latency_ms}


QUANTITIES = ("macs", "params", "bytes", "activations")


@dataclass(frozen=True)
class Kernel:
    """One call that multiplies and adds up, as cost models of machines see it.

    Attributes:
        kind: Equal for calls that differ in the sizes of axes alone: what is called, and at how many positions.
        macs: Multiply-accumulates of one sample, as a polynomial; see `Polynomials`.
        outputs: Numbers that it gives, likewise.
    """

    kind: tuple[Any, ...]
    macs: Polynomial
    outputs: Polynomial


class CostModel:
    """The cost polynomials of a network, compiled for many configurations at once."""

    def __init__(self, layout: Layout, branches: Branches) -> None:
        self.layout = layout
        self.full_A = np.array([axis.size for axis in layout.axes], np.int64)
        self.polynomials: dict[str, Polynomial] = {name: {} for name in QUANTITIES}
        self._collect(branches)
        # Variables: axis sizes, then indicators, then the constant 1 that pads short monomials.
        count = len(layout.axes)
        monomials = sorted({monomial for poly in self.polynomials.values() for monomial in poly})
        degree = max((len(monomial) for monomial in monomials), default=0)
        one = 2 * count
        padded = [[*monomial, *[one] * (degree - len(monomial))] for monomial in monomials]
        self._factors_DM = np.array(padded, np.int64).reshape(len(monomials), degree).T
        self._weights_QM = np.array([[self.polynomials[q].get(m, 0.0) for m in monomials] for q in QUANTITIES])
        self._frozen = np.array([not axis.prunable for axis in layout.axes], bool)
        self._can_be_empty = np.array([axis.droppable for axis in layout.axes], bool)

    def by_module(self, sizes_A: npt.NDArray[np.int64]) -> dict[str, tuple[float, float]]:
        """Multiply-accumulates for one sample, and parameters, of every module by path at one configuration."""
        values = np.concatenate([sizes_A, sizes_A > 0]).astype(np.float64)
        out: dict[str, list[float]] = {}
        for place, module, poly in self._parts:
            total = sum(weight * float(np.prod(values[list(monomial)])) for monomial, weight in poly.items())
            out.setdefault(module, [0.0, 0.0])[place] += total
        return {module: (macs, params) for module, (macs, params) in out.items()}

    def _collect(self, branches: Branches) -> None:
        trace, layout = self.layout.trace, self.layout
        batch = trace.batch
        self._parts: list[tuple[int, str, Polynomial]] = []  # 0 for MACs or 1 for parameters, module, how many
        self.kernels: list[Kernel] = []
        for op in trace.ops:
            gate = branches.gates_of_op(op.index)
            own: Polynomial = {}
            for dims in op.macs:
                _add(own, _product(map(layout.size, dims)), 1.0 / batch, gate)
            if own:
                _add(self.polynomials["macs"], own, 1.0, ())
                self._parts.append((0, op.module, own))
                made: Polynomial = {}
                for number in op.outputs[:1]:
                    _add(made, _product(map(layout.size, _once(trace.values[number].dims))), 1.0 / batch, gate)
                self.kernels.append(Kernel((op.name, *sorted(map(round, own.values()))), own, made))
            if op.allocates:
                for number in op.outputs:
                    value = trace.values[number]
                    poly = _product(map(layout.size, _once(value.dims)))
                    _add(self.polynomials["activations"], poly, value.dtype.itemsize / batch, gate)
        for name, value in trace.parameters.items():
            poly = _product(map(layout.size, value.dims))
            gate = branches.gates_of_parameter(value.index)
            if value.parameter:
                _add(self.polynomials["params"], poly, 1.0, gate)
                self._parts.append((1, name.rpartition(".")[0], {}))
                _add(self._parts[-1][2], poly, 1.0, gate)
            _add(self.polynomials["bytes"], poly, float(value.dtype.itemsize), gate)

    def __call__(self, sizes_NA: npt.ArrayLike | None = None) -> Cost:
        """Cost of configurations.

        Args:
            sizes_NA: Integer array (n, axes) or (axes,); None for the network as it is.

        Raises:
            ConfigError: Sizes are no integers or of a wrong shape, or one lies outside its axis: above the whole, below
                it where the axis is frozen, or 0 where no branch can leave.
        """
        if sizes_NA is None:
            return Cost(*(round(total) for total in self._evaluate(self.full_A[None])[:, 0]))
        sizes = np.asarray(sizes_NA)
        if sizes.dtype.kind not in "iu":
            raise ConfigError(f"sizes must be integers, but are {sizes.dtype}.")
        self._check(sizes)
        if sizes.ndim == 1:
            return Cost(*(round(total) for total in self._evaluate(sizes[None])[:, 0]))
        parts = [self._evaluate(sizes[start : start + CHUNK]) for start in range(0, len(sizes), CHUNK)]
        totals_QN = np.concatenate(parts, axis=1) if parts else np.zeros((len(QUANTITIES), 0))
        return Cost(*np.rint(totals_QN).astype(np.int64))

    def shares(self) -> list[dict[str, float]]:
        """For every axis, the part of each cost that has the axis as a factor, in [0, 1]."""
        out = []
        for axis in range(len(self.full_A)):
            part = np.array([(factors_D == axis).any() for factors_D in self._factors_DM.T], float)
            values_M = self._monomials(self.full_A[None])[:, 0]
            totals_Q = self._weights_QM @ values_M
            parts_Q = self._weights_QM @ (values_M * part)
            out.append(dict(zip(QUANTITIES, (parts_Q / np.maximum(totals_Q, 1e-300)).tolist())))
        return out

    def soft(self, sizes_A: Tensor, quantity: str) -> Tensor:
        """One quantity as a differentiable function of sizes that need not be whole; branches are not dropped.

        Args:
            sizes_A: One size an axis, float, shape (axes,).
            quantity: Name of the cost.
        """
        ones_A = torch.ones_like(sizes_A)
        variables = torch.cat([sizes_A, ones_A, ones_A[:1] if len(sizes_A) else torch.ones(1)])
        factors_DM = torch.from_numpy(self._factors_DM).to(sizes_A.device)
        weights_M = torch.from_numpy(self._weights_QM[QUANTITIES.index(quantity)]).to(sizes_A)
        return (variables[factors_DM].prod(dim=0) * weights_M).sum()

    def _evaluate(self, sizes_NA: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        return np.asarray(self._weights_QM @ self._monomials(sizes_NA))

    def _monomials(self, sizes_NA: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        variables = np.concatenate([sizes_NA.T, sizes_NA.T > 0, np.ones((1, len(sizes_NA)))]).astype(np.float64)
        values_MN = np.ones((self._factors_DM.shape[1], len(sizes_NA)))
        for factors_M in self._factors_DM:
            values_MN *= variables[factors_M]
        return values_MN

    def _check(self, sizes: npt.NDArray[np.int64]) -> None:
        if sizes.ndim not in (1, 2) or sizes.shape[-1] != len(self.full_A):
            raise ConfigError(
                f"sizes must be (n, {len(self.full_A)}), one column an axis, but have shape {sizes.shape}."
            )
        low = np.where(self._frozen, self.full_A, np.where(self._can_be_empty, 0, 1))
        outside = (sizes < low) | (sizes > self.full_A)
        if outside.any():
            column = int(np.argwhere(np.atleast_2d(outside))[0][1])
            axis = self.layout.axes[column]
            value = np.atleast_2d(sizes)[np.atleast_2d(outside)][0]
            raise ConfigError(
                f"`{low[column]} <= size <= {axis.size}` must hold for axis {axis.name!r}, but size={value}."
            )


def _once(dims: Iterable[Dim]) -> list[Dim]:
    """Directions of a ragged grid as the one dimension that they were."""
    seen, out = set(), []
    for dim in dims:
        if dim.grid is None:
            out.append(dim)
        elif id(dim.grid) not in seen:
            seen.add(id(dim.grid))
            out.append(dim.grid.dim)
    return out


def _product(sizes: Iterable[Polynomial]) -> Polynomial:
    product: Polynomial = {(): 1.0}
    for size in sizes:
        terms: Polynomial = {}
        for left, x in product.items():
            for right, y in size.items():
                key = tuple(sorted((*left, *right)))
                terms[key] = terms.get(key, 0.0) + x * y
        product = terms
    return product


def _add(into: Polynomial, poly: Polynomial, factor: float, gates: Sequence[int]) -> None:
    for monomial, weight in poly.items():
        key = tuple(sorted((*monomial, *gates)))
        into[key] = into.get(key, 0.0) + weight * factor
