"""From file to file: tensor by tensor what the way through memory gives."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import metaprune as mp
from metaprune import zoo
from metaprune.errors import ConfigError, InputError
from metaprune.shards import INDEX, Shards, write_shards
from metaprune.stream import parameters_on_meta, prune_files
from tests.graph import oracle
from tests.graph.cases import CASES

BUDGET = "params=0.6"


def stored(model, folder, *, shards=1):
    """The state of a model in files, as large networks have it."""
    folder.mkdir()
    seen, state = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if seen.setdefault(id(tensor), name) == name:
            state[name] = tensor.detach().clone()
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    names = list(state)
    where = {name: f"model-{k % shards + 1:05d}-of-{shards:05d}.safetensors" for k, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: state[name] for name in names if where[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def empty(name, **options):
    with parameters_on_meta():
        return zoo.build(name, **options)


def everything(folder):
    return dict(Shards(folder))


@pytest.mark.parametrize("criterion", ["l1", "l2", "random", "bn_scale", "gaussian", "fpgm", "pq"])
@pytest.mark.parametrize("name", ["cifar_resnet8", "vit_tiny", "llama_tiny"])
def test_gives_what_the_way_through_memory_gives(tmp_path, name, criterion):
    torch.manual_seed(1)
    model, inputs = zoo.build(name).eval(), zoo.example_inputs(name)
    weights = stored(model, tmp_path / "in", shards=3)
    if criterion in ("bn_scale", "gaussian") and name != "cifar_resnet8":
        with pytest.raises(ConfigError, match="BatchNorm"):
            prune_files(empty(name), inputs, weights, tmp_path / "out", BUDGET, criterion=criterion)
        return
    network = mp.trace(model, inputs)
    plan = mp.plan(network, BUDGET, criterion)
    done = prune_files(empty(name), inputs, weights, tmp_path / "out", BUDGET, criterion=criterion, shard_bytes=50_000)
    assert done.plan == plan
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    wanted, seen = network.apply(plan).state_dict(), everything(tmp_path / "out")
    assert set(seen) == set(everything(weights))
    for key, tensor in seen.items():
        assert torch.equal(tensor, wanted[key]), key
    assert (done.before.params, done.after.params) == (network.cost().params, network.cost(network.sizes(plan)).params)


def test_the_result_is_loaded_like_any_other(tmp_path):
    torch.manual_seed(1)
    model, inputs = zoo.build("llama_tiny", tied=True).eval(), zoo.example_inputs("llama_tiny")
    weights = stored(model, tmp_path / "in")
    prune_files(empty("llama_tiny", tied=True), inputs, weights, tmp_path / "out", BUDGET, shard_bytes=50_000)
    network = mp.trace(model, inputs)
    slim = mp.load(tmp_path / "out", zoo.build("llama_tiny", tied=True))
    with torch.no_grad():
        assert torch.equal(slim(inputs), network.apply(mp.plan(network, BUDGET)).eval()(inputs))
    assert slim.head.weight is slim.embedding.weight


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_constants_of_the_network_are_known_without_its_weights(tmp_path):
    """A table of positions decides which units leave together; buffers hold it, and they are real."""
    tables = 0
    for case in CASES.values():
        model, inputs = oracle.build(case)
        if any(not buffer.is_floating_point() and buffer.ndim for buffer in model.buffers()):
            with parameters_on_meta():
                other = case.make()
            assert mp.trace(model, inputs).fingerprint == mp.trace(other, inputs).fingerprint
            tables += 1
    assert tables


def test_the_files_are_those_of_safetensors(tmp_path):
    tensors = {
        "b": torch.randn(3, 2),
        "a": torch.randn(4),
        "flag": torch.tensor([True, False]),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "c": torch.randn(2, 2).bfloat16(),
    }
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    theirs = Shards(tmp_path / "theirs.safetensors")
    (written,) = write_shards(tmp_path / "ours", theirs.entries, theirs.__getitem__)
    assert written.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    *files, index = write_shards(tmp_path / "ours", theirs.entries, theirs.__getitem__, shard_bytes=24)
    assert not written.exists()
    assert index.name == INDEX
    assert all(file.stat().st_size < 24 + 400 for file in files)
    assert json.loads(index.read_text())["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    read = everything(tmp_path / "ours")
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())


def _broken(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("linear.weight"), r"must hold 'linear.weight' \(10, 64\)"),
        (lambda state: state.update(linear_weight=torch.zeros(1)), "'linear_weight'.*Did you mean 'linear.weight'"),
        (lambda state: state.update({"conv1.weight": torch.zeros(16, 3, 3, 1)}), r"must be \(16, 3, 3, 3\)"),
        (
            lambda state: state["layer1.0.conv1.weight"].fill_(float("nan")),
            r"must be numbers, but 2304 of 2304 entries of 'layer1\.0\.conv1",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, message):
    weights = stored(zoo.build("cifar_resnet8"), tmp_path / "in")
    _broken(weights, change)
    with pytest.raises(InputError, match=message):
        prune_files(empty("cifar_resnet8"), zoo.example_inputs("cifar_resnet8"), weights, tmp_path / "out", "macs=0.5")
    assert not (tmp_path / "out").exists()


def test_files_that_are_damaged_are_refused(tmp_path):
    weights = stored(zoo.build("cifar_resnet8"), tmp_path / "in", shards=2)
    index = json.loads((weights / INDEX).read_text())
    with pytest.raises(InputError, match=r"model\.safetensors does not exist"):
        Shards(tmp_path)
    (weights / INDEX).write_text(
        json.dumps({"weight_map": index["weight_map"] | {"more": "model-00001-of-00002.safetensors"}})
    )
    with pytest.raises(InputError, match="'more' is in no file"):
        Shards(weights)
    (weights / INDEX).write_text(json.dumps({"weight_map": {"x": "../x"}}))
    with pytest.raises(InputError, match="beside it"):
        Shards(weights)
    (weights / INDEX).write_text(json.dumps(index))
    first = weights / "model-00001-of-00002.safetensors"
    first.write_bytes(first.read_bytes()[:-10])
    with pytest.raises(InputError, match="truncated"):
        Shards(weights)


def test_a_criterion_that_needs_data_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"'taylor' needs data. Give .*l2"):
        prune_files(empty("mlp"), zoo.example_inputs("mlp"), tmp_path, tmp_path / "out", "macs=0.5", criterion="taylor")


def test_tied_weights_that_differ_are_refused(tmp_path):
    weights = stored(zoo.build("llama_tiny"), tmp_path / "in")
    with pytest.raises(InputError, match="one weight in the model, but differ"):
        prune_files(empty("llama_tiny", tied=True), zoo.example_inputs("llama_tiny"), weights, tmp_path / "out", BUDGET)


MEMORY = """
import resource, sys, torch
from metaprune import zoo
from metaprune.stream import parameters_on_meta, prune_files
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
options = dict(vocabulary=256, width=1024, depth=int(sys.argv[2]), num_heads=8, num_kv_heads=8, hidden=4096)
inputs = zoo.example_inputs("llama_tiny")
prune_files({warm}, inputs, sys.argv[1] + "/small", sys.argv[1] + "/warm", "params=0.6")
with parameters_on_meta():
    model = zoo.build("llama_tiny", **options)
