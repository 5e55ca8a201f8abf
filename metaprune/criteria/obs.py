"""Block-OBS: which unit can be spared best, when all others make up for it.

For a layer ``y = x W`` with the second moment ``H = E[x' x]`` of what it reads (centred where an intercept can take the
mean, with a ridge on its diagonal) and ``P = H^-1``, the least squared error without the inputs g is::

    loss(g) = tr(W_g' (P_gg)^-1 W_g)        at        W - P_:g (P_gg)^-1 W_g,        P - P_:g (P_gg)^-1 P_g:

which is W and P for the next removal. Sum over removals: the error of the layer with the best weights for what is left.

Legend of the tensor suffixes: U units, G groups, D inputs of a group (all units, kernel positions inside), O outputs,
K units kept, b inputs of one unit.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from metaprune.criteria._activations import in_weight_shape, outputs_of, watch_calls
from metaprune.criteria._base import CRITERIA, Calibration, Criterion, Curves, Scores, Verdict
from metaprune.criteria._gradients import groups_of
from metaprune.errors import ConfigError
from metaprune.graph import Dim, Entries, Network
from metaprune.graph.axes import Labels
from metaprune.graph.layout import Layout
from metaprune.graph.linear_calls import LinearCall, damped_factor, linear_calls
from metaprune.graph.prefix import Prefix
from metaprune.graph.record import Op, tensors_in
from metaprune.graph.twin import named_tensors
from metaprune.measure.distortion import output_error


@CRITERIA.register("obs")
@dataclass(frozen=True, kw_only=True)
class Obs(Criterion):
    """Remove the unit whose loss is least when the weights of all others are solved for anew, again and again.

    The loss of a unit is the squared error that its absence leaves in what its consumers give (behind a BatchNorm),
    relative to the variance of that, added up over consumers. The sum over removals is the exact error of every number
    of units kept. This curve is scaled by what pruning the axis alone, its consumers solved for anew, does to the
    output of the network: the squared error over the square, for classifiers up to a number that all classes share.
    That is smoother than the divergence of probabilities, which saturates and hangs on few samples.

    It is made for the recovery ``reconstruct``, which solves for the same weights. Axes that no layer with a weight of
    its own reads (queries and keys, recurrent states) are left out, and kept.

    Source: Hassibi and Stork, Second Order Derivatives for Network Pruning: Optimal Brain Surgeon, NIPS 1992, equation
    5, for blocks of columns as in Kurtic et al., ZipLM, NeurIPS 2023, arXiv:2302.04089, equation 4.
    Differs from them: units with several consumers; curves in units of the network's output.

    Args:
        samples: Calibration samples whose activations count, at least 1.
        rows: Most samples x places that are looked at for one layer, at least 1.
        ridge: Added to the diagonal of H, relative to its mean, above 0.
        measured: Samples on which the output of the network is compared; 0 leaves curves in units of the layers.
        share: Part of an axis that is removed to measure, between 0 and 1.
        joint: Sets of axes that are measured together, to see how far errors add up; 0 leaves that open.
        steps: At most so many removals an axis; more units than that leave several at a time.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"data"})
    additive: ClassVar[bool] = True
    together: ClassVar[bool] = True
    entrywise: ClassVar[bool] = True
    samples: int = 512
    rows: int = 16384
    ridge: float = 1e-3
    measured: int = 256
    share: float = 0.5
    joint: int = 8
    steps: int = 256

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("rows", 1), ("measured", 0), ("joint", 0), ("steps", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"`{name} >= {least}` must hold, but {name}={getattr(self, name)}.")
        if not self.ridge > 0:
            raise ConfigError(f"`ridge > 0` must hold, but ridge={self.ridge}. 1e-3 is a good start.")
        if not 0 < self.share < 1:
            raise ConfigError(f"`0 < share < 1` must hold, but share={self.share}.")

    def _score(self, network: Network, calibration: Calibration) -> Scores:
        return self._judge(network, calibration).scores

    @torch.no_grad()
    def _judge(self, network: Network, calibration: Calibration) -> Verdict:
        consumers = find_consumers(network)
        calls = {one.call.op.index: one.call for several in consumers.values() for one in several}
        model = copy.deepcopy(network.model).eval()
        run = _Runs(model, network, calibration)
        moments = run.moments(calls, self.samples, self.rows)
        whole, prefix = run.prefix(self.measured), run.prefix(self.measured)
        wanted = run.outputs(whole)
        scores: Scores = {}
        curves: Curves = {}
        cuts: dict[str, _Cut] = {}
        for name, several in sorted(consumers.items(), key=lambda item: _first(item[1]).index):
            size = network.axis(name).size
            left = max(1, round(size * (1 - self.share)))
            healed = [Healed(one, model, moments[one.call.op.index], self.ridge) for one in several]
            curve_K, order = eliminate([b for one in healed for b in one.blocks], size, -(-size // self.steps), left)
            if self.measured:
                prefix.go_to(_first(several), model)
                cuts[name] = _Cut(healed, run.error(prefix, wanted, healed))
                curve_K = curve_K * (cuts[name].error / max(float(curve_K[left]), 1e-300))
            curves[name], scores[name] = curve_K, _scores(curve_K, order)
        scores, curves = ({name: known[name] for name in consumers} for known in (scores, curves))
        alone = [cuts[name] for name in consumers if name in cuts]
        together = partial(run.error, whole, wanted)
        return Verdict(scores, curves, self._additivity(together, alone, calibration.generator()))

    @torch.no_grad()
    def _score_entries(self, entries: Entries, calibration: Calibration) -> Scores:
        network = entries.network
        calls = {call.op.index: call for name, call in network.linear_calls.items() if name in entries.names}
        moments = _Runs(network.model, network, calibration).moments(calls, self.samples, self.rows)
        scores = {}
        for index, call in calls.items():
            h_GDD = moments[index].covariance(centred=bool(call.intercept))
            matrix_GDO = call.matrix(network.weights[call.weight].detach(), len(h_GDD)).to(h_GDD)
            inverse_GDD = torch.cholesky_inverse(damped_factor(h_GDD, self.ridge))
            loss_GDO = matrix_GDO.square() / inverse_GDD.diagonal(dim1=1, dim2=2)[:, :, None]
            variance = (matrix_GDO * (h_GDD @ matrix_GDO)).sum().clamp_min(1e-300)
            scores[call.weight] = in_weight_shape(call, loss_GDO / variance, entries.shapes[call.weight]).cpu()
        return scores

    def _additivity(
        self, error: Callable[[Sequence["Healed"]], float], cuts: Sequence["_Cut"], generator: torch.Generator
    ) -> float | None:
        """Squared correlation of what sets of axes do to the output with what they do one by one; None if not measured.

        A layer that reads several axes of a set has the weights for one of them, so no set has two such axes.
        """
        together, alone = [], []
        for number in range(self.joint if len(cuts) > 1 else 0):
            chosen: list[_Cut] = []
            share = (number + 1) / self.joint
            for k in torch.randperm(len(cuts), generator=generator).tolist()[: max(2, round(share * len(cuts)))]:
                taken = {one.call.op.index for cut in chosen for one in cut.healed}
                if taken.isdisjoint(one.call.op.index for one in cuts[k].healed):
                    chosen.append(cuts[k])
            together.append(error([one for cut in chosen for one in cut.healed]))
            alone.append(sum(cut.error for cut in chosen))
        if len(together) < 3 or not np.ptp(together) or not np.ptp(alone):
            return None
        return float(np.corrcoef(together, alone)[0, 1] ** 2)


def _scores(curve_K: Tensor, order: Sequence[int]) -> Tensor:
    """What each unit adds when it leaves, made to grow in the order of leaving; shape (U,)."""
    added = (curve_K[:-1] - curve_K[1:]).flip(0).clamp_min(0)
    added = added.cummax(0).values + added.max().clamp_min(1e-300) * 1e-9 * torch.arange(1, len(added) + 1)
    score_U = torch.empty_like(added)
    score_U[torch.tensor(order)] = added
    return score_U


@dataclass(frozen=True, eq=False)
class _Cut:
    """An axis without some of its units.

    Attributes:
        healed: Its consumers.
        error: Of the output, when it alone is cut.
    """

    healed: "list[Healed]"
    error: float


@dataclass(frozen=True, eq=False)
class Consumer:
    """A layer that reads the units of an axis, and nothing of what it gives needs them.

    Attributes:
        call: The layer.
        unit_C: The unit that each channel it reads needs, -1 for none of this axis.
    """

    call: LinearCall
    unit_C: Labels


def _first(consumers: Sequence[Consumer]) -> Op:
    """The call of the first of them."""
    return min((one.call.op for one in consumers), key=lambda op: op.index)


def find_consumers(network: Network) -> dict[str, list[Consumer]]:
    """The layers that read each prunable axis, for those axes that have any."""
    layout = network.layout
    found: dict[str, list[Consumer]] = {}
    for call in linear_calls(layout):
        channels = call.channels % len(call.x.dims)
        inner = layout.resolve(call.x.dims[channels])
        if inner is None:
            continue
        others = [dim for k, dim in enumerate(call.x.dims) if k != channels]
        taken = {int(axis) for dim in (*others, *call.y.dims) for axis in _axes(layout, dim)}
        for index in _axes(layout, call.x.dims[channels]):
            axis = network.axes[index]
            if axis.prunable and index not in taken:
                here = layout.axis_of[inner] == index
                unit_C = np.where(here.any(1), (layout.rank_of[inner] * here).max(1), -1)
                found.setdefault(axis.name, []).append(Consumer(call, unit_C))
    return {axis.name: found[axis.name] for axis in network.axes if axis.name in found}


def _axes(layout: Layout, dim: Dim) -> list[int]:
    rows = layout.resolve(dim)
    return [] if rows is None else [int(axis) for axis in np.unique(layout.axis_of[rows]) if axis >= 0]


@dataclass
class Moments:
    """First and second moments of what a layer reads, in float64.

    Attributes:
        count: Rows so far.
        mean_GD: Their mean.
        square_GDD: The mean of their products.
    """

    count: int = 0
    mean_GD: Tensor = field(default_factory=lambda: torch.zeros(()))
    square_GDD: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, x_GBD: Tensor) -> None:
        """Pool with more rows."""
        share = x_GBD.shape[1] / (self.count + x_GBD.shape[1])
        self.mean_GD = self.mean_GD + share * (x_GBD.mean(1).double() - self.mean_GD)
        squares = (x_GBD.mT @ x_GBD).double() / x_GBD.shape[1]
        self.square_GDD = self.square_GDD + share * (squares - self.square_GDD)
        self.count += x_GBD.shape[1]

    def covariance(self, centred: bool) -> Tensor:
        """Of the rows; or their second moment. Shape (G, D, D)."""
        return self.square_GDD - self.mean_GD[:, :, None] * self.mean_GD[:, None] if centred else self.square_GDD


class _Runs:
    """Forwards of the dense network over calibration batches."""

    def __init__(self, model: nn.Module, network: Network, calibration: Calibration) -> None:
        self.model, self.network, self.calibration = model, network, calibration

    def batches(self, samples: int) -> list[Any]:
        """Batches until there are so many samples."""
        assert self.calibration.batches is not None
        return list(groups_of(self.calibration.batches(), 1 << 30, samples))

    def moments(self, calls: Mapping[int, LinearCall], samples: int, rows: int) -> dict[int, Moments]:
        """Of what each call reads, by its index."""
        batches = self.batches(samples)
        moments = {index: Moments() for index in calls}
        generator = torch.Generator().manual_seed(self.calibration.seed)

        def add(call: LinearCall, arguments: Mapping[str, Any], out: Tensor) -> None:
            count = call.count(out)
            chosen = torch.randperm(count, generator=generator)[: max(1, rows // len(batches))].to(out.device)
            moments[call.op.index].add(call.rows(arguments, chosen if len(chosen) < count else None))

        watch_calls(self.network, self.calibration, batches, calls, add, self.model)
        return moments

    def prefix(self, samples: int) -> Prefix:
        """Forwards over so many samples."""
        batches = self.batches(samples) if samples else []
        forwards = [partial(outputs_of, self.network, self.calibration, batch) for batch in batches]
        return Prefix(forwards, self.network.layout.trace)

    def outputs(self, prefix: Prefix) -> list[Tensor]:
        """What the network as it is gives, batch by batch."""
        return [tensors_in(out)[0] for out in prefix.results(self.model)]

    def error(self, prefix: Prefix, wanted: Sequence[Tensor], healed: Sequence["Healed"]) -> float:
        """Relative squared error of the output when consumers have the weights for what is left of their axes."""
        for one in healed:
            one.put()
        seen = self.outputs(prefix)
        for one in healed:
            one.put_back()
        return output_error(wanted, seen)


class Healed:
    """A layer, and its weights as units leave that it reads.

    Args:
        consumer: The layer and the unit of each channel that it reads.
        model: Has its weights, which :meth:`put` changes.
        moments: Of what it reads.
        ridge: As for :class:`Block`.

    Attributes:
        blocks: One a group that reads such units.
    """

    def __init__(self, consumer: Consumer, model: nn.Module, moments: Moments, ridge: float) -> None:
        own = named_tensors(model)
        self.call, self.moments = consumer.call, moments
        self.weight, self.intercept = own[self.call.weight].data, own.get(self.call.intercept)
        self.before = self.weight.clone(), None if self.intercept is None else self.intercept.detach().clone()
        self.matrix_GDO = self.call.matrix(self.before[0], len(moments.square_GDD)).double()
        h_GDD = moments.covariance(centred=self.intercept is not None)
        through_C = self.call.norm.scale(own).double() if self.call.norm else self.matrix_GDO.new_ones(1)
        weight_GO = through_C.square().expand(self.matrix_GDO[:, 0].numel()).reshape(len(h_GDD), -1)
        variance = float((weight_GO[:, None] * self.matrix_GDO * (h_GDD @ self.matrix_GDO)).sum().clamp_min(1e-300))
        units_GC = consumer.unit_C.reshape(len(h_GDD), -1)
        kernel = h_GDD.shape[1] // units_GC.shape[1]
        self.blocks = [
            Block(h_DD, w_DO, np.repeat(unit_C, kernel), ridge, weight_O / variance)
            for h_DD, w_DO, unit_C, weight_O in zip(h_GDD, self.matrix_GDO, units_GC, weight_GO)
            if (unit_C >= 0).any()
        ]
        self.groups = [g for g, unit_C in enumerate(units_GC) if (unit_C >= 0).any()]

    def tensors(self, parts_DO: Sequence[Tensor]) -> dict[str, Tensor]:
        """Weight and intercept, by name, that go with the weights of its blocks."""
        matrix_GDO = self.matrix_GDO.clone()
        for group, part_DO in zip(self.groups, parts_DO):
            matrix_GDO[group] = part_DO
        tensors = {self.call.weight: self.call.weight_of(matrix_GDO, self.weight.shape).to(self.weight.dtype)}
        if self.before[1] is not None:
            shift_C = (self.moments.mean_GD[:, None] @ (self.matrix_GDO - matrix_GDO)).flatten()
            sign = -1 if self.call.norm is not None else 1
            tensors[self.call.intercept] = self.before[1] + sign * shift_C.to(self.before[1].dtype)
        return tensors

    def put(self) -> None:
        """Give the layer the weights that are best for the units that blocks were to remember."""
        tensors = self.tensors([block.seen_DO for block in self.blocks])
        self.weight.copy_(tensors[self.call.weight])
        if self.intercept is not None:
            self.intercept.data.copy_(tensors[self.call.intercept])

    def put_back(self) -> None:
        """Give it its own again."""
        self.weight.copy_(self.before[0])
        if self.intercept is not None and self.before[1] is not None:
            self.intercept.data.copy_(self.before[1])


class Block:
    """One group of one consumer while units leave.

    Args:
        h_DD: Second moment of what it reads.
        w_DO: Its weights.
        unit_D: The unit of each input, -1 for those that stay.
        ridge: Relative to the mean of the diagonal of `h_DD`.
        weight_O: What squared errors of the outputs are multiplied by.

    Attributes:
        seen_DO: Weights as they were when :meth:`remember` was called.
    """

    def __init__(self, h_DD: Tensor, w_DO: Tensor, unit_D: Labels, ridge: float, weight_O: Tensor) -> None:
        order = np.argsort(np.where(unit_D < 0, len(unit_D), unit_D), kind="stable")  # unit by unit, then the rest
        self.units = np.unique(unit_D[unit_D >= 0])
        self.width = int((unit_D >= 0).sum()) // len(self.units)
        self.columns = torch.from_numpy(order)
        self.w_DO = w_DO[self.columns]
        self.p_DD = torch.cholesky_inverse(damped_factor(h_DD[self.columns][:, self.columns][None], ridge)[0])
        self.shape, self.weight_O = w_DO.shape, weight_O
        self.seen_DO = w_DO

    def losses(self) -> Tensor:
        """What leaving of each unit that is left adds, shape (units left,)."""
        n, b = len(self.units), self.width
        p_Ubb = self.p_DD[: n * b, : n * b].reshape(n, b, n, b).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        w_UbO = self.w_DO[: n * b].reshape(n, b, -1)
        return (w_UbO * torch.linalg.solve(p_Ubb, w_UbO) * self.weight_O).sum((1, 2))

    def remove(self, leaving: Sequence[int]) -> float:
        """Let units leave together; what that adds."""
        gone = np.flatnonzero(np.isin(self.units, leaving))
        if not len(gone):
            return 0.0
        inputs = torch.from_numpy((gone[:, None] * self.width + np.arange(self.width)).ravel())
        stay = torch.ones(len(self.w_DO), dtype=torch.bool).index_fill_(0, inputs, False)
        p_gg, p_gD, w_gO = self.p_DD[inputs][:, inputs], self.p_DD[inputs][:, stay], self.w_DO[inputs]
        solved = torch.linalg.solve(p_gg, torch.cat([w_gO, p_gD], 1))
        o = w_gO.shape[1]
        self.w_DO = self.w_DO[stay] - p_gD.T @ solved[:, :o]
        self.p_DD = self.p_DD[stay][:, stay] - p_gD.T @ solved[:, o:]
        self.columns, self.units = self.columns[stay], np.delete(self.units, gone)
        return float((w_gO * solved[:, :o] * self.weight_O).sum())

    def remember(self) -> None:
        """Keep the weights as they are now."""
        self.seen_DO = self.now_DO()

    def now_DO(self) -> Tensor:
        """The weights as they are now, zero where inputs have left."""
        return self.w_DO.new_zeros(self.shape).index_copy_(0, self.columns, self.w_DO)


def eliminate(blocks: Sequence[Block], size: int, at_once: int = 1, remember: int = 0) -> tuple[Tensor, list[int]]:
    """Let all units of an axis leave, those that are missed least first.

    Args:
        blocks: Every group of every consumer of the axis.
        size: Units of the axis; those that no block reads cost nothing.
        at_once: So many leave together.
        remember: Number of units left at which blocks remember their weights.

    Returns:
        The loss with k units kept, float64, shape (size + 1,), and the units in the order in which they left.
    """
    left, order = np.arange(size), list[int]()
    known, losses = [size], [0.0]
    while len(left):
        added_U = np.zeros(size)
        for block in blocks:
            if len(block.units):
                added_U[block.units] += block.losses().numpy()
        count = min(at_once, len(left) - (remember if remember < len(left) else 0))
        leaving = left[np.argsort(added_U[left], kind="stable")[:count]]
        order += leaving.tolist()
        left = np.setdiff1d(left, leaving)
        known.append(len(left))
        losses.append(losses[-1] + sum(block.remove(leaving.tolist()) for block in blocks))
        if len(left) == remember:
            for block in blocks:
                block.remember()
    curve_K = np.interp(np.arange(size + 1), known[::-1], losses[::-1])
    return torch.from_numpy(curve_K), order
