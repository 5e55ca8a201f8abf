"""Tiny hard networks: one trap each.

A case says which parameter dimensions must be free, which must stay, and how to build the cut network by hand where
the statistics of a norm or a softmax change with the cut. Names of dimensions are ``parameter:dimension``.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One network and what must be found in it.

    Attributes:
        name: Unique.
        make: Builds the module.
        inputs: Builds example inputs: a tensor, a tuple or a dictionary.
        free: Dimensions that must lie on a prunable axis.
        stuck: Dimensions that must not.
        changes: Dimensions whose axis must say that statistics change.
        by_hand: The module itself runs with narrower parameters put in, which gives the cut network made by hand.
        never_zero: Parameters (or one dimension of them, ``name:0``) by which, or by whose norm, the network divides,
            so that a masked entry is 1 rather than 0.
        keep: Buffers whose values mean something and must not be made random.
        counted: The flop counter of torch sees every product of the network.
        may_refuse: Some cuts cannot be done with this code, and the refusal must name call, place and reason.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    free: tuple[str, ...] = ()
    stuck: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    by_hand: bool = False
    never_zero: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    counted: bool = True
    may_refuse: bool = False


CASES: dict[str, Case] = {}


def image(channels: int = 3, size: int = 6, batch: int = 2) -> Callable[[], Tensor]:
    return lambda: torch.randn(batch, channels, size, size)


def sequence(length: int = 5, width: int = 8, batch: int = 2) -> Callable[[], Tensor]:
    return lambda: torch.randn(batch, length, width)


def words(length: int = 5, vocabulary: int = 11, batch: int = 2) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, vocabulary, (batch, length))


def flat(width: int = 8, batch: int = 3) -> Callable[[], Tensor]:
    return lambda: torch.randn(batch, width)


def case(
    inputs: Callable[[], Any],
    *,
    free: str = "",
    stuck: str = "",
    changes: str = "",
    never_zero: str = "",
    keep: str = "",
    name: str = "",
    **options: Any,
) -> Callable[[Any], Any]:
    def add(make: Any) -> Any:
        key = name or make.__name__
        assert key not in CASES, key
        lists = {"free": free, "stuck": stuck, "changes": changes, "never_zero": never_zero, "keep": keep}
        CASES[key] = Case(key, make, inputs, **{k: tuple(text.split()) for k, text in lists.items()}, **options)
        return make

    return add


def conv(inside: int, out: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inside, out, kernel, padding=kernel // 2, **options)


class Head(nn.Module):
    """Pooled features to three numbers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.mean((2, 3)))


# ---- plain convolutional networks ------------------------------------------------------------------------------------


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


# ---- weights without modules -----------------------------------------------------------------------------------------


@case(sequence(), free="first:1 second:0")
class raw_matmul(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6, 3))
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x):
        return F.relu(x @ self.first + self.bias) @ self.second


@case(sequence(), free="first:0 first:2 second:1")
class raw_einsum(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(2, 8, 6)), nn.Parameter(torch.randn(2, 6, 3))

    def forward(self, x):
        hidden = F.relu(torch.einsum("bni,hid->bnhd", x, self.first))
        return torch.einsum("bnhd,hdo->bno", hidden, self.second)


@case(image(), free="first:0 second:0")
class functional_conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(6, 3, 3, 3)), nn.Parameter(torch.randn(5, 6, 1, 1))
        self.scale, self.head = nn.Parameter(torch.ones(6)), Head(5)

    def forward(self, x):
        x = F.relu(F.conv2d(x, self.first, padding=1)) * self.scale[:, None, None]
        return self.head(F.conv2d(x, self.second))


@case(sequence(), free="up.weight:0 gamma:0")
class layer_scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 10), nn.Linear(10, 6)
        self.gamma, self.out = nn.Parameter(torch.ones(6)), nn.Linear(6, 3)

    def forward(self, x):
        x = self.inside(x)
        return self.out(x + self.gamma * self.down(F.gelu(self.up(x))))


@case(sequence(), free="inside.weight:0 position:2", stuck="position:1")
class position_embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.position, self.out = nn.Linear(8, 6), nn.Parameter(torch.zeros(1, 5, 6)), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(F.relu(self.inside(x) + self.position))


@case(sequence(6), free="inside.weight:0 position:1", stuck="position:0")
class position_embedding_square(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.position, self.out = nn.Linear(8, 6), nn.Parameter(torch.zeros(6, 6)), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(F.relu(self.inside(x) + self.position))


@case(sequence(), free="inside.weight:0 token:2")
class class_token(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.token, self.out = nn.Linear(8, 6), nn.Parameter(torch.zeros(1, 1, 6)), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.inside(x)], 1)
        return self.out(F.relu(x)[:, 0])


@case(image(), free="a.weight:0 scale:1")
class buffer_scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(6, 5), Head(5)
        self.register_buffer("scale", torch.rand(1, 6, 1, 1), persistent=False)

    def forward(self, x):
        return self.head(self.b(self.a(x) * self.scale))


@case(image(), free="a.weight:0 running_var:0")
class frozen_bn(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(6, 5), Head(5)
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(6) + 0.5)

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        x = self.a(x) * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)
        return self.head(self.b(F.relu(x)))


@case(image(), free="a.weight:0 norm.running_mean:0")
class instance_norm_statistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm = conv(3, 6), nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
        self.b, self.head = conv(6, 5), Head(5)

    def forward(self, x):
        return self.head(self.b(F.relu(self.norm(self.a(x)))))


@case(image(), free="a.weight:0")
class instance_norm_plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.head = conv(3, 6), nn.InstanceNorm2d(6), conv(6, 5), Head(5)

    def forward(self, x):
        return self.head(self.b(F.relu(self.norm(self.a(x)))))


@case(image(), free="a.weight:0 norm.weight:0")
class group_norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.head = conv(3, 12), nn.GroupNorm(3, 12), conv(12, 5), Head(5)

    def forward(self, x):
        return self.head(self.b(F.relu(self.norm(self.a(x)))))


@case(image(), free="a.weight:0", changes="a.weight:0", by_hand=True)
class group_norm_of_one(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.head = conv(3, 8), nn.GroupNorm(1, 8), conv(8, 5), Head(5)

    def forward(self, x):
        return self.head(self.b(F.relu(self.norm(self.a(x)))))


@case(image(), free="a.weight:0")
class group_norm_of_concat(nn.Module):
    """GroupNorm over a concatenated skip, as diffusion UNets have it: groups straddle the seam."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm, self.c, self.head = conv(3, 4), conv(3, 8), nn.GroupNorm(4, 12), conv(12, 5), Head(5)

    def forward(self, x):
        return self.head(self.c(F.silu(self.norm(torch.cat([self.a(x), self.b(x)], 1)))))


@case(image(), free="a.weight:0 norm.weight:0 b.weight:0", changes="a.weight:0", by_hand=True)
class layer_norm_after_permute(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.out = conv(3, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.norm(self.a(x).permute(0, 2, 3, 1))
        return self.out(F.gelu(self.b(x)).mean((1, 2)))


@case(image(), free="a.weight:0", changes="a.weight:0", by_hand=True)
class layer_norm_functional(nn.Module):
    """ConvNeXt's channels-first norm, with `normalized_shape` taken from the tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 5), Head(5)
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x):
        x = self.a(x).permute(0, 2, 3, 1)
        x = F.layer_norm(x, x.shape[-1:], self.weight, self.bias).permute(0, 3, 1, 2)
        return self.head(self.b(x))


@case(sequence(), free="a.weight:0 norm.weight:0", changes="a.weight:0", by_hand=True)
class rms_norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 6), nn.RMSNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


