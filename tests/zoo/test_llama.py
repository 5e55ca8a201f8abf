import torch
from torch import Tensor, nn

from metaprune.zoo import build, example_inputs
from metaprune.zoo.llama import GroupedAttention, rotate


def slow_attention(attention: GroupedAttention, x: Tensor) -> Tensor:
    """Head by head, with rotations as complex numbers and a softmax written out."""
    t, d = x.shape[1], attention.head_dim
    angles = torch.outer(torch.arange(t), attention.inv_freq)
    turn = torch.polar(torch.ones_like(angles), angles)

    def turned(values: Tensor) -> Tensor:
        y = torch.complex(values[..., : d // 2], values[..., d // 2 :]) * turn
        return torch.cat((y.real, y.imag), dim=-1)

    heads = []
    for head in range(attention.num_heads):
        kv = head // attention.num_groups
        q = turned(attention.q_proj(x)[..., head * d : (head + 1) * d])
        k = turned(attention.k_proj(x)[..., kv * d : (kv + 1) * d])
        v = attention.v_proj(x)[..., kv * d : (kv + 1) * d]
        scores = q @ k.transpose(1, 2) * attention.scale
        scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(dim=-1) @ v)
    return attention.o_proj(torch.cat(heads, dim=-1))


def test_attention_equals_the_slow_one():
    attention, x = GroupedAttention(24, 4, 2, 6, 10_000.0), torch.randn(2, 7, 24)
    torch.testing.assert_close(attention(x), slow_attention(attention, x))


def test_rotation_keeps_lengths_and_depends_on_distances_alone():
    q, k = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 1, 6, 8)
    angles = torch.outer(torch.arange(6.0), torch.tensor([1.0, 0.3, 0.1, 0.02]))
    q_turned, k_turned = rotate(q, angles.cos(), angles.sin()), rotate(k, angles.cos(), angles.sin())
    torch.testing.assert_close(q_turned.norm(dim=-1), q.norm(dim=-1))
    products = (q_turned @ k_turned.transpose(2, 3))[0, 0]
    torch.testing.assert_close(products[1:, 1:], products[:-1, :-1])


@torch.no_grad()
def test_slim_attention_equals_masked_attention():
    """One kv head with its group, one rotary pair, one component of values."""
    attention, x = GroupedAttention(24, 4, 2, 6, 10_000.0), torch.randn(2, 7, 24)
    q, kv = torch.arange(24).view(4, 6), torch.arange(12).view(2, 6)
    attention.q_proj.weight[q[:, [1, 4]].flatten()] = 0
    attention.k_proj.weight[kv[:, [1, 4]].flatten()] = 0
    attention.v_proj.weight[kv[:, 3]] = 0
    attention.o_proj.weight[:, q[:2].flatten()] = 0  # query heads 0 and 1 read kv head 0
    expected = attention(x)
    keep_qk, keep_v = [0, 2, 3, 5], [0, 1, 2, 4, 5]
    attention.q_proj.weight = nn.Parameter(attention.q_proj.weight[q[2:, keep_qk].flatten()])
    attention.k_proj.weight = nn.Parameter(attention.k_proj.weight[kv[1:, keep_qk].flatten()])
    attention.v_proj.weight = nn.Parameter(attention.v_proj.weight[kv[1:, keep_v].flatten()])
    attention.o_proj.weight = nn.Parameter(attention.o_proj.weight[:, q[2:, keep_v].flatten()])
    attention.inv_freq = attention.inv_freq[[0, 2]]
    attention.num_heads, attention.num_kv_heads, attention.num_groups = 2, 1, 2
    attention.head_dim, attention.value_dim = 4, 5
    torch.testing.assert_close(attention(x), expected)


def test_no_token_sees_a_later_one():
    model, tokens = build("llama_tiny").eval(), example_inputs("llama_tiny")
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


def test_tied_head_is_the_embedding():
    model = build("llama_tiny", tied=True)
    assert model.head.weight is model.embedding.weight
    assert model(example_inputs("llama_tiny")[:, :5]).shape == (2, 5, 256)
    assert "blocks.0.attention.inv_freq" not in model.state_dict()
