"""Code that cannot be followed: what it touches stays and says so, and no way through it gives a wrong network."""

import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import metaprune as mp
from metaprune.edits import Keep
from metaprune.errors import MetapruneError, UnsupportedModelError

IMAGE = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))


class Inner(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy()[:, ::-1].copy())


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * x


def network(function: Callable[[Tensor], Tensor], width: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 1), Inner(function), nn.Conv2d(width, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1)
    ).eval()


LEAVING: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "numpy": (lambda x: torch.from_numpy(np.tanh(x.detach().numpy())), "Tensor.numpy"),
    "an array": (lambda x: torch.from_numpy(np.asarray(x.detach())[:, ::-1].copy()), "Tensor.array"),
    "a list": (lambda x: torch.tensor(x.tolist()).flip(1), "Tensor.tolist"),
    "a function of autograd": (Reversed.apply, "Tensor.numpy"),
    "part of it": (lambda x: x * float(np.abs(x[:, :2].detach().numpy()).max()), "Tensor.numpy"),
}


@pytest.mark.parametrize("case", LEAVING)
def test_what_leaves_torch_stays_and_names_module_and_call(case: str) -> None:
    function, call = LEAVING[case]
    net = mp.trace(network(function), IMAGE)
    stuck = next(axis for axis in net.axes if ("0.weight", 0) in axis.bindings and not axis.prunable)
    assert stuck.reason == f"its numbers leave torch by {call} at 1"
    plan = mp.plan(net, "params=0.9")
    assert net.verify(plan).max_error < 1e-6
    assert net.axis("2").prunable  # behind it, all is as usual


def test_a_sum_that_leaves_torch_does_not_hide_what_it_was_made_of() -> None:
    net = mp.trace(network(lambda x: torch.from_numpy(x.detach().numpy().max(1, keepdims=True).copy()), 1), IMAGE)
    assert not net.axis("0").prunable
    with pytest.raises(MetapruneError, match="leave torch"):
        net.apply(mp.Plan((Keep("0", 6, (0, 1, 2)),), net.fingerprint))


def test_a_function_of_autograd_in_torch_is_followed() -> None:
    net = mp.trace(network(Squared.apply), IMAGE)
    assert net.axis("0").prunable
    assert net.verify(mp.plan(net, "macs=0.5")).max_error < 1e-6


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_scripted_module_is_frozen_and_named() -> None:
    torch.manual_seed(0)
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU()))
    model = nn.Sequential(nn.Conv2d(3, 6, 1), scripted, nn.Conv2d(6, 5, 1), nn.ReLU(), nn.Conv2d(5, 4, 1))
    net = mp.trace(model, IMAGE)
    assert {axis.reason for axis in net.axes if "1.0.weight" in dict(axis.bindings)} == {"inside the scripted module 1"}
    assert net.verify(mp.plan(net, "params=0.9")).max_error < 1e-6


@pytest.mark.parametrize(
    "read",
    [lambda x: x.mean().item() > 0, lambda x: bool(x.mean() > 0), lambda x: float(x.mean()) > 0],
    ids=["item", "bool", "float"],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_both_ways_of_a_decision_couple(read: Callable[[Tensor], bool], sign: int) -> None:
    """One way turns the channels round: whichever the example takes, units leave in pairs that suit both."""
    net = mp.trace(network(lambda x: x.flip(1) if read(sign * x) else x), IMAGE)
    axis = net.axis("0")
    plan = mp.plan(net, "params=0.7")
    slim = net.apply(plan)
    kept = plan.draft().keep.get("0", range(axis.size))
    assert len(kept) < axis.size or axis.size < 6
    for seed in range(6):
        other = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
        assert net.verify(plan, other, slim=slim).max_error < 1e-6


def test_a_way_that_no_run_took_is_refused_where_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["metaprune.graph.trace"], "FURTHER_INPUTS", 0)
    monkeypatch.setattr(sys.modules["metaprune.graph.network"], "random_like", lambda inputs, seed: -inputs)
    model = network(lambda x: x.flip(1) if x.mean().item() > 0 else x)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(weight.abs() if "weight" in name else torch.zeros_like(weight))
    net = mp.trace(model, -IMAGE.abs())
    with pytest.raises(UnsupportedModelError, match="may take another way"):
        net.apply(mp.Plan((Keep("0", 6, (0, 1, 2)),), net.fingerprint))


def test_an_expensive_network_is_run_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def decide(x: Tensor) -> Tensor:
        calls.append(1)
        return x.flip(1) if x.mean().item() > 0 else x

    def count(make: Callable[[], object]) -> int:
        calls.clear()
        make()
        return len(calls)

    model = network(decide)
    cheap = count(lambda: mp.trace(model, IMAGE))
    monkeypatch.setattr(sys.modules["metaprune.graph.trace"], "FURTHER_MACS", 1)
    assert count(lambda: mp.trace(model, IMAGE)) == cheap - 5
    net = mp.trace(model, IMAGE)
    plan = mp.plan(net, "params=0.7")
    assert count(lambda: net.cut(plan)) == 4  # the masked and the cut one, on the example and on another input


class HeldByALambda(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)
        self.way = lambda x: self.out(self.a(x).relu())

    def forward(self, x: Tensor) -> Tensor:
        return self.way(x)


def test_layers_that_a_lambda_holds_stay_and_say_so() -> None:
    """It goes on using the layers of the given model, whatever is made of a copy."""
    net = mp.trace(HeldByALambda(), IMAGE)
    assert not any(axis.prunable for axis in net.axes)
    assert "a lambda" in net.axis("a").reason


def test_a_network_without_parameters_says_so() -> None:
    with pytest.raises(MetapruneError, match="it has no parameters"):
        mp.plan(mp.trace(nn.ReLU(), IMAGE), budget="macs=0.5")
