"""What a call to torch does while a network is traced: the dispatch mode, and the call as a rule sees it.

Calls are seen at the highest level at which they are dispatched (``linear``, ``einsum``, ``lstm``,
``scaled_dot_product_attention``), because the dispatcher is entered below autograd. A call without a rule is
decomposed; one that cannot be decomposed freezes every dimension that it touches.

What is recorded of a call besides labels is what surgery must know of it: which of its integers are sizes of labelled
dimensions (:attr:`Op.sizes`), and from which attributes of which modules those integers came (:attr:`Op.sources`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from metaprune.errors import MetapruneError
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
    Value,
    constants_in,
    tensors_in,
)
from metaprune.graph.twin import original_of

KNOWN_LIMIT = 1 << 20  # largest constant whose values are followed, in elements
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
        value: Value | None = getattr(tensor, "_metaprune_value", None)
        if value is not None and (value.index >= len(self.values) or self.values[value.index] is not value):
            value = None  # made in another run, and kept by a cache of the code
        value = value or self._foreign.get(id(tensor))
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
        return out if not isinstance(out, (Tensor, float)) or not is_float(out) else None

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


def is_float(item: Tensor | float) -> bool:
    """Numbers that are not whole: floating-point or complex."""
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


class Frames(TorchFunctionMode):
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
