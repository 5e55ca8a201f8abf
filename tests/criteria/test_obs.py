"""Block-OBS against least squares that are solved from scratch."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from metaprune import zoo
from metaprune.criteria import Calibration, Obs
from metaprune.criteria.obs import Block, eliminate
from metaprune.errors import ConfigError
from metaprune.graph import trace

UNITS, WIDTH, OUTPUTS, REST = 6, 2, 4, 3
ONES = torch.ones(OUTPUTS).double()


def problem(seed: int) -> tuple[Tensor, Tensor, np.ndarray]:
    """Second moment, weights, and the unit of each input: two inputs a unit, apart, and three that stay."""
    generator = torch.Generator().manual_seed(seed)
    inputs = UNITS * WIDTH + REST
    mix = torch.randn(inputs, inputs, generator=generator).double()
    x_BD = torch.randn(200, inputs, generator=generator).double() @ mix
    unit_D = np.r_[np.arange(UNITS), np.arange(UNITS), [-1] * REST]
    return x_BD.T @ x_BD / 200, torch.randn(inputs, OUTPUTS, generator=generator).double(), unit_D


def refit(h_DD: Tensor, w_DO: Tensor, kept: np.ndarray) -> tuple[float, Tensor]:
    """Error of the best weights for the inputs that are kept, and these weights."""
    best_DO = torch.zeros_like(w_DO)
    best_DO[kept] = torch.linalg.solve(h_DD[kept][:, kept], h_DD[kept] @ w_DO)
    gone_DO = w_DO - best_DO
    return float((gone_DO * (h_DD @ gone_DO)).sum()), best_DO


@pytest.mark.parametrize("seed", range(5))
def test_the_curve_is_that_of_least_squares(seed: int) -> None:
    h_DD, w_DO, unit_D = problem(seed)
    block = Block(h_DD, w_DO, unit_D, 1e-14, ONES)
    curve_K, order = eliminate([block], UNITS, remember=3)
    for left in range(UNITS + 1):
        kept = np.isin(unit_D, order[: UNITS - left], invert=True).nonzero()[0]
        loss, best_DO = refit(h_DD, w_DO, kept)
        assert float(curve_K[left]) == pytest.approx(loss, rel=1e-8, abs=1e-10)
        if left == 3:
            torch.testing.assert_close(block.seen_DO, best_DO, rtol=1e-7, atol=1e-9)
    assert curve_K[-1] == 0


@pytest.mark.parametrize("seed", range(5))
def test_curves_fall_and_new_weights_are_never_worse_than_masked_ones(seed: int) -> None:
    """On the same support, at every number of units kept."""
    h_DD, w_DO, unit_D = problem(seed)
    for left in range(UNITS + 1):
        block = Block(h_DD, w_DO, unit_D, 1e-14, ONES)
        curve_K, order = eliminate([block], UNITS, remember=left)
        stays_D = torch.from_numpy(np.isin(unit_D, order[: UNITS - left], invert=True))
        assert not block.seen_DO[~stays_D].any()
        solved, masked = (w_DO - other_DO for other_DO in (block.seen_DO, w_DO * stays_D[:, None]))
        errors = [float((gone_DO * (h_DD @ gone_DO)).sum()) for gone_DO in (solved, masked)]
        assert errors[0] < errors[1] or left == UNITS
        assert float(curve_K[left]) == pytest.approx(errors[0], rel=1e-8, abs=1e-10)
    assert (curve_K.diff() < 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_each_removal_is_the_best_there_is(seed: int) -> None:
    h_DD, w_DO, unit_D = problem(seed)
    _, order = eliminate([Block(h_DD, w_DO, unit_D, 1e-14, ONES)], UNITS)
    for step, unit in enumerate(order[:-1]):
        losses = {
            other: refit(h_DD, w_DO, np.isin(unit_D, [*order[:step], other], invert=True).nonzero()[0])[0]
            for other in set(range(UNITS)) - set(order[:step])
        }
        assert min(losses, key=lambda other: losses[other]) == unit


def test_several_that_leave_together() -> None:
    """The loss of a group is that of the group, not the sum of its parts."""
    h_DD, w_DO, unit_D = problem(0)
    for pair in combinations(range(UNITS), 2):
        loss = Block(h_DD, w_DO, unit_D, 1e-14, ONES).remove(pair)
        assert loss == pytest.approx(refit(h_DD, w_DO, np.isin(unit_D, pair, invert=True).nonzero()[0])[0], rel=1e-8)
    exact, _ = eliminate([Block(h_DD, w_DO, unit_D, 1e-14, ONES)], UNITS)
    coarse, _ = eliminate([Block(h_DD, w_DO, unit_D, 1e-14, ONES)], UNITS, at_once=2)
    assert (coarse[::2] >= exact[::2] - 1e-9).all()
    assert float(coarse[0]) == pytest.approx(float(exact[0]))


def test_several_consumers_add_up() -> None:
    first, second = problem(1), problem(2)
    both, order = eliminate([Block(*first, 1e-14, ONES), Block(*second, 1e-14, ONES / 2)], UNITS)
    for left in range(UNITS):
        losses = [
            refit(h_DD, w_DO, np.isin(unit_D, order[: UNITS - left], invert=True).nonzero()[0])[0]
            for h_DD, w_DO, unit_D in (first, second)
        ]
        assert float(both[left]) == pytest.approx(losses[0] + 0.5 * losses[1], rel=1e-8)


def calibration(shape: tuple[int, ...], count: int = 4) -> Calibration:
    generator = torch.Generator().manual_seed(0)
    batches: list[Any] = [(torch.randn(32, *shape, generator=generator),) for _ in range(count)]
    return Calibration(lambda: iter(batches))


def test_a_unit_that_is_there_twice_goes_first() -> None:
    """And costs nothing at the output of the network, either."""
    model = zoo.build("digits_cnn").eval()
    state = model.state_dict()
    for name in ("conv1.weight", "bn1.weight", "bn1.bias"):
        state[f"block1.{name}"][3] = state[f"block1.{name}"][5]
    network = trace(model, zoo.example_inputs("digits_cnn"))
    verdict = Obs(ridge=1e-9).judge(network, calibration((1, 8, 8)))
    score_U, curve_K = verdict.scores["block1.conv1"], verdict.curves["block1.conv1"]
    assert int(score_U.argmin()) in (3, 5)
    assert float(curve_K[-2]) < 1e-4 * float(curve_K[-3])


def test_curves_are_what_happens_at_the_output() -> None:
    """At the share that was measured, the curve is the error of the network cut there and solved for anew."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 4)).double().eval()
    network = trace(model, torch.zeros(2, 5).double())
    seen = Calibration(lambda: iter([(torch.randn(64, 5, generator=torch.Generator().manual_seed(1)).double(),)]))
    verdict = Obs(ridge=1e-10, measured=64, share=0.5).judge(network, seen)
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        hidden, wanted = torch.relu(model[0](x)), model(x)
        kept = verdict.scores["0"].argsort()[6:]
        ones = torch.ones(64, 1).double()
        design = torch.cat([hidden[:, kept], ones], 1)
        out = design @ torch.linalg.lstsq(design, wanted).solution
        lost, wanted = (scores - scores.mean(1, keepdim=True) for scores in (out - wanted, wanted))
        error = float(lost.square().sum() / wanted.square().sum())
    assert float(verdict.curves["0"][6]) == pytest.approx(error, rel=1e-4)


