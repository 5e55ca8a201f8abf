"""Recurrent layers, each one call: all gates of a hidden unit are one unit, in every layer and direction."""

from metaprune.graph.axes import Dim
from metaprune.graph.dispatch import Call
from metaprune.graph.record import Dims, tensors_in
from metaprune.graph.rules._base import fixed, not_zero, rule, with_zero

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule(*_GATES)
def recurrent(call: Call) -> list[Dims]:
    """x (T, B, I) or, batch first, (B, T, I) -> (T, B, D H) and the last states (layers D, B, H).

    One hidden axis serves all layers and directions, because the module has one hidden size.
    """
    if "data" in call.arguments:  # packed sequences
        return _packed(call)
    x = call.dims(call["input"])
    gates = _GATES[call.op.name]
    states = list(call["hx"]) if isinstance(call["hx"], (list, tuple)) else [call["hx"]]
    params = list(call["params"])
    directions = 2 if call["bidirectional"] else 1
    cells = call["num_layers"] * directions
    each = len(params) // cells
    projected = each in (3, 5)
    hidden = call.units.dim(call.dims(params[1])[0].size // gates)
    out = call.units.dim(call.dims(params[1])[1].size) if projected else hidden
    steps, batch = (x[1], x[0]) if call["batch_first"] else (x[0], x[1])
    call.freeze(steps, reason=f"steps follow one another in {call.where}")
    below = x[2]
    for layer in range(call["num_layers"]):
        for direction in range(directions):
            cell = params[each * (layer * directions + direction) :][:each]
            w_ih, w_hh = call.dims(cell[0]), call.dims(cell[1])
            stacked = call.units.concat([hidden] * gates)
            for rows in (w_ih[0], w_hh[0], *(call.dims(bias)[0] for bias in cell[2:4] if bias.ndim == 1)):
                call.unify(stacked, rows)
            call.unify(below, w_ih[1])
            call.unify(out, w_hh[1])
            call.consumes(cell[0], 1)
            call.consumes(cell[1], 1)
            if projected:
                w_hr = call.dims(cell[-1])
                call.unify(out, w_hr[0])
                call.unify(hidden, w_hr[1])
                call.consumes(cell[-1], 1)
                call.macs(steps, batch, *w_hr)
            call.macs(steps, batch, *w_ih)
            call.macs(steps, batch, *w_hh)
        call.sum_over(below)
        below = call.units.concat([out] * directions)
    call.unify(out, call.dims(states[0])[-1])
    if len(states) > 1:
        call.unify(hidden, call.dims(states[1])[-1])
    zero = all(call.dims(state)[-1].zero for state in states)
    call.units.hint(hidden, "hidden")
    call.units.hint(out, "hidden")
    call.freeze(*call.dims(states[0])[:-1], reason=f"layers and batch of {call.where}")
    last = fixed(states[0].shape[:-1])
    tails = [with_zero(out, zero), with_zero(hidden, zero)][: len(tensors_in(call.out)) - 1]
    return [(*not_zero(x[:2]), with_zero(below, zero)), *((*last, tail) for tail in tails)]


def _packed(call: Call) -> list[Dims]:
    """Packed sequences: the data (total steps, I) have no time dimension to follow, so all stay."""
    for tensor in tensors_in(list(call.arguments.values())):
        call.freeze(*call.dims(tensor), reason=f"packed sequences in {call.where}")
    for weight in call["params"]:
        if weight.ndim == 2:
            call.macs(Dim(len(call["data"])), *call.dims(weight))
    return [fixed(tensor.shape) for tensor in tensors_in(call.out)]
