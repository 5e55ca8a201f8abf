"""Weights without modules."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.graph.traps._base import Head, case, conv, image, sequence


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
