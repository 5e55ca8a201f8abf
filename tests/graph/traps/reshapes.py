"""Reshapes that mix."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.graph.traps._base import CASES, Head, case, conv, flat, image, sequence
from tests.graph.traps.attention import Attention, Separate


@case(sequence(4, 8))
class reshape_scrambled(nn.Module):
    """(tokens 4, features 6) read as (6, 4): every feature lands in several columns."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.b(x.reshape(x.shape[0], 6, 4))


@case(sequence())
class heads_not_transposed(Attention):
    """(B, heads, N, d) read as (B, N, heads * d) without a transpose."""

    def qkv_heads(self, x):
        b, n, _ = x.shape
        return self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x):
        x = self.inside(x)
        q, k, v = self.qkv_heads(x)
        return self.out(x + self.proj((self.weights(q, k) @ v).reshape(*x.shape[:2], -1)))


@case(image(3, 4), free="a.weight:0 b.weight:0")
class nhwc_flatten(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 4), nn.Linear(64, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)).permute(0, 2, 3, 1).reshape(x.shape[0], -1))))


@case(flat(), free="a.weight:0 up.weight:1 up.weight:0")
class linear_to_map(nn.Module):
    """A generator: features become a map with channels."""

    def __init__(self):
        super().__init__()
        self.a, self.up, self.out, self.side = nn.Linear(8, 24), nn.ConvTranspose2d(6, 5, 2, 2), conv(5, 2), 2

    def forward(self, x):
        x = F.relu(self.a(x)).view(x.shape[0], -1, self.side, self.side)
        return self.out(F.relu(self.up(x)))


@case(image(), free="a.weight:0")
class blur_pool(nn.Module):
    """A fixed blur as a depthwise convolution with as many groups as there are channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(6, 5), Head(5)
        self.register_buffer("blur", torch.ones(1, 1, 3, 3) / 9)

    def forward(self, x):
        x = F.relu(self.a(x))
        kernel = self.blur.repeat(x.shape[1], 1, 1, 1)
        return self.head(self.b(F.conv2d(x, kernel, stride=2, padding=1, groups=x.shape[1])))


@case(image(), free="a.weight:0")
class token_selection(nn.Module):
    """The best positions are gathered; features pass."""

    def __init__(self):
        super().__init__()
        self.a, self.score, self.b = conv(3, 6), nn.Linear(6, 1), nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.a(x)).flatten(2).transpose(1, 2)
        best = self.score(x).squeeze(-1).topk(4, 1)[1]
        return self.b(x.gather(1, best.unsqueeze(-1).expand(-1, -1, x.shape[-1])))


@case(sequence(), free="a.weight:0")
class tensordot_and_inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.second, self.third = (
            nn.Linear(8, 6),
            nn.Parameter(torch.randn(6, 5)),
            nn.Parameter(torch.randn(3, 5)),
        )

    def forward(self, x):
        return torch.inner(F.relu(torch.tensordot(self.a(x), self.second, dims=1)), self.third)


@case(sequence(), free="a.weight:0 scale:0")
class diagonal_scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.scale, self.b = nn.Linear(8, 6), nn.Parameter(torch.ones(6)), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(self.a(x) @ torch.diag(self.scale))


@case(image(), free="a.weight:0")
class maximum_with_a_threshold(nn.Module):
    """torch.max of two tensors of unlike rank."""

    def __init__(self):
        super().__init__()
        self.a, self.floor, self.b, self.head = conv(3, 6), nn.Parameter(torch.zeros(6, 1, 1)), conv(6, 5), Head(5)

    def forward(self, x):
        return self.head(self.b(torch.max(self.a(x), self.floor)))


@case(image(), free="a.weight:0")
class checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(6, 5), Head(5)

    def forward(self, x):
        from torch.utils.checkpoint import checkpoint

        return self.head(checkpoint(lambda y: self.b(F.relu(self.a(y))), x, use_reentrant=False))


@case(image(), free="a.weight:0", may_refuse=True)
class vectorised_map(nn.Module):
    """torch.vmap inside."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 6), nn.Linear(6, 3)

    def forward(self, x):
        return torch.vmap(self.b)(F.relu(self.a(x)).mean((2, 3)))


