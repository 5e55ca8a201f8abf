"""Found by random networks."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.graph.traps._base import case, conv, flat, image, sequence


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
