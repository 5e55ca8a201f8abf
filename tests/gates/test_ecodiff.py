import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from metaprune.errors import ConfigError
from metaprune.gates import EcoDiff, GatedNetwork, rollout_gradient
from metaprune.gates.ecodiff import HardConcrete, hard_concrete, open_probability
from metaprune.graph import trace
from metaprune.recovery import Context, Finetune
from metaprune.task import CustomLoss


class Denoiser(nn.Module):
    """One step of a sampler in two dimensions: state (n, 3) with the time in its last column."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 24), nn.Linear(24, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def pipeline(model: GatedNetwork, state: Tensor, k: int, gates: dict[str, Tensor]) -> Tensor:
    time = torch.full_like(state[:, :1], k / 5)
    return state + 0.3 * functional_call(model.model, model.tensors(gates), (torch.cat([state, time], 1),))


def test_the_checkpointed_gradient_is_that_of_the_whole_graph():
    torch.manual_seed(0)
    model = Denoiser().double()
    network = trace(model, torch.randn(4, 3).double())
    gates = HardConcrete({axis.name: axis.size for axis in network.axes if axis.prunable}, 0.5).double()
    gated = GatedNetwork(network, model, gates, frozen=True)
    drawn, start = gates.train()(), torch.randn(8, 2).double()
    step = lambda state, k, gates: pipeline(gated, state, k, gates)  # noqa: E731
    value, gradient = rollout_gradient(step, start, 5, drawn, lambda state: state.square().mean())
    state = start
    for k in range(5):
        state = pipeline(gated, state, k, drawn)
    whole = torch.autograd.grad(state.square().mean(), list(drawn.values()))
    assert float(value) == pytest.approx(float(state.square().mean().detach()), rel=1e-12)
    for (name, given), wanted in zip(gradient.items(), whole, strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-6, atol=1e-12, msg=name)


@pytest.mark.parametrize("logit", [-5.0, -1.0, 0.0, 2.0])
def test_gates_are_open_as_often_as_the_formula_says(logit):
    u = (torch.arange(200_000).double() + 0.5) / 200_000
    drawn = hard_concrete(torch.full_like(u, logit), u)
    assert float((drawn > 0).double().mean()) == pytest.approx(float(open_probability(torch.tensor(logit))), abs=1e-4)
    assert 0 <= float(drawn.min()) <= float(drawn.max()) <= 1


def test_at_the_start_evaluation_is_the_dense_network(network):
    gates = HardConcrete({axis.name: axis.size for axis in network.axes if axis.prunable}, 3.0)
    gated = GatedNetwork(network, network.model, gates, frozen=True).eval()
    with torch.no_grad():
        assert torch.equal(gated(network.example_inputs), network.model(network.example_inputs))


def test_weights_stay_and_useless_units_leave():
    """Half of the hidden units do nothing, and labels are not read."""
    torch.manual_seed(0)
    model = Denoiser()
    with torch.no_grad():
        model.b.weight[:, ::2] = 0
    network = trace(model, torch.randn(4, 3))
    x = torch.randn(256, 3)

    class Samples:
        def __len__(self) -> int:
            return len(x)

        def batches(self, batch_size, *, shuffle=None, start=0, **_):
            order = torch.randperm(len(x), generator=shuffle) if shuffle else torch.arange(len(x))
            for part in order.split(batch_size)[start:]:
                yield (x[part],)

    def no_loss(outputs, targets):
        raise AssertionError

    course = Finetune(epochs=20, batch_size=64, precision="fp32")
    gated = EcoDiff(training=course, weight=0.05, floor=0.0).prune(
        network, "params=0.72", Context(train=Samples(), task=CustomLoss(no_loss))
    )
    kept = {edit.axis: edit.kept for edit in gated.plan.edits}
    assert set(range(24)) - set(kept["a"]) <= set(range(0, 24, 2))
    assert len(kept["a"]) < 20
    assert all(edit.kind == "keep" for edit in gated.plan.edits)
    for edit in gated.plan.edits:
        if edit.axis == "a":
            assert torch.equal(gated.model.a.weight, model.a.weight[list(edit.kept)])


@pytest.mark.parametrize("options", [{"weight": -1.0}, {"rate": 0.0}])
def test_bad_options(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        EcoDiff(**options)
