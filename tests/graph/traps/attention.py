"""Attention."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.graph.traps._base import case, conv, image, sequence


class Attention(nn.Module):
    """Width 12, three heads of 4; `split` gives q, k and v of shape (B, h, N, d)."""

    def __init__(self, width=12, heads=3):
        super().__init__()
        self.inside, self.qkv, self.proj = nn.Linear(8, width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.out, self.heads, self.dim, self.scale = (
            nn.Linear(width, 3),
            heads,
            width // heads,
            (width // heads) ** -0.5,
        )

    def qkv_heads(self, x):
        raise NotImplementedError

    def weights(self, q, k):
        return (q @ k.transpose(-2, -1) * self.scale).softmax(-1)

    def forward(self, x):
        x = self.inside(x)
        q, k, v = self.qkv_heads(x)
        y = (self.weights(q, k) @ v).transpose(1, 2).flatten(2)
        return self.out(x + self.proj(y))


ATTENTION = "inside.weight:0 qkv.weight:0 proj.weight:1"


@case(sequence(), free=ATTENTION)
class attention_unbind(Attention):
    def qkv_heads(self, x):
        b, n, _ = x.shape
        return self.qkv(x).reshape(b, n, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4).unbind(0)


@case(sequence(), free=ATTENTION)
class attention_unbind_free_dim(Attention):
    """The head dimension follows from the tensor, so that only the number of heads is written."""

    def qkv_heads(self, x):
        b, n, _ = x.shape
        return self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


@case(sequence(), free="inside.weight:0 proj.weight:1 out.weight:1")
class attention_of_one_head(Attention):
    """A dimension of size 1 between those of the view."""

    def __init__(self):
        super().__init__(12, 1)

    def qkv_heads(self, x):
        return self.qkv(x).reshape(len(x), -1, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4).unbind(0)


@case(sequence(), free=ATTENTION)
class attention_indexed(Attention):
    def qkv_heads(self, x):
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
        return qkv[0], qkv[1], qkv[2]


@case(sequence(), free=ATTENTION)
class attention_chunk(Attention):
    def qkv_heads(self, x):
        parts = self.qkv(x).chunk(3, -1)
        return [part.unflatten(-1, (self.heads, self.dim)).transpose(1, 2) for part in parts]


@case(sequence(), free=ATTENTION)
class attention_split_sizes(Attention):
    def __init__(self):
        super().__init__()
        self.sizes = [12, 12, 12]

    def qkv_heads(self, x):
        parts = self.qkv(x).split(self.sizes, -1)
        return [part.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2) for part in parts]


@case(sequence(), free=ATTENTION)
class attention_unbind_sdpa(Attention):
    def qkv_heads(self, x):
        b, n, _ = x.shape
        return self.qkv(x).reshape(b, n, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x):
        x = self.inside(x)
        y = F.scaled_dot_product_attention(*self.qkv_heads(x))
        return self.out(x + self.proj(y.transpose(1, 2).flatten(2)))


@case(sequence(), free=ATTENTION, may_refuse=True)
class attention_scale_in_forward(Attention):
    def qkv_heads(self, x):
        b, n, _ = x.shape
        return self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def weights(self, q, k):
        return (q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))).softmax(-1)


@case(sequence(), free="inside.weight:0", may_refuse=True)
class attention_scale_tensor(Attention):
    """The scale is a tensor made from the size of the head: no argument of any call shows it."""

    def qkv_heads(self, x):
        b, n, _ = x.shape
        return self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def weights(self, q, k):
        return (q @ k.transpose(-2, -1) / torch.sqrt(torch.tensor(float(q.size(-1))))).softmax(-1)


class Separate(nn.Module):
    def __init__(self, width=12, heads=3, kv_heads=3, dim=4, value_dim=4):
        super().__init__()
        self.heads, self.kv_heads, self.dim, self.value_dim = heads, kv_heads, dim, value_dim
        self.inside, self.out = nn.Linear(8, width), nn.Linear(width, 3)
        self.q, self.k = nn.Linear(width, heads * dim), nn.Linear(width, kv_heads * dim)
        self.v, self.proj = nn.Linear(width, kv_heads * value_dim), nn.Linear(heads * value_dim, width)

    def heads_of(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, self.dim).transpose(1, 2)
        k = self.k(x).view(b, n, self.kv_heads, self.dim).transpose(1, 2)
        return q, k, self.v(x).view(b, n, self.kv_heads, self.value_dim).transpose(1, 2)

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=0.5)

    def forward(self, x):
        x = self.inside(x)
        return self.out(x + self.proj(self.attend(*self.heads_of(x)).transpose(1, 2).flatten(2)))


@case(sequence(), free="inside.weight:0 q.weight:0 k.weight:0 v.weight:0 proj.weight:1")
class attention_separate(Separate):
    pass


@case(sequence(), free="inside.weight:0 q.weight:0 k.weight:0 v.weight:0 proj.weight:1")
class attention_value_dim_differs(Separate):
    def __init__(self):
        super().__init__(dim=4, value_dim=6)


@case(sequence(), free="inside.weight:0 q.weight:0 k.weight:0 v.weight:0")
class grouped_query_expand(Separate):
    def __init__(self):
        super().__init__(heads=4, kv_heads=2)

    def attend(self, q, k, v):
        def repeat(x):
            b, h, n, d = x.shape
            return x[:, :, None].expand(b, h, self.heads // self.kv_heads, n, d).reshape(b, self.heads, n, d)

        return ((q @ repeat(k).mT * 0.5).softmax(-1)) @ repeat(v)


@case(sequence(), free="inside.weight:0 q.weight:0 k.weight:0 v.weight:0")
class grouped_query_llama(Separate):
    """As transformers writes it: repetitions are an attribute, heads follow from the weights."""

    def __init__(self):
        super().__init__(heads=6, kv_heads=2)
        self.repeats = 3

    def heads_of(self, x):
        shape = (*x.shape[:-1], -1, self.dim)
        q, k, v = self.q(x).view(shape), self.k(x).view(shape), self.v(x).view(shape)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def attend(self, q, k, v):
        def repeat(x):
            b, h, n, d = x.shape
            return x[:, :, None].expand(b, h, self.repeats, n, d).reshape(b, h * self.repeats, n, d)

        return ((q @ repeat(k).mT * 0.5).softmax(-1)) @ repeat(v)


@case(sequence(), free="inside.weight:0 q.weight:0 k.weight:0 v.weight:0")
class grouped_query_interleave(Separate):
    def __init__(self):
        super().__init__(heads=4, kv_heads=2)

    def attend(self, q, k, v):
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=0.5)


@case(sequence(), free="inside.weight:0 q.weight:0 k.weight:0 v.weight:0")
class grouped_query_sdpa(Separate):
    def __init__(self):
        super().__init__(heads=4, kv_heads=2)

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=0.5, enable_gqa=True)


@case(sequence(), free="inside.weight:0 q.weight:0 k.weight:0 v.weight:0", keep="frequencies")
class rotary_halves(Separate):
    def __init__(self):
        super().__init__(dim=6)
        self.register_buffer("frequencies", 1.0 / 100 ** (torch.arange(0, 6, 2) / 6), persistent=False)

    def attend(self, q, k, v):
        angle = torch.arange(q.shape[-2], device=q.device)[:, None] * self.frequencies
        angle = torch.cat([angle, angle], -1)

        def rotate(x):
            first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
            return x * angle.cos() + torch.cat([-second, first], -1) * angle.sin()

        return F.scaled_dot_product_attention(rotate(q), rotate(k), v, scale=0.4)


@case(sequence(), free="inside.weight:0 q.weight:0 k.weight:0 v.weight:0", keep="frequencies")
class rotary_interleaved(Separate):
    def __init__(self):
        super().__init__(dim=6)
        self.register_buffer("frequencies", 1.0 / 100 ** (torch.arange(0, 6, 2) / 6))

    def attend(self, q, k, v):
        angle = torch.arange(q.shape[-2], device=q.device)[:, None] * self.frequencies

        def rotate(x):
            even, odd = x[..., 0::2], x[..., 1::2]
            pairs = [even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()]
            return torch.stack(pairs, -1).flatten(-2)

        return F.scaled_dot_product_attention(rotate(q), rotate(k), v, scale=0.4)


@case(sequence(), free="inside.weight:0 q.weight:0 v.weight:0")
class rotary_complex(Separate):
    def __init__(self):
        super().__init__(dim=6)
        angle = torch.arange(5)[:, None] / 100 ** (torch.arange(0, 6, 2) / 6)
        self.turn = torch.polar(torch.ones_like(angle), angle)

    def attend(self, q, k, v):
        def rotate(x):
            pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * self.turn).flatten(-2)

        return F.scaled_dot_product_attention(rotate(q), rotate(k), v, scale=0.4)


@case(sequence(), free="inside.weight:0 qkv.weight:0 table:1", stuck="table:0")
class relative_position_bias(Attention):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 3))
        where = torch.arange(5)
        self.register_buffer("where", (where[:, None] - where + 4).flatten())

    def qkv_heads(self, x):
        b, n, _ = x.shape
        return self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def weights(self, q, k):
        n = q.shape[-2]
        bias = self.table[self.where].view(n, n, -1).permute(2, 0, 1)
        return (q @ k.transpose(-2, -1) * self.scale + bias.unsqueeze(0)).softmax(-1)


@case(sequence(), free="inside.weight:0 qkv.weight:0 before.weight:0 after.weight:0")
class talking_heads(Attention):
    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(3, 3), nn.Linear(3, 3)

    def qkv_heads(self, x):
        b, n, _ = x.shape
        return self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def weights(self, q, k):
        scores = self.before((q @ k.transpose(-2, -1) * self.scale).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.after(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@case(sequence(), free="inside.weight:0 qkv.weight:0 q_bias:0")
class query_and_value_bias(Attention):
    """BEiT: the bias of the fused projection is put together on the way."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(12, 36, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(12)), nn.Parameter(torch.zeros(12))

    def qkv_heads(self, x):
        b, n, _ = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias, requires_grad=False), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).reshape(b, n, 3, self.heads, -1)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)


