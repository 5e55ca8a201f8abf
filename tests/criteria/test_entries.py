"""Scores of single entries, against the formulas of the papers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metaprune.criteria import CRITERIA, L2, Calibration, Fisher, Gblm, Obs, Taylor, Wanda
from metaprune.errors import ConfigError
from metaprune.graph import Entries, trace
from metaprune.task import CustomLoss

ABLE = [name for name in CRITERIA if CRITERIA[name].entrywise]


def layer(out: int = 6, into: int = 8, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(into, out, bias=bias).eval()


def scored(criterion: Any, model: nn.Module, *batches: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """With the sum of squares of the outputs as the loss, halved."""

    def given() -> Any:
        return iter([(x, torch.zeros(len(x))) for x in batches])

    task = CustomLoss(lambda y, _: y.square().sum() / 2)
    return dict(criterion.judge(Entries(trace(model, batches[0])), Calibration(given, task, seed)).scores)


@pytest.mark.parametrize("name", ABLE)
def test_every_entry_of_every_weight_is_scored(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
    x = torch.randn(8, 4, 4, 4)
    scores = scored(CRITERIA[name](), model.eval(), x)
    assert {key: score.shape for key, score in scores.items()} == {"0.weight": (6, 2, 3, 3), "4.weight": (3, 24)}
    again = scored(CRITERIA[name](), model, x)
    for key, score in scores.items():
        assert score.dtype == torch.float64
        assert bool((score >= 0).all())
        assert score.unique().numel() > score.numel() // 2
        assert torch.equal(score, again[key])


@pytest.mark.parametrize("name", [name for name in CRITERIA if not CRITERIA[name].entrywise])
def test_others_refuse_by_name(name: str) -> None:
    kind = CRITERIA[name]
    criterion = kind() if name not in ("rank_average", "product") else kind(of=("l1", "l2"))
    with pytest.raises(ConfigError, match=rf"{name!r} scores whole units.*l1, .*wanda"):
        scored(criterion, layer(), torch.randn(4, 8))


def test_wanda_is_weight_times_norm() -> None:
    model, x = layer(), torch.randn(64, 8)
    seen = scored(Wanda(), model, x[:40], x[40:])["weight"]
    wanted = model.weight.detach().abs() * x.norm(dim=0) / 8  # the root of the mean over 64 samples
    torch.testing.assert_close(seen, wanted.double())
    torch.testing.assert_close(seen, scored(Wanda(), model, x[torch.randperm(64)])["weight"])  # order plays no part
    louder = x * torch.tensor([1, 1, -3, 1, 1, 1, 1, 1.0])
    torch.testing.assert_close(
        scored(Wanda(), model, louder)["weight"] / seen, (louder / x)[0].abs().expand(6, 8).double()
    )


def test_wanda_sees_what_each_position_of_a_kernel_reads() -> None:
    torch.manual_seed(0)
    model, x = nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2, bias=False).eval(), torch.randn(5, 4, 7, 6)
    columns = nn.functional.unfold(x, 3, padding=1, stride=2)  # (N, C k k, places)
    norm = (columns.square().sum((0, 2)) / 5).sqrt().view(2, 1, 2, 3, 3).expand(2, 3, 2, 3, 3).reshape(6, 2, 3, 3)
    torch.testing.assert_close(scored(Wanda(), model, x)["weight"], (model.weight.detach().abs() * norm).double())


def test_gblm_adds_the_norm_of_the_gradients_of_samples() -> None:
    model, x = layer(), torch.randn(12, 8)
    y = model(x).detach()
    by_sample = 100 * torch.einsum("no,ni->noi", y, x).double()  # dL/dW of each
    weight, norm = model.weight.detach().double().abs(), (x.double().square().sum(0) / 12).sqrt()
    two, one = (scored(Gblm(order=order), model, x)["weight"] / weight - norm for order in (2, 1))
    torch.testing.assert_close(two, by_sample.square().sum(0).sqrt(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one, by_sample.abs().sum(0), rtol=1e-4, atol=1e-5)
    assert bool((two <= one * (1 + 1e-9)).all())
    assert bool((one <= 12**0.5 * two * (1 + 1e-9)).all())
    torch.testing.assert_close(scored(Gblm(scale=0), model, x)["weight"], scored(Wanda(), model, x)["weight"])


def test_gblm_without_inputs_is_weight_times_gradient() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layer()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + x.sum()

    model, x = Biased().eval(), torch.randn(4, 8)
    criterion = Gblm()
    entries = Entries(trace(model, x))

    def given() -> Any:
        return iter([(x, torch.zeros(4))])

    seen = Calibration(given, CustomLoss(lambda y, _: y.square().sum()))
    gradient = criterion._gradient_norms(entries.network, seen, {"inner.weight"})["inner.weight"]
    with pytest.MonkeyPatch.context() as patch:  # inputs of zero have no gradient either, so only the norms are zero
        patch.setattr("metaprune.criteria.gblm.entry_norms", lambda *_: {"inner.weight": torch.zeros(1, 8)})
        score = criterion.judge(entries, seen).scores["inner.weight"]
    torch.testing.assert_close(score, model.inner.weight.detach().double().abs() * gradient)


def test_taylor_and_fisher_are_those_of_single_weights() -> None:
    model, x = layer(), torch.randn(8, 8)
    change = (model.weight.detach() * torch.einsum("no,ni->noi", model(x).detach(), x)).double()
    pairs = change.view(4, 2, 6, 8).sum(1)
    torch.testing.assert_close(scored(Taylor(group=2), model, x)["weight"], pairs.abs().mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        scored(Fisher(group=2), model, x)["weight"], pairs.square().mean(0), rtol=1e-4, atol=1e-6
    )


def test_obs_orders_by_magnitude_where_inputs_are_white() -> None:
    model = layer()
    white = torch.linalg.qr(torch.randn(64, 8)).Q * 5
    squares = scored(Obs(), model, white)["weight"] / scored(L2(), model, white)["weight"].square()
    torch.testing.assert_close(squares, squares.mean().expand(6, 8), rtol=1e-4, atol=0)


def test_obs_is_the_error_when_the_rest_of_the_row_makes_up() -> None:
    torch.manual_seed(1)
    model, x = layer(), torch.randn(200, 8) @ torch.randn(8, 8)
    scores, weight = scored(Obs(ridge=1e-9), model, x)["weight"], model.weight.detach().double()
    wanted = (x.double() @ weight.T).square().mean(0).sum()
    for row, column in ((0, 3), (5, 0)):
        rest = [k for k in range(8) if k != column]
        target = x.double() @ weight[row]
        left = x[:, rest].double()
        error = (target - left @ torch.linalg.lstsq(left, target[:, None]).solution[:, 0]).square().mean()
        torch.testing.assert_close(scores[row, column], error / wanted, rtol=1e-3, atol=0)
