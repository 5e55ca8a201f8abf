"""New weights by least squares, layer by layer, from what is left: no gradients, no labels.

For a layer ``y = x W + b`` of the cut network, with x what it reads there after everything before it was healed, and r
what its result lacks (of what the dense layer gives; or where the result is added to something, of the dense sum)::

    dW = (Xc' Xc / n + ridge * mean(diag) * I)^-1  Xc' Rc / n,        db = mean(R) - mean(X) dW

with X and R centred where the layer has a bias, or a BatchNorm after it whose running mean can take it.

Legend of the tensor suffixes: as in :mod:`metaprune.graph.linear_calls`.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metaprune.errors import ConfigError, InputError
from metaprune.graph import trace
from metaprune.graph.axes import Alive
from metaprune.graph.layout import Layout
from metaprune.graph.linear_calls import LinearCall, Reader, find_readers, linear_calls
from metaprune.graph.record import Op, Ref, Trace, Value
from metaprune.graph.stepping import Pending, Steps, side_by_side
from metaprune.graph.twin import named_tensors
from metaprune.plans import Plan
from metaprune.recovery._base import RECOVERIES, Context, Recovered, Recovery, on_device
from metaprune.recovery._least_squares import Rows, Sums
from metaprune.recovery._recurrent import RecurrentFit, recurrent_fits
from metaprune.task import Batch, on_calibration_data

_ADD, _RELU = ("add", "add_"), ("relu", "relu_")


@RECOVERIES.register("reconstruct")
@dataclass(frozen=True, kw_only=True)
class Reconstruct(Recovery):
    """Every layer gives again what the dense one gave, as nearly as what is left allows.

    One pass from input to output. Each convolution (also grouped), linear layer or matrix product with a weight of its
    own gets new weights by ridge least squares from what it reads in the cut network, whose layers before it are healed
    already; so does each recurrent layer, gate by gate (:mod:`metaprune.recovery._recurrent`). Where the result is
    added to something (a residual stream), the target makes up for what that has lost so far; where a ReLU follows,
    further fits let go of what is negative in both networks. The ridge draws towards the present weights, so that a
    network that lacks nothing stays as it is. Biases take the means; without a bias, a BatchNorm after the layer does.
    Of a layer whose weight has masked entries, every output is solved for over the inputs that it keeps; of a recurrent
    one with such weights, only the bias changes.

    All batches go forward side by side through the dense and the cut network, so that each is run once. Memory: what
    the calibration samples keep alive in both networks at one place. What a residual branch gave that has left whole is
    made up for by the layers behind it.

    Source: He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, arXiv:1707.06168 (least
    squares from the pruned input); Zhang et al., Accelerating Very Deep Convolutional Networks, TPAMI 2016,
    arXiv:1505.06798 (what a ReLU cuts off); Meng et al., OSSCAR, ICML 2024, arXiv:2403.12983 (layers in closed form);
    for masks, what Frantar and Alistarh, SparseGPT, ICML 2023, arXiv:2301.00774, equation 2, approximate, exactly. With
    ``only_bias`` it is An et al., FLAP, AAAI 2024, arXiv:2312.11983, equation 9, on the healed prefix.

    Args:
        samples: Calibration samples, at least 1; whole batches are taken until there are so many.
        ridge: Strength of the ridge relative to the mean square of the inputs, above 0.
        rows: Most samples x places of a layer that are looked at, at least 1.
        relaxed: Further fits of a layer before a ReLU, in which what the ReLU makes zero may be anything negative.
        only_bias: Change no weights, only biases.
    """

    name: ClassVar[str] = "reconstruct"
    samples: int = 1024
    ridge: float = 1e-3
    rows: int = 65536
    relaxed: int = 2
    only_bias: bool = False

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("rows", 1), ("relaxed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"`{name} >= {least}` must hold, but {name}={getattr(self, name)}.")
        if not self.ridge > 0:
            raise ConfigError(f"`ridge > 0` must hold, but ridge={self.ridge}. 1e-3 is a good start.")

    def needs(self, model: nn.Module) -> frozenset[str]:
        """Calibration batches, and the dense network to be near to."""
        return frozenset({"calibration", "dense"})

    @torch.no_grad()
    def _recover(self, model: nn.Module, context: Context) -> Recovered:
        assert context.dense is not None
        batches = self._batches(context)
        dense = copy.deepcopy(context.dense).to(context.device).eval()
        with on_calibration_data():
            context.task.outputs(dense, batches[0])
        network = context.network or trace(context.dense, batches[0][0])
        plan = context.plan or Plan(())
        layout, alive, own = network.layout_left(plan), network.alive(plan), named_tensors(model.eval())
        fits: list[Fit | RecurrentFit] = [
            *find_fits(layout, alive, own, context.masks),
            *recurrent_fits(layout, alive, own, context.masks),
        ]
        fits.sort(key=lambda fit: fit.stop.index)

        def forwards(net: nn.Module) -> list[Callable[[], Any]]:
            return [partial(context.task.outputs, net, batch) for batch in batches]

        context.progress.start(len(fits), "layers", "reconstructing layers")
        try:
            with (
                on_calibration_data(),
                side_by_side(forwards(dense), network.layout.trace) as whole,
                side_by_side(forwards(model), layout.trace) as left,
            ):
                calls = _counterparts(network.layout.trace, layout.trace)
                pairs = [_Pair(*pair, fits, calls) for pair in zip(whole, left, strict=True)]
                for fit in fits:
                    generator = torch.Generator().manual_seed(context.seed + fit.number)
                    if isinstance(fit, RecurrentFit):
                        rows = self.rows // len(pairs)
                        fit.heal([pair.calls(fit) for pair in pairs], rows, self.ridge, self.only_bias, generator)
                    else:
                        self._heal(fit, pairs, generator)
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

    def _heal(self, fit: "Fit", pairs: "Sequence[_Pair]", generator: torch.Generator) -> None:
        for pair in pairs:
            pair.go_to(fit, self.rows // len(pairs), generator)
        rows = [pair.rows(fit) for pair in pairs]
        sums = Sums(rows, centred=fit.intercept is not None)
        groups = len(rows[0].x_GBD)
        kept_GDO = None if fit.mask is None else fit.call.matrix(fit.mask, groups).to(rows[0].x_GBD.device)
        for turn in range(1 + (self.relaxed if fit.rectified else 0)):
            if not sums.look(relaxed=turn > 0):
                break
            fit.change(*sums.solved(self.ridge, self.only_bias or fit.fixed, kept_GDO))
        for pair in pairs:
            pair.make_again(fit)


@dataclass(frozen=True, eq=False)
class Fit:
    """A layer that gets new weights, and what its result goes into.

    Attributes:
        call: The layer.
        stop: Where all is known that the fit is made from, and nothing else has read its result: an addition or a ReLU
            behind the layer (and its BatchNorm), or the layer itself.
        operand: The argument of `stop` that comes from the layer; empty for the layer itself.
        rectified: Of what `stop` is about, only the positive part is read.
        weight: Of the cut network.
        fixed: The weight must stay: it takes no gradient.
        mask: Which of its entries may change; None for all.
        intercept: Its bias, or the running mean of the BatchNorm after it; None where there is neither.
        scale: What the BatchNorm multiplies each channel by; None without one.
        kept: Dimensions of the result that are cut, and which positions are left.
    """

    call: LinearCall
    stop: Op
    operand: str
    rectified: bool
    weight: Tensor
    fixed: bool
    mask: Tensor | None
    intercept: Tensor | None
    scale: Tensor | None
    kept: tuple[tuple[int, Tensor], ...]

    @property
    def number(self) -> int:
        """Of the layer, among the calls."""
        return self.call.op.index

    @property
    def joins(self) -> bool:
        """The result is added to something."""
        return self.stop.name in _ADD

    def left(self, tensor: Tensor) -> Tensor:
        """What is left of something in the shape of the dense result."""
        for dim, positions in self.kept:
            tensor = tensor.index_select(dim, positions.to(tensor.device))
        return tensor

    def change(self, weight_GDO: Tensor, shift_GO: Tensor) -> None:
        """Add to weight and intercept."""
        self.weight.data += self.call.weight_of(weight_GDO, self.weight.shape).to(self.weight.dtype)
        if self.intercept is not None:
            sign = -1 if self.call.norm is not None else 1
            self.intercept.data += sign * shift_GO.flatten().to(self.intercept.dtype)


class _Pair:
    """One batch on its way through the dense and the cut network.

    Args:
        dense: The one.
        slim: The other.
        fits: All that is to be fitted.
        calls: Of the dense network, by the index of the same call in the cut one.
    """

    def __init__(
        self, dense: Steps, slim: Steps, fits: "Sequence[Fit | RecurrentFit]", calls: Mapping[int, Op]
    ) -> None:
        self.dense, self.slim, self.counterparts = dense, slim, calls
        self._calls: dict[int, Pending] = {}
        late = [fit for fit in fits if isinstance(fit, Fit) and fit.operand]
        self._late = {fit.call.op.index for fit in late} | {fit.call.norm.op.index for fit in late if fit.call.norm}

    def calls(self, fit: RecurrentFit) -> tuple[Pending, Pending]:
        """Go on to a recurrent layer: its call in the dense network, and in the cut one."""
        self._run_until(fit.stop)
        return self._at(self.dense), self._at(self.slim)

    def go_to(self, fit: Fit, rows: int, generator: torch.Generator) -> None:
        """Go on to where a fit is made, and choose the rows that are looked at."""
        self._run_until(fit.stop)
        if not fit.operand:
            self._calls[fit.call.op.index] = self._at(self.slim)
        self.wanted = fit.left(self._result(fit, self.dense))
        count = fit.call.count(self.wanted)
        chosen = torch.randperm(count, generator=generator)[: max(1, rows)].to(self.wanted.device)
        self.chosen = chosen if len(chosen) < count else None

    def rows(self, fit: Fit) -> Rows:
        """Samples and places of what a layer reads and of what becomes of it."""
        arguments = self._calls[fit.call.op.index].arguments
        groups = int(arguments.get("groups", 1))
        present, wanted = (
            fit.call.outputs(tensor, groups, self.chosen) for tensor in (self._result(fit, self.slim), self.wanted)
        )
        scale_GO = None
        if fit.operand and fit.scale is not None:
            scale_GO = fit.scale.reshape(groups, -1)
        return Rows(fit.call.rows(arguments, self.chosen), present, wanted, scale_GO)

    def make_again(self, fit: Fit) -> None:
        """Put the result with the new weights where it is about to be read, and let go of what made it."""
        call = self._calls.pop(fit.call.op.index)
        if not fit.operand:
            return
        out = call.make()
        if fit.call.norm is not None:
            out = self._calls.pop(fit.call.norm.op.index).make(input=out)
        self._at(self.slim).arguments[fit.operand].copy_(out)

    def _run_until(self, stop: Op) -> None:
        self.slim.run_until(stop, self._watch)
        self.dense.run_until(self.counterparts[stop.index])

    def _result(self, fit: Fit, steps: Steps) -> Tensor:
        """What a fit is about, as a network has it: the sum, what the ReLU reads, or what the layer gives."""
        pending = self._at(steps)
        if fit.joins:
            return pending.arguments["self"] + pending.arguments["other"]
        result: Tensor = pending.arguments[fit.operand] if fit.operand else pending.make()
        return result

    @staticmethod
    def _at(steps: Steps) -> Pending:
        assert steps.pending is not None
        return steps.pending

    def _watch(self, call: Pending, out: Any) -> None:
        if call.op is not None and call.op.index in self._late:
            self._calls[call.op.index] = call


def find_fits(
    layout: Layout, alive: Alive, own: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None
) -> list[Fit]:
    """What is to be fitted in a cut network, in the order in which it can be.

    Args:
        layout: Of the dense network, without the branches that have left.
        alive: What is left of its units.
        own: Tensors of the cut network.
        masks: Weights of which some entries must stay zero -> which ones may change.

    Raises:
        ConfigError: The network was not cut by this plan.
    """
    _check_shapes(layout, alive, own)
    readers = find_readers(layout.trace)
    values = layout.trace.values
    fits: list[Fit] = []
    joined: set[int] = set()
    for call in reversed(list(linear_calls(layout))):  # of two that are added, the later one makes up for the earlier
        weight, intercept = own[call.weight], own.get(call.intercept)
        if isinstance(intercept, nn.Parameter) and not intercept.requires_grad:
            intercept = None
        fixed, mask = not weight.requires_grad, (masks or {}).get(call.weight)
        if fixed and intercept is None:
            continue
        stop, operand, rectified = call.op, "", False
        behind = _only(readers[call.norm.op.outputs[0] if call.norm else call.y.index])
        if behind is not None and _joins(behind[0], values, call) and behind[0].index not in joined:
            (stop, operand), after = behind, _only(readers[behind[0].outputs[0]])
            rectified = after is not None and after[0].name in _RELU
            joined.add(stop.index)
        elif behind is not None and behind[0].name in _RELU:
            (stop, operand), rectified = behind, True
        kept = [(k, layout.kept(dim, alive)) for k, dim in enumerate(call.y.dims)]
        cut = tuple((k, torch.from_numpy(left.nonzero()[0])) for k, left in kept if left is not None and not left.all())
        scale = call.norm.scale(own) if call.norm else None
        fits.append(Fit(call, stop, operand, rectified, weight, fixed, mask, intercept, scale, cut))
    return sorted(fits, key=lambda fit: fit.stop.index)


def _counterparts(whole: Trace, left: Trace) -> dict[int, Op]:
    """By the index of each call that is left: the same call among all. Neither order nor values change."""
    rest = iter(whole.ops)
    return {op.index: next(one for one in rest if (one.name, one.outputs) == (op.name, op.outputs)) for op in left.ops}


def _only(readers: Sequence[Reader]) -> Reader | None:
    return readers[0] if len(readers) == 1 else None


def _joins(op: Op, values: Sequence[Value], call: LinearCall) -> bool:
    """It adds two activations of the shape that the layer gives."""
    if op.name not in _ADD or op.constants.get(("alpha", None), 1) != 1:
        return False
    shape = [dim.size for dim in call.y.dims]
    operands = [op.arguments[name] for name in ("self", "other")]
    return all(isinstance(ref, Ref) and [dim.size for dim in values[ref.number].dims] == shape for ref in operands)


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