@case(sequence(), free="a.weight:0 weight:0", changes="a.weight:0", by_hand=True)
class rms_norm_by_hand(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.weight, self.b = nn.Linear(8, 6), nn.Parameter(torch.ones(6)), nn.Linear(6, 3)

    def forward(self, x):
        x = self.a(x)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.b(self.weight * x)


@case(image(), free="a.weight:0", changes="a.weight:0", by_hand=True)
class global_response_norm(nn.Module):
    """ConvNeXt V2."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = conv(3, 8), nn.Linear(8, 5), nn.Linear(5, 3)
        self.gamma, self.beta = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x):
        x = F.gelu(self.a(x)).permute(0, 2, 3, 1)
        spread = x.norm(p=2, dim=(1, 2), keepdim=True)
        x = x + self.gamma * (x * (spread / (spread.mean(-1, keepdim=True) + 1e-6))) + self.beta
        return self.out(self.b(x).mean((1, 2)))


@case(image(), name="weight_norm", free="a.parametrizations.weight.original1:0", never_zero="original1:0")
def weight_norm():
    return _Pair(nn.utils.parametrizations.weight_norm)


@case(image(), name="spectral_norm", free="a.parametrizations.weight.original:0", counted=False)
def spectral_norm():
    return _Pair(nn.utils.parametrizations.spectral_norm)


@case(image(), name="spectral_norm_old", counted=False)
def spectral_norm_old():
    return _Pair(nn.utils.spectral_norm)


class _Pair(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.a, self.b, self.head = wrap(conv(3, 8)), wrap(conv(8, 6)), Head(6)

    def forward(self, x):
        return self.head(F.relu(self.b(F.relu(self.a(x)))))


@case(image(), free="a.weight:0 b.weight:0", by_hand=True)
class weight_standardised(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 6), Head(6)

    def forward(self, x):
        x = F.relu(F.conv2d(x, self.standard(self.a.weight), self.a.bias, padding=1))
        return self.head(F.relu(F.conv2d(x, self.standard(self.b.weight), self.b.bias, padding=1)))

    @staticmethod
    def standard(weight):
        mean = weight.mean((1, 2, 3), keepdim=True)
        return (weight - mean) / (weight.std((1, 2, 3), keepdim=True) + 1e-5)


@case(image(), changes="a.weight:0", by_hand=True)
class weight_standardised_after_sigmoid(nn.Module):
    """The standardised weight of a removed input is not zero, and neither is that input."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 6), Head(6)

    def forward(self, x):
        weight = self.b.weight - self.b.weight.mean((1, 2, 3), keepdim=True)
        return self.head(F.conv2d(self.a(x).sigmoid(), weight, self.b.bias, padding=1))


@case(image(), free="a.weight:0 b.weight:0")
class weight_scaled_by_batch_norm(nn.Module):
    """Weight standardisation by F.batch_norm over a reshaped weight, as timm does."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.gain, self.head = conv(3, 8), conv(8, 6), nn.Parameter(torch.ones(6, 1, 1, 1)), Head(6)

    def forward(self, x):
        shape = self.b.weight.shape
        weight = F.batch_norm(
            self.b.weight.reshape(1, shape[0], -1), None, None, weight=self.gain.view(-1), training=True, momentum=0.0
        ).reshape_as(self.b.weight)
        return self.head(F.conv2d(F.relu(self.a(x)), weight, self.b.bias, padding=1))


# ---- sharing, inputs, outputs ----------------------------------------------------------------------------------------


@case(words(), free="embedding.weight:1 a.weight:0", stuck="embedding.weight:0")
class tied_embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.a, self.b = nn.Embedding(11, 6), nn.Linear(6, 9), nn.Linear(9, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        x = self.embedding(x)
        return self.head(x + self.b(F.relu(self.a(x))))


@case(flat(), free="encode.weight:0")
class tied_autoencoder(nn.Module):
    """The decoder is the transpose of the encoder's weight."""

    def __init__(self):
        super().__init__()
        self.encode, self.bias = nn.Linear(8, 6), nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return F.linear(torch.tanh(self.encode(x)), self.encode.weight.t(), self.bias)


@case(image(), free="stem.weight:0 block.a.weight:0")
class one_block_many_times(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = conv(3, 6), Block(6, 6, False), Head(6)

    def forward(self, x):
        x = self.stem(x)
        for _ in range(3):
            x = self.block(x)
        return self.head(x)


@case(lambda: (torch.randn(2, 3, 6, 6), torch.randn(2, 3, 4, 4)), free="tower.0.weight:0 tower.2.weight:0 out.weight:1")
class two_inputs_one_tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower, self.out = nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 5)), nn.Linear(10, 3)

    def forward(self, left, right):
        return self.out(torch.cat([self.tower(left).mean((2, 3)), self.tower(right).mean((2, 3))], 1))


