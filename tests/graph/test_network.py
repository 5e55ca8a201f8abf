"""What a traced network promises: names, fingerprints, refusals, and that bad models are refused with a reason."""

import copy
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metaprune.edits import Keep
from metaprune.errors import ConfigError, InputError, MetapruneError, UnsupportedModelError
from metaprune.graph import trace
from metaprune.plans import Plan
from tests.graph import oracle
from tests.graph.cases import CASES

plain = CASES["plain"].make


@pytest.fixture
def net():
    return trace(*oracle.build(CASES["plain"]))


def test_axes_are_found_by_name(net):
    assert [net.axis(axis.name) for axis in net.axes] == list(net.axes)
    with pytest.raises(ConfigError, match=r"'aa'.*Did you mean 'a'"):
        net.axis("aa")


def test_bindings_and_consumers_of_a_plain_network(net):
    axis = net.axis("a")
    assert axis.size == 8
    assert axis.prunable
    assert axis.exact
    expected = {("a.weight", 0), ("a.bias", 0), ("b.weight", 1)}
    norms = {(f"bn.{leaf}", 0) for leaf in ("weight", "bias", "running_mean", "running_var")}
    assert set(axis.bindings) == expected | norms
    assert axis.consumers == (("b.weight", 1),)
    assert net.axis("head.out").reason == "the output of the network"


def test_kernels_are_no_axes(net):
    assert all(dimension < 2 for axis in net.axes for _, dimension in axis.bindings)


def test_two_traces_are_equal():
    first, second = (trace(*oracle.build(CASES["attention_unbind"])) for _ in range(2))
    assert first.axes == second.axes
    assert first.fingerprint == second.fingerprint


def test_weights_do_not_change_the_fingerprint_but_the_architecture_does():
    nets = [trace(*oracle.build(CASES["residual"], seed)) for seed in (0, 5)]
    assert nets[0].fingerprint == nets[1].fingerprint
    wider = CASES["residual"].make()
    wider.two.side = nn.Sequential(wider.two.side, nn.Conv2d(8, 8, 1))
    assert trace(wider, torch.randn(2, 3, 6, 6)).fingerprint != nets[0].fingerprint


def test_a_plan_for_another_network_is_refused(net):
    other = trace(*oracle.build(CASES["residual"]))
    with pytest.raises(ConfigError, match=net.fingerprint):
        net.apply(Plan((), network=other.fingerprint))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ((), "nothing is kept"),
        ((0, 0, 1), "ascend"),
        ((1, 0), "ascend"),
        ((-1, 0), "ascend"),
        ((0, 8), "ascend"),
    ],
)
def test_ranks_that_make_no_sense_are_refused(net, kept, message):
    with pytest.raises(ConfigError, match=message):
        net.apply(Plan((Keep("a", 8, kept),)))


def test_edits_that_leave_nothing_together_are_refused(net):
    with pytest.raises(MetapruneError, match="'a'"):
        net.apply(Plan((Keep("a", 8, (0, 1, 2, 3)), Keep("a", 8, (4, 5, 6, 7)))))


def test_edits_that_narrow_one_another(net):
    slim = net.apply(Plan((Keep("a", 8, (0, 1, 2, 5)), Keep("a", 8, (1, 2, 3, 4, 5)))))
    assert torch.equal(slim.a.weight, net.model.a.weight[[1, 2, 5]])


def test_an_axis_of_another_size_or_a_frozen_one_is_refused(net):
    with pytest.raises(ConfigError, match=r"8 units.*made for 9"):
        net.apply(Plan((Keep("a", 9, (0,)),)))
    with pytest.raises(ConfigError, match="the output of the network"):
        net.apply(Plan((Keep("head.out", 3, (0,)),)))


def test_two_steps_equal_one():
    model, inputs = oracle.build(CASES["residual"])
    net = trace(model, inputs)
    first = oracle.random_plan(net, 0)
    half = net.apply(first)
    again = trace(half, inputs)
    second = oracle.random_plan(again, 1)
    both = []
    for edit in first.edits:
        after = next(other for other in second.edits if other.axis == edit.axis)
        both.append(Keep(edit.axis, edit.size, tuple(edit.kept[rank] for rank in after.kept)))
    twice, once = again.apply(second), net.apply(Plan(tuple(both)))
    assert all(torch.equal(a, b) for a, b in zip(twice.state_dict().values(), once.state_dict().values(), strict=True))


def test_a_tensor_a_list_and_a_mapping_are_all_inputs():
    x = torch.randn(2, 3, 6, 6)
    assert (
        trace(plain(), x).axes == trace(plain(), (x,)).axes == trace(plain(), [x]).axes == trace(plain(), {"x": x}).axes
    )


# ---- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [(), {}, [], 3, None, "text", [1, 2]])
def test_inputs_without_a_tensor_are_refused(inputs):
    with pytest.raises(InputError, match="tensor"):
        trace(plain(), inputs)


@pytest.mark.parametrize("shape", [(2, 4, 6, 6), (3, 6), (2, 3)])
def test_inputs_of_the_wrong_shape_are_refused_by_name(shape):
    with pytest.raises(UnsupportedModelError, match=rf"\({', '.join(map(str, shape))}\).*a raised"):
        trace(plain(), torch.randn(shape))


