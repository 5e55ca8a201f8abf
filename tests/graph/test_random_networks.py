"""Laws that hold for every network, over random ones."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from torch import fx, nn

from metaprune.edits import Keep
from metaprune.errors import UnsupportedModelError
from metaprune.graph import Network, trace
from metaprune.plans import Plan
from tests.graph import oracle
from tests.graph.cases import Case
from tests.graph.random_networks import BLOCKS, Program, Step, draw_program, programs

TOLERANCE = 1e-9  # of the largest output, in float64
COUNTED_BY_NOBODY = {"recurrent", "bilinear"}  # torch's counter does not know them
COUNTED_OTHERWISE = {"mv", "dot", "addbmm", "batch_gram", "einsum_outer", "einsum_three", "einsum_sum"}
REORDERED = {"roll_all", "rotary", "stack_unbind", "ones_cat", "shift", "swap"}  # with ``move``

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
    pytest.mark.filterwarnings("ignore:index_reduce"),
]
quiet = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None, print_blob=False)


class Drawn:
    """A program, its dense network, and what the engine read off it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.case = Case("random", program.build, program.example)
        self.model, self.inputs = oracle.build(self.case)
        before = oracle.footprint(self.model)
        self.net = trace(self.model, self.inputs)
        oracle.same_footprint(before, oracle.footprint(self.model))
        with torch.no_grad():
            self.dense = oracle.call(self.model, self.inputs)

    def fresh(self) -> nn.Module:
        return oracle.build(self.case)[0]


class Refused(Exception):
    """A cut that torch itself would refuse, or that the engine did."""


def cut(net: Network, plan: Plan) -> nn.Module:
    try:
        return net.apply(plan)
    except UnsupportedModelError as error:
        raise Refused(str(error)) from error


@torch.no_grad()
def check(drawn: Drawn, seed: int = 0) -> None:
    """Every law for one network."""
    net = drawn.net
    assert not net._layout.trace.failed_rules
    cost_is_counted(drawn, drawn.model, net.cost())
    graph_is_lossless(drawn)
    if not any(axis.prunable for axis in net.axes):
        return
    for fraction in (0.3, 0.6):
        slim_is_masked(drawn, seed, fraction)
    plan = oracle.random_plan(net, seed)
    slim = cut(net, plan)
    oracle.kept_positions(drawn.model, slim)
    assert net.verify(plan, slim=slim).max_error <= TOLERANCE
    cost_is_counted(drawn, slim, net.cost(net.sizes(plan)))
    two_steps_are_one(drawn, seed)
    units_change_places(drawn)


def graph_is_lossless(drawn: Drawn) -> None:
    state, wanted = drawn.net.from_graph(drawn.net.to_graph()), drawn.model.state_dict()
    assert list(state) == list(wanted)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in state.items())


def slim_is_masked(drawn: Drawn, seed: int, fraction: float) -> None:
    exact = [axis for axis in drawn.net.axes if axis.prunable and axis.exact]
    plan = oracle.random_plan(drawn.net, seed, fraction, exact)
    if plan.edits:
        slim = cut(drawn.net, plan)
        masked = oracle.masked(drawn.fresh(), oracle.kept_positions(drawn.model, slim))
        assert oracle.difference(oracle.call(masked, drawn.inputs), oracle.call(slim, drawn.inputs)) <= TOLERANCE


def cost_is_counted(drawn: Drawn, model: nn.Module, cost: Any) -> None:
    assert cost.params == sum(tensor.numel() for tensor in model.parameters())
    blocks = {step.block for step in drawn.program.steps}
    names = {step.options.get("name") for step in drawn.program.steps}
    by_einsum = "einsum" in blocks and ("again" in blocks or model is not drawn.model)  # over a size of 1: no product
    if blocks & COUNTED_BY_NOBODY or names & COUNTED_OTHERWISE or by_einsum:
        return
    batch = len(drawn.inputs[0])
    assert cost.macs * batch == pytest.approx(oracle.counted_macs(model, drawn.inputs), abs=batch / 2)


def units_change_places(drawn: Drawn) -> None:
    """Permuting the units of a free axis leaves the outputs as they are."""
    try:
        learnt = oracle.positions_of_units(drawn.net, drawn.model)
    except UnsupportedModelError as error:
        raise Refused(str(error)) from error
    names = {step.options.get("name") for step in drawn.program.steps}
    moved = bool(names & REORDERED) or any(step.block == "move" for step in drawn.program.steps)
    for axis in drawn.net.axes:
        if moved and any(len(at) > 1 for units in learnt.get(axis.name, {}).values() for at in units.values()):
            continue  # which of two positions of one unit goes with which of another cannot be told
        floating = all(oracle.named(drawn.model)[name].is_floating_point() for name, _ in axis.bindings)
        if axis.name in learnt and floating:
            order = np.roll(np.random.default_rng(0).permutation(axis.size), 1)
            after = oracle.call(oracle.permuted(drawn.fresh(), learnt[axis.name], order), drawn.inputs)
            assert oracle.difference(drawn.dense, after) <= TOLERANCE, axis