def test_errors_of_parallel_branches_add_up() -> None:
    """Branches that see different inputs are wrong independently, and the certificate says so."""

    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ModuleList(nn.Linear(3, 16) for _ in range(6))
            self.down = nn.ModuleList(nn.Linear(16, 4) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            parts = zip(self.up, self.down, x.split(3, dim=1))
            return sum(down(torch.relu(up(part))) * (k + 1) for k, (up, down, part) in enumerate(parts))

    torch.manual_seed(0)
    network = trace(Parallel(), torch.zeros(2, 18))
    verdict = Obs(measured=128, share=0.75).judge(network, calibration((18,)))
    assert verdict.additivity is not None
    assert 0.9 < verdict.additivity <= 1
    assert Obs(joint=0).judge(network, calibration((18,))).additivity is None


@pytest.mark.parametrize("name", ["vit_tiny", "cifar_resnext29", "cifar_mobilenet_v2", "gru_classifier"])
def test_axes_of_any_network_get_falling_curves(name: str) -> None:
    torch.manual_seed(0)
    example = zoo.example_inputs(name)
    network = trace(zoo.build(name), example)
    verdict = Obs(samples=16, measured=8, rows=2048).judge(network, calibration(tuple(example.shape[1:]), 1))
    read = {axis.name for axis in network.axes if axis.prunable and axis.consumers}
    assert set(verdict.scores) <= read
    assert name == "gru_classifier" or len(verdict.scores) >= 0.6 * len(read)
    for axis, curve_K in verdict.curves.items():
        assert curve_K.shape == (network.axis(axis).size + 1,)
        assert float(curve_K[-1]) == 0
        assert (curve_K.diff() <= 1e-9 * curve_K[0]).all()
        assert verdict.scores[axis].unique().numel() == network.axis(axis).size  # they say who goes first


@pytest.mark.parametrize(
    "options",
    [{"samples": 0}, {"rows": 0}, {"ridge": 0.0}, {"measured": -1}, {"share": 1.0}, {"joint": -1}, {"steps": 0}],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must hold"):
        Obs(**options)