@case(image(), free="stem.weight:0", stuck="b.weight:0 stem_out.weight:0")
class dict_output(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.b, self.stem_out = conv(3, 6), conv(6, 4), conv(6, 2)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return {"features": self.b(x), "aux": [self.stem_out(x), None, "text"]}


@dataclass
class Result:
    logits: Tensor
    hidden: tuple[Tensor, ...]
    extra: Any = None


@case(image(), free="a.weight:0", stuck="b.weight:0 head.out.weight:0")
class dataclass_output(nn.Module):
    """A hidden tensor is given out, so its channels must stay."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(6, 4), Head(4)

    def forward(self, x):
        hidden = self.b(F.relu(self.a(x)))
        return Result(self.head(hidden), (hidden,))


@case(
    lambda: {"x": torch.randn(2, 5, 8), "mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]), "scale": 2},
    free="a.weight:0",
)
class keyword_inputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x, mask=None, scale=1):
        hidden = F.relu(self.a(x)).masked_fill(mask[..., None] == 0, 0)
        return self.b(hidden.sum(1) / mask.sum(1, keepdim=True)) * scale


@case(image(), name="all_frozen", free="a.weight:0")
def all_frozen():
    return CASES["plain"].make().requires_grad_(False)


@case(image(), free="a.weight:0 b.weight:0")
class detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(6, 5), Head(5)

    def forward(self, x):
        return self.head(self.b(F.relu(self.a(x)).detach()))


@case(image(), free="a.weight:0 b.weight:0")
class inner_no_grad(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(6, 5), Head(5)

    def forward(self, x):
        with torch.no_grad():
            x = F.relu(self.a(x))
        return self.head(self.b(x))


@case(image(), free="a.weight:0 b.weight:0 bias:0")
class in_place(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 6), conv(6, 6), conv(6, 5), Head(5)
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x):
        x = self.a(x).relu_()
        y = self.b(x)
        y += x
        y.mul_(2).add_(self.bias.view(-1, 1, 1))
        return self.head(self.c(F.hardswish(y, inplace=True)))


@case(image())
class in_place_on_a_slice(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = 4
        self.a, self.b, self.c, self.head = conv(3, 9), conv(4, 4), conv(9, 5), Head(5)

    def forward(self, x):
        x = F.relu(self.a(x))
        x[:, : self.part] = self.b(x[:, : self.part])
        return self.head(self.c(x))


@case(image())
class in_place_constant_summed(nn.Module):
    """A part of the channels becomes 1 in place; the sum over them then counts them."""

    def __init__(self):
        super().__init__()
        self.a, self.out = conv(3, 8), nn.Linear(36, 3)

    def forward(self, x):
        x = F.relu(self.a(x))
        x[:, :, 0, 0] = 1.0
        return self.out(x.sum(1).flatten(1))


@case(image())
class in_place_through_a_view(nn.Module):
    """The base of a view is written after the view was taken."""

    def __init__(self):
        super().__init__()
        self.a, self.out = conv(3, 8), nn.Linear(36, 3)

    def forward(self, x):
        x = F.relu(self.a(x))
        seen = x.flatten(2)
        x.add_(1.0)
        return self.out(seen.sum(1))


# ---- recurrent -------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind, hidden=6, out=None, **options):
        super().__init__()
        self.inside, self.rnn = nn.Linear(8, 7), kind(7, hidden, batch_first=True, **options)
        self.out = nn.Linear(out or hidden, 3)

    def forward(self, x):
        return self.out(self.rnn(F.relu(self.inside(x)))[0][:, -1])


RECURRENT = "inside.weight:0 rnn.weight_ih_l0:0 rnn.weight_hh_l0:0 rnn.weight_hh_l0:1 rnn.bias_ih_l0:0 out.weight:1"
case(sequence(), name="lstm", free=RECURRENT)(lambda: Recurrent(nn.LSTM))
case(sequence(), name="gru", free=RECURRENT)(lambda: Recurrent(nn.GRU))
case(sequence(), name="rnn_tanh", free=RECURRENT)(lambda: Recurrent(nn.RNN))
case(sequence(), name="lstm_deep_both_ways", free=RECURRENT)(
    lambda: Recurrent(nn.LSTM, out=12, num_layers=2, bidirectional=True)
)
case(sequence(), name="gru_deep_both_ways", free=RECURRENT)(
    lambda: Recurrent(nn.GRU, out=12, num_layers=2, bidirectional=True, dropout=0.1)
)
case(sequence(), name="lstm_projected", free="rnn.weight_hr_l0:0 rnn.weight_hr_l0:1 rnn.weight_ih_l0:0")(
    lambda: Recurrent(nn.LSTM, hidden=8, out=5, num_layers=2, proj_size=5)
)
case(sequence(), name="lstm_no_bias", free="rnn.weight_hh_l0:0")(lambda: Recurrent(nn.LSTM, bias=False))


@case(sequence(), free="start:2 rnn.weight_hh_l0:0")
class gru_learnt_start(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.start, self.out = nn.GRU(8, 6, batch_first=True), nn.Parameter(torch.zeros(1, 1, 6)), None
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        start = self.start.expand(-1, x.shape[0], -1).contiguous()
        return self.out(self.rnn(x, start)[0])


@case(sequence(), free="rnn.weight_hh_l0:0 out.weight:1")
class lstm_last_state(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True), nn.Linear(24, 3)

    def forward(self, x):
        _, (h, c) = self.rnn(x)
        return self.out(torch.cat([h[-2], h[-1], c[-2], c[-1]], -1))


@case(sequence(), free="rnn.weight_hh_l0:0")
class lstm_state_transposed(nn.Module):
    """h (layers, batch, hidden) to (batch, layers * hidden)."""

    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(8, 6, num_layers=2, batch_first=True), nn.Linear(12, 3)

    def forward(self, x):
        h = self.rnn(x)[1][0]
        return self.out(h.transpose(0, 1).reshape(x.shape[0], -1))


@case(sequence(), free="cell.weight_hh:1 out.weight:1")
class lstm_cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.LSTMCell(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.out(state[0])


@case(sequence(), free="cell.weight_hh:1 out.weight:1")
class gru_cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out, self.width = nn.GRUCell(8, 6), nn.Linear(6, 3), 6

    def forward(self, x):
        state = x.new_zeros(x.shape[0], self.width)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.out(state)


@case(image(), free="gates.weight:0 head.out.weight:1")
class conv_gru(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.gates, self.new, self.head = conv(3, 5), conv(10, 10), conv(10, 5), Head(5)

    def forward(self, x):
        x = self.stem(x)
        h = torch.zeros_like(x)
        for _ in range(2):
            z, r = torch.sigmoid(self.gates(torch.cat([x, h], 1))).chunk(2, 1)
            h = (1 - z) * h + z * torch.tanh(self.new(torch.cat([x, r * h], 1)))
        return self.head(h)


@case(lambda: (torch.randn(2, 5, 8), torch.tensor([5, 3])), free="rnn.weight_hh_l0:1")
class packed_lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return self.out(self.rnn(packed)[1][0][-1])


# ---- attention -------------------------------------------------------------------------------------------------------


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


# ---- whole patterns --------------------------------------------------------------------------------------------------


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


# ---- control flow, literals, odd modules -----------------------------------------------------------------------------


@case(image(), stuck="b.weight:0")
class branch_on_value(nn.Module):
    """The other branch is not seen on the example, but must run on other inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 6), conv(6, 6), conv(6, 6), Head(6)

    def forward(self, x):
        x = F.relu(self.a(x))
        x = self.b(x) if x.mean() < -1 else self.c(x)
        return self.head(x)


@case(image())
class item_of_a_constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(6, 5), Head(5)
        self.register_buffer("times", torch.tensor(2))

    def forward(self, x):
        x = F.relu(self.a(x))
        for _ in range(self.times.item()):
            x = x * 1.5
        return self.head(self.b(x))


@case(image(), keep="alpha")
class item_of_a_parameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head, self.alpha = conv(3, 6), conv(6, 5), Head(5), nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return self.head(self.b(F.relu(self.a(x)) * self.alpha.item()))


@case(image())
class loop_over_channels(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(6, 5), Head(5)

    def forward(self, x):
        x = F.relu(self.a(x))
        x = torch.stack([x[:, k] * (k + 1) for k in range(x.shape[1])], 1)
        return self.head(self.b(x))


@case(image(3, 4))
class view_with_literal(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 4), nn.Linear(64, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)).view(-1, 64))))


@case(image(3, 4), free="a.weight:0 deep.weight:0 up.weight:1", changes="up.weight:1")
class layers_beside_a_literal(nn.Module):
    """Layers that hold sizes of their own, where other code holds one in no attribute."""

    def __init__(self):
        super().__init__()
        self.a, self.deep, self.mix = conv(3, 8), conv(8, 16, groups=8), conv(16, 12, groups=4)
        self.up, self.norm, self.head = nn.ConvTranspose2d(12, 8, 2, 2, groups=2), nn.GroupNorm(4, 8), Head(8)

    def forward(self, x):
        x = self.mix(F.relu(self.deep(F.relu(self.a(x)))))
        x = x.view(len(x), 12, 4, 4)
        return self.head(F.relu(self.norm(self.up(x))))


@case(image(3, 4), free="again.second.1.weight:0 b.weight:0")
class one_module_of_two_names_beside_a_literal(nn.Module):
    """And tensors that nothing uses."""

    def __init__(self):
        super().__init__()
        self.first = conv(3, 3)
        self.again = nn.ModuleDict({"first": self.first, "second": nn.ModuleList([self.first, conv(3, 6)])})
        self.b, self.c, self.idle = nn.Linear(96, 6), nn.Linear(6, 3), nn.Parameter(torch.rand(4))
        self.again.register_buffer("old", torch.rand(3), persistent=False)

    def forward(self, x):
        x = self.again["second"][1](F.relu(self.again["first"](self.first(x))))
        return self.c(F.relu(self.b(x.view(-1, 96))))


