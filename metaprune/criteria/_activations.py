"""What layers read: the values of units on calibration data.

Array suffixes: N positions along the dimension that holds the units, P places and samples, U units; for calls as in
:mod:`metaprune.graph.linear_calls`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metaprune.criteria._base import Calibration
from metaprune.criteria._gradients import groups_of, samples_in
from metaprune.graph import Entries, Network
from metaprune.graph.linear_calls import LinearCall
from metaprune.graph.lockstep import watching
from metaprune.graph.reads import Read
from metaprune.graph.record import Op
from metaprune.graph.stepping import Pending, side_by_side
from metaprune.modes import evaluating
from metaprune.task import on_calibration_data

ROWS = 4096  # of what a call reads, worked on at once


def judged_reads(network: Network) -> dict[str, tuple[Read, ...]]:
    """The layers that read each prunable axis; axes that none reads are left out."""
    return {axis.name: network.reads[axis.name] for axis in network.axes if axis.prunable and network.reads[axis.name]}


def watch_reads(
    network: Network,
    calibration: Calibration,
    reads: Iterable[Read],
    visit: Callable[[Read, Tensor], None],
    samples: int | None = None,
) -> int:
    """Run the network on the calibration data and show what its layers read.

    Args:
        network: The network.
        calibration: Gives the data.
        reads: What to show.
        visit: Gets each of them and the values, the units along the last dimension, in the type of the network.
        samples: Run on the first so many; None for all.

    Returns:
        How many samples were seen.

    Raises:
        InputError: The network does not run on the data.
    """
    assert calibration.batches is not None
    by_call: dict[int, list[Read]] = {}
    for read in reads:
        by_call.setdefault(read.op.index, []).append(read)

    def show(op: Op, tensors: Mapping[int, Tensor]) -> None:
        for read in by_call[op.index]:
            visit(read, tensors[read.value].movedim(read.at, -1))

    seen = 0
    with evaluating(network.model):
        for batch in groups_of(calibration.batches(), 1 << 30, samples):
            with watching(network.layout.trace, set(by_call), show):
                outputs_of(network, calibration, batch)
            seen += next(len(item) for item in batch if isinstance(item, Tensor))
    return seen


def outputs_of(network: Network, calibration: Calibration, batch: Any, model: Any = None) -> Any:
    """What the network, or `model` in its place, makes of a batch.

    Raises:
        InputError: It does not run.
    """
    model = network.model if model is None else model
    with on_calibration_data():
        return model(batch[0]) if calibration.task is None else calibration.task.outputs(model, batch)


def watch_calls(
    network: Network,
    calibration: Calibration,
    batches: Sequence[Any],
    calls: Mapping[int, LinearCall],
    visit: Callable[[LinearCall, Mapping[str, Any], Tensor], None],
    model: Any = None,
) -> None:
    """Run the network on batches and show its linear calls.

    Args:
        network: The network.
        calibration: Whose task says how it is run.
        batches: What on.
        calls: What to show, by the index of the call.
        visit: Gets each of them, its arguments by name, and its result.
        model: A copy of the network to run in its place.
    """

    def watch(pending: Pending, out: Any) -> None:
        if pending.op is not None and pending.op.index in calls:
            visit(calls[pending.op.index], pending.arguments, out)

    with evaluating(network.model if model is None else model), torch.no_grad():
        for batch in batches:
            forward = partial(outputs_of, network, calibration, batch, model)
            with on_calibration_data(), side_by_side([forward], network.layout.trace) as (run,):
                run.run_until(None, watch)


def entry_norms(entries: Entries, calibration: Calibration) -> dict[str, Tensor]:
    """What each entry of a weight is multiplied by, as a norm over all places, root mean square over samples.

    Weights that no call has for itself (of recurrent layers, tied ones) are left out.

    Returns:
        By weight, something that its shape can be multiplied by, float64.
    """
    assert calibration.batches is not None
    named = {name: call for name, call in entries.network.linear_calls.items() if name in entries.names}
    energy: dict[str, Tensor] = {}

    def add(call: LinearCall, arguments: Mapping[str, Any], out: Tensor) -> None:
        for chosen in torch.arange(call.count(out), device=out.device).split(ROWS):
            square_GD = call.rows(arguments, chosen).double().square().sum(1).cpu()
            energy[call.weight] = energy.get(call.weight, 0) + square_GD

    batches = list(calibration.batches())
    watch_calls(entries.network, calibration, batches, {call.op.index: call for call in named.values()}, add)
    samples = sum(map(samples_in, batches))
    return {
        name: in_weight_shape(named[name], (square_GD / samples).sqrt()[:, :, None], entries.shapes[name])
        for name, square_GD in energy.items()
    }


def in_weight_shape(call: LinearCall, matrix_GDO: Tensor, shape: Sequence[int]) -> Tensor:
    """Something about each entry of the matrix of a call, in the shape of its weight; one column serves all outputs."""
    groups = len(matrix_GDO)
    outputs = call.matrix(torch.empty(shape, device="meta"), groups).shape[2]
    return call.weight_of(matrix_GDO.expand(-1, -1, outputs), torch.Size(shape))


@dataclass
class Moments:
    """Mean and variance of each position, pooled over batches in float64.

    Attributes:
        count: Values seen at each position.
        mean_N: Their mean.
        m2_N: Sum of their squared distances from it.
    """

    count: int = 0
    mean_N: Tensor = field(default_factory=lambda: torch.zeros(()))
    m2_N: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, x_PN: Tensor) -> None:
        """Pool with more values. Source: Chan, Golub and LeVeque, Updating Formulae, 1979, equation 2.1."""
        x_PN = x_PN.double().cpu()
        total, mean_N = self.count + len(x_PN), x_PN.mean(0)
        shift_N = mean_N - self.mean_N
        self.mean_N = self.mean_N + shift_N * (len(x_PN) / total)
        spread_N = (x_PN - mean_N).square().sum(0)
        self.m2_N = self.m2_N + spread_N + shift_N.square() * (self.count * len(x_PN) / total)
        self.count = total

    @property
    def energy_N(self) -> Tensor:
        """Sum of squares."""
        return self.m2_N + self.count * self.mean_N.square()

    @property
    def variance_N(self) -> Tensor:
        """Variance around the mean, divided by the count."""
        return self.m2_N / max(self.count, 1)


def read_moments(network: Network, calibration: Calibration, reads: Iterable[Read]) -> tuple[dict[Read, Moments], int]:
    """Moments of what each layer reads, and the number of samples that they are of. Arguments as :func:`watch_reads`.

    A tensor that several layers read is looked at once.
    """
    moments: dict[tuple[int, int], Moments] = {}
    first: dict[tuple[int, int], Read] = {}
    reads = list(reads)
    for read in reads:
        first.setdefault((read.value, read.at), read)

    def add(read: Read, x: Tensor) -> None:
        moments.setdefault((read.value, read.at), Moments()).add(x.reshape(-1, x.shape[-1]))

    samples = watch_reads(network, calibration, first.values(), add)
    return {read: moments[read.value, read.at] for read in reads}, samples


def over_units(network: Network, read: Read, weighed: Tensor) -> Tensor:
    """Sums of the entries of a tensor in the shape of the weight that reads the units, unit by unit; shape (U,)."""
    sums = network.sum_over_units({read.binding[0]: weighed})[read.axis]
    return next(entry.total_U for entry in sums if entry.binding == read.binding)


def weighed_norm(network: Network, read: Read, norm_N: Tensor) -> Tensor:
    """Sum of |weight| times a number of each position that it reads, shape (U,)."""
    weight = network.weights[read.binding[0]].detach().double().cpu().abs()
    return over_units(network, read, weight * read.along(norm_N, weight.shape))


def relative_mean(parts: list[Tensor]) -> Tensor:
    """The mean of scores that were made relative to their means, shape (U,)."""
    return torch.stack([part_U / part_U.mean().clamp_min(1e-300) for part_U in parts]).mean(0)
