"""Every hard case against an oracle that shares no code with the engine."""

import contextlib
import copy
import re
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from metaprune.errors import UnsupportedModelError
from metaprune.graph import Axis, Network, trace
from tests.graph import oracle
from tests.graph.cases import CASES, Case

pytestmark = [
    pytest.mark.timeout(20),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
]

every_case = pytest.mark.parametrize("name", list(CASES))
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 6))]


@cache
def _traced(name: str) -> tuple[nn.Module, Any, Network | Exception]:
    model, inputs = oracle.build(CASES[name])
    try:
        return model, inputs, trace(model, inputs)
    except Exception as error:
        return model, inputs, error


def traced(name: str) -> tuple[Case, nn.Module, Any, Network]:
    """A case, its network, its inputs and its trace; what cannot be traced fails in the first test alone."""
    model, inputs, net = _traced(name)
    if isinstance(net, Exception):
        pytest.skip("not traced, see test_tracing_leaves_the_network_as_it_was")
    return CASES[name], model, inputs, net


def tolerance(name: str) -> float:
    """Relative; weights are divided by a small difference in spectral norms (in float64 they agree to 1e-12)."""
    return {"half_precision": 3e-2, "spectral_norm": 1e-3, "spectral_norm_old": 1e-3}.get(name, 1e-4)


def places(model: nn.Module, dimension: str) -> set[tuple[str, int]]:
    """A dimension under every name that its tensor has."""
    name, _, k = dimension.rpartition(":")
    tensors = oracle.named(model)
    return {(other, int(k)) for other, tensor in tensors.items() if tensor is tensors[name]}


def cut(name: str, net: Network, plan: Any, *, must: bool = False) -> nn.Module:
    """The cut network; a refusal fails in one test of each case alone, and there only if the case may not refuse."""
    if not plan.edits:
        pytest.skip("nothing to cut in this way")
    try:
        return net.apply(plan)
    except UnsupportedModelError as error:
        if must:
            if not CASES[name].may_refuse:
                raise
            if not re.search(r"\w+ at [\w ]+", str(error)):
                pytest.fail(f"the refusal names no call and place: {error}")
        return pytest.skip("refused, see test_the_cut_network_is_the_masked_one")


@every_case
def test_tracing_leaves_the_network_as_it_was(name):
    case = CASES[name]
    model, inputs = oracle.build(case)
    model.train(name == "in_training_mode")
    given = copy.deepcopy(inputs)
    before = oracle.footprint(model)
    try:
        net = trace(model, inputs)
    except UnsupportedModelError:
        oracle.same_footprint(before, oracle.footprint(model))
        if not case.may_refuse:
            raise
        return
    with contextlib.suppress(UnsupportedModelError):
        net.apply(oracle.random_plan(net, 0))
    oracle.same_footprint(before, oracle.footprint(model))
    for was, now in zip(oracle.tensors(given), oracle.tensors(inputs)):
        assert torch.equal(was, now)


@every_case
def test_what_must_be_free_is_free(name):
    case, model, _, net = traced(name)
    free = {binding for axis in net.axes if axis.prunable for binding in axis.bindings}
    reasons = {binding: axis.reason for axis in net.axes for binding in axis.bindings}
    missed = {
        dimension: next((reasons[place] for place in places(model, dimension) if place in reasons), "on no axis")
        for dimension in case.free
        if not places(model, dimension) & free
    }
    assert not missed


@every_case
def test_what_must_stay_stays(name):
    case, model, _, net = traced(name)
    free = {binding for axis in net.axes if axis.prunable for binding in axis.bindings}
    assert not [dimension for dimension in case.stuck if places(model, dimension) & free]


@every_case
def test_changing_statistics_are_flagged(name):
    case, model, _, net = traced(name)
    free = [axis for axis in net.axes if axis.prunable]
    for dimension in case.changes:
        here = [axis for axis in free if places(model, dimension) & set(axis.bindings)]
        assert not here or any(axis.changes for axis in here), dimension


@every_case
def test_axes_are_well_formed(name):
    _, model, _, net = traced(name)
    assert len({axis.name for axis in net.axes}) == len(net.axes)
    for axis in net.axes:
        assert axis.prunable or axis.reason, axis
        assert axis.size > 0
        assert axis.bindings, axis
        for parameter, dimension in axis.bindings:
            assert dimension < oracle.named(model)[parameter].ndim
    assert not net._layout.trace.failed_rules


