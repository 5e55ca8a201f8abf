"""Reconstruction against what least squares promise."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaprune import data, zoo
from metaprune.edits import DropBlock, Keep, Mask, n_of_m
from metaprune.errors import ConfigError, InputError, UnsupportedModelError
from metaprune.graph import Network, trace
from metaprune.graph.stepping import Pending
from metaprune.plans import Plan
from metaprune.recovery import Context, Reconstruct
from metaprune.recovery._least_squares import on_support
from metaprune.recovery._recurrent import Cell, _Gates
from metaprune.sparsity import sparsify


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """With norms that are not those of a fresh network."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 2, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


def batches(shape: tuple[int, ...], count: int = 4, size: int = 32, seed: int = 1) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, *shape, generator=generator),) for _ in range(count)]


def context(network: Network, plan: Plan, data: list[Any]) -> Context:
    def calibration() -> Iterator[Any]:
        return iter(data)

    return Context(calibration=calibration, dense=network.model, network=network, plan=plan)


def halved(network: Network, share: float = 0.5) -> Plan:
    """Keep the first units of every axis that may be cut."""
    axes = [axis for axis in network.axes if axis.prunable]
    return Plan(tuple(Keep(a.name, a.size, tuple(range(max(1, int(share * a.size))))) for a in axes))


