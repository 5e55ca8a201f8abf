"""What every criterion promises, run for every registered name."""

import pytest
import torch
from torch import nn

from metaprune import data, zoo
from metaprune.criteria import CRITERIA, Calibration, Criterion, RankAverage, Scores
from metaprune.edits import Keep
from metaprune.errors import ConfigError, InputError
from metaprune.graph import Network, trace
from metaprune.plans import Plan
from metaprune.task import Classification, CustomLoss

DIGITS = data.load("digits").train.subset(96, seed=0)
LEFT_OUT = {"gaussian": {"conv1", "conv2"}}  # residual streams
CALIBRATION = Calibration(lambda: DIGITS.batches(32), Classification(), seed=3)


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    model = zoo.build("digits_cnn")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 2)
            nn.init.normal_(module.bias)
    return trace(model, zoo.example_inputs("digits_cnn"))


@pytest.fixture(params=list(CRITERIA))
def criterion(request: pytest.FixtureRequest) -> Criterion:
    return CRITERIA[request.param]()


def score(criterion: Criterion, net: Network) -> Scores:
    return criterion.score(net, CALIBRATION)


def test_every_prunable_axis_gets_one_finite_score_a_unit(criterion: Criterion) -> None:
    net = network()
    scores = score(criterion, net)
    left_out = LEFT_OUT.get(next(name for name in CRITERIA if CRITERIA[name] is type(criterion)), set())
    assert set(scores) == {axis.name for axis in net.axes if axis.prunable} - left_out
    for name, score_U in scores.items():
        assert score_U.shape == (net.axis(name).size,)
        assert score_U.dtype == torch.float64
        assert bool(score_U.isfinite().all())
        assert bool((score_U >= 0).all())
        assert score_U.unique().numel() > 1


def test_scores_are_the_same_twice_and_leave_the_model_alone(criterion: Criterion) -> None:
    net = network()
    before = {name: tensor.clone() for name, tensor in net.model.state_dict().items()}
    net.model.train()
    first, second = score(criterion, net), score(criterion, net)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.model.state_dict().items())
    assert all(module.training for module in net.model.modules())
    assert all(parameter.grad is None for parameter in net.model.parameters())


def test_no_unit_has_a_favoured_place(criterion: Criterion) -> None:
    """Permuting the units of an axis permutes their scores."""
    net = network()
    if type(criterion).__name__ in ("Random", "Hessian"):
        pytest.skip("what is drawn at random knows only the place")
    axis = net.axis(next(iter(score(criterion, net))))
    order = torch.randperm(axis.size)
    twin = network()
    with torch.no_grad():
        tensors = dict(twin.model.named_parameters()) | dict(twin.model.named_buffers())
        for name, dim in axis.bindings:
            tensors[name].copy_(tensors[name].index_select(dim, order))
    expected = score(criterion, net)[axis.name][order]
    torch.testing.assert_close(score(criterion, twin)[axis.name], expected, rtol=1e-4, atol=1e-9)


def test_what_it_needs_is_asked_for_before_work(criterion: Criterion) -> None:
    if "gradients" in criterion.needs:
        with pytest.raises(ConfigError, match="needs a loss"):
            criterion.score(network(), Calibration(CALIBRATION.batches))
    if criterion.needs:
        with pytest.raises(ConfigError, match="needs data"):
            criterion.score(network(), Calibration(task=Classification()))


BAD = {
    "at least one sample": [],
    "must be finite": [(torch.full((8, 1, 8, 8), torch.nan), torch.arange(8))],
    "more than one class": [(torch.randn(8, 1, 8, 8), torch.full((8,), 3))],
    "must run on the calibration data": [(torch.randn(8, 2, 8, 8), torch.arange(8))],
}


@pytest.mark.parametrize("rule", BAD)
@pytest.mark.parametrize("name", [name for name in CRITERIA if CRITERIA[name].needs])
def test_bad_data_are_refused_by_rule(name: str, rule: str) -> None:
    net = network()
    with pytest.raises(InputError, match=rule):
        CRITERIA[name]().score(net, Calibration(lambda: iter(BAD[rule]), Classification()))
    assert all(parameter.grad is None for parameter in net.model.parameters())


def test_scores_that_tell_nothing_are_refused() -> None:
    """A loss that is least at the dense network has no gradient there."""
    net = network()
    least = CustomLoss(lambda out, _: (out - out.detach()).square().sum())
    with pytest.raises(InputError, match="by 'taylor' every unit of every axis is worth 0"):
        CRITERIA["taylor"]().score(net, Calibration(CALIBRATION.batches, least))


def test_messages_call_a_criterion_by_its_name() -> None:
    with pytest.raises(ConfigError, match="criterion 'rank_average' needs data"):
        RankAverage(of=("wanda", "l2")).score(network(), Calibration())


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'taylor'"):
        CRITERIA["tayler"]


def test_scores_that_are_not_finite_are_refused() -> None:
    net = network()
    with torch.no_grad():
        next(net.model.parameters()).mul_(float("inf"))
    with pytest.raises(InputError, match="not"):
        CRITERIA["l2"]().score(net, CALIBRATION)


def test_taylor_is_the_slow_truth() -> None:
    """The score equals the change of the loss that a gate on what the consumers read has to first order."""
    net = network()
    scores = CRITERIA["taylor"](group=32).score(net, CALIBRATION)
    axis = next(a for a in net.axes if a.prunable and len(a.consumers) == 1)
    (consumer, dim), model = axis.consumers[0], net.model.eval()
    expected = torch.zeros(axis.size, dtype=torch.float64)
    weight = dict(model.named_parameters())[consumer]
    for batch in DIGITS.batches(32):
        gate = torch.ones(axis.size, requires_grad=True)
        shape = [1] * weight.ndim
        shape[dim] = -1
        spread = gate.repeat_interleave(weight.shape[dim] // axis.size)  # a flatten gives each channel several columns
        out = torch.func.functional_call(model, {consumer: weight * spread.view(shape)}, (batch[0],))
        loss = nn.functional.cross_entropy(out, batch[1])
        expected += torch.autograd.grad(loss, gate)[0].abs().double() / 3
    torch.testing.assert_close(scores[axis.name], expected, rtol=1e-4, atol=1e-8)


def test_magnitudes_find_the_units_that_are_zero() -> None:
    net = network()
    axis = next(axis for axis in net.axes if axis.prunable)
    tensors = dict(net.model.named_parameters())
    with torch.no_grad():
        for name, dim in axis.bindings:
            if name in tensors:
                tensors[name].index_fill_(dim, torch.tensor([1, 3]), 0)
    for name in ("l1", "l2"):
        lowest = CRITERIA[name]().score(net, CALIBRATION)[axis.name].argsort()[:2]
        assert sorted(lowest.tolist()) == [1, 3]
    slim = net.apply(Plan((Keep(axis.name, axis.size, tuple(k for k in range(axis.size) if k not in (1, 3))),)))
    x = zoo.example_inputs("digits_cnn")
    torch.testing.assert_close(slim.eval()(x), net.model.eval()(x), rtol=1e-4, atol=1e-5)


def test_bn_scale_without_batch_norm_is_refused() -> None:
    with pytest.raises(ConfigError, match="BatchNorm"):
        CRITERIA["bn_scale"]().score(trace(zoo.build("mlp"), zoo.example_inputs("mlp")), CALIBRATION)
