"""Recurrent layers, each one call: all gates of a hidden unit are one unit, in every layer and direction."""

from metaprune.graph.axes import Dim
from metaprune.graph.dispatch import Call
from metaprune.graph.record import Dims, tensors_in
from metaprune.graph.rules._base import fixed, not_zero, rule, with_zero

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}  # of one hidden unit


@rule(*GATES)
def recurrent(call: Call) -> list[Dims]:
    """x (T, B, I), batch first (B, T, I), or packed (all steps, I) -> (..., D H) and the last states (layers D, B, H).

    One hidden axis serves all layers and directions, because the module has one hidden size.
    """
    packed = "data" in call.arguments
    *places, below = call.dims(call["data" if packed else "input"])
    gates = GATES[call.op.name]
    states = list(call["hx"]) if isinstance(call["hx"], (list, tuple)) else [call["hx"]]
    params = list(call["params"])
    directions = 2 if call["bidirectional"] else 1
    cells = call["num_layers"] * directions
    each = len(params) // cells
    projected = each in (3, 5)
    hidden = call.units.dim(call.dims(params[1])[0].size // gates)
    out = call.units.dim(call.dims(params[1])[1].size) if projected else hidden
    steps = places[0] if packed or not call["batch_first"] else places[1]
    call.freeze(steps, reason=f"steps follow one another in {call.where}")
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
                call.macs(*places, *w_hr)
            call.macs(*places, *w_ih)
            call.macs(*places, *w_hh)
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
    return [(*not_zero(places), with_zero(below, zero)), *((*last, tail) for tail in tails)]


@rule("_pack_padded_sequence")
def pack(call: Call) -> list[Dims]:
    """x (T, B, ...), or batch first, with the length of each sequence -> (all steps, ...) and how many run at each."""
    steps, batch, *rest = call.dims(call["input"])
    call.freeze(steps, batch, reason=f"sequences are packed in {call.where}")
    data, sizes = tensors_in(call.out)
    return [(Dim(len(data)), *rest), fixed(sizes.shape)]
