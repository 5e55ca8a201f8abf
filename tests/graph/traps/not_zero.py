"""Removed units that are not zero."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.graph.traps._base import case, conv, image, sequence

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
