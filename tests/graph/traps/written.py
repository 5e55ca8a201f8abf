"""More of what people write."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.graph.traps._base import case, conv, flat, image, sequence


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
