"""Recurrent layers by least squares, gate by gate.

Before their activations the gates of a cell are linear in what it reads and in its last state: z = x W' + b + h V' + c.
What is left of them is to be what it is in the dense network, where x is what the cut network reads, healed before it,
and h what is left of the dense network's states (teacher forcing: Williams and Zipser, A Learning Algorithm for
Continually Running Fully Recurrent Neural Networks, Neural Computation 1989), so that steps do not wait for one
another and each cell has a closed form. In a GRU the reset gate stands between h V' + c and the rest of the new state,
whose two parts are fitted apart.

Packed sequences and projected states are left as they are.

Tensor suffixes: T steps, N samples, B rows (steps and samples), I inputs, H hidden units, Z rows of the gates.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metaprune.graph.axes import Alive
from metaprune.graph.layout import Layout
from metaprune.graph.linear_calls import own_parameters
from metaprune.graph.record import Op, Ref
from metaprune.graph.rules.recurrent import GATES
from metaprune.graph.stepping import Pending
from metaprune.recovery._least_squares import Rows, Sums


@dataclass(frozen=True, eq=False)
class Cell:
    """One layer in one direction, as the cut network has it.

    Attributes:
        weights: Of inputs (Z, I) and of states (Z, H).
        biases: Likewise, (Z,) each; None where there are none, or they must stay.
        fixed: The weights must stay.
        kept_Z: Which rows of the dense gates are left.
        kept_H: Which states.
    """

    weights: tuple[Tensor, Tensor]
    biases: tuple[Tensor, Tensor] | None
    fixed: bool
    kept_Z: Tensor
    kept_H: Tensor


@dataclass(frozen=True, eq=False)
class RecurrentFit:
    """A call of a recurrent layer whose weights are fitted.

    Attributes:
        stop: The call.
        cells: By layer, then by direction.
    """

    stop: Op
    cells: tuple[tuple[Cell, ...], ...]

    @property
    def number(self) -> int:
        """Of the call."""
        return self.stop.index

    def heal(
        self,
        calls: Sequence[tuple[Pending, Pending]],
        rows: int,
        ridge: float,
        only_bias: bool,
        generator: torch.Generator,
    ) -> None:
        """Fit layer after layer.

        Args:
            calls: By batch: that of the dense and that of the cut network, about to be made.
            rows: Most rows of a batch that are looked at.
            ridge: Strength of the ridge relative to the mean square of the inputs.
            only_bias: Change no weights.
            generator: Draws rows.
        """
        read = [(dense.arguments["input"], slim.arguments["input"]) for dense, slim in calls]
        for layer, cells in enumerate(self.cells):
            made = [_run(dense, layer, x_) for (dense, _), (x_, _) in zip(calls, read)]
            for direction, cell in enumerate(cells):
                parts = [
                    _Gates.of(dense, layer, direction, cell, xs, out, rows, generator)
                    for (dense, _), xs, out in zip(calls, read, made)
                ]
                for columns, sources in _blocks(self.stop.name, len(cell.kept_H)):
                    _fit(cell, parts, columns, sources, ridge, only_bias)
            if layer + 1 < len(self.cells):
                read = [(out, _run(slim, layer, x_)) for (_, slim), (_, x_), out in zip(calls, read, made)]


@dataclass(frozen=True, eq=False)
class _Gates:
    """What the gates of a cell are made from, in some rows of a batch, and what they are to be.

    Attributes:
        read: Inputs of the cut network (B, I), and what is left of the dense states before each step (B, H).
        wanted: What each of them adds to what is left of the dense gates, (B, Z).
    """

    read: tuple[Tensor, Tensor]
    wanted: tuple[Tensor, Tensor]

    @classmethod
    def of(
        cls,
        dense: Pending,
        layer: int,
        direction: int,
        cell: Cell,
        xs: tuple[Tensor, Tensor],
        out: Tensor,
        rows: int,
        generator: torch.Generator,
    ) -> "_Gates":
        """Of one batch; `xs` is what the dense and the cut layer read, `out` what the dense one gives."""
        arguments = dense.arguments
        hidden = arguments["params"][1].shape[1]
        states = out[..., direction * hidden : (direction + 1) * hidden]
        time = 1 if arguments["batch_first"] else 0
        first = _states(arguments, layer)[0][direction].unsqueeze(time).to(states.dtype)
        steps = states.shape[time]
        rest = states.narrow(time, 0, steps - 1) if direction == 0 else states.narrow(time, 1, steps - 1)
        before = torch.cat([first, rest] if direction == 0 else [rest, first], time)
        x_BI, slim_BI, h_BH = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (*xs, before))
        if len(x_BI) > rows:
            chosen = torch.randperm(len(x_BI), generator=generator)[: max(1, rows)].to(x_BI.device)
            x_BI, slim_BI, h_BH = x_BI[chosen], slim_BI[chosen], h_BH[chosen]
        params = _cell_params(arguments, layer, direction)
        wanted = []
        for k, read in enumerate((x_BI, h_BH)):
            gates_BZ = read @ params[k].T + (params[2 + k] if len(params) == 4 else 0)
            wanted.append(gates_BZ[:, cell.kept_Z])
        return cls((slim_BI, h_BH[:, cell.kept_H]), (wanted[0], wanted[1]))


def _fit(
    cell: Cell, parts: Sequence[_Gates], columns: slice, sources: Sequence[int], ridge: float, only_bias: bool
) -> None:
    """New weights for some rows of the gates, from inputs (0), states (1) or both."""
    found = []
    for part in parts:
        present = torch.stack([part.read[k] @ cell.weights[k][columns].T for k in sources]).sum(0)
        if cell.biases is not None:
            present = present + torch.stack([cell.biases[k][columns] for k in sources]).sum(0)
        wanted = torch.stack([part.wanted[k][:, columns] for k in sources]).sum(0)
        found.append(Rows(torch.cat([part.read[k] for k in sources], 1)[None], present[None], wanted[None], None))
    sums = Sums(found, centred=cell.biases is not None)
    if not sums.look(relaxed=False):
        return
    change_GDO, shift_GO = sums.solved(ridge, only_bias or cell.fixed)
    widths = [cell.weights[k].shape[1] for k in sources]
    for k, change_DO in zip(sources, change_GDO[0].split(widths)):
        cell.weights[k].data[columns] += change_DO.T.to(cell.weights[k].dtype)
    if cell.biases is not None:
        bias = cell.biases[sources[0]]
        bias.data[columns] += shift_GO[0].to(bias.dtype)


def _blocks(name: str, hidden: int) -> list[tuple[slice, tuple[int, ...]]]:
    """Which rows of the gates are fitted together, and from what."""
    if name != "gru":
        return [(slice(None), (0, 1))]
    new = slice(2 * hidden, None)
    return [(slice(2 * hidden), (0, 1)), (new, (0,)), (new, (1,))]


def _run(call: Pending, layer: int, x: Tensor) -> Tensor:
    """What one layer of a call gives, both directions side by side."""
    arguments = call.arguments
    states = _states(arguments, layer)
    params = [tensor for d in range(_directions(arguments)) for tensor in _cell_params(arguments, layer, d)]
    hx = states if isinstance(arguments["hx"], (list, tuple)) else states[0]
    out: Tensor = call.make(input=x, hx=hx, params=params, num_layers=1, dropout=0.0)[0]
    return out


def _directions(arguments: Mapping[str, Any]) -> int:
    return 2 if arguments["bidirectional"] else 1


def _states(arguments: Mapping[str, Any], layer: int) -> list[Tensor]:
    """First states of a layer, (directions, N, H) each."""
    hx, directions = arguments["hx"], _directions(arguments)
    every = list(hx) if isinstance(hx, (list, tuple)) else [hx]
    return [state[layer * directions : (layer + 1) * directions] for state in every]


def _cell_params(arguments: Mapping[str, Any], layer: int, direction: int) -> list[Tensor]:
    params, directions = list(arguments["params"]), _directions(arguments)
    each = len(params) // (arguments["num_layers"] * directions)
    start = each * (layer * directions + direction)
    return params[start : start + each]


def recurrent_fits(
    layout: Layout, alive: Alive, own: Mapping[str, Tensor], masked: Collection[str] = ()
) -> Iterator[RecurrentFit]:
    """Every recurrent call of a cut network whose parameters nothing else reads.

    Args:
        layout: Of the dense network.
        alive: What is left of it.
        own: Tensors of the cut network.
        masked: Names of weights that must stay.
    """
    trace, names = layout.trace, own_parameters(layout.trace)
    for op in trace.ops:
        if op.name not in GATES or "data" in op.arguments:
            continue
        refs = op.arguments["params"]
        numbers = [ref.number for ref in refs if isinstance(ref, Ref)]
        constants = {name: op.constants.get((name, None), 0) for name in ("num_layers", "bidirectional")}
        layers, directions = int(constants["num_layers"]), 1 + bool(constants["bidirectional"])
        each = len(refs) // (layers * directions)
        if len(numbers) < len(refs) or not all(number in names for number in numbers) or each not in (2, 4):
            continue

        def cell(start: int, numbers: Sequence[int] = numbers, each: int = each, gates: int = GATES[op.name]) -> Cell:
            titles = [names[number] for number in numbers[start : start + each]]
            tensors = [own[title] for title in titles]
            states = trace.values[numbers[start + 1]].dims[1]
            kept = layout.kept(states, alive)
            kept_H = torch.arange(states.size) if kept is None else torch.from_numpy(kept.nonzero()[0])
            kept_Z = torch.cat([gate * states.size + kept_H for gate in range(gates)])
            free = [isinstance(tensor, nn.Parameter) and tensor.requires_grad for tensor in tensors]
            fixed = not all(free[:2]) or any(title in masked for title in titles[:2])
            biases = (tensors[2], tensors[3]) if each == 4 and all(free[2:]) else None
            return Cell((tensors[0], tensors[1]), biases, fixed, kept_Z, kept_H)

        cells = tuple(
            tuple(cell(each * (layer * directions + direction)) for direction in range(directions))
            for layer in range(layers)
        )
        if any(not one.fixed or one.biases is not None for layer_cells in cells for one in layer_cells):
            yield RecurrentFit(op, cells)
