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
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from metaprune.errors import InputError, UnsupportedModelError
from metaprune.graph.axes import Dim, Labels, Units

Dims = tuple[Dim, ...]
ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any]
KNOWN_LIMIT = 1 << 20  # largest constant whose values are followed, in elements


@dataclass(frozen=True)
class Source:
    """A plain integer attribute of a module: ``blocks.0.attn`` . ``num_heads``, or one entry of a tuple of them."""

    module: str
    attribute: str
    index: int | None = None

    def __str__(self) -> str:
        entry = "" if self.index is None else f"[{self.index}]"
        return f"{self.module}.{self.attribute}{entry}".lstrip(".")


class TracedInt(int):
    """An integer that remembers the attribute it was read from; arithmetic on it gives plain integers."""

    source: Source

    def __new__(cls, value: int, source: Source) -> "TracedInt":
        """The same number, with its source."""
        self = super().__new__(cls, value)
        self.source = source
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "TracedInt":
        return self


@dataclass(slots=True)
class Value:
    """What is known of one tensor.

    Attributes:
        index: Number in the trace; parameters, buffers and inputs come first.
        dims: One entry a dimension.
        dtype: Its type.
        name: Name of the parameter or buffer, or empty.
        parameter: A parameter, rather than a buffer or a tensor on the way.
        known: The numbers themselves, where they do not depend on inputs or parameters.
        storage: Number of the memory it lies in; views share it.
    """

    index: int
    dims: Dims
    dtype: torch.dtype
    name: str = ""
    known: Tensor | None = None
    storage: int = -1
    parameter: bool = False


@dataclass(frozen=True, slots=True)
class SizeArgument:
    """An integer argument of a call that counts positions.

    Attributes:
        path: Argument name and, inside a list, the entry.
        value: The number seen.
        labels_NK: The positions it counts; it must become the number of those still alive, with the sign it has.
    """

    path: tuple[str, int | None]
    value: int
    labels_NK: Labels


@dataclass(slots=True)
class Op:
    """One call of the trace.

    Attributes:
        index: Its place in the trace.
        name: Name of the ATen call, without namespace and overload; other namespaces stay.
        module: Path of the module that made it.
        inputs: Numbers of its tensor arguments, in order.
        outputs: Numbers of its results.
        constants: Its other arguments, by name and entry.
        sizes: Those that count labelled positions.
        sources: The integers that Python passed, with the attributes that they were read from.
        macs: Its multiply-accumulates, as products of dimensions.
        consumed: Dimensions of its operands that are multiplied and added up, as (value, dimension).
        statistics: Dimensions over which it computes more than a sum.
        allocates: Its results lie in memory of their own.
    """

    index: int
    name: str
    module: str
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    constants: dict[tuple[str, int | None], Any] = field(default_factory=dict)
    sizes: dict[tuple[str, int | None], SizeArgument] = field(default_factory=dict)
    sources: tuple[tuple[int, Source | None], ...] = ()
    macs: list[Dims] = field(default_factory=list)
    consumed: list[tuple[int, int]] = field(default_factory=list)
    statistics: list[Dim] = field(default_factory=list)
    allocates: bool = True

    def __str__(self) -> str:
        return f"{self.name} at {self.module or 'the top level'}"


@dataclass
class Trace:
    """Everything read off one run.

    Attributes:
        units: The algebra, with all that was learnt.
        values: Every tensor seen, by number.
        ops: Every call, in order.
        parameters: Name of each parameter and buffer -> its value; tied ones once, under their first name.
        aliases: Further names of tied parameters and buffers -> the first name.
        outputs: Numbers of the values that the network returns.
        batch: Size of the first dimension of the first tensor given.
        failed_rules: Calls whose rule raised, which froze what they touch; each is a defect to report.
        real: Run on real tensors, because something failed on meta ones; with the reason in `real_reason`.
        real_reason: That reason, or empty.
    """

    units: Units
    values: list[Value]
    ops: list[Op]
    parameters: dict[str, Value]
    aliases: dict[str, str]
    outputs: tuple[int, ...]
    batch: int
    failed_rules: tuple[str, ...] = ()
    real: bool = False
    real_reason: str = ""


