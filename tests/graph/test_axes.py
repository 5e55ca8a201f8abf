"""Laws of the axis algebra, checked against a brute-force model: every way in which units can live or die."""

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metaprune.graph.axes import Dim, Units

pytestmark = pytest.mark.timeout(120)

SIZES = (1, 2, 3, 4, 6, 8, 12)
LIMIT = 24  # largest dimension made by merging
quick = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
thorough = settings(max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass
class World:
    """A history of moves, and what each of them promised."""

    units: Units = field(default_factory=Units)
    dims: list[Dim] = field(default_factory=list)
    equal: list[tuple[Dim, Dim]] = field(default_factory=list)
    products: list[tuple[Dim, list[Dim]]] = field(default_factory=list)
    whole: list[Dim] = field(default_factory=list)

    def step(self, data):
        move = data.draw(st.sampled_from(["fresh", "unify", "unify", "split", "merge", "concat", "take", "freeze"]))
        getattr(self, f"do_{move}")(data)

    def pick(self, data, keep=lambda dim: True):
        found = [dim for dim in self.dims if keep(dim)]
        return data.draw(st.sampled_from(found)) if found else None

    def do_fresh(self, data):
        size = data.draw(st.sampled_from(SIZES))
        bare = data.draw(st.integers(0, 5)) == 0
        self.dims.append(Dim(size, note="constant") if bare else self.units.dim(size))

    def do_unify(self, data):
        first = self.pick(data, lambda dim: dim.size > 1)
        other = first and self.pick(data, lambda dim: dim.size == first.size)
        if first:
            self.dims.append(self.units.unify([first, other], "a test"))
            self.equal.append((first, other))

    def do_split(self, data):
        dim = self.pick(data, lambda dim: dim.size > 1)
        if dim:
            divisors = [size for size in range(1, dim.size + 1) if dim.size % size == 0]
            options = [s for n in (2, 3) for s in itertools.product(divisors, repeat=n) if np.prod(s) == dim.size]
            parts = self.units.split(dim, data.draw(st.sampled_from(options)), "a test")
            self.products.append((dim, parts))
            self.dims.extend(parts)

    def do_merge(self, data):
        first = self.pick(data)
        other = first and self.pick(data, lambda dim: dim.size * first.size <= LIMIT)
        if other:
            merged = self.units.merge([first, other])
            self.products.append((merged, [first, other]))
            self.dims.append(merged)

    def do_concat(self, data):
        first = self.pick(data)
        other = first and self.pick(data, lambda dim: dim.size + first.size <= LIMIT)
        if other:
            self.dims.append(self.units.concat([first, other]))

    def do_take(self, data):
        dim = self.pick(data, lambda dim: dim.size > 1)
        if dim:
            index = data.draw(st.lists(st.integers(0, dim.size - 1), min_size=1, max_size=dim.size))
            self.dims.append(self.units.take(dim, np.array(index), "a test"))
            if len(index) == 1:
                self.whole.append(Dim(1, dim.labels_NK[index] if dim.labels_NK is not None else None))

    def do_freeze(self, data):
        dim = self.pick(data)
        if dim and data.draw(st.booleans()):
            self.units.freeze(dim, "a test")
            self.whole.append(dim)

    # ---- the brute-force model ---------------------------------------------------------------------------------------

    def alive(self, dim, living):
        if dim.labels_NK is None:
            return np.ones(dim.size, bool)
        return np.array([all(unit == 0 or unit in living for unit in row) for row in self.units.resolve(dim.labels_NK)])

    def free_units(self):
        pairs = (dim for pair in self.equal for dim in pair)
        grids = (dim for whole, parts in self.products for dim in (whole, *parts))
        dims = (*self.dims, *pairs, *grids, *self.whole)
        rows = [self.units.resolve(dim.labels_NK) for dim in dims if dim.labels_NK is not None]
        every = {int(unit) for row in rows for unit in row.ravel()} - {0}
        free = sorted(unit for unit in every if not self.units.reason(unit))
        return free, every - set(free)

    def livings(self, limit=64):
        """All ways to choose which free units live, or many of them at random."""
        free, frozen = self.free_units()
        if 2 ** len(free) <= limit:
            choices = itertools.product([True, False], repeat=len(free))
        else:
            choices = np.random.default_rng(0).random((limit, len(free))) < 0.6
        for choice in choices:
            yield frozen | {unit for unit, lives in zip(free, choice) if lives}

    def check(self):
        for living in self.livings():
            for first, other in self.equal:
                assert np.array_equal(self.alive(first, living), self.alive(other, living)), "unified dimensions differ"
            for dim, parts in self.products:
                grid = np.ones(1, bool)
                for part in parts:
                    grid = np.logical_and.outer(grid, self.alive(part, living)).ravel()
                assert np.array_equal(self.alive(dim, living), grid), "what is left is no grid"
            for dim in self.whole:
                assert self.alive(dim, living).all(), "a frozen position is gone"


@quick
@given(st.data(), st.integers(1, 14))
def test_every_promise_holds_for_every_choice_of_units(data, moves):
    world = World()
    for _ in range(3):
        world.do_fresh(data)
    for _ in range(moves):
        world.step(data)
    world.check()


@pytest.mark.long
@pytest.mark.timeout(1200)
@thorough
@given(st.data(), st.integers(5, 40))
def test_every_promise_holds_after_long_histories(data, moves):
    world = World()
    for _ in range(4):
        world.do_fresh(data)
    for _ in range(moves):
        world.step(data)
    world.check()


def patterns(world, *dims):
    """All sets of positions that can be left, over all choices of units."""
    return {tuple(np.concatenate([world.alive(dim, living) for dim in dims])) for living in world.livings(limit=4096)}


@quick
@given(st.data())
def test_unify_is_symmetric_and_idempotent(data):
    sizes = data.draw(
        st.sampled_from([((2, 3), (6,)), ((2, 3), (3, 2)), ((2, 2, 3), (4, 3)), ((6,), (6,)), ((2, 4), (4, 2))])
    )
    found = []
    for order in ((0, 1), (1, 0)):
        world = World()
        world.dims = [world.units.merge([world.units.dim(size) for size in side]) for side in sizes]
        met = [world.dims[k] for k in order]
        world.units.unify(met, "a test")
        once = patterns(world, *world.dims)
        world.units.unify(met, "a test")
        assert patterns(world, *world.dims) == once
        found.append(once)
    assert found[0] == found[1]


@quick
@given(st.sampled_from([(2, 3), (3, 2), (2, 2, 2), (1, 4), (4, 1), (2, 1, 3)]))
def test_split_then_merge_is_the_same_dimension(sizes):
    world = World()
    dim = world.units.dim(int(np.prod(sizes)))
    merged = world.units.merge(world.units.split(dim, sizes, "a test"))
    world.dims = [dim]
    assert np.array_equal(world.units.resolve(dim.labels_NK), world.units.resolve(merged.labels_NK))
    parts = world.units.split(merged, sizes, "a test")
    assert [part.size for part in parts] == list(sizes)
    assert len(patterns(world, dim)) == 1 + np.prod([2**size - 1 for size in sizes if size > 1])


def test_merge_then_split_gives_the_parts_back():
    world = World()
    parts = [world.units.dim(2), world.units.dim(3), world.units.dim(2)]
    again = world.units.split(world.units.merge(parts), [2, 3, 2], "a test")
    for part, other in zip(parts, again):
        assert np.array_equal(world.units.resolve(part.labels_NK), world.units.resolve(other.labels_NK))


def test_a_coarser_split_keeps_the_finer_units_free():
    """12 = 3 * 4 and 12 = 6 * 2 meet: 3 * 2 * 2 is left to choose from."""
    world = World()
    dim = world.units.dim(12)
    world.units.split(dim, [3, 4], "a test")
    world.units.split(dim, [6, 2], "a test")
    world.dims = [dim]
    free, frozen = world.free_units()
    assert not frozen
    assert len(free) == 3 + 2 + 2


def test_splits_that_share_no_grid_freeze_something_but_never_lie():
    """2 * 6 and 3 * 4 (as two groupings of one convolution): whatever is left must be both."""
    world = World()
    dim = world.units.dim(12)
    for sizes in ([2, 6], [3, 4]):
        world.products.append((dim, world.units.split(dim, sizes, "a test")))
    world.dims = [dim]
    world.check()
    assert len(patterns(world, dim)) > 1  # six of the twelve could leave in pairs


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_dimension_added_to_itself_rolled_falls_into_orbits(step):
    world = World()
    dim = world.units.dim(6)
    world.dims = [dim]
    world.units.unify([dim, world.units.take(dim, np.roll(np.arange(6), step), "a roll")], "an addition")
    assert len(world.free_units()[0]) == step


def test_a_unit_of_size_one_is_no_axis():
    units = Units()
    assert units.dim(1).labels_NK is None
    dim = units.dim(4)
    assert units.unify([Dim(1), dim, Dim(1)], "a test") is dim
    assert [part.size for part in units.split(dim, [1, 4, 1], "a test")] == [1, 4, 1]


def test_the_first_reason_stays():
    units = Units()
    dim = units.dim(3)
    units.freeze(dim, "first")
    units.freeze(dim, "second")
    other = units.dim(3)
    units.unify([dim, other], "a test")
    assert {units.reason(int(unit)) for unit in units.resolve(other.labels_NK).ravel()} == {"first"}


def test_a_dimension_of_fixed_size_freezes_what_it_meets():
    units = Units()
    dim = units.dim(3)
    units.unify([dim, Dim(3, note="a constant")], "add at layer")
    assert units.reason(int(units.resolve(dim.labels_NK)[0, 0])) == "a constant"


def test_ten_thousand_units_meet_in_no_time():
    units = Units()
    dim = units.dim(4096)
    for shift in (1, 2, 4):
        units.unify([dim, units.take(dim, np.roll(np.arange(4096), shift), "a roll")], "an addition")
    for sizes in ([64, 64], [32, 128], [2, 2048]):
        units.split(dim, sizes, "a test")
    big = units.merge([units.dim(64), units.dim(64)])
    units.unify([big, units.dim(4096)], "a test")
    assert len(np.unique(units.resolve(big.labels_NK))) <= 128
