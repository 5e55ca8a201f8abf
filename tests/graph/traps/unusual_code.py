"""Unusual code."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from tests.graph.traps._base import CASES, Head, case, conv, flat, image, sequence


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
