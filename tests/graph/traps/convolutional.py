"""Plain convolutional networks."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.graph.traps._base import Head, case, conv, image, sequence


@case(image(), free="a.weight:0 b.weight:0 bn.running_var:0", stuck="head.out.weight:0 a.weight:1")
class plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b, self.head = conv(3, 8), nn.BatchNorm2d(8), conv(8, 6), Head(6)

    def forward(self, x):
        return self.head(F.relu(self.b(F.relu(self.bn(self.a(x))))))


class Block(nn.Module):
    def __init__(self, inside, out, project):
        super().__init__()
        self.a, self.na, self.b, self.nb = conv(inside, out), nn.BatchNorm2d(out), conv(out, out), nn.BatchNorm2d(out)
        self.side = conv(inside, out, 1) if project else nn.Identity()

    def forward(self, x):
        return F.relu(self.nb(self.b(F.relu(self.na(self.a(x))))) + self.side(x))


@case(image(), free="stem.weight:0 one.a.weight:0 one.b.weight:0 two.side.weight:0 two.b.weight:0")
class residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two, self.head = conv(3, 6), Block(6, 6, False), Block(6, 8, True), Head(8)

    def forward(self, x):
        return self.head(self.two(self.one(self.stem(x))))


@case(image(), free="a.weight:0 b.weight:0 c.weight:0 bn.weight:0 d.weight:0")
class concat_of_concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 4), conv(3, 5), conv(3, 6)
        self.bn, self.d, self.head = nn.BatchNorm2d(21), conv(21, 7), Head(7)

    def forward(self, x):
        a, b, c = self.a(x), self.b(x), self.c(x)
        inner = torch.cat([a, b], 1)
        return self.head(self.d(F.relu(self.bn(torch.cat([inner, c, c], 1)))))


@case(image(), free="stem.weight:0 a.weight:0 b.weight:0 n2.weight:0")
class dense_blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv(3, 4)
        self.n1, self.a, self.n2, self.b = nn.BatchNorm2d(4), conv(4, 5), nn.BatchNorm2d(9), conv(9, 6)
        self.n3, self.head = nn.BatchNorm2d(15), Head(15)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([x, self.a(F.relu(self.n1(x)))], 1)
        x = torch.cat([x, self.b(F.relu(self.n2(x)))], 1)
        return self.head(F.relu(self.n3(x)))


@case(image(), free="a.weight:0 dw.weight:0 bn.weight:0 b.weight:0")
class depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.dw, self.bn, self.b = conv(3, 8), conv(8, 8, groups=8), nn.BatchNorm2d(8), conv(8, 6, 1)
        self.head = Head(6)

    def forward(self, x):
        return self.head(self.b(F.relu6(self.bn(self.dw(F.relu6(self.a(x)))))))


@case(image(), free="a.weight:0 dw.weight:0 b.weight:1")
class depthwise_multiplier(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.dw, self.b, self.head = conv(3, 4), conv(4, 12, groups=4), conv(12, 6, 1), Head(6)

    def forward(self, x):
        return self.head(self.b(F.relu(self.dw(F.relu(self.a(x))))))


@case(image(), free="a.weight:0 g.weight:0 g.weight:1 b.weight:1")
class grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.g, self.bn, self.b = conv(3, 12), conv(12, 12, groups=3), nn.BatchNorm2d(12), conv(12, 5, 1)
        self.head = Head(5)

    def forward(self, x):
        return self.head(self.b(F.relu(self.bn(self.g(F.relu(self.a(x)))))))


@case(image(), free="a.weight:0 g.weight:0 g.weight:1 b.weight:1")
class grouped_transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.g, self.b = conv(3, 8), nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2), conv(12, 5, 1)
        self.head = Head(5)

    def forward(self, x):
        return self.head(self.b(F.relu(self.g(F.relu(self.a(x))))))


@case(image(), free="a.weight:0 h.weight:0")  # what has two groupings at once must stay
class two_groupings(nn.Module):
    """One grouped convolution by 2, the next by 3: the channels between factor at different places."""

    def __init__(self):
        super().__init__()
        self.a, self.g, self.h, self.head = conv(3, 12), conv(12, 12, groups=2), conv(12, 12, groups=3), Head(12)

    def forward(self, x):
        return self.head(self.h(F.relu(self.g(F.relu(self.a(x))))))


@case(image(), free="a.weight:0 down.weight:0 b.weight:0")
class squeeze_excite(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.down, self.up, self.b, self.head = conv(3, 8), conv(8, 4, 1), conv(4, 8, 1), conv(8, 6), Head(6)

    def forward(self, x):
        x = F.relu(self.a(x))
        gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return self.head(self.b(x * gate))


@case(image(), free="a.weight:0 b.weight:1")
class glu_module(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.glu, self.b, self.head = conv(3, 12), nn.GLU(1), conv(6, 5), Head(5)

    def forward(self, x):
        return self.head(self.b(self.glu(self.a(x))))


@case(image(), free="a.weight:0 b.weight:1")
class glu_by_chunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 12), conv(6, 5), Head(5)

    def forward(self, x):
        value, gate = self.a(x).chunk(2, 1)
        return self.head(self.b(value * gate.sigmoid()))


@case(image(), free="a.weight:0 b.weight:1")
class maxout(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head, self.pieces = conv(3, 12), conv(6, 5), Head(5), 2

    def forward(self, x):
        x = self.a(x)
        x = x.view(x.shape[0], x.shape[1] // self.pieces, self.pieces, *x.shape[2:]).amax(2)
        return self.head(self.b(x))


@case(image(), free="a.weight:0")
class repeat_interleave(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(18, 5), Head(5)

    def forward(self, x):
        return self.head(self.b(F.relu(self.a(x)).repeat_interleave(3, 1)))


@case(image(), free="a.weight:0")
class repeat_channels(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(12, 5), Head(5)

    def forward(self, x):
        return self.head(self.b(F.relu(self.a(x)).repeat(1, 2, 1, 1)))


@case(image(), free="a.weight:0 b.weight:0 c.weight:1")
class stack_flatten(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 6), conv(3, 6), conv(12, 5), Head(5)

    def forward(self, x):
        return self.head(self.c(torch.stack([self.a(x), self.b(x)], 2).flatten(1, 2)))


@case(image(), free="a.weight:0 b.weight:1")
class flip_channels(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 7), conv(7, 5), Head(5)

    def forward(self, x):
        return self.head(self.b(F.relu(self.a(x)).flip(1)))


@case(image(), free="a.weight:0 b.weight:0")
class flip_added(nn.Module):
    """x + flip(x): mirrored channels leave in pairs."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 5), Head(5)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.head(self.b(x + x.flip(1)))


