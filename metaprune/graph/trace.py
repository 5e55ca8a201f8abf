"""Run a network once and read off how its dimensions are coupled.

A structural copy of the model runs in evaluation mode on meta tensors (no memory, no arithmetic) under a dispatch mode
that sees every ATen call; one rule per family of calls (:mod:`metaprune.graph.rules`) says what the call does to the
labels of :mod:`metaprune.graph.axes`. Calls are seen at the highest level at which they are dispatched (``linear``,
``einsum``, ``lstm``, ``scaled_dot_product_attention``), because the dispatcher is entered below autograd; a call
without a rule is decomposed, and a call that cannot be decomposed freezes every dimension that it touches.

What the trace records of a call besides labels is what surgery must know of it: which of its integers are sizes of
labelled dimensions (:attr:`Op.sizes`), and which plain attributes of which modules those integers came from
(:attr:`Op.sources`).
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from metaprune.errors import ConfigError, InputError, MetapruneError, UnsupportedModelError
from metaprune.graph.axes import Dim, Labels, Units
from metaprune.graph.meta import on_meta
from metaprune.graph.record import (
    Dims,
    Formula,
    Lookup,
    ModuleCall,
    Op,
    Origin,
    Path,
    Ref,
    SizeArgument,
    Source,
    Trace,
    Value,
    constants_in,
    refs_in,
    state_in,
    tensors_in,
)
from metaprune.graph.twin import named_tensors, original_of, twin

ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any]
CONSTANT = "constant_"  # names of the buffers of a rewritten network that hold constants of the code
KNOWN_LIMIT = 1 << 20  # largest constant whose values are followed, in elements
FURTHER_INPUTS = 6  # random inputs tried to reach the parts that the example left out
_CREATES_CONSTANTS = {
    f"aten::{name}" for name in ("arange", "zeros", "ones", "full", "scalar_tensor", "eye", "linspace")
}


class Call:
    """One call as a rule sees it: arguments by name, labels of its tensors, and what to record.

    ``call["x"]`` is the argument that the schema of the op calls ``x``. Tensors are on the meta device, unless the
    network runs on real ones alone.

    Attributes:
        func: The overload of the op.
        arguments: All arguments by name, defaults included.
        out: What the op returned.
        units: The algebra, for rare moves that have no method here: ``merge``, ``concat``, ``take``, ``dim``.
        where: The op and its module, for messages.
        constants: The numbers among the arguments, by path. A rule may bring one into a normal form (a negative index
            counted from the front), so that the call can be compared with the same call of the cut network.
    """

    def __init__(self, tracer: "Tracer", func: Any, arguments: dict[str, Any], out: Any, op: Op) -> None:
        self.tracer, self.func, self.arguments, self.out, self.op = tracer, func, arguments, out, op
        self.units = tracer.units
        self.where = str(op)
        self.constants = op.constants

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """An argument by name, or the default where this overload has none."""
        return self.arguments.get(name, default)

    def dims(self, tensor: Tensor) -> Dims:
        """Labels of a tensor argument; grids that were undecided are factored."""
        value = self.tracer.value(tensor)
        if any(dim.grid is not None for dim in value.dims):
            value.dims = tuple(map(self.units.settle, value.dims))
        return value.dims

    def undecided_dims(self, tensor: Tensor) -> Dims:
        """The same with grids left undecided, for calls that only move or pick dimensions."""
        return self.tracer.value(tensor).dims

    def known(self, tensor: Tensor) -> Tensor | None:
        """The numbers of a constant tensor, or None."""
        return self.tracer.value(tensor).known

    @property
    def output(self) -> Tensor:
        """The result, where there is one."""
        (tensor,) = tensors_in(self.out)
        return tensor

    def not_zero(self, *dims: Dim) -> Dims:
        """The same dimensions for a result that is not zero where the operand is: after ``exp``, or adding a number."""
        return tuple(_no_longer_zero(dim) for dim in dims)

    def unify(self, *dims: Dim) -> Dim:
        """These dimensions meet here."""
        return self.units.unify(dims, self.where)

    def split(self, dim: Dim, sizes: Sequence[int]) -> list[Dim]:
        """This dimension is read as a grid here."""
        return self.units.split(dim, sizes, self.where)

    def freeze(self, *dims: Dim, reason: str = "") -> None:
        """These dimensions can never shrink."""
        for dim in dims:
            self.units.freeze(dim, reason or f"op {self.where}")

    def sum_over(self, *dims: Dim) -> None:
        """These positions are added up: they may leave only if what they add is zero once masked."""
        for dim in dims:
            if not dim.zero:
                self.freeze(dim, reason=f"summed over in {self.where}, where a masked unit is not zero")

    def consumes(self, tensor: Tensor, dim: int) -> None:
        """This dimension of an operand is multiplied and added up."""
        self.op.consumed.append((self.tracer.value(tensor).index, dim))

    def statistics_over(self, *dims: Dim) -> None:
        """The result depends on how many positions there are, or on more than their sum."""
        self.op.statistics.extend(dim for dim in dims if dim.labels_NK is not None)

    def counts(self, name: str, what: Dim | Labels | None, entry: int | None = None) -> None:
        """The integer argument `name` (or one entry of it) is the number of these positions."""
        value = self.constants.get((name, entry))
        if not isinstance(value, int) or isinstance(value, bool):
            return
        if isinstance(what, Dim) and what.grid is not None:
            self.tracer.undecided_sizes.append((self.op, (name, entry), what))
        labels_NK = what.labels_NK if isinstance(what, Dim) else what
        if labels_NK is not None:
            self.op.sizes[name, entry] = SizeArgument(value, labels_NK)

    def looks_up(self, index: Tensor, dim: Dim) -> None:
        """The numbers in `index` are positions of this dimension."""
        if dim.labels_NK is not None:
            self.op.lookups.append(Lookup(self.tracer.value(index).index, dim.labels_NK))

    def module_attribute(self, name: str, dim: Dim) -> None:
        """The module that makes this call remembers the size of this dimension, without using it."""
        if dim.labels_NK is not None:
            self.op.attributes[name] = dim.labels_NK

    def computed_from(self, *dims: Dim) -> None:
        """Code that passes no number here computes it from the sizes of these dimensions."""
        self.op.computed_from.extend(dims)

    def macs(self, *dims: Dim) -> None:
        """The call multiplies and adds as often as the product of these sizes."""
        self.op.macs.append(dims)


Rule = Callable[[Call], Any]


class LostNumbers(Exception):
    """A constant was made on the meta device, where it has no numbers; the run on real tensors knows them."""


class Tracer(TorchDispatchMode):
    """The dispatch mode: follows labels through every call. Use :func:`trace_model`."""

    def __init__(self, find_rule: Callable[[Any], Rule | None], *, real: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.real = real
        self.units = Units()
        self.values: list[Value] = []
        self.ops: list[Op] = []
        self.calls: list[ModuleCall] = []
        self.path: list[str] = [""]
        self.frames: list[tuple[tuple[int, Source | Formula | None], ...]] = [()]
        self.failed_rules: list[str] = []
        self.own_rules: dict[str, None] = {}
        self.left_torch: dict[str, None] = {}
        self.value_dependent: dict[str, None] = {}
        self.input_dependent: dict[str, None] = {}
        self.undecided_sizes: list[tuple[Op, Path, Dim]] = []
        self._find_rule = find_rule
        self._storages: dict[int, int] = {}
        self._in_storage: dict[int, list[Value]] = {}
        self._foreign: dict[int, Value] = {}
        self._alive: list[Any] = []  # keeps storages, so that an address never serves two

    def value(self, tensor: Tensor) -> Value:
        """What is known of a tensor; one that comes from nowhere is a constant of fixed size."""
        value: Value | None = getattr(tensor, "_metaprune_value", None) or self._foreign.get(id(tensor))
        if value is None:
            original = original_of(tensor)
            if original is tensor and tensor.device.type == "meta" and not self.real:
                raise LostNumbers(f"{self.path[-1] or 'the forward'} uses a tensor whose numbers were not followed")
            note = "a tensor that is no parameter, buffer or input of the network"
            known = original if original.device.type != "meta" and tensor.numel() <= KNOWN_LIMIT else None
            if self.left_torch:  # it may have been computed from what left, so its numbers are those of this run alone
                note, known = f"{note}, first seen in {self.where} after {next(iter(self.left_torch))}", None
            value = self._new(tensor, tuple(Dim(size, note=note) for size in tensor.shape), known=known)
            value.foreign = original
            self._foreign[id(tensor)] = value  # the user's own tensor: nothing is attached to it
        return value

    @property
    def where(self) -> str:
        """The module that is running, for messages."""
        return self.path[-1] or "the top level"

    def leaves_torch(self, tensor: Tensor, name: str) -> None:
        """Python or another library gets the numbers of a tensor, so what becomes of them cannot be followed."""
        value = self.value(tensor)
        if value.known is not None or value.foreign is not None:
            return
        call = f"Tensor.{name.strip('_')} at {self.where}"
        self.left_torch[call] = self.value_dependent[call] = None
        for dim in value.dims:
            self.units.freeze(self.units.settle(dim), f"its numbers leave torch by {call}")

    def register(self, tensor: Tensor, dims: Dims, *, name: str = "", known: Tensor | None = None) -> Value:
        """Attach what is known to a tensor of this run."""
        value = self._new(tensor, dims, name, known)
        tensor._metaprune_value = value  # type: ignore[attr-defined]
        return value

    def refs(self, item: Any) -> Any:
        """The same structure with every tensor replaced by its number."""
        if isinstance(item, Tensor):
            return Ref(self.value(item).index)
        if isinstance(item, Mapping) and type(item) is dict:
            return {key: self.refs(entry) for key, entry in item.items()}
        if type(item) in (list, tuple):
            return type(item)(map(self.refs, item))
        if is_dataclass(item) and not isinstance(item, type) and tensors_in(item):
            return replace(
                item, **{part.name: self.refs(getattr(item, part.name)) for part in fields(item) if part.init}
            )
        return item

    def _new(self, tensor: Tensor, dims: Dims, name: str = "", known: Tensor | None = None) -> Value:
        value = Value(len(self.values), dims, tensor.dtype, name, known, self._storage(tensor))
        self.values.append(value)
        self._in_storage.setdefault(value.storage, []).append(value)
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = self._find_rule(func)
        if rule is None:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        arguments = bind(func, args, kwargs)
        known = self._known(func, args, kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and known is not None:
            return known
        seen = self._seen(func, args, kwargs) if known is None else None
        out = self._run(func, args, kwargs, seen)
        tensors = [tensor for argument in arguments.values() for tensor in tensors_in(argument)]
        outputs = tensors_in(out)
        op = Op(len(self.ops), func, func._schema.name.removeprefix("aten::"), self.path[-1], self.refs(arguments))
        op.inputs = tuple(self.value(tensor).index for tensor in tensors)
        op.constants = dict(constants_in(arguments))
        op.sources = self.frames[-1]
        if known is None and _reads_values(func, arguments):
            (self.value_dependent if seen is None else self.input_dependent)[str(op)] = None
        call = Call(self, func, arguments, out, op)
        try:
            dims = fitting(rule(call), outputs) if rule else _unknown(call, "has no rule")
        except MetapruneError:  # raised by a rule of the user's, see `register_rule`
            raise
        except Exception as error:  # a rule that meets the unforeseen must not guess
            self.failed_rules.append(f"{op}: {type(error).__name__}: {error}")
            dims = _unknown(call, f"could not be followed ({type(error).__name__}: {error})")
        self._record(op, arguments, out, dims, known)
        if isinstance(seen, Tensor) and isinstance(out, Tensor) and not func._schema.is_mutable:
            self.value(out).seen = seen
        return out

    def _run(self, func: Any, args: Any, kwargs: Any, seen: Any) -> Any:
        """Make the call; on meta tensors, what it reads of the input is what the example has there."""
        meta = any(tensor.device.type == "meta" for tensor in tensors_in((args, kwargs)))
        if meta and seen is not None and _VALUE_TAGS.intersection(func.tags):
            return torch.empty_like(seen, device="meta") if isinstance(seen, Tensor) else seen
        if meta and func is torch.ops.aten._grouped_mm.default:  # the meta kernel takes bfloat16 alone
            return torch.empty(args[0].shape[0], args[1].shape[-1], dtype=args[0].dtype, device="meta")
        shortcut = on_meta(func, args, kwargs)
        return func(*args, **kwargs) if shortcut is None else shortcut

    def _record(self, op: Op, arguments: Mapping[str, Any], out: Any, dims: list[Dims], known: Any) -> None:
        shared = {self.value(tensor).storage for argument in arguments.values() for tensor in tensors_in(argument)}
        outputs = tensors_in(out)
        knowns = tensors_in(known) if known is not None else [None] * len(outputs)
        written = [] if op.func._schema.name in _SAME_NUMBERS else _written(op.func, arguments)
        storages = {self.value(tensor).storage for tensor in written}
        for tensor, tensor_dims, numbers in zip(outputs, dims, knowns, strict=True):
            value = self.register(tensor, tensor_dims, known=numbers)
            op.allocates = op.allocates and value.storage not in shared
        op.outputs = tuple(self.value(tensor).index for tensor in outputs)
        for storage in storages:  # whatever shares the memory changed with it
            for other in self._in_storage[storage]:
                if other.index not in op.outputs:
                    other.known = other.seen = None
                    other.dims = tuple(_no_longer_zero(self.units.settle(dim)) for dim in other.dims)
        op.result = self.refs(out)
        self.ops.append(op)

    def _storage(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = len(self._storages)
            self._alive.append(storage)
        return self._storages[storage._cdata]

    def _known(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the call on the numbers themselves where all its tensors are constants."""
        inputs = tensors_in((args, kwargs))
        if any(self.value(tensor).known is None for tensor in inputs):
            return None
        if func._schema.name in _SAME_NUMBERS:
            return self.value(inputs[0]).known
        if not inputs and func._schema.name not in _CREATES_CONSTANTS:
            return None
        return self._on_numbers(func, args, kwargs)

    def _seen(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The same where integers or truth values of the example are among them, and the result is no float."""
        values = [self.value(tensor) for tensor in tensors_in((args, kwargs))]
        if func._schema.is_mutable or not any(value.seen is not None for value in values):
            return None
        if any(value.seen is None and value.known is None for value in values):
            return None
        out = self._on_numbers(func, args, kwargs)
        return out if not isinstance(out, (Tensor, float)) or not _is_float(out) else None

    def _on_numbers(self, func: Any, args: Any, kwargs: Any) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            return None

        def real(item: Any) -> Any:
            if isinstance(item, Tensor):
                value = self.value(item)
                numbers = value.known if value.known is not None else value.seen
                return numbers.clone() if func._schema.is_mutable and numbers is not None else numbers
            if isinstance(item, (list, tuple)):
                return type(item)(map(real, item))
            return torch.device("cpu") if isinstance(item, torch.device) else item

        try:
            out = func(*real(args), **{name: real(item) for name, item in kwargs.items()})
        except Exception:  # a constant that cannot be followed is one whose numbers are not known
            return None
        return out if all(tensor.numel() <= KNOWN_LIMIT for tensor in tensors_in(out)) else None


def _written(func: Any, arguments: Mapping[str, Any]) -> list[Tensor]:
    """The arguments that a call writes into, whether it returns them or not."""
    named = [item.name for item in func._schema.arguments if item.alias_info and item.alias_info.is_write]
    return [tensor for name in named for tensor in tensors_in(arguments[name])]


def _is_float(item: Tensor | float) -> bool:
    return isinstance(item, float) or item.is_floating_point() or item.is_complex()


_VALUE_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_VALUE_NAMES = {
    "argwhere",
    "nonzero_numpy",
    "masked_select",
    "bincount",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
}
_SAME_NUMBERS = {"aten::detach_", "aten::lift_fresh", "aten::alias", "aten::requires_grad_"}


def _reads_values(func: Any, arguments: Mapping[str, Any]) -> bool:
    """The call's shape, or a Python number, comes out of values; indexing does so with truth values alone."""
    name = func._schema.name.removeprefix("aten::")
    if name in _VALUE_NAMES or (name == "where" and len(arguments) == 1):
        return True
    if not _VALUE_TAGS.intersection(func.tags):
        return False
    indices = arguments.get("indices")
    if not isinstance(indices, (list, tuple)):
        return True
    return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors_in(indices))


