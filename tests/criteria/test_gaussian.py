"""The data-free criterion: closed forms, invariances, and where it does not apply."""

import math

import pytest
import torch
from torch import Tensor, nn

from metaprune import zoo
from metaprune.criteria import CRITERIA, Calibration
from metaprune.errors import ConfigError
from metaprune.graph import Network, trace


def normalised(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    nn.init.uniform_(norm.running_var, 0.2, 3)
    return norm


def chain(activation: nn.Module, second: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    second = second or nn.Conv2d(6, 5, 3)
    return nn.Sequential(nn.Conv2d(3, 6, 3), normalised(6), activation, second, normalised(5)).eval()


def score(model: nn.Module) -> Tensor:
    return CRITERIA["gaussian"]().score(network(model), Calibration())["0"]


def network(model: nn.Module) -> Network:
    return trace(model, torch.randn(2, 3, 8, 8))


def gained(model: nn.Sequential) -> Tensor:
    """Norm of what the layer that reads a unit makes of it, in float64."""
    norm = model[4]
    gain = norm.weight.abs() / (norm.running_var + norm.eps).sqrt()
    return (model[3].weight * gain[:, None, None, None]).detach().double().square().sum((0, 2, 3)).sqrt()


def test_behind_a_relu_it_is_the_rectified_gaussian() -> None:
    model = chain(nn.ReLU())
    mean, scale = model[1].bias.detach().double(), model[1].weight.detach().double().abs()
    ratio = mean / scale
    below, density = torch.special.ndtr(ratio), (-ratio.square() / 2).exp() / math.sqrt(2 * math.pi)
    first = mean * below + scale * density
    variance = (mean.square() + scale.square()) * below + mean * scale * density - first.square()
    torch.testing.assert_close(score(model), variance.sqrt() * gained(model), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.ReLU6(), nn.Hardswish(), nn.PReLU(6), nn.Tanh(), nn.Identity()])
def test_other_activations_agree_with_samples(activation: nn.Module) -> None:
    model = chain(activation)
    z = torch.randn(40_000, 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = activation((model[1].bias + model[1].weight.abs() * z)[:, :, None])[:, :, 0]
    torch.testing.assert_close(score(model), seen.double().std(0) * gained(model), rtol=0.05, atol=1e-3)


def test_scales_that_cancel_change_nothing() -> None:
    """Before a BatchNorm the scale of a filter is lost, and its statistics take it up."""
    model = chain(nn.ReLU())
    before = score(model)
    with torch.no_grad():
        model[0].weight.mul_(7)
        model[3].weight.mul_(3)
        model[4].running_var.mul_(9).add_(8 * model[4].eps)
        model[1].weight[2] *= 2  # and twice the scale is twice the worth
        model[1].bias[2] *= 2
    expected = before * torch.tensor([1, 1, 2, 1, 1, 1])
    torch.testing.assert_close(score(model), expected, rtol=1e-6, atol=1e-9)


def test_a_unit_that_never_fires_is_worth_nothing() -> None:
    model = chain(nn.ReLU())
    with torch.no_grad():
        model[1].weight[1], model[1].bias[1] = 0.5, -20.0
    assert score(model)[1] == 0
    assert (score(model) > 0).sum() == 5


@pytest.mark.parametrize(
    "second",
    [
        nn.ConvTranspose2d(6, 5, 3),
        nn.ConvTranspose2d(6, 6, 3, groups=3),
        nn.Conv2d(6, 6, 3, groups=3),
        nn.Conv2d(6, 5, 1),
    ],
)
def test_layers_of_every_kind_pass_gains_on(second: nn.Module) -> None:
    """What all units together add behind the second BatchNorm is the energy of their responses, one by one."""
    outs = second.bias.numel()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), normalised(6), nn.Identity(), second, normalised(outs)).eval()
    gain = (model[4].weight / (model[4].running_var + model[4].eps).sqrt())[:, None, None]
    energy = 0.0
    with torch.no_grad():
        for unit in range(6):
            spike = torch.zeros(1, 6, 7, 7)
            spike[0, unit, 3, 3] = model[1].weight[unit]
            energy += float(((second(spike) - second(0 * spike)) * gain).square().sum())
    scores = CRITERIA["gaussian"]().score(network(model), Calibration())
    (score_U,) = scores.values()  # in grouped layers, those of the channels inside of a group
    torch.testing.assert_close(float(score_U.square().sum()), energy, rtol=1e-4, atol=1e-6)


def test_streams_and_gates_are_left_out() -> None:
    net = trace(zoo.build("cifar_resnet8"), torch.randn(2, 3, 32, 32))
    scores = CRITERIA["gaussian"]().score(net, Calibration())
    assert set(scores) == {"layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1"}

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.made, self.norm, self.gate = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(3, 6, 3)
            self.out = nn.Conv2d(6, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(self.norm(self.made(x)) * self.gate(x).sigmoid())
            return out

    with pytest.raises(ConfigError, match="Take 'l2'"):
        CRITERIA["gaussian"]().score(network(Gated()), Calibration())


def test_what_is_concatenated_is_followed_to_its_own_norm() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
            self.norms, self.out = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)]), nn.Conv2d(8, 2, 1)
            self.norms[1].weight.data.fill_(3)

        def forward(self, x: Tensor) -> Tensor:
            parts = [self.norms[0](self.first(x)).relu(), self.norms[1](self.second(x)).relu()]
            out: Tensor = self.out(torch.cat(parts, 1))
            return out

    model = Dense().eval()
    scores = CRITERIA["gaussian"]().score(network(model), Calibration())
    norms = model.out.weight.detach().double().flatten(1).norm(dim=0)
    spread = math.sqrt(0.5 - 1 / (2 * math.pi))  # of a rectified standard Gaussian
    torch.testing.assert_close(scores["first"], norms[:4] * spread, rtol=1e-4, atol=0)
    torch.testing.assert_close(scores["second"], norms[4:] * spread * 3, rtol=1e-4, atol=0)


def test_without_batch_norm_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="from a BatchNorm"):
        CRITERIA["gaussian"]().score(trace(zoo.build("mlp"), zoo.example_inputs("mlp")), Calibration())
