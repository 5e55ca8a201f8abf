import pytest
import torch
from torch import Tensor, nn

from metaprune.zoo import build
from metaprune.zoo.vit import FusedAttention


def slow_attention(attention: FusedAttention, x: Tensor) -> Tensor:
    """Head by head, with a softmax written out."""
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    heads = []
    for head in range(attention.num_heads):
        part = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        weight = (q[..., part] @ k[..., part].transpose(1, 2) * attention.scale).softmax(dim=-1)
        heads.append(weight @ v[..., part])
    return attention.out(torch.cat(heads, dim=-1))


def test_attention_equals_the_slow_one():
    attention, x = FusedAttention(12, num_heads=3), torch.randn(2, 5, 12)
    torch.testing.assert_close(attention(x), slow_attention(attention, x))


@torch.no_grad()
def test_slim_attention_equals_masked_attention():
    """One head, one component of queries and keys, two of values: each has an attribute of its own."""
    attention, x = FusedAttention(12, num_heads=3), torch.randn(2, 5, 12)
    q, k, v = torch.arange(36).view(3, 3, 4)  # rows of qkv, as heads x components
    gone = torch.cat((q[:, 1], k[:, 1], v[:, [0, 3]].flatten()))
    attention.qkv.weight[gone], attention.qkv.bias[gone] = 0, 0
    attention.out.weight[:, 4:8] = 0  # all of head 1
    expected = attention(x)
    keep_qk, keep_v = [0, 2, 3], [1, 2]
    rows = torch.cat([t[[0, 2]][:, keep].flatten() for t, keep in ((q, keep_qk), (k, keep_qk), (v, keep_v))])
    columns = (v - 24)[[0, 2]][:, keep_v].flatten()
    attention.qkv.weight, attention.qkv.bias = (nn.Parameter(p[rows]) for p in attention.qkv.parameters())
    attention.out.weight = nn.Parameter(attention.out.weight[:, columns])
    attention.num_heads, attention.head_dim, attention.value_dim, attention.split_sizes = 2, 3, 2, (6, 6, 4)
    torch.testing.assert_close(attention(x), expected)


def test_positions_matter_and_image_size_is_an_option():
    model = build("vit_tiny", image_size=16).eval()
    x = torch.randn(2, 3, 16, 16)
    assert model(x).shape == (2, 10)
    assert not torch.allclose(model(x), model(x.flip(3)))
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 3, 32, 32))
