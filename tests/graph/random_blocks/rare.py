"""Calls without a rule, and calls that are rare."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.random_blocks.base import Apply, Shape, block


@torch.library.custom_op("metaprune_tests::odd", mutates_args=())
def odd(x: Tensor) -> Tensor:
    """Mixes every entry with its place, so that no unit may leave."""
    places = torch.arange(x[0].numel(), dtype=x.dtype).view_as(x[0])
    return x * torch.cos(places) + x.roll(1, -1)


@odd.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _plus_one(x: Tensor) -> Tensor:
    return 1 + x.mean(tuple(k for k in range(x.ndim) if k != 1))


def _as_map(x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:2], 1, -1)


RARE: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm_computed": lambda x: (
        F.layer_norm(x, (x.shape[-1],), 1 + x[0].flatten(0, -2).mean(0), x[0].flatten(0, -2).sum(0))
        if x.ndim > 2
        else x
    ),
    "rms_norm_computed": lambda x: F.rms_norm(x, (x.shape[-1],), 1 + x.flatten(0, -2).mean(0), 1e-5),
    "group_norm_computed": lambda x: F.group_norm(x, 1, _plus_one(x)),
    "group_norm_shifted": lambda x: F.group_norm(x, x.shape[1], None, _plus_one(x)) if x.ndim > 2 else x,
    "batch_norm_computed": lambda x: F.batch_norm(
        x, _plus_one(x) * 0.1, _plus_one(x) ** 2, _plus_one(x), _plus_one(x) - 1
    ),
    "batch_norm_weight": lambda x: F.batch_norm(x.sigmoid(), _plus_one(x) * 0, _plus_one(x) ** 2, _plus_one(x) - 1),
    "batch_norm_of_batch": lambda x: F.batch_norm(x, None, None, training=True, eps=0.1),
    "instance_norm_shifted": lambda x: F.instance_norm(x, bias=_plus_one(x)),
    "conv_of_itself": lambda x: F.conv1d(x, x.mean(0)[None, :, :1].expand(2, -1, -1)),
    "conv_grouped_by_itself": lambda x: F.conv1d(x, x.mean(0)[:, None, :1], groups=x.shape[1]),
    "embedding_bag": lambda x: F.embedding_bag(
        torch.zeros(len(x), 2, dtype=torch.long, device=x.device), x[0].flatten(1)
    ),
    "one_hot": lambda x: F.one_hot((x > 0).long().sum(-1).clamp(max=3), 4).double(),
    "amin": lambda x: x - x.amin(1, keepdim=True),
    "aminmax": lambda x: torch.aminmax(x, dim=1)[0],
    "nansum": lambda x: x.nansum(1),
    "nanmean": lambda x: x.nanmean(-1),
    "kthvalue": lambda x: x.kthvalue(2, 1)[0],
    "msort": lambda x: torch.msort(x.transpose(0, 1)).transpose(0, 1),
    "mode": lambda x: x.round().mode(1)[0],
    "count_nonzero": lambda x: x * x.count_nonzero(dim=1).view(-1, *[1] * (x.ndim - 1)),
    "any": lambda x: x * (x > 0).any(1, keepdim=True),
    "full_like": lambda x: x + torch.full_like(x, 0.25),
    "full": lambda x: x * torch.full((x.shape[1],), 0.3, dtype=x.dtype, device=x.device).view(-1, *[1] * (x.ndim - 2)),
    "ones_summed": lambda x: torch.ones_like(x).cumsum(1) + x,
    "zeros_filled": lambda x: torch.zeros_like(x).fill_(0.5) * x.sigmoid(),
    "empty_filled": lambda x: torch.empty_like(x).copy_(x.sigmoid()),
    "zero_then_set": lambda x: torch.zeros_like(x).masked_fill(x > 0, 2.0),
    "index_fill": lambda x: x.index_fill(1, torch.zeros(1, dtype=torch.long, device=x.device), 0.5),
    "index_copy": lambda x: x.index_copy(0, torch.arange(len(x), device=x.device), x.cos()),
    "index_reduce": lambda x: x.index_reduce(0, torch.arange(len(x), device=x.device), x.cos(), "amax"),
    "masked_select_mean": lambda x: x * torch.masked_select(x, x > 0).mean(),
    "var_mean": lambda x: torch.var_mean(x, -1, correction=0)[0],
    "norm_one": lambda x: x / (1 + x.norm(p=1, dim=1, keepdim=True)),
    "norm_zero": lambda x: x / (1 + torch.linalg.vector_norm(x, 0, dim=1, keepdim=True)),
    "norm_negative": lambda x: x.abs().add(0.1).norm(p=-1, dim=1),
    "grid_sample": lambda x: F.grid_sample(
        x,
        torch.linspace(-1, 1, 2 * 4, dtype=x.dtype, device=x.device).view(1, 2, 2, 2).expand(len(x), -1, -1, -1),
        align_corners=False,
    ),
    "affine_grid": lambda x: F.grid_sample(
        x,
        F.affine_grid(
            x.mean((1, 2, 3)).view(-1, 1, 1) + torch.eye(2, 3, dtype=x.dtype, device=x.device),
            list(x.shape),
            align_corners=False,
        ),
        align_corners=False,
    ),
    "outer_of_first": lambda x: torch.outer(x[0], x[1]).unsqueeze(0).expand(len(x), -1, -1),
    "dot": lambda x: x * torch.dot(x[0], x[1]),
    "softmin": lambda x: F.softmin(x, dim=1),
    "softmax_both": lambda x: x.flatten(1).softmax(1).view_as(x),
    "softmax_of_pairs": lambda x: x.view(len(x), -1, 2, *x.shape[2:]).softmax(2).view_as(x),
    "swapaxes": lambda x: x.swapaxes(1, -1).swapdims(0, 0),
    "numpy_t": lambda x: x.permute(*range(x.ndim - 1, -1, -1)).T if x.ndim == 2 else x.transpose(1, -1),
    "triu": lambda x: torch.triu(x, 1),
    "complex": lambda x: torch.view_as_real(
        torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous()) * 1j
    ).flatten(-2),
    "complex_halves": lambda x: torch.complex(*x.chunk(2, -1)).abs(),
    "polar": lambda x: torch.polar(x.abs(), x).real,
    "hardswish": F.hardswish,
    "feature_dropout": lambda x: F.dropout1d(x, 0.5, training=False),
    "rand_like": lambda x: x + 0 * torch.rand_like(x),
    "scale_by_size": lambda x: x * (x.shape[-1] / x.shape[1]),
    "mean_of_halves": lambda x: torch.cat([half - half.mean(1, keepdim=True) for half in x.chunk(2, 1)], 1),
    "unflatten_named": lambda x: x.unflatten(-1, (2, -1)).sum(-2),
    "unflatten_inner": lambda x: x.unflatten(1, (-1, 2)).amax(2),
    "expand_then_sum": lambda x: x.unsqueeze(1).expand(-1, 3, *[-1] * (x.ndim - 1)).sum(1),
    "expand_and_join": lambda x: (
        (x.unsqueeze(2).expand(-1, -1, 2, *[-1] * (x.ndim - 2)).flatten(1, 2)).view(len(x), 2, -1, *x.shape[2:]).sum(1)
    ),
    "repeat_as_batch": lambda x: x.repeat(2, *[1] * (x.ndim - 1)).view(2, *x.shape).mean(0),
    "cumsum_batch": lambda x: x.cumsum(0),
    "cat_batch": lambda x: torch.cat([x, x.flip(1)], 0).chunk(2, 0)[1],
    "stack_and_select": lambda x: torch.stack([x, x.tanh(), x * 2], 1)[:, 1],
    "write_into_zeros": lambda x: (lambda out: (out[:, 1:].add_(x[:, :-1]), out)[1])(torch.zeros_like(x)),
    "write_half": lambda x: (
        lambda out: (out[..., : x.shape[-1] // 2].copy_(x[..., x.shape[-1] // 2 :][..., : x.shape[-1] // 2]), out)[1]
    )(x.clone()),
    "write_through_view": lambda x: (lambda out: (out.view(len(x), -1).mul_(0.5).sigmoid_(), out)[1])(
        x.clone(memory_format=torch.contiguous_format)
    ),
    "write_through_transpose": lambda x: (lambda out: (out.transpose(1, -1).add_(0.5), out)[1])(x.clone()),
    "write_out": lambda x: torch.add(x, 1, out=torch.empty_like(x)),
    "write_scalar": lambda x: (lambda out: (out.__setitem__((slice(None), 0), 0.5), out)[1])(x.clone()),
    "write_mask": lambda x: (lambda out: (out.__setitem__(x > 0.2, 0.7), out)[1])(x.clone()),
    "foreach": lambda x: torch._foreach_add([x, x * 2], 1.0)[1],
    "foreach_": lambda x: (lambda out: (torch._foreach_add_([out], 0.5), out)[1])(x.clone()),
    "broadcast_tensors": lambda x: torch.broadcast_tensors(x[:, :1], x)[0] * x,
    "einsum_outer": lambda x: (
        torch.einsum("ni,nj->nij", x, x.cos()) if x.ndim == 2 else torch.einsum("ni...,nj...->nij...", x, x.cos())
    ),
    "einsum_sum": lambda x: torch.einsum("n...->n", x).view(-1, *[1] * (x.ndim - 1)) * x,
    "einsum_diagonal": lambda x: torch.einsum("nii->ni", x),
    "einsum_three": lambda x: torch.einsum("nti,nsi,nsj->ntj", x, x.cos(), x.sigmoid()),
    "mask_of_own": lambda x: (
        x * (x.mean(tuple(range(2, x.ndim))) > 0).view(*x.shape[:2], *[1] * (x.ndim - 2)) if x.ndim > 2 else x
    ),
    "not_mask": lambda x: (~(x > 0)).double(),
    "int_and_back": lambda x: (x * 4).long().remainder(3).double(),
    "int_shifted": lambda x: ((x * 4).long() + 1).double(),
    "float_and_back": lambda x: x.float().double().half().double(),
    "fold_channels": lambda x: F.fold(x, (3, 3), 2) if x.shape[-1] == 4 else x,
    "max_unpool": lambda x: F.max_unpool1d(*F.max_pool1d(x, 2, return_indices=True), 2),
    "fractional": lambda x: F.adaptive_max_pool1d(x, 2),
    "sdpa_self": lambda x: F.scaled_dot_product_attention(x, x, x.cos()),
    "sdpa_causal": lambda x: F.scaled_dot_product_attention(x, x.tanh(), x, is_causal=True),
    "sdpa_masked": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=x @ x.mT),
    "sdpa_heads_of_channels": lambda x: (
        F.scaled_dot_product_attention(*(x.unflatten(-1, (2, -1)).transpose(1, 2),) * 3).transpose(1, 2).flatten(2)
    ),
    "channel_attention": lambda x: F.scaled_dot_product_attention(x.mT, x.mT, x.mT).mT,
    "bmm": lambda x: torch.bmm(x, x.mT.softmax(-1)),
    "pad_negative": lambda x: F.pad(x, (-1, 1)),
    "pad_channels_one": lambda x: F.pad(x, (*[0, 0] * (x.ndim - 2), 1, 1), value=1.0),
    "pad_circular": lambda x: F.pad(x, (1, 1), mode="circular") if x.ndim == 3 else x,
    "logsumexp_pairs": lambda x: x.unflatten(1, (-1, 2)).logsumexp(2),
    "prod_pairs": lambda x: x.unflatten(1, (2, -1)).prod(1),
    "where_scalar": lambda x: torch.where(x > 0, x, 0.3),
    "where_scalar_zero": lambda x: torch.where(x > 0, x, 0.0),
    "where_inverse": lambda x: torch.where(x > 0, 0.3, x),
    "xlogy": lambda x: torch.xlogy(x, 2 + x * x),
    "ldexp": lambda x: torch.ldexp(x, torch.ones_like(x)),
    "copysign": lambda x: torch.copysign(torch.ones_like(x), x),
    "heaviside": lambda x: torch.heaviside(x, torch.full_like(x, 0.5)),
    "nextafter": lambda x: torch.exp2(x) - 1,
    "sinc": torch.sinc,
    "erfc": torch.erfc,
    "logaddexp": lambda x: torch.logaddexp(x, x * 0.5),
    "floor_divide": lambda x: torch.floor_divide(x, 0.3),
    "float_power": lambda x: x.float_power(0),
    "pow_zero": lambda x: x**0,
    "pow_of_number": lambda x: 2.0**x,
    "clamp_tensor": lambda x: torch.clamp(x, min=torch.full((), 0.1, dtype=x.dtype, device=x.device)),
    "threshold_": lambda x: F.threshold(x, 0.1, 20.0),
    "threshold_low": lambda x: F.threshold(x, -1.0, 20.0),
    "hardshrink": lambda x: F.hardshrink(x, 0.2),
    "relu6_shifted": lambda x: F.relu6(x + 3) / 6,
    "celu": F.celu,
    "softsign": F.softsign,
    "logsigmoid": F.logsigmoid,
    "rrelu": lambda x: F.rrelu(x),
    "digamma": lambda x: torch.lgamma(x.abs() + 1.5),
    "addcdiv": lambda x: torch.addcdiv(x, torch.ones_like(x), 1 + x * x),
    "sub_number": lambda x: torch.sub(x, 0.5, alpha=2),
    "alias_add": lambda x: x.add(x, alpha=-0.5),
    "logical_not": lambda x: torch.logical_not(x > 0).to(x.dtype),
    "isclose": lambda x: x + torch.isclose(x, x * 1.0).double(),
    "odd": odd,
    "diff": lambda x: torch.diff(x, dim=-1),
    "diff_first": lambda x: torch.diff(x, dim=1),
    "cdist": lambda x: torch.cdist(x, x + 1),
    "trapezoid": lambda x: torch.trapezoid(x, dim=1),
    "kron": lambda x: torch.kron(x, torch.ones(1, 2, dtype=x.dtype, device=x.device)) if x.ndim == 2 else x,
    "rot90": lambda x: torch.rot90(x, 1, (1, x.ndim - 1)),
    "tril": lambda x: torch.tril(x),
    "cummax": lambda x: torch.cummax(x, 1)[0],
    "logcumsumexp": lambda x: torch.logcumsumexp(x, 1),
    "renorm": lambda x: torch.renorm(x, 2, 1, 0.5),
    "movedim": lambda x: torch.movedim(x, 1, -1),
    "diagonal": lambda x: torch.diagonal(x, 0, 1, 2),
    "as_strided": lambda x: x.contiguous().as_strided(x.shape, x.contiguous().stride()),
    "scatter": lambda x: torch.zeros_like(x).scatter(1, torch.zeros_like(x, dtype=torch.long), x),
    "scatter_add": lambda x: torch.ones_like(x).scatter_add(1, torch.zeros_like(x, dtype=torch.long), x),
    "index_add": lambda x: x.index_add(1, torch.zeros(1, dtype=torch.long, device=x.device), x[:, :1]),
    "select_scatter": lambda x: torch.select_scatter(x, x[:, 0] * 2, 1, 0),
    "slice_scatter": lambda x: torch.slice_scatter(x, x[:, 1:] * 2, 1, 1),
    "fold": lambda x: F.fold(F.unfold(x, 2, stride=2), (4, 4), 2, stride=2),
    "cosine": lambda x: F.cosine_similarity(x, x.flip(1), dim=1),
    "pairwise": lambda x: F.pairwise_distance(x, x * 0.5),
    "tensordot": lambda x: torch.tensordot(x, x, dims=([-1], [-1])).sum(x.ndim - 1),
    "take_along": lambda x: torch.take_along_dim(x, x.argsort(1), 1),
    "quantile": lambda x: torch.quantile(x, 0.5, dim=1),
    "bucketize": lambda x: (
        x * torch.bucketize(x.contiguous(), torch.tensor([0.0, 0.3], dtype=x.dtype, device=x.device))
    ),
    "stack_unbind": lambda x: torch.stack(x.unbind(1)[::-1], 1),
    "hstack": lambda x: torch.hstack([x, x * 2]),
    "dstack": lambda x: torch.dstack([x, x.tanh()]),
    "vander": lambda x: torch.linalg.vander(x, N=3),
    "cov": lambda x: torch.stack([torch.cov(part.flatten(1)) for part in x]) if x.ndim > 2 else x,
    "fft": lambda x: torch.fft.rfft(x, dim=-1).abs(),
    "fft_first": lambda x: torch.fft.fft(x, dim=1).real,
    "meshgrid": lambda x: (
        x + torch.linspace(0, 1, x.shape[1], dtype=x.dtype, device=x.device).view(-1, *[1] * (x.ndim - 2))
    ),
    "arange": lambda x: x * torch.arange(x.shape[-1], dtype=x.dtype, device=x.device),
    "constant": lambda x: x + torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype).to(x.device),
    "eye": lambda x: x + torch.eye(x.shape[-2], x.shape[-1], dtype=x.dtype, device=x.device),
    "tile": lambda x: torch.tile(x, (1, 2, *[1] * (x.ndim - 2))),
    "roll_all": lambda x: torch.roll(x, 1),
    "unfold_dim": lambda x: x.unfold(1, 2, 1).flatten(1, 2),
    "count": lambda x: x * x.shape[1] ** -0.5,
    "sum_all": lambda x: x / (1 + x.pow(2).sum(dim=tuple(range(1, x.ndim)), keepdim=True)),
    "max_other": lambda x: x - x.amax(tuple(range(1, x.ndim)), keepdim=True),
    "std_mean": lambda x: torch.std_mean(x, 1)[1],
    "weighted": lambda x: torch.einsum("n...,n...->n...", x, x),
    "diag_embed": lambda x: torch.diag_embed(x),
    "outer": lambda x: x.unsqueeze(-1) * x.unsqueeze(1) if x.ndim == 2 else x,
    "gram": lambda x: x @ x.mT,
    "cross_gram": lambda x: x.flatten(2).mT @ x.flatten(2),
    "channel_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1) * 2,
    "two_halves": lambda x: x.view(len(x), 2, x.shape[1] // 2, *x.shape[2:]).sum(1),
    "two_halves_picked": lambda x: (lambda y: y[:, 0] * y[:, 1].sigmoid())(
        x.view(len(x), 2, x.shape[1] // 2, *x.shape[2:])
    ),
    "radix": lambda x: (lambda y: (y * y.softmax(1)).sum(1))(x.view(len(x), 2, x.shape[1] // 2, *x.shape[2:])),
    "index_put": lambda x: x.index_put((torch.arange(len(x), device=x.device),), x * 2),
    "new_zeros": lambda x: torch.cat([x, x.new_zeros(x.shape)], 1),
    "new_full": lambda x: x + x.new_full((x.shape[-1],), 0.5),
    "ones_cat": lambda x: torch.cat([torch.ones_like(x[:, :1]), x], 1),
    "where_index": lambda x: x * (torch.arange(x.shape[1], device=x.device) > 1).view(-1, *[1] * (x.ndim - 2)),
    "even_odd": lambda x: torch.stack([x[..., ::2], x[..., 1::2]], -1).flatten(-2),
    "rotary": lambda x: torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) + x,
    "lift": lambda x: (
        x[:, None] * x[:, :, None] if x.ndim == 2 else x[:, None].expand(-1, 2, *[-1] * (x.ndim - 1)).flatten(1, 2)
    ),
    "baddbmm": lambda x: torch.baddbmm(x, x @ x.mT, x),
    "addmm": lambda x: torch.addmm(x, x @ x.mT, x),
    "addbmm": lambda x: torch.addbmm(x[0], x, x.mT @ x).expand_as(x),
    "mv": lambda x: torch.mv(x, x[0]).unsqueeze(1) * x,
    "norm_first": lambda x: x / (1e-2 + x.norm(dim=1, keepdim=True)),
    "norm_inf": lambda x: x / (1 + x.abs().amax(-1, keepdim=True)),
    "view_as": lambda x: (x.reshape(-1).view_as(x) * 2).reshape_as(x),
    "t": lambda x: x.mT.contiguous().mT,
    "chain": lambda x: x.unflatten(1, (2, -1)).flatten(0, 1).unflatten(0, (-1, 2)).flatten(1, 2),
    "chain2": lambda x: (
        x.transpose(0, 1).reshape(x.shape[1], -1).reshape(x.transpose(0, 1).shape).transpose(0, 1).tanh()
    ),
    "swap": lambda x: x.view(len(x), -1, 2, *x.shape[2:]).flip(2).reshape(x.shape),
    "batch_mean": lambda x: x - x.mean(0),
    "batch_roll": lambda x: x + x.roll(1, 0),
    "batch_gram": lambda x: torch.einsum("n...,m...->nm", x, x) @ x.flatten(1),
}


@block("rare", (1, 2, 3), lambda c, s: {"name": c.one(list(RARE))}, weight=14)
def rare(shapes: list[Shape], name: str) -> nn.Module:
    return Apply(lambda self, x: RARE[name](x))