@case(lambda: (torch.randn(2, 5, 8), torch.randn(2, 4, 8)), free="q.weight:0 kv.weight:0 proj.weight:1 left.weight:0")
class cross_attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(8, 10), nn.Linear(8, 9)
        self.q, self.kv, self.proj, self.out = nn.Linear(10, 12), nn.Linear(9, 24), nn.Linear(12, 10), nn.Linear(10, 3)
        self.heads = 3

    def forward(self, x, memory):
        x, memory = self.left(x), self.right(memory)
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.mT * 0.5).softmax(-1) @ v
        return self.out(x + self.proj(y.transpose(1, 2).flatten(2)))


@case(sequence(), free="inside.weight:0")
class multihead_module(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.attention, self.out = nn.Linear(8, 12), nn.MultiheadAttention(12, 3, batch_first=True), None
        self.out = nn.Linear(12, 3)

    def forward(self, x):
        x = self.inside(x)
        return self.out(x + self.attention(x, x, x, need_weights=False)[0])


@case(lambda: (torch.randn(5, 2, 8), torch.randn(4, 2, 8)))
class multihead_cross(nn.Module):
    """Keys and values of other widths; the averaged weights are used too."""

    def __init__(self):
        super().__init__()
        self.q, self.kv = nn.Linear(8, 12), nn.Linear(8, 10)
        self.attention, self.out = nn.MultiheadAttention(12, 3, kdim=10, vdim=10), nn.Linear(12, 3)

    def forward(self, x, memory):
        memory = self.kv(memory)
        y, weights = self.attention(self.q(x), memory, memory)
        return self.out(y), weights


@case(sequence(width=12), name="encoder_layer", free="0.linear1.weight:0")
def encoder_layer():
    layer = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True)
    return nn.Sequential(layer, nn.Linear(12, 3))


