"""`metaprune prune --stream`: files in, smaller files out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import metaprune as mp
from metaprune import zoo
from metaprune.shards import Shards
from tests.cli.commands import command, entries

LLAMA = ["--model", "zoo:llama_tiny", "--model-arg", "depth=2"]
HALF = ["--budget", "params=0.6"]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file(zoo.build("llama_tiny", depth=2).state_dict(), folder / "model.safetensors")
    return folder


def test_gives_what_a_run_in_memory_gives(tmp_path: Path, weights: Path) -> None:
    done = command("prune", *LLAMA, *HALF, "--weights", weights, "--stream", "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    told = done.json
    assert told["error_max"] is None
    assert told["after"]["params"] <= 0.6 * told["before"]["params"]
    assert set(told["files"]) == {"folder", "model.safetensors", "plan.json", "example.safetensors", "result.json"}
    assert "--stream" in told["reproduce"]
    file = weights / "model.safetensors"
    quiet = ["--no-track", "--no-bench", "--no-export"]
    usual = command("prune", *LLAMA, *HALF, "--weights", file, *quiet, "--out", tmp_path / "usual", "--json")
    assert usual.code == 0, usual.err
    assert told["plan"] == usual.json["plan"]
    ours, theirs = Shards(tmp_path / "out"), load_file(tmp_path / "usual" / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert set(theirs) - set(ours) == {f"blocks.{k}.attention.inv_freq" for k in range(2)}  # not kept by the model
    slim = mp.load(tmp_path / "out", zoo.build("llama_tiny", depth=2))
    assert sum(parameter.numel() for parameter in slim.parameters()) == told["after"]["params"]


def test_says_so_to_people(tmp_path: Path, weights: Path) -> None:
    done = command("prune", *LLAMA, *HALF, "--weights", weights, "--stream", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "Checks ok: calls" in done.said + " ".join(done.out.split())
    assert {"run.json", "outcome.json"} <= set(entries(tmp_path / "out"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Give them: --weights"),
        (["--weights", "{weights}", "--data", "digits"], "`--data` needs a network that runs"),
        (["--weights", "{weights}", "--recovery", "finetune"], "`--recovery` needs a network that runs"),
        (["--weights", "{weights}", "--epochs", "2"], "`--epochs` needs a network that runs"),
        (["--weights", "{weights}", "--criterion", "taylor"], "needs data. Give"),
        (["--weights", "{weights}", "--set", "recovery.epochs=2"], "recovery 'none' has no option 'epochs'"),
        (["--weights", "{weights}", "--set", "criterion.p=2"], "criterion 'l2' has no option 'p'"),
        (["--weights", "{weights}/no.safetensors"], "weights must be in safetensors files, but"),
        (["--weights", "{weights}", "--model-arg", "hidden=64"], "must be (64, 64), but is (64, 176)"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, weights: Path, words: list[Any], message: str
) -> None:
    words = [word.format(weights=weights) for word in words]
    done = command("prune", *LLAMA, *HALF, *words, "--stream", "--out", tmp_path / "out")
    assert done.code in (2, 3)
    assert message in done.said
    assert not (tmp_path / "out").exists()
