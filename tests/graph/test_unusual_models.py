"""Models and inputs that few write: each works exactly, or is refused with the module's name and the reason.

Those that work have a case each in ``cases.py``; here are those that are refused, and those that need a look of their
own.
"""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metaprune.errors import InputError, UnsupportedModelError
from metaprune.graph import trace
from tests.graph import oracle
from tests.graph.cases import CASES, Head, conv

plain = CASES["plain"].make


class Linears(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class IsItsOwnCopy(Linears):
    def __deepcopy__(self, memo):
        return self


class CopiesByStateDict(Linears):
    def __deepcopy__(self, memo):
        new = type(self)()
        new.load_state_dict(self.state_dict())
        return new


@pytest.mark.parametrize("made", [IsItsOwnCopy, CopiesByStateDict])
@pytest.mark.parametrize("inner", [False, True])
def test_a_model_with_a_copy_of_its_own_making_is_refused_and_unchanged(made, inner):
    model = nn.Sequential(nn.ReLU(), made()) if inner else made()
    before = oracle.footprint(model)
    with pytest.raises(UnsupportedModelError, match=r"1.* is not copied so" if inner else "__deepcopy__"):
        trace(model, torch.randn(2, 8))
    oracle.same_footprint(before, oracle.footprint(model))


def test_a_model_wrapped_for_several_processes_is_refused():
    import torch.distributed

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Linears())
        with pytest.raises(UnsupportedModelError, match=r"DistributedDataParallel.*`\.module`"):
            trace(model, torch.randn(2, 8))
        assert [axis.size for axis in trace(model.module, torch.randn(2, 8)).axes if axis.prunable] == [6]
    finally:
        torch.distributed.destroy_process_group()


class MakesALayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), None

    def forward(self, x):
        x = self.a(x)
        if self.b is None:
            self.b = nn.Linear(x.shape[1], 3)
        return self.b(x)


def test_a_forward_that_makes_parameters_is_refused_until_it_has():
    model, x = MakesALayer(), torch.randn(2, 8)
    with pytest.raises(UnsupportedModelError, match=r"made 'b\.weight'"):
        trace(model, x)
    assert model.b is None
    model(x)
    check(model, x, prunable=[6])


def check(model, x, *, prunable=None, tolerance=1e-5):
    """Every free axis cut at random: equal to the dense network with zeros in, and nothing written to it."""
    before = oracle.footprint(model)
    net = trace(model.eval(), x)
    free = [axis for axis in net.axes if axis.prunable]
    assert prunable is None or [axis.size for axis in free] == prunable
    slim = net.apply(oracle.random_plan(net, 0))
    masked = oracle.masked(copy.deepcopy(model), oracle.kept_positions(model, slim))
    with torch.no_grad():
        assert oracle.difference(oracle.call(masked, x), oracle.call(slim, x)) <= tolerance
    model.train()
    oracle.same_footprint(before, oracle.footprint(model))
    return net


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        model, x = Linears(), torch.randn(2, 8)
    check(model, x, prunable=[6])


def test_an_input_that_requires_a_gradient_keeps_none():
    x = torch.randn(2, 8, requires_grad=True)
    check(Linears(), x, prunable=[6])
    assert x.grad is None


def test_an_empty_batch_is_refused():
    with pytest.raises(InputError, match=r"at least one sample, but the example input is \(0, 3, 6, 6\)"):
        trace(plain(), torch.randn(0, 3, 6, 6))


@pytest.mark.parametrize("batch", [1, 7])
def test_any_batch(batch):
    net = check(plain(), torch.randn(batch, 3, 6, 6), prunable=[8, 6])
    assert net.cost().macs == trace(plain(), torch.randn(2, 3, 6, 6)).cost().macs


def test_float16():
    check(Linears().half(), torch.randn(2, 8).half(), prunable=[6], tolerance=1e-2)


class ComplexConvolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Conv2d(*sizes, 3, dtype=torch.complex64) for sizes in ((3, 6), (6, 4)))

    def forward(self, x):
        return self.b(self.a(x).tanh()).abs()


def test_complex_weights():
    model, x = ComplexConvolutions(), torch.randn(2, 3, 6, 6, dtype=torch.complex64)
    net = trace(model, x)
    slim = net.apply(oracle.random_plan(net, 0))
    kept = [k for k in range(6) if any(torch.equal(model.a.weight[k], row) for row in slim.a.weight)]
    assert len(kept) == len(slim.a.weight) < 6
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for k in set(range(6)) - set(kept):
            masked.a.weight[k], masked.a.bias[k] = 0, 0
        torch.testing.assert_close(slim(x), masked(x))


class Sparse(nn.Module):
    def __init__(self, layout):
        super().__init__()
        self.a, self.c = nn.Linear(8, 6), nn.Linear(5, 3)
        weight = torch.rand(5, 6).relu()
        self.weight = nn.Parameter(weight.to_sparse() if layout is torch.sparse_coo else weight.to_sparse_csr())

    def forward(self, x):
        return self.c((self.weight @ self.a(x).t()).t())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_parameters_are_refused_by_name(layout):
    with pytest.raises(UnsupportedModelError, match=r"'weight' is.*sparse"):
        trace(Sparse(layout), torch.randn(2, 8))


@pytest.mark.parametrize("name", ["plain", "attention_unbind", "view_with_literal"])
def test_a_model_on_meta_is_read_like_a_real_one_but_not_verified(name):
    model, x = oracle.build(CASES[name])
    net, real = trace(oracle.to_meta(model), x.to("meta")), trace(model, x)
    assert net.axes == real.axes
    plan = oracle.random_plan(net, 0)
    shapes = {key: tensor.shape for key, tensor in oracle.named(real.apply(plan)).items()}
    slim = net.cut(plan).module
    assert {key: oracle.named(slim)[key].shape for key in oracle.named(model)} == {
        key: shapes[key] for key in oracle.named(model)
    }
    for use in (net.apply, net.verify):
        with pytest.raises(InputError, match="meta device"):
            use(plan)


class Counts(nn.Module):
    """Takes another way through its code each time."""

    def __init__(self):
        super().__init__()
        self.a, self.head, self.calls = conv(3, 6), Head(6), 0

    def forward(self, x):
        self.calls += 1
        return self.head(self.a(x) * self.calls)


def test_a_model_that_remembers_its_calls_is_left_as_it_was():
    model, x = Counts(), torch.randn(2, 3, 6, 6)
    check(model, x)
    assert model.calls == 0


class Partial(Linears):
    """Keeps functions with a module inside."""

    def __init__(self):
        super().__init__()
        self.run = functools.partial(F.linear, weight=self.a.weight)

    def forward(self, x):
        return self.b(F.relu(self.run(x)))


def test_parameters_inside_a_partial_function_follow_the_cut():
    check(Partial(), torch.randn(2, 8))


@functools.lru_cache
def positions(size: int) -> torch.Tensor:
    return torch.arange(size).flip(0).contiguous()


class CachesTensors(Linears):
    """Keeps a tensor that its forward makes for all models of the process."""

    def forward(self, x):
        return super().forward(x)[:, positions(3)]


def test_what_code_caches_in_one_trace_is_a_constant_of_the_next():
    positions.cache_clear()
    for _ in range(2):
        check(CachesTensors(), torch.randn(2, 8))
    assert positions(3).tolist() == [2, 1, 0]
