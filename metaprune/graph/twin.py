"""Copies of a model: with other tensors, and with integers that remember where they live."""

import copy
import types
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metaprune.errors import UnsupportedModelError
from metaprune.graph.adapt import adapt
from metaprune.graph.record import Origin, SharedSource, Source, TracedInt, tensors_in


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name they have."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def copy_with(model: nn.Module, replace: Callable[[Tensor], Tensor]) -> tuple[nn.Module, dict[int, Any]]:
    """A copy of a model in which every tensor is replaced; tensors that are one stay one.

    What cannot be copied (a lock, an open file) is shared with the original.

    Returns:
        The copy, and the memory of what became what, by address.

    Raises:
        UnsupportedModelError: The model cannot be copied even so.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in tensors_in(vars(module)):
            if id(tensor) not in memo:
                memo[id(tensor)] = replace(tensor)
        for item in vars(module).values():  # a dozen of hooks a module, which would take most of the time
            if type(item) in (dict, OrderedDict, set) and not item:
                memo[id(item)] = type(item)()
    before = dict(memo)
    try:
        return _whole(model, copy.deepcopy(model, memo), memo), memo
    except UnsupportedModelError:
        raise
    except Exception:
        memo = before
        for module in model.modules():
            for name, item in vars(module).items():
                if name not in _OWN and not _copies(item, memo):
                    memo[id(item)] = item
    try:
        return _whole(model, copy.deepcopy(model, memo), memo), memo
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"a model must be copyable, but {type(model).__name__} is not: {type(error).__name__}: {error}. "
            "Keep what cannot be copied out of its attributes."
        ) from error


def _whole(model: nn.Module, other: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """The copy, if it shares no module with the model and has the tensors that it should have."""
    _copy_slots(model, memo)
    scripted = [f"{path}." for path, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    shared = {id(module) for module in model.modules()}
    wrong = next((path for path, module in other.named_modules() if id(module) in shared), None)
    copied = named_tensors(other)
    for name, tensor in named_tensors(model).items():
        inside = any(path == "." or name.startswith(path) for path in scripted)
        if wrong is None and not inside and copied.get(name) is not memo[id(tensor)]:
            wrong = name.rpartition(".")[0]
    if wrong is not None:
        raise UnsupportedModelError(
            f"a copy of a model must be whole and its own, but {wrong or type(model).__name__} is not copied so: its "
            "class, or one around it, has a `__deepcopy__` or `__setstate__` that does something else."
        )
    return other


def _copy_slots(model: nn.Module, memo: dict[int, Any]) -> None:
    """What classes with `__slots__` keep there; modules are copied by their dictionaries alone."""
    for module in model.modules():
        for cls in type(module).__mro__:
            slots = cls.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if not name.startswith("__") and hasattr(module, name) and id(module) in memo:
                    setattr(memo[id(module)], name, copy.deepcopy(getattr(module, name), memo))


def _copies(item: Any, memo: dict[int, Any]) -> bool:
    try:
        copy.deepcopy(item, dict(memo))
    except Exception:
        return False
    return True


_OWN = frozenset(vars(nn.Module()))


def twin(model: nn.Module, *, real: bool) -> nn.Module:
    """A copy for tracing, in evaluation mode.

    Its tensors are meta (or clones, if `real`), its integer attributes remember where they live, and its hooks have
    closures of their own, so that what they collect stays with the copy.
    """

    def replace(tensor: Tensor) -> Tensor:
        data = tensor.detach()
        if real:
            data = data.clone()
        elif data.device.type != "meta":
            data = torch.empty_strided(data.shape, data.stride(), dtype=data.dtype, device="meta")
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(data, requires_grad=False)
        data._metaprune_original = tensor  # type: ignore[attr-defined]
        return data

    other, memo = copy_with(model, replace)
    adapt(other)
    _trace_objects(other, model)
    for path, module in other.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for name, item in list(vars(module).items()):
            if name not in _OWN:
                vars(module)[name] = _traced(item, partial(Source, path, name))
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in hooks.items():
                hooks[key] = _with_own_closure(hook, memo)
    return other.eval()


def original_of(tensor: Tensor) -> Tensor:
    """The tensor of the given model that a plain attribute of its copy stands for; any other tensor itself."""
    original: Tensor = getattr(tensor, "_metaprune_original", tensor)
    return original


def _traced(item: Any, source: Callable[..., Origin]) -> Any:
    if type(item) is int:
        return TracedInt(item, source())
    if type(item) in (list, tuple) and item and all(type(entry) is int for entry in item):
        return type(item)(TracedInt(entry, source(k)) for k, entry in enumerate(item))
    return item


def _trace_objects(model: nn.Module, original: nn.Module) -> None:
    """Integers of plain objects that modules hold (configurations) remember where they live too."""
    foreign = {id(item) for module in original.modules() for _, item in _objects(module)}
    holders: dict[int, tuple[Any, dict[str, str]]] = {}
    for path, module in model.named_modules():
        for way, item in _objects(module):
            if id(item) not in foreign:  # what could not be copied belongs to the user
                holders.setdefault(id(item), (item, {}))[1].setdefault(path, way)
    for item, by_module in holders.values():
        for name, entry in list(vars(item).items()):
            vars(item)[name] = _traced(entry, partial(SharedSource, by_module, name))


def _objects(module: nn.Module) -> list[tuple[str, Any]]:
    """Plain objects that a module holds, and those that these hold, each with the attributes that lead to it."""
    if isinstance(module, torch.jit.ScriptModule):
        return []
    found = [(name, item) for name, item in vars(module).items() if name not in _OWN and _is_plain_object(item)]
    inner = [(f"{name}.{part}", item) for name, held in found for part, item in vars(held).items()]
    return found + [(way, item) for way, item in inner if _is_plain_object(item)]


def _is_plain_object(item: Any) -> bool:
    if isinstance(item, (nn.Module, Tensor, type, types.ModuleType, types.FunctionType, types.MethodType, Enum)):
        return False
    return isinstance(getattr(item, "__dict__", None), dict) and not type(item).__module__.startswith("torch")


def _with_own_closure(hook: Any, memo: dict[int, Any]) -> Any:
    if not isinstance(hook, types.FunctionType) or not hook.__closure__:
        return hook
    cells = []
    for cell in hook.__closure__:
        try:
            cells.append(types.CellType(copy.deepcopy(cell.cell_contents, memo)))
        except Exception:  # an empty cell, or something that cannot be copied: share it
            cells.append(cell)
    own = types.FunctionType(hook.__code__, hook.__globals__, hook.__name__, hook.__defaults__, tuple(cells))
    own.__kwdefaults__ = hook.__kwdefaults__
    return own