_LEAVING = {"numpy", "__array__", "tolist", "data_ptr", "__dlpack__", "storage"}
_INDEXES = {Tensor.__getitem__, Tensor.__setitem__}
_FROM_NUMBERS = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}


class _Frames(TorchFunctionMode):
    """Sees calls as Python makes them, where an integer still remembers its attribute, and what leaves torch."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _LEAVING and args and isinstance(args[0], Tensor):
            self.tracer.leaves_torch(args[0], func.__name__)
        if func in _FROM_NUMBERS:
            return _from_numbers(func, args, kwargs or {})
        if func in _INDEXES and args[0].device.type == "meta":
            args = (args[0], _index_of(args[1]), *args[2:])
        integers: list[tuple[int, Source | Formula | None]] = []
        _collect_integers((args, kwargs), integers, self.tracer.path[-1])
        if not any(source for _, source in integers):
            return func(*args, **(kwargs or {}))
        self.tracer.frames.append(tuple(integers))
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.tracer.frames.pop()


def _from_numbers(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """A tensor made of Python numbers: on the meta device they would be lost, so it is made elsewhere and moved."""
    of_tensor = func is Tensor.new_tensor
    device = kwargs.get("device") or (args[0].device if of_tensor else None)
    if device is None or torch.device(device).type != "meta" or tensors_in(args[int(of_tensor) :]):
        return func(*args, **kwargs)
    made: Tensor = func(*args, **{**kwargs, "device": "cpu"})
    return made.to("meta")


def _index_of(item: Any) -> Any:
    """An index whose lists of numbers are tensors that keep them."""
    if isinstance(item, tuple):
        return tuple(map(_index_of, item))
    if isinstance(item, list) and item and not tensors_in(item) and not any(isinstance(k, slice) for k in item):
        return torch.tensor(item)
    return item


def _collect_integers(item: Any, into: list[tuple[int, Source | Formula | None]], module: str) -> None:
    if isinstance(item, int) and not isinstance(item, bool):
        origin: Origin | None = getattr(item, "source", None)
        into.append((int(item), origin if origin is None or isinstance(origin, Source) else origin.at(module)))
    elif isinstance(item, (list, tuple)):
        for entry in item:
            _collect_integers(entry, into, module)
    elif isinstance(item, dict):
        for entry in item.values():
            _collect_integers(entry, into, module)
    elif isinstance(item, slice):
        _collect_integers((item.start, item.stop, item.step), into, module)


def trace_model(
    model: nn.Module, example_inputs: ExampleInputs, find_rule: Callable[[Any], Rule | None], *, real: bool = False
) -> Trace:
    """Trace a model, on meta tensors first, on real ones where that fails.

    Args:
        model: Left untouched: its mode, parameters, buffers and hooks stay as they are.
        example_inputs: A tensor, a sequence of positional arguments, or a mapping of keyword arguments.
        find_rule: Gives the rule of an ATen call, or None.
        real: Skip the attempt on meta tensors.

    Raises:
        ConfigError: `model` is no module.
        InputError: `example_inputs` holds no tensor.
        UnsupportedModelError: The forward fails on real tensors too, or returns no tensor; or the model has lazy
            parameters or cannot be copied.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"a model must be a torch.nn.Module, but is a {type(model).__name__}.")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise UnsupportedModelError(
            "a network must be given alone, but this one is wrapped in DistributedDataParallel. Give its `.module`, "
            "and wrap the result again."
        )
    if not tensors_in(example_inputs):
        raise InputError(
            f"example_inputs must hold at least one tensor, but none was found in {type(example_inputs).__name__}."
        )
    if 0 in tensors_in(example_inputs)[0].shape[:1]:
        raise InputError(
            f"the batch must hold at least one sample, but the example input is {_describe(example_inputs)}."
        )
    lazy = [name for name, tensor in named_tensors(model).items() if is_lazy(tensor)]
    if lazy:
        raise UnsupportedModelError(
            f"every parameter must have its shape, but {lazy[0]!r} is lazy. Run the model once on real input first."
        )
    for name, tensor in named_tensors(model).items():
        if tensor.layout is not torch.strided:
            raise UnsupportedModelError(
                f"every parameter and buffer must be dense, but {name!r} is {tensor.layout}. Keep it as a dense "
                "tensor, with zeros."
            )
    reason = ""
    if not real:
        try:
            return _run(model, example_inputs, find_rule, real=False)
        except MetapruneError:
            raise
        except Exception as error:  # values read on meta tensors, tensors made on another device, custom kernels
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if any(tensor.device.type == "meta" for tensor in named_tensors(model).values()):
        raise UnsupportedModelError(
            f"the forward of {type(model).__name__} cannot run on meta tensors ({reason}), and the model holds no "
            "others. Give it real weights, or keep values of tensors out of its Python control flow."
        )
    trace = _run(model, example_inputs, find_rule, real=True)
    trace.real, trace.real_reason = True, reason
    return trace


