"""Rounds that follow the PQ index."""

import numpy as np
import pytest
import torch

from metaprune.allocate import ALLOCATORS
from metaprune.errors import ConfigError
from tests.allocate.problems import allocated, chain, drawn

NETWORK = chain(6, 20, 20, 20, 4)


def test_with_the_paper_s_options_a_round_removes_the_share_that_the_index_says() -> None:
    scores = np.sort(np.random.default_rng(0).uniform(0.1, 1, 40))[::-1]
    index = 1 - np.sqrt(scores).sum() ** 2 / scores.sum() / len(scores)  # d^(1 - 2) |s|_0.5 / |s|_1
    assert ALLOCATORS["sap"]()._after(scores, 40.0) == 40 - np.floor(40 * index)  # type: ignore[attr-defined]


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
