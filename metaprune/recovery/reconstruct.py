"""New weights by least squares, layer by layer, from what is left: no gradients, no labels.

For a layer ``y = x W + b`` of the cut network, with x what it reads there after everything before it was healed, and r
what its result lacks (of what the dense layer gives; or where the result is added to something, of the dense sum)::

    dW = (Xc' Xc / n + ridge * mean(diag) * I)^-1  Xc' Rc / n,        db = mean(R) - mean(X) dW

with X and R centred where the layer has a bias, or a BatchNorm after it whose running mean can take it.

Legend of the tensor suffixes: as in :mod:`metaprune.graph.linear_calls`.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metaprune.errors import ConfigError, InputError
from metaprune.graph import Network, trace
from metaprune.graph.axes import Alive
from metaprune.graph.layout import Layout
from metaprune.graph.linear_calls import LinearCall, Reader, damped_factor, find_readers, linear_calls
from metaprune.graph.record import Op, Ref
from metaprune.graph.stepping import Pending, Steps, side_by_side
from metaprune.graph.twin import named_tensors
from metaprune.plans import Plan
from metaprune.recovery._base import RECOVERIES, Context, Recovered, Recovery, on_device
from metaprune.task import Batch

_SMALLEST = 1e-3  # scale of a BatchNorm channel relative to the largest; what goes through less is not made up for
_UNCHANGED = 1e-10  # mean square of what a layer lacks, relative to that of what it should give


@RECOVERIES.register("reconstruct")
@dataclass(frozen=True, kw_only=True)
class Reconstruct(Recovery):
    """Every layer gives again what the dense one gave, as nearly as what is left allows.

    One pass from input to output. Each convolution (also grouped), linear layer or matrix product with a weight of its
    own gets new weights by ridge least squares from what it reads in the cut network, whose layers before it are healed
    already. Where the result is added to something (a residual stream), the target makes up for what that has lost so
    far. The ridge draws towards the present weights, so that a network that lacks nothing stays as it is. Biases take
    the means; without a bias, a BatchNorm after the layer does.

    All batches go forward side by side through the dense and the cut network, so that each is run once. Memory: what
    the calibration samples keep alive in both networks at one place.

    Source: He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, arXiv:1707.06168 (least
    squares from the pruned input); Meng et al., OSSCAR, ICML 2024, arXiv:2403.12983 (whole layers in closed form).
    With ``only_bias`` it is An et al., FLAP, AAAI 2024, arXiv:2312.11983, equation 9, on the healed prefix.

    Args:
        samples: Calibration samples, at least 1; whole batches are taken until there are so many.
        ridge: Strength of the ridge relative to the mean square of the inputs, above 0.
        rows: Most samples x places of a layer that are looked at, at least 1.
        only_bias: Change no weights, only biases.
    """

    name: ClassVar[str] = "reconstruct"
    samples: int = 512
    ridge: float = 1e-3
    rows: int = 65536
    only_bias: bool = False

    def __post_init__(self) -> None:
        for name in ("samples", "rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name} >= 1` must hold, but {name}={getattr(self, name)}.")
        if not self.ridge > 0:
            raise ConfigError(f"`ridge > 0` must hold, but ridge={self.ridge}. 1e-3 is a good start.")

    def needs(self, model: nn.Module) -> frozenset[str]:
        """Calibration batches, and the dense network to be near to."""
        return frozenset({"calibration", "dense"})

    @torch.no_grad()
    def _recover(self, model: nn.Module, context: Context) -> Recovered:
        assert context.dense is not None
        batches = self._batches(context)
        network = context.network or trace(context.dense, batches[0][0])
        fits = find_fits(network, context.plan or Plan(()), model.eval())
        dense = copy.deepcopy(context.dense).to(context.device).eval()

        def forwards(net: nn.Module) -> list[Callable[[], Any]]:
            return [partial(context.task.outputs, net, batch) for batch in batches]

        context.progress.start(len(fits), "layers", "reconstructing layers")
        try:
            with side_by_side([*forwards(dense), *forwards(model)], network.layout.trace) as runs:
                pairs = [_Pair(*pair, fits) for pair in zip(runs[: len(batches)], runs[len(batches) :])]
                for fit in fits:
                    self._heal(fit, pairs, context.seed)
                    context.progress.advance()
        finally:
            context.progress.close()
        return Recovered(model, 0.0, notes=(f"{len(fits)} layers fitted by least squares",))

    def _batches(self, context: Context) -> list[Batch]:
        assert context.calibration is not None
        batches: list[Batch] = []
        count = 0
        for batch in context.calibration():
            batches.append(on_device(batch, context.device))
            count += len(batch[0])
            if count >= self.samples:
                break
        if not batches:
            raise InputError("layers are reconstructed from at least one batch, but the calibration data are empty.")
        return batches

    def _heal(self, fit: "Fit", pairs: "Sequence[_Pair]", seed: int) -> None:
        sums = _Sums(centred=fit.intercept is not None)
        generator = torch.Generator().manual_seed(seed + fit.call.op.index)
        for pair in pairs:
            wanted = pair.go_to(fit)
            lacks = fit.lacks(pair, wanted)
            count = fit.call.count(lacks)
            chosen = torch.randperm(count, generator=generator)[: max(1, self.rows // len(pairs))].to(lacks.device)
            sums.add(*fit.rows(pair, lacks, chosen if len(chosen) < count else None), float(wanted.square().mean()))
        if not sums.unchanged:
            fit.change(*sums.solved(self.ridge, self.only_bias))
        for pair in pairs:
            fit.make_again(pair)


@dataclass(frozen=True, eq=False)
class Fit:
    """A layer that gets new weights, and what its result goes into.

    Attributes:
        call: The layer.
        join: The addition of its result, behind the BatchNorm, to something else, and as which argument; or None.
        weight: Of the cut network.
        intercept: Its bias, or the running mean of the BatchNorm after it; None where there is neither.
        kept: Dimensions of the result that are cut, and which positions are left.
    """

    call: LinearCall
    join: Reader | None
    weight: Tensor
    intercept: Tensor | None
    kept: tuple[tuple[int, Tensor], ...]

    @property
    def stop(self) -> Op:
        """Where all is known that the fit is made from, and nothing has read its result."""
        return self.join[0] if self.join else self.call.op

    def lacks(self, pair: "_Pair", wanted: Tensor) -> Tensor:
        """What the result of the layer lacks, in its shape."""
        for dim, positions in self.kept:
            wanted = wanted.index_select(dim, positions.to(wanted.device))
        if self.join is None:
            return wanted - pair.calls[self.call.op.index].make()
        lacks = wanted - sum(pair.operands(self))
        return (
            lacks
            if self.call.norm is None
            else lacks * _inverse_scale(pair.calls[self.call.norm.index].arguments, lacks.ndim)
        )

    def rows(self, pair: "_Pair", lacks: Tensor, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the layer reads (G, B, D), and what it lacks (G, B, O)."""
        arguments = pair.calls[self.call.op.index].arguments
        return self.call.rows(arguments, chosen), self.call.outputs(lacks, int(arguments.get("groups", 1)), chosen)

    def change(self, weight_GDO: Tensor, shift_GO: Tensor) -> None:
        """Add to weight and intercept."""
        if self.weight.requires_grad:
            self.weight.data += self.call.weight_of(weight_GDO, self.weight.shape).to(self.weight.dtype)
        if self.intercept is not None:
            sign = -1 if self.call.norm is not None else 1
            self.intercept.data += sign * shift_GO.flatten().to(self.intercept.dtype)

    def make_again(self, pair: "_Pair") -> None:
        """Put the result with the new weights where it is about to be added."""
        call = pair.calls.pop(self.call.op.index)
        if self.join is None:
            return
        out = call.make()
        if self.call.norm is not None:
            out = pair.calls.pop(self.call.norm.index).make(input=out)
        assert pair.slim.pending is not None
        pair.slim.pending.arguments[self.join[1]].copy_(out)