def _run(
    model: nn.Module, example_inputs: ExampleInputs, find_rule: Callable[[Any], Rule | None], *, real: bool
) -> Trace:
    tracer = Tracer(find_rule, real=real)
    copied = twin(model, real=real)
    parameters, aliases = _register_parameters(tracer, model, copied)
    try:
        given, out = _forward(tracer, copied, example_inputs, real=real)
    except Exception as error:
        if not real or isinstance(error, MetapruneError):
            raise
        where = tracer.path[-1] or type(model).__name__
        raise UnsupportedModelError(
            f"the forward must run on the example input ({_describe(example_inputs)}), but {where} raised "
            f"{type(error).__name__}: {error}."
        ) from error
    made = [
        name for name, _ in copied.named_parameters(remove_duplicate=False) if name not in {**parameters, **aliases}
    ]
    if made:
        raise UnsupportedModelError(
            f"the forward must use the parameters that are there, but made {made[0]!r}. Run the model once on real "
            "input first."
        )
    outputs = tensors_in(out)
    if not outputs:
        raise UnsupportedModelError(
            f"the model must return a tensor, or a container of tensors, but returned {type(out).__name__}. "
            "Wrap it in a module that returns the tensors to keep."
        )
    for tensor in outputs:
        for dim in tracer.value(tensor).dims:
            tracer.units.freeze(tracer.units.settle(dim), "the output of the network")
    trace = Trace(tracer.units, tracer.values, tracer.ops, parameters, aliases)
    trace.given = given
    inputs = [trace.values[number] for number in refs_in(given)]
    trace.inputs = tuple(value.index for value in inputs)
    trace.outputs = tuple(tracer.value(tensor).index for tensor in outputs)
    trace.result, trace.calls = tracer.refs(out), tracer.calls
    trace.batch = max(next((value.dims[0].size for value in inputs if value.dims), 1), 1)
    _run_further(tracer, trace, copied, example_inputs, real=real)
    for name in _unused(trace):
        for dim in parameters[name].dims:
            tracer.units.freeze(dim, "not used in the traced run")
    _decide(tracer)
    trace.state = state_in(trace.result)
    trace.failed_rules, trace.value_dependent = tuple(tracer.failed_rules), tuple(tracer.value_dependent)
    trace.own_rules = tuple(tracer.own_rules)
    trace.input_dependent = tuple(tracer.input_dependent)
    _freeze_unread(tracer, trace)
    if trace.needs_code:
        _keep_code(tracer, trace)
    return trace


