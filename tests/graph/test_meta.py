"""Shortcuts on meta tensors give what torch gives, and leave the rest to torch."""

import sys

import pytest
import torch

from metaprune.graph import trace
from metaprune.graph.meta import _BINARY, _UNARY, on_meta
from tests.graph import oracle
from tests.graph.cases import CASES

aten = torch.ops.aten
BELOW = torch._C._AutoDispatchBelowAutograd


def _meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


X, C = _meta(2, 6, 4, 3), _meta(6)
PLAIN = [
    *((packet.default, (X,)) for packet in _UNARY if packet is not aten.clamp),
    (aten.clamp.default, (X, 0.0, 1.0)),
    *((overload, (X, _meta(2, 6, 4, 3))) for overload in _BINARY),
    (aten.batch_norm.default, (X, C, C, C, C, False, 0.1, 1e-5, True)),
    (aten.batch_norm.default, (X, None, None, C, C, False, 0.1, 1e-5, True)),
    (aten.layer_norm.default, (X, [4, 3], _meta(4, 3), None)),
    (aten.layer_norm.default, (X, [3])),
    (aten.rms_norm.default, (X, [3], _meta(3), 1e-5)),
    (aten.relu.default, (_meta(2, 3, dtype=torch.bfloat16),)),
]
OTHERS = [
    (aten.relu.default, (X.transpose(1, 2),)),
    (aten.relu.default, (X.to(memory_format=torch.channels_last),)),
    (aten.relu.default, (_meta(2, 3, dtype=torch.int64),)),
    (aten.clamp.default, (_meta(2, 3, dtype=torch.int64), 0.5)),
    (aten.relu.default, (torch.zeros(2, 3),)),
    (aten.add.Tensor, (X, _meta(6, 1, 1))),
    (aten.mul.Tensor, (X, _meta(2, 6, 4, 3, dtype=torch.float64))),
    (aten.batch_norm.default, (X, C, C, C, C, True, 0.1, 1e-5, True)),
    (aten.batch_norm.default, (X, C, C, None, None, False, 0.1, 1e-5, True)),
    (aten.batch_norm.default, (X, C.double(), C, C, C, False, 0.1, 1e-5, True)),
]
WRONG = [
    (aten.batch_norm.default, (X, _meta(5), C, C, C, False, 0.1, 1e-5, True)),
    (aten.batch_norm.default, (X, C, C, C, _meta(1, 6), False, 0.1, 1e-5, True)),
    (aten.layer_norm.default, (X, [4], _meta(4))),
    (aten.add.Tensor, (X, _meta(2, 5, 4, 3))),
]


@pytest.mark.parametrize(("func", "args"), PLAIN, ids=str)
def test_gives_what_torch_gives(func, args):
    with BELOW():
        wanted, seen = func(*args), on_meta(func, args, {})
    assert seen is not None
    assert (seen.shape, seen.dtype, seen.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
    assert seen.is_meta


@pytest.mark.parametrize(("func", "args"), OTHERS, ids=str)
def test_leaves_the_rest_to_torch(func, args):
    assert on_meta(func, args, {}) is None


@pytest.mark.parametrize(("func", "args"), WRONG, ids=str)
def test_leaves_errors_to_torch(func, args):
    assert on_meta(func, args, {}) is None
    with BELOW(), pytest.raises((RuntimeError, ValueError)):
        func(*args)


def test_traces_are_the_same_without_shortcuts(monkeypatch):
    model, inputs = oracle.build(CASES["residual"])
    fast = trace(model, inputs)
    monkeypatch.setattr(sys.modules["metaprune.graph.dispatch"], "on_meta", lambda *call: None)
    slow = trace(model, inputs)
    assert fast.axes == slow.axes
    assert [str(op) for op in fast._layout.trace.ops] == [str(op) for op in slow._layout.trace.ops]