class Call:
    """One call as a rule sees it: arguments by name, labels of its tensors, and what to record.

    Attributes:
        constants: The numbers among the arguments, by path. A rule may bring one into a normal form (a negative index
            counted from the front), so that the call can be compared with the same call of the cut network.
    """

    def __init__(self, tracer: "Tracer", func: Any, arguments: dict[str, Any], out: Any, op: Op) -> None:
        self.tracer, self.func, self.arguments, self.out, self.op = tracer, func, arguments, out, op
        self.units = tracer.units
        self.where = str(op)
        self.constants = dict(_constants(arguments))

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """An argument by name, or the default where this overload has none."""
        return self.arguments.get(name, default)

    def dims(self, tensor: Tensor) -> Dims:
        """Labels of a tensor argument."""
        return self.tracer.value(tensor).dims

    def known(self, tensor: Tensor) -> Tensor | None:
        """The numbers of a constant tensor, or None."""
        return self.tracer.value(tensor).known

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
        labels_NK = what.labels_NK if isinstance(what, Dim) else what
        value = self.constants.get((name, entry))
        if labels_NK is not None and isinstance(value, int) and not isinstance(value, bool):
            self.op.sizes[name, entry] = SizeArgument((name, entry), value, labels_NK)

    def macs(self, *dims: Dim) -> None:
        """The call multiplies and adds as often as the product of these sizes."""
        self.op.macs.append(dims)


Rule = Callable[[Call], Any]


