"""Merge: the mean of what a layer gives is what it was, whatever leaves."""

import pytest
import torch
from torch import Tensor, nn

from metaprune.edits import Keep, Merge, input_means
from metaprune.errors import ConfigError, InputError
from metaprune.graph import Network, trace
from metaprune.plans import Plan
from metaprune.task import CustomLoss

TASK = CustomLoss(lambda outputs, targets: outputs.sum())


class Perceptron(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(5, 9), nn.Linear(9, 6, bias=bias), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.up(x).relu()))


def traced(model: nn.Module, *shape: int) -> tuple[Network, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(*shape).double()
    return trace(model.double().eval(), x[:2]), x


def hidden(net: Network, name: str = "up") -> Keep:
    axis = net.axis(name)
    return Keep(axis.name, axis.size, tuple(range(0, axis.size, 3)))


def output_of(model: nn.Module, path: str, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    with model.get_submodule(path).register_forward_hook(lambda module, args, out: seen.append(out)), torch.no_grad():
        model(x)
    return seen[0]


def test_the_mean_of_the_output_is_unchanged():
    net, x = traced(Perceptron(), 64, 5)
    means = input_means(net, ["down.weight"], [(part,) for part in x.split(10)], TASK)
    torch.testing.assert_close(means["down.weight"], output_of(net.model, "up", x).relu().mean(0))
    plan = Plan((hidden(net), Merge("down.weight", means["down.weight"])))
    slim = net.apply(plan)
    before, after = (output_of(model, "down", x).mean(0) for model in (net.model, slim))
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)
    assert net.verify(plan, slim=slim).passed(1e-12)  # masked with the bias is slim with the bias
    plain = output_of(net.apply(Plan((hidden(net),))), "down", x).mean(0)
    assert float((plain - before).abs().max()) > 1e-2


def test_what_is_constant_leaves_without_loss():
    model = Perceptron()
    with torch.no_grad():
        for unit in (1, 2, 4, 5, 7, 8):
            model.up.weight[unit] = 0
            model.up.bias[unit] = unit / 3
    net, x = traced(model, 40, 5)
    means = input_means(net, ["down.weight"], [(x,)], TASK)
    slim = net.apply(Plan((hidden(net), Merge("down.weight", means["down.weight"]))))
    with torch.no_grad():
        torch.testing.assert_close(slim(x), net.model(x), rtol=1e-12, atol=1e-12)


def test_without_cuts_nothing_changes():
    net, _ = traced(Perceptron(), 8, 5)
    slim = net.apply(Plan((Merge("down.weight", torch.randn(9)),)))
    assert torch.equal(slim.down.bias, net.model.down.bias)


class Convolutional(nn.Module):
    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, bias=not norm)  # no padding: exact everywhere
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.b(self.a(x).relu())).mean((2, 3)))


@pytest.mark.parametrize("norm", [False, True])
def test_constant_channels_go_into_a_bias_or_a_norm(norm):
    model = Convolutional(norm)
    with torch.no_grad():
        for unit in (1, 2, 4, 5, 7):
            model.a.weight[unit] = 0
            model.a.bias[unit] = unit / 3
    net, x = traced(model, 6, 3, 7, 7)
    assert net.linear_calls["b.weight"].intercept == ("norm.running_mean" if norm else "b.bias")
    means = input_means(net, ["b.weight"], [(x,)], TASK)
    plan = Plan((hidden(net, "a"), Merge("b.weight", means["b.weight"])))
    slim = net.apply(plan)
    assert net.verify(plan, slim=slim).passed(1e-12)
    with torch.no_grad():
        torch.testing.assert_close(slim(x), net.model(x), rtol=1e-12, atol=1e-12)


def test_a_layer_without_a_bias_gets_one():
    net, x = traced(Perceptron(bias=False), 64, 5)
    means = input_means(net, ["down.weight"], [(x,)], TASK)
    cut = Plan((hidden(net), hidden(net, "down")))
    plan = Plan((*cut.edits, Merge("down.weight", means["down.weight"])))
    slim = net.apply(plan)
    kept = list(range(0, 6, 3))
    before, after = output_of(net.model, "down", x).mean(0)[kept], output_of(slim, "down", x).mean(0)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)
    assert net.verify(plan, slim=slim).passed(1e-12)
    assert slim.down.bias.requires_grad
    assert net.cost_of(plan).params == sum(parameter.numel() for parameter in slim.parameters())
    assert net.cost_of(plan).bytes == net.cost_of(cut).bytes + 2 * 8
    assert net.apply(Plan((Merge("down.weight", torch.randn(9)),))).down.bias is None  # nothing leaves


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_decoder_keeps_the_means_of_what_its_layers_give():
    """FLAP on a Llama, whose projections have no bias."""
    pytest.importorskip("transformers")
    from tests.graph.transformers_models import MODELS, build

    model, inputs = build(MODELS["llama"])
    net = trace(model, inputs)
    names = [name for name in net.linear_calls if name.endswith(("o_proj.weight", "down_proj.weight"))]
    task = CustomLoss(lambda outputs, targets: outputs.sum())
    task = type("Ids", (CustomLoss,), {"outputs": lambda self, model, batch: model(input_ids=batch[0])})(task.function)
    means = input_means(net, names, [(inputs["input_ids"],)], task)
    axis = next(axis for axis in net.axes if ("model.layers.1.mlp.down_proj.weight", 1) in axis.bindings)
    plan = Plan(
        (Keep(axis.name, axis.size, tuple(range(0, axis.size, 2))),
         *(Merge(name, mean) for name, mean in means.items()))
    )  # fmt: skip
    slim = net.apply(plan)
    assert net.verify(plan, slim=slim).passed()
    assert [name for name in slim.state_dict() if name.endswith("proj.bias")] == ["model.layers.1.mlp.down_proj.bias"]
    path = "model.layers.1.mlp.down_proj"
    before, after = (_output(each, path, inputs).mean((0, 1)) for each in (model, slim))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)


def _output(model: nn.Module, path: str, inputs: dict[str, Tensor]) -> Tensor:
    seen: list[Tensor] = []
    with model.get_submodule(path).register_forward_hook(lambda module, args, out: seen.append(out)), torch.no_grad():
        model(**inputs)
    return seen[0]


class WithOwnWeight(Perceptron):
    def __init__(self) -> None:
        super().__init__(bias=False)
        self.own = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self.own


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (Merge("nowhere", torch.zeros(3)), "no parameter or buffer 'nowhere'"),
        (Merge("own", torch.zeros(3)), "it lies in no layer of torch that could get one. Leave it out"),
        (Merge("head.weight", torch.zeros(9)), "has 6 inputs and needs as many finite means"),
        (Merge("head.weight", torch.full((6,), float("nan"))), "6 of them not finite"),
        (Merge("head.bias", torch.zeros(3)), "it is not read as one product"),
    ],
)
def test_refusals(edit, reason):
    net, _ = traced(WithOwnWeight(), 8, 5)
    assert reason in edit.check(net)


def test_bad_samples():
    net, _ = traced(Perceptron(), 8, 5)
    with pytest.raises(InputError, match="at least one batch"):
        input_means(net, ["down.weight"], [], TASK)
    with pytest.raises(ConfigError, match=r"'up.bias' must be the weight of a layer"):
        input_means(net, ["up.bias"], [], TASK)
