"""Statistics over features, where a layer seems to know nothing of them."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.graph.traps._base import Head, case, conv, image, sequence


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
