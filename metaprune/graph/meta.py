"""What frequent calls give on meta tensors, without torch's decompositions in Python.

Most of the time of a trace would go into them: a batch norm takes 0.7 ms, a hard-swish 1.3, a recurrent layer as much
for every step of its sequence. Each shortcut covers the plain case alone, in which the result is like the first operand
or like that of one step, and leaves every other to torch, errors included.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

aten = torch.ops.aten

_UNARY = (
    *(aten.relu, aten.relu6, aten.gelu, aten.silu, aten.mish, aten.elu, aten.celu, aten.selu, aten.leaky_relu),
    *(aten.hardswish, aten.hardsigmoid, aten.hardtanh, aten.sigmoid, aten.tanh, aten.softplus, aten.clamp),
)
_BINARY = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor)


def on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a call, or None where torch must make it."""
    if func in _RECURRENT:
        return _from_one_step(func, args, kwargs)
    shortcut = _SHORTCUTS.get(func)
    if shortcut is None or not args or not _plain(args[0]) or not shortcut(args, kwargs):
        return None
    x = args[0]
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _from_one_step(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """(input, states, parameters, ..., batch_first), over a sequence: as long as the input, else as for one step."""
    x = args[0]
    if kwargs or not x.is_meta or not x.numel():
        return None
    time = 1 if args[-1] else 0
    step, *states = func(x.narrow(time, 0, 1), *args[1:])
    out = step.new_empty(x.shape[time], x.shape[1 - time], step.shape[-1])  # time comes first in memory
    return (out.transpose(0, 1) if time else out, *states)


def _plain(tensor: Any) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and (
        tensor.is_meta and tensor.is_floating_point() and tensor.is_contiguous()
    )


def _numbers_besides(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return not any(isinstance(item, Tensor) for item in (*args[1:], *kwargs.values()))


def _two_alike(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    x, *others = args
    return not kwargs and len(others) == 1 and _fits(others[0], x, x.shape) and others[0] is not None


def _batch_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """(input, weight, bias, running_mean, running_var, training, ...), with stored statistics."""
    if kwargs or len(args) < 6 or args[5] or args[3] is None or args[4] is None or args[0].ndim < 2:
        return False
    return all(_fits(tensor, args[0], args[0].shape[1:2]) for tensor in args[1:5])


def _over_last(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """(input, normalized_shape, weight, bias, ...)."""
    if kwargs or len(args) < 2 or not args[1]:
        return False
    shape = args[0].shape[-len(args[1]) :]
    tensors = [item for item in args[2:4] if item is None or isinstance(item, Tensor)]
    return tuple(args[1]) == tuple(shape) and all(_fits(tensor, args[0], shape) for tensor in tensors)


def _fits(tensor: Any, x: Tensor, shape: torch.Size) -> bool:
    """Absent, or of the same type and this shape."""
    return tensor is None or (_plain(tensor) and tensor.dtype == x.dtype and tensor.shape == shape)


_RECURRENT = {aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input}
_SHORTCUTS: dict[Any, Callable[[tuple[Any, ...], dict[str, Any]], bool]] = {
    **{packet.default: _numbers_besides for packet in _UNARY},
    **dict.fromkeys(_BINARY, _two_alike),
    aten.batch_norm.default: _batch_norm,
    aten.layer_norm.default: _over_last,
    aten.rms_norm.default: _over_last,
}