before = peak()
prune_files(model, inputs, sys.argv[1] + "/large", sys.argv[1] + "/out", "params=0.5")
print(peak() - before)
"""


@pytest.mark.long
def test_never_holds_the_network(tmp_path):
    """Memory for a few of the largest tensors, of a network that has a hundred such."""
    depth, largest = 12, 4096 * 1024 * 4
    stored(zoo.build("llama_tiny"), tmp_path / "small")
    model = zoo.build("llama_tiny", vocabulary=256, width=1024, depth=depth, num_heads=8, num_kv_heads=8, hidden=4096)
    size = sum(parameter.nbytes for parameter in model.parameters())
    stored(model, tmp_path / "large", shards=4)
    del model
    code = MEMORY.replace("{warm}", 'zoo.build("llama_tiny")')
    run = subprocess.run([sys.executable, "-c", code, tmp_path, str(depth)], capture_output=True, text=True, check=True)
    assert size > 45 * largest
    assert int(run.stdout) < 12 * largest


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_network_of_transformers_is_cut_from_shards_to_shards(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 97}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    model.save_pretrained(tmp_path / "in", max_shard_size="60KB")
    assert len(list((tmp_path / "in").glob("model-*.safetensors"))) > 1
    with parameters_on_meta():
        source = zoo.resolve_model("hf:LlamaForCausalLM", options={**sizes, **heads})
    done = prune_files(source.module, source.example_inputs, tmp_path / "in", tmp_path / "out", BUDGET)
    slim = mp.load(tmp_path / "out", transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval())
    wanted = mp.trace(model, source.example_inputs).apply(done.plan)
    for key, tensor in wanted.state_dict().items():
        assert torch.equal(slim.state_dict()[key], tensor), key
    ids = torch.arange(6).view(1, 6) + 5
    with torch.no_grad():
        assert torch.equal(slim(ids).logits, wanted(ids).logits)
        told = slim.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0
        )
        for place in range(6, 9):  # with its cache, what the whole sequence gives without one
            assert int(slim(told[:, :place], use_cache=False).logits[0, -1].argmax()) == int(told[0, place])
