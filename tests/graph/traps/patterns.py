"""Whole patterns of published networks."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.graph.traps._base import Head, case, conv, image, sequence, words


@case(image(3, 8), free="a.weight:0 qkv.weight:0 merge.weight:0 table:1")
class swin_like(nn.Module):
    def __init__(self):
        super().__init__()
        self.window, self.heads, self.scale = 2, 2, 0.5
        self.a, self.norm, self.qkv, self.proj = conv(3, 8), nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.table, self.merge, self.out = nn.Parameter(torch.randn(9, 2)), nn.Linear(32, 6), nn.Linear(6, 3)
        at = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        apart = (at[:, :, None] - at[:, None, :]) + 1
        self.register_buffer("where", apart[0] * 3 + apart[1])

    def forward(self, x):
        x = self.a(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        s = self.window
        y = torch.roll(self.norm(x), (-1, -1), (1, 2))
        y = y.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)
        q, k, v = self.qkv(y).reshape(-1, s * s, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.where.view(-1)].view(s * s, s * s, -1).permute(2, 0, 1)
        y = ((q @ k.mT) * self.scale + bias).softmax(-1) @ v
        y = self.proj(y.transpose(1, 2).reshape(-1, s * s, c))
        y = y.view(b, h // s, w // s, s, s, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, -1)
        x = x + torch.roll(y, (1, 1), (1, 2))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.out(F.gelu(self.merge(x)).mean((1, 2)))


@case(image(3, 8), free="a.weight:0 token1.weight:0 channel1.weight:0", stuck="token2.weight:0", by_hand=True)
class mlp_mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n1, self.n2 = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8), nn.LayerNorm(8)
        self.token1, self.token2 = nn.Linear(4, 6), nn.Linear(6, 4)
        self.channel1, self.channel2, self.out = nn.Linear(8, 10), nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.a(x).flatten(2).transpose(1, 2)
        x = x + self.token2(F.gelu(self.token1(self.n1(x).transpose(1, 2)))).transpose(1, 2)
        x = x + self.channel2(F.gelu(self.channel1(self.n2(x))))
        return self.out(x.mean(1))


@case(sequence(), free="experts.0.0.weight:0 experts.1.0.weight:0")  # the router is read expert by expert
class experts_dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.router, self.out = nn.Linear(8, 6), nn.Linear(6, 3), nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 6)) for _ in range(3))

    def forward(self, x):
        x = self.inside(x)
        gate = self.router(x).softmax(-1)
        return self.out(x + sum(gate[..., k, None] * expert(x) for k, expert in enumerate(self.experts)))


@case(lambda: torch.randn(16, 8), free="experts.0.0.weight:0")
class experts_top_k(nn.Module):
    """Every expert gets some rows; which ones hangs on values."""

    def __init__(self):
        super().__init__()
        self.inside, self.router, self.out = nn.Linear(8, 6), nn.Linear(6, 3), nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 6)) for _ in range(3))

    def forward(self, x):
        x = self.inside(x)
        weight, chosen = self.router(x).softmax(-1).topk(2, -1)
        total = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            row, slot = torch.where(chosen == k)
            total.index_add_(0, row, expert(x[row]) * weight[row, slot, None])
        return self.out(x + total)


@case(lambda: torch.randn(2, 8), free="experts.4.0.weight:0")
class experts_some_idle(nn.Module):
    """Most experts see no row of the example; other inputs must show what they are coupled to."""

    def __init__(self):
        super().__init__()
        self.inside, self.router, self.out = nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 6)) for _ in range(5))

    def forward(self, x):
        x = self.inside(x)
        chosen = self.router(x).argmax(-1)
        total = torch.zeros_like(x)
        for k in chosen.unique().tolist():
            row = torch.where(chosen == k)[0]
            total[row] = self.experts[k](x[row])
        return self.out(x + total)


@case(sequence(), free="up:2 down:1 up:0")
class experts_fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.router, self.out = nn.Linear(8, 6), nn.Linear(6, 4), nn.Linear(6, 3)
        self.up, self.down = nn.Parameter(torch.randn(4, 6, 10)), nn.Parameter(torch.randn(4, 5, 6))

    def forward(self, x):
        x = self.inside(x).flatten(0, 1)
        gate, value = torch.bmm(x.expand(self.up.shape[0], -1, -1), self.up).chunk(2, -1)
        y = torch.bmm(F.silu(gate) * value, self.down)
        return self.out(x + (y * self.router(x).sigmoid().t().unsqueeze(-1)).sum(0))


@case(sequence(6), free="inside.weight:0 in_proj.weight:0 conv1d.weight:0 A_log:1 x_proj.weight:0")
class mamba_like(nn.Module):
    def __init__(self):
        super().__init__()
        self.rank, self.state, self.width = 2, 4, 10
        self.inside, self.norm, self.out = nn.Linear(8, 6), nn.RMSNorm(6), nn.Linear(6, 3)
        self.in_proj, self.conv1d = nn.Linear(6, 20, bias=False), nn.Conv1d(10, 10, 3, groups=10, padding=2)
        self.x_proj, self.dt_proj = nn.Linear(10, 2 + 8, bias=False), nn.Linear(2, 10)
        self.A_log, self.D = nn.Parameter(torch.rand(10, 4)), nn.Parameter(torch.ones(10))
        self.out_proj = nn.Linear(10, 6, bias=False)

    def forward(self, x):
        x = self.inside(x)
        length = x.shape[1]
        value, gate = self.in_proj(self.norm(x)).transpose(1, 2).chunk(2, 1)
        value = F.silu(self.conv1d(value)[..., :length])
        time, b, c = self.x_proj(value.transpose(1, 2)).split([self.rank, self.state, self.state], -1)
        time = F.softplus(self.dt_proj(time)).transpose(1, 2)
        decay = torch.exp(-torch.exp(self.A_log)[None, :, None, :] * time[..., None])
        drive = time[..., None] * b[:, None] * value[..., None]
        state, outs = torch.zeros_like(drive[:, :, 0]), []
        for step in range(length):
            state = decay[:, :, step] * state + drive[:, :, step]
            outs.append((state * c[:, None, step]).sum(-1))
        y = torch.stack(outs, -1) + value * self.D[None, :, None]
        return self.out(x + self.out_proj((y * F.silu(gate)).transpose(1, 2)))


@case(lambda: torch.randn(2, 3, 9), free="a.weight:0 up.weight:1 b.weight:1")
class conv_1d(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.up = nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ConvTranspose1d(6, 5, 3)
        self.b = nn.Conv1d(5, 2, 1)

    def forward(self, x):
        return self.b(F.relu(self.up(F.max_pool1d(F.relu(self.norm(self.a(x))), 2))))


@case(lambda: torch.randn(2, 3, 4, 5, 6), free="a.weight:0 up.weight:1 norm.running_mean:0 b.weight:1")
class conv_3d(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.up = nn.Conv3d(3, 6, 3), nn.BatchNorm3d(6), nn.ConvTranspose3d(6, 5, 2, stride=2)
        self.b = nn.Conv3d(5, 2, 1)

    def forward(self, x):
        return self.b(F.relu(self.up(F.adaptive_avg_pool3d(F.relu(self.norm(self.a(x))), 2))))


@case(image(), free="a.weight:0 up.weight:1")
class conv_transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.up, self.norm = conv(3, 6), nn.ConvTranspose2d(6, 5, 4, 2, 1), nn.BatchNorm2d(5)
        self.b = conv(5, 2)

    def forward(self, x):
        return self.b(F.relu(self.norm(self.up(F.relu(self.a(x))))))


@case(words(), free="bag.weight:1")
class embedding_bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.a, self.out = nn.EmbeddingBag(11, 6, mode="sum"), nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x):
        return self.out(F.relu(self.a(self.bag(x))))


@case(image(1), free="b.weight:0")
class one_channel(nn.Module):
    """A layer with one channel that spreads to several by broadcasting."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = conv(1, 1), conv(1, 6), conv(6, 5), Head(5)

    def forward(self, x):
        x = self.a(x)
        return self.head(self.c(self.b(x) * torch.sigmoid(x)))