def _forward(tracer: Tracer, model: nn.Module, example_inputs: ExampleInputs, *, real: bool) -> tuple[Any, Any]:
    args, kwargs = call_arguments(_on_device(example_inputs, real=real))
    for tensor, example in zip(tensors_in((args, kwargs)), tensors_in(example_inputs), strict=True):
        value = tracer.register(tensor, tuple(Dim(size, note="the input of the network") for size in tensor.shape))
        if not _is_float(example) and example.device.type != "meta" and example.numel() <= KNOWN_LIMIT:
            value.seen = example.cpu()
    given = tracer.refs((args, kwargs))  # now, because the forward may write into its inputs
    with (
        torch.random.fork_rng(devices=[]),
        _module_paths(model, tracer),
        torch._C._AutoDispatchBelowAutograd(),
        _Frames(tracer),
        tracer,
    ):
        return given, model(*args, **kwargs)


def _decide(tracer: Tracer) -> None:
    """Factor every grid that was not picked apart, and note what its dimensions became."""
    units = tracer.units

    def decided(dim: Dim) -> Dim:
        if dim.grid is None:
            return dim
        if not dim.grid.ragged:
            return decided(units.settle(dim))
        for index in range(dim.grid.sizes[dim.grid.direction or 0]):
            picked = dim.grid.pick(dim.grid.direction or 0, index) or ()
            dim.grid.picked[index] = tuple(decided(part) for part in picked)
        return dim

    for value in tracer.values:
        value.dims = tuple(map(decided, value.dims))
    for op, path, dim in tracer.undecided_sizes:
        dim = decided(dim)
        if dim.grid is not None and dim.place != dim.grid.direction:  # all parts must agree for the code to stay
            dim = dim.grid.picked[0][dim.place - (dim.place > (dim.grid.direction or 0))]
        if dim.labels_NK is not None:
            op.sizes[path] = SizeArgument(op.constants[path], dim.labels_NK)