def test_an_input_of_another_type_is_refused():
    with pytest.raises(UnsupportedModelError, match="int64"):
        trace(plain(), torch.zeros(2, 3, 6, 6, dtype=torch.long))


def test_something_that_is_no_module_is_refused():
    with pytest.raises(MetapruneError):
        trace(lambda x: x, torch.randn(2, 3))


def test_nan_weights_are_refused_by_name():
    model = plain()
    model.b.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match=r"1 of 432 .*'b.weight'"):
        trace(model, torch.randn(2, 3, 6, 6))


class Returns(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.a, self.what = nn.Linear(8, 6), what

    def forward(self, x):
        x = self.a(x)
        return {"none": None, "number": 3.0, "empty": [], "text": "x", "input": None}[self.what]


@pytest.mark.parametrize("what", ["none", "number", "empty", "text"])
def test_a_model_that_returns_no_tensor_is_refused(what):
    with pytest.raises(UnsupportedModelError, match="must return a tensor"):
        trace(Returns(what), torch.randn(2, 8))


def test_a_forward_that_raises_is_named():
    class Inner(nn.Module):
        def forward(self, x):
            raise KeyError("missing")

    model = nn.Sequential(nn.Linear(8, 6), nn.Sequential(Inner()))
    with pytest.raises(UnsupportedModelError, match=r"1\.0 raised KeyError"):
        trace(model, torch.randn(2, 8))


def test_lazy_modules_are_refused():
    with pytest.raises(UnsupportedModelError, match="lazy"):
        trace(nn.Sequential(nn.LazyLinear(4)), torch.randn(2, 8))


def test_a_module_without_parameters_has_no_axes():
    net = trace(nn.ReLU(), torch.randn(2, 8))
    assert net.axes == ()
    assert net.cost().params == 0
    assert net.cost_many(torch.zeros(3, 0).numpy().astype(int)).macs.tolist() == [0, 0, 0]


def test_a_model_on_meta_with_control_flow_on_values_is_refused():
    with pytest.raises(UnsupportedModelError, match="meta"):
        trace(CASES["branch_on_value"].make().to("meta"), torch.randn(2, 3, 6, 6, device="meta"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_a_quantised_model_is_refused_or_frozen():
    engine = "x86" if "x86" in torch.backends.quantized.supported_engines else "qnnpack"
    torch.backends.quantized.engine = engine
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)))
    try:
        net = trace(model, torch.randn(2, 8))
    except MetapruneError:
        return
    assert not any(axis.prunable for axis in net.axes)


def test_the_callers_modes_do_not_matter():
    model, inputs = oracle.build(CASES["residual"])
    wanted = trace(model, inputs).axes
    with torch.no_grad():
        assert trace(model, inputs).axes == wanted
    with torch.inference_mode():
        assert trace(model, inputs).axes == wanted
        assert trace(model, inputs.clone()).axes == wanted
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert trace(model, inputs).axes == wanted
    with torch.device("meta"):
        assert trace(model, inputs).axes == wanted
    model.train()
    assert trace(model, inputs).axes == wanted
    assert trace(model, inputs.requires_grad_()).axes == wanted


def test_random_state_is_left_alone():
    for name in ("plain", "branch_on_value"):
        model, inputs = oracle.build(CASES[name])
        model.a.register_forward_hook(lambda module, args, out: out + torch.rand_like(out))
        torch.manual_seed(3)
        wanted = torch.rand(3)
        torch.manual_seed(3)
        trace(model, inputs)
        assert torch.equal(torch.rand(3), wanted), name


def test_a_deep_network_is_traced_in_no_time():
    blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(120)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *blocks)
    start = time.perf_counter()
    net = trace(model, torch.randn(2, 3, 8, 8))
    assert sum(axis.prunable for axis in net.axes) == 120
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"batch_first": True, "bidirectional": True, "num_layers": 2}])
def test_a_long_sequence_is_traced_in_no_time(layer, options):
    model, start = layer(4, 6, **options), time.process_time()
    net = trace(model, torch.randn(2000, 2, 4) if not options else torch.randn(2, 2000, 4))
    assert time.process_time() - start < 2
    assert not net._layout.trace.real


def test_a_dense_net_does_not_explode():
    class Dense(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(8 + 4 * k, 4, 1) for k in range(depth))
            self.out = nn.Linear(8 + 4 * depth, 3)

        def forward(self, x):
            for layer in self.layers:
                x = torch.cat([x, F.relu(layer(x))], 1)
            return self.out(x.mean((2, 3)))

    start = time.perf_counter()
    net = trace(Dense(60), torch.randn(2, 8, 4, 4))
    assert sum(axis.prunable for axis in net.axes) == 60
    assert net.verify(oracle.random_plan(net, 0)).max_error < 1e-5
    assert time.perf_counter() - start < 10


def test_a_network_of_a_trace_can_be_copied_and_pickled_away():
    model, inputs = oracle.build(CASES["plain"])
    slim = trace(model, inputs).apply(oracle.random_plan(trace(model, inputs), 0))
    twin = copy.deepcopy(slim)
    with torch.no_grad():
        assert torch.equal(twin(inputs), slim(inputs))
    assert all(type(item) is not int or item.__class__ is int for m in slim.modules() for item in vars(m).values())
