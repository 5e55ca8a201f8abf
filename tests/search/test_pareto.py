"""Fronts against the obvious definition."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from metaprune.search.pareto import Point, as_csv, best, dominates, progress, ranks, unchanged, volume

ROWS = st.integers(1, 3).flatmap(
    lambda goals: st.lists(st.lists(st.integers(0, 4), min_size=goals, max_size=goals), min_size=1, max_size=12)
)


def beats(one: list[int], other: list[int]) -> bool:
    return all(a <= b for a, b in zip(one, other)) and one != other


@given(ROWS)
def test_ranks_are_fronts_of_what_is_left(rows: list[list[int]]) -> None:
    found = ranks(np.array(rows, float)).tolist()
    left, rank = list(range(len(rows))), 0
    while left:
        front = [k for k in left if not any(beats(rows[j], rows[k]) for j in left)]
        assert [found[k] for k in front] == [rank] * len(front)
        left, rank = [k for k in left if k not in front], rank + 1


@given(ROWS)
def test_dominance_is_strict(rows: list[list[int]]) -> None:
    found = dominates(np.array(rows, float))
    assert found.tolist() == [[beats(one, other) for other in rows] for one in rows]


@given(ROWS, st.integers(1, 12))
def test_the_best_are_of_the_first_fronts(rows: list[list[int]], count: int) -> None:
    losses = np.array(rows, float)
    chosen, of = best(losses, count), ranks(losses)
    assert len(chosen) == min(count, len(rows))
    left = [of[k] for k in range(len(rows)) if k not in chosen]
    assert not left or max(of[chosen]) <= min(left)


@given(ROWS)
def test_a_front_is_unchanged_since_the_last_row_that_nothing_before_equals_or_beats(rows: list[list[int]]) -> None:
    def on_the_front(k: int) -> bool:
        return not any(beats(row, rows[k]) or row == rows[k] for row in rows[:k])

    last = max(k for k in range(len(rows)) if on_the_front(k))
    assert unchanged(np.array(rows, float)) == len(rows) - 1 - last


def test_equal_rows_take_no_place_from_others() -> None:
    rows = np.array([[3.0, 1.0], [3.0, 1.0], [1.0, 3.0], [2.0, 2.0]])
    assert best(rows, 2) == [0, 2]
    assert best(rows, 3) == [0, 2, 3]
    assert best(rows, 4) == [0, 1, 2, 3]


def test_nothing_is_the_best_of_nothing() -> None:
    assert best(np.zeros((0, 2)), 3) == []


def test_a_table_has_a_line_a_point() -> None:
    point = Point(
        key="k", number=3, origin="rd", fidelity="0-evaluate", config={"budget": "macs=0.5"},
        metrics={"accuracy": 9.5}, feasible=True, gains={"uniform": None},
    )  # fmt: skip
    lines = as_csv([point, point]).splitlines()
    assert lines[0] == "key,trial,origin,fidelity,feasible,front,budget,accuracy,gain_over_uniform"
    assert lines[1:] == ["k,3,rd,0-evaluate,True,False,macs=0.5,9.5,"] * 2


@given(ROWS)
def test_the_volume_is_that_of_the_cells_that_are_beaten(rows: list[list[int]]) -> None:
    goals = len(rows[0])
    cells = [
        cell
        for cell in itertools.product(range(5), repeat=goals)
        if any(all(a <= c for a, c in zip(r, cell)) for r in rows)
    ]
    assert volume(np.array(rows, float), np.full(goals, 5.0)) == len(cells)


@given(ROWS)
def test_a_front_never_loses_worth(rows: list[list[int]]) -> None:
    found = progress(np.array(rows, float))
    assert found == sorted(found)
    assert found[-1] == 1.0
    for k in range(1, len(rows)):
        beaten = any(all(a <= b for a, b in zip(row, rows[k])) for row in rows[:k])
        assert not beaten or found[k] == found[k - 1]
