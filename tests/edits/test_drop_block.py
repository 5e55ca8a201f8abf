"""DropBlock: a residual branch leaves whole, and what is left is the dense network with its output zeroed."""

import copy

import pytest
import torch
from torch import Tensor, nn

from metaprune import zoo
from metaprune.edits import DropBlock, Keep
from metaprune.errors import ConfigError, UnsupportedModelError
from metaprune.export import export
from metaprune.graph import Network, trace
from metaprune.plans import Plan
from tests.graph import oracle

SHARE = 1e-5


def random(model: nn.Module) -> nn.Module:
    """Norms with weights of one and biases of zero would hide mistakes."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.ndim == 1 and tensor.is_floating_point() and not name.endswith("inv_freq"):
                tensor.add_(0.3 * torch.rand_like(tensor))
    return model.eval()


# Each network with the module whose output is the branch's, by the name of the branch.
NETWORKS = {
    "cifar_resnet20": (lambda name: f"{name}.bn2", 9),
    "vit_tiny": (lambda name: name, 8),
    "llama_tiny": (lambda name: name, 8),
}


@pytest.fixture(scope="module", params=list(NETWORKS))
def net(request: pytest.FixtureRequest) -> Network:
    return trace(random(zoo.build(request.param)), zoo.example_inputs(request.param))


def zeroed(model: nn.Module, paths: list[str], inputs: Tensor) -> Tensor:
    """Independent of the engine: hooks that zero the outputs of modules."""
    model = copy.deepcopy(model)
    for path in paths:
        model.get_submodule(path).register_forward_hook(lambda module, args, out: out * 0)
    with torch.no_grad():
        return model(inputs)


def ends(net: Network, names: list[str]) -> list[str]:
    kind = next(kind for kind in NETWORKS if type(net.model) is type(zoo.build(kind)))
    return [NETWORKS[kind][0](name) for name in names]


def close(first: Tensor, second: Tensor) -> bool:
    return float((first - second).abs().max()) <= SHARE * float(second.abs().max())


def test_every_branch_is_found_and_named_by_its_module(net):
    kind = next(kind for kind in NETWORKS if type(net.model) is type(zoo.build(kind)))
    names = [block.name for block in net.blocks]
    assert len(set(names)) == len(names) == NETWORKS[kind][1]
    modules = dict(net.model.named_modules())
    assert all(name in modules for name in names)


def test_what_is_left_is_the_dense_network_with_the_output_of_the_branch_zeroed(net):
    before = oracle.footprint(net.model)
    for block in net.blocks:
        plan = Plan((DropBlock(block.name),), net.fingerprint)
        made = net.cut(plan)
        assert (made.way, made.checked) == ("attributes", True)
        assert type(made.module) is type(net.model)
        with torch.no_grad():
            assert close(
                made.module(net.example_inputs), zeroed(net.model, ends(net, [block.name]), net.example_inputs)
            )
        assert net.verify(plan, slim=made.module).passed(SHARE)
        gone = {name.rpartition(".")[0] for name in block.parameters}
        assert not gone & {path for path, _ in made.module.named_modules()}
        left = made.module.state_dict()
        assert not set(block.parameters) & set(left)
        assert set(left) | set(block.parameters) >= {n for n in net.model.state_dict() if not n.endswith("tracked")}
    oracle.same_footprint(before, oracle.footprint(net.model))


def test_cost_is_that_of_the_network_that_is_left(net):
    for block in net.blocks:
        plan = Plan((DropBlock(block.name),))
        slim = trace(net.apply(plan), net.example_inputs).cost()
        cost = net.cost_of(plan)
        assert (cost.macs, cost.params, cost.bytes) == (slim.macs, slim.params, slim.bytes)
        assert net.cost(net.sizes(plan)) == cost  # size 0 on the axis inside
        assert (net.sizes(plan) == 0).any()


def test_all_branches_and_cuts_of_what_is_left_together(net):
    names = [block.name for block in net.blocks]
    keep = tuple(
        Keep(axis.name, axis.size, tuple(range(0, axis.size, 2)))
        for axis in net.axes
        if axis.prunable and axis.size > 3
    )
    for dropped in (names[::2], names[1::3], names):
        for cuts in ((), keep):
            plan = Plan((*map(DropBlock, dropped), *cuts))
            slim = net.apply(plan)
            assert net.verify(plan, slim=slim).passed(SHARE)
            assert net.cost_of(plan).params == sum(parameter.numel() for parameter in slim.parameters())
        plain = net.apply(Plan(tuple(map(DropBlock, dropped))))
        with torch.no_grad():
            assert close(plain(net.example_inputs), zeroed(net.model, ends(net, dropped), net.example_inputs))


def test_a_module_of_several_branches_drops_them_all(net):
    around = {name.rpartition(".")[0] for name in (block.name for block in net.blocks)}
    for path in sorted(around):
        inner = [block.name for block in net.blocks if block.name.startswith(f"{path}.")]
        whole, one_by_one = Plan((DropBlock(path),)), Plan(tuple(map(DropBlock, inner)))
        assert net.cost_of(whole) == net.cost_of(one_by_one)


def test_what_is_left_learns(net):
    slim = net.apply(Plan((DropBlock(net.blocks[0].name),))).train()
    slim(net.example_inputs).square().mean().backward()
    assert all(parameter.grad is not None for parameter in slim.parameters())


def test_the_file_of_what_is_left_has_no_trace_of_it(tmp_path):
    net = trace(random(zoo.build("vit_tiny")), zoo.example_inputs("vit_tiny"))
    slim = net.apply(Plan((DropBlock("blocks.1"), DropBlock("blocks.2.mlp"))))
    exported = export(slim, net.example_inputs, tmp_path / "slim.onnx")
    assert exported is not None
    assert (tmp_path / "slim.onnx").stat().st_size < 1.1 * 4 * sum(p.numel() for p in slim.parameters()) + 40_000


class Projected(nn.Module):
    """A shortcut that is a branch too, and code that looks at a shape on the way."""

    def __init__(self, looks: bool = False) -> None:
        super().__init__()
        self.looks = looks
        self.stem = nn.Linear(6, 8)
        self.body = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10))
        self.shortcut = nn.Linear(8, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.body(x)
        if self.looks:
            y = y.view(y.shape[0], -1)
        return self.head(y + self.shortcut(x))


@pytest.fixture
def projected() -> Network:
    return trace(random(Projected()), torch.randn(4, 6))


def test_either_side_may_leave_but_not_both(projected):
    assert [block.name for block in projected.blocks] == ["body", "shortcut"]
    for block in projected.blocks:
        assert projected.verify(Plan((DropBlock(block.name),))).passed(SHARE)
    with pytest.raises(ConfigError, match=r"'body' and 'shortcut' are all that is added .* Keep one of them"):
        projected.apply(Plan((DropBlock("body"), DropBlock("shortcut"))))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("stem", r"without 'stem' the network would be disconnected: it runs beside no shortcut\. Branches .*: body"),
        ("body.0", r"without 'body.0' the network would be disconnected: it is part of the branch 'body'; drop that"),
        ("bodi", r"no block is named 'bodi'\. Did you mean 'body'\?"),
    ],
)
def test_refusals_name_the_block_and_the_way_out(name, reason, projected):
    before = oracle.footprint(projected.model)
    with pytest.raises(ConfigError, match=reason):
        projected.apply(Plan((DropBlock(name),)))
    oracle.same_footprint(before, oracle.footprint(projected.model))


def test_a_network_without_branches_says_so():
    net = trace(zoo.build("digits_cnn"), zoo.example_inputs("digits_cnn"))
    if not net.blocks:
        assert "no residual branch" in (DropBlock("conv1").check(net) or "")


def test_code_that_does_not_go_along_becomes_a_graph():
    net = trace(random(Projected(looks=True)), torch.randn(4, 6))
    plan = Plan((DropBlock("body"),))
    made = net.cut(plan)
    assert made.way == "graph"
    assert "shape" in made.reason
    assert net.verify(plan, slim=made.module).passed(SHARE)
    assert made.module(torch.randn(9, 6)).shape == (9, 3)  # the batch stays free
    assert not [name for name in made.module.state_dict() if name.startswith("body")]


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.a(x)
        y = self.b(x)
        y += x
        return y.relu_(), x


def test_a_sum_in_place_that_would_then_write_into_what_is_read_later_is_refused():
    """Without the branch `y` is `x`, which `relu_` would change before it is returned."""
    net = trace(InPlace(), torch.randn(3, 4))
    plan = Plan((DropBlock("b"),))
    with pytest.raises(UnsupportedModelError, match="must change the same tensors in place"):
        net.apply(plan)


def test_plans_keep_it(projected, tmp_path):
    plan = Plan((DropBlock("body"),), projected.fingerprint)
    again = Plan.load(plan.save(tmp_path / "plan.json"))
    assert again == plan
    for one, other in zip(projected.apply(plan).parameters(), projected.apply(again).parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_optimizer_goes_on_with_what_is_left(projected):
    model = projected.model
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(projected.example_inputs).sum().backward()
    optimizer.step()
    plan = Plan((DropBlock("body"),))
    slim = projected.apply(plan)
    other = projected.apply_optimizer(plan, slim, optimizer)
    slim(projected.example_inputs).sum().backward()
    other.step()


# ---- decoders with a cache ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3", "gpt_neox", "falcon", "whisper"])
def test_a_decoder_without_its_first_attention_goes_on_generating(name):
    """A cache asks its first layer how long it is; what generates would not show a wrong place, logits do."""
    pytest.importorskip("transformers")
    from tests.graph.transformers_models import MODELS, build

    model, inputs = build(MODELS[name])
    net = trace(model, inputs)
    first = next(block.name for block in net.blocks if "attn" in block.name or "attention" in block.name)
    first = first.replace("encoder.layers", "decoder.layers") if name == "whisper" else first
    plan = Plan((DropBlock(first),))
    slim = net.apply(plan)
    assert type(slim) is type(model)
    assert net.verify(plan, slim=slim).passed(SHARE)
    places = [module.layer_idx for path, module in slim.named_modules() if _in_cache(path, module)]
    assert sorted(places) == list(range(len(places)))
    key = "decoder_input_ids" if slim.config.is_encoder_decoder else "input_ids"
    ids, more = inputs[key], {k: v for k, v in inputs.items() if k != key}
    with torch.no_grad():
        whole = slim(**{key: ids}, **more, use_cache=False).logits
        head = slim(**{key: ids[:, :-1]}, **more, use_cache=True)
        tail = slim(**{key: ids[:, -1:]}, **more, past_key_values=head.past_key_values, use_cache=True)
    assert close(tail.logits[:, -1], whole[:, -1])


def _in_cache(path: str, module: nn.Module) -> bool:
    named = path.rpartition(".")[2] in ("self_attn", "attn", "attention", "self_attention")
    return named and isinstance(getattr(module, "layer_idx", None), int)
