"""Rounds that follow the PQ index."""

import numpy as np
import pytest
import torch

from metaprune.allocate import ALLOCATORS, Problem
from metaprune.allocate._paths import by_share
from metaprune.errors import ConfigError
from tests.allocate.problems import allocated, chain, drawn

NETWORK = chain(6, 20, 20, 20, 4)


def test_with_the_paper_s_options_a_round_removes_the_share_that_the_index_says() -> None:
    scores = np.sort(np.random.default_rng(0).uniform(0.1, 1, 40))[::-1]
    index = 1 - np.sqrt(scores).sum() ** 2 / scores.sum() / len(scores)  # d^(1 - 2) |s|_0.5 / |s|_1
    assert ALLOCATORS["sap"]()._after(scores, 40.0) == 40 - np.floor(40 * index)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("p", "q", "eta", "gamma", "beta"),
    [(0.5, 1, 0.4, 1, 0.9), (0.5, 1, 0, 2.5, 0.9), (0.5, 1, 0, 5, 0.3), (1, 2, 0.1, 0.5, 0.9), (0.3, 0.8, 0, 1, 0.9)],
)
def test_a_round_removes_what_the_options_say(p: float, q: float, eta: float, gamma: float, beta: float) -> None:
    scores = np.sort(np.random.default_rng(0).uniform(0, 1, 50) ** 3)[::-1]
    d = len(scores)
    norm_p, norm_q = ((scores**order).sum() ** (1 / order) for order in (p, q))
    index = 1 - d ** (1 / q - 1 / p) * norm_p / norm_q
    r = d * ((1 + eta) ** -1 * (1 - index) ** p) ** (q / (q - p))
    sap = ALLOCATORS["sap"](p=p, q=q, eta=eta, gamma=gamma, beta=beta)
    removed = np.floor(d * min(gamma * (1 - r / d), beta))
    assert 0 < removed <= beta * d
    assert sap._after(scores, float(d)) == d - removed  # type: ignore[attr-defined]


def test_bolder_options_remove_more_and_beta_bounds_a_round() -> None:
    scores = np.sort(np.random.default_rng(1).uniform(0, 1, 200) ** 2)[::-1]

    def removed(**options: float) -> list[float]:
        ((name, values),) = options.items()
        return [200 - ALLOCATORS["sap"](**{name: value})._after(scores, 200.0) for value in values]

    for name, values in (("eta", (0.0, 0.1, 0.5, 2.0)), ("gamma", (0.1, 0.5, 1.0, 2.0)), ("beta", (0.01, 0.05, 0.1))):
        counts = removed(**{name: values})
        assert counts == sorted(set(counts)), name
    assert removed(beta=(0.05,)) == [10]


def test_rounds_are_taken_until_the_limits_hold_or_they_are_over() -> None:
    """Then all axes go on alike, from where the rounds left them."""
    scores, limits = drawn(NETWORK), {"macs": 0.15 * NETWORK.cost().macs}
    asked = Problem(NETWORK, scores, limits, floor=0.0)
    after = dict.fromkeys(scores, 20.0)
    seen = []
    for rounds in (1, 2, 3, 30, 60):
        sizes = ALLOCATORS["sap"](rounds=rounds)._sizes(asked)  # type: ignore[call-arg]
        seen.append(sizes.tolist())
        assert asked.fits(sizes)
        if rounds <= 3:
            for name, score_U in scores.items():
                after[name] = ALLOCATORS["sap"]()._after(score_U.sort(descending=True).values.numpy(), after[name])  # type: ignore[attr-defined]
            assert not asked.fits(asked.sizes(after))
            alike = by_share(asked, lambda place: {name: min(1.0, count / 20) for name, count in after.items()})
            assert seen[-1] == alike.tolist()
    assert seen[-1] == seen[-2]
    assert seen[0] != seen[-1]


def test_sparse_axes_lose_more_than_even_ones() -> None:
    scores = drawn(NETWORK)
    first, second, third = scores
    scores[first] = torch.full((20,), 1.0).double() + 0.01 * scores[first]
    scores[second] = torch.cat([torch.full((14,), 1e-3), torch.ones(6)]).double() + 1e-4 * scores[second]
    kept = allocated("sap", NETWORK, scores, 0.5)
    assert kept[first] == 20
    assert kept[second] < kept[third]


def test_equal_scores_leave_axes_alike() -> None:
    scores = {axis: torch.ones(20).double() for axis in drawn(NETWORK)}
    kept = allocated("sap", NETWORK, scores, 0.4)
    assert max(kept.values()) - min(kept.values()) <= 2  # what is left over goes to the first


@pytest.mark.parametrize("options", [{"p": 2.0}, {"eta": -1.0}, {"gamma": 0.0}, {"beta": 1.0}, {"rounds": 0}])
def test_numbers_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must hold"):
        ALLOCATORS["sap"](**options)
