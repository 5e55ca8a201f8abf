"""Networks of transformers: traced, cut exactly, still able to generate, exported."""

from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import metaprune as mp
from metaprune.export import export
from metaprune.graph import Network, trace
from tests.graph import oracle
from tests.graph.transformers_models import MODELS, build

pytest.importorskip("transformers")

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore::FutureWarning")]

FAST = frozenset(
    """albert bart beit bert clip convnext deberta_v2 detr dinov2 falcon gemma2 gpt2 gpt_neox llama mamba mamba2 mixtral
    opt phi3 qwen2_moe qwen3 segformer swin t5 vit wav2vec2 whisper""".split()
)


def models(names: Iterable[str]) -> pytest.MarkDecorator:
    """A test of each of these; those of further families are long."""
    return pytest.mark.parametrize(
        "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.long) for name in names]
    )


every_model = models(MODELS)
CAUSAL = [name for name, model in MODELS.items() if "CausalLM" in model.kind or "LMHead" in model.kind]
GENERATING = [*CAUSAL, "t5", "flan_t5", "bart", "whisper"]


@cache
def traced(name: str, attention: str = "sdpa") -> tuple[Any, dict[str, Any], Network]:
    model, inputs = build(MODELS[name], attention)
    return model, inputs, trace(model, inputs)


def free_share(net: Network) -> float:
    """Part of the parameters of which some dimension lies on a prunable axis."""
    free = {binding for axis in net.axes if axis.prunable for binding in axis.bindings}
    sizes = {name: tensor.numel() for name, tensor in net.model.named_parameters()}
    return sum(size for name, size in sizes.items() if any((name, k) in free for k in range(4))) / sum(sizes.values())


def sees_all_tokens(model: Any, ids: Any, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**{"decoder_input_ids" if model.config.is_encoder_decoder else "input_ids": ids}, **more).logits


@every_model
def test_as_a_graph_nothing_is_lost(name):
    model, _, net = traced(name)
    state = net.from_graph(net.to_graph())
    wanted = {key: tensor for key, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    assert list(state) == list(wanted)
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in state.items())


@every_model
def test_most_parameters_may_shrink(name):
    _, _, net = traced(name)
    assert not net._layout.trace.failed_rules
    assert not net._layout.trace.real_reason
    assert free_share(net) >= MODELS[name].share, MODELS[name].why


@every_model
def test_the_cut_network_is_the_masked_one(name):
    model, inputs, net = traced(name)
    plan = oracle.random_plan(net, 0)
    slim = net.apply(plan)
    before = oracle.call(model, inputs)
    assert all(tensor.isfinite().all() for tensor in before)
    assert net.verify(plan, slim=slim).max_error <= 1e-4
    assert net.sizes(plan).sum() < sum(axis.size for axis in net.axes)
    assert net.cost(net.sizes(plan)).params == sum(tensor.numel() for tensor in slim.parameters())


@pytest.mark.long
@every_model
@pytest.mark.parametrize("seed", [1, 2])
def test_an_oracle_agrees_where_zeroing_is_exact(name, seed):
    model, inputs, net = traced(name)
    plan = oracle.random_plan(net, seed, axes=[axis for axis in net.axes if not axis.changes])
    if not plan.edits:
        pytest.skip("every axis changes statistics")
    cut = net.cut(plan)
    if cut.way == "graph":  # it leaves out the buffers that nothing reads
        pytest.skip("made from the recorded calls, see test_the_cut_network_is_the_masked_one")
    slim = cut.module
    wanted = oracle.masked(build(MODELS[name])[0], oracle.kept_positions(model, slim))
    with torch.no_grad():
        assert oracle.difference(oracle.call(wanted, inputs), oracle.call(slim, inputs)) <= 1e-4


@pytest.mark.long
@every_model
@pytest.mark.parametrize("seed", [3, 4])
def test_with_attention_step_by_step(name, seed):
    _, _, net = traced(name, "eager")
    plan = oracle.random_plan(net, seed, 0.4)
    assert net.verify(plan).max_error <= 1e-4


