import pytest
import torch
from torch import Tensor, nn

from metaprune.errors import ConfigError
from metaprune.gates import EcoDiff, GatedNetwork
from metaprune.gates.ecodiff import HardConcrete, _Matching, hard_concrete, open_probability
from metaprune.graph import trace
from metaprune.recovery import Context, Finetune
from metaprune.task import CustomLoss, Task


class Denoiser(nn.Module):
    """One step of a sampler in two dimensions: state (n, 3) with the time in its last column."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 24), nn.Linear(24, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Rows:
    """Training data without labels."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, batch_size, *, shuffle=None, start=0, **_):
        order = torch.randperm(len(self), generator=shuffle) if shuffle else torch.arange(len(self))
        for part in order.split(batch_size)[start:]:
            yield (self.x[part],)


class Sampler(Task):
    """A pipeline that calls the network many times."""

    def __init__(self, steps: int = 5) -> None:
        self.steps = steps

    def outputs(self, model, batch):
        (state,) = batch
        for k in range(self.steps):
            state = state + 0.3 * model(torch.cat([state, torch.full_like(state[:, :1], k / self.steps)], 1))
        return state

    def loss(self, outputs, batch):
        raise AssertionError  # what is matched is the output


def step(law: EcoDiff, steps: int = 5) -> tuple[Tensor, list[Tensor], int, int]:
    """Loss and gradient of one step, how often gates were drawn, and how many entries the graph keeps."""
    torch.manual_seed(0)
    model = Denoiser().double()
    network = trace(model, torch.randn(4, 3).double())
    lesson = _Matching(law, network, model, Context(task=Sampler(steps)))
    draws, kept = [], []
    lesson.gates.register_forward_hook(lambda *_: draws.append(1))
    lesson.model.train()
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        loss = lesson.loss((torch.randn(64, 2).double(),))
    return loss, list(torch.autograd.grad(loss, list(lesson.gates.parameters()))), len(draws), sum(kept)


def test_the_checkpointed_gradient_is_that_of_the_whole_graph():
    """And all calls of a step see the same gates."""
    whole, gradient, draws, kept = step(EcoDiff())
    again, checkpointed, draws_again, kept_again = step(EcoDiff(checkpointed=True))
    assert again.item() == pytest.approx(whole.item(), rel=1e-12)
    for given, wanted in zip(checkpointed, gradient, strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-9, atol=1e-14)
    assert draws == draws_again == 1
    assert kept_again < kept / 3
    more, fewer = (step(EcoDiff(checkpointed=True), steps)[3] for steps in (9, 5))
    assert more - fewer <= 4 * 64 * (3 + 2 + 3)  # a call more keeps what is handed on, none of the 40 hidden units


def test_a_pipeline_is_pruned_against_its_last_output():
    torch.manual_seed(0)
    model = Denoiser()
    with torch.no_grad():
        model.b.weight[:, ::2] = 0
    network, start = trace(model, torch.randn(4, 3)), torch.randn(256, 2)
    course = Finetune(epochs=20, batch_size=64, precision="fp32")
    law = EcoDiff(training=course, weight=0.002, floor=0.0, checkpointed=True)
    gated = law.prune(network, "params=0.72", Context(train=Rows(start), task=Sampler()))
    kept = {edit.axis: edit.kept for edit in gated.plan.edits}
    gone = set(range(24)) - set(kept["a"])
    assert gone
    assert gone <= set(range(0, 24, 2))
    assert network.cost_of(gated.plan).params <= 0.72 * network.cost().params


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

    def no_loss(outputs, targets):
        raise AssertionError

    course = Finetune(epochs=20, batch_size=64, precision="fp32")
    gated = EcoDiff(training=course, weight=0.05, floor=0.0).prune(
        network, "params=0.72", Context(train=Rows(x), task=CustomLoss(no_loss))
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
