"""A network with ready-pruned variants of every layer, so that any configuration runs without building it.

A layer that reads units of an axis has one variant a level of it: the inputs of the units that leave are gone, and its
weights are solved for anew (:mod:`metaprune.criteria.obs`). What a layer reads while its variants are made is the
*expectation* over the variants of all layers before it, not what the dense network gives. With S_e the share of inputs
that variant e lacks, it counts with ``(1 - S_e) / sum_e (1 - S_e)``; and since a layer is linear in its weights, the
expectation of what it gives is what the mean of its variants' weights and intercepts gives.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaprune.allocate import Problem, Sizes
from metaprune.criteria._gradients import groups_of
from metaprune.criteria.obs import Consumer, Healed, Moments, find_consumers
from metaprune.errors import ConfigError
from metaprune.graph.adapt import adapt
from metaprune.graph.axes import Alive, Labels
from metaprune.graph.linear_calls import LinearCall, damped_factor
from metaprune.graph.record import Value, tensors_in
from metaprune.graph.stepping import Steps, side_by_side
from metaprune.graph.twin import named_tensors
from metaprune.graph.verify import divided_by, leaving_out, mask_
from metaprune.measure import output_error
from metaprune.task import on_calibration_data, require_finite

Tensors = dict[str, Tensor]
_KEPT = 64  # variants of a layer that reads several axes


@dataclass
class Layer:
    """A layer that reads units that may leave, and its variants.

    Attributes:
        call: The layer.
        units: By the place of each axis that it reads: the unit of each channel, -1 for none.
        variants: Weight and intercept by name; the key has the size of each of these axes.
        healed: What further variants are made from, where it reads several axes; else None.
    """

    call: LinearCall
    units: dict[int, Labels]
    variants: dict[tuple[int, ...], Tensors] = field(default_factory=dict)
    healed: Healed | None = None

    def key(self, sizes: Sizes) -> tuple[int, ...]:
        """Of the variant that a configuration takes."""
        return tuple(int(sizes[place]) for place in self.units)


class Supernet:
    """Variants of every layer at some levels of every axis, and how far any choice of them is from the dense network.

    Units stay by their scores. All parameters of units that leave are masked too, and statistics over them run over
    those that stay, so that a configuration is the network that is cut there, with the weights of the variants. What no
    layer with a weight of its own reads (queries and keys, recurrent states) is masked alone.

    Memory: the variants of all levels, and while they are made, what the samples keep alive at one place. Of layers
    that read several axes, the variants of last use.

    Args:
        problem: Gives the network, the scores and the data.
        levels: Axis name -> sizes that it may have, ascending; others keep all units.
        samples: Of the calibration data, at least 1.
        chunk: Samples in a part, in which candidates are rated.
        rows: Most samples x places that are looked at for one layer.
        ridge: Relative to the mean of the diagonal of the second moment of what a layer reads.

    Raises:
        InputError: The data cannot be used.
    """

    def __init__(
        self,
        problem: Problem,
        levels: Mapping[str, Sizes],
        *,
        samples: int = 512,
        chunk: int = 64,
        rows: int = 16384,
        ridge: float = 1e-3,
    ) -> None:
        assert problem.task is not None
        self.problem, self.network, self.task = problem, problem.traced, problem.task
        self.levels = {self.network.index(name): sizes_L for name, sizes_L in levels.items()}
        self.orders = {
            self.network.index(axis.name): np.argsort(-problem.scores[axis.name].numpy(), kind="stable")
            for axis in problem.axes
        }
        self.model = adapt(copy.deepcopy(self.network.model)).eval().requires_grad_(False)
        self.chunks = parts_of(problem, chunk, samples)
        self.own = named_tensors(self.model)
        self.dense = {name: tensor.detach().clone() for name, tensor in self.own.items()}
        self.base = dict(self.dense)  # weights of layers that read all of their units, while others may not
        self.layers = {layer.call.op.index: layer for layer in self._found()}
        self._slots = list(self._find_slots())
        self._divided = divided_by(self.network.layout)
        with torch.no_grad():
            self.wanted = [self._run(part) for part in self.chunks]
            require_finite(self.wanted)
            self._make(rows, ridge)
        self._whole = np.array([axis.size for axis in self.network.axes], np.int64)  # whatever ceilings a problem has
        self._now = self._whole

    # ---- variants --------------------------------------------------------------------------------------------------

    def _found(self) -> Iterator[Layer]:
        """Layers that read axes with several levels, in the order of their calls."""
        layers: dict[int, Layer] = {}
        for name, consumers in find_consumers(self.network).items():
            place = self.network.index(name)
            if len(self.levels.get(place, ())) and place in self.orders:
                for one in consumers:
                    layers.setdefault(one.call.op.index, Layer(one.call, {})).units[place] = one.unit_C
        yield from (layers[index] for index in sorted(layers))

    def _make(self, rows: int, ridge: float) -> None:
        """All variants, from input to output; meanwhile the model has the mean of those that are made."""
        dense = copy.deepcopy(self.model)
        forwards = [partial(self.task.outputs, net, part) for net in (self.model, dense) for part in self.chunks]
        generator = torch.Generator().manual_seed(self.problem.seed)
        try:
            with on_calibration_data(), side_by_side(forwards, self.network.layout.trace) as runs:
                pairs = list(zip(runs[: len(self.chunks)], runs[len(self.chunks) :]))
                for layer in self.layers.values():
                    seen = _Seen(layer.call, pairs, rows, generator)
                    self._correct(layer.call, seen, ridge)
                    self._heal(layer, seen.moments, ridge)
                    self._put(self.expected(layer))
        finally:
            self._put(self.dense)

    def _correct(self, call: LinearCall, seen: "_Seen", ridge: float) -> None:
        """Give a layer the weights that come nearest to what the dense one gives, from what it reads here."""
        weight, change_GDO = self.own[call.weight].data, seen.change(bool(call.intercept), ridge)
        weight += call.weight_of(change_GDO, weight.shape).to(weight.dtype)
        if call.intercept:
            mean_GO = seen.lacks_GO - (seen.moments.mean_GD[:, None] @ change_GDO)[:, 0]
            self.own[call.intercept].data += (-1 if call.norm else 1) * mean_GO.flatten().to(weight.dtype)
        self.base |= {name: self.own[name].detach().clone() for name in (call.weight, call.intercept) if name}

    def _heal(self, layer: Layer, moments: Moments, ridge: float) -> None:
        channels = len(next(iter(layer.units.values())))
        healed = Healed(Consumer(layer.call, np.arange(channels)), self.model, moments, ridge)
        if len(layer.units) > 1:
            layer.healed = healed
            return
        ((place, _),) = layer.units.items()
        for size in self.levels[place][::-1].tolist():  # from large to small, each from the one before
            layer.variants[size,] = self._without(layer, healed, (size,))

    def _without(self, layer: Layer, healed: Healed, key: tuple[int, ...]) -> Tensors:
        """The weights for what is left, which the blocks of `healed` then have."""
        gone = np.flatnonzero(self._gone(layer, key)).tolist()
        for block in healed.blocks:
            block.remove(gone)
        return healed.tensors([block.now_DO() for block in healed.blocks])

    def _gone(self, layer: Layer, key: tuple[int, ...]) -> Alive:
        """Channels that the layer does not read any more."""
        gone_C = np.zeros(len(next(iter(layer.units.values()))), bool)
        for (place, unit_C), size in zip(layer.units.items(), key):
            gone_C |= (unit_C >= 0) & ~self._stays(place, size)[unit_C]
        return gone_C

    def _stays(self, place: int, size: int) -> Alive:
        stays_U = np.zeros(len(self.orders[place]), bool)
        stays_U[self.orders[place][:size]] = True
        return stays_U

    def variant(self, layer: Layer, key: tuple[int, ...]) -> Tensors:
        """Weight and intercept of a layer for these sizes of the axes that it reads.

        Raises:
            ConfigError: The layer reads one axis, and this is none of its levels.
        """
        if not self._gone(layer, key).any():
            return {name: self.base[name] for name in (layer.call.weight, layer.call.intercept) if name}
        if layer.healed is not None:
            made = layer.variants.pop(key, None) or self._made(layer, layer.healed, key)
            layer.variants[key] = made  # the last one used stands last
            if len(layer.variants) > _KEPT:
                del layer.variants[next(iter(layer.variants))]
        elif key not in layer.variants:
            raise ConfigError(
                f"sizes must be at levels of the supernet, but {layer.call.op} has no variant for {key}. It has "
                f"{', '.join(map(str, layer.variants))}."
            )
        return layer.variants[key]

    def _made(self, layer: Layer, healed: Healed, key: tuple[int, ...]) -> Tensors:
        fresh = copy.copy(healed)
        fresh.blocks = [copy.copy(block) for block in healed.blocks]
        return self._without(layer, fresh, key)

    def expected(self, layer: Layer) -> Tensors:
        """The mean of the variants of a layer; of one that reads several axes, of those at the same place of each grid.

        Weights are the shares of channels that are left, over their sum.
        """
        count = max(len(self.levels[place]) for place in layer.units)
        keys = {
            tuple(int(self.levels[place][min(e, len(self.levels[place]) - 1)]) for place in layer.units): None
            for e in range(count)
        }
        share_E = np.array([1 - self._gone(layer, key).mean() for key in keys])
        mean: Tensors = {}
        for key, share in zip(keys, share_E / max(share_E.sum(), 1e-12)):
            for name, tensor in self.variant(layer, key).items():
                mean[name] = mean.get(name, torch.zeros_like(tensor)) + float(share) * tensor
        return mean

    # ---- configurations --------------------------------------------------------------------------------------------

    def _find_slots(self) -> Iterator[tuple[str, Value, set[int], Layer | None]]:
        """What changes with which axes: a parameter, its value in the trace, the axes, the layer that has variants."""
        layout = self.network.layout
        healed = {name: layer for layer in self.layers.values() for name in (layer.call.weight, layer.call.intercept)}
        for name, value in layout.trace.parameters.items():
            rows = [layout.resolve(dim) for dim in value.dims]
            axes = {int(axis) for row in rows if row is not None for axis in np.unique(layout.axis_of[row])}
            layer = healed.get(name)
            axes = (axes | set(layer.units if layer else ())) & set(self.orders)
            if axes:
                yield name, value, axes, layer

    def put(self, sizes: Sizes) -> Alive:
        """Give the model a configuration: sizes of all axes of the network, at levels of this supernet.

        Returns:
            Which units stay.
        """
        keep = {place: self.orders[place][: sizes[place]] for place in self.orders}
        alive = self.network.layout.alive(keep)
        whole = bool((sizes == self._whole).all())  # then layers have their own weights
        other = whole or bool((self._now == self._whole).all())
        changed = set(self.orders) if other else set(np.flatnonzero(sizes != self._now).tolist())
        for name, value, axes, layer in self._slots:
            if changed & axes:
                healed = self.variant(layer, layer.key(sizes)) if layer and not whole else self.dense
                self.own[name].data.copy_(healed[name])
                mask_(self.own[name].data, value, self.network.layout, alive, self._divided)
        self._now = sizes.copy()
        return alive

    @torch.no_grad()
    def rate(self, sizes: Sizes, parts: Sequence[int] | None = None) -> float:
        """Squared error of the outputs over their square, against the dense network; infinite where it overflows.

        Args:
            sizes: Of all axes of the network, at levels of this supernet.
            parts: Numbers of the parts of the data that are looked at; all if None.
        """
        chosen = range(len(self.chunks)) if parts is None else parts
        alive = self.put(sizes)
        seen = []
        for part in chosen:
            with self._statistics(alive):
                seen.append(self._run(self.chunks[part]))
        error = output_error([self.wanted[part] for part in chosen], seen)
        return error if np.isfinite(error) else float("inf")

    def _statistics(self, alive: Alive) -> AbstractContextManager[None]:
        """Where statistics run over units that leave, they run over the others."""
        layout = self.network.layout
        over = any(dim.labels_NK is not None for op in layout.trace.ops for dim in op.statistics)
        return leaving_out(layout, (), alive) if over and not alive.all() else nullcontext()

    def _run(self, batch: Any) -> Tensor:
        with on_calibration_data():
            return tensors_in(self.task.outputs(self.model, batch))[0].float()

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.own[name].data.copy_(tensor)


class _Seen:
    """What a layer reads here, and what it then lacks of what the dense one gives; all runs stand before it.

    Args:
        call: The layer.
        pairs: Every batch on its way through the model and through the dense network.
        rows: Most samples x places that are looked at.
        generator: Chooses them.
    """

    def __init__(
        self, call: LinearCall, pairs: Sequence[tuple[Steps, Steps]], rows: int, generator: torch.Generator
    ) -> None:
        self.moments = Moments()
        products, sums = [], []
        for pair in pairs:
            pendings = []
            for run in pair:
                run.run_until(call.op)
                assert run.pending is not None
                pendings.append(run.pending)
            given, wanted = (pending.make() for pending in pendings)
            count, arguments = call.count(given), pendings[0].arguments
            drawn = torch.randperm(count, generator=generator)[: max(1, rows // len(pairs))]
            chosen = drawn if len(drawn) < count else None
            x_GBD = call.rows(arguments, chosen)
            lacks_GBO = call.outputs(wanted - given, int(arguments.get("groups", 1)), chosen)
            self.moments.add(x_GBD)
            products.append((x_GBD.mT @ lacks_GBO).double())
            sums.append(lacks_GBO.sum(1).double())
        self.lacks_GO = torch.stack(sums).sum(0) / self.moments.count
        self.products_GDO = torch.stack(products).sum(0) / self.moments.count

    def change(self, centred: bool, ridge: float) -> Tensor:
        """Of the weights, by ridge least squares, shape (G, D, O)."""
        means_GDO = self.moments.mean_GD[:, :, None] * self.lacks_GO[:, None] * centred
        return torch.cholesky_solve(
            self.products_GDO - means_GDO, damped_factor(self.moments.covariance(centred), ridge)
        )


def parts_of(problem: Problem, size: int, samples: int) -> list[Any]:
    """The calibration data in parts of `size` samples, so many samples in all.

    Raises:
        InputError: There is none, one holds NaN, or all samples are of one class.
    """
    assert problem.batches is not None
    with on_calibration_data():
        parts = list(groups_of(problem.batches(), size, samples))
    return problem.checked(parts)
