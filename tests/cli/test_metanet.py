"""`metaprune prune --metanet`: a metanetwork edits first, and judges what leaves."""

import shlex
from pathlib import Path

import pytest
import torch

from metaprune.metanet import Metanet, PaperMetanet, PaperShape, Shape, checkpoint, save_checkpoint
from metaprune.plans import Plan
from tests.cli.commands import TINY, command, entries

QUICK = ["--no-track", "--no-bench", "--no-export"]
HALF = ["--budget", "macs=0.5"]
LLAMA = ["--model", "zoo:llama_tiny", "--budget", "params=0.6"]


@pytest.fixture
def metanet(tmp_path: Path) -> Path:
    """Untrained, and not the identity that a fresh one is."""
    torch.manual_seed(0)
    made = Metanet(Shape(hidden=16, layers=1, heads=4, rank=2))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return save_checkpoint(made, tmp_path / "own.safetensors", {"about": "three networks of two families"})


@pytest.fixture
def default(metanet: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as the one that ships."""
    monkeypatch.setattr(checkpoint, "SHIPPED", metanet.parent)
    return metanet.rename(metanet.with_stem("default"))


def test_a_metanetwork_edits_before_anything_is_cut(metanet: Path) -> None:
    done = command("prune", *TINY, *HALF, *QUICK, "--metanet", metanet, "--out", "out", "--json")
    assert done.code == 0, done.err
    told = done.json
    assert (told["metanet"], told["criterion"]) == (str(metanet), "metanet")
    assert told["error_max"] <= 1e-5
    assert told["after"]["macs"] <= 0.5 * told["before"]["macs"]
    plan = Plan.load(Path("out/plan.json"))
    assert plan.made_by["metanet"] == str(metanet)
    assert plan.draft().tensors
    assert f"--metanet {metanet}" in told["reproduce"]
    assert str(metanet) in Path("out/report.html").read_text()


def test_any_criterion_may_judge_what_was_edited(metanet: Path) -> None:
    words = ["prune", *TINY, *HALF, *QUICK, "--metanet", metanet, "--criterion", "l2"]
    done = command(*words, "--out", "out")
    assert done.code == 0, done.err
    assert "with the metanetwork" in " ".join(done.out.split())
    assert "cut by l2" in " ".join(done.out.split())


def test_norms_judge_what_the_published_metanetwork_edited(tmp_path: Path) -> None:
    torch.manual_seed(0)
    metanet = save_checkpoint(PaperMetanet(PaperShape(hidden=8, layers=1)), tmp_path / "paper.safetensors")
    folders = []
    for words in ([], ["--criterion", "metanet"], ["--criterion", "l2"]):
        folders.append(f"out{len(folders)}")
        done = command("prune", *TINY, *HALF, *QUICK, "--metanet", metanet, *words, "--out", folders[-1], "--json")
        assert done.code == 0, done.err
    plans = [Plan.load(Path(folder, "plan.json")) for folder in folders]
    assert plans[0].edits == plans[1].edits == plans[2].edits
    assert plans[0].draft().tensors


def test_the_default_judges_where_no_other_is_given(default: Path) -> None:
    done = command("prune", *TINY, *HALF, *QUICK, "--criterion", "metanet", "--out", "out", "--json")
    assert done.code == 0, done.err
    assert (done.json["metanet"], done.json["criterion"]) == (None, "metanet")
    assert not Plan.load(Path("out/plan.json")).draft().tensors


def test_what_ships_is_listed(default: Path) -> None:
    told = command("list", "metanets", "--json").json
    assert told["items"]["metanets"] == [{"name": "default", "about": "three networks of two families"}]
    default.unlink()
    assert "none ships" in command("list", "metanets").out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--metanet nothing", "'nothing' is neither"),
        ("--metanet broken.safetensors", "broken.safetensors must be a metanetwork, but cannot be read"),
        ("--metanet ''", "`--metanet` must not be empty"),
        ("--criterion metanet", "'default' is neither"),
    ],
)
def test_what_cannot_be_read_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, said: str
) -> None:
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path / "nowhere")
    Path("broken.safetensors").write_bytes(b"nothing")
    before = entries(tmp_path)
    done = command("prune", *TINY, *HALF, *QUICK, *shlex.split(words), "--out", "out")
    assert done.code == 3
    assert said in done.said
    assert entries(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--metanet own.safetensors", "`--stream` holds one tensor at a time"),
        ("--criterion metanet", "'metanet' looks at all of them at once. Give"),
    ],
)
def test_files_are_not_read_together(tmp_path: Path, metanet: Path, words: str, said: str) -> None:
    before = entries(tmp_path)
    done = command("prune", *LLAMA, "--stream", "--weights", "w.safetensors", *words.split(), "--out", "out")
    assert done.code == 3
    assert said in done.said
    assert entries(tmp_path) == before
