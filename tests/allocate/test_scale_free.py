"""Allocators for which the scale of an axis plays no part, and the one that it decides."""

import pytest
import torch

from tests.allocate.problems import allocated, chain, drawn

NETWORK = chain(6, 20, 20, 20, 4)


@pytest.mark.parametrize("name", ["lamp", "flap", "sap", "erk", "uniform"])
def test_the_scale_of_an_axis_plays_no_part(name: str) -> None:
    scores = drawn(NETWORK)
    scaled = {axis: score_U * 10**k for k, (axis, score_U) in enumerate(scores.items())}
    for budget in (0.3, 0.6):
        # What the limits leave over is given back in the order of raw scores, so one unit may differ.
        a, b = (allocated(name, NETWORK, each, budget) for each in (scores, scaled))
        assert max(abs(a[axis] - b[axis]) for axis in a) <= 1


def test_global_thresholds_hang_on_it() -> None:
    scores = drawn(NETWORK)
    scaled = {axis: score_U * 10**k for k, (axis, score_U) in enumerate(scores.items())}
    for name in ("global", "global_mt"):
        assert allocated(name, NETWORK, scaled, 0.5) != allocated(name, NETWORK, scores, 0.5)


def test_standardising_forgets_the_offset_too() -> None:
    scores = drawn(NETWORK)
    moved = {axis: score_U + 3 * k for k, (axis, score_U) in enumerate(scores.items())}
    a, b = (allocated("flap", NETWORK, each, 0.4) for each in (scores, moved))
    assert max(abs(a[axis] - b[axis]) for axis in a) <= 1


def test_lamp_never_empties_an_axis() -> None:
    scores = drawn(NETWORK)
    scores = {axis: score_U * (1e-9 if k == 0 else 1) for k, (axis, score_U) in enumerate(scores.items())}
    kept = allocated("lamp", NETWORK, scores, 0.05)
    assert min(kept.values()) >= 1
    assert torch.tensor(list(kept.values())).double().std() < 4
