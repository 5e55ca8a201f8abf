"""A trial cut of networks whose code cannot be replaced by its calls.

Such a network (it returns a cache, or branches on its input) can only be cut if its own code goes along with other
sizes. Some code does not: it computes a scale from a size, or holds a literal. So every free axis is cut by one unit,
on meta tensors, right after the trace; axes that the code does not follow are frozen, not refused in every plan.
"""

import re

import numpy as np
import torch
from torch import Tensor, nn

from metaprune.errors import UnsupportedModelError
from metaprune.graph.check import OtherCallsError
from metaprune.graph.layout import Layout, build_layout
from metaprune.graph.surgery import try_attributes
from metaprune.graph.trace import ExampleInputs
from metaprune.graph.twin import copy_with


def rehearsed(model: nn.Module, layout: Layout, example_inputs: ExampleInputs) -> Layout:
    """The layout with the axes frozen that the code of `model` does not follow; the same where it needs no code."""
    if not layout.trace.needs_code or layout.trace.value_dependent:
        return layout
    model = model if layout.trace.real else copy_with(model, _on_meta)[0]
    everything = [k for k, axis in enumerate(layout.axes) if axis.prunable and axis.size > 2]
    if not everything or not _refusal(model, layout, everything, example_inputs):
        return layout
    # Layers of one form behave alike, so axes are tried by their names without numbers.
    alike: dict[str, list[int]] = {}
    for k in everything:
        alike.setdefault(re.sub(r"\d+", "*", layout.axes[k].name), []).append(k)
    for group in alike.values():
        refusal = _refusal(model, layout, group, example_inputs)
        if refusal:
            units = np.flatnonzero(np.isin(layout.axis_of, group))
            layout.trace.units.freeze(units[:, None], refusal)
    return build_layout(layout.trace)


def _refusal(model: nn.Module, layout: Layout, axes: list[int], example_inputs: ExampleInputs) -> str:
    """Why the code cannot do without the last unit of each of these axes; empty where it can."""
    alive = layout.alive({k: np.arange(layout.axes[k].size - 1) for k in axes})
    try:
        try_attributes(model, layout, alive, example_inputs)
    except OtherCallsError:  # numbers may still agree
        return ""
    except UnsupportedModelError as error:
        return str(error).partition("\n")[0]
    return ""


def _on_meta(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():  # may hold positions, which the trace follows
        return tensor.detach().clone()
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta
