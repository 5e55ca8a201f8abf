"""Cutting: slice the tensors, bring the sizes that code reads in step, and check the result by tracing it again.

The given model is never changed. There are two ways:

* *attributes*: a copy of the model with sliced parameters and buffers, in which plain integer attributes that reach
  size arguments of calls (``num_heads`` in a view, ``groups`` in a convolution, split sizes, pads) get the number of
  positions that are left;
* *graph*, where code holds a size in no attribute (a literal, a closure, a number it computes): the recorded calls as
  an :class:`torch.fx.GraphModule` with new sizes (:mod:`metaprune.graph.rewrite`).

Either result is traced and must make the same calls as the dense network with exactly the predicted sizes
(:mod:`metaprune.graph.check`), else it is not handed out.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from metaprune.errors import UnsupportedModelError
from metaprune.graph.absent import put_in_place
from metaprune.graph.adapt import adapt
from metaprune.graph.attributes import new_attributes, set_attributes
from metaprune.graph.axes import Alive, Labels
from metaprune.graph.blocks import live_part
from metaprune.graph.check import OtherCallsError, check_calls
from metaprune.graph.layout import Layout
from metaprune.graph.record import Trace, Value
from metaprune.graph.rewrite import rewritten
from metaprune.graph.rules import find_rule
from metaprune.graph.trace import ExampleInputs, trace_model
from metaprune.graph.twin import copy_with, named_tensors


@dataclass(frozen=True)
class Cut:
    """A cut network and how it was made.

    Attributes:
        module: The network.
        way: ``attributes`` (an instance of the model's own class) or ``graph`` (a ``torch.fx.GraphModule``).
        reason: Why not by attributes, where it was not; or why its calls could not be compared.
        checked: Its calls were compared with those of the dense network one by one.
    """

    module: nn.Module
    way: str
    reason: str = ""
    checked: bool = True

    def to_json(self) -> dict[str, Any]:
        """How it was made, as plain data."""
        return {"way": self.way, "reason": self.reason, "checked": self.checked}


def cut(
    model: nn.Module, layout: Layout, alive: Alive, example_inputs: ExampleInputs, tensors: Mapping[str, Tensor]
) -> Cut:
    """A smaller copy of the model.

    Args:
        model: The dense network; not changed.
        layout: Its axes.
        alive: Which units stay.
        example_inputs: What it was traced with.
        tensors: New values, in dense shape, for some parameters and buffers.

    Raises:
        UnsupportedModelError: Neither way gives the network; says why.
    """
    try:
        slim = _with_sizes(model, layout, alive, tensors)
        if layout.trace.value_dependent:  # other values may take another way: numbers decide, see Network.cut
            return Cut(slim, "attributes", checked=False)
        _check(slim, layout, alive, example_inputs, by_module=True)
        return Cut(slim, "attributes")
    except OtherCallsError as error:
        if layout.trace.needs_code and not any(tensor.is_meta for tensor in named_tensors(model).values()):
            return Cut(slim, "attributes", str(error), checked=False)
        reason = str(error)
    except UnsupportedModelError as error:
        reason = str(error)
    if layout.trace.needs_code:
        raise UnsupportedModelError(
            f"{reason} The calls cannot be rewritten either, because {layout.trace.needs_code}."
        )
    try:
        parts = sliced_copy(model, layout, alive, tensors)
        slim, same_calls = rewritten(model, parts, layout, alive, example_inputs)
        _set_standard_attributes(slim)
        if same_calls:
            _check(slim, layout, alive, example_inputs, by_module=False)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{reason} Rewriting the calls failed too: {error}") from error
    return Cut(slim, "graph", reason, checked=same_calls)


def try_attributes(model: nn.Module, layout: Layout, alive: Alive, example_inputs: ExampleInputs) -> None:
    """See whether the code of a model goes along with a cut.

    Raises:
        UnsupportedModelError: It does not; says why.
    """
    _check(_with_sizes(model, layout, alive, {}), layout, alive, example_inputs, by_module=True)


def _with_sizes(model: nn.Module, layout: Layout, alive: Alive, tensors: Mapping[str, Tensor]) -> nn.Module:
    slim = sliced_copy(model, layout, alive, tensors)
    set_attributes(slim, new_attributes(slim, layout, alive, (*layout.trace.ops, *layout.trace.further_ops)))
    _set_standard_attributes(slim)
    return slim


def _check(slim: nn.Module, layout: Layout, alive: Alive, example_inputs: ExampleInputs, *, by_module: bool) -> None:
    trace = trace_model(slim, example_inputs, find_rule, real=layout.trace.real)
    if layout.trace.dropped:  # code around a branch may go on making calls that nothing comes of
        trace, layout = live_part(trace), replace(layout, trace=live_part(layout.trace))
    check_calls(layout, alive, trace, by_module=by_module)


def sliced_copy(model: nn.Module, layout: Layout, alive: Alive, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model with sliced parameters and buffers, and nothing else changed. Tied tensors stay tied."""
    originals = named_tensors(model)
    lookups = _lookups(layout)
    sliced: dict[int, Tensor] = {}
    for name, value in layout.trace.parameters.items():
        original = originals[name]
        data = tensors.get(name, original).detach().to(original.device, original.dtype)
        left = _ranked(layout, alive, lookups.get(value.index), entries_left(layout, alive, value, data))
        sliced[id(original)] = like(original, data.clone() if left is data else left)
    module, _ = copy_with(model, lambda tensor: sliced.get(id(tensor), tensor.detach().clone()))
    if layout.trace.dropped:
        _leave(module, layout.trace)
    return adapt(module, changed_only=True)


def _leave(model: nn.Module, trace: Trace) -> None:
    """Take residual branches out of a model, in place: their modules and parameters, and their numbers in caches."""
    _renumber_layers(model, trace.gone)
    for path, call in trace.gone.items():
        put_in_place(model, path, call.result)
    for name in {name: None for block in trace.dropped for name in block.parameters}:
        path, _, leaf = name.rpartition(".")
        if not any(f"{name}.".startswith(f"{module}.") for module in trace.gone):
            setattr(model.get_submodule(path), leaf, None)


def _renumber_layers(model: nn.Module, gone: Collection[str]) -> None:
    """Close the gaps that modules which leave make in `layer_idx`, the place of a layer in a cache.

    A cache asks its first layer how long it is, so one that nothing fills would give wrong positions. Where places
    are of several types (``layer_types`` of the configuration), layers move among those of their own.

    Raises:
        UnsupportedModelError: Nothing would be left in the first place.
    """
    rows: dict[tuple[str, Any], list[tuple[int, bool, nn.Module]]] = {}
    for path, module in model.named_modules():
        place = vars(module).get("layer_idx")
        if type(place) is int:
            types = getattr(vars(module).get("config"), "layer_types", None) or ()
            row = (re.sub(r"\b\d+\b", "*", path), types[place] if place < len(types) else None)
            leaves = any(f"{path}.".startswith(f"{part}.") for part in gone)
            rows.setdefault(row, []).append((place, leaves, module))
    for (role, _), layers in rows.items():
        places = sorted(place for place, _, _ in layers)
        staying = [module for _, leaves, module in sorted(layers, key=lambda layer: layer[0]) if not leaves]
        first = min(place for (other, _), group in rows.items() if other == role for place, _, _ in group)
        if not staying and first in places:
            raise UnsupportedModelError(
                f"some layer must be in place {first} of the cache, which gives it its length, but all of {role!r} "
                "that could be would leave. Keep one of them."
            )
        for place, module in zip(places, staying):
            vars(module)["layer_idx"] = place


def entries_left(layout: Layout, alive: Alive, value: Value, data: Tensor) -> Tensor:
    """What is left of a tensor in the shape of a parameter or buffer; the tensor itself where all is."""
    for k, dim in enumerate(value.dims):
        kept = layout.kept(dim, alive)
        if kept is not None and not kept.all():
            data = data.index_select(k, torch.from_numpy(kept.nonzero()[0]).to(data.device))
    return data


def numbers_left(layout: Layout, alive: Alive, name: str, data: Tensor) -> Tensor:
    """A parameter or buffer, by its first name, as it is in the cut network."""
    value = layout.trace.parameters[name]
    return _ranked(layout, alive, _lookups(layout).get(value.index), entries_left(layout, alive, value, data))


def _lookups(layout: Layout) -> dict[int, Labels]:
    return {lookup.number: lookup.labels_NK for op in layout.trace.ops for lookup in op.lookups}


def _ranked(layout: Layout, alive: Alive, labels_NK: Labels | None, data: Tensor) -> Tensor:
    """Positions of a dimension as positions among those that are left."""
    if labels_NK is None:
        return data
    ranks = layout.ranks(labels_NK, alive, data.long().cpu().numpy())
    return torch.from_numpy(ranks).to(data.device, data.dtype)


def bias_beside(weight: str) -> str:
    """Name of the bias of the layer that a weight belongs to."""
    return f"{weight.removesuffix('weight')}bias"


def weight_beside(bias: str) -> str:
    """Name of the weight of the layer that a bias belongs to."""
    return f"{bias.removesuffix('bias')}weight"


def give_bias(model: nn.Module, name: str, value: Tensor) -> None:
    """A bias for a layer that has none, in place.

    Raises:
        UnsupportedModelError: The layer is no module of the network, which was written as a graph of calls.
    """
    path = name.rpartition(".")[0]
    if path not in dict(model.named_modules()):
        raise UnsupportedModelError(
            f"layer {path!r} must be a module to get a bias, but the cut network calls it as a function. Leave "
            "`merge` out for it."
        )
    layer = model.get_submodule(path)
    layer.bias = like(layer.get_parameter("weight"), value.clone())


def like(original: Tensor, data: Tensor) -> Tensor:
    """The data as a parameter where the original is one, with its `requires_grad`."""
    if isinstance(original, nn.Parameter):
        return nn.Parameter(data, requires_grad=original.requires_grad)
    return data.requires_grad_(original.requires_grad)


def _set_standard_attributes(model: nn.Module) -> None:
    """Sizes that standard layers print but do not compute with."""
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(module).items() if "." not in name}
        weight = shapes.get("weight") or shapes.get("weight_v") or shapes.get("weight_orig") or ()
        if isinstance(module, nn.Linear) and len(weight) == 2:
            module.out_features, module.in_features = weight
        elif isinstance(module, nn.modules.conv._ConvNd) and len(weight) > 2:
            first, second = weight[0], weight[1] * module.groups
            module.out_channels, module.in_channels = (second, first) if module.transposed else (first, second)
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            module.num_features = (weight or shapes.get("running_mean") or (module.num_features,))[0]
        elif isinstance(module, nn.GroupNorm):
            module.num_channels = (weight or (module.num_channels,))[0]
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and weight:
            module.normalized_shape = weight
        elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and weight:
            module.num_embeddings, module.embedding_dim = weight
        elif isinstance(module, nn.PReLU):
            module.num_parameters = weight[0]
        elif isinstance(module, nn.Bilinear):
            module.out_features, module.in1_features, module.in2_features = weight
        elif isinstance(module, nn.RNNBase) and "weight_ih_l0" in shapes:
            module.input_size = shapes["weight_ih_l0"][1]
            module.hidden_size = shapes["weight_hh_l0"][0] // {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
            module.proj_size = shapes["weight_hh_l0"][1] if module.proj_size else 0
        elif isinstance(module, nn.RNNCellBase) and "weight_ih" in shapes:
            module.input_size, module.hidden_size = shapes["weight_ih"][1], shapes["weight_hh"][1]
