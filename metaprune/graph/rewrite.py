"""The recorded calls of a network as a ``torch.fx.GraphModule``, with new sizes.

For code that holds sizes where no attribute can be changed. Layers of ``torch.nn`` stay modules, so that dropout and
BatchNorm still know training from evaluation; everything else becomes the ATen call that it was, with the size
arguments recomputed. Every other number is that of the dense network, so that a scale taken from a size keeps its
value. The batch is free; other dimensions of the input are those of the example.
"""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from metaprune.errors import UnsupportedModelError
from metaprune.graph.adapt import SizedMultiheadAttention
from metaprune.graph.attributes import new_attributes, set_attributes
from metaprune.graph.axes import Alive, Dim, Labels
from metaprune.graph.blocks import without
from metaprune.graph.check import size_left
from metaprune.graph.layout import Layout
from metaprune.graph.record import Dims, ModuleCall, Op, Path, Ref, Trace, refs_in
from metaprune.graph.rules import find_rule
from metaprune.graph.trace import CONSTANT, ExampleInputs, trace_model
from metaprune.graph.twin import named_tensors

Affine = tuple[int, int]  # (a, b): a * batch + b


def rewritten(
    model: nn.Module, slim: nn.Module, layout: Layout, alive: Alive, example_inputs: ExampleInputs
) -> tuple[fx.GraphModule, bool]:
    """The calls of `model`, with the parameters of `slim` and the sizes that are left, and whether they are the same.

    They are, except where parts that the code read side by side had to be cut apart.

    Args:
        model: The dense network.
        slim: A copy of it with sliced parameters and buffers; its layers are used.
        layout: The axes and the recorded calls.
        alive: Which units stay.
        example_inputs: What it was traced with.
    """
    rewriter = _Rewriter(model, slim, layout, alive, example_inputs)
    return rewriter.module(), not rewriter.bundles


class Bundle(NamedTuple):
    """A value whose parts may have become unlike.

    Attributes:
        parts: One node each.
        at: Where among the dimensions of the value the direction lay along which they are picked.
    """

    parts: list[fx.Node]
    at: int


