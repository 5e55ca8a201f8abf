from pathlib import Path

import pytest

from tests.cli.commands import command, entries


def test_the_tree_names_what_is_coupled_and_why_something_stays() -> None:
    done = command("inspect", "--model", "zoo:digits_cnn")
    assert done.code == 0
    assert max(map(len, done.out.splitlines())) <= 80
    for part in (
        "prunable",
        "made and carried by",
        "of MACs",
        "must stay 1 axis",
        "because the output of the network",
        "parameters",
        "traced in",
    ):
        assert part in done.out


def test_json_holds_axes_and_costs(tmp_path: Path) -> None:
    told = command("inspect", "--model", "digits_cnn", "--json").json
    assert told["model"] == "zoo:digits_cnn"
    assert told["before"]["params"] == 28410
    axes = {axis["name"]: axis for axis in told["axes"]}
    assert axes["conv1"]["prunable"]
    assert "block1.conv2" in axes["conv1"]["makes"]
    assert not axes["linear"]["prunable"]
    assert axes["linear"]["reason"] == "the output of the network"
    assert entries(tmp_path) == []


def test_options_of_the_factory_and_shapes_are_heard() -> None:
    wide = command("inspect", "--model", "zoo:cifar_resnet8", "--input-shape", "1,3,64,64", "--json").json
    usual = command("inspect", "--model", "zoo:cifar_resnet8", "--json").json
    assert wide["before"]["macs"] > 3.9 * usual["before"]["macs"]
    more = command("inspect", "--model", "zoo:cifar_resnet8", "--model-arg", "num_classes=100", "--json").json
    assert more["before"]["params"] > usual["before"]["params"]


def test_frozen_axes_can_be_left_out() -> None:
    assert "the output of the network" not in command("inspect", "--model", "zoo:mlp", "--no-frozen").out


def test_modules_can_be_frozen_or_chosen() -> None:
    def free(*words: str) -> list[str]:
        told = command("inspect", "--model", "zoo:digits_cnn", *words, "--json").json
        return [axis["name"] for axis in told["axes"] if axis["prunable"]]

    assert free() == ["conv1", "block1.conv1", "conv2", "block2.conv1"]
    assert free("--freeze", "block1.bn1", "--freeze", "block2.bn1") == ["conv1", "conv2"]
    assert free("--freeze", "Conv2d") == []
    assert free("--only", "block1.bn1", "--only", "block2.bn1") == ["block1.conv1", "block2.conv1"]


def test_why_tells_what_couples_in_words() -> None:
    done = command("inspect", "--model", "zoo:digits_cnn", "--why", "block1.conv2.weight:0")
    assert done.code == 0
    assert max(map(len, done.out.splitlines())) <= 80
    said = " ".join(done.out.replace("│", " ").replace("├──", "").replace("└──", "").split())
    assert "block1.conv2.weight:0 and conv1.weight:0 share units because add at block1 adds them" in said
    told = command("inspect", "--model", "zoo:digits_cnn", "--why", "block1.conv2.weight:0", "--json").json
    (why,) = told["why"]
    assert (why["axis"], why["prunable"], why["chain"]) == ("conv1", True, [])
    link = next(link for link in why["links"] if "conv1.weight:0" in link["to"])
    assert (link["from"], link["ops"]) == ("block1.conv2.weight:0", ["add at block1"])
    assert command("inspect", "--model", "zoo:digits_cnn", "--json").json["why"] is None


def test_why_gives_the_way_to_the_reason() -> None:
    words = ["inspect", "--model", "zoo:digits_cnn", "--freeze", "block1.conv2", "--why", "bn1.weight"]
    shown = command(*words).out
    assert "from bn1.weight:0 to the reason" in shown
    assert "must stay: frozen by the user (block1.conv2)" in shown
    (why,) = command(*words, "--json").json["why"]
    assert [link["ops"] for link in why["chain"]] == [["batch_norm at bn1"], ["add at block1"]]
    assert why["end"] == "block1.conv2.weight:0"


RULES = """
import torch
import metaprune as mp

@torch.library.custom_op("mpcli::gain", mutates_args=())
def gain(x: torch.Tensor) -> torch.Tensor:
    return x * 2

@gain.register_fake
def _(x):
    return torch.empty_like(x)
"""
RULE = """
import own_nets
import metaprune as mp

@mp.register_rule("mpcli::gain")
def rule(call):
    return call.dims(call["x"])
"""
NET = """
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 6), torch.nn.Linear(6, 4)
    def forward(self, x):
        return self.b(gain(self.a(x)))
def build():
    return Net(), torch.randn(2, 8)
"""


def test_rules_of_users_are_imported(tmp_path: Path) -> None:
    (tmp_path / "own_nets.py").write_text(RULES + NET)
    (tmp_path / "own_rules.py").write_text(RULE)
    network = ["--model", "own_nets:build"]
    stuck = command("inspect", *network).out
    assert "op mpcli::gain at the top level has no rule" in " ".join(stuck.replace("│", " ").split())
    free = command("inspect", *network, "--rules", "own_rules", "--json").json
    assert [axis["name"] for axis in free["axes"] if axis["prunable"]] == ["a"]
    quick = ["--no-track", "--no-export", "--budget", "params=0.6"]
    (tmp_path / "own.yaml").write_text("model: own_nets:build\nrules: own_rules\nonly: [a]\n")
    told = command("prune", "--config", "own.yaml", *quick, "--out", "out", "--json").json
    assert told["plan"]["made_by"]["rules"] == ["mpcli::gain at the top level"]
    assert told["plan"]["made_by"]["only"] == ["a"]
    assert "--rules own_rules --only a" in told["reproduce"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 3, "`--model` is needed"),
        (["--model", "zoo:mlpp"], 3, "Did you mean 'mlp'?"),
        (["--model", "zoo:mlp", "--input-shape", "1,x"], 3, "whole numbers separated by commas"),
        (["--model", "zoo:cifar_resnet8", "--input-shape", "1,5,32,32"], 3, "rejects an input of shape (1, 5, 32, 32)"),
        (["--model", "zoo:mlp", "--model-arg", "hidden"], 3, "NAME=VALUE"),
        (["--model", "zoo:mlp", "--freeze", "layerz.*"], 3, "`freeze` must match a module"),
        (["--model", "zoo:mlp", "--only", "Liner"], 3, "Did you mean 'Linear'?"),
        (["--model", "zoo:mlp", "--rules", "no.such"], 3, "'no.such' is none"),
        (["--model", "zoo:mlp", "--rules", "a b"], 3, "'a b' is none"),
        (["--model", "zoo:mlp", "--why", "layers.0.wieght:0"], 3, "Did you mean 'layers.0.weight'?"),
        (["--model", "zoo:mlp", "--weights", "none.safetensors"], 3, "there is no file of weights"),
    ],
)
def test_bad_input_is_refused(words: list[str], code: int, said: str) -> None:
    done = command("inspect", *words)
    assert done.code == code
    assert said in done.said
    assert done.out == ""