def _freeze_unread(tracer: Tracer, trace: Trace) -> None:
    """Positions of parameters and buffers that are left aside before they are used: other inputs may reach them.

    Such are the rows of a mask or of a table of positions behind the length of the example.
    """
    units = tracer.units
    read = np.zeros(len(units), bool)

    def labels_of(numbers: Sequence[int]) -> dict[int, Labels]:
        dims = [dim if dim.grid is None else dim.grid.dim for number in numbers for dim in trace.values[number].dims]
        return {id(dim.labels_NK): dim.labels_NK for dim in dims if dim.labels_NK is not None}

    def mark(labels: Iterable[Labels]) -> None:
        for labels_NK in labels:
            read[units.resolve(labels_NK)] = True

    for op in (*trace.ops, *trace.further_ops):
        mark(dim.labels_NK for dim in op.statistics if dim.labels_NK is not None)
        if op.name not in _PICKS:
            left = labels_of(op.outputs)
            mark(labels_NK for key, labels_NK in labels_of(op.inputs).items() if key not in left)
    mark(labels_of(trace.outputs).values())
    for value in trace.parameters.values():
        for dim in value.dims:
            if dim.labels_NK is not None:
                labels_NK = units.resolve(dim.labels_NK)
                units.freeze(labels_NK[~read[labels_NK]][:, None], "not used in the traced run")