@case(image(1), free="b.weight:0")
class one_channel_expanded(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = conv(1, 1), conv(1, 6), conv(6, 5), Head(5)

    def forward(self, x):
        y = self.b(x)
        return self.head(self.c(self.a(x).expand_as(y) + y))


class Padded(nn.Module):
    def __init__(self, shortcut):
        super().__init__()
        self.stem, self.a, self.b, self.head = conv(3, 4), conv(4, 8), conv(8, 8), Head(8)
        self.shortcut = shortcut

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.b(F.relu(self.a(x)[:, :, ::2, ::2])) + self.shortcut(x)))


class PadChannels(nn.Module):
    def __init__(self, front, back):
        super().__init__()
        self.front, self.back = front, back

    def forward(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.front, self.back))


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


case(image(), name="pad_shortcut_attribute", free="stem.weight:0 a.weight:0 b.weight:0")(
    lambda: Padded(PadChannels(2, 2))
)


@case(image(), name="pad_shortcut_closure", free="stem.weight:0 a.weight:0 b.weight:0")
def pad_shortcut_closure():
    planes = 8
    return Padded(Lambda(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, planes // 4, planes // 4), "constant", 0)))


@case(image(3, 8), free="down1.weight:0 down2.weight:0 middle.weight:0 up.weight:1")
class unet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2, self.middle = conv(3, 5), conv(5, 6), conv(6, 7)
        self.up, self.last, self.out = nn.ConvTranspose2d(7, 4, 2, 2), conv(4 + 6, 5), conv(5 + 5, 2)

    def forward(self, x):
        one = F.relu(self.down1(x))
        two = F.relu(self.down2(F.max_pool2d(one, 2)))
        y = F.relu(self.middle(F.avg_pool2d(two, 2)))
        y = F.relu(self.last(torch.cat([self.up(y), two], 1)))
        return self.out(torch.cat([F.interpolate(y, scale_factor=2, mode="bilinear"), one], 1))


@case(image(3, 8), free="one.weight:0 two.weight:0 side1.weight:0", stuck="out.weight:0")
class feature_pyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.side1, self.side2, self.out = (
            conv(3, 5),
            conv(5, 6),
            conv(5, 4),
            conv(6, 4),
            conv(4, 2),
        )

    def forward(self, x):
        one = F.relu(self.one(x))
        two = F.relu(self.two(F.max_pool2d(one, 2)))
        top = self.side2(two)
        low = self.side1(one) + F.interpolate(top, size=one.shape[-2:], mode="nearest")
        return [self.out(low), self.out(top)]


@case(image(), free="a.weight:0 down.weight:0", changes="a.weight:0", by_hand=True)
class channel_and_spatial_attention(nn.Module):
    """CBAM: mean and maximum over channels."""

    def __init__(self):
        super().__init__()
        self.a, self.down, self.up, self.spatial = conv(3, 8), nn.Linear(8, 4), nn.Linear(4, 8), conv(2, 1)
        self.b, self.head = conv(8, 5), Head(5)

    def forward(self, x):
        x = F.relu(self.a(x))
        gate = self.up(F.relu(self.down(x.mean((2, 3))))) + self.up(F.relu(self.down(x.amax((2, 3)))))
        x = x * torch.sigmoid(gate)[:, :, None, None]
        x = x * torch.sigmoid(self.spatial(torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)))
        return self.head(self.b(x))


@case(sequence(), free="a.weight:0")
class normalised_features(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(F.normalize(self.a(x), dim=-1))


@case(lambda: (torch.randn(3, 8), torch.randn(3, 8)), free="a.weight:0 b.weight:0 logit_scale:0 prototypes:1")
class cosine_similarity(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.logit_scale = nn.Linear(8, 10), nn.Linear(10, 6), nn.Parameter(torch.ones(10))
        self.prototypes = nn.Parameter(torch.randn(4, 6))

    def forward(self, x, y):
        x, y = (self.b(F.relu(self.a(item)) * self.logit_scale) for item in (x, y))
        return F.cosine_similarity(x, y, dim=-1), F.cosine_similarity(x[:, None], self.prototypes[None], dim=-1)


@case(image(), free="a.weight:0", changes="a.weight:0", by_hand=True)
class softmax_over_channels(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 7), conv(7, 5), Head(5)

    def forward(self, x):
        return self.head(self.b(self.a(x).softmax(1)))


@case(image(), free="a.weight:0 gate.weight:0")
class sigmoid_gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.gate, self.b, self.head = conv(3, 7), conv(3, 7), conv(7, 5), Head(5)

    def forward(self, x):
        return self.head(self.b(self.a(x) * self.gate(x).sigmoid()))


@case(image(), stuck="gate.weight:0")
class sigmoid_summed(nn.Module):
    """A removed channel would still add one half."""

    def __init__(self):
        super().__init__()
        self.gate, self.out = conv(3, 7), nn.Linear(36, 3)

    def forward(self, x):
        return self.out(self.gate(x).sigmoid().sum(1).flatten(1))


@case(image(), free="a.weight:0")
class sum_over_channels(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = conv(3, 7), nn.Linear(36, 3)

    def forward(self, x):
        return self.out(F.relu(self.a(x)).sum(1).flatten(1))
