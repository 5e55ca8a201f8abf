"""What every recovery promises, for every registered name."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metaprune import zoo
from metaprune.errors import ConfigError, InputError
from metaprune.recovery import RECOVERIES, Context, Recovery
from metaprune.task import Task

NAMES = list(RECOVERIES)


class Tokens:
    """Training data of another kind than images: windows of token ids and the ids that come next."""

    name = "tokens"

    def __len__(self) -> int:
        return 24

    def batches(self, batch_size: int, *, start: int = 0, **_: Any) -> Any:
        ids = torch.randint(32, (24, 9), generator=torch.Generator().manual_seed(0))
        for part in ids.split(batch_size)[start:]:
            yield part[:, :-1], part[:, 1:]


class NextToken(Task):
    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs.flatten(0, 1), batch[1].flatten())


class Watcher:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.total = self.done = 0

    def start(self, total: int, unit: str, description: str, done: int = 0) -> None:
        assert unit
        assert description
        assert not self.calls or self.calls[-1] == "close"
        self.calls.append("start")
        self.total, self.done = total, done

    def advance(self, amount: int = 1, status: str = "") -> None:
        self.done += amount

    def close(self) -> None:
        assert self.calls[-1] == "start"
        self.calls.append("close")


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.fixture(params=NAMES)
def recovery(request: pytest.FixtureRequest) -> Recovery:
    return RECOVERIES[request.param]()


def test_the_given_networks_stay_as_they_were(recovery: Recovery, damaged: nn.Module, context: Context) -> None:
    assert context.dense is not None
    damaged.block1.train()
    context.dense.bn1.train()  # a teacher's owner may be careless
    flags = [[module.training for module in model.modules()] for model in (damaged, context.dense)]
    before, dense = state(damaged), state(context.dense)
    try:
        recovered = recovery.recover(damaged, context)
        assert [[module.training for module in model.modules()] for model in (damaged, context.dense)] == flags
        assert [module.training for module in recovered.model.modules()] == flags[0]
    finally:
        context.dense.eval()
    assert_same(before, state(damaged))
    assert_same(dense, state(context.dense))
    assert all(parameter.grad is None for parameter in (*damaged.parameters(), *context.dense.parameters()))
    assert recovered.model is not damaged
    assert not {id(p) for p in recovered.model.parameters()} & {id(p) for p in damaged.parameters()}


def test_the_result_has_the_same_form(recovery: Recovery, damaged: nn.Module, context: Context) -> None:
    damaged.conv1.weight.requires_grad_(False)
    recovered = recovery.recover(damaged, context)
    after = state(recovered.model)
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {
        name: (t.shape, t.dtype) for name, t in state(damaged).items()
    }
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert all(parameter.is_contiguous() for parameter in recovered.model.parameters())
    assert [p.requires_grad for p in recovered.model.parameters()] == [p.requires_grad for p in damaged.parameters()]
    assert torch.equal(recovered.model.conv1.weight, damaged.conv1.weight)
    assert recovered.seconds > 0
    assert not any(hooks for m in recovered.model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks))


def test_the_same_twice(recovery: Recovery, damaged: nn.Module, context: Context) -> None:
    torch.manual_seed(5)
    generator = torch.get_rng_state()
    first = recovery.recover(damaged, context)
    assert torch.equal(torch.get_rng_state(), generator)
    torch.manual_seed(6)
    second = recovery.recover(damaged, context)
    assert_same(state(first.model), state(second.model))
    assert first.notes == second.notes


def test_progress_reaches_its_total(recovery: Recovery, damaged: nn.Module, context: Context) -> None:
    watcher = Watcher()
    recovery.recover(damaged, replace(context, progress=watcher))
    assert watcher.done == watcher.total > 0
    assert watcher.calls[-1] == "close"


def test_missing_data_are_refused_before_any_work(recovery: Recovery, damaged: nn.Module) -> None:
    needed = recovery.needs(damaged)
    assert needed
    with pytest.raises(ConfigError, match=rf"recovery '{recovery.name}' needs .*--data"):
        recovery.recover(damaged, Context())


def test_calibration_data_of_another_shape_are_refused_by_rule(
    recovery: Recovery, damaged: nn.Module, context: Context
) -> None:
    if "calibration" not in recovery.needs(damaged):
        pytest.skip("needs no calibration data")
    wrong = replace(context, calibration=lambda: iter([(torch.randn(8, 5, 8, 8), torch.arange(8))]))
    with pytest.raises(InputError, match="must run on the calibration data"):
        recovery.recover(damaged, wrong)


def test_another_kind_of_data(recovery: Recovery) -> None:
    model = zoo.build("llama_tiny")
    tokens = Tokens()
    context = Context(train=tokens, calibration=lambda: tokens.batches(8), task=NextToken(), dense=copy.deepcopy(model))
    recovered = recovery.recover(model, context)
    assert recovered.model.state_dict().keys() == model.state_dict().keys()


def test_registry_name(recovery: Recovery) -> None:
    assert RECOVERIES[recovery.name] is type(recovery)
    assert copy.copy(recovery) == recovery
