"""Who reads the units of an axis, and what is seen there when the network runs."""

import pytest
import torch
from torch import Tensor, nn

from metaprune import zoo
from metaprune.errors import UnsupportedModelError
from metaprune.graph import Network, trace
from metaprune.graph.lockstep import watching
from metaprune.graph.record import Op, Ref


def network(name: str) -> Network:
    return trace(zoo.build(name).eval(), zoo.example_inputs(name))


@pytest.mark.parametrize("name", list(zoo.MODELS))
def test_every_consumer_has_a_read_that_covers_its_units(name: str) -> None:
    net = network(name)
    for axis in (axis for axis in net.axes if axis.prunable):  # the network's input has no units
        assert {read.binding for read in net.reads[axis.name]} == set(axis.consumers), axis.name
        for read in net.reads[axis.name]:
            assert read.axis == axis.name
            assert set(read.rank_N[read.rank_N >= 0].tolist()) == set(range(axis.size))
            assert len(read.rank_N) == net.layout.trace.values[read.value].dims[read.at].size


@pytest.mark.parametrize("name", ["digits_cnn", "cifar_resnext29", "cifar_mobilenet_v2", "vit_tiny", "llama_tiny"])
def test_what_is_seen_there_is_what_the_call_multiplies(name: str) -> None:
    """Zeros at a unit's positions of what a layer reads are zeros at its columns: the results are the same."""
    net = network(name)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    reads = {
        read.op.index: read for group in net.reads.values() for read in group if read.op.name in ("conv2d", "linear")
    }

    def visit(op, tensors) -> None:
        seen[op.index] = tensors[reads[op.index].value], tensors[op.outputs[0]]

    with watching(net.layout.trace, set(reads), visit):
        net.model(zoo.example_inputs(name))
    assert set(seen) == set(reads)
    weights = dict(net.model.named_parameters())
    for index, (x, y) in seen.items():
        read = reads[index]
        gone = torch.from_numpy(read.rank_N == 0)
        weight = weights[read.binding[0]]
        fewer = read.along((~gone).float(), weight.shape) * weight
        masked = x.movedim(read.at, -1).masked_fill(gone, 0).movedim(-1, read.at)
        assert _again(read.op, x, weight).shape == y.shape
        torch.testing.assert_close(_again(read.op, x, fewer), _again(read.op, masked, weight), rtol=1e-4, atol=1e-4)


def _again(op: Op, x: Tensor, weight: Tensor) -> Tensor:
    """The call with another weight, without a bias."""
    given = {name: item for name, item in op.arguments.items() if not isinstance(item, Ref)}
    return op.func(**{**given, "input": x, "weight": weight, "bias": None})


def test_a_recurrent_layer_reads_its_own_states() -> None:
    net = network("gru_classifier")
    axis = next(axis for axis in net.axes if axis.kind == "hidden" and axis.prunable)
    own = next(read for read in net.reads[axis.name] if "weight_hh" in read.binding[0])
    assert own.value == own.op.outputs[0]


def test_other_calls_than_the_trace_made_are_refused() -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.first(x).relu() if self.training else self.second(self.first(x).relu())
            return out

    net = trace(Moody().eval(), torch.randn(2, 4))
    calls = {read.op.index for group in net.reads.values() for read in group}
    with (
        pytest.raises(UnsupportedModelError, match="must make the calls that it made"),
        watching(net.layout.trace, calls, lambda op, tensors: None),
    ):
        net.model.train()(torch.randn(2, 4))


def test_branches_end_at_their_additions() -> None:
    net = network("cifar_resnet8")
    assert {name for name, ops in net.joins.items()} == {axis.name for axis in net.axes if axis.droppable}
    assert all(op.name.startswith("add") for ops in net.joins.values() for op in ops)