_PICKS = {
    *("slice", "select", "narrow", "index", "index_select", "gather", "split", "unbind", "constant_pad_nd", "pad"),
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "transpose", "permute", "t", "unsqueeze", "squeeze"),
}


def _keep_code(tracer: Tracer, trace: Trace) -> None:
    """Where the code cannot be replaced by its calls, what it holds as one number must stay one."""
    units = tracer.units
    counted: dict[Source, Labels] = {}
    fixed: dict[Source, Op] = {}
    for op in (*trace.ops, *trace.further_ops):
        for dim in op.computed_from:
            units.freeze(dim, f"{op} computes a number from its size")
        for path, size in op.sizes.items():
            for source in op.sources_of(path, size.value):
                if isinstance(source, Source):
                    _unify_counts(
                        units, counted.setdefault(source, size.labels_NK), size.labels_NK, f"attribute {source}"
                    )
        for path, origin in (op.placed_sources() or {}).items():
            if isinstance(origin, Source) and path not in op.sizes:
                fixed.setdefault(origin, op)
        if op.func is torch.ops.aten.split.Tensor:  # into equal parts
            parts = [size for (name, _), size in op.sizes.items() if name == "split_sizes"]
            for part in parts:
                _unify_counts(units, parts[0].labels_NK, part.labels_NK, f"{op} into equal parts")
    for source, op in fixed.items():
        units.freeze(counted.get(source), f"attribute {source} counts it, and what must stay in {op}")


