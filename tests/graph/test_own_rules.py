"""Rules that users register for their own ops: followed where they are right, found out where they are wrong."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaprune as mp
from metaprune.errors import ConfigError, RuleError, UnsupportedModelError
from metaprune.graph import Call, Dim
from metaprune.graph.rules import OWN_RULES

OP, PAIR, MIX = "mptest::gain", "mptest::halves", "mptest::mix"


@torch.library.custom_op(OP, mutates_args=())
def gain(x: Tensor, weight: Tensor) -> Tensor:
    return torch.tanh(x) * weight[:, None, None]


@gain.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op(PAIR, mutates_args=())
def halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    return x[:, :size].clone(), x[:, size:].clone()


@halves.register_fake
def _(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    return x[:, :size].clone(), x[:, size:].clone()


@torch.library.custom_op(MIX, mutates_args=())
def mix(x: Tensor) -> Tensor:
    return x.flip(1).cumsum(1)


@mix.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Net(nn.Module):
    def __init__(self, op: Callable[..., Tensor] = gain) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.weight, self.conv2 = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(8)), nn.Conv2d(8, 4, 1)
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x)
        return self.conv2(self.op(h, self.weight) if self.op is gain else self.op(h))


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.size = 5
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(5, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = halves(self.a(x), self.size)
        return self.b(left) + self.c(right)


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    for name in (OP, PAIR, MIX):
        OWN_RULES.pop(name, None)


def right(call: Call) -> Any:
    batch, channels, height, width = call.dims(call["x"])
    return batch, call.unify(channels, *call.dims(call["weight"])), height, width


def test_without_a_rule_what_the_op_touches_stays_with_the_reason() -> None:
    net = mp.trace(Net(), IMAGE)
    assert net.axis("conv1").reason == f"op {OP} at the top level has no rule"
    assert "rules" not in net.traced_with


def test_with_a_rule_it_is_cut_exactly(tmp_path: Path) -> None:
    assert mp.register_rule(OP)(right) is right
    net = mp.trace(Net(), IMAGE)
    axis = net.axis("conv1")
    assert axis.prunable
    assert ("weight", 0) in axis.bindings
    result = mp.prune(Net(), IMAGE, "macs=0.5")
    assert result.verification.max_error < 1e-6
    assert result.plan.made_by["rules"] == [f"{OP} at the top level"]
    slim = mp.load(result.save(tmp_path), Net())
    with torch.no_grad():
        assert torch.equal(slim(IMAGE), result.model(IMAGE))
    OWN_RULES.clear()
    with pytest.raises(ConfigError, match="import the rules that it was traced with"):
        mp.load(tmp_path, Net())


def test_an_op_with_a_size_and_two_results() -> None:
    @mp.register_rule(PAIR)
    def rule(call: Call) -> list[tuple[Dim, ...]]:
        batch, units = call.dims(call["x"])
        left, rest = call.output_parts(units, call["size"])  # type: ignore[attr-defined]
        return [(batch, left), (batch, rest)]

    with pytest.raises(RuleError, match="output_parts"):
        mp.trace(Halves(), torch.randn(2, 4))
    OWN_RULES.clear()

    @mp.register_rule(PAIR)
    def better(call: Call) -> list[tuple[Dim, ...]]:
        batch, units = call.dims(call["x"])
        positions, size = torch.arange(units.size).numpy(), call["size"]
        left = call.units.take(units, positions[:size], call.where)
        rest = call.units.take(units, positions[size:], call.where)
        call.counts("size", left)
        return [(batch, left), (batch, rest)]

    net = mp.trace(Halves(), torch.randn(2, 4))
    assert [(axis.name, axis.size) for axis in net.axes if axis.prunable] == [("a", 5), ("a#2", 3)]
    plan = mp.plan(net, "params=0.7")
    slim = net.apply(plan)
    assert slim.size == slim.get_parameter("b.weight").shape[1]
    assert net.verify(plan).max_error < 1e-6


WRONG_SIZE: dict[str, Callable[[Call], Any]] = {
    "too few dimensions": lambda call: call.dims(call["x"])[:3],
    "another order": lambda call: call.dims(call["x"])[::-1],
    "nothing": lambda call: None,
    "an argument that is not there": lambda call: call.dims(call["y"]),
    "an error of its own": lambda call: 1 // 0,
}


@pytest.mark.parametrize("case", WRONG_SIZE)
def test_a_rule_that_fails_is_an_error_that_names_rule_and_op(case: str) -> None:
    mp.register_rule(OP)(WRONG_SIZE[case])
    with pytest.raises(RuleError, match=rf"tests.*lambda.*{OP} at the top level") as caught:
        mp.trace(Net(), IMAGE)
    assert caught.value.exit_code == 3


LIES: dict[str, Callable[[Call], Any]] = {
    "units keep their places": lambda call: call.dims(call["x"]),
    "nothing is mixed": lambda call: tuple(Dim(dim.size) for dim in call.dims(call["x"])),
}


@pytest.mark.parametrize("case", LIES)
def test_a_rule_that_lies_never_gives_a_wrong_network(case: str) -> None:
    mp.register_rule(MIX)(LIES[case])
    net = mp.trace(Net(mix), IMAGE)
    plan = mp.Plan((mp.plan(net, "params=0.6").edits if case == "units keep their places" else ()), net.fingerprint)
    if not plan.edits:
        from metaprune.edits import Keep

        plan = mp.Plan((Keep("conv1", 8, (0, 1, 2, 5)),), net.fingerprint)
    with pytest.raises(UnsupportedModelError):
        net.apply(plan)
    with pytest.raises(UnsupportedModelError):
        mp.prune(Net(mix), IMAGE, "params=0.6")


def test_a_rule_cannot_be_checked_on_meta_tensors() -> None:
    mp.register_rule(OP)(right)
    net = mp.trace(Net().to("meta"), IMAGE.to("meta"))
    with pytest.raises(UnsupportedModelError, match="compared with the masked one by numbers"):
        net.cut(mp.plan(net, "params=0.6", criterion="random"))


def test_an_op_without_a_fake_is_traced_on_real_tensors() -> None:
    @torch.library.custom_op("mptest::real", mutates_args=())
    def real(x: Tensor) -> Tensor:
        return x * 2

    mp.register_rule("mptest::real")(lambda call: call.dims(call["x"]))
    net = mp.trace(Net(real), IMAGE)
    assert net.axis("conv1").prunable
    assert net.verify(mp.plan(net, "macs=0.5")).max_error < 1e-6


@pytest.mark.parametrize("name", ["gain", "mptest:gain", "mptest::gain.default", "::gain", ""])
def test_a_name_must_be_that_of_an_op(name: str) -> None:
    with pytest.raises(ConfigError, match="namespace::name"):
        mp.register_rule(name)


def test_one_op_has_one_rule() -> None:
    mp.register_rule(OP)(right)
    mp.register_rule(OP)(right)  # its module was imported again
    with pytest.raises(ConfigError, match="has a rule already"):
        mp.register_rule(OP)(lambda call: call.dims(call["x"]))
    with pytest.raises(ConfigError, match="has a rule already"):
        mp.register_rule("aten::cat")(right)
