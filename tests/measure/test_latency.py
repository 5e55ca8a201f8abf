"""Latency says what is clear, and says no more than that."""

import json
from pathlib import Path

import numpy as np
import pytest

from metaprune.errors import ConfigError, InputError
from metaprune.measure.latency import _block_draws, judge, latency
from metaprune.measure.quantity import Quantity

QUICK = {"rounds": 120, "seconds": 0.4, "limit_s": 10.0}


def test_a_smaller_net_is_faster_and_a_file_is_like_itself(big: Path, small: Path) -> None:
    shares: list[float] = []
    result = latency([big, small, big], **QUICK, progress=shares.append)  # type: ignore[arg-type]
    cut, same = result.comparisons
    assert cut.verdict == "faster"
    assert cut.ratio.value < 0.5
    assert cut.cpu_ratio.value == pytest.approx(cut.ratio.value, rel=0.5)
    assert cut.speedup == pytest.approx(1 / cut.ratio.value)
    assert same.verdict in ("no difference", "too noisy")
    assert result.rounds >= 120
    assert result.processes == len(result.cores) == 4
    assert shares == sorted(shares)
    assert shares[-1] == 1
    record = json.loads(json.dumps(result.to_json()))
    for arm in record["arms"]:
        assert arm["minimum"]["value"] <= arm["p50"]["value"] <= arm["p95"]["value"] <= arm["p99"]["value"]
        for number in (arm["p50"], arm["p95"], record["control"], record["comparisons"][0]["ratio"]):
            assert number["n"] == result.rounds
            assert number["label"] == "measured"
            assert number["low"] <= number["value"] <= number["high"]


def test_the_other_way_round_is_slower(big: Path, small: Path) -> None:
    assert latency([small, big], **QUICK, processes=1).comparisons[0].verdict == "slower"  # type: ignore[arg-type]


def test_free_sizes_must_be_given(any_side: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'side' \(axis 2 of input 'x' in 'any_side.onnx'\)"):
        latency([any_side], **QUICK)  # type: ignore[arg-type]
    assert latency([any_side], sizes={"side": 8}, **QUICK, processes=1).comparisons == ()  # type: ignore[arg-type]


def test_what_is_no_onnx_is_refused(big: Path, tmp_path: Path) -> None:
    text, empty, cut = tmp_path / "text.onnx", tmp_path / "empty.onnx", tmp_path / "cut.onnx"
    text.write_text("I am no network.")
    empty.touch()
    cut.write_bytes(big.read_bytes()[:2000])
    for path, rule in [
        (text, "must load 'text.onnx'"),
        (empty, "is empty"),
        (cut, "must load 'cut.onnx'"),
        (tmp_path, "is a folder"),
        (tmp_path / "none.onnx", "not there"),
    ]:
        with pytest.raises(InputError, match=rule):
            latency([big, path], **QUICK)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"seconds": 0}, {"processes": 0}, {"batch": 0}, {"limit_s": -1}])
def test_numbers_out_of_range_are_refused(big: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        latency([big], **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least one file"):
        latency([])


@pytest.mark.parametrize(
    ("ratio", "resolution", "verdict"),
    [
        ((0.50, 0.40, 0.60), 0.01, "faster"),
        ((0.50, 0.40, 0.60), 0.20, "faster"),
        ((1.30, 1.20, 1.40), 0.05, "slower"),
        ((0.99, 0.985, 0.995), 0.02, "no difference"),
        ((0.97, 0.96, 0.98), 0.05, "too noisy"),
        ((0.80, 0.50, 1.10), 0.01, "too noisy"),
    ],
)
def test_verdicts(ratio: tuple[float, float, float], resolution: float, verdict: str) -> None:
    value, low, high = ratio
    assert judge(Quantity(value=value, unit="x", n=99, low=low, high=high), resolution)[0] == verdict


def test_blocks_stay_within_their_process() -> None:
    draws_SR = _block_draws([25, 40], np.random.default_rng(0))
    blocks = draws_SR.reshape(len(draws_SR), -1, 10)
    assert (np.diff(blocks, axis=2) == 1).all()
    assert set(np.unique(blocks[:, :, 0])) == {0, 10, 25, 35, 45, 55}


def test_processes_are_drawn_and_in_each_of_them_blocks() -> None:
    draws_SR = _block_draws([30, 30], np.random.default_rng(0))
    from_first = (draws_SR < 30).mean(axis=1)
    assert np.unique(from_first).tolist() == [0, 0.5, 1]
    assert 0.4 < (from_first == 0.5).mean() < 0.6