def _unify_counts(units: Units, first: Labels, second: Labels, reason: str) -> None:
    if len(first) == len(second):
        units.unify((Dim(len(labels_NK), labels_NK) for labels_NK in (first, second)), reason)


def _unused(trace: Trace) -> list[str]:
    """Parameters and buffers that no call reads."""
    used = {number for op in (*trace.ops, *trace.further_ops) for number in op.inputs}
    return [name for name, value in trace.parameters.items() if value.index not in used and value.dims]


def _run_further(tracer: Tracer, trace: Trace, model: nn.Module, example_inputs: ExampleInputs, *, real: bool) -> None:
    """See what the first run left out: parts that only training uses, parts that other inputs reach.

    Where Python reads numbers that the network has computed, its code may take another way for other inputs, which may
    couple the same parameters in another manner: all ways that are seen hold at once.
    """
    if _unused(trace):
        trace.further_ops += _one_more_run(tracer, model.train(), example_inputs, real=real)
    trace.decides = bool(tracer.left_torch) or _reads_activations(trace)
    if not tracer.value_dependent:
        return
    for seed in range(FURTHER_INPUTS):
        if not trace.decides and not _unused(trace):
            return
        trace.further_ops += _one_more_run(tracer, model.eval(), random_like(example_inputs, seed), real=real)
    if _unused(trace):  # what these are coupled to is unknown, so what may be sent to them must stay
        _freeze_what_is_sent(tracer, trace)


def _one_more_run(tracer: Tracer, model: nn.Module, inputs: ExampleInputs, *, real: bool) -> list[Op]:
    ops, tracer.ops = tracer.ops, []
    calls, tracer.calls = tracer.calls, []
    try:
        _, out = _forward(tracer, model, inputs, real=real)
        for tensor in tensors_in(out):
            for dim in tracer.value(tensor).dims:
                tracer.units.freeze(tracer.units.settle(dim), "the output of the network")
    except Exception:  # some models cannot train on the example input; what was seen until then holds
        tracer.path[1:] = []
    further, tracer.ops, tracer.calls = tracer.ops, ops, calls
    return further


def _reads_activations(trace: Trace) -> bool:
    """Python gets a number that was computed from an input and a floating-point parameter."""
    fed = set(trace.inputs)
    weighed = {value.index for value in trace.parameters.values() if value.parameter}
    for op in trace.ops:
        if op.name == "_local_scalar_dense" and fed.intersection(op.inputs) and weighed.intersection(op.inputs):
            return True
        for numbers in (fed, weighed):
            if numbers.intersection(op.inputs):
                numbers.update(op.outputs)
    return False


def random_like(item: Any, seed: int) -> Any:
    """Inputs of the same form: noise of the same spread, integers of the same range."""
    if isinstance(item, Tensor):
        generator = torch.Generator().manual_seed(seed)
        if item.is_floating_point():
            noise = torch.randn(item.shape, generator=generator).to(item.device, item.dtype)
            return noise * item.std(correction=0) * 3**seed + item.mean()
        if item.dtype == torch.bool or not item.numel():
            return item
        low, high = int(item.min()), int(item.max())
        return torch.randint(low, high + 1, item.shape, generator=generator).to(item.device, item.dtype)
    if isinstance(item, Mapping):
        return {key: random_like(entry, seed) for key, entry in item.items()}
    if isinstance(item, (list, tuple)):
        return tuple(random_like(entry, seed) for entry in item)
    return item


