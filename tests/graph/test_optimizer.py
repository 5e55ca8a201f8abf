"""Training goes on after a cut: a step of the cut network is a step of the masked one."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from metaprune.edits import Keep
from metaprune.errors import ConfigError, UnsupportedModelError
from metaprune.graph import trace
from metaprune.graph.surgery import entries_left
from metaprune.plans import Plan

X, Y = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 5
PLAN = Plan((Keep("0", 8, (0, 2, 3, 7)), Keep("2", 12, (1, 4, 5, 6, 9))))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 4, 5)
    )


def train(model: nn.Module, optimizer: Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()


def groups(model: nn.Module) -> list[dict[str, object]]:
    first, second, last = model[0], model[2], model[5]
    return [
        {"params": [*first.parameters()], "lr": 0.02},
        {"params": [second.bias, *last.parameters(), second.weight], "lr": 0.005},
    ]


OPTIMIZERS = {
    "sgd": lambda model: SGD(model.parameters(), lr=0.05),
    "momentum": lambda model: SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda model: Adam(model.parameters(), lr=0.01),
    "amsgrad": lambda model: Adam(model.parameters(), lr=0.01, amsgrad=True, foreach=False),
    "adamw": lambda model: AdamW(model.parameters(), lr=0.01, weight_decay=0.1, foreach=True),
    "fused": lambda model: AdamW(model.parameters(), lr=0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.001, momentum=0.5, centered=True),
    "groups": lambda model: AdamW(groups(model), weight_decay=0.1),
}


def masked(model: nn.Module, optimizer: Optimizer, net) -> tuple[nn.Module, Optimizer]:
    """The dense network and its optimizer, with zeros where units leave."""
    model, optimizer = copy.deepcopy((model, optimizer))
    alive = net._alive(PLAN.draft())
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        for tensor in (parameter.data, *(item for item in state.values() if item.shape == parameter.shape)):
            for k, dim in enumerate(net._layout.trace.parameters[name].dims):
                kept = net._layout.kept(dim, alive)
                if kept is not None:
                    tensor.index_fill_(k, torch.from_numpy((~kept).nonzero()[0]), 0)
    return model, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_of_the_cut_network_is_one_of_the_masked(name):
    model = network()
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    net = trace(model, X)
    slim = net.apply(PLAN)
    other = net.apply_optimizer(PLAN, slim, optimizer)
    reference, its_optimizer = masked(model, optimizer, net)
    train(slim, other)
    train(reference, its_optimizer)
    alive, wanted = net._alive(PLAN.draft()), dict(reference.named_parameters())
    assert type(other) is type(optimizer)
    for key, parameter in slim.named_parameters():
        left = entries_left(net._layout, alive, net._layout.trace.parameters[key], wanted[key].detach())
        torch.testing.assert_close(parameter.detach(), left, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)


def test_without_its_state_the_step_is_another():
    """The comparison above can fail."""
    model = network()
    optimizer = OPTIMIZERS["adam"](model)
    train(model, optimizer)
    slim = trace(model, X).apply(PLAN)
    kept, fresh = copy.deepcopy(slim), copy.deepcopy(slim)
    train(kept, trace(model, X).apply_optimizer(PLAN, kept, optimizer), 1)
    train(fresh, OPTIMIZERS["adam"](fresh), 1)
    assert (kept[0].weight - fresh[0].weight).abs().max() > 1e-4


def test_groups_options_flags_and_counters_stay():
    model = network()
    optimizer = AdamW(groups(model), weight_decay=0.1, fused=True)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    train(model, optimizer)
    net = trace(model, X)
    slim = net.apply(PLAN)
    other = net.apply_optimizer(PLAN, slim, optimizer)
    for old, new in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert {key: item for key, item in old.items() if key != "params"} == {
            key: item for key, item in new.items() if key != "params"
        }
    assert [group["initial_lr"] for group in other.param_groups] == [0.02, 0.005]
    assert other.param_groups[1]["params"][0] is slim[2].bias
    assert other.state[slim[0].weight]["step"] == 3
    assert other.defaults == optimizer.defaults
    assert vars(other)["_step_supports_amp_scaling"]
    torch.optim.lr_scheduler.StepLR(other, 1, last_epoch=0).step()
    other.load_state_dict(other.state_dict())


def test_frozen_parameters_stay_frozen_and_unstepped():
    model = network()
    model[0].requires_grad_(False)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    net = trace(model, X)
    slim = net.apply(PLAN)
    other = net.apply_optimizer(PLAN, slim, optimizer)
    before = slim[0].weight.clone()
    train(slim, other)
    assert not slim[0].weight.requires_grad
    assert torch.equal(slim[0].weight, before)
    assert slim[0].weight not in other.state
    assert "momentum_buffer" in other.state[slim[2].weight]


def test_what_cannot_be_sliced_is_named():
    model = network()
    optimizer = torch.optim.Adafactor(model.parameters())
    train(model, optimizer)
    net = trace(model, X)
    with pytest.raises(UnsupportedModelError, match=r"'row_var' of '0\.weight' is a tensor of shape \(8, 3, 3, 1\)"):
        net.apply_optimizer(PLAN, net.apply(PLAN), optimizer)
    whole = net.apply_optimizer(Plan(()), copy.deepcopy(model), optimizer)
    assert torch.equal(whole.state_dict()["state"][0]["row_var"], optimizer.state_dict()["state"][0]["row_var"])
    memory = torch.optim.LBFGS(model.parameters())
    memory.step(lambda: nn.functional.cross_entropy(model(X), Y))
    with pytest.raises(UnsupportedModelError, match=r"of '0\.weight' is a"):
        net.apply_optimizer(PLAN, net.apply(PLAN), memory)


def test_another_network_is_refused():
    model = network()
    net = trace(model, X)
    with pytest.raises(ConfigError, match="parameter 0 of its group 0"):
        net.apply_optimizer(PLAN, net.apply(PLAN), SGD(network().parameters()))
    with pytest.raises(ConfigError, match=r"'0\.weight' must be a parameter of shape \(4, 3, 3, 3\)"):
        net.apply_optimizer(PLAN, model, SGD(model.parameters()))


def test_tied_weights_have_one_state():
    torch.manual_seed(0)
    inside, head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
    head.weight = inside.weight
    model = nn.Sequential(inside, nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6), head)
    tokens = torch.arange(8).view(2, 4)
    optimizer = Adam(model.parameters())
    model(tokens).square().sum().backward()
    optimizer.step()
    net = trace(model, tokens)
    width = next(axis.name for axis in net.axes if axis.size == 6)
    plan = Plan((Keep("1", 9, (0, 4, 8)), Keep(width, 6, (1, 2, 5))))
    slim = net.apply(plan)
    other = net.apply_optimizer(plan, slim, optimizer)
    assert slim[4].weight is slim[0].weight
    assert other.state[slim[0].weight]["exp_avg"].shape == (11, 3)
    assert len(other.state) == len(list(slim.parameters()))
