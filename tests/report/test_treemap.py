"""Areas are exact, tile the whole, are convex and nested, and stay fat."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaprune.report.treemap import SQUARE, Polygon, area, aspect, centre, treemap


def convex(polygon: Polygon) -> bool:
    sides = np.roll(polygon, -1, 0) - polygon
    turns = sides[:, 0] * np.roll(sides, -1, 0)[:, 1] - sides[:, 1] * np.roll(sides, -1, 0)[:, 0]
    scale = area(polygon)
    return bool((turns >= -1e-9 * scale).all() or (turns <= 1e-9 * scale).all())


def inside(point: tuple[float, float], polygon: Polygon) -> bool:
    sides, to = np.roll(polygon, -1, 0) - polygon, np.array(point) - polygon
    turns = sides[:, 0] * to[:, 1] - sides[:, 1] * to[:, 0]
    return bool((turns > 0).all() or (turns < 0).all())


def check(weights: dict[str, float], most: float) -> None:
    areas = treemap(weights)
    total, whole = sum(weights.values()), area(SQUARE)
    assert list(areas) == [path for path, weight in weights.items() if weight > 0]
    for path, polygon in areas.items():
        assert area(polygon) == pytest.approx(whole * weights[path] / total, rel=1e-6)
        assert convex(polygon)
        assert aspect(polygon) < most
    assert sum(map(area, areas.values())) == pytest.approx(whole, rel=1e-9)
    for (_, one), (_, other) in itertools.islice(itertools.combinations(areas.items(), 2), 500):
        if area(one) > 1e-6:
            assert not inside(centre(one), other)


@given(exponents=st.lists(st.floats(-6, 6), min_size=1, max_size=20))
@settings(max_examples=40, deadline=None)
def test_any_weights_over_twelve_orders_of_magnitude(exponents: list[float]) -> None:
    check({f"leaf{k}": 10**exponent for k, exponent in enumerate(exponents)}, most=8)


@pytest.mark.parametrize(
    "weights",
    [
        [1.0] * 64,
        [2.0**-k for k in range(24)],
        [10.0**-k for k in range(9)],
        [1e6, 1],
        [1e6, *([1.0] * 20)],
    ],
)
def test_known_bad_cases_stay_fat(weights: list[float]) -> None:
    check({f"leaf{k}": weight for k, weight in enumerate(weights)}, most=6)


def test_children_lie_together() -> None:
    weights = {f"layer{i}.{j}.conv{k}": float(1 + i + j * k) for i in range(3) for j in range(3) for k in range(2)}
    check(weights, most=8)
    areas = treemap(weights)
    together = treemap(
        {f"layer{i}": sum(w for p, w in weights.items() if p.startswith(f"layer{i}.")) for i in range(3)}
    )
    for path, polygon in areas.items():
        assert inside(centre(polygon), together[path.partition(".")[0]])


def test_a_path_may_be_a_leaf_and_a_node() -> None:
    check({"block": 2.0, "block.inner": 3.0, "other": 0.0, "deep.er.still": 1.0}, most=8)
    assert treemap({"one": 5.0})["one"] is SQUARE
    assert treemap({}) == {}
