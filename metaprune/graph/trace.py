"""Run a network once and read off how its dimensions are coupled.

A structural copy of the model runs in evaluation mode on meta tensors (no memory, no arithmetic) under a dispatch mode
that sees every ATen call (:mod:`metaprune.graph.dispatch`); one rule per family of calls (:mod:`metaprune.graph.rules`)
says what the call does to the labels of :mod:`metaprune.graph.axes`. What meta tensors cannot do runs on real ones.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from metaprune.errors import ConfigError, InputError, MetapruneError, UnsupportedModelError
from metaprune.graph.axes import Dim, Labels, Units
from metaprune.graph.dispatch import KNOWN_LIMIT, Frames, Rule, Tracer, is_float
from metaprune.graph.record import ModuleCall, Op, SizeArgument, Source, Trace, Value, refs_in, state_in, tensors_in
from metaprune.graph.twin import named_tensors, twin

ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any]
CONSTANT = "constant_"  # names of the buffers of a rewritten network that hold constants of the code
FURTHER_INPUTS = 6  # random inputs tried to reach the parts that the example left out
FURTHER_MACS = 1 << 37  # multiply-accumulates that all of these may take; one is always tried


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
    held, own = {id(value.foreign) for value in trace.values}, named_tensors(model)
    for name in _unused(trace):
        why = "not used in the traced run"
        if id(own[name]) in held:
            why = "used by a function that holds the given model itself (a lambda, a closure), which no copy can cut"
        for dim in parameters[name].dims:
            tracer.units.freeze(dim, why)
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
        if not is_float(example) and example.device.type != "meta" and example.numel() <= KNOWN_LIMIT:
            value.seen = example.cpu()
    given = tracer.refs((args, kwargs))  # now, because the forward may write into its inputs
    with (
        torch.random.fork_rng(devices=[]),
        _module_paths(model, tracer),
        torch._C._AutoDispatchBelowAutograd(),
        Frames(tracer),
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
    for seed in range(affordable(trace, FURTHER_INPUTS)):
        if not trace.decides and not _unused(trace):
            return
        trace.further_ops += _one_more_run(tracer, model.eval(), random_like(example_inputs, seed), real=real)
    if _unused(trace):  # what these are coupled to is unknown, so what may be sent to them must stay
        _freeze_what_is_sent(tracer, trace)


def affordable(trace: Trace, runs: int) -> int:
    """How many of these runs of a network its cost allows; at least one, unless none was asked for."""
    macs = sum(math.prod(dim.size for dim in product) for op in trace.ops for product in op.macs)
    return min(runs, max(1, FURTHER_MACS // max(macs, 1)))


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
            inputs = (None, None) if _batched((args, kwargs)) else (tracer.refs(args), tracer.refs(kwargs))
            stack.append((*inputs, len(tracer.ops)))

        def leave(module: nn.Module, args: Any, kwargs: Any, out: Any, name: str = name) -> None:
            tracer.path.pop()
            given, named, start = stack.pop()
            if not _batched((args, kwargs, out)):
                tracer.calls.append(ModuleCall(name, given, named, tracer.refs(out), start, len(tracer.ops)))

        if not isinstance(module, torch.jit.ScriptModule):
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _batched(item: Any) -> bool:
    """Some tensor is one sample of another, inside `torch.vmap`; the calls below see the other."""
    return any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors_in(item))


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
