"""What a unit adds to the signal of a network, under the Gaussians that BatchNorm implies. No data.

Shapes: U units of an axis, N positions of a dimension, Z points at which the Gaussian is evaluated.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from metaprune.criteria._base import CRITERIA, Calibration, Criterion, Scores
from metaprune.errors import ConfigError
from metaprune.graph import Network
from metaprune.graph.reads import Read
from metaprune.graph.record import Op, Ref
from metaprune.graph.rules import find_rule
from metaprune.graph.rules.pointwise import pointwise, prelu

_NORMS = frozenset({"batch_norm", "native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training"})
# Calls behind which the values of a unit have nearly the distribution that they had before.
_CARRIES = frozenset(
    """view reshape flatten unflatten squeeze unsqueeze permute transpose contiguous clone detach alias dropout cat
    channel_shuffle slice pad constant_pad_nd mean avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d
    max_pool1d max_pool2d max_pool2d_with_indices adaptive_max_pool2d""".split()
)


_POINTS = torch.linspace(-8, 8, 2049, dtype=torch.float64)
_DENSITY = torch.softmax(-_POINTS.square() / 2, dim=0)  # the trapezoid rule, exact to 1e-5 also at a kink


@CRITERIA.register("gaussian")
@dataclass(frozen=True, kw_only=True)
class Gaussian(Criterion):
    """Standard deviation that a unit adds to the signal of the layers that read it, as BatchNorm predicts it.

    A channel that leaves a BatchNorm with weight `w` and bias `b` is taken for a Gaussian of mean `b` and standard
    deviation `|w|`. What its activation function makes of that is integrated numerically; each entry of a weight
    that reads it passes the standard deviation on, times the gain of the BatchNorm that follows::

        score(u)^2 = sum_{layers reading u} Var[f(b_u + |w_u| z)] * sum_o (gain_o * ||W_{o,u}||)^2,   z ~ N(0, 1)
        gain_o = |weight_o| / sqrt(running_var_o + eps), or 1 where no BatchNorm follows

    Averages and maxima over places are taken for the value itself. Axes whose units are added to others before they
    are read (residual streams), multiplied by others (gates), or met by no BatchNorm are left out, and kept.

    Source: own. The rectified Gaussian as in Arpit et al., Normalization Propagation, ICML 2016, arXiv:1603.01431;
    scales of BatchNorm as worth as in Liu et al., Network Slimming, ICCV 2017, arXiv:1708.06519.
    """

    def _score(self, network: Network, calibration: Calibration) -> Scores:
        signal = _Signal(network)
        scores = {}
        for axis in network.axes:
            reads = network.reads[axis.name]
            added = [signal.added(read) for read in reads if axis.prunable]
            known = [energy_U for energy_U in added if energy_U is not None]
            if known and len(known) == len(reads) and {read.binding for read in reads} == set(axis.consumers):
                scores[axis.name] = torch.stack(known).sum(0).sqrt()
        if not scores:
            raise ConfigError(
                "criterion 'gaussian' needs channels that go from a BatchNorm through an activation to the layers that "
                "read them, but this network has none that may be cut. Take 'l2', or 'taylor' with data."
            )
        return scores


class _Signal:
    """Follows the units of a network back to the BatchNorm that they come from."""

    def __init__(self, network: Network) -> None:
        self.network, self.trace = network, network.layout.trace
        self.maker = {number: op for op in self.trace.ops for number in op.outputs}
        self.norm_after = {op.inputs[0]: op for op in self.trace.ops if op.name in _NORMS}
        self.names = {value.index: name for name, value in self.trace.parameters.items()}

    def added(self, read: Read) -> Tensor | None:
        """Energy (variance) that each unit adds to what one layer puts out, shape (U,); None where it is not known."""
        variance_N = self._variance(read)
        if variance_N is None:
            return None
        name, _ = read.binding
        weight = self.network.weights[name].detach().double().cpu()
        energy = (weight * self._gain(read.op, weight)).square() * read.along(variance_N, weight.shape)
        sums = self.network.sum_over_units({name: energy})[read.axis]
        return next(entry.total_U for entry in sums if entry.binding == read.binding)

    def _gain(self, op: Op, weight: Tensor) -> Tensor:
        """By how much the BatchNorm behind a layer scales its outputs, in a shape that multiplies the weight."""
        norm = self.norm_after.get(op.outputs[0])
        if norm is None or not ("conv" in op.name or op.name == "linear"):
            return torch.ones(())
        gain_O = self._parameter(norm, "weight", 1.0).abs()
        gain_O = gain_O / (self._parameter(norm, "running_var", 1.0) + norm.constants["eps", None]).sqrt()
        rest = [1] * (weight.ndim - 2)
        if "transpose" in op.name or op.constants.get(("transposed", None)):
            groups = op.constants.get(("groups", None), 1)
            return gain_O.view(groups, 1, -1).expand(-1, len(weight) // groups, -1).reshape(*weight.shape[:2], *rest)
        return gain_O.view(-1, 1, *rest)

    def _variance(self, read: Read) -> Tensor | None:
        """Variance along the dimension in which a layer finds the units of an axis; zero for those of others."""
        number = read.value
        steps: list[Op] = []
        while (op := self.maker.get(number)) is not None and op.name not in _NORMS:
            before = self._carried(op, read.axis)
            if before is None:
                return None
            steps.append(op)
            number = before
        if op is None:
            return None
        law_ZN = self._parameter(op, "bias", 0.0) + self._parameter(op, "weight", 1.0).abs() * _POINTS[:, None]
        for step in reversed(steps):
            law_ZN = law_ZN if step.name in _CARRIES else self._replay(step, law_ZN)
        variance_N = _DENSITY @ (law_ZN - _DENSITY @ law_ZN).square()
        known = dict(zip(self._labels(op.outputs[0], 1), variance_N.tolist(), strict=True))
        here = [known.get(labels, 0.0) for labels in self._labels(read.value, read.at)]
        return torch.tensor(here, dtype=torch.float64)

    def _labels(self, number: int, at: int) -> list[frozenset[int]]:
        """The units that each position along a dimension needs."""
        rows = self.network.layout.resolve(self.trace.values[number].dims[at])
        return [] if rows is None else [frozenset(row) - {0} for row in rows.tolist()]

    def _carried(self, op: Op, axis: str) -> int | None:
        """The operand whose units are those of the result, changed one by one or moved; None if they are mixed."""
        operands = [number for number in op.inputs if number not in self.names]
        sizes = {prod(self.network.shapes[self.names[number]]) for number in op.inputs if number in self.names}
        if op.name == "cat":
            operands = [number for number in operands if self._holds(number, axis)]
        alone = op.name in _CARRIES or find_rule(op.func) in (pointwise, prelu)
        fits = sizes <= {1, self.trace.values[op.outputs[0]].dims[1].size}
        return operands[0] if alone and fits and len(operands) == 1 else None

    def _holds(self, number: int, axis: str) -> bool:
        index, layout = self.network.index(axis), self.network.layout
        return any(layout.units_along(dim, index) is not None for dim in self.trace.values[number].dims)

    def _replay(self, op: Op, law_ZN: Tensor) -> Tensor:
        """The call on the points of the distributions; parameters have one number for all channels, or one each."""

        def operand(item: object) -> object:
            if not isinstance(item, Ref):
                return item
            name = self.names.get(item.number)
            return law_ZN if name is None else self.network.weights[name].detach().double().cpu().view(-1)

        out: Tensor = op.func(**{name: operand(item) for name, item in op.arguments.items()})
        return out

    def _parameter(self, norm: Op, argument: str, default: float) -> Tensor:
        """A parameter or statistic of a BatchNorm, one entry a channel, float64."""
        ref = norm.arguments[argument]
        if ref is None:
            return torch.full((self.trace.values[norm.outputs[0]].dims[1].size,), default, dtype=torch.float64)
        return self.network.weights[self.names[ref.number]].detach().double().cpu()
