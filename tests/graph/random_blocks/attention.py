"""Attention, recurrent layers and embeddings."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.random_blocks.base import Choose, Shape, block, divisors, width


def attention_options(choose: Choose, shapes: list[Shape]) -> dict[str, Any]:
    heads = choose.one((2, 4, 3, 1))
    return {
        "heads": heads,
        "kv_heads": choose.one([heads, *divisors(heads)]),
        "d": choose.one((2, 3, 4)),
        "value_d": choose.one((0, 0, 2, 3)),
        "style": choose.one(("separate", "unbind", "chunk", "heads_first", "kv")),
        "fused": choose.one((True, False)),
        "repeat": choose.one(("interleave", "expand", "gqa")),
        "scale": choose.one(("attribute", "computed")),
        "residual": choose.one((True, True, False)),
        "norm": choose.one((False, False, True)),
    }


@block("attention", (2,), attention_options, weight=12)
class Attention(nn.Module):
    def __init__(
        self,
        shapes: list[Shape],
        heads: int,
        kv_heads: int,
        d: int,
        value_d: int,
        style: str,
        fused: bool,
        repeat: str,
        scale: str,
        residual: bool,
        norm: bool,
    ) -> None:
        super().__init__()
        width = shapes[0][-1]
        if style != "separate":
            kv_heads, value_d = heads, 0
        value_d = value_d or d
        self.heads, self.kv_heads, self.d, self.value_d, self.repeats = heads, kv_heads, d, value_d, heads // kv_heads
        self.style, self.fused, self.repeat, self.residual = style, fused, repeat, residual
        self.scale = None if scale == "computed" else d**-0.5
        if style == "separate":
            self.q, self.k, self.v = (nn.Linear(width, size) for size in (heads * d, kv_heads * d, kv_heads * value_d))
        elif style == "kv":
            self.q, self.kv = nn.Linear(width, heads * d), nn.Linear(width, 2 * heads * d, bias=False)
        else:
            self.qkv = nn.Linear(width, 3 * heads * d)
        self.proj = nn.Linear(heads * value_d, width)
        self.q_norm, self.k_norm = (nn.RMSNorm(d, eps=1e-5) if norm else nn.Identity() for _ in range(2))

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, _ = x.shape
        if self.style == "unbind":
            q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, self.d).permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, v
        if self.style == "heads_first":
            q, k, v = self.qkv(x).view(b, t, self.heads, 3, self.d).transpose(1, 2).unbind(3)
            return q, k, v
        if self.style == "chunk":
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        elif self.style == "kv":
            kv = self.kv(x).reshape(b, t, 2, self.heads, self.d).permute(2, 0, 3, 1, 4)
            return self.q(x).view(b, t, self.heads, self.d).transpose(1, 2), kv[0], kv[1]
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        return (
            q.view(b, t, self.heads, -1).transpose(1, 2),
            k.view(b, t, self.kv_heads, self.d).transpose(1, 2),
            v.view(b, t, self.kv_heads, self.value_d).transpose(1, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.parts(x)
        q, k = self.q_norm(q), self.k_norm(k)
        gqa = self.repeats > 1 and self.repeat == "gqa" and self.fused
        if self.repeats > 1 and not gqa:
            if self.repeat == "interleave":
                k, v = k.repeat_interleave(self.repeats, 1), v.repeat_interleave(self.repeats, 1)
            else:
                k, v = (
                    y[:, :, None].expand(b, y.shape[1], self.repeats, t, y.shape[-1]).reshape(b, -1, t, y.shape[-1])
                    for y in (k, v)
                )
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scale, enable_gqa=gqa)
        else:
            out = (q @ k.transpose(-2, -1) * (self.scale or q.shape[-1] ** -0.5)).softmax(-1) @ v
        out = self.proj(out.transpose(1, 2).reshape(b, t, -1))
        return x + out if self.residual else out


def multihead_options(choose: Choose, shapes: list[Shape]) -> dict[str, Any] | None:
    heads = [k for k in divisors(shapes[0][-1]) if k < 5]
    return {
        "heads": choose.one(heads),
        "weights": choose.one((True, False)),
        "bias": choose.one((True, False)),
        "residual": choose.one((True, False)),
    }


@block("multihead", (2,), multihead_options, lambda a, b: len(b) == 2, weight=5)
class Multihead(nn.Module):
    def __init__(self, shapes: list[Shape], heads: int, weights: bool, bias: bool, residual: bool) -> None:
        super().__init__()
        other = shapes[1][-1]
        self.attention = nn.MultiheadAttention(
            shapes[0][-1], heads, kdim=other, vdim=other, bias=bias, batch_first=True
        )
        self.weights, self.residual = weights, residual

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out, _ = self.attention(x, y, y, need_weights=self.weights)
        return x + out if self.residual else out


@block(
    "recurrent",
    (2,),
    lambda c, s: {
        "kind": c.one(("LSTM", "GRU", "RNN")),
        "hidden": c.one((3, 4, 5)),
        "layers": c.one((1, 1, 2)),
        "both": c.one((False, True)),
        "last": c.one((False, True)),
    },
    weight=3,
)
class Recurrent(nn.Module):
    def __init__(self, shapes: list[Shape], kind: str, hidden: int, layers: int, both: bool, last: bool) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(shapes[0][-1], hidden, layers, batch_first=True, bidirectional=both)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.rnn(x)
        if self.last:
            return (state[0] if isinstance(state, tuple) else state).transpose(0, 1).flatten(1)
        return out


@block("embedding", (0,), lambda c, s: {"width": width(c)})
def embedding(shapes: list[Shape], width: int) -> nn.Module:
    return nn.Embedding(7, width)
