"""Cutting: slice the tensors, bring the sizes that code reads in step, and check the result by tracing it again.

The given model is never changed. The cut network is a copy of it whose parameters and buffers are sliced; then plain
integer attributes that reach size arguments of calls (``num_heads`` in a view, ``groups`` in a convolution, split
sizes, pads) get the number of positions that are left; then the copy is traced and must make the same calls with
exactly the predicted sizes. A size that no attribute holds (a literal, a closure) is found by that check and refused.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from metaprune.errors import UnsupportedModelError
from metaprune.graph.axes import Alive
from metaprune.graph.layout import Layout
from metaprune.graph.rules import find_rule
from metaprune.graph.trace import ExampleInputs, Op, Source, Trace, trace_model


def cut(
    model: nn.Module, layout: Layout, alive: Alive, example_inputs: ExampleInputs, tensors: Mapping[str, Tensor]
) -> nn.Module:
    """A smaller copy of the model.

    Args:
        model: The dense network; not changed.
        layout: Its axes.
        alive: Which units stay.
        example_inputs: What it was traced with.
        tensors: New values, in dense shape, for some parameters and buffers.

    Raises:
        UnsupportedModelError: Some code expects a size that could not be brought in step.
    """
    slim = sliced_copy(model, layout, alive, tensors)
    _set_attributes(slim, _new_attributes(layout, alive))
    _set_standard_attributes(slim)
    try:
        trace = trace_model(slim, example_inputs, find_rule, real=layout.trace.real)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"the cut network does not run: {error} A size is written in code where no attribute holds it."
        ) from error
    check_calls(layout, alive, trace)
    return slim


def sliced_copy(model: nn.Module, layout: Layout, alive: Alive, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model with sliced parameters and buffers, and nothing else changed. Tied tensors stay tied."""
    originals = named_tensors(model)
    memo: dict[int, Tensor] = {}
    for name, value in layout.trace.parameters.items():
        original = originals[name]
        data = tensors.get(name, original).detach().to(original.device, original.dtype)
        for k, dim in enumerate(value.dims):
            kept = layout.kept(dim, alive)
            if kept is not None and not kept.all():
                data = data.index_select(k, torch.from_numpy(kept.nonzero()[0]).to(data.device))
        if data.data_ptr() == original.data_ptr() and original.device.type != "meta":
            data = data.clone()
        memo[id(original)] = like(original, data)
    return copy.deepcopy(model, memo)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name they have."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def like(original: Tensor, data: Tensor) -> Tensor:
    """The data as a parameter where the original is one, with its `requires_grad`."""
    if isinstance(original, nn.Parameter):
        return nn.Parameter(data, requires_grad=original.requires_grad)
    return data.requires_grad_(original.requires_grad)


def _new_attributes(layout: Layout, alive: Alive) -> dict[Source, int]:
    """Attributes that hold a size which changes, with the new size."""
    new: dict[Source, tuple[int, Op]] = {}
    for op in layout.trace.ops:
        for size in op.sizes.values():
            left = layout.count(size.labels_NK, alive)
            wanted = -left if size.value < 0 else left
            if wanted == size.value:
                continue
            for source in _sources(op, size.path, size.value):
                known, first = new.setdefault(source, (wanted, op))
                if known != wanted:
                    raise UnsupportedModelError(
                        f"attribute {source} must hold one size, but would become {known} for {first} and {wanted} for "
                        f"{op}. Give the two their own attributes, or keep their axes."
                    )
    return {source: size for source, (size, _) in new.items()}


def _sources(op: Op, path: tuple[str, int | None], value: int) -> list[Source]:
    """The attributes that an argument was read from: by place where the call passes its integers on, else by value."""
    integers = [(place, number) for place, number in op.constants.items() if type(number) is int]
    if [number for _, number in integers] == [number for number, _ in op.sources]:
        source = op.sources[[place for place, _ in integers].index(path)][1]
        return [source] if source else []
    return list({source: None for number, source in op.sources if source and number == value})


def _set_attributes(model: nn.Module, new: Mapping[Source, int]) -> None:
    for source, size in new.items():
        held = vars(model.get_submodule(source.module))
        if source.index is None:
            held[source.attribute] = size
        else:
            entries = list(held[source.attribute])
            entries[source.index] = size
            held[source.attribute] = type(held[source.attribute])(entries)


def _set_standard_attributes(model: nn.Module) -> None:
    """Sizes that standard layers print but do not compute with."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.modules.conv._ConvNd):
            first, second = module.weight.shape[0], module.weight.shape[1] * module.groups
            module.out_channels, module.in_channels = (second, first) if module.transposed else (first, second)
        elif isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm)):
            tensor = module.weight if module.weight is not None else getattr(module, "running_mean", None)
            if tensor is not None:
                setattr(module, "num_features" if hasattr(module, "num_features") else "num_channels", len(tensor))
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and module.weight is not None:
            module.normalized_shape = tuple(module.weight.shape)
        elif isinstance(module, nn.Embedding):
            module.num_embeddings, module.embedding_dim = module.weight.shape
        elif isinstance(module, nn.PReLU):
            module.num_parameters = len(module.weight)
        elif isinstance(module, nn.RNNBase):
            shapes = {name: tuple(weight.shape) for name, weight in module.named_parameters()}
            module.input_size = shapes["weight_ih_l0"][1]
            module.hidden_size = shapes["weight_hh_l0"][0] // {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
            module.proj_size = shapes["weight_hh_l0"][1] if module.proj_size else 0


def check_calls(layout: Layout, alive: Alive, after: Trace) -> None:
    """The cut network must make the same calls, with the predicted sizes and no other number changed.

    Raises:
        UnsupportedModelError: Names the first call that differs, what it should be and what it is.
    """
    before = layout.trace
    for old, new in zip(before.ops, after.ops):
        if (old.name, old.module) != (new.name, new.module):
            raise UnsupportedModelError(
                f"the cut network must make the same calls, but makes {new} where the dense one makes {old}. "
                "Its code takes another way for another size."
            )
        for path, number in old.constants.items():
            wanted = number
            if path in old.sizes:
                left = layout.count(old.sizes[path].labels_NK, alive)
                wanted = -left if number < 0 else left
            seen = new.constants.get(path)
            if seen != wanted or type(seen) is not type(wanted):
                name, entry = path
                raise UnsupportedModelError(
                    f"{old} must get {name}{'' if entry is None else f'[{entry}]'}={wanted} once cut, but gets {seen} "
                    f"(dense: {number}). The number is computed or written in code where no attribute holds it; "
                    "keep the axes involved."
                )
        for number, twin in zip(old.outputs, new.outputs):
            wanted_shape = tuple(
                dim.size if dim.labels_NK is None else layout.count(dim.labels_NK, alive)
                for dim in before.values[number].dims
            )
            shape = tuple(dim.size for dim in after.values[twin].dims)
            if shape != wanted_shape:
                raise UnsupportedModelError(f"{old} must give shape {wanted_shape} once cut, but gives {shape}.")
    if len(before.ops) != len(after.ops):
        raise UnsupportedModelError(
            f"the cut network must make {len(before.ops)} calls as the dense one does, but makes {len(after.ops)}."
        )
