"""Fused attention."""

from metaprune.graph.dispatch import Call
from metaprune.graph.record import Dims, tensors_in
from metaprune.graph.rules._base import fixed, is_zero, rule, with_zero


@rule(
    "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math",
)
def attention(call: Call) -> Dims | list[Dims]:
    """query (..., H, L, E), key (..., H, S, E), value (..., H, S, V) -> (..., H, L, V).

    Heads and the dimensions E and V are free; the softmax runs over S, which stays.
    """
    query, key, value = (call.dims(call[name]) for name in ("query", "key", "value"))
    repeated = bool(call.get("enable_gqa")) and query[-3].size != key[-3].size
    if repeated:
        heads, groups = call.unify(key[-3], value[-3]), query[-3].size // key[-3].size
        kv, inside = call.split(query[-3], [heads.size, groups])
        call.unify(kv, heads)
        call.computed_from(inside)  # code may repeat the keys itself elsewhere, by a number that is not seen here
        batch = [query[-3]]
    else:
        batch = [call.unify(*parts) for parts in zip(query[:-2], key[:-2], value[:-2])][-1:] if len(query) > 2 else []
    outer = [
        with_zero(call.unify(*parts), is_zero(parts[2])) for parts in zip(query[:-3], key[:-3], value[:-3], strict=True)
    ]
    width = call.unify(query[-1], key[-1])
    length = call.unify(key[-2], value[-2])
    call.freeze(length, reason=f"a softmax runs over it in {call.where}")
    call.sum_over(with_zero(width, query[-1].zero or key[-1].zero))
    if call.get("scale") is None:  # taken from the size; the masked network keeps it
        call.constants["scale", None] = query[-1].size ** -0.5
        call.computed_from(width)
    mask = call.get("attn_mask", call.get("attn_bias"))
    if mask is not None:
        for k, dim in enumerate(reversed(call.dims(mask))):
            call.unify(dim, ([*outer, *batch, query[-2], length])[-1 - k])
    for dim in batch:
        call.units.hint(dim, "head")
    call.units.hint(width, "head_dim")
    call.units.hint(value[-1], "head_dim")
    shared = [*outer, *batch, query[-2], length]
    call.macs(*shared, width)
    call.macs(*shared, value[-1])
    heads_out = [with_zero(dim, value[-3].zero) for dim in batch]
    out: Dims = (*outer, *heads_out, with_zero(query[-2], False), value[-1])
    rest = tensors_in(call.out)[1:]
    return [out, *(fixed(tensor.shape) for tensor in rest)] if rest else out
