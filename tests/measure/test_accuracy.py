"""Accuracy, its interval, and paired differences, against slow and obvious references."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import Tensor, nn

from metaprune.errors import InputError
from metaprune.measure.accuracy import accuracy, compare, of_hits


@dataclass
class Points:
    """A split of points in the plane; the label says which of the two coordinates is larger."""

    x: Tensor
    y: Tensor
    name: str = "validation"

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.x.split(batch_size), self.y.split(batch_size))


def points(n: int = 103) -> Points:
    x = torch.randn(n, 2)
    return Points(x, x.argmax(1))


def test_every_sample_counts_once_in_the_order_of_the_split() -> None:
    split = points()
    split.y[[3, 50]] = 1 - split.y[[3, 50]]
    seen: list[tuple[int, int]] = []
    result = accuracy(nn.Identity().eval(), split, batch_size=20, progress=lambda *done: seen.append(done))
    assert np.flatnonzero(~result.correct).tolist() == [3, 50]
    assert (result.n, result.split) == (103, "validation")
    assert result.top1 == pytest.approx(100 * 101 / 103)
    assert seen == [(20, 103), (40, 103), (60, 103), (80, 103), (100, 103), (103, 103)]
    record = json.loads(json.dumps(result.to_json()))
    assert {"value", "unit", "n", "low", "high", "spread", "label", "split"} <= record.keys()


def test_batch_size_changes_nothing() -> None:
    split, net = points(), nn.Linear(2, 3).eval()
    assert (accuracy(net, split, batch_size=7).correct == accuracy(net, split, batch_size=500).correct).all()


@pytest.mark.parametrize(
    ("predict", "rule"),
    [
        (lambda x: x[:, 0], "shape"),
        (lambda x: x[:-1], "shape"),
        (lambda x: x / 0, "finite"),
        (nn.Sequential(nn.Linear(2, 2)), "training mode"),
    ],
)
def test_what_is_no_accuracy_is_refused(predict: object, rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        accuracy(predict, points())  # type: ignore[arg-type]


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        accuracy(nn.Identity().eval(), points(0))


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_is_wilsons(case: tuple[int, int]) -> None:
    right, n = case
    result = of_hits(np.arange(n) < right, "test")
    reference = binomtest(right, n).proportion_ci(method="wilson")
    assert result.low == pytest.approx(100 * reference.low, abs=1e-9)
    assert result.high == pytest.approx(100 * reference.high, abs=1e-9)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 40))
def test_the_probability_is_the_exact_binomial_one(lost: int, won: int, same: int) -> None:
    first = of_hits(np.array([True] * lost + [False] * won + [True] * same + [False]), "test")
    second = of_hits(np.array([False] * lost + [True] * won + [True] * same + [False]), "test")
    paired = compare(first, second)
    reference = binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert paired.p == pytest.approx(reference, rel=1e-9)
    assert paired.difference == pytest.approx(second.top1 - first.top1)
    assert paired.low <= paired.difference <= paired.high or not lost + won
    mirrored = compare(second, first)
    assert (mirrored.low, mirrored.high) == pytest.approx((-paired.high, -paired.low))


def test_many_disagreements_do_not_underflow() -> None:
    first, second = np.arange(20000) < 10500, np.arange(20000) >= 10500
    assert 0 < compare(of_hits(first, "t"), of_hits(second, "t")).p < 1e-10


def test_the_paired_interval_covers_the_truth() -> None:
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        kind = rng.choice(4, size=300, p=[0.85, 0.06, 0.03, 0.06])  # both, first alone, second alone, none
        paired = compare(of_hits(kind < 2, "t"), of_hits((kind == 0) | (kind == 2), "t"))
        covered += paired.low <= -3.0 <= paired.high
    assert covered / 400 > 0.92


def test_other_samples_cannot_be_compared() -> None:
    one = of_hits(np.ones(5, bool), "test")
    with pytest.raises(InputError, match="same samples"):
        compare(one, of_hits(np.ones(6, bool), "test"))
    with pytest.raises(InputError, match="same samples"):
        compare(one, of_hits(np.ones(5, bool), "train"))