@case(image(3, 4), free="a.weight:0 b.weight:0")
class flatten_to_linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 4), nn.Linear(64, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.c(F.relu(self.b(torch.flatten(F.relu(self.a(x)), 1))))


@case(image(3, 1, 1), free="a.weight:0 b.weight:0")
class size_one(nn.Module):
    """Batch 1, one pixel: most dimensions are 1, and `squeeze()` takes them all."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 6, 1), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)).squeeze())))


@case(sequence(), free="a_weight:1 b_weight:0")
class transposed_weights(nn.Module):
    """Conv1D of GPT-2."""

    def __init__(self):
        super().__init__()
        self.a_weight, self.a_bias = nn.Parameter(torch.randn(8, 9)), nn.Parameter(torch.zeros(9))
        self.b_weight, self.b_bias = nn.Parameter(torch.randn(9, 3)), nn.Parameter(torch.zeros(3))

    def forward(self, x):
        x = F.gelu(torch.addmm(self.a_bias, x.view(-1, x.size(-1)), self.a_weight))
        return torch.addmm(self.b_bias, x, self.b_weight)


@case(
    lambda: (torch.randn(3, 8), torch.randn(3, 8)), free="a.weight:0 b.weight:0 mix.weight:0", counted=False
)  # not by torch's counter
class bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.mix, self.out = nn.Linear(8, 5), nn.Linear(8, 6), nn.Bilinear(5, 6, 7), nn.Linear(7, 3)

    def forward(self, x, y):
        return self.out(F.relu(self.mix(F.relu(self.a(x)), F.relu(self.b(y)))))


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * (s + x * s * (1 - s))


@case(image(), free="a.weight:0")
class own_autograd_function(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(6, 5), Head(5)

    def forward(self, x):
        return self.head(self.b(Swish.apply(self.a(x))))


@case(image(), name="scripted")
def scripted():
    return torch.jit.script(nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 5)))


@case(image(), name="scripted_part", stuck="0.weight:0 3.weight:1")
def scripted_part():
    return nn.Sequential(conv(3, 6), torch.jit.script(nn.Sequential(nn.ReLU(), conv(6, 5))), nn.ReLU(), conv(5, 4))


@case(image(), name="hooked", free="a.weight:0")
def hooked():
    model = CASES["plain"].make()
    model.a.register_forward_hook(lambda module, args, out: out * 2)
    model.b.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return model


@case(image(), name="in_data_parallel", free="module.a.weight:0")
def in_data_parallel():
    return nn.DataParallel(CASES["plain"].make())


@case(image(), name="masked_by_prune", free="a.weight_orig:0")
def masked_by_prune():
    from torch.nn.utils import prune

    model = CASES["plain"].make()
    prune.l1_unstructured(model.a, "weight", 0.5)
    prune.random_structured(model.b, "weight", 0.3, dim=0)
    return model


@case(image(), name="double_precision", free="net.a.weight:0")
def double_precision():
    return _Cast(CASES["plain"].make(), torch.float64)


@case(image(), name="half_precision", free="net.a.weight:0")
def half_precision():
    return _Cast(CASES["plain"].make(), torch.bfloat16)


class _Cast(nn.Module):
    def __init__(self, net, dtype):
        super().__init__()
        self.net = net.to(dtype)
        self.dtype = dtype

    def forward(self, x):
        return self.net(x.to(self.dtype)).float()


@case(image(), free="aux.weight:0 aux.weight:1")
class used_in_training_only(nn.Module):
    """An auxiliary head runs in training mode only, so a second run must show its couplings."""

    def __init__(self):
        super().__init__()
        self.a, self.aux, self.b, self.head = conv(3, 6), conv(6, 6), conv(6, 5), Head(5)

    def forward(self, x):
        x = F.relu(self.a(x))
        if self.training:
            x = self.aux(x) + x
        return self.head(self.b(x))


@case(sequence(), free="inside.weight:0", keep="causal")
class infinite_mask(Attention):
    """A causal mask of minus infinity in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("causal", torch.full((5, 5), float("-inf")).triu(1))

    def qkv_heads(self, x):
        b, n, _ = x.shape
        return self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def weights(self, q, k):
        return (q @ k.mT * self.scale + self.causal[: q.shape[-2], : q.shape[-2]]).softmax(-1)


@case(image())
class gram_matrix(nn.Module):
    """Channels times channels, flattened: one axis meets itself."""

    def __init__(self):
        super().__init__()
        self.a, self.out = conv(3, 6), nn.Linear(36, 3)

    def forward(self, x):
        x = F.relu(self.a(x)).flatten(2)
        return self.out((x @ x.mT).flatten(1))


@case(image(), stuck="a.weight:0")
class hardtanh_off_zero(nn.Module):
    """Hardtanh(0.5, 1) of zero is 0.5."""

    def __init__(self):
        super().__init__()
        self.a, self.act, self.out = conv(3, 6), nn.Hardtanh(0.5, 1.0), nn.Linear(36, 3)

    def forward(self, x):
        return self.out(self.act(self.a(x)).sum(1).flatten(1))


@case(image())
class batch_norm_without_affine(nn.Module):
    """Sigmoid, then a BatchNorm without weights, then a sum: a removed channel does not give zero."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.out = conv(3, 6), nn.BatchNorm2d(6, affine=False), nn.Linear(36, 3)

    def forward(self, x):
        return self.out(self.norm(self.a(x).sigmoid()).sum(1).flatten(1))


@case(image(), may_refuse=True)
class weight_chosen_by_size(nn.Module):
    """Another weight is taken once there are fewer channels: the calls look the same."""

    def __init__(self):
        super().__init__()
        self.a, self.head = conv(3, 8), Head(5)
        self.wide, self.narrow = nn.Parameter(torch.randn(5, 8, 1, 1)), nn.Parameter(torch.randn(5, 8, 1, 1))

    def forward(self, x):
        x = F.relu(self.a(x))
        both = F.conv2d(x, self.wide), F.conv2d(x, self.narrow)
        return self.head(both[0] if x.shape[1] > 7 else both[1])


@case(image(), may_refuse=True)
class operands_swapped_by_size(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 8), conv(8, 5), conv(8, 5), Head(5)

    def forward(self, x):
        x = F.relu(self.a(x))
        first, second = self.b(x), self.c(x)
        if x.shape[1] < 8:
            first, second = second, first
        return self.head(first - second)


@case(image(), free="a.weight:0")
class asserted_width(nn.Module):
    """An attribute that only an assertion reads."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head, self.width = conv(3, 6), conv(6, 5), Head(5), 6

    def forward(self, x):
        x = F.relu(self.a(x))
        assert x.shape[1] == self.width, f"expected {self.width} channels"
        return self.head(self.b(x))


@case(image())
class holds_a_lock(nn.Module):
    """An attribute that cannot be copied."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head, self.lock = conv(3, 6), conv(6, 5), Head(5), threading.Lock()

    def forward(self, x):
        with self.lock:
            return self.head(self.b(F.relu(self.a(x))))


@case(image())
class holds_a_result(nn.Module):
    """The last features are kept on the module, with their graph."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(6, 5), Head(5)
        self.last = self.a(torch.randn(1, 3, 4, 4))

    def forward(self, x):
        self.last = F.relu(self.a(x))
        return self.head(self.b(self.last))


@case(image(), may_refuse=True)
class mean_by_count(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = conv(3, 6), nn.Linear(36, 3)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.out((x.sum(1) / x.shape[1]).flatten(1))


@case(image(), may_refuse=True)
class mean_by_count_tensor(nn.Module):
    """The count is a tensor that Python made."""

    def __init__(self):
        super().__init__()
        self.a, self.out = conv(3, 6), nn.Linear(36, 3)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.out((x.sum(1) / torch.tensor([float(x.shape[1])])).flatten(1))


@case(image(), may_refuse=True)
class mean_by_count_tensor_on_device(mean_by_count_tensor):
    """The same, made where the input is: on the meta device it would have no numbers."""

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.out((x.sum(1) / torch.tensor([float(x.shape[1])], device=x.device)).flatten(1))


@case(image(3, 4), free="a.weight:0 b.weight:0")
class constants_beside_a_literal(nn.Module):
    """Constants of the code, in every way to write them, where the calls must be rewritten."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 6), nn.Linear(96, 6), nn.Linear(6, 3)
        self.order, self.mean = [2, 0, 1], torch.tensor([0.3, -0.2, 0.1])

    def forward(self, x):
        x = x[:, self.order] - self.mean.to(x.device).view(1, 3, 1, 1)
        x = x[:, [1, 2, 0]] / torch.tensor([0.5, 0.6, 0.7], device=x.device).view(1, 3, 1, 1)
        x = x + x.new_tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1) * torch.as_tensor(0.5, device=x.device)
        x[:, [0, 2]] *= 2.0
        return self.c(F.relu(self.b(F.relu(self.a(x)).view(-1, 96))))


@case(image(), free="a.weight:0", never_zero="scale")
class divided_by_parameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head, self.scale = conv(3, 6), conv(6, 5), Head(5), nn.Parameter(torch.ones(6, 1, 1))

    def forward(self, x):
        return self.head(self.b(self.a(x) / self.scale))


@case(sequence())
class sinusoidal_positions(nn.Module):
    """Made on the fly for as many features as there are: a narrower network would get others."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.a(x)
        half = x.shape[-1] // 2
        rate = torch.exp(torch.arange(half, device=x.device) * (-math.log(100.0) / half))
        angle = torch.arange(x.shape[1], device=x.device)[:, None] * rate
        return self.b(F.relu(x + torch.cat([angle.sin(), angle.cos()], -1)))


@case(image())
class constant_index(nn.Module):
    """Channels reordered by a constant list."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(6, 5), Head(5)
        self.register_buffer("order", torch.tensor([3, 0, 5, 1, 4, 2]))

    def forward(self, x):
        return self.head(self.b(F.relu(self.a(x))[:, self.order]))


@case(image(), free="a.weight:0", name="circular_padding")
def circular_padding():
    return _Modes("circular")


@case(image(), free="a.weight:0", name="reflect_padding")
def reflect_padding():
    return _Modes("reflect")


class _Modes(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(6, 5, padding_mode=mode), Head(5)

    def forward(self, x):
        return self.head(self.b(F.relu(self.a(x))))


@case(sequence(), free="a.weight:0 down.weight:0 up.weight:0")
class low_rank_update(nn.Module):
    """LoRA merged on the way: W + B A."""

    def __init__(self):
        super().__init__()
        self.a, self.down, self.up = nn.Linear(8, 10), nn.Linear(8, 3, bias=False), nn.Linear(3, 10, bias=False)
        self.out = nn.Linear(10, 3)

    def forward(self, x):
        weight = self.a.weight + 0.5 * self.up.weight @ self.down.weight
        return self.out(F.relu(F.linear(x, weight, self.a.bias)))


@case(image())  # channels and samples are one dimension, convolved in groups: an irregular pattern
class dynamic_convolution(nn.Module):
    """Kernels mixed for each sample and applied as one grouped convolution."""

    def __init__(self):
        super().__init__()
        self.a, self.route, self.head = conv(3, 6), nn.Linear(6, 4), Head(5)
        self.kernels = nn.Parameter(torch.randn(4, 5, 6, 3, 3))

    def forward(self, x):
        x = F.relu(self.a(x))
        b, c, h, w = x.shape
        gate = self.route(x.mean((2, 3))).softmax(-1)
        kernels = (gate @ self.kernels.flatten(1)).view(b * self.kernels.shape[1], c, 3, 3)
        y = F.conv2d(x.reshape(1, b * c, h, w), kernels, padding=1, groups=b)
        return self.head(y.view(b, -1, h, w))


@case(sequence(), free="inside.weight:0 up.weight:0 modulate.weight:0")
class adaptive_norm(nn.Module):
    """DiT: shift, scale and gate come out of one projection in six parts."""

    def __init__(self):
        super().__init__()
        self.inside, self.condition, self.modulate = nn.Linear(8, 6), nn.Linear(8, 5), nn.Linear(5, 18)
        self.norm, self.up, self.down = nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 9), nn.Linear(9, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        condition = F.silu(self.condition(x.mean(1)))
        shift, scale, gate = self.modulate(condition)[:, None].chunk(3, -1)
        x = self.inside(x)
        y = self.norm(x) * (1 + scale) + shift
        return self.out(x + gate * self.down(F.gelu(self.up(y))))


@case(image(), free="a.weight:0 prelu.weight:0 b.weight:0")
class prelu(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.prelu, self.b, self.one, self.head = conv(3, 6), nn.PReLU(6), conv(6, 5), nn.PReLU(), Head(5)

    def forward(self, x):
        return self.head(self.one(self.b(self.prelu(self.a(x)))))


@case(image(), free="a.weight:0")
class split_attention(nn.Module):
    """ResNeSt: radix-major view, softmax over the radix."""

    def __init__(self):
        super().__init__()
        self.radix = 2
        self.a, self.down, self.up, self.b, self.head = conv(3, 12), conv(6, 4, 1), conv(4, 12, 1), conv(6, 5), Head(5)

    def forward(self, x):
        x = F.relu(self.a(x))
        b, c, h, w = x.shape
        parts = x.reshape(b, self.radix, c // self.radix, h, w)
        gate = self.up(F.relu(self.down(parts.sum(1).mean((2, 3), keepdim=True))))
        gate = gate.view(b, 1, self.radix, -1).transpose(1, 2).softmax(1).reshape(b, self.radix, c // self.radix, 1, 1)
        return self.head(self.b((parts * gate).sum(1)))


@case(image(), free="a.weight:0 b.weight:0")
class selective_kernel(nn.Module):
    """SK: branches stacked, softmax over the branches."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 6), conv(3, 6, 1)
        self.down, self.up, self.c, self.head = conv(6, 4, 1), conv(4, 12, 1), conv(6, 5), Head(5)

    def forward(self, x):
        both = torch.stack([F.relu(self.a(x)), F.relu(self.b(x))], 1)
        gate = self.up(F.relu(self.down(both.sum(1).mean((2, 3), keepdim=True))))
        gate = gate.view(x.shape[0], 2, both.shape[2]).softmax(1)
        return self.head(self.c((both * gate[..., None, None]).sum(1)))


@case(image(), free="a.weight:0 v.weight:0")
class attention_pool(nn.Module):
    """A learnt query; einsum over positions."""

    def __init__(self):
        super().__init__()
        self.a, self.query, self.v, self.out = (
            conv(3, 6),
            nn.Parameter(torch.randn(6)),
            nn.Linear(6, 5),
            nn.Linear(5, 3),
        )

    def forward(self, x):
        x = F.relu(self.a(x)).flatten(2)
        weight = torch.einsum("bcn,c->bn", x, self.query).softmax(-1)
        return self.out(F.relu(self.v(torch.einsum("bcn,bn->bc", x, weight))))


@case(image(), free="a.weight:0 b.weight:0")
class where_and_clamp(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(6, 5), Head(5)

    def forward(self, x):
        x = self.a(x)
        x = torch.where(x > 0, x, 0.1 * x).clamp(-2, 2)
        return self.head(torch.where(self.b(x) > 0, 1.0, self.b(x)))


@case(image(), free="a.weight:0")
class coordinates_concatenated(nn.Module):
    """CoordConv: two constant channels beside the features."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(8, 5), Head(5)

    def forward(self, x):
        x = F.relu(self.a(x))
        b, _, h, w = x.shape
        rows = torch.linspace(-1, 1, h).view(1, 1, h, 1).expand(b, 1, h, w)
        columns = torch.linspace(-1, 1, w).view(1, 1, 1, w).expand(b, 1, h, w)
        return self.head(self.b(torch.cat([x, rows, columns], 1)))


@case(image())
class cumulative_sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(6, 5), Head(5)

    def forward(self, x):
        return self.head(self.b(F.relu(self.a(x)).cumsum(1)))


@case(image())
class sorted_channels(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(6, 5), Head(5)

    def forward(self, x):
        return self.head(self.b(self.a(x).sort(1)[0]))


@case(image(), stuck="a.weight:0")
class fourier(nn.Module):
    """An operation without a rule along the channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(6, 5), Head(5)

    def forward(self, x):
        return self.head(self.b(torch.fft.fft(self.a(x), dim=1).real))


@case(image(), free="a.weight:0")
class fourier_in_space(nn.Module):
    """FNet or a Fourier layer: only positions are transformed."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(6, 5), Head(5)

    def forward(self, x):
        return self.head(self.b(torch.fft.irfft2(torch.fft.rfft2(self.a(x)), s=x.shape[-2:])))


@case(image())
class strided_view(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = conv(3, 6), nn.Linear(6 * 18, 3)

    def forward(self, x):
        x = F.relu(self.a(x)).contiguous()
        return self.out(torch.as_strided(x, (x.shape[0], 6, 18), (216, 36, 2)).flatten(1))


@case(image(), free="b.weight:0")
class local_response(nn.Module):
    """LocalResponseNorm reads neighbouring channels, so their places count."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.head = conv(3, 6), nn.LocalResponseNorm(3), conv(6, 5), Head(5)

    def forward(self, x):
        return self.head(self.b(self.norm(self.a(x))))


@case(image(), name="compiled", counted=False)
def compiled():
    return torch.compile(CASES["plain"].make(), backend="eager")


# ---- removed units that are not zero ---------------------------------------------------------------------------------
# Each ends in a sum over the channels without weights, so whatever a removed channel still adds must keep it in place.


class Summed(nn.Module):
    """Two layers of seven channels, something between, a sum over the channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = conv(3, 7), conv(3, 7), nn.Linear(36, 3)

    def mix(self, a, b):
        raise NotImplementedError

    def forward(self, x):
        y = self.mix(self.a(x), self.b(x)).sum(1)
        return self.out(F.adaptive_avg_pool2d(y, 6).flatten(1))


@case(image())
class concat_of_a_gate_summed(Summed):
    """Zero and not zero side by side along the rows."""

    def mix(self, a, b):
        return torch.cat([F.relu(a), b.sigmoid()], 2)


@case(image())
class stack_of_a_gate_summed(Summed):
    def mix(self, a, b):
        return torch.stack([F.relu(a), b.sigmoid()], 2).sum(2)


@case(image())
class max_of_a_gate_summed(Summed):
    def mix(self, a, b):
        return torch.max(F.relu(a), b.sigmoid())


@case(image())
class padded_by_ones_summed(Summed):
    def mix(self, a, b):
        return F.pad(F.relu(a + b), (1, 1, 1, 1), value=1.0)


@case(image())
class clamped_from_below_summed(Summed):
    def mix(self, a, b):
        return (a + b).clamp(0.3, 2)


@case(image())
class masked_fill_summed(Summed):
    def mix(self, a, b):
        return (a + b).masked_fill(a > 0, 0.5)


@case(image())
class where_constant_summed(Summed):
    def mix(self, a, b):
        return torch.where(a > 0, a + b, 0.5)


@case(image())
class constant_added_summed(Summed):
    def mix(self, a, b):
        return torch.add(a, 1.0) * 2 + b


@case(image())
class difference_from_one_summed(Summed):
    def mix(self, a, b):
        return (1 - a) + b


@case(image())
class softmax_of_rows_summed(Summed):
    """Softmax along the rows of a channel of zeros gives one over their number."""

    def mix(self, a, b):
        return (a + b).softmax(2)


@case(image())
class powers_summed(Summed):
    def mix(self, a, b):
        return 2 ** (a + b) + (a * b) ** 2


@case(image())
class channels_as_batch_summed(Summed):
    """One filter for every channel alone: the bias is there for removed ones too."""

    def __init__(self):
        super().__init__()
        self.each = nn.Conv2d(1, 1, 3, padding=1)

    def mix(self, a, b):
        n, c, h, w = a.shape
        return self.each((a + b).view(n * c, 1, h, w)).view(n, c, h, w)


@case(image())
class channels_as_batch_linear_summed(Summed):
    def __init__(self):
        super().__init__()
        self.each = nn.Linear(6, 6)

    def mix(self, a, b):
        return self.each(a + b)


@case(image())
class layer_norm_of_rows_summed(Summed):
    """A norm along the rows, whose bias is there for removed channels too."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)

    def mix(self, a, b):
        return self.norm(a + b)


@case(image())
class lstm_of_each_channel_summed(Summed):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(6, 6, batch_first=True)

    def mix(self, a, b):
        n, c, h, w = a.shape
        return self.rnn((a + b).reshape(n * c, h, w))[0].reshape(n, c, h, w)


@case(sequence())
class batch_norm_of_tokens_summed(nn.Module):
    """The norm's channels are tokens; its shift is there for removed features too."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.out = nn.Linear(8, 6), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.norm(self.a(x)).sum(-1))


@case(image())
class embedding_scaled_summed(Summed):
    """exp(scale) of a removed parameter is one."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(7, 1, 1))

    def mix(self, a, b):
        return (a + b).sigmoid() * self.scale.exp()


@case(image(), free="a.weight:0 scale:0")
class own_gate_summed(Summed):
    """The scale itself is zero where removed, so the channel may go."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(7, 1, 1))

    def mix(self, a, b):
        return (a + b).sigmoid() * self.scale


# ---- statistics over features where a layer seems to know nothing of them --------------------------------------------


@case(sequence(), changes="a.weight:0", by_hand=True)
class instance_norm_of_tokens(nn.Module):
    """Tokens are the norm's channels, features its positions."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.out = nn.Linear(8, 6), nn.InstanceNorm1d(5), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.norm(self.a(x)))


@case(sequence(), changes="a.weight:0", by_hand=True)
class group_norm_of_tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.out = nn.Linear(8, 6), nn.GroupNorm(5, 5), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.norm(self.a(x)))


@case(sequence(), changes="a.weight:0", by_hand=True)
class variance_of_features(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.a(x)
        return self.out(x / (x.var(-1, keepdim=True, unbiased=False) + 1).sqrt())


@case(sequence(), changes="a.weight:0", by_hand=True)
class log_sum_of_features(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.a(x)
        return self.out(x - torch.logsumexp(x, -1, keepdim=True)) + x.amin(-1, keepdim=True)


@case(image(), stuck="a.weight:0")
class efficient_channel_attention(nn.Module):
    """ECA: a convolution slides along the channels, so neighbours count."""

    def __init__(self):
        super().__init__()
        self.a, self.slide, self.b, self.head = conv(3, 8), nn.Conv1d(1, 1, 3, padding=1), conv(8, 5), Head(5)

    def forward(self, x):
        x = F.relu(self.a(x))
        gate = self.slide(x.mean((2, 3))[:, None]).sigmoid().transpose(1, 2)[..., None]
        return self.head(self.b(x * gate))


@case(image(), stuck="a.weight:0")
class pooled_over_channels(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = conv(3, 8), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = F.relu(self.a(x)).flatten(2).transpose(1, 2)
        return self.out(F.relu(self.b(F.max_pool1d(x, 2))))


# ---- reshapes that mix ---------------------------------------------------------------------------------------------


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


# ---- found by random networks ----------------------------------------------------------------------------------------


@case(image(), may_refuse=True)
class mean_by_count_on_device(nn.Module):
    """The count is a tensor that Python made on the device of the input, which is the meta device in a trace."""

    def __init__(self):
        super().__init__()
        self.a, self.out = conv(3, 6), nn.Linear(36, 3)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.out((x.sum(1) / torch.tensor([float(x.shape[1])], device=x.device)).flatten(1))


@case(sequence(), free="q.weight:0 kv.weight:0")
class rewritten_with_constants(nn.Module):
    """Keys and values come apart, so the calls are rewritten, with the numbers that the code made."""

    def __init__(self):
        super().__init__()
        self.inside, self.q, self.kv, self.out = (nn.Linear(*sizes) for sizes in ((8, 8), (8, 6), (8, 12), (6, 3)))

    def forward(self, x):
        b, t, _ = x.shape
        x = self.inside(x)
        x = x * torch.bucketize(x, torch.tensor([0.0, 0.3], device=x.device))
        q = self.q(x).view(b, t, 2, 3).transpose(1, 2)
        k, v = self.kv(x).view(b, t, 2, 2, 3).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) + x.new_tensor([0.5]))


@case(sequence(), free="qkv.weight:0 out.weight:1")
class one_head_unbound(nn.Module):
    """A dimension of size 1 lies between those of a fused projection."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 12), nn.Linear(4, 3)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 1, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@case(image(3, 4), free="a.weight:0 norm.weight:0")
class groups_beside_a_literal(nn.Module):
    """A literal makes the calls be rewritten, in which the layers need their new number of groups too."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = conv(3, 6), nn.GroupNorm(6, 6), conv(6, 6, groups=6)
        self.out = nn.Linear(96, 3)

    def forward(self, x):
        return self.out(self.b(self.norm(self.a(x))).reshape(len(x), 96))


@case(sequence(), stuck="a.weight:0", free="rnn.weight_hh_l0:0")
class channels_as_steps(nn.Module):
    """A recurrence runs over what a convolution calls channels."""

    def __init__(self):
        super().__init__()
        self.a, self.rnn, self.out = nn.Conv1d(5, 6, 1), nn.RNN(8, 4, batch_first=True), nn.Linear(24, 3)

    def forward(self, x):
        return self.out(self.rnn(self.a(x))[0].flatten(1))


@case(sequence(), stuck="order:0")
class looked_up_and_summed(nn.Module):
    """Integers are never masked, so what they look up is not zero."""

    def __init__(self):
        super().__init__()
        self.register_buffer("order", torch.tensor([3, 0, 5, 1, 4, 2, 0, 1]))
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        picked = x[..., self.order]
        return self.out(picked @ picked.mT)


@case(sequence(), free="table.weight:1", stuck="order:0")
class embedded_buffer_summed(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("order", torch.tensor([3, 0, 2, 1]))
        self.table, self.out = nn.Embedding(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.table(self.order).sum(0) * x.sum((1, 2))[:, None])


@case(flat(), free="a.weight:0 weight:0 weight:1")
class einsum_of_sums(nn.Module):
    """What one operand alone has is added up before, and a product that adds nothing up is pointwise."""

    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(8, 6), nn.Linear(6, 3)
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        return self.out(torch.einsum("ni,ij->ni", self.a(x), self.weight))


@case(image(), stuck="a.weight:0")
class batch_norm_scaled_from_one_summed(nn.Module):
    """A masked channel is scaled by one, not by zero."""

    def __init__(self):
        super().__init__()
        self.a, self.out = conv(3, 6), nn.Linear(36, 3)
        self.gamma, self.beta = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(6))
        self.register_buffer("running_mean", torch.zeros(6))
        self.register_buffer("running_var", torch.ones(6))

    def forward(self, x):
        x = torch.sigmoid(self.a(x))
        x = F.batch_norm(x, self.running_mean, self.running_var, 1 + self.gamma, self.beta)
        return self.out(x.sum(1).flatten(1))


@case(flat())
class padded_then_viewed(nn.Module):
    """Rows and columns of the view do not meet in every pair, because some of its positions are padding."""

    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(8, 12, bias=False), nn.Linear(144, 3)

    def forward(self, x):
        x = self.a(x)
        grid = F.pad(x, (2, 1)).reshape(len(x), 3, 5)
        return self.out((x[:, None] * x[:, :, None]).flatten(1)) + 0 * grid.sum((1, 2))[:, None]


@case(flat(), free="a.weight:0")
class rolled_by_a_literal(nn.Module):
    """Whatever leaves, the shift is the number of positions left behind the end."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.b(self.a(x).roll(2, 1))


# ---- unusual code ----------------------------------------------------------------------------------------------------


class _Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(6, 5), Head(5)

    def forward(self, x):
        return self.head(self.b(self.a(x)))


TWO = "a.weight:0 b.weight:0 b.weight:1"


@case(lambda: (torch.randn(2, 3, 6, 6), 2, "relu", None), free=TWO)
class inputs_that_are_no_tensors(_Two):
    def forward(self, x, times, mode, mask):
        x = self.a(x)
        for _ in range(times):
            x = getattr(F, mode)(x) * 1.5
        return self.head(self.b(x if mask is None else x * mask))


@case(lambda: {"x": torch.randn(2, 3, 6, 6), "gain": 2.0}, free=TWO)
class keyword_only_inputs(_Two):
    def forward(self, *, x, gain=1.0):
        return super().forward(x * gain)


@case(image(), free=TWO)
class writes_into_its_input(_Two):
    def forward(self, x):
        x.mul_(2)
        x[:, 0] = 0
        return super().forward(x)


@case(image(), free=TWO)
class clamps_its_weights(_Two):
    def forward(self, x):
        with torch.no_grad():
            self.a.weight.clamp_(-0.2, 0.2)
            self.b.weight.data.mul_(0.5)
        return super().forward(x)


@case(image(), free="a.weight:0")
class clamps_its_weights_off_zero(_Two):
    """A masked filter does not stay zero, but what reads it does."""

    def forward(self, x):
        with torch.no_grad():
            self.a.weight.clamp_(0.1, 0.3)
            self.a.bias.clamp_(0.1, 0.3)
        return super().forward(x)


@case(image(), free=TWO)
class writes_into_a_buffer(_Two):
    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(6, 1, 1))

    def forward(self, x):
        x = self.a(x)
        self.average.lerp_(x.mean((0, 2, 3)).detach().view(-1, 1, 1), 0.1)
        return self.head(self.b(x - self.average))


@case(image(), free=TWO)
class replaces_a_buffer(_Two):
    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(6, 1, 1), persistent=False)

    def forward(self, x):
        x = self.a(x)
        self.average = 0.9 * self.average + 0.1 * x.mean((0, 2, 3), keepdim=True)[0]
        return self.head(self.b(x - self.average))


@case(image(), free="a.weight:0 b.weight:0 a.scale:0")
class one_buffer_of_two_modules(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(6, 6), Head(6)
        scale = torch.rand(6, 1, 1)
        self.a.register_buffer("scale", scale)
        self.b.register_buffer("scale", scale, persistent=False)

    def forward(self, x):
        return self.head(self.b(self.a(x) * self.a.scale) * self.b.scale)


@case(image(), name="hook_drops_channels", free="a.weight:0", stuck="a.weight:1")
def hook_drops_channels():
    model = nn.Sequential(OrderedDict(a=conv(3, 6), b=conv(3, 5), head=Head(5)))
    model.a.register_forward_hook(lambda module, args, out: out[:, ::2])
    return model


@case(image(), name="hook_joins_channels", free=TWO)
def hook_joins_channels():
    model = _Two()
    model.b.register_forward_pre_hook(lambda module, args: (torch.cat([args[0][:, :4], args[0][:, 4:] * 2], 1),))
    model.head.register_forward_hook(lambda module, args, out: out.repeat(1, 2))
    return model


@case(image(), name="backward_hooks", free=TWO)
def backward_hooks():
    model = _Two()
    model.b.register_full_backward_hook(lambda module, given, got: (given[0] * 2,))
    model.a.register_full_backward_pre_hook(lambda module, got: (got[0] * 3,))
    return model


class _Halved(nn.Module):
    def forward(self, weight):
        return weight * 0.5


class _Centred(nn.Module):
    def forward(self, weight):
        return weight - weight.mean(0, keepdim=True)


@case(image(), name="parametrised", free="a.parametrizations.weight.original:0", counted=False)
def parametrised():
    model = _Two()
    nn.utils.parametrize.register_parametrization(model.a, "weight", _Halved())
    nn.utils.parametrize.register_parametrization(model.b, "weight", _Centred())
    return model


@case(image(), free=TWO)
class functional_call_inside(_Two):
    def forward(self, x):
        twice = {name: tensor * 2 for name, tensor in self.b.named_parameters()}
        return self.head(torch.func.functional_call(self.b, twice, (self.a(x),)))


@case(flat(), free="weights.0:1 weights.1:0 weights.1:1 last.weight:0")
class parameters_in_containers(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(8, 6), torch.randn(6, 5)])
        self.last = nn.ParameterDict({"weight": torch.randn(5, 3), "bias": torch.randn(3)})

    def forward(self, x):
        for weight in self.weights:
            x = F.relu(x @ weight)
        return x @ self.last["weight"] + self.last["bias"]


@case(image(), name="jit_traced", counted=False)
def jit_traced():
    return torch.jit.trace(CASES["plain"].make().eval(), torch.randn(2, 3, 6, 6))


@case(flat(), free="a.weight:0")
class guards_its_attributes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.width = nn.Linear(8, 6), nn.Linear(6, 3), 6

    def __setattr__(self, name, value):
        if name == "width" and name in vars(self):
            raise AttributeError(f"{name} is set already")
        super().__setattr__(name, value)

    def forward(self, x):
        return self.b(self.a(x).view(-1, self.width))


@case(flat(), free="a.weight:0 table:1", stuck="table:0", keep="order")
class looked_up_by_part_of_a_buffer(nn.Module):
    """Rows of a table are named by numbers cut out of a buffer, which surgery does not renumber."""

    def __init__(self):
        super().__init__()
        self.a, self.out, self.table = nn.Linear(8, 6), nn.Linear(6, 3), nn.Parameter(torch.randn(4, 6))
        self.register_buffer("order", torch.tensor([[3, 0, 2, 1, 3, 2], [0, 1, 2, 3, 0, 1]]))

    def forward(self, x):
        return self.out(self.a(x) * self.table[self.order[:, :5].reshape(-1)].sum(0))


@case(sequence(), free="table:1", stuck="table:0")
class positions_behind_the_example(nn.Module):
    """Rows that this example does not reach; a longer one would."""

    def __init__(self):
        super().__init__()
        self.a, self.out, self.table = nn.Linear(8, 6), nn.Linear(6, 3), nn.Parameter(torch.randn(11, 6))

    def forward(self, x):
        return self.out(self.a(x) + self.table[: x.shape[1]])


class RemembersItsInput(nn.BatchNorm1d):
    def forward(self, x):
        self.doubled = 2 * x
        return super().forward(self.doubled)


@case(flat(), free="a.weight:0")
class reads_what_a_layer_kept(nn.Module):
    """A literal makes the calls be rewritten, in which a value from inside of a layer is needed outside of it."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.out = nn.Linear(8, 6), RemembersItsInput(6), nn.Linear(12, 3)

    def forward(self, x):
        y = self.norm(self.a(x))
        return self.out(torch.cat([y, self.norm.doubled], 1).reshape(len(x), 12))


# ---- more of what people write ---------------------------------------------------------------------------------------


@case(sequence(), free="a.weight:0 b.weight:1", changes="a.weight:0")
class gate_by_a_convolution_over_tokens(nn.Module):
    """A kernel of one position joins no positions, so channels may stand where positions usually do."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.mix, self.b = nn.Linear(8, 12), nn.LayerNorm(6), nn.Conv1d(5, 5, 1), nn.Linear(6, 3)

    def forward(self, x):
        kept, gate = F.gelu(self.a(x)).chunk(2, -1)
        return self.b(kept * self.mix(self.norm(gate)))


@case(
    image(size=8),
    free="stem.weight:0 n.weight:0 up.weight:0 out.weight:1",
    changes="stem.weight:0",
)
class nested_groups_of_a_skip(nn.Module):
    """Groups of two channels before a concatenation are pairs of groups behind it."""

    def __init__(self):
        super().__init__()
        self.stem, self.n, self.down = conv(3, 8), nn.GroupNorm(4, 8), conv(8, 12, stride=2)
        self.up, self.both, self.out = conv(12, 8), nn.GroupNorm(4, 16), conv(16, 3)

    def forward(self, x):
        x = self.stem(x)
        y = F.interpolate(self.up(self.down(F.silu(self.n(x)))), scale_factor=2)
        return self.out(F.silu(self.both(torch.cat([y, x], 1))))


@case(sequence(), free="a.weight:0 weight:0 weight:3", changes="weight:0")
class capsules(nn.Module):
    """Each capsule is divided by its own length, which is zero where it is masked."""

    def __init__(self):
        super().__init__()
        self.a, self.weight, self.out = nn.Linear(8, 12), nn.Parameter(torch.randn(4, 2, 3, 5)), nn.Linear(10, 3)

    def forward(self, x):
        u = self.a(x.mean(1)).view(-1, 4, 3)
        length = u.norm(dim=-1, keepdim=True)
        u = u * length / (1 + length.square())
        u = u / u.square().sum(-1, keepdim=True).sqrt()
        return self.out(torch.einsum("bid,ijde->bije", u, self.weight).sum(1).flatten(1))


@case(flat(), free="a.weight:0", changes="a.weight:0")
class divided_by_its_own_root(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        y = self.a(x).square()
        return self.out(y * y.rsqrt())


@case(flat(), free="a.weight:0 b.weight:0 out.weight:1")
class real_and_imaginary_parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(12, 3)

    def forward(self, x):
        z = torch.complex(self.a(x), self.b(x))
        z = z * z.conj() + z
        return self.out(torch.cat([z.real, z.imag], -1).tanh())


@case(lambda: (torch.randn(6, 8), torch.randint(0, 6, (2, 9))), free="a.weight:0 message.weight:0")
class messages_by_scatter(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.message, self.out = nn.Linear(8, 6), nn.Linear(12, 10), nn.Linear(26, 3)

    def forward(self, x, edges):
        x = self.a(x).relu()
        start, end = edges
        sent = self.message(torch.cat([x[start], x[end]], -1)).relu()
        to = end[:, None].expand_as(sent)
        total = torch.zeros(len(x), sent.shape[-1]).scatter_add_(0, to, sent)
        largest = torch.zeros(len(x), sent.shape[-1]).scatter_reduce(0, to, sent, "amax")
        return self.out(torch.cat([x, total, largest], -1))


@case(flat(), free="a.weight:0 one.weight:0 two.weight:1")
class blocks_of_a_diagonal(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.one, self.two, self.out = nn.Linear(8, 9), nn.Linear(4, 6), nn.Linear(5, 7), nn.Linear(13, 3)

    def forward(self, x):
        return self.out(F.linear(self.a(x), torch.block_diag(self.one.weight, self.two.weight)).relu())


@case(image(), free="a.weight:0 b.weight:0")
class unpooling(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = conv(3, 6), conv(6, 6, 1), conv(6, 3, 1)

    def forward(self, x):
        y, places = F.max_pool2d(self.a(x), 2, return_indices=True)
        return self.out(F.max_unpool2d(self.b(y), places, 2))


@case(sequence(), free="a.weight:0 weights:1")
class mapped_over_samples(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(8, 6), nn.Linear(6, 3)
        self.weights = nn.Parameter(torch.randn(3, 5, 6))

    def forward(self, x):
        x = torch.vmap(lambda sample: self.a(sample).relu())(x)
        ensemble = torch.vmap(lambda weight: F.linear(x, weight).square().sum(-1))(self.weights)
        return self.out(x), ensemble


@case(sequence(), free="a.weight:0 rnn.weight_hh_l0:1 rnn.weight_ih_l0:1")
class packed_sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.rnn, self.out = (
            nn.Linear(8, 6),
            nn.LSTM(6, 7, batch_first=True, bidirectional=True),
            nn.Linear(14, 3),
        )

    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(self.a(x), torch.tensor([5, 3]), batch_first=True)
        y, (last, _) = self.rnn(packed)
        y, _ = nn.utils.rnn.pad_packed_sequence(y, batch_first=True)
        return self.out(y), self.out(torch.cat([last[0], last[1]], -1))


@case(sequence(), free="a.weight:0 out.weight:1")
class one_number_wherever_a_mask_says(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        y = self.a(x)
        y[y > 0.5] = 0.5
        y[x.mean(-1) < 0] = 0.1
        return self.out(y)


@case(flat(), free="a.weight:0")
class keeps_sizes_in_slots(nn.Module):
    __slots__ = ("grid", "width")

    def __init__(self):
        super().__init__()
        self.width, self.grid = 6, (2, 3)
        self.a, self.out = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.a(x).view(-1, *self.grid).relu().reshape(-1, self.width))


# ---- blocks of published networks ------------------------------------------------------------------------------------


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