def error(first: nn.Module, second: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        wanted = first(x)
        return float((second(x) - wanted).square().mean() / wanted.var())


def test_a_network_that_lacks_nothing_stays_as_it_is() -> None:
    model = randomised(zoo.build("cifar_resnet8"))
    network = trace(model, torch.zeros(2, 3, 32, 32))
    healed = Reconstruct(samples=32).recover(model, context(network, Plan(()), batches((3, 32, 32), 2, 16))).model
    for name, tensor in model.state_dict().items():
        assert torch.equal(healed.state_dict()[name], tensor), name


def test_a_unit_that_is_there_twice_costs_nothing() -> None:
    """Without one of two equal channels, what reads them gets the sum of their weights."""
    model = randomised(zoo.build("digits_cnn"))
    for name in ("conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"):
        model.state_dict()[f"block1.{name}"][3] = model.state_dict()[f"block1.{name}"][5]
    network = trace(model, zoo.example_inputs("digits_cnn"))
    plan = Plan((Keep("block1.conv1", 16, tuple(k for k in range(16) if k != 5)),))
    slim, data = network.apply(plan).eval(), batches((1, 8, 8))
    healed = Reconstruct(ridge=1e-9).recover(slim, context(network, plan, data)).model
    assert error(model, slim, data[0][0]) > 1e-3
    assert error(model, healed, data[0][0]) < 1e-8


def test_a_linear_network_recovers_exactly() -> None:
    """As many hidden units as there are inputs hold all that is to be known."""
    model = nn.Sequential(nn.Linear(4, 12), nn.Linear(12, 9), nn.Linear(9, 3)).double().eval()
    network = trace(model, torch.zeros(2, 4).double())
    plan = halved(network)
    slim, data = network.apply(plan), [(x.double(),) for (x,) in batches((4,))]
    healed = Reconstruct(ridge=1e-12).recover(slim, context(network, plan, data)).model
    assert error(model, slim, data[0][0]) > 0.05
    assert error(model, healed, torch.randn(64, 4).double()) < 1e-12


class Net(nn.Module):
    """A residual branch whose shortcut loses units too: only the sum can be right."""

    def __init__(self, after: bool) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = nn.Linear(6, 16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.head, self.after = nn.Linear(16, 5), after

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        branch = self.outer(F.relu(self.inner(x)))
        x = branch + x * 1.5 if self.after else x * 1.5 + branch  # before or after the branch
        return self.head(x)


@pytest.mark.parametrize("after", [True, False])
def test_the_branch_makes_up_for_what_the_stream_lacks(after: bool) -> None:
    torch.manual_seed(0)
    model = Net(after).eval()
    network = trace(model, torch.zeros(2, 6))
    plan = halved(network, 0.75)
    slim, data = network.apply(plan), batches((6,), 8)
    damaged = copy.deepcopy(slim)
    with torch.no_grad():
        damaged.stem.weight += 0.1 * torch.randn_like(damaged.stem.weight)
        damaged.stem.weight.requires_grad_(False)  # stays damaged, and so does the shortcut
        damaged.stem.bias.requires_grad_(False)
    healed = Reconstruct().recover(damaged, context(network, plan, data)).model
    kept = list(plan.draft().keep["stem"])
    with torch.no_grad():
        sums = []
        for net, columns in ((model, kept), (damaged, slice(None)), (healed, slice(None))):
            x = F.relu(net.stem(data[0][0]))
            sums.append((net.outer(F.relu(net.inner(x))) + x * 1.5)[:, columns])
    before, now = (float((one - sums[0]).square().mean()) for one in sums[1:])
    assert now < 0.35 * before


NETWORKS = (
    "cifar_resnet8",
    "cifar_resnet8_projection",
    "cifar_mobilenet_v2",
    "cifar_shufflenet_v2",
    "cifar_resnext29",
    "cifar_vgg11",
    "vit_tiny",
    "lstm_classifier",
    "gru_classifier",
)


@pytest.mark.parametrize("name", NETWORKS)
def test_any_network_comes_nearer_to_the_dense_one(name: str) -> None:
    """On samples that the fit has not seen."""
    torch.manual_seed(0)
    example = zoo.example_inputs(name)
    model = randomised(zoo.build(name))
    network = trace(model, example)
    plan = halved(network, 0.75)
    slim = network.apply(plan).eval()
    data = batches(tuple(example.shape[1:]), 4, 16)
    healed = Reconstruct(samples=64).recover(slim, context(network, plan, data)).model
    x = batches(tuple(example.shape[1:]), 1, 32, seed=9)[0][0]
    assert error(model, healed, x) < 0.6 * error(model, slim, x)


class Sequences(nn.Module):
    """A linear layer, a recurrent one with first states of its own, and a linear layer on all of its states."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 6)
        self.rnn = kind(6, 8, **options)
        self.outer = nn.Linear(8 * (2 if self.rnn.bidirectional else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.rnn(self.inner(x))[0])


RECURRENT = {
    "lstm": (nn.LSTM, {"batch_first": True}),
    "lstm of two layers in both directions": (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    "lstm without biases": (nn.LSTM, {"bias": False}),
    "gru": (nn.GRU, {"num_layers": 2, "batch_first": True}),
    "gru in both directions": (nn.GRU, {"bidirectional": True}),
    "rnn": (nn.RNN, {"num_layers": 2}),
    "rnn of relu": (nn.RNN, {"nonlinearity": "relu", "bidirectional": True}),
}


@pytest.mark.parametrize("name", list(RECURRENT))
def test_states_that_are_there_twice_cost_nothing(name: str) -> None:
    """Inputs and hidden units of recurrent layers, of which each has a twin that leaves."""
    torch.manual_seed(0)
    kind, options = RECURRENT[name]
    model = Sequences(kind, **options).double().eval()
    with torch.no_grad():
        model.inner.weight[3:], model.inner.bias[3:] = model.inner.weight[:3], model.inner.bias[:3]
        for key, tensor in model.rnn.named_parameters():
            gates = tensor.view(-1, 8, *tensor.shape[1:])
            gates[:, 4:] = gates[:, :4]  # the rows of the twins read the same
            assert key.startswith(("weight", "bias"))
    x = torch.randn(7, 9, 5, dtype=torch.double)
    network = trace(model, x[:, :2] if not options.get("batch_first") else x[:2])
    plan = halved(network)
    assert {edit.size for edit in plan.edits if isinstance(edit, Keep)} == {6, 8}
    slim = network.apply(plan).eval()
    data = [(torch.randn(7, 9, 5, dtype=torch.double, generator=torch.Generator().manual_seed(k)),) for k in range(3)]
    healed = Reconstruct(ridge=1e-9).recover(slim, context(network, plan, data)).model
    assert error(model, slim, x) > 1e-2
    assert error(model, healed, x) < 1e-9
    weights = Reconstruct(only_bias=True).recover(slim, context(network, plan, data)).model.rnn.named_parameters()
    changed = {key for key, tensor in weights if not torch.equal(tensor, slim.rnn.get_parameter(key))}
    assert all(key.startswith("bias") for key in changed)
    assert bool(changed) == bool(model.rnn.bias)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("direction", [0, 1])
def test_gates_are_made_from_the_states_before_each_step(batch_first: bool, direction: int) -> None:
    """What inputs and states add up to is, behind the activation, what the layer gives."""
    torch.manual_seed(0)
    rnn = nn.RNN(3, 4, bidirectional=True, batch_first=batch_first)
    x, first = torch.randn(5, 6, 3), torch.randn(2, 5 if batch_first else 6, 4)
    arguments = {"input": x, "hx": first, "params": rnn._flat_weights, "has_biases": True, "num_layers": 1}
    arguments |= {"dropout": 0.0, "train": False, "bidirectional": True, "batch_first": batch_first}
    call = Pending(None, torch.ops.aten.rnn_tanh.input, arguments)
    every = torch.arange(4)
    with torch.no_grad():
        out = rnn(x, first)[0]
        cell = Cell((rnn.weight_ih_l0, rnn.weight_hh_l0), None, False, every, every)
        gates = _Gates.of(call, 0, direction, cell, (x, x), out, 1000, torch.Generator())
    given = out[..., 4 * direction : 4 * direction + 4].reshape(-1, 4)
    torch.testing.assert_close((gates.wanted[0] + gates.wanted[1]).tanh(), given)


def test_what_a_recurrent_layer_must_keep_stays() -> None:
    torch.manual_seed(0)
    model = Sequences(nn.GRU, num_layers=2, batch_first=True).eval()
    network = trace(model, torch.zeros(2, 9, 5))
    plan, data = halved(network), batches((9, 5))
    slim = network.apply(plan).eval()
    slim.rnn.weight_ih_l0.requires_grad_(False)
    slim.rnn.bias_hh_l1.requires_grad_(False)
    masks = {"rnn.weight_hh_l1": torch.ones_like(slim.rnn.weight_hh_l1, dtype=torch.bool)}
    healed = Reconstruct().recover(slim, replace(context(network, plan, data), masks=masks)).model
    changed = {
        key for key, tensor in healed.rnn.named_parameters() if not torch.equal(tensor, slim.rnn.get_parameter(key))
    }
    assert changed == {"bias_ih_l0", "bias_hh_l0"}


def test_biases_alone() -> None:
    model = randomised(zoo.build("digits_cnn"))
    network = trace(model, zoo.example_inputs("digits_cnn"))
    plan = halved(network)
    slim, data = network.apply(plan).eval(), batches((1, 8, 8))
    healed = Reconstruct(only_bias=True).recover(slim, context(network, plan, data)).model
    changed = {name for name, tensor in slim.state_dict().items() if not torch.equal(healed.state_dict()[name], tensor)}
    assert changed
    assert all(name.endswith(("bias", "running_mean")) for name in changed)
    assert error(model, healed, data[0][0]) < error(model, slim, data[0][0])


@pytest.mark.parametrize("name", ["digits_cnn", "vit_tiny", "gru_classifier"])
@pytest.mark.parametrize("sizes", [[16, 16, 16, 16], [50, 9, 5]])
def test_batches_of_any_size_give_what_one_batch_gives(name: str, sizes: list[int]) -> None:
    torch.manual_seed(0)
    example = zoo.example_inputs(name).double()
    model = randomised(zoo.build(name)).double()
    network = trace(model, example)
    plan = halved(network, 0.75)
    x = batches(tuple(example.shape[1:]), 1, 64)[0][0].double()
    slim, option = network.apply(plan).eval(), Reconstruct(rows=1 << 20)
    whole, parts = (
        option.recover(slim, context(network, plan, [(part,) for part in data])).model
        for data in ((x,), x.split(sizes))
    )
    assert error(slim, whole, x) > 1e-2
    assert error(whole, parts, x) < 1e-12
    for key, tensor in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[key], tensor, rtol=1e-5, atol=1e-7)


def test_nothing_that_must_stay_is_changed() -> None:
    """Tied weights, and those that take no gradient."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner, self.outer = nn.Embedding(20, 16), nn.Linear(16, 24), nn.Linear(24, 16)
            self.head = nn.Linear(16, 20, bias=False)
            self.head.weight = self.table.weight
            self.inner.weight.requires_grad_(False)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.outer(F.relu(self.inner(self.table(ids)))))

    model = Tied().eval()
    network = trace(model, torch.zeros(2, 3, dtype=torch.long))
    plan = halved(network)
    slim = network.apply(plan)
    data = [(torch.randint(20, (16, 3), generator=torch.Generator().manual_seed(k)),) for k in range(4)]
    healed = Reconstruct().recover(slim, context(network, plan, data)).model
    assert torch.equal(healed.table.weight, slim.table.weight)
    assert torch.equal(healed.inner.weight, slim.inner.weight)
    assert not torch.equal(healed.outer.weight, slim.outer.weight)


def test_masks_are_kept_where_axes_are_cut_too() -> None:
    model = randomised(zoo.build("digits_cnn"))
    network = trace(model, zoo.example_inputs("digits_cnn"))
    plan, data = halved(network), batches((1, 8, 8))
    kept = torch.rand(model.conv2.weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    plan = replace(plan, edits=(*plan.edits, Mask("conv2.weight", kept)))
    slim, masks = network.apply(plan).eval(), network.masks(plan)
    healed = Reconstruct().recover(slim, replace(context(network, plan, data), masks=masks)).model
    assert not healed.conv2.weight[~masks["conv2.weight"]].any()
    assert not torch.equal(healed.conv2.weight, slim.conv2.weight)
    assert error(model, healed, data[0][0]) < error(model, slim, data[0][0])


def sparse(model: nn.Module, x: Tensor, kept: dict[str, Tensor]) -> tuple[nn.Module, nn.Module]:
    """The masked network, and that reconstructed on `x`."""
    network = trace(model, x[:2])
    plan = Plan(tuple(Mask(name, mask) for name, mask in kept.items()))
    masked = network.apply(plan).eval()
    seen = replace(context(network, plan, [(x,)]), masks=network.masks(plan))
    return masked, Reconstruct(ridge=1e-9).recover(masked, seen).model


def test_every_output_is_solved_for_on_what_it_keeps() -> None:
    """Against least squares one output at a time, with as many inputs each as it has, none among them."""
    torch.manual_seed(0)
    model, x = nn.Linear(10, 7).eval(), torch.randn(300, 10) @ torch.randn(10, 10) + 1
    kept = torch.rand(7, 10) > torch.arange(7)[:, None] / 6
    masked, healed = sparse(model, x, {"weight": kept})
    with torch.no_grad():
        wanted = model(x)
    for row, columns in enumerate(kept):
        inputs = torch.cat([x[:, columns], torch.ones(300, 1)], 1).double()
        best = torch.linalg.lstsq(inputs, wanted[:, row, None].double()).solution[:, 0]
        torch.testing.assert_close(healed.weight[row, columns].double(), best[:-1], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(healed.bias[row].double(), best[-1], rtol=1e-3, atol=1e-3)
    assert not healed.weight[~kept].any()
    assert error(model, healed, x) < error(model, masked, x)


def test_white_inputs_leave_the_kept_weights() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(16, 6, bias=False).eval(), torch.linalg.qr(torch.randn(64, 16)).Q * 3
    kept = n_of_m(model.weight.detach().abs(), "2:4", 1)
    masked, healed = sparse(model, x, {"weight": kept})
    torch.testing.assert_close(healed.weight, masked.weight, rtol=0, atol=1e-5)


def test_systems_of_any_number_at_once_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, kept = torch.randn(50, 9).double(), torch.rand(9, 20) > 0.4
    h, xr = x.T @ x, torch.randn(9, 20).double()
    whole = on_support(h, xr, kept)
    monkeypatch.setattr("metaprune.recovery._least_squares.SYSTEMS", 1)
    torch.testing.assert_close(on_support(h, xr, kept), whole)
    assert not whole[~kept].any()
    assert not on_support(h, xr, torch.zeros_like(kept)).any()
    torch.testing.assert_close(on_support(h, xr, torch.ones_like(kept)), torch.linalg.solve(h, xr))


def test_groups_of_a_convolution_keep_their_pattern() -> None:
    torch.manual_seed(0)
    model, x = nn.Conv2d(8, 12, 3, groups=2, padding=1).eval(), torch.randn(20, 8, 6, 6).cumsum(1)
    kept = n_of_m(torch.rand(model.weight.shape), "2:4", 1)
    masked, healed = sparse(model, x, {"weight": kept})
    assert torch.equal(healed.weight != 0, kept)
    assert error(model, healed, x) < 0.5 * error(model, masked, x)


@pytest.mark.parametrize("pattern", ["row", "2:4"])
def test_of_a_trained_layer_sparsegpt_keeps_more_than_wanda_and_wanda_more_than_magnitude(pattern: str) -> None:
    digits = data.load("digits")
    x, labels = next(digits.train.batches(1024, shuffle=torch.Generator().manual_seed(0)))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    network, budget = trace(model.eval(), x[:2], only="3"), None if pattern == "2:4" else "nonzeros=0.5"
    lost: dict[str, float] = {}
    for criterion in ("l1", "wanda", "obs"):
        plan = sparsify(network, budget, criterion, "uniform", [(x, labels)], pattern=pattern)
        slim = network.apply(plan)
        if criterion == "obs":
            seen = replace(context(network, plan, [(x,)]), masks=network.masks(plan))
            slim = Reconstruct().recover(slim, seen).model
            assert not slim[3].weight[~network.masks(plan)["3.weight"]].any()
        lost[criterion] = error(model[3], slim[3], model[:3](x).detach())
    assert lost["obs"] < 0.5 * lost["wanda"]
    assert lost["wanda"] < lost["l1"]


def test_another_plan_is_refused() -> None:
    model = zoo.build("digits_cnn").eval()
    network = trace(model, zoo.example_inputs("digits_cnn"))
    slim = network.apply(halved(network))
    with pytest.raises(ConfigError, match="must be the one that cut the network"):
        Reconstruct().recover(slim, context(network, Plan(()), batches((1, 8, 8))))


@pytest.mark.parametrize("name", ["cifar_resnet8", "vit_tiny", "digits_cnn"])
@pytest.mark.parametrize("share", [1.0, 0.75])
def test_what_is_behind_a_dropped_branch_makes_up_for_it(name: str, share: float) -> None:
    """Alone, and beside units that leave; on samples that the fit has not seen."""
    torch.manual_seed(0)
    example = zoo.example_inputs(name)
    model = randomised(zoo.build(name))
    network = trace(model, example)
    drop = DropBlock(network.blocks[-1].name)
    edits = [edit for edit in halved(network, share).edits if isinstance(edit, Keep) and share < 1]
    gone = {axis.name for axis in network.axes} - {
        axis.name for axis in trace(network.apply(Plan((drop,))), example).axes
    }
    plan = Plan((drop, *(edit for edit in edits if edit.axis not in gone)))
    slim = network.apply(plan).eval()
    data = batches(tuple(example.shape[1:]), 4, 32)
    healed = Reconstruct(samples=128).recover(slim, context(network, plan, data)).model
    x = batches(tuple(example.shape[1:]), 1, 32, seed=9)[0][0]
    assert error(model, healed, x) < 0.8 * error(model, slim, x)


def test_a_branch_that_gave_what_the_next_layer_can_give_costs_nothing() -> None:
    class Skips(nn.Module):
        """The branch is linear in the stream, and so is what comes after it."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.branch, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))
            return self.head(x + self.branch(x))

    torch.manual_seed(0)
    model = Skips().double().eval()
    x = torch.randn(64, 5, dtype=torch.double)
    network = trace(model, x[:2])
    plan = Plan((DropBlock("branch"),))
    slim = network.apply(plan).eval()
    healed = Reconstruct(ridge=1e-12).recover(slim, context(network, plan, [(x,)])).model
    assert error(model, slim, x) > 1e-2
    assert error(model, healed, x) < 1e-12


def test_data_that_cannot_be_used_are_refused() -> None:
    model = zoo.build("digits_cnn").eval()
    network = trace(model, zoo.example_inputs("digits_cnn"))
    plan = halved(network)
    slim = network.apply(plan)
    with pytest.raises(InputError, match="at least one batch"):
        Reconstruct().recover(slim, context(network, plan, []))
    with pytest.raises(InputError, match="must be finite"):
        Reconstruct().recover(slim, context(network, plan, [(torch.full((4, 1, 8, 8), torch.nan),)]))


def test_a_network_that_goes_another_way_is_refused() -> None:
    class Choosy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x)[:, :3] if x.shape[0] > 8 else self.second(F.relu(self.first(x)))

    model = Choosy().eval()
    network = trace(model, torch.zeros(2, 4))
    with pytest.raises(UnsupportedModelError, match="must make the calls"):
        Reconstruct().recover(model, context(network, Plan(()), batches((4,))))


@pytest.mark.parametrize("options", [{"samples": 0}, {"rows": 0}, {"ridge": 0.0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must hold"):
        Reconstruct(**options)