def two_steps_are_one(drawn: Drawn, seed: int) -> None:
    """Cutting a network that was cut before is cutting it once, where the same units leave."""
    net, choose = drawn.net, np.random.default_rng(seed)
    first = {
        axis.name: some(choose, axis.size, 0.75, at_least=2) for axis in net.axes if axis.prunable and axis.size > 2
    }
    if not first:
        return
    once = cut(net, keeping(net, first))
    again = trace(once, drawn.inputs)
    kept = oracle.kept_positions(drawn.model, once)
    homes = places_of_units(net, None)
    left = {name: set(range(net.axis(name).size)) for name in (axis.name for axis in net.axes if axis.prunable)}
    left.update({name: set(ranks) for name, ranks in first.items()})
    units: dict[Any, list[Any]] = {}
    for unit, places in homes.items():
        if unit[1] in left[unit[0]]:
            here = frozenset((name, k, at) for name, k, at in places if name in kept and at in kept[name][k])
            units.setdefault(here, []).append(unit)
    homes_again = places_of_units(again, kept)
    second = {}
    for axis in again.axes:
        found = [units.get(frozenset(homes_again.get((axis.name, rank), ())), []) for rank in range(axis.size)]
        if axis.prunable and all(len(match) == 1 for match in found):  # it is an axis of the dense network too
            second[axis.name] = some(choose, axis.size, 0.6, at_least=1)
            for rank in set(range(axis.size)) - set(second[axis.name]):
                left[found[rank][0][0]].discard(found[rank][0][1])
    if not second:
        return
    twice = cut(again, keeping(again, second))
    at_once = cut(net, keeping(net, {name: sorted(ranks) for name, ranks in left.items()}))
    one, two = oracle.kept_positions(drawn.model, at_once), oracle.kept_positions(drawn.model, twice)
    for name in one.keys() & two.keys():
        assert [list(line) for line in one[name]] == [list(line) for line in two[name]], name
    if all(axis.exact for axis in net.axes if axis.prunable):
        assert oracle.difference(oracle.call(at_once, drawn.inputs), oracle.call(twice, drawn.inputs)) <= TOLERANCE


def some(choose: np.random.Generator, size: int, fraction: float, at_least: int) -> list[int]:
    return sorted(choose.choice(size, max(at_least, round(size * fraction)), replace=False).tolist())


def keeping(net: Network, ranks: dict[str, list[int]]) -> Plan:
    return Plan(tuple(Keep(name, net.axis(name).size, tuple(kept)) for name, kept in ranks.items()))


def places_of_units(net: Network, kept: oracle.Kept | None) -> dict[tuple[str, int], set[tuple[str, int, int]]]:
    """Where every prunable unit lies in the parameters, by positions in the dense network."""
    layout, places = net._layout, {}
    for name, value in layout.trace.parameters.items():
        if not value.dtype.is_floating_point or (kept is not None and name not in kept):
            continue
        for k, dim in enumerate(value.dims):
            for at, row in enumerate(() if dim.labels_NK is None else layout.resolve(dim)):
                for unit in row[layout.axis_of[row] >= 0]:
                    axis = net.axes[layout.axis_of[unit]]
                    if axis.prunable:
                        here = at if kept is None else int(kept[name][k][at])
                        places.setdefault((axis.name, int(layout.rank_of[unit])), set()).add((name, k, here))
    return places


def law(program: Program) -> None:
    drawn = Drawn(program)
    event("prunable" if any(axis.prunable for axis in drawn.net.axes) else "all frozen")
    try:
        check(drawn)
    except Refused as refusal:  # how often is counted below
        event(f"refused: {str(refusal)[:60]}")


@settings(quiet, max_examples=50, derandomize=True)
@given(programs())
def test_laws_hold_for_random_networks(program):
    law(program)


@pytest.mark.long
@pytest.mark.timeout(3600)
@settings(quiet, max_examples=1000)
@given(programs(longest=14))
def test_laws_hold_for_many_random_networks(program):
    law(program)


class Rolled:
    """Choices made by a random generator."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def one(self, items: Sequence[Any]) -> Any:
        return self.random.choice(list(items))


@pytest.mark.parametrize("count", [80, pytest.param(800, marks=pytest.mark.long)])
def test_most_random_networks_can_be_pruned(count):
    """The laws would hold of frozen networks too; some are drawn whose only free layers lead nowhere."""
    seen, blocks = Counter(), Counter()
    for seed in range(count):
        drawn = Drawn(draw_program(Rolled(seed)))
        blocks.update(step.block for step in drawn.program.steps)
        plan = oracle.random_plan(drawn.net, seed)
        seen["prunable"] += bool(plan.edits)
        try:
            seen["rewritten"] += isinstance(drawn.net.apply(plan), fx.GraphModule)
        except UnsupportedModelError:
            seen["refused"] += 1
    assert seen["prunable"] >= 0.75 * count
    assert seen["refused"] <= 0.03 * count
    assert seen["rewritten"] >= 0.05 * count
    assert len(blocks) >= 0.9 * len(BLOCKS)


def test_a_plan_of_a_random_network_is_saved_and_loaded(tmp_path):
    for seed in range(10):
        net = Drawn(draw_program(Rolled(seed))).net
        plan = oracle.random_plan(net, seed)
        plan.save(tmp_path / str(seed))
        assert Plan.load(tmp_path / str(seed)) == plan


def test_a_program_prints_as_what_builds_it():
    for seed in range(20):
        program = draw_program(Rolled(seed))
        assert eval(repr(program), {"Program": Program, "Step": Step}) == program


def test_the_same_program_gives_the_same_network():
    for seed in range(5):
        program = draw_program(Rolled(seed))
        one, other = Drawn(program), Drawn(program)
        assert one.net.fingerprint == other.net.fingerprint
        assert all(torch.equal(a, b) for a, b in zip(one.dense, other.dense, strict=True))


def test_a_call_without_a_rule_freezes_what_it_touches():
    odd = Step("rare", (1,), {"name": "odd"})
    net = Drawn(Program(((6,),), (Step("linear", (0,), {"out": 8, "bias": True}), odd), (2,))).net
    (axis,) = (axis for axis in net.axes if ("blocks.0.weight", 0) in axis.bindings)
    assert not axis.prunable
    assert "metaprune_tests::odd" in axis.reason
