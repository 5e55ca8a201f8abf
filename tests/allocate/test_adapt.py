"""Steps that spare blocks which do much."""

import pytest
import torch
from torch import Tensor, nn

from metaprune.allocate import ALLOCATORS, Problem
from metaprune.allocate.adapt import importances
from metaprune.errors import ConfigError
from metaprune.graph import Network, trace
from metaprune.task import FeatureMatching
from tests.allocate.problems import allocated, drawn


class Blocks(nn.Module):
    """Three branches around a stream, the second of which adds nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.ModuleList(nn.Linear(8, 16) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(16, 8) for _ in range(3))
        nn.init.zeros_(self.down[1].weight)
        nn.init.zeros_(self.down[1].bias)
        with torch.no_grad():
            self.down[2].weight.mul_(30)

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down):
            x = x + down(up(x).relu())
        return x


def network() -> Network:
    return trace(Blocks().eval(), torch.randn(6, 8))


def given(net: Network) -> dict:
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    return {"batches": lambda: iter([(x,)]), "task": FeatureMatching(net.model)}


def test_a_block_that_does_nothing_has_the_least_importance_and_loses_most() -> None:
    net = network()
    asked = Problem(net, drawn(net), {"macs": 1e9}, **given(net))
    found = importances(asked, dict.fromkeys(drawn(net), 1.0), 1)
    assert set(found) == {"up.0", "up.1", "up.2"}
    assert found["up.1"] == pytest.approx(-1)
    assert found["up.1"] < found["up.0"] < found["up.2"]
    kept = allocated("adapt", net, drawn(net), 0.5, **given(net))
    assert kept["up.1"] <= kept["up.0"] < kept["up.2"]


def test_without_amplitude_it_is_uniform() -> None:
    net = network()
    for budget in (0.3, 0.6):
        kept = allocated("adapt", net, drawn(net), budget, amplitude=0.0, **given(net))
        assert kept == allocated("uniform", net, drawn(net), budget)


@pytest.mark.parametrize("value", [-1.0, -0.1, 0.7])
def test_equal_importances_are_uniform(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    equal = dict.fromkeys(("up.0", "up.1", "up.2"), value)
    monkeypatch.setattr("metaprune.allocate.adapt.importances", lambda problem, shares, batches: equal)
    for budget in (0.2, 0.5, 0.8):
        assert allocated("adapt", net, drawn(net), budget, **given(net)) == allocated(
            "uniform", net, drawn(net), budget
        )


def test_a_step_is_kept_in_the_mean_and_no_axis_is_further_from_it_than_the_amplitude() -> None:
    net, step, amplitude = network(), 0.05, 0.03
    asked = Problem(net, drawn(net), {"macs": 1e9}, **given(net))
    rates = ALLOCATORS["adapt"](step=step, amplitude=amplitude)._rates(asked, dict.fromkeys(drawn(net), 1.0))  # type: ignore[attr-defined, call-arg]
    assert set(rates) == set(drawn(net))
    inside = [rates[f"up.{k}"] for k in range(3)]
    assert sum(inside) / 3 == pytest.approx(step, abs=1e-12)
    assert max(abs(rate - step) for rate in inside) == pytest.approx(amplitude, abs=1e-12)
    assert len({round(rate, 6) for rate in inside}) == 3
    assert all(rate == step for name, rate in rates.items() if not name.startswith("up."))


def test_networks_without_branches_are_uniform() -> None:
    net = trace(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval(), torch.randn(4, 8))
    kept = allocated("adapt", net, drawn(net), 0.5, **given(net))
    assert kept == allocated("uniform", net, drawn(net), 0.5)


@pytest.mark.parametrize("options", [{"step": 0.0}, {"amplitude": 0.5}, {"every": 0}])
def test_numbers_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must hold"):
        ALLOCATORS["adapt"](**options)
