"""A small Llama-style decoder over bytes: RMSNorm, rotary positions, grouped kv heads, SwiGLU.

Source: Touvron et al., LLaMA, 2023, arXiv:2302.13971, section 2.2; kv heads as in Ainslie et al., GQA, EMNLP 2023,
arXiv:2305.13245; rotary positions as in Su et al., RoFormer, 2021, arXiv:2104.09864, in the form that pairs
component i with component i + d/2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaprune.errors import ConfigError
from metaprune.zoo._base import MODELS, ZooModel, random_tokens, require_multiple


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (i, i + d/2) of `x` (n, heads, t, d) by its angle; `cos` and `sin` are (t, d/2)."""
    first, second = x.chunk(2, dim=-1)  # pairs leave together, so the halves stay equal
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class GroupedAttention(nn.Module):
    """Causal attention in which `num_groups` query heads share one head of keys and values."""

    inv_freq: Tensor

    def __init__(self, width: int, num_heads: int, num_kv_heads: int, head_dim: int, rope_base: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.num_groups = num_heads // num_kv_heads
        self.head_dim = head_dim  # of queries and keys
        self.value_dim = head_dim  # of values: an axis of its own
        self.scale = head_dim**-0.5  # stays when head_dim shrinks, or the softmax would change
        self.q_proj = nn.Linear(width, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, width, bias=False)
        # One table for each layer, not one for all: layers may then lose different frequencies.
        inv_freq = rope_base ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, width) to (n, t, width)."""
        n, t, _ = x.shape
        q = self.q_proj(x).view(n, t, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(n, t, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(n, t, self.num_kv_heads, self.value_dim).transpose(1, 2)
        angles = torch.arange(t, device=x.device, dtype=torch.float32)[:, None] * self.inv_freq.float()
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k = k.repeat_interleave(self.num_groups, dim=1)
        v = v.repeat_interleave(self.num_groups, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return out


class SwiGlu(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, width) to (n, t, width)."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class DecoderBlock(nn.Module):
    """Attention and SwiGLU, each behind an RMSNorm and inside a shortcut."""

    def __init__(self, width: int, attention: GroupedAttention, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=1e-5)
        self.attention = attention
        self.norm2 = nn.RMSNorm(width, eps=1e-5)
        self.mlp = SwiGlu(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, width) to (n, t, width)."""
        x = x + self.attention(self.norm1(x))
        y: Tensor = self.mlp(self.norm2(x))
        return x + y


class Llama(nn.Module):
    """Embedding, decoder blocks, RMSNorm, a head that may share its weight with the embedding."""

    def __init__(self, vocabulary: int, width: int, blocks: list[DecoderBlock], tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (n, t), int64, to next-token logits (n, t, vocabulary)."""
        logits: Tensor = self.head(self.norm(self.blocks(self.embedding(tokens))))
        return logits


def llama_tiny(
    *,
    vocabulary: int = 256,
    width: int = 64,
    depth: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    hidden: int = 176,
    tied: bool = False,
    rope_base: float = 10_000.0,
) -> Llama:
    """A small Llama-style decoder.

    Args:
        vocabulary: Number of token ids; 256 for bytes.
        width: Channels of the residual stream, a multiple of `num_heads` with an even quotient.
        depth: Decoder blocks.
        num_heads: Query heads, a multiple of `num_kv_heads`.
        num_kv_heads: Heads of keys and values.
        hidden: Neurons of each SwiGLU.
        tied: Whether the head uses the embedding's weight.
        rope_base: Base of the rotary frequencies, above 1.

    Raises:
        ConfigError: The sizes do not divide each other, or `rope_base` is too small.
    """
    require_multiple("width, num_heads", width, num_heads)
    require_multiple("num_heads, num_kv_heads", num_heads, num_kv_heads)
    if width // num_heads % 2:
        raise ConfigError(f"`width / num_heads` must be even (rotary pairs), but it is {width // num_heads}.")
    if rope_base <= 1:
        raise ConfigError(f"`rope_base > 1` must hold, but rope_base={rope_base}.")
    blocks = [
        DecoderBlock(width, GroupedAttention(width, num_heads, num_kv_heads, width // num_heads, rope_base), hidden)
        for _ in range(depth)
    ]
    return Llama(vocabulary, width, blocks, tied)


MODELS.register("llama_tiny")(
    ZooModel(build=llama_tiny, example_inputs=random_tokens(256, 2, 32), task="language"),
)