@case(image(), stuck="a.weight:0")
class layers_in_a_list(nn.Module):
    """A plain list hides its layers from the module, so nothing may rest on them."""

    def __init__(self):
        super().__init__()
        self.a, self.head, self.plain = conv(3, 6), Head(5), [conv(6, 6), conv(6, 5)]

    def forward(self, x):
        x = F.relu(self.a(x))
        for layer in self.plain:
            x = F.relu(layer(x))
        return self.head(x)


@case(image(), stuck="scale:0 a.weight:0")
class closure_over_self(nn.Module):
    """A function kept as an attribute closes over the module, so a copy of the module still calls the first one."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head, self.scale = conv(3, 6), conv(6, 5), Head(5), nn.Parameter(torch.ones(6, 1, 1))
        self.function = lambda x: F.relu(x) * self.scale

    def forward(self, x):
        return self.head(self.b(self.function(self.a(x))))


@case(image(), stuck="idle.weight:0 idle.weight:1 lost:0")
class idle_parameters(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(6, 5), Head(5)
        self.idle, self.lost = conv(6, 6), nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return self.head(self.b(F.relu(self.a(x))))


@case(image(), free="a.weight:0")
class counts_its_calls(nn.Module):
    """Forward writes into buffers and attributes."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head, self.calls = conv(3, 6), conv(6, 5), Head(5), 0
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(6))

    def forward(self, x):
        self.calls += 1
        self.steps += 1
        x = F.relu(self.a(x))
        self.average.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
        return self.head(self.b(x))


@case(image(), free="a.weight:0")
class autocast_inside(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(6, 5), Head(5)

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.head(self.b(F.relu(self.a(x))))


@case(sequence(), free="inside.weight:0 up.weight:0")
class highway(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.up, self.gate, self.out = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.inside(x)
        gate = self.gate(x).sigmoid()
        return self.out(torch.lerp(x, F.relu(self.up(x)), gate))


@case(sequence(), free="inside.weight:0 q.weight:0 v.weight:0", keep="bias")
class sdpa_with_mask(Separate):
    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.randn(1, 3, 5, 5))

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias, scale=0.5)


@case(sequence(), free="inside.weight:0 q.weight:0 v.weight:0 qn.weight:0", changes="q.weight:0")
class query_key_norm(Separate):
    """Qwen3: a norm over each head's dimensions."""

    def __init__(self):
        super().__init__()
        self.qn, self.kn = nn.RMSNorm(4), nn.RMSNorm(4)

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(self.qn(q), self.kn(k), v, scale=0.5)


@case(sequence(), free="inside.weight:0 q.weight:0 v.weight:0", keep="slopes")
class alibi(Separate):
    """A constant slope for each head."""

    def __init__(self):
        super().__init__()
        self.register_buffer("slopes", torch.tensor([0.5, 0.25, 0.125]).view(3, 1, 1))

    def attend(self, q, k, v):
        where = torch.arange(q.shape[-2], device=q.device)
        bias = self.slopes * (where[None] - where[:, None])
        return (q @ k.mT * 0.5 + bias).softmax(-1) @ v


@case(lambda: (torch.randn(2, 3, 6, 6), torch.tensor([3, 7])), free="a.weight:0 time.weight:0 n2.weight:0")
class time_conditioned(nn.Module):
    """A diffusion block: sinusoidal time embedding, GroupNorm, addition of the projected time."""

    def __init__(self):
        super().__init__()
        self.a, self.n1, self.b, self.n2, self.c = (
            conv(3, 8),
            nn.GroupNorm(4, 8),
            conv(8, 8),
            nn.GroupNorm(4, 8),
            conv(8, 3),
        )
        self.time, self.inner = nn.Linear(6, 8), nn.Linear(6, 6)

    def forward(self, x, t):
        rate = torch.exp(-torch.arange(3, device=x.device) / 3.0)
        angle = t[:, None] * rate
        time = self.time(F.silu(self.inner(torch.cat([angle.sin(), angle.cos()], 1))))
        h = self.b(F.silu(self.n1(self.a(x)))) + time[:, :, None, None]
        return self.c(F.silu(self.n2(h)))


@case(image(3, 4), name="channels_last", free="a.weight:0")
def channels_last():
    return CASES["flatten_to_linear"].make().to(memory_format=torch.channels_last)


@case(image(), name="in_training_mode", free="one.a.weight:0")
def in_training_mode():
    return CASES["residual"].make().train()
