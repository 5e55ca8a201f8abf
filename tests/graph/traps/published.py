"""Blocks of published networks."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.graph.traps._base import Head, case, conv, image, sequence


@case(image(size=8), free="a.weight:0 b.weight:0")
class every_resolution_to_every_other(nn.Module):
    """HRNet: two streams, each the sum of both."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 6), conv(6, 8, stride=2)
        self.down, self.up, self.out = conv(6, 8, stride=2), conv(8, 6, 1), conv(14, 3, 1)

    def forward(self, x):
        wide = self.a(x)
        deep = self.b(wide)
        both = (wide + F.interpolate(self.up(deep), scale_factor=2)).relu()
        deep = (deep + self.down(wide)).relu()
        return self.out(torch.cat([both, F.interpolate(deep, size=both.shape[-2:])], 1))


@case(image(), free="stem.weight:0 identity.weight:0 wide.weight:1")
class normalised_identity(nn.Module):
    """RepVGG: convolutions of two sizes and a BatchNorm beside them."""

    def __init__(self):
        super().__init__()
        self.stem, self.wide, self.narrow = conv(3, 6), conv(6, 6), conv(6, 6, 1)
        self.identity, self.head = nn.BatchNorm2d(6), Head(6)

    def forward(self, x):
        x = self.stem(x)
        return self.head((self.wide(x) + self.narrow(x) + self.identity(x)).relu())


@case(image(), free="inner.weight:0")
class half_and_shuffle_twice(nn.Module):
    """ShuffleNet V2: one half passes, and the halves interleave; the second time they factor in another way."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.outer, self.head = conv(3, 16), conv(8, 10, 1), conv(10, 8, 1), Head(16)

    def forward(self, x):
        x = self.stem(x)
        for _ in range(2):
            kept, changed = x.chunk(2, 1)
            x = torch.cat([kept, self.outer(self.inner(changed).relu())], 1)
            batch, channels, height, width = x.shape
            x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        return self.head(x)


@case(image(), free="a.weight:0 c.weight:0 b.weight:0")
class two_paths(nn.Module):
    """DPN: some channels are added, the others are concatenated."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 10), conv(10, 12), conv(12, 10), Head(14)

    def forward(self, x):
        x = self.a(x)
        y = self.c(self.b(x).relu())
        return self.head(torch.cat([x[:, :6] + y[:, :6], x[:, 6:], y[:, 6:]], 1).relu())


