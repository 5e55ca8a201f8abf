"""Attention in the one form that the exporter takes: queries, keys and values of four dimensions."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

_ATTENTION = (scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)
_POSITIONAL = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class FourDimensionalAttention(TorchFunctionMode):
    """While active, attention over tensors of another number of dimensions is computed on four.

    All dimensions before the heads become one, or one is added in front. Attention does not mix them, so that the
    numbers stay the same. Tensors whose dimensions before the heads differ are left to the exporter.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = {**dict(zip(_POSITIONAL, args)), **(kwargs or {})} if func in _ATTENTION else {}
        tensors = [named[name] for name in ("query", "key", "value") if named]
        fitting = all(tensor.ndim == 4 for tensor in tensors)
        if fitting or any(tensor.shape[:-3] != tensors[0].shape[:-3] for tensor in tensors):
            return func(*args, **(kwargs or {}))
        query, _, value = tensors
        if (mask := named.get("attn_mask")) is not None and mask.ndim > 3:
            named["attn_mask"] = mask.expand(*query.shape[:-3], *mask.shape[-3:])
        folded = {name: _fold(item) if isinstance(item, Tensor) else item for name, item in named.items()}
        return func(**folded).reshape(*query.shape[:-1], value.shape[-1])


def _fold(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, -4) if tensor.ndim > 4 else tensor[(None,) * (4 - tensor.ndim)]