@case(image())
class roll_channels(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head, self.shift = conv(3, 7), conv(7, 5), Head(5), 3

    def forward(self, x):
        return self.head(self.b(torch.roll(F.relu(self.a(x)), self.shift, 1)))


@case(image(), free="a.weight:0 b.weight:1")
class shuffle_by_view(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head, self.groups = conv(3, 12), conv(12, 5), Head(5), 3

    def forward(self, x):
        n, c, h, w = (x := F.relu(self.a(x))).shape
        x = x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(self.b(x))


@case(image(), free="a.weight:0 b.weight:1")
class shuffle_module(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.mix, self.b, self.head = conv(3, 12), nn.ChannelShuffle(3), conv(12, 5, groups=1), Head(5)

    def forward(self, x):
        return self.head(self.b(self.mix(F.relu(self.a(x)))))


@case(image(), free="a.weight:0 g.weight:0")
class shuffle_then_grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.mix, self.g, self.head = conv(3, 12), nn.ChannelShuffle(3), conv(12, 12, groups=4), Head(12)

    def forward(self, x):
        return self.head(self.g(self.mix(F.relu(self.a(x)))))


@case(image(), free="a.weight:0 b.weight:0")
class pixel_shuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.up, self.b, self.head = conv(3, 16), nn.PixelShuffle(2), conv(4, 5), Head(5)

    def forward(self, x):
        return self.head(self.b(F.relu(self.up(self.a(x)))))


@case(image(), free="a.weight:0 b.weight:0")
class pixel_unshuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.down, self.b, self.head = conv(3, 5), nn.PixelUnshuffle(2), conv(20, 6), Head(6)

    def forward(self, x):
        return self.head(self.b(self.down(F.relu(self.a(x)))))


@case(image(), free="a.weight:0")
class space_to_depth(nn.Module):
    """By view and permute, as TResNet does."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head, self.size = conv(3, 5), conv(20, 6), Head(6), 2

    def forward(self, x):
        n, c, h, w = (x := F.relu(self.a(x))).shape
        x = x.view(n, c, h // self.size, self.size, w // self.size, self.size).permute(0, 3, 5, 1, 2, 4).contiguous()
        return self.head(self.b(x.view(n, c * self.size**2, h // self.size, w // self.size)))


@case(image(), free="a.weight:0 mix.weight:1")
class unfold_linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.mix, self.out = conv(3, 4), nn.Linear(4 * 9, 6), nn.Linear(6, 3)

    def forward(self, x):
        patches = F.unfold(F.relu(self.a(x)), 3, padding=1).transpose(1, 2)
        return self.out(F.relu(self.mix(patches)))


@case(image(), free="a.weight:0 b.weight:0")
class unfold_fold(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 4), conv(4, 6), Head(6)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.head(self.b(F.fold(F.unfold(x, 2, stride=2) * 2, x.shape[-2:], 2, stride=2)))


@case(image(), free="a.weight:0 b.weight:0 c.weight:1")
class concat_nhwc(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.out = conv(3, 4), conv(3, 5), nn.Linear(9, 6), nn.Linear(6, 3)

    def forward(self, x):
        a, b = self.a(x).permute(0, 2, 3, 1), self.b(x).permute(0, 2, 3, 1)
        return self.out(F.relu(self.c(torch.cat([a, b], -1))).mean((1, 2)))


@case(sequence(), free="a.weight:0 b.weight:0 c.weight:1")
class concat_tokens_and_features(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.out = nn.Linear(8, 4), nn.Linear(8, 5), nn.Linear(9, 6), nn.Linear(6, 3)

    def forward(self, x):
        y = torch.cat([self.a(x), self.b(x)], 2)
        return self.out(F.relu(self.c(torch.cat([y, y * 2], 1))))


@case(image(), may_refuse=True)
class split_equal(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head, self.part = conv(3, 10), conv(5, 4), conv(5, 6), Head(10), 5

    def forward(self, x):
        first, second = torch.split(F.relu(self.a(x)), self.part, 1)
        return self.head(torch.cat([self.b(first), self.c(second)], 1))


@case(image(), free="a.weight:0 b.weight:1 c.weight:1")
class split_by_attribute(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = [4, 6]
        self.a, self.b, self.c, self.head = conv(3, 10), conv(4, 5), conv(6, 5), Head(5)

    def forward(self, x):
        first, second = torch.split(F.relu(self.a(x)), self.parts, 1)
        return self.head(self.b(first) + self.c(second))


@case(image())
class split_by_literal(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 10), conv(4, 5), conv(6, 5), Head(5)

    def forward(self, x):
        first, second = torch.split(F.relu(self.a(x)), [4, 6], 1)
        return self.head(self.b(first) + self.c(second))


@case(image(), free="a.weight:0 b.weight:1")
class slice_by_attribute(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head, self.cut = conv(3, 9), conv(4, 5), conv(5, 5), Head(5), 4

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.head(self.b(x[:, : self.cut]) + self.c(x[:, self.cut :]))


@case(image())
class slice_by_literal(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 9), conv(4, 5), Head(5)

    def forward(self, x):
        return self.head(self.b(F.relu(self.a(x))[:, :4]))


@case(image(), may_refuse=True)
class slice_from_the_end(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head, self.tail = conv(3, 9), conv(4, 5), Head(5), 4

    def forward(self, x):
        return self.head(self.b(F.relu(self.a(x))[:, -self.tail :]))


@case(image(), free="a.weight:0 b.weight:1")
class slice_with_step(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 8), conv(4, 5), conv(4, 5), Head(5)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.head(self.b(x[:, ::2]) + self.c(x[:, 1::2]))


@case(image(), free="a.weight:0 b.weight:0")
class concat_then_slice(nn.Module):
    """As GhostNet does; the slice ends where the concatenation does."""

    def __init__(self):
        super().__init__()
        self.out_channels = 8
        self.a, self.b, self.c, self.head = conv(3, 4), conv(4, 4, groups=4), conv(8, 5), Head(5)

    def forward(self, x):
        first = F.relu(self.a(x))
        x = torch.cat([first, self.b(first)], 1)[:, : self.out_channels]
        return self.head(self.c(x))


@case(image(), may_refuse=True)
class chunk_apart(nn.Module):
    """Halves that nothing couples: the code cuts in the middle, so they must stay equally large."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 8), conv(4, 5), conv(4, 5), Head(5)

    def forward(self, x):
        first, second = F.relu(self.a(x)).chunk(2, 1)
        return self.head(self.b(first) + self.c(second))


@case(image(), free="a.weight:0")
class unbind_groups(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 12), conv(6, 5), conv(6, 5), Head(5)

    def forward(self, x):
        first, second = F.relu(self.a(x)).unflatten(1, (2, -1)).unbind(1)
        return self.head(self.b(first) + self.c(second))


@case(image(), free="a.weight:0 c.weight:0 mid:0", may_refuse=True)
class res2net(nn.Module):
    """Split, add the last result to the next part, concatenate."""

    def __init__(self):
        super().__init__()
        self.width = 4
        self.a, self.convs = conv(3, 12), nn.ModuleList(conv(4, 4) for _ in range(2))
        self.mid = nn.Parameter(torch.ones(12))
        self.c, self.head = conv(12, 5), Head(5)

    def forward(self, x):
        parts = torch.split(F.relu(self.a(x)), self.width, 1)
        last, outs = parts[0], [parts[0]]
        for part, layer in zip(parts[1:], self.convs):
            last = layer(last + part)
            outs.append(last)
        return self.head(self.c(torch.cat(outs, 1) * self.mid.view(1, -1, 1, 1)))


@case(image())
class partial_residual(nn.Module):
    """x[:, :k] + y[:, :k] beside y[:, k:], as ReXNet does: the block is wider than what it adds to."""

    def __init__(self):
        super().__init__()
        self.narrow = 4
        self.a, self.b, self.c, self.head = conv(3, 4), conv(4, 6), conv(6, 5), Head(5)

    def forward(self, x):
        x = F.relu(self.a(x))
        y = self.b(x)
        y = torch.cat([y[:, : self.narrow] + x, y[:, self.narrow :]], 1)
        return self.head(self.c(y))