def _inverse_scale(arguments: dict[str, Any], ndim: int) -> Tensor:
    """What a change after a BatchNorm is before it, by channel; 0 for channels that it lets almost nothing through."""
    scale_C = (arguments["running_var"] + arguments["eps"]).rsqrt()
    if arguments["weight"] is not None:
        scale_C = scale_C * arguments["weight"]
    through_C = scale_C.abs() > _SMALLEST * scale_C.abs().max()
    inverse_C = torch.where(through_C, 1 / torch.where(through_C, scale_C, 1), 0)
    return inverse_C.view(1, -1, *[1] * (ndim - 2))


class _Pair:
    """One batch on its way through the dense and the cut network."""

    def __init__(self, dense: Steps, slim: Steps, fits: Sequence[Fit]) -> None:
        self.dense, self.slim = dense, slim
        self.calls: dict[int, Pending] = {}
        late = [fit for fit in fits if fit.join]
        self._late = {op.index for fit in late for op in (fit.call.op, fit.call.norm) if op is not None}

    def go_to(self, fit: Fit) -> Tensor:
        """Go on to where a fit is made; what the dense network has there."""
        self.slim.run_until(fit.stop, self._watch)
        assert self.slim.pending is not None
        if fit.join is None:
            self.calls[fit.call.op.index] = self.slim.pending
        self.dense.run_until(fit.stop)
        assert self.dense.pending is not None
        wanted: Tensor = self.dense.pending.make()
        self.dense.answer(wanted)
        return wanted

    def operands(self, fit: Fit) -> tuple[Tensor, Tensor]:
        """The two tensors that are about to be added in the cut network."""
        assert self.slim.pending is not None
        arguments = self.slim.pending.arguments
        return arguments["self"], arguments["other"]

    def _watch(self, call: Pending, out: Any) -> None:
        if call.op is not None and call.op.index in self._late:
            self.calls[call.op.index] = call


