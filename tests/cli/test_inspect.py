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


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 3, "`--model` is needed"),
        (["--model", "zoo:mlpp"], 3, "Did you mean 'mlp'?"),
        (["--model", "zoo:mlp", "--input-shape", "1,x"], 3, "whole numbers separated by commas"),
        (["--model", "zoo:cifar_resnet8", "--input-shape", "1,5,32,32"], 3, "rejects an input of shape (1, 5, 32, 32)"),
        (["--model", "zoo:mlp", "--model-arg", "hidden"], 3, "NAME=VALUE"),
        (["--model", "zoo:mlp", "--weights", "none.safetensors"], 3, "there is no file of weights"),
    ],
)
def test_bad_input_is_refused(words: list[str], code: int, said: str) -> None:
    done = command("inspect", *words)
    assert done.code == code
    assert said in done.said
    assert done.out == ""
