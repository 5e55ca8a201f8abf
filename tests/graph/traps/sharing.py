"""Sharing, inputs and outputs."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.traps._base import CASES, Head, case, conv, flat, image, words
from tests.graph.traps.convolutional import Block


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
