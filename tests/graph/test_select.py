"""`freeze` and `only`: what the user wants to stay stays, and a plan remembers it."""

from pathlib import Path

import pytest
import torch
from torch import nn

import metaprune as mp
from metaprune import zoo
from metaprune.errors import ConfigError
from metaprune.plans import Plan


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return zoo.build("cifar_resnet8").eval()


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def free(net: mp.Network) -> set[str]:
    return {axis.name for axis in net.axes if axis.prunable}


ALL = {"conv1", "layer1.0.conv1", "layer2.0.conv1", "layer2.0.conv2", "layer3.0.conv1", "layer3.0.conv2"}


@pytest.mark.parametrize(
    ("freeze", "stay"),
    [
        ("layer1.0.conv1", {"layer1.0.conv1", "conv1"}),  # its rows and its columns
        ("layer1.0.bn1", {"layer1.0.conv1"}),
        ("layer3*", ALL - {"layer1.0.conv1", "layer2.0.conv1"}),
        (["layer1.0.bn1", "layer2.0.bn1"], {"layer1.0.conv1", "layer2.0.conv1"}),
        (nn.Conv2d, ALL),
        ("Conv2d", ALL),
        (nn.Linear, {"conv1", "layer2.0.conv2", "layer3.0.conv2"}),
        ("layer?.0.bn1", {"layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1"}),
        ([], set()),
    ],
)
def test_frozen_modules_stay(resnet: nn.Module, image: torch.Tensor, freeze: object, stay: set[str]) -> None:
    net = mp.trace(resnet, image, freeze=freeze)  # type: ignore[arg-type]
    assert free(net) == ALL - stay
    for name in stay:
        assert net.axis(name).reason.startswith("frozen by the user (")
    if not stay or free(net):
        slim = net.apply(mp.plan(net, "params=0.9"))
        for name in stay & {"conv1"}:
            assert slim.get_submodule(name).weight.shape[0] == net.axis(name).size


@pytest.mark.parametrize(
    ("only", "free_ones"),
    [
        ("layer1.0.conv1", {"layer1.0.conv1", "conv1"}),
        ("layer2.0.bn1", {"layer2.0.conv1"}),
        (["layer2.0.bn1", "layer3.0.bn1"], {"layer2.0.conv1", "layer3.0.conv1"}),
        ("layer?", ALL),
    ],
)
def test_only_the_named_modules_are_cut(
    resnet: nn.Module, image: torch.Tensor, only: object, free_ones: set[str]
) -> None:
    net = mp.trace(resnet, image, only=only)  # type: ignore[arg-type]
    assert free(net) == free_ones
    for name in ALL - free_ones:
        assert net.axis(name).reason.startswith("frozen by the user (only ")


def test_both_together(resnet: nn.Module, image: torch.Tensor) -> None:
    assert free(mp.trace(resnet, image, only="layer*", freeze="layer1.0.bn1")) == ALL - {"layer1.0.conv1"}


class Functional(nn.Module):
    """A module without parameters decides about units that others make; one weight serves two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b, self.c = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), nn.Linear(6, 8)
        self.skip = nn.Dropout()
        self.d, self.c.weight = nn.Linear(8, 4), self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.c(self.skip(self.b(self.act(self.a(x))))))


def test_a_module_without_parameters_freezes_what_it_gets_and_gives() -> None:
    model = Functional()
    assert free(mp.trace(model, torch.randn(2, 6))) == {"a"}
    net = mp.trace(model, torch.randn(2, 6), freeze=nn.ReLU)
    assert net.axis("a").reason == "frozen by the user (torch.nn.modules.activation.ReLU)"


def test_dropout_makes_no_call_in_evaluation_and_freezes_all_the_same() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, 4))
    assert not free(mp.trace(model, torch.randn(2, 6), freeze="1"))


def test_tied_weights_are_frozen_under_either_name() -> None:
    model = Functional()
    for name in ("a", "c"):
        assert not free(mp.trace(model, torch.randn(2, 6), freeze=name))


def test_a_part_of_a_concatenation_can_stay() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], 1).relu())

    net = mp.trace(Two(), torch.randn(2, 4), freeze="a")
    assert free(net) == {"b"}
    plan = mp.plan(net, "params=0.8")
    assert net.verify(plan).max_error < 1e-5
    assert net.apply(plan).get_parameter("a.weight").shape == (6, 4)


@pytest.mark.parametrize(
    ("freeze", "said"),
    [
        ("layer1.0.convX", "Did you mean 'layer1.0.conv"),
        ("Conv2D", "Did you mean 'Conv2d'"),
        ("layre2.*", "Did you mean 'layer2"),
        (3, "patterns of module paths or classes"),
        (torch.Tensor, "patterns of module paths or classes"),
        ("", "patterns of module paths or classes"),
    ],
)
def test_what_matches_nothing_is_refused(resnet: nn.Module, image: torch.Tensor, freeze: object, said: str) -> None:
    for argument in ("freeze", "only"):
        with pytest.raises(ConfigError, match=said) as caught:
            mp.trace(resnet, image, **{argument: [freeze]})  # type: ignore[arg-type]
        assert argument in str(caught.value)


def test_a_result_is_replayed_with_them(resnet: nn.Module, image: torch.Tensor, tmp_path: Path) -> None:
    result = mp.prune(resnet, image, "macs=0.6", freeze=[nn.Linear, "layer1.0.bn1"], only="layer*")
    assert result.plan.made_by["freeze"] == ["torch.nn.modules.linear.Linear", "layer1.0.bn1"]
    assert result.plan.made_by["only"] == ["layer*"]
    slim = mp.load(result.save(tmp_path), zoo.build("cifar_resnet8"))
    with torch.no_grad():
        assert torch.equal(slim(image), result.model(image))
    assert slim.get_parameter("conv1.weight").shape == resnet.get_parameter("conv1.weight").shape


def test_a_plan_says_what_it_was_made_with(resnet: nn.Module, image: torch.Tensor, tmp_path: Path) -> None:
    plan = mp.plan(mp.trace(resnet, image, freeze="layer1.*"), "macs=0.7")
    plan = Plan.load(plan.save(tmp_path / "plan.json"))
    with pytest.raises(ConfigError, match=r"freeze=\['layer1\.\*'\]"):
        mp.trace(resnet, image).apply(plan)
    assert mp.trace(resnet, image, freeze=plan.made_by["freeze"]).apply(plan) is not None