def _freeze_what_is_sent(tracer: Tracer, trace: Trace) -> None:
    """Freeze every tensor that meets one whose shape or content was decided by values."""
    decided: set[int] = set()
    for op in (*trace.ops, *trace.further_ops):
        if str(op) in tracer.value_dependent:
            decided.update(op.outputs)
        elif decided.intersection(op.inputs):
            if not any(trace.values[number].dtype.is_floating_point for number in op.outputs):
                decided.update(op.outputs)
            for number in (*op.inputs, *op.outputs):
                for dim in trace.values[number].dims:
                    tracer.units.freeze(
                        tracer.units.settle(dim), f"{op} may send it to a part that the traced run left out"
                    )


def _register_parameters(
    tracer: Tracer, model: nn.Module, copied: nn.Module
) -> tuple[dict[str, Value], dict[str, str]]:
    originals = named_tensors(model)
    scripted = [path for path, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    values: dict[str, Value] = {}
    first_name: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in named_tensors(copied).items():
        original = originals[name]
        if id(original) in first_name:
            aliases[name] = first_name[id(original)]
            continue
        first_name[id(original)] = name
        parameter = isinstance(original, nn.Parameter)
        # Integers and truth values; and what a rewritten network keeps of the constants of its code.
        constant = not parameter and not original.is_floating_point() and not original.is_complex()
        constant = constant or (isinstance(model, torch.fx.GraphModule) and name.startswith(CONSTANT))
        known = original if constant and original.device.type != "meta" and original.numel() <= KNOWN_LIMIT else None
        masked = original.is_floating_point() or original.is_complex()  # integers and truth values are never masked
        dims = tuple(tracer.units.dim(size, zero=masked) for size in tensor.shape)
        values[name] = tracer.register(tensor, dims, name=name, known=known)
        values[name].parameter = parameter
        inside = next((path for path in scripted if not path or name.startswith(f"{path}.")), None)
        if inside is not None:
            for dim in dims:
                tracer.units.freeze(dim, f"inside the scripted module {inside or type(model).__name__}")
    return values, aliases


@contextlib.contextmanager
def _module_paths(model: nn.Module, tracer: Tracer) -> Iterator[None]:
    """Tell the tracer which module is running, and what modules get and give."""
    handles = []
    stack: list[tuple[Any, Any, int]] = []
    for name, module in model.named_modules():

        def enter(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            tracer.path.append(name)
            stack.append((tracer.refs(args), tracer.refs(kwargs), len(tracer.ops)))

        def leave(module: nn.Module, args: Any, kwargs: Any, out: Any, name: str = name) -> None:
            tracer.path.pop()
            given, named, start = stack.pop()
            tracer.calls.append(ModuleCall(name, given, named, tracer.refs(out), start, len(tracer.ops)))

        if not isinstance(module, torch.jit.ScriptModule):
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def call_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (list, tuple)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def _on_device(item: Any, *, real: bool) -> Any:
    if isinstance(item, Tensor):
        return item.detach().clone() if real else torch.empty_like(item, device="meta")
    if isinstance(item, Mapping):
        return {key: _on_device(entry, real=real) for key, entry in item.items()}
    if isinstance(item, (list, tuple)):
        return tuple(_on_device(entry, real=real) for entry in item)
    return item


def _describe(item: Any) -> str:
    return ", ".join(f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for tensor in tensors_in(item))


def bind(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of an ATen call by the names of its schema, defaults included."""
    bound = {}
    for k, argument in enumerate(func._schema.arguments):
        if k < len(args):
            bound[argument.name] = args[k]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
        else:
            bound[argument.name] = None
    return bound


def fitting(dims: Any, outputs: list[Tensor]) -> list[Dims]:
    """What a rule returned, as one tuple of dimensions a tensor.

    Raises:
        ValueError: It does not fit the tensors.
    """
    per_output: list[Dims] = [tuple(dims)] if len(outputs) == 1 and not isinstance(dims, list) else list(dims)
    seen = [tuple(dim.size for dim in entry) for entry in per_output]
    wanted = [tuple(tensor.shape) for tensor in outputs]
    if seen != wanted:
        raise ValueError(f"the rule gives shapes {seen} for {wanted}")
    return per_output


def _no_longer_zero(dim: Dim) -> Dim:
    return Dim(dim.size, dim.labels_NK, False, dim.note)


def _unknown(call: Call, why: str) -> list[Dims]:
    """The safe default: whatever such a call touches can never shrink."""
    reason = f"op {call.where} {why}"
    for tensor in tensors_in(list(call.arguments.values())):
        call.freeze(*call.dims(tensor), reason=reason)
    return [tuple(Dim(size, note=reason) for size in tensor.shape) for tensor in tensors_in(call.out)]
