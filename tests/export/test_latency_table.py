"""A table knows what it was not shown, is kept, and is a budget like others."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import metaprune as mp
from metaprune import zoo
from metaprune.errors import BudgetError, ConfigError, InputError
from metaprune.export import latency_table as room
from metaprune.export.latency_table import LatencyTable, load_table, measure_table, table_for
from metaprune.graph import Network
from metaprune.planning import reachable_limits


@pytest.fixture(scope="module")
def network() -> Network:
    return mp.trace(zoo.build("cifar_resnet8"), zoo.example_inputs("cifar_resnet8"))


def table(network: Network, per_mac: float = 1e-7) -> LatencyTable:
    """A machine that takes time for work alone, in blocks of four."""
    count = room._described(network, np.array([[axis.size for axis in network.axes]]), 4).shape[1]
    kinds = (count - 2) // 3
    prices = np.array([per_mac] * kinds + [0.0] * (2 * kinds + 1) + [0.5])
    return LatencyTable(network, 4, prices, 0.01, 0.02, 8, "a machine")


def test_prices_are_for_work_in_whole_blocks(network: Network) -> None:
    known, dense = table(network), network.cost()
    timed = network.with_latency(known)
    assert timed.cost().latency_ms == pytest.approx(0.5 + 1e-7 * dense.macs, rel=0.02)  # the input has three channels
    assert network.cost().latency_ms is None
    name = next(axis.name for axis in network.axes if axis.prunable and axis.kind == "channel")
    levels = known.levels(name)
    assert list(levels) == [*range(4, network.axis(name).size, 4), network.axis(name).size]
    assert list(levels.values()) == sorted(levels.values())
    rows = np.repeat([[axis.size for axis in network.axes]], 2, axis=0)
    rows[:, network.index(name)] = [5, 8]
    assert len(set(timed.cost_many(rows).latency_ms.round(9))) == 1


def test_a_fit_recovers_prices_and_judges_itself_by_what_it_has_not_seen(network: Network) -> None:
    truth = table(network)
    sizes_NA = room._drawn(network, 32, 4, seed=0)
    described_NF, time_N, families_K = room._described(network, sizes_NA, 4), truth(sizes_NA), room._families(network)
    fitted = room._fitted(described_NF, time_N, families_K)
    np.testing.assert_allclose(described_NF @ fitted, time_N, rtol=1e-6)
    assert room._unseen(described_NF, time_N, families_K, 0).max() < 1e-3
    assert (fitted >= 0).all()
    noisy = time_N * (1 + 0.1 * np.random.default_rng(0).standard_normal(32))
    assert room._unseen(described_NF, noisy, families_K, 0).mean() > 0.03


def test_what_is_read_is_read_once_for_every_four_blocks_of_results() -> None:
    network = mp.trace(nn.Sequential(nn.Conv2d(4, 64, 1), nn.Conv2d(64, 32, 1)), torch.zeros(1, 4, 5, 5))
    described_NF = room._described(network, np.array([[size, 4, 32] for size in (16, 17, 32, 33, 64)]), 4)
    work, _, results = described_NF[0, :3]
    assert (work, results) == (25 * (4 * 16 + 16 * 32), 25 * (16 + 32))
    assert described_NF[:, 1].tolist() == [
        25 * (4 * passes + 2 * size) for passes, size in zip((1, 2, 2, 3, 4), (16, 20, 32, 36, 64))
    ]


def test_kernels_of_one_price_are_of_one_kind_and_kinds_alike_are_a_family() -> None:
    network = mp.trace(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1)),
        torch.zeros(1, 3, 5, 5),
    )
    kinds = [room._kind(kernel, network) for kernel in network.kernels]
    assert len(set(kinds)) == 3  # the depthwise one is not that of the first, though it is called at as many positions
    assert kinds[0][0] == kinds[2][0] != kinds[1][0]
    families = dict(zip(room._kinds(network), room._families(network).tolist()))
    assert families[kinds[0]] == families[kinds[2]] != families[kinds[1]]


def test_a_price_that_nothing_tells_is_that_of_the_family(network: Network) -> None:
    sizes_NA, families_K = room._drawn(network, 32, 4, seed=0), room._families(network)
    described_NF = room._described(network, sizes_NA, 4)
    kind = int(np.argmax(np.bincount(families_K)[families_K] > 1))
    silent_NF, time_N = described_NF.copy(), table(network)(sizes_NA)
    silent_NF[:, [kind, kind + len(families_K), kind + 2 * len(families_K)]] = 0  # no configuration has it
    time_N -= described_NF[:, kind] * 1e-7
    fitted = room._fitted(silent_NF, time_N, families_K)
    assert fitted[kind] == pytest.approx(1e-7, rel=0.3)


def test_a_time_is_a_budget(network: Network) -> None:
    timed = network.with_latency(table(network))
    dense = timed.cost().latency_ms
    for budget, limit in (("latency=0.6", 0.6 * dense), (f"latency_ms={0.7 * dense:.6f},params=0.9", 0.7 * dense)):
        plan = mp.plan(timed, budget, "l2", "rd", round_to=4)
        assert timed.cost_of(plan).latency_ms <= limit * (1 + 1e-6)
        assert timed.cost_of(plan).latency_ms > 0.8 * limit
        assert plan.made_by["budget"].startswith("latency")
    assert reachable_limits(timed, "latency=0.9") == {"latency_ms": pytest.approx(0.9 * dense)}
    with pytest.raises(BudgetError, match="latency_ms must reach"):
        mp.plan(timed, "latency_ms=0.01", "l2")
    with pytest.raises(ConfigError, match="met in one round"):
        mp.plan(timed, "latency=0.6", "l2", round_to=4, rounds=2, data=[(torch.zeros(2, 3, 32, 32),)])
    with pytest.raises(BudgetError, match="needs a table"):
        reachable_limits(network, "latency=0.5")


def test_a_table_is_kept(network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known, asked = table(network), []
    monkeypatch.setattr(room, "measure_table", lambda network, **options: asked.append(options) or known)
    assert table_for(network, tmp_path / "latency") is known
    again = table_for(network, tmp_path / "latency")
    assert len(asked) == 1
    rows = np.array([[axis.size for axis in network.axes]])
    np.testing.assert_array_equal(again(rows), known(rows))
    assert (again.machine, again.error_max, again.block) == ("a machine", 0.02, 4)
    (path,) = (tmp_path / "latency").iterdir()
    other = mp.trace(zoo.build("mlp"), zoo.example_inputs("mlp"))
    with pytest.raises(ConfigError, match="is that of one network"):
        load_table(path, other)
    path.write_text(json.dumps({"schema": 99}))
    with pytest.raises(InputError, match="schema 2"):
        load_table(path, network)


def test_what_cannot_be_measured_is_refused(network: Network) -> None:
    with pytest.raises(ConfigError, match="configurations >= 8"):
        measure_table(network, configurations=3)
    frozen = mp.trace(zoo.build("mlp"), zoo.example_inputs("mlp"), freeze="*")
    with pytest.raises(ConfigError, match="prunable axis"):
        measure_table(frozen)


@pytest.mark.long
def test_whole_networks_are_known_to_a_few_percent(network: Network) -> None:
    shares: list[float] = []
    known = measure_table(network, configurations=24, seconds=5, progress=shares.append)
    assert known.error_mean < 0.1
    assert shares == sorted(shares)
    assert network.with_latency(known).cost().latency_ms > 0