@every_case
@pytest.mark.parametrize("seed", SEEDS)
def test_the_cut_network_is_the_masked_one(name, seed):
    case, model, inputs, net = traced(name)
    exact = [axis for axis in net.axes if axis.prunable and not axis.changes]
    plan = oracle.random_plan(net, seed, 0.6 if seed == 1 else 0.3, exact)
    slim = cut(name, net, plan, must=True)
    kept = oracle.kept_positions(model, slim)
    with torch.no_grad():
        wanted = oracle.call(oracle.masked(oracle.build(case)[0], kept, case.never_zero), inputs)
        assert oracle.difference(wanted, oracle.call(slim, inputs)) <= tolerance(name)


@every_case
@pytest.mark.parametrize("seed", SEEDS)
def test_the_engine_verifies_what_it_cut(name, seed):
    _, model, _, net = traced(name)
    plan = oracle.random_plan(net, seed)
    slim = cut(name, net, plan)
    oracle.kept_positions(model, slim)
    assert net.verify(plan, slim=slim).max_error <= tolerance(name)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.by_hand])
@pytest.mark.parametrize("seed", SEEDS)
def test_where_statistics_change_the_cut_network_is_the_one_made_by_hand(name, seed):
    case, model, inputs, net = traced(name)
    slim = cut(name, net, oracle.random_plan(net, seed))
    oracle.kept_positions(model, slim)
    with torch.no_grad():
        wanted = oracle.call(oracle.by_hand(case, slim), inputs)
        assert oracle.difference(wanted, oracle.call(slim, inputs)) <= 1e-4


@every_case
def test_units_of_a_free_axis_can_change_places(name):
    case, model, inputs, net = traced(name)
    try:
        learnt = oracle.positions_of_units(net, model, prove_all=False)
    except UnsupportedModelError as error:
        pytest.skip(f"refused: {error}")
    with torch.no_grad():
        before = oracle.call(model, inputs)
        for axis in net.axes:
            if axis.name in learnt and _can_be_permuted(model, axis):
                order = np.roll(np.random.default_rng(0).permutation(axis.size), 1)
                after = oracle.call(oracle.permuted(oracle.build(case)[0], learnt[axis.name], order), inputs)
                assert oracle.difference(before, after) <= tolerance(name), axis


def _can_be_permuted(model: nn.Module, axis: Axis) -> bool:
    """Integers may be positions, which would change too; entries that repeat were not learnt."""
    tensors = [oracle.named(model)[name] for name, _ in axis.bindings]
    return all(tensor.is_floating_point() and len(tensor.unique()) == tensor.numel() for tensor in tensors)


@every_case
def test_cost_is_what_torch_counts(name):
    case, model, inputs, net = traced(name)
    first = oracle.tensors(inputs)[0]
    assert net.cost().params == sum(tensor.numel() for tensor in model.parameters())
    assert net.cost().bytes == sum(t.nbytes for t in {id(t): t for t in oracle.named(model).values()}.values())
    if case.counted:
        assert net.cost().macs * len(first) == pytest.approx(oracle.counted_macs(model, inputs), abs=len(first) / 2)
    plan = oracle.random_plan(net, 0)
    slim, cost = cut(name, net, plan), net.cost(net.sizes(plan))
    assert cost.params == sum(tensor.numel() for tensor in slim.parameters())
    own = {id(t): t for key, t in oracle.named(slim).items() if not key.startswith("constant_")}
    assert cost.bytes == sum(tensor.nbytes for tensor in own.values())
    if case.counted:
        assert cost.macs * len(first) == pytest.approx(oracle.counted_macs(slim, inputs), abs=len(first) / 2)


@every_case
def test_the_cut_network_goes_on_training(name):
    _, model, inputs, net = traced(name)
    slim = cut(name, net, oracle.random_plan(net, 0))
    before, after = oracle.named(model), oracle.named(slim)
    modes, own = ({path: module.training for path, module in m.named_modules()} for m in (model, slim))
    assert {path: mode for path, mode in own.items() if modes.get(path, mode) != mode} == {}
    assert set(own.values()) <= set(modes.values())
    for key, tensor in before.items():
        assert after[key].requires_grad == tensor.requires_grad, key
    for key in before:
        assert {other for other in before if before[other] is before[key]} == {
            other for other in after if after[other] is after[key]
        }, f"{key} is not tied as it was"
    shared = {tensor.data_ptr() for tensor in before.values() if tensor.numel()}
    assert not [key for key, tensor in after.items() if tensor.numel() and tensor.data_ptr() in shared]
    if not _trains(model, inputs):
        return
    slim.train()
    sum(out.float().square().sum() for out in oracle.call(slim, inputs) if out.is_floating_point()).backward()


def _trains(model: nn.Module, inputs: Any) -> bool:
    """The dense network itself can take a step."""
    try:
        twin = copy.deepcopy(model).train()
        sum(out.float().square().sum() for out in oracle.call(twin, inputs) if out.is_floating_point()).backward()
    except Exception:
        return False
    return True