@dataclass
class _Sums:
    """Moments of what a layer reads and lacks, added up over batches.

    Attributes:
        centred: There is an intercept.
        origin_GD: What inputs are counted from, near their mean, because differences of large sums are inexact.
    """

    centred: bool
    count: int = 0
    lacking: float = 0.0
    given: float = 0.0
    origin_GD: Tensor | None = None
    moments: list[Tensor] = field(default_factory=list)

    def add(self, x_GBD: Tensor, r_GBO: Tensor, given: float) -> None:
        """Add the rows of a batch."""
        if self.origin_GD is None:
            self.origin_GD = x_GBD.mean(1) if self.centred else x_GBD.new_zeros(x_GBD.shape[0], x_GBD.shape[2])
        x_GBD = x_GBD - self.origin_GD[:, None]
        parts = [part.double() for part in (x_GBD.mT @ x_GBD, x_GBD.mT @ r_GBO, x_GBD.sum(1), r_GBO.sum(1))]
        self.moments = [total + part for total, part in zip(self.moments, parts)] if self.moments else parts
        self.count += x_GBD.shape[1]
        self.lacking += float(r_GBO.square().mean())
        self.given += given

    @property
    def unchanged(self) -> bool:
        """The layer lacks nothing but rounding."""
        return self.lacking <= _UNCHANGED * self.given

    def solved(self, ridge: float, only_bias: bool) -> tuple[Tensor, Tensor]:
        """Changes of the weight (G, D, O) and of the intercept (G, O)."""
        assert self.origin_GD is not None
        xx_GDD, xr_GDO, x_GD, r_GO = (total / self.count for total in self.moments)
        if self.centred:
            xx_GDD = xx_GDD - x_GD[:, :, None] * x_GD[:, None]
            xr_GDO = xr_GDO - x_GD[:, :, None] * r_GO[:, None]
        if not bool(xx_GDD.isfinite().all() and xr_GDO.isfinite().all()):
            raise InputError(
                "activations must be finite, but those of the calibration data are not. Look for NaN or infinities in "
                "the weights and in the data."
            )
        if only_bias:
            return torch.zeros_like(xr_GDO), r_GO
        change_GDO = torch.cholesky_solve(xr_GDO, damped_factor(xx_GDD, ridge))
        return change_GDO, r_GO - ((x_GD + self.origin_GD)[:, None] @ change_GDO)[:, 0]


def find_fits(network: Network, plan: Plan, slim: nn.Module) -> list[Fit]:
    """What is to be fitted in a cut network, in the order in which it can be.

    Raises:
        ConfigError: The network was not cut by this plan.
    """
    layout, alive, own = network.layout, network.alive(plan), named_tensors(slim)
    _check_shapes(layout, alive, own)
    readers = find_readers(layout.trace)
    fits: list[Fit] = []
    joined: set[int] = set()
    for call in reversed(list(linear_calls(layout))):  # of two that are added, the later one makes up for the earlier
        join = _join(readers[call.norm.outputs[0] if call.norm else call.y.index], joined)
        joined |= {join[0].index} if join else set()
        kept = [(k, layout.kept(dim, alive)) for k, dim in enumerate(call.y.dims)]
        cut = tuple((k, torch.from_numpy(left.nonzero()[0])) for k, left in kept if left is not None and not left.all())
        fits.append(Fit(call, join, own[call.weight], own.get(call.intercept), cut))
    return sorted(fits, key=lambda fit: fit.stop.index)


def _check_shapes(layout: Layout, alive: Alive, own: Mapping[str, Tensor]) -> None:
    for name, value in layout.trace.parameters.items():
        left = [layout.kept(dim, alive) for dim in value.dims]
        wanted = tuple(dim.size if kept is None else int(kept.sum()) for dim, kept in zip(value.dims, left))
        seen = tuple(own[name].shape) if name in own else None
        if seen != wanted:
            raise ConfigError(
                f"the plan of the context must be the one that cut the network, but by it {name!r} has shape {wanted}, "
                f"and here {seen or 'it does not exist'}. Give `plan=` (and `network=`), and a network that still has "
                "its own parameters."
            )


def _join(readers: Sequence[Reader], joined: set[int]) -> Reader | None:
    """The addition that alone reads a value, and as which argument; not one that another layer makes up for."""
    if len(readers) != 1 or readers[0][0].name not in ("add", "add_") or readers[0][0].index in joined:
        return None
    op = readers[0][0]
    plain = isinstance(op.arguments["self"], Ref) and isinstance(op.arguments["other"], Ref)
    return readers[0] if plain and op.constants.get(("alpha", None), 1) == 1 else None