@case(sequence(width=12), name="encoder_pre_norm", free="0.layers.0.linear1.weight:0")
def encoder_pre_norm():
    layer = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True, norm_first=True, activation="gelu")
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(12, 3))


@case(lambda: (torch.randn(2, 5, 12), torch.randn(2, 4, 12)), name="decoder_layer", free="linear1.weight:0")
def decoder_layer():
    return nn.TransformerDecoderLayer(12, 3, 16, batch_first=True)


@case(sequence(), free=ATTENTION)
class linear_attention(Attention):
    """elu + 1 makes removed dimensions count as 1, so query and key dimensions cannot just be zeroed."""

    def qkv_heads(self, x):
        b, n, _ = x.shape
        return self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x):
        x = self.inside(x)
        q, k, v = self.qkv_heads(x)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        total = torch.einsum("bhnd,bhd->bhn", q, k.sum(2))
        y = torch.einsum("bhnd,bhde->bhne", q, k.mT @ v) / total[..., None]
        return self.out(x + self.proj(y.transpose(1, 2).flatten(2)))


@case(sequence(), free="inside.weight:0 v.weight:0")
class linear_attention_separate(Separate):
    def attend(self, q, k, v):
        q, k = F.elu(q) + 1, F.elu(k) + 1
        return (q @ (k.mT @ v)) / (q @ k.sum(2)[..., None])


@case(sequence(), free="inside.weight:0", changes="q.weight:0")
class efficient_attention(Separate):
    """Softmax of the queries over their dimension."""

    def attend(self, q, k, v):
        return q.softmax(-1) @ (k.softmax(-2).mT @ v)


@case(image(), free="a.weight:0 qkv.weight:0")
class cross_covariance_attention(nn.Module):
    """XCA: channels attend to channels."""

    def __init__(self):
        super().__init__()
        self.heads = 2
        self.a, self.qkv, self.proj = conv(3, 8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.temperature, self.out = nn.Parameter(torch.ones(2, 1, 1)), nn.Linear(8, 3)

    def forward(self, x):
        x = self.a(x).flatten(2).transpose(1, 2)
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 4, 1).unbind(0)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        y = ((q @ k.mT) * self.temperature).softmax(-1) @ v
        return self.out(x + self.proj(y.permute(0, 3, 1, 2).reshape(b, n, -1)))
