"""Forwards that are run once up to some call and then many times: the same results, fewer calls."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from metaprune import zoo
from metaprune.graph import Network, trace
from metaprune.graph.prefix import Prefix
from metaprune.graph.record import Op, tensors_in
from metaprune.graph.twin import named_tensors


class InPlace(nn.Module):
    """What a layer before gave is written into by the layers behind it, through a view, too."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        half = x[:, :3]
        x.relu_()
        x += self.two(x)
        half.mul_(2)
        return self.three(x) + half.sum(1, keepdim=True)


class Looks(nn.Module):
    """Its code wants to know a number that no call reads."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.seen: list[list[float]] = []

    def forward(self, x: Tensor) -> Tensor:
        first = self.one(x)
        between = first.mean()
        out: Tensor = self.two(first)
        self.seen.append(between.tolist())
        return out


class Count(TorchDispatchMode):
    """Counts the calls that are made, but for new names of what there is."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made += func is not torch.ops.aten.detach.default
        return func(*args, **(kwargs or {}))


def with_weights(net: Network) -> dict[str, Op]:
    """The first call that reads each parameter."""
    values = net.layout.trace.parameters
    return {
        name: next(op for op in net.layout.trace.ops if values[name].index in op.inputs)
        for name, _ in net.model.named_parameters()
        if any(values[name].index in op.inputs for op in net.layout.trace.ops)
    }


def runs(inputs: list[Any]) -> list[Any]:
    return [partial(lambda given, model: model(*given), given) for given in inputs]


def batches(net: Network, count: int = 2) -> list[Any]:
    """The example, and shuffled rows of it."""
    example = net.example_inputs
    given = example if isinstance(example, (tuple, list)) else (example,)
    return [tuple(item.roll(k, 0) for item in given) for k in range(count)]


@pytest.mark.parametrize("name", ["digits_cnn", "cifar_mobilenet_v2", "vit_tiny", "llama_tiny"])
@torch.no_grad()
def test_results_are_those_of_whole_runs(name: str) -> None:
    model = zoo.build(name).eval()
    check(trace(model, zoo.example_inputs(name)), every=6)


@torch.no_grad()
def test_what_is_written_into_is_put_back() -> None:
    check(trace(InPlace().eval(), torch.randn(5, 6)), every=1)


def check(net: Network, every: int) -> None:
    given = batches(net)
    forwards, ran = runs(given), []
    counted = [lambda model, run=run: ran.append(1) or run(model) for run in forwards]
    prefix = Prefix(counted, net.layout.trace)
    for name, op in sorted(with_weights(net).items(), key=lambda item: item[1].index)[::every]:
        prefix.go_to(op, net.model)
        ran.clear()
        for scale in (1.5, 1.0):
            other = copy.deepcopy(net.model)
            named_tensors(other)[name].mul_(scale)
            for seen, one in zip(prefix.results(other), given, strict=True):
                for here, there in zip(tensors_in(seen), tensors_in(other(*one)), strict=True):
                    assert torch.equal(here, there), name
        assert len(ran) == 2 * len(given), f"{name}: the network was run whole"


@torch.no_grad()
def test_what_was_computed_is_not_computed_again() -> None:
    net = trace(zoo.build("cifar_resnet20").eval(), zoo.example_inputs("cifar_resnet20"))
    last = max(with_weights(net).values(), key=lambda op: op.index)
    prefix = Prefix(runs(batches(net, 1)), net.layout.trace)
    with Count() as whole:
        prefix.results(net.model)
    prefix.go_to(last, net.model)
    with Count() as rest:
        prefix.results(net.model)
    assert rest.made <= 3 < whole.made
    kept = [tensor for out in prefix._given[0].values() for tensor in tensors_in(out) if not tensor.is_meta]
    assert sum(tensor.numel() for tensor in kept) <= 64 * len(net.example_inputs) * 8 * 8 * 2  # near the end alone


@torch.no_grad()
def test_code_that_looks_at_numbers_runs_whole() -> None:
    model, x = Looks().eval(), torch.randn(4, 6)
    known = trace(model, x)
    prefix = Prefix(runs([(x,)]), known.layout.trace)
    prefix.go_to(with_weights(known)["two.weight"], model)
    assert torch.equal(prefix.results(model)[0], model(x))
    assert model.seen[-1] == model.seen[-2]


@torch.no_grad()
def test_a_fault_of_the_code_is_raised() -> None:
    net = trace(InPlace().eval(), torch.randn(5, 6))
    prefix = Prefix(runs([(torch.randn(5, 6),)]), net.layout.trace)
    prefix.go_to(with_weights(net)["three.weight"], net.model)
    broken = copy.deepcopy(net.model)
    broken.three = nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match="shapes"):
        prefix.results(broken)
