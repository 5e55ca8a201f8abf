"""What a config may say, and where it is wrong."""

from pathlib import Path

import pytest

from metaprune.allocate import ALLOCATORS
from metaprune.config import shipped_recipes
from metaprune.criteria import CRITERIA
from metaprune.errors import ConfigError, MetapruneError
from metaprune.recovery import RECOVERIES
from metaprune.search.campaign import Campaign
from metaprune.search.settings import Choices, Rung, Settings, Stop, read_settings
from metaprune.search.store import open_storage
from tests.search.player import ABOUT

NAMES = {"criterion": (*CRITERIA, "metanet"), "allocator": (*ALLOCATORS, "tas"), "recovery": tuple(RECOVERIES)}
CONFIG = """# A campaign.
model: zoo:digits_cnn
data: digits
choices:
  budget: [macs=0.5, macs=0.3]
  criterion: [l2, taylor]
  metanet: [off, scores]
  recovery: recalibrate_norm
space: {freeze: conv1, grid: 0.25}
rungs:
  - {kind: evaluate, images: 60}
  - {kind: finetune, top: 2}
stop: {trials: 9}
limits: params=0.9,accuracy=20
"""


def read(folder: Path, change: tuple[str, str] = ("", "")) -> Settings:
    path = folder / "mine.yaml"
    path.write_text(CONFIG.replace(*change))
    return read_settings(path, NAMES)


def test_a_config_is_read(tmp_path: Path) -> None:
    found = read(tmp_path)
    assert found.name == "mine"
    assert found.choices == Choices(
        budget=("macs=0.5", "macs=0.3"),
        criterion=("l2", "taylor"),
        metanet=("off", "scores"),  # YAML takes the bare word for a falsehood
        recovery=("recalibrate_norm",),
    )
    assert found.space.freeze == ("conv1",)
    assert found.rungs == (Rung(kind="evaluate", images=60), Rung(kind="finetune", top=2))
    assert (found.stop, str(found.analytic), found.measured) == (Stop(trials=9), "params=0.9", {"accuracy": 20.0})
    assert str(found.budget("macs=0.5")) == "macs=0.5,params=0.9"


def test_what_is_given_goes_over_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(CONFIG)
    found = read_settings(path, NAMES, workers=3, storage=None, stop={"seconds": 5.0})
    assert (found.workers, found.storage, found.stop) == (3, None, Stop(trials=9, seconds=5.0))


def test_the_identity_is_of_what_decides(tmp_path: Path) -> None:
    found = read(tmp_path)
    assert read(tmp_path, ("stop: {trials: 9}", "stop: {trials: 12}\nworkers: 4")).identity == found.identity
    assert read(tmp_path, ("taylor", "obs")).identity != found.identity
    assert read(tmp_path, ("data: digits", "data: npz:elsewhere\nweights: some.safetensors")).identity == found.identity


BAD = {
    "unknown key": ("stop:", "stp:", ":13: no key is named 'stp'. Did you mean 'stop'?"),
    "unknown key of a section": ("criterion:", "criterium:", ":6: `choices.criterium` is no key"),
    "unknown key of a rung": ("top: 2", "tops: 2", "`rungs`, no. 2, `tops`"),
    "unknown criterion": ("taylor", "tailor", ":6: `choices.criterion` must hold registered names, but has 'tailor'."),
    "unknown recovery": ("recalibrate_norm", "reconstruc", "Did you mean 'reconstruct'?"),
    "unknown mode": ("scores", "score", "Did you mean 'scores'?"),
    "kind of a rung": ("kind: finetune", "kind: train", "'curves', 'evaluate' or 'finetune'"),
    "no budget": ("macs=0.5, macs=0.3", "macs=0.5, max=0.3", "in one of macs, params"),
    "twice the same": ("macs=0.5, macs=0.3", "macs=0.5, macs=0.5", "different values"),
    "range upside down": ("[macs=0.5, macs=0.3]", "{macs: [0.7, 0.3]}", "lower one first"),
    "range off the steps": ("[macs=0.5, macs=0.3]", "{macs: [0.31, 0.7]}", "multiples of 5 %"),
    "limit": ("accuracy=20", "accurcy=20", "Did you mean 'accuracy'?"),
    "impossible limit": ("accuracy=20", "accuracy=120", "must be quantity=number"),
    "limit that is none": ("accuracy=20", "latency_ms=soon", "must be quantity=number"),
    "objective without evaluator": ("limits:", "objectives: [beauty]\nlimits:", "'beauty' has none. Known: accuracy"),
    "too many objectives": ("limits:", "objectives: [macs, params, bytes, loss]\nlimits:", "one to three"),
    "share and top": ("top: 2", "top: 2, share: 0.5", "`top` or `share`"),
    "no trial": ("trials: 9", "trials: 0", "`trials >= 1`"),
    "grid": ("grid: 0.25", "grid: 2", "`0 < grid <= 0.5`"),
    "sampler": ("limits:", "sampler: cmaes\nlimits:", "'tpe', 'gp', 'nsga2' or 'random'"),
    "no rung": ("\n  - {kind: evaluate, images: 60}\n  - {kind: finetune, top: 2}", " []", "at least one fidelity"),
    "no model": ("model: zoo:digits_cnn", "", "`--model` is needed"),
    "too many runs": ("limits:", "children: 500\nlimits:", "`1 <= children <= 100`"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configs_are_refused_with_place_and_way_out(tmp_path: Path, case: str) -> None:
    old, new, said = BAD[case]
    assert old in CONFIG
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, (old, new))
    assert said in str(caught.value), str(caught.value)


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name.startswith("search/")])
def test_shipped_configs_load_and_can_begin(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("METAPRUNE_DATA", "METAPRUNE_CIFAR10"):
        monkeypatch.setenv(variable, f"/somewhere/{variable.lower()}")
    found = read_settings(name, NAMES)
    assert read_settings(name.partition("/")[2], NAMES) == found
    assert found.name == name.partition("/")[2] or found.name == name.rpartition("/")[2]
    campaign = Campaign.begin(found, open_storage(None, tmp_path), ABOUT)
    assert len(campaign.queues[0].tasks()) >= 3
    assert len(campaign.distributions) <= 12


def test_there_are_all_shipped_configs() -> None:
    names = {name.partition("/")[2] for name in shipped_recipes() if name.startswith("search/")}
    assert names == {"digits", "cifar10_resnet56", "cifar10_tas", "cifar10_tyr", "transformer_tyr"}


def test_an_unknown_config_names_a_near_one() -> None:
    with pytest.raises(MetapruneError, match="Did you mean"):
        read_settings("digit", NAMES)
