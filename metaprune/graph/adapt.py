"""Layers of torch whose code computes one size from another, with each size an attribute of its own.

``nn.MultiheadAttention`` takes its inner width to be its outer one and its head size to be their quotient, so that no
part of it could be cut. The same layer with the same parameters, but free sizes, stands in for it: in every trace, and
in a cut network where its sizes have changed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SizedMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with free sizes; parameters, arguments and results are the same.

    Made by :func:`adapt` from an existing layer, never built.

    Attributes:
        num_heads: Number of heads.
        head_dim: Size of a head's queries and keys.
        value_dim: Size of a head's values.
        split_sizes: Rows of queries, keys and values in the packed projection.
        scale: Factor of the scores, that of the layer as it was built.
    """

    value_dim: int
    split_sizes: tuple[int, int, int]
    scale: float

    def forward(  # noqa: D102
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        weights, biases = self._projections()
        q, k, v = (
            F.linear(x, weight, bias) for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], -1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], -1, -1)], dim=1)
        q = q.view(q.shape[0], q.shape[1], self.num_heads, self.head_dim).transpose(1, 2)
        k = k.view(k.shape[0], k.shape[1], self.num_heads, self.head_dim).transpose(1, 2)
        v = v.view(v.shape[0], v.shape[1], self.num_heads, self.value_dim).transpose(1, 2)
        if self.add_zero_attn:
            k = torch.cat([k, torch.zeros_like(k[:, :, :1])], dim=2)
            v = torch.cat([v, torch.zeros_like(v[:, :, :1])], dim=2)
        mask = self._mask(q, k.shape[2], key_padding_mask, attn_mask)
        if need_weights:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            attention = F.softmax(scores if mask is None else scores + mask, dim=-1)
            attention = F.dropout(attention, self.dropout, self.training)
            out = attention @ v
        else:
            dropout = self.dropout if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.scale)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        shown = None
        if need_weights:
            shown = attention.mean(dim=1) if average_attn_weights else attention
        if not batched:
            return out.squeeze(0), None if shown is None else shown.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), shown

    def _projections(self) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.split_with_sizes(self.split_sizes, dim=0)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_bias is None:
            return tuple(weights), (None, None, None)
        return tuple(weights), tuple(self.in_proj_bias.split_with_sizes(self.split_sizes, dim=0))

    def _mask(self, q: Tensor, length: int, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Both masks as one that is added to the scores (B, heads, L, S)."""
        total: Tensor | None = None
        if mask is not None:
            total = _additive(mask, q.dtype)
            total = total.view(q.shape[0], self.num_heads, *total.shape[-2:]) if total.dim() == 3 else total
        if padding is not None:
            padded = _additive(padding, q.dtype)[:, None, None, :]
            total = padded if total is None else total + padded
        if total is not None and total.shape[-1] < length:  # keys that the layer added itself
            total = F.pad(total, (0, length - total.shape[-1]))
        return total


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
    return mask.to(dtype)


def adapt(model: nn.Module, *, changed_only: bool = False) -> nn.Module:
    """Let every ``nn.MultiheadAttention`` of a model have free sizes, in place; `changed_only` leaves whole ones."""
    for module in model.modules():
        if type(module) is nn.MultiheadAttention and not (changed_only and _is_whole(module)):
            head_dim = module.embed_dim // module.num_heads
            module.__class__ = SizedMultiheadAttention
            vars(module).update(
                head_dim=head_dim,
                value_dim=head_dim,
                split_sizes=(module.embed_dim,) * 3,
                scale=head_dim**-0.5,
                _qkv_same_embed_dim=False,  # keeps torch's encoder layers from computing around this forward
            )
    return model


def _is_whole(module: nn.MultiheadAttention) -> bool:
    width = module.embed_dim
    if tuple(module.out_proj.weight.shape) != (width, width):
        return False
    if module.in_proj_weight is not None:
        return tuple(module.in_proj_weight.shape) == (3 * width, width)
    shapes = [tuple(weight.shape) for weight in (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)]
    return shapes == [(width, width), (width, module.kdim), (width, module.vdim)]