@case(image(size=8), free="a.weight:0 qkv.weight:0 join.weight:0")
class tokens_of_patches(nn.Module):
    """MobileViT: a map is read as patches by a reshape over channels, attended, and read back."""

    def __init__(self):
        super().__init__()
        self.a, self.qkv, self.project = conv(3, 8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.join, self.head = conv(16, 6), Head(6)

    def forward(self, x):
        x = self.a(x)
        batch, channels, height, width = x.shape
        y = x.reshape(batch * channels * height // 2, 2, width // 2, 2).transpose(1, 2)
        y = y.reshape(batch, channels, height * width // 4, 4).transpose(1, 3).reshape(batch * 4, -1, channels)
        query, key, value = self.qkv(y).chunk(3, -1)
        y = self.project((query @ key.mT * 0.3).softmax(-1) @ value)
        y = y.view(batch, 4, -1, channels).transpose(1, 3)
        y = y.reshape(batch * channels * height // 2, width // 2, 2, 2).transpose(1, 2)
        return self.head(self.join(torch.cat([x, y.reshape(batch, channels, height, width)], 1)).relu())


@case(sequence(length=9), free="qkv.weight:0 norm.running_mean:0 bias:0", keep="places")
class attention_of_linear_and_batch_norm(nn.Module):
    """LeViT: queries and values of unlike widths in one projection, a BatchNorm over it, a bias a head by distance."""

    def __init__(self):
        super().__init__()
        self.qkv, self.norm, self.bias = nn.Linear(8, 22), nn.BatchNorm1d(22), nn.Parameter(torch.randn(2, 9))
        self.project, self.out = nn.Linear(10, 8), nn.Linear(8, 3)
        self.register_buffer("places", (torch.arange(9)[:, None] - torch.arange(9)).abs())

    def forward(self, x):
        batch, length, _ = x.shape
        y = self.qkv(x)
        y = self.norm(y.flatten(0, 1)).reshape_as(y)
        query, key, value = (part.transpose(1, 2) for part in y.view(batch, length, 2, -1).split([3, 3, 5], 3))
        weights = (query @ key.mT * 3**-0.5 + self.bias[:, self.places]).softmax(-1)
        return self.out(self.project(F.hardswish((weights @ value).transpose(1, 2).reshape(batch, length, -1))))


@case(sequence(length=6), free="qkv.weight:0 distance:1")
class relative_positions_by_shifting(nn.Module):
    """BoTNet: scores by distance are skewed into place by padding and reshaping."""

    def __init__(self):
        super().__init__()
        self.qkv, self.distance, self.out = nn.Linear(8, 24), nn.Parameter(torch.randn(11, 4)), nn.Linear(8, 3)

    def forward(self, x):
        batch, length, _ = x.shape
        query, key, value = self.qkv(x).view(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4).flatten(1, 2)
        shifted = F.pad(F.pad(query @ self.distance.t(), (0, 1)).flatten(1), (0, length - 1))
        shifted = shifted.reshape(-1, length + 1, 2 * length - 1)[:, :length, length - 1 :]
        y = (query @ key.mT * 0.5 + shifted).softmax(-1) @ value
        return self.out(y.view(batch, 2, length, 4).transpose(1, 2).reshape(batch, length, 8))


@case(image(size=8), free="a.weight:0 query.weight:0 both.weight:0")
class attention_over_halos(nn.Module):
    """HaloNet: blocks of queries look at larger, overlapping blocks of keys and values."""

    def __init__(self):
        super().__init__()
        self.a, self.query, self.both, self.out = conv(3, 8), conv(8, 8, 1), conv(8, 20, 1), conv(12, 3, 1)

    def forward(self, x):
        x = self.a(x)
        batch = len(x)
        query = self.query(x).reshape(batch * 2, 4, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(batch * 2, 4, 16, 4)
        both = F.pad(self.both(x), (1, 1, 1, 1)).unfold(2, 6, 4).unfold(3, 6, 4)
        both = both.reshape(batch * 2, 10, 4, 36).permute(0, 2, 3, 1)
        key, value = both.split([4, 6], -1)
        y = (query @ key.mT * 0.5).softmax(-1) @ value
        y = y.reshape(batch * 2, 2, 2, 4, 4, 6).permute(0, 5, 1, 3, 2, 4)
        return self.out(y.reshape(batch, 12, 8, 8))


@case(image(), free="a.weight:0 modulator.weight:0 depthwise.0.weight:0")
class focal_modulation(nn.Module):
    """FocalNet: query, context and the gates of its levels from one projection, by stored sizes."""

    def __init__(self):
        super().__init__()
        self.sizes, self.a, self.mixed = [8, 8, 3], conv(3, 8), nn.Linear(8, 19)
        self.depthwise = nn.ModuleList(conv(8, 8, groups=8) for _ in range(2))
        self.modulator, self.project, self.out = conv(8, 8, 1), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.a(x).permute(0, 2, 3, 1)
        query, context, gates = self.mixed(x).split(self.sizes, -1)
        context, gates = context.permute(0, 3, 1, 2), gates.permute(0, 3, 1, 2)
        total = 0
        for level, layer in enumerate(self.depthwise):
            context = F.gelu(layer(context))
            total = total + context * gates[:, level : level + 1]
        total = total + context.mean((2, 3), keepdim=True) * gates[:, 2:]
        return self.out((x + self.project(query * self.modulator(total).permute(0, 2, 3, 1))).mean((1, 2)))


@case(image(), free="both.weight:0 one.weight:0 last.weight:0")
class growing_list_of_halves(nn.Module):
    """YOLO's C2f: the last part goes on, and all parts are concatenated."""

    def __init__(self):
        super().__init__()
        self.width, self.both, self.one, self.two = 5, conv(3, 10, 1), conv(5, 5), conv(5, 5)
        self.last, self.head = conv(20, 8, 1), Head(8)

    def forward(self, x):
        parts = list(F.silu(self.both(x)).split((self.width, self.width), 1))
        parts.extend(F.silu(layer(parts[-1])) for layer in (self.one, self.two))
        return self.head(self.last(torch.cat(parts, 1)))


@case(image(size=8), free="fine.weight:0 coarse.weight:0 across.weight:0 shared.weight:0")
class one_head_for_all_levels(nn.Module):
    """RetinaNet: boxes of a shared head, from maps of two sizes."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse, self.across, self.below = conv(3, 7), conv(7, 9, stride=2), conv(7, 6, 1), conv(9, 6, 1)
        self.shared, self.boxes = conv(6, 6), conv(6, 12, 1)

    def forward(self, x):
        fine = self.fine(x).relu()
        small = self.below(self.coarse(fine).relu())
        large = self.across(fine) + F.interpolate(small, size=fine.shape[-2:])
        found = []
        for level in (large, small):
            y = self.boxes(self.shared(level).relu())
            batch, _, height, width = y.shape
            found.append(y.view(batch, 3, 4, height, width).permute(0, 3, 4, 1, 2).reshape(batch, -1, 4))
        return torch.cat(found, 1)


@case(lambda: (torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6)), free="features.weight:0 motion.weight:0")
class correlation_of_images(nn.Module):
    """RAFT: features of both images in one batch, all against all, and one sampled where the flow points."""

    def __init__(self):
        super().__init__()
        self.features, self.motion, self.flow = conv(3, 8), conv(36, 10, 1), conv(10, 2, 1)

    def forward(self, first, second):
        a, b = self.features(torch.cat([first, second])).split(2)
        pairs = a.flatten(2).transpose(1, 2) @ b.flatten(2) / 8**0.5
        flow = self.flow(self.motion(pairs.view(2, 36, 6, 6)).relu())
        line = torch.linspace(-1, 1, 6)
        grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1) + flow.permute(0, 2, 3, 1) * 0.1
        return F.grid_sample(b, grid, align_corners=True).mean(1), flow