class _Rewriter:
    def __init__(
        self, model: nn.Module, slim: nn.Module, layout: Layout, alive: Alive, example_inputs: ExampleInputs
    ) -> None:
        self.model, self.slim, self.layout, self.alive = model, slim, layout, alive
        self.trace = layout.trace
        self.graph = fx.Graph()
        self.nodes: dict[int, fx.Node] = {}
        self.bundles: dict[int, Bundle] = {}
        self.batch_of = _with_batch(model, example_inputs, self.trace)
        self.last_read = {number: op.index for op in self.trace.ops for number in op.inputs}
        self.last_read |= dict.fromkeys(self.trace.outputs, len(self.trace.ops))
        self._first: fx.Node | None = None
        self._batch: fx.Node | None = None
        self._device: fx.Node | None = None

    def module(self) -> fx.GraphModule:
        self._placeholders()
        leaves = {call.start: call for call in self.trace.calls if self._is_leaf(call)}
        index = 0
        while index < len(self.trace.ops):
            if index in leaves:
                self._layer(leaves[index])
                index = leaves[index].stop
            else:
                self._call(self.trace.ops[index])
                index += 1
        self.graph.output(self._nodes(self.trace.result))
        module = fx.GraphModule(self.slim, self.graph, class_name=type(self.model).__name__)
        self._complete(module)
        for name, part in module.named_modules():
            part.training = self.slim.get_submodule(name).training
        return module

    def _complete(self, module: nn.Module) -> None:
        """Add the tensors that no call names: those that nothing uses, and further names of tied ones."""
        there = named_tensors(module)
        for name, tensor in named_tensors(self.slim).items():
            if name in there:
                continue
            path, _, leaf = name.rpartition(".")
            holder = module
            for part in path.split(".") if path else ():
                if not hasattr(holder, part):
                    holder.add_module(part, nn.Module())
                holder = getattr(holder, part)
            if isinstance(tensor, nn.Parameter):
                holder.register_parameter(leaf, tensor)
            else:
                hidden = leaf in self.slim.get_submodule(path)._non_persistent_buffers_set
                holder.register_buffer(leaf, tensor, persistent=not hidden)

    def _placeholders(self) -> None:
        args, kwargs = self.trace.given
        names = [
            name
            for name, parameter in inspect.signature(self.model.forward).parameters.items()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
        names += [f"input_{k}" for k in range(len(names), len(args))]
        for name, given in (*zip(names, args), *kwargs.items()):
            node = self.graph.placeholder(name)
            self._bind(given, node)
            if self._first is None and isinstance(given, Ref):
                self._first = node
        if self._first is None:
            self._first = self.nodes[self.trace.inputs[0]]

    def _bind(self, item: Any, node: fx.Node) -> None:
        """Remember which node gives which value."""
        if isinstance(item, Ref):
            self.nodes[item.number] = node
        elif isinstance(item, (list, tuple)):
            for k, entry in enumerate(item):
                if refs_in(entry):
                    self._bind(entry, self.graph.call_function(_getitem, (node, k)))
        elif isinstance(item, Mapping):
            for key, entry in item.items():
                if refs_in(entry):
                    self._bind(entry, self.graph.call_function(_getitem, (node, key)))

    def _node(self, number: int) -> fx.Node:
        if number not in self.nodes:
            value = self.trace.values[number]
            name = value.name
            if not name:
                assert value.foreign is not None, value
                if value.foreign.device.type == "meta":
                    raise UnsupportedModelError("the numbers of a tensor that the forward makes are not known.")
                name = f"{CONSTANT}{number}"
                self.slim.register_buffer(name, value.foreign.detach().clone(), persistent=True)
            self.nodes[number] = self.graph.get_attr(name)
        return self.nodes[number]

    def _nodes(self, item: Any) -> Any:
        """A recorded structure with nodes for its tensors."""
        if isinstance(item, Ref):
            return self._node(item.number)
        if type(item) in (list, tuple):
            return type(item)(map(self._nodes, item))
        if type(item) is dict:
            return {key: self._nodes(entry) for key, entry in item.items()}
        if refs_in(item):  # a dataclass
            fields = {name: self._nodes(getattr(item, name)) for name in item.__dataclass_fields__}
            return self.graph.call_function(type(item), (), fields)
        if isinstance(item, torch.device):
            return self._where()
        return item

    def _where(self) -> fx.Node:
        if self._device is None:
            assert self._first is not None
            with self.graph.inserting_after(self._first):
                self._device = self.graph.call_function(getattr, (self._first, "device"))
        return self._device

    def _is_leaf(self, call: ModuleCall) -> bool:
        """A layer of torch without parts of its own, or a BatchNorm of any class, that can be called again as it is."""
        if call.start == call.stop:
            return False
        module = self.slim.get_submodule(call.path)
        own = type(module).__module__.startswith("torch.nn.modules") and not list(module.children())
        own = own or isinstance(module, nn.modules.batchnorm._BatchNorm)  # it must know training from evaluation
        hooks = module._forward_hooks or module._forward_pre_hooks
        if not own or hooks or isinstance(module, SizedMultiheadAttention):
            return False
        inner = {number for op in self._ops(call) for number in op.outputs} - set(refs_in(call.result))
        return all(self.last_read.get(number, -1) < call.stop for number in inner) and self._fits(call)

    def _ops(self, call: ModuleCall) -> list[Op]:
        return self.trace.ops[call.start : call.stop]

    def _fits(self, call: ModuleCall) -> bool:
        """Whether a layer holds the sizes that it computes with, and its calls want the same."""
        try:
            new_attributes(self.slim, self.layout, self.alive, self._ops(call))
        except UnsupportedModelError:
            return False
        for op in self._ops(call):
            for path, size in op.sizes.items():
                changed = self.layout.count(size.labels_NK, self.alive) != abs(size.value)
                origins = op.sources_of(path, size.value)
                if changed and [getattr(origin, "module", None) for origin in origins] != [call.path]:
                    return False
        return True

    def _layer(self, call: ModuleCall) -> None:
        set_attributes(self.slim, new_attributes(self.slim, self.layout, self.alive, self._ops(call)))
        node = self.graph.call_module(call.path, self._nodes(call.args), self._nodes(call.kwargs))
        self._bind(call.result, node)

    def _call(self, op: Op) -> None:
        if op.name in ("dropout", "feature_dropout", "alpha_dropout") and not op.arguments["train"]:
            self._bind(op.result, self._dropout(op))
            return
        if self._on_bundle(op):
            return
        if op.name == "split":  # into parts that may differ now
            sizes = [self._number(op, path, size) for path, size in op.constants.items() if path[0] == "split_sizes"]
            arguments = (self._node(op.inputs[0]), sizes, op.arguments["dim"])
            self._bind(op.result, self.graph.call_function(torch.ops.aten.split_with_sizes.default, arguments))
            return
        args, kwargs = [], {}
        for argument in op.func._schema.arguments:
            item = self._argument(op, argument.name)
            if argument.kwarg_only:
                kwargs[argument.name] = item
            else:
                args.append(item)
        self._bind(op.result, self.graph.call_function(op.func, tuple(args), kwargs))

    def _on_bundle(self, op: Op) -> bool:
        """Calls that make a ragged value, move it, or pick its parts: done part by part."""
        if not op.inputs:
            return False
        if op.inputs[0] not in self.bundles:
            direction = _direction(self.trace.values[op.outputs[0]].dims) if op.outputs else None
            if direction is not None:
                self._make_bundle(op, direction)
            return direction is not None
        parts, at = self.bundles[op.inputs[0]]
        if op.name in ("permute", "permute_copy", "transpose", "swapaxes", "swapdims"):
            order = _order(op, len(self.trace.values[op.inputs[0]].dims))
            inner = [k - (k > at) for k in order if k != at]
            moved = [self.graph.call_function(torch.ops.aten.permute.default, (part, inner)) for part in parts]
            self.bundles[op.outputs[0]] = Bundle(moved, order.index(at))
        elif op.name in ("clone", "contiguous", "detach", "alias"):
            self.bundles[op.outputs[0]] = Bundle([self.graph.call_function(op.func, (part,)) for part in parts], at)
        elif op.name in ("unbind", "unbind_copy"):
            self.nodes.update(zip(op.outputs, parts, strict=True))
        else:
            assert op.name in ("select", "select_copy"), op
            self.nodes[op.outputs[0]] = parts[op.arguments["index"]]
        return True

    def _make_bundle(self, op: Op, at: int) -> None:
        """A view that reads parts side by side: cut them apart first, then view each."""
        value = self.trace.values[op.outputs[0]]
        grid = value.dims[at].grid
        assert grid is not None
        assert grid.direction is not None
        # The input with the dimensions of the grid as one, then the positions of each part along it.
        places_of_grid = [k for k, dim in enumerate(value.dims) if dim.grid is grid]
        first, behind = places_of_grid[0], places_of_grid[-1] + 1  # dimensions of size 1 may lie in between
        sizes = [None if dim.grid is grid else self._size(op, k) for k, dim in enumerate(value.dims)]
        whole = self.layout.count(_labels(grid.dim), self.alive)
        flat = self.graph.call_function(
            torch.ops.aten.reshape.default, (self._node(op.inputs[0]), [*sizes[:first], whole, *sizes[behind:]])
        )
        alive_N = self.alive[self.layout.rows(_labels(grid.dim))].all(axis=1)
        kept = np.moveaxis(np.reshape(alive_N, grid.sizes), grid.direction, 0)
        places = np.moveaxis(np.reshape(np.cumsum(alive_N) - 1, grid.sizes), grid.direction, 0)
        parts = []
        for index in range(grid.sizes[grid.direction]):
            part = self._taken(flat, first, places[index][kept[index]], f"{CONSTANT}{op.index}_{index}")
            left = iter([size_left(self.layout, self.alive, op, dim) for dim in grid.picked[index]])
            inner = [next(left) if sizes[k] is None else 1 for k in range(first, behind) if k != at]
            shape = [*sizes[:first], *inner, *sizes[behind:]]
            parts.append(self.graph.call_function(torch.ops.aten.reshape.default, (part, shape)))
        self.bundles[op.outputs[0]] = Bundle(parts, at)

    def _taken(self, tensor: fx.Node, dim: int, positions: npt.NDArray[np.int64], name: str) -> fx.Node:
        """Some positions along a dimension: a slice where they lie side by side."""
        start = int(positions[0]) if len(positions) else 0
        stop = start + len(positions)
        if positions.tolist() == list(range(start, stop)):
            return self.graph.call_function(torch.ops.aten.slice.Tensor, (tensor, dim, start, stop))
        self.slim.register_buffer(name, torch.from_numpy(positions.copy()))
        arguments = (tensor, dim, self.graph.get_attr(name))
        return self.graph.call_function(torch.ops.aten.index_select.default, arguments)

    def _size(self, op: Op, k: int) -> Any:
        """A size that a view gives to a dimension outside of its grid."""
        if "sizes" in op.arguments:  # unflatten: the other dimensions are those of its input
            source, added = self._node(op.inputs[0]), len(op.arguments["sizes"]) - 1
            at = op.arguments["dim"] % len(self.trace.values[op.inputs[0]].dims)
            return self.graph.call_method("size", (source, k if k < at else k - added))
        name = "size" if "size" in op.arguments else "shape"
        return -1 if op.constants[name, k] == -1 else self._number(op, (name, k), None)

    def _argument(self, op: Op, name: str) -> Any:
        item = op.arguments[name]
        if isinstance(item, (list, tuple)) and not any(isinstance(entry, (list, tuple)) for entry in item):
            return [self._number(op, (name, k), entry) for k, entry in enumerate(item)]
        return self._number(op, (name, None), item)

    def _number(self, op: Op, path: Path, item: Any) -> Any:
        """A constant of a call, with its new size, in terms of the batch where it depends on it."""
        if path not in op.constants:
            return self._nodes(item)
        number = op.constants[path]
        if path in op.sizes:
            left = self.layout.count(op.sizes[path].labels_NK, self.alive)
            number = -left if isinstance(number, int) and number < 0 else left
        if (op.index, path) in self.batch_of:
            factor, offset = self.batch_of[op.index, path]
            if path in op.sizes:  # the rest of the dimension has shrunk
                factor, offset = divmod(number, self.trace.batch)
            return self._times_batch(factor, offset)
        return self._nodes(number)

    def _times_batch(self, factor: int, offset: int) -> Any:
        if self._batch is None:
            assert self._first is not None
            with self.graph.inserting_after(self._first):
                self._batch = self.graph.call_method("size", (self._first, 0))
        node: fx.Node = self._batch
        if factor != 1:
            node = self.graph.call_function(_multiply, (node, factor))
        return self.graph.call_function(_add, (node, offset)) if offset else node

    def _dropout(self, op: Op) -> fx.Node:
        kind = {"dropout": nn.Dropout, "feature_dropout": nn.Dropout2d, "alpha_dropout": nn.AlphaDropout}[op.name]
        name = f"dropout_{op.index}"
        self.slim.add_module(name, kind(op.arguments["p"]).train(self.slim.training))
        return self.graph.call_module(name, (self._node(op.inputs[0]),))


def _direction(dims: Dims) -> int | None:
    """Where among the dimensions of a ragged value the direction lies along which its parts are picked."""
    for k, dim in enumerate(dims):
        if dim.grid is not None and dim.place == dim.grid.direction:
            return k
    return None


def _labels(dim: Dim) -> Labels:
    assert dim.labels_NK is not None
    return dim.labels_NK


def _order(op: Op, rank: int) -> list[int]:
    """The permutation that a call makes of dimensions."""
    if "dims" in op.arguments:
        return [int(k) % rank for k in op.arguments["dims"]]
    order = list(range(rank))
    first, second = (int(item) % rank for name, item in op.arguments.items() if name != "self")
    order[first], order[second] = order[second], order[first]
    return order


def _getitem(item: Any, key: Any) -> Any:
    return item[key]


def _multiply(a: int, b: int) -> int:
    return a * b


def _add(a: int, b: int) -> int:
    return a + b


def _with_batch(model: nn.Module, example_inputs: ExampleInputs, trace: Trace) -> dict[tuple[int, Path], Affine]:
    """Integer arguments that follow the batch, found by tracing once more with one sample more."""
    try:
        more = trace_model(model, _one_more(example_inputs, trace.batch), find_rule, real=trace.real)
        more = without(more, trace.dropped) if trace.dropped else more
    except Exception:  # the network takes this batch alone
        return {}
    if [op.name for op in more.ops] != [op.name for op in trace.ops]:
        return {}
    out: dict[tuple[int, Path], Affine] = {}
    for op, other in zip(trace.ops, more.ops, strict=True):
        for path, number in op.constants.items():
            seen = other.constants.get(path)
            if type(number) is int and type(seen) is int and seen != number:
                out[op.index, path] = (seen - number, number - (seen - number) * trace.batch)
    return out


def _one_more(item: Any, batch: int) -> Any:
    if isinstance(item, Tensor):
        return torch.cat([item, item[:1]]) if item.ndim and item.shape[0] == batch else item
    if isinstance(item, Mapping):
        return {key: _one_more(entry, batch) for key, entry in item.items()}
    if isinstance(item, (list, tuple)):
        return tuple(_one_more(entry, batch) for entry in item)
    return item
