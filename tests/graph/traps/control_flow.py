"""Control flow, literals, odd modules."""

import math
import threading

import torch
import torch.nn.functional as F
from torch import nn

from tests.graph.traps._base import CASES, Head, case, conv, image, sequence
from tests.graph.traps.attention import Attention


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