class Tracer(TorchDispatchMode):
    """The dispatch mode: follows labels through every call. Use :func:`trace_model`."""

    def __init__(self, find_rule: Callable[[Any], Rule | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.units = Units()
        self.values: list[Value] = []
        self.ops: list[Op] = []
        self.path: list[str] = [""]
        self.frames: list[tuple[tuple[int, Source | None], ...]] = [()]
        self.failed_rules: list[str] = []
        self._find_rule = find_rule
        self._storages: dict[int, int] = {}
        self._in_storage: dict[int, list[Value]] = {}
        self._foreign: dict[int, Value] = {}
        self._alive: list[Any] = []  # keeps storages and foreign tensors, so that an address never serves two

    def value(self, tensor: Tensor) -> Value:
        """What is known of a tensor; one that comes from nowhere is a constant of fixed size."""
        value: Value | None = getattr(tensor, "_metaprune_value", None) or self._foreign.get(id(tensor))
        if value is None:
            note = "a tensor that is no parameter, buffer or input of the network"
            known = tensor if tensor.device.type != "meta" and tensor.numel() <= KNOWN_LIMIT else None
            value = self._new(tensor, tuple(Dim(size, note=note) for size in tensor.shape), known=known)
            self._foreign[id(tensor)] = value  # the user's own tensor: nothing is attached to it
            self._alive.append(tensor)
        return value

    def register(self, tensor: Tensor, dims: Dims, *, name: str = "", known: Tensor | None = None) -> Value:
        """Attach what is known to a tensor of this run."""
        assert tuple(dim.size for dim in dims) == tuple(tensor.shape), (name, dims, tensor.shape)
        value = self._new(tensor, dims, name, known)
        tensor._metaprune_value = value  # type: ignore[attr-defined]
        return value

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
        out = func(*args, **kwargs)
        op = Op(len(self.ops), func._schema.name.removeprefix("aten::"), self.path[-1], sources=self.frames[-1])
        tensors = [tensor for argument in arguments.values() for tensor in tensors_in(argument)]
        op.inputs = tuple(self.value(tensor).index for tensor in tensors)
        outputs = tensors_in(out)
        call = Call(self, func, arguments, out, op)
        try:
            dims = rule(call) if rule else _unknown(call, "has no rule")
        except Exception as error:  # a rule that meets the unforeseen must not guess
            self.failed_rules.append(f"{op}: {type(error).__name__}: {error}")
            dims = _unknown(call, f"could not be followed ({type(error).__name__}: {error})")
        self._record(call, tensors, outputs, dims, known)
        return out

    def _record(self, call: Call, inputs: list[Tensor], outputs: list[Tensor], dims: Any, known: Any) -> None:
        op = call.op
        op.constants = call.constants
        per_output: list[Dims] = [dims] if dims and isinstance(dims[0], Dim) else list(dims) or [()]
        assert len(per_output) == len(outputs), (call.where, len(per_output), len(outputs))
        shared = {self.value(tensor).storage for tensor in inputs}
        knowns = tensors_in(known) if known is not None else []
        for k, (tensor, tensor_dims) in enumerate(zip(outputs, per_output)):
            written = any(tensor is other for other in inputs)
            value = self.register(tensor, tensor_dims, known=knowns[k] if k < len(knowns) else None)
            op.allocates = op.allocates and value.storage not in shared
            if written:  # in place: whatever shares the memory changed with it
                for other in self._in_storage[value.storage]:
                    other.known = None
                    if other is not value:
                        other.dims = tuple(_no_longer_zero(dim) for dim in other.dims)
        op.outputs = tuple(self.value(tensor).index for tensor in outputs)
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
        if func._schema.is_mutable or (not inputs and func._schema.name not in _CREATES_CONSTANTS):
            return None
        if any(self.value(tensor).known is None for tensor in inputs):
            return None

        def real(item: Any) -> Any:
            if isinstance(item, Tensor):
                return self.value(item).known
            if isinstance(item, (list, tuple)):
                return type(item)(map(real, item))
            return torch.device("cpu") if isinstance(item, torch.device) else item

        try:
            out = func(*real(args), **{name: real(item) for name, item in kwargs.items()})
        except Exception:  # a constant that cannot be followed is one whose numbers are not known
            return None
        return out if all(tensor.numel() <= KNOWN_LIMIT for tensor in tensors_in(out)) else None


_CREATES_CONSTANTS = {
    f"aten::{name}" for name in ("arange", "zeros", "ones", "full", "scalar_tensor", "eye", "linspace")
}


class _Frames(TorchFunctionMode):
    """Sees calls as Python makes them, where an integer still remembers its attribute."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        integers: list[tuple[int, Source | None]] = []
        _collect_integers((args, kwargs), integers)
        if not any(source for _, source in integers):
            return func(*args, **(kwargs or {}))
        self.tracer.frames.append(tuple(integers))
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.tracer.frames.pop()


def _collect_integers(item: Any, into: list[tuple[int, Source | None]]) -> None:
    if isinstance(item, int) and not isinstance(item, bool):
        into.append((int(item), getattr(item, "source", None)))
    elif isinstance(item, (list, tuple)):
        for entry in item:
            _collect_integers(entry, into)
    elif isinstance(item, dict):
        for entry in item.values():
            _collect_integers(entry, into)
    elif isinstance(item, slice):
        _collect_integers((item.start, item.stop, item.step), into)


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
        InputError: `example_inputs` holds no tensor.
        UnsupportedModelError: The forward fails on real tensors too, or returns no tensor.
    """
    if not tensors_in(example_inputs):
        raise InputError(
            f"example_inputs must hold at least one tensor, but none was found in {type(example_inputs).__name__}."
        )
    reason = ""
    if not real:
        try:
            return _run(model, example_inputs, find_rule, real=False)
        except UnsupportedModelError:
            raise
        except Exception as error:  # values read on meta tensors, tensors made on another device, custom kernels
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.device.type == "meta" for tensor in tensors):
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
    tracer = Tracer(find_rule)
    twin = _twin(model, real=real)
    parameters, aliases = _register_parameters(tracer, model, twin)
    args, kwargs = call_arguments(_on_device(example_inputs, real=real))
    batch = 0
    for tensor in tensors_in((args, kwargs)):
        batch = batch or (tensor.shape[0] if tensor.ndim else 1)
        tracer.register(tensor, tuple(Dim(size, note="the input of the network") for size in tensor.shape))
    with _module_paths(twin, tracer.path), torch._C._AutoDispatchBelowAutograd(), _Frames(tracer), tracer:
        try:
            out = twin(*args, **kwargs)
        except Exception as error:
            if real:
                where = tracer.path[-1] or type(model).__name__
                raise UnsupportedModelError(
                    f"the forward of the model must run on the example input, but {where} raised "
                    f"{type(error).__name__}: {error}. Check the shapes and types of the example input "
                    f"({_describe(example_inputs)})."
                ) from error
            raise
    outputs = tensors_in(out)
    if not outputs:
        raise UnsupportedModelError(
            f"the model must return a tensor, or a container of tensors, but returned {type(out).__name__}. "
            "Wrap it in a module that returns the tensors to keep."
        )
    for tensor in outputs:
        for dim in tracer.value(tensor).dims:
            tracer.units.freeze(dim, "the output of the network")
    numbers = tuple(tracer.value(tensor).index for tensor in outputs)
    return Trace(
        tracer.units,
        tracer.values,
        tracer.ops,
        parameters,
        aliases,
        numbers,
        max(batch, 1),
        tuple(tracer.failed_rules),
    )


def _twin(model: nn.Module, *, real: bool) -> nn.Module:
    """A copy in evaluation mode whose tensors are meta (or cloned), and whose integers remember where they live."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in tensors_in(vars(module)):
            if is_lazy(tensor):
                raise UnsupportedModelError(
                    "every parameter must have its shape, but the model has lazy ones. Run it once on real input."
                )
            if id(tensor) not in memo:
                data = tensor.detach()
                data = (
                    data.clone()
                    if real
                    else torch.empty_strided(data.shape, data.stride(), dtype=data.dtype, device="meta")
                )
                is_parameter = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(data, requires_grad=False) if is_parameter else data
    twin = copy.deepcopy(model, memo).eval()
    own = set(vars(nn.Module()))
    for path, module in twin.named_modules():
        for name, item in list(vars(module).items()):
            if name in own:
                continue
            if type(item) is int:
                vars(module)[name] = TracedInt(item, Source(path, name))
            elif type(item) in (list, tuple) and item and all(type(entry) is int for entry in item):
                entries = (TracedInt(entry, Source(path, name, k)) for k, entry in enumerate(item))
                vars(module)[name] = type(item)(entries)
    return twin


def _meta_like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _register_parameters(tracer: Tracer, model: nn.Module, twin: nn.Module) -> tuple[dict[str, Value], dict[str, str]]:
    originals = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    values: dict[str, Value] = {}
    first_name: dict[int, str] = {}
    aliases: dict[str, str] = {}
    twins = dict(twin.named_parameters(remove_duplicate=False)) | dict(twin.named_buffers(remove_duplicate=False))
    for name, tensor in twins.items():
        if id(tensor) in first_name:
            aliases[name] = first_name[id(tensor)]
            continue
        first_name[id(tensor)] = name
        original = originals[name]
        constant = not isinstance(tensor, nn.Parameter) and not tensor.is_floating_point() and not tensor.is_complex()
        known = original if constant and original.device.type != "meta" and original.numel() <= KNOWN_LIMIT else None
        dims = tuple(tracer.units.dim(size) for size in tensor.shape)
        values[name] = tracer.register(tensor, dims, name=name, known=known)
        values[name].parameter = isinstance(tensor, nn.Parameter)
    return values, aliases


@contextlib.contextmanager
def _module_paths(model: nn.Module, path: list[str]) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():

        def enter(module: nn.Module, args: Any, name: str = name) -> None:
            path.append(name)

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            path.pop()

        if not isinstance(module, torch.jit.ScriptModule):
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
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


def tensors_in(item: Any) -> list[Tensor]:
    """All tensors inside nested containers and dataclasses, in order."""
    if isinstance(item, Tensor):
        return [item]
    if isinstance(item, Mapping):
        return [tensor for entry in item.values() for tensor in tensors_in(entry)]
    if isinstance(item, (list, tuple)):
        return [tensor for entry in item for tensor in tensors_in(entry)]
    if is_dataclass(item) and not isinstance(item, type):
        return [tensor for entry in fields(item) for tensor in tensors_in(getattr(item, entry.name))]
    return []


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
    """Arguments by the names of the schema, defaults included."""
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


def _constants(arguments: Mapping[str, Any]) -> Iterator[tuple[tuple[str, int | None], Any]]:
    """The numbers among the arguments, by path."""
    for name, item in arguments.items():
        if isinstance(item, (int, float, bool, str)):
            yield (name, None), item
        elif isinstance(item, (list, tuple)):
            for k, entry in enumerate(item):
                if isinstance(entry, (int, float, bool, str)):
                    yield (name, k), entry


def _no_longer_zero(dim: Dim) -> Dim:
    return Dim(dim.size, dim.labels_NK, False, dim.note)


def _unknown(call: Call, why: str) -> list[Dims]:
    """The safe default: whatever such a call touches can never shrink."""
    reason = f"op {call.where} {why}"
    for tensor in tensors_in(list(call.arguments.values())):
        call.freeze(*call.dims(tensor), reason=reason)
    return [tuple(Dim(size, note=reason) for size in tensor.shape) for tensor in tensors_in(call.out)]
