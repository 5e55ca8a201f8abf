"""Single entries of weights as units: what allocators of axes see of a network that loses no axis.

Legend of the tensor suffixes: G groups in which entries compete, U entries of a group.
"""

from collections.abc import Mapping
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from metaprune.budget import NONZEROS, Pattern
from metaprune.errors import ConfigError
from metaprune.graph.axes import Axis
from metaprune.graph.network import Network
from metaprune.graph.select import parameters_left_to


class Entries:
    """The entries of a network's weights. An allocator sees one axis a weight, named after it.

    Entries compete in groups of U: all of a weight, those of one output (a row), or M side by side along the input. An
    axis has U units: with k of them, the k best of every group stay. So the cost is linear in its size.

    Weights are all parameters that are multiplied and added up, but for those of modules that `freeze` and `only` of
    the network leave alone. Biases and norms are none.

    Args:
        network: A traced network.
        pattern: Where entries may stay, see :class:`~metaprune.budget.Pattern`.

    Raises:
        ConfigError: The pattern does not divide a weight, or there are no weights.
    """

    def __init__(self, network: Network, pattern: str = "any") -> None:
        self.network, self.pattern = network, Pattern(pattern)
        layout = network.layout
        free = parameters_left_to(layout.trace, network.model, network.freeze, network.only)
        into = {
            name: dim
            for name, value in layout.trace.parameters.items()
            if value.parameter and name in free and (dim := network.input_dim(name)) is not None
        }
        if not into:
            raise ConfigError("the network must have a weight that may lose entries, but has none. Freeze less.")
        self._order = {name: self._places(name, dim) for name, dim in into.items()}
        self.axes = tuple(self._axis(name, dim) for name, dim in into.items())
        self._index = {axis.name: k for k, axis in enumerate(self.axes)}
        self._entries = {name: prod(network.shapes[name]) for name in into}
        self._each_A = np.array([self._entries[axis.name] // axis.size for axis in self.axes], np.int64)

    @property
    def names(self) -> tuple[str, ...]:
        """The weights, in the order of the axes."""
        return tuple(self._index)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every parameter and buffer."""
        return self.network.shapes

    @property
    def model(self) -> nn.Module:
        """The dense network."""
        return self.network.model

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights by name, detached."""
        return {name: self.network.weights[name].detach() for name in self.names}

    @cached_property
    def full(self) -> npt.NDArray[np.int64]:
        """Size of every axis, shape (axes,)."""
        return np.array([axis.size for axis in self.axes], np.int64)

    def index(self, name: str) -> int:
        """The place of a weight in :attr:`axes`."""
        return self._index[name]

    def cost(self, sizes: npt.ArrayLike | None = None) -> dict[str, Any]:
        """Entries that stay in all weights, by the name of this quantity."""
        return {NONZEROS: int(np.asarray(self.full if sizes is None else sizes, np.int64) @ self._each_A)}

    def cost_many(self, sizes: npt.ArrayLike) -> dict[str, Any]:
        """The same for many configurations, (n, axes); arrays (n,)."""
        return {NONZEROS: np.atleast_2d(np.asarray(sizes, np.int64)) @ self._each_A}

    def grouped(self, name: str, entries: Tensor) -> Tensor:
        """Something in the shape of a weight, group by group, shape (G, U)."""
        return entries.permute(self._order[name]).reshape(-1, self.axes[self.index(name)].size)

    def ungrouped(self, name: str, entries_GU: Tensor) -> Tensor:
        """Back into the shape of the weight."""
        order, shape = self._order[name], self.shapes[name]
        back = [order.index(dim) for dim in range(len(shape))]
        return entries_GU.reshape([shape[dim] for dim in order]).permute(back).contiguous()

    def _places(self, name: str, into: int) -> list[int]:
        """The dimensions of a weight, those along which the entries of a group lie last."""
        rank = len(self.shapes[name])
        if self.pattern.text == "any":
            return list(range(rank))
        inner = [into]
        if self.pattern.text == "row":
            inner = sorted([into, *self._kernel_dims(name)])
        return [dim for dim in range(rank) if dim not in inner] + inner

    def _kernel_dims(self, name: str) -> range:
        trace = self.network.layout.trace
        number = trace.parameters[name].index
        slides = any("conv" in op.name for op in trace.ops for value, _ in op.consumed if value == number)
        return range(2, len(self.shapes[name])) if slides else range(0)

    def _axis(self, name: str, into: int) -> Axis:
        shape = self.shapes[name]
        size = prod(shape)
        if self.pattern.text == "row":
            size = prod(shape[dim] for dim in {into, *self._kernel_dims(name)})
        elif self.pattern.every:
            size = self.pattern.every
            if shape[into] % size:
                module = name.rpartition(".")[0]
                raise ConfigError(
                    f"pattern {self.pattern.text} needs an input of {name!r} (dimension {into}) that {size} divides, "
                    f"but it is {shape[into]}. Choose a pattern whose M divides it"
                    + (f", or leave the module out (`freeze={module!r}`, --freeze {module})." if module else ".")
                )
        bindings = tuple((name, dim) for dim in range(len(shape)))
        return Axis(name, size, True, "", bindings, kind="entry")