@models(GENERATING)
def test_the_cut_network_generates_with_its_cache(name):
    model, inputs, net = traced(name)
    slim = net.apply(oracle.random_plan(net, 0))
    assert type(slim) is type(model)
    start = {key: tensor for key, tensor in inputs.items() if key != "decoder_input_ids"}
    steps = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    shown = {"output_logits": True, "return_dict_in_generate": True}
    if name != "whisper":  # which takes features alone
        start["attention_mask"] = torch.ones(inputs["input_ids"].shape, dtype=torch.long)
    new = slim.generate(**start, use_cache=True, **steps, **shown)
    encoded = start if model.config.is_encoder_decoder else {}
    whole = sees_all_tokens(slim, new.sequences, use_cache=False, **encoded)[:, -5:-1]
    cached = torch.stack(new.logits, dim=1)
    assert cached.shape == whole.shape
    assert float((whole - cached).abs().max() / whole.abs().max()) <= 1e-4


@models(GENERATING)
def test_other_code_for_attention_finds_the_same_sizes(name):
    _, inputs, net = traced(name)
    slim: Any = net.apply(oracle.random_plan(net, 0))
    with torch.no_grad():
        before = oracle.call(slim, inputs)[0]
        slim.set_attn_implementation("eager")
        assert oracle.difference([before], [oracle.call(slim, inputs)[0]]) <= 1e-5


def test_padded_texts_are_cut_exactly():
    for name in ("bert", "llama"):
        model, inputs = build(MODELS[name])
        mask = torch.ones_like(inputs["input_ids"])
        mask[0, :4] = 0
        net = trace(model, {**inputs, "attention_mask": mask})
        assert not net._layout.trace.real_reason
        assert net.verify(oracle.random_plan(net, 0)).max_error <= 1e-4


def test_layers_that_differ_have_a_configuration_of_their_own():
    model, _, net = traced("phi3")
    head = next(axis for axis in net.axes if axis.name.startswith("model.layers.1") and axis.kind == "head")
    plan = oracle.random_plan(net, 0, axes=[head])
    slim = net.apply(plan)
    first, second = (layer.self_attn for layer in slim.model.layers)
    assert first.config is slim.config
    assert second.config.num_attention_heads == 2 * (head.size - 1)
    assert slim.config.num_attention_heads == model.config.num_attention_heads == 2 * head.size
    assert net.verify(plan, slim=slim).max_error <= 1e-4


def test_a_plan_is_replayed_on_a_fresh_network(tmp_path):
    _, inputs, net = traced("qwen3")
    plan = oracle.random_plan(net, 0)
    plan.save(tmp_path / "plan.json")
    slim = net.apply(plan)
    fresh, _ = build(MODELS["qwen3"], seed=1)
    again = trace(fresh, inputs).apply(mp.Plan.load(tmp_path / "plan.json"))
    again.load_state_dict(slim.state_dict())
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, slim(**inputs).logits)


class Counting(nn.Module):
    """Two layers that read their width from one object, which also changes while they run."""

    class Settings:
        def __init__(self) -> None:
            self.heads, self.runs = 4, 0

    class Layer(nn.Module):
        def __init__(self, settings: Any) -> None:
            super().__init__()
            self.settings = settings
            self.rise, self.fall = nn.Linear(6, 12), nn.Linear(12, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.settings.runs += 1
            x = self.rise(x).view(len(x), self.settings.heads, -1)
            return self.fall((x * x.softmax(-1)).flatten(1))

    def __init__(self) -> None:
        super().__init__()
        self.settings = self.Settings()
        self.first, self.second = self.Layer(self.settings), self.Layer(self.settings)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def test_objects_that_layers_share_stay_shared_unless_their_sizes_part():
    model = Counting().eval()
    net = trace(model, torch.randn(2, 6))
    assert model.settings.runs == 0
    assert type(model.settings.heads) is int
    axis = next(axis for axis in net.axes if axis.name.startswith("second.rise") and axis.size == 4)
    slim = net.cut(oracle.random_plan(net, 0, axes=[axis]))
    assert slim.way == "attributes"
    assert (slim.module.first.settings.heads, slim.module.second.settings.heads) == (4, 3)
    assert slim.module.first.settings is slim.module.settings
    assert model.settings.heads == 4


@pytest.mark.long
@every_model
@pytest.mark.filterwarnings("ignore")
def test_export(name, tmp_path):
    _, inputs, net = traced(name)
    slim = net.apply(oracle.random_plan(net, 0))
    for module in slim.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False  # a cache is no output of an ONNX file
    assert export(slim, inputs, tmp_path / "slim.onnx").max_error <= 1e-4
