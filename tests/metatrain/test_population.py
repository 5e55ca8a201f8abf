"""The population: built, reused, killed and gone on with, damaged, split; on digits with tiny networks."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from metaprune import zoo
from metaprune.config import shipped_recipes
from metaprune.data import Split, load
from metaprune.errors import ConfigError, InputError, ResourceError
from metaprune.graph import trace
from metaprune.measure import accuracy
from metaprune.metatrain import Member, MemberSpec, Population, Recipe
from metaprune.metatrain._training import random_plan
from metaprune.metatrain.store import Store
from metaprune.recovery import Finetune, NoProgress
from metaprune.run import locked

MLP = MemberSpec(model="mlp", options={"widths": [16]})
CNN = MemberSpec(model="digits_cnn", options={"widths": [4, 8]}, seed=1, split="validation")
TINY = Recipe(
    data="digits", members=(MLP, CNN), epochs=2, batch_size=16, lr=0.1, snapshots=(0.5,), pruned=(0.25,), images=320
)


def weights(population: Population) -> dict[str, dict[str, Tensor]]:
    return {member.name: member.model.state_dict() for member in population.members}


def assert_same(first: Population, second: Population) -> None:
    ones, others = weights(first), weights(second)
    assert ones.keys() == others.keys()
    for name, state in ones.items():
        assert state.keys() == others[name].keys()
        assert all(torch.equal(tensor, others[name][key]) for key, tensor in state.items()), name
    assert [member.accuracy for member in first.members] == [member.accuracy for member in second.members]


def kill_workers() -> None:
    """As the system does when memory ends."""
    for child in multiprocessing.active_children():
        child.kill()


def place_of(member: Member) -> Path:
    assert member.folder is not None
    return member.folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Population:
    return Population.build(tmp_path_factory.mktemp("built"), TINY, workers=1)


@pytest.fixture
def untrainable(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("something is trained")

    monkeypatch.setattr(Finetune, "recover", never)


class TestBuild:
    def test_what_there_is(self, built: Population) -> None:
        assert not built.damaged
        kinds = [(member.kind, member.split, member.family) for member in built.members]
        assert kinds == [
            (kind, split, family)
            for split, family in (("train", "mlp"), ("validation", "digits"))
            for kind in ("trained", "snapshot", "pruned")
        ]
        assert [member.name for member in built.train] == [
            "mlp widths=16 seed=0",
            "mlp widths=16 seed=0 after 1 of 2 epochs",
            "mlp widths=16 seed=0 without 25%",
        ]
        assert [member.parent for member in built.train] == [None, *["mlp widths=16 seed=0"] * 2]
        assert {member.split for member in built.validation} == {"validation"}

    def test_networks_are_what_was_measured(self, built: Population) -> None:
        validation = load("digits").validation
        for member in built.members:
            assert not member.model.training
            assert member.model(member.example_inputs).shape == (2, 10)
            assert accuracy(member.model, validation).top1 == pytest.approx(member.accuracy, abs=0.6)  # one image
            assert Store(place_of(member).parents[1]).read(place_of(member).name).images == len(validation)
        trained, snapshot, pruned = built.train
        assert trained.accuracy > 40
        assert not torch.equal(trained.model.layers[0].weight, snapshot.model.layers[0].weight)
        assert pruned.model.layers[0].weight.shape == (12, 64)

    def test_what_is_there_is_not_made_again(self, built: Population, untrainable: None) -> None:
        folder = place_of(built.members[0]).parents[1]
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("entry.json")}
        assert_same(Population.build(folder, TINY, workers=1), built)
        assert_same(Population.load(folder), built)
        assert Population.load(folder).recipe == TINY
        other = replace(TINY, members=(replace(MLP, split="validation", name="one"), replace(CNN, split="train")))
        swapped = Population.build(folder, other, workers=1)
        assert swapped.validation[0].name == "one"
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("entry.json")} == before
        Population.build(folder, TINY, workers=1)

    @pytest.mark.parametrize(
        "change",
        [
            {"epochs": 3},
            {"lr": 0.2},
            {"batch_size": 8},
            {"images": 256},
            {"members": (replace(MLP, seed=7), CNN)},
            {"members": (replace(MLP, options={"widths": [12]}), CNN)},
        ],
    )
    def test_what_decides_a_network_names_it(self, built: Population, untrainable: None, change: Any) -> None:
        with pytest.raises(AssertionError, match="something is trained"):
            Population.build(place_of(built.members[0]).parents[1], replace(TINY, **change), workers=1)
        Population.build(place_of(built.members[0]).parents[1], TINY, workers=1)

    def test_any_number_of_processes_gives_the_same(self, built: Population, tmp_path: Path) -> None:
        assert_same(Population.build(tmp_path, TINY, workers=2), built)

    def test_another_seed_gives_other_networks(self, built: Population, tmp_path: Path) -> None:
        recipe = replace(TINY, snapshots=(), pruned=())
        other = Population.build(tmp_path, recipe, workers=1, seed=1)
        assert not torch.equal(other.members[0].model.layers[0].weight, built.members[0].model.layers[0].weight)

    def test_test_images_are_not_read_and_validation_images_not_trained_on(
        self, built: Population, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: set[tuple[str, bool]] = set()
        batches = Split.batches

        def noted(self: Split, *args: Any, **kwargs: Any) -> Any:
            read.add((self.name, kwargs.get("shuffle") is not None))
            return batches(self, *args, **kwargs)

        monkeypatch.setattr(Split, "batches", noted)
        Population.build(tmp_path, TINY, workers=1)
        assert read == {("train", True), ("train", False), ("validation", False)}

    def test_a_network_that_diverges_is_named_and_the_rest_used(self, tmp_path: Path) -> None:
        members = (MLP, replace(CNN, lr=1e12), replace(CNN, seed=3))
        population = Population.build(tmp_path, replace(TINY, members=members), workers=1)
        failed = {name for name, _ in population.damaged}
        assert failed == {
            name + end
            for name in ["digits_cnn widths=4x8 seed=1"]
            for end in ("", " after 1 of 2 epochs", " without 25%")
        }
        assert "finite" in population.damaged[0][1]
        assert len(population.members) == 6

    def test_progress_counts_networks(self, tmp_path: Path) -> None:
        told: list[Any] = []

        class Tell(NoProgress):
            def start(self, total: int, unit: str, description: str, done: int = 0) -> None:
                told.append((total, unit))

            def advance(self, amount: int = 1, status: str = "") -> None:
                told.append(status)

            def close(self) -> None:
                told.append("closed")

        recipe = replace(TINY, epochs=1, snapshots=(), pruned=())
        Population.build(tmp_path, recipe, workers=1, progress=Tell())
        names = [f"{spec.title}: ready" for spec in recipe.members]
        assert told == [(2, "networks"), *names, "closed"]


class TestGivenWeights:
    def test_of_a_network_that_exists(self, tmp_path: Path, built: Population) -> None:
        file = tmp_path / "known.safetensors"
        save_file(built.members[0].model.state_dict(), file)
        given = replace(MLP, weights=str(file), name="known")
        recipe = replace(TINY, members=(given, CNN))
        population = Population.build(tmp_path / "made", recipe, workers=1)
        known, pruned = population.train
        assert (known.name, known.kind, pruned.kind, pruned.parent) == ("known", "trained", "pruned", "known")
        assert torch.equal(known.model.layers[0].weight, built.members[0].model.layers[0].weight)
        assert known.accuracy == built.members[0].accuracy
        file.unlink()
        assert_same(Population.load(tmp_path / "made"), population)

    def test_optional_ones_are_left_out_and_named(self, tmp_path: Path) -> None:
        file = f"{tmp_path}/none.safetensors"
        absent = MemberSpec(model="mlp", weights=file, optional=True)
        recipe = replace(TINY, members=(*TINY.members, absent), epochs=1, snapshots=(), pruned=())
        population = Population.build(tmp_path, recipe, workers=1)
        assert population.damaged == (("mlp none", f"it is optional, and there is no file {file}"),)
        with pytest.raises(InputError, match="optional: true"):
            Population.build(tmp_path, replace(recipe, members=(*TINY.members, replace(absent, optional=False))))


class TestDamage:
    @pytest.fixture
    def folder(self, built: Population, tmp_path: Path) -> Path:
        return Path(shutil.copytree(place_of(built.members[0]).parents[1], tmp_path / "copied"))

    @pytest.mark.parametrize("file", ["model.safetensors", "entry.json", "plan.json"])
    @pytest.mark.parametrize("harm", ["cut off", "changed", "deleted"])
    def test_a_damaged_entry_is_named_and_the_rest_used(
        self, folder: Path, untrainable: None, file: str, harm: str
    ) -> None:
        place = place_of(Population.load(folder).members[2])
        whole = (place / file).read_bytes()
        if harm == "deleted":
            (place / file).unlink()
        else:
            (place / file).write_bytes(whole[: len(whole) // 2] if harm == "cut off" else whole[:-3] + b"\0\0\0")
        populations = [Population.load(folder)]
        if (file, harm) != ("entry.json", "deleted"):  # without its entry a network is made again
            populations.append(Population.build(folder, TINY, workers=1))
        for population in populations:
            ((name, why),) = population.damaged
            assert name == "mlp widths=16 seed=0 without 25%"
            assert str(place) in why
            assert [member.kind for member in population.train] == ["trained", "snapshot"]
            assert len(population.validation) == 3

    def test_without_a_network_to_validate_on(self, folder: Path) -> None:
        for member in Population.load(folder).validation:
            (place_of(member) / "model.safetensors").write_bytes(b"")
        population = Population.load(folder)
        assert len(population.train) == len(population.damaged) == 3
        with pytest.raises(ConfigError, match=r"network of the split 'validation'.*3 cannot be used.*is damaged"):
            _ = population.validation

    def test_deleted_entries_are_made_again(self, folder: Path) -> None:
        before = Population.load(folder)
        place = place_of(before.members[1])
        for path in place.iterdir():
            path.unlink()
        (place / ".model.safetensors.abc").write_bytes(b"half")
        assert [name for name, _ in Population.load(folder).damaged] == [before.members[1].name]
        assert_same(Population.build(folder, TINY, workers=1), before)
        assert sorted(path.name for path in place.iterdir()) == ["entry.json", "model.safetensors"]

    def test_a_folder_without_a_population(self, tmp_path: Path, folder: Path) -> None:
        with pytest.raises(InputError, match="the record of a population must be a file"):
            Population.load(tmp_path / "nowhere")
        record = folder / "population.json"
        for text in ("{}", "[]", json.dumps({"schema": 1, "recipe": 3})):
            record.write_text(text)
            with pytest.raises(InputError, match="record of a population, but it is damaged"):
                Population.load(folder)
        record.write_text(json.dumps({"schema": 99}))
        with pytest.raises(InputError, match="must have schema 1"):
            Population.load(folder)


LONG = replace(TINY, members=(MLP, replace(CNN, epochs=10)), images=None, snapshots=(0.2,), pruned=())
SCRIPT = """
import sys
from metaprune.metatrain import Population
from tests.metatrain.test_population import LONG
if __name__ == "__main__":
    Population.build(sys.argv[1], LONG, workers=int(sys.argv[2]))
"""


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(what: Callable[[], Any]) -> Any:
    for _ in range(1200):
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError("it took more than a minute")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Population:
    return Population.build(tmp_path_factory.mktemp("whole"), LONG, workers=1)


class TestInterruption:
    @pytest.mark.skipif(not Path("/proc").is_dir(), reason="children are found in /proc")
    @pytest.mark.parametrize(
        ("workers", "ending"),
        [
            (2, signal.SIGKILL),
            pytest.param(2, signal.SIGINT, marks=pytest.mark.long),
            pytest.param(1, signal.SIGKILL, marks=pytest.mark.long),
        ],
    )
    def test_a_build_that_was_ended_goes_on(
        self, whole: Population, tmp_path: Path, workers: int, ending: signal.Signals
    ) -> None:
        script, folder = tmp_path / "script.py", tmp_path / "made"
        script.write_text(SCRIPT)
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        with subprocess.Popen([sys.executable, script, folder, str(workers)], env=environment) as process:
            trained = [member for member in whole.members if member.kind == "trained"]
            first, second = (folder / "networks" / place_of(member).name for member in trained)
            checkpoint = second / "training-cpu" / "finetune.safetensors"
            wait_for(lambda: (first / "entry.json").exists() and checkpoint.exists())
            working = [process.pid, *children(process.pid)]
            process.send_signal(ending)
            assert process.wait(60) != 0
            wait_for(lambda: not any(runs(one) for one in working))
        assert not (second / "entry.json").exists()
        before = (first / "entry.json").stat().st_mtime_ns
        resumed = Population.build(folder, LONG, workers=1)
        assert_same(resumed, whole)
        assert (first / "entry.json").stat().st_mtime_ns == before
        assert not (second / "training-cpu").exists()

    @pytest.mark.long
    def test_a_worker_that_is_killed_is_said(self, whole: Population, tmp_path: Path) -> None:
        def kill() -> None:
            wait_for(lambda: any(tmp_path.glob("networks/*/training-cpu/*.safetensors")))
            kill_workers()

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(ResourceError, match="was killed, most likely for memory"):
            Population.build(tmp_path, LONG, workers=2)
        killer.join()
        assert_same(Population.build(tmp_path, LONG, workers=1), whole)

    def test_one_process_at_a_time(self, tmp_path: Path) -> None:
        with locked(tmp_path), pytest.raises(ConfigError, match="one process at a time may work in"):
            Population.build(tmp_path, replace(TINY, epochs=1), workers=1)


class Odd(nn.Module):
    """Answers with something that is no score for each class."""

    def __init__(self, answer: str = "three classes") -> None:
        super().__init__()
        self.linear, self.answer = nn.Linear(64, 3), answer

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x.flatten(1))
        return y if self.answer == "three classes" else (y,)


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"epochs": 0}, ["`epochs >= 1`", "epochs=0"]),
            ({"lr": float("nan")}, ["`0 < lr < inf`", "lr=nan"]),
            ({"batch_size": 0}, ["`batch_size >= 1`"]),
            ({"snapshots": (0.5, 1)}, ["`snapshots are different shares in (0, 1)`", "(0.5, 1)"]),
            ({"pruned": (0.5, 0.5)}, ["`pruned are different shares in (0, 1)`"]),
            ({"images": 0}, ["`images >= 1`"]),
            ({"data": ""}, ["`data is not empty`"]),
            ({"members": ()}, ["at least one member must have `split: train`", "none of 0"]),
            ({"members": (MLP,)}, ["at least one member must have `split: validation`", "none of 1"]),
            ({"members": (MLP, CNN, MLP)}, ["'mlp widths=16 seed=0' is twice", "seed, or a `name`"]),
        ],
    )
    def test_a_recipe_that_is_none(self, change: dict[str, Any], said: list[str]) -> None:
        with pytest.raises(ConfigError) as caught:
            replace(TINY, **change)
        for part in said:
            assert part in str(caught.value)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"seed": -1}, "`seed >= 0` must hold, but seed=-1"),
            ({"epochs": 0}, "`epochs >= 1`"),
            ({"lr": 0.0}, "`0 < lr < inf`"),
            ({"model": ""}, "`model is not empty`"),
            ({"split": "test"}, "`split in"),
            ({"optional": True}, "`optional only with weights`"),
        ],
    )
    def test_a_member_that_is_none(self, change: dict[str, Any], said: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(said)):
            replace(MLP, **change)

    @pytest.mark.parametrize(
        ("member", "error", "said"),
        [
            (MemberSpec(model="zoo:mpl"), ConfigError, "Did you mean 'mlp'"),
            (MemberSpec(model="mlp", options={"width": [8]}), ConfigError, "Did you mean 'widths'"),
            (MemberSpec(model="cifar_vgg11"), ConfigError, "must be a multiple"),
            (MemberSpec(model="mlp", weights="nowhere.safetensors"), InputError, "nowhere.safetensors is not"),
            (MemberSpec(model=f"{__name__}:Odd"), ConfigError, r"Odd seed=0': .*shape \(2, 10\), but give \(2, 3\)"),
            (
                MemberSpec(model=f"{__name__}:Odd", options={"answer": "a tuple"}),
                ConfigError,
                "a classifier must return a tensor",
            ),
        ],
    )
    def test_nothing_is_begun_for_a_member_that_cannot_be(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: MemberSpec, error: type[Exception], said: str
    ) -> None:
        monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__, types.ModuleType(__name__)))
        with pytest.raises(error, match=said):
            Population.build(tmp_path / "made", replace(TINY, members=(*TINY.members, member)), workers=1)
        assert not (tmp_path / "made").exists()

    def test_one_network_under_two_names(self, tmp_path: Path) -> None:
        twin = replace(MLP, name="twin", split="validation")
        with pytest.raises(ConfigError, match="'mlp widths=16 seed=0' and 'twin' are one"):
            Population.build(tmp_path / "made", replace(TINY, members=(MLP, twin)), workers=1)
        assert not (tmp_path / "made").exists()

    def test_weights_of_another_network(self, tmp_path: Path) -> None:
        save_file(zoo.build("mlp").state_dict(), tmp_path / "a.safetensors")
        other = replace(MLP, weights=str(tmp_path / "a.safetensors"))
        with pytest.raises(InputError, match="do not fit Mlp"):
            Population.build(tmp_path / "made", replace(TINY, members=(*TINY.members, other)), workers=1)
        assert not (tmp_path / "made").exists()

    @pytest.mark.parametrize("options", [{"workers": 0}, {"accelerator": "gpu"}])
    def test_options(self, tmp_path: Path, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=next(iter(options))):
            Population.build(tmp_path, TINY, **options)


class TestRecipes:
    @pytest.mark.parametrize("name", [name for name in shipped_recipes() if name.startswith("metatrain/")])
    def test_a_shipped_recipe_can_be_built(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("METAPRUNE_DATA", raising=False)
        monkeypatch.setenv("METAPRUNE_CIFAR10", "somewhere")
        recipe = Recipe.read(name)
        families = {"resnet", "vgg", "mobilenet", "densenet", "resnext", "vit", "mlp"}
        shape = (1, 8, 8) if recipe.data == "digits" else (3, 32, 32)
        found: dict[str, set[str]] = {"train": set(), "validation": set()}
        for spec in recipe.members:
            options = {**zoo.options_for_images(spec.model, shape, 10), **spec.options}
            model = zoo.build(spec.model, **options)
            with torch.no_grad():
                assert model.eval()(torch.zeros(2, *shape)).shape == (2, 10)
            found[spec.split].add(type(model).__module__.rpartition(".")[2])
        assert found["train"] == families
        assert found["validation"] <= families
        assert len(found["validation"]) >= 4

    def test_a_recipe_names_its_place(self, tmp_path: Path) -> None:
        path = tmp_path / "a.yaml"
        path.write_text("data: digits\nmembers:\n  - {model: mlp}\n  - {model: mlp, seed: 1, split: valid}\n")
        with pytest.raises(ConfigError) as caught:
            Recipe.read(path)
        assert f"{path}:2: `members`, no. 2, `split` must be 'train' or 'validation', but it is 'valid'" in str(
            caught.value
        )
        path.write_text("data: digits\nmembers: [{model: mlp, sed: 1}]\n")
        with pytest.raises(ConfigError, match=r"`members`, no. 1, `sed`"):
            Recipe.read(path)
        path.write_text("data: digits\nmember: []\n")
        with pytest.raises(ConfigError, match=r":2: no key is named 'member'. Did you mean 'members'"):
            Recipe.read(path)

    def test_what_is_given_goes_over_what_is_written(self) -> None:
        recipe = Recipe.read("default", epochs=1, images=None)
        assert (recipe.data, recipe.epochs, recipe.images) == ("digits", 1, None)
        assert Recipe.read("paper", epochs=1, images=None) == recipe


def test_a_random_plan_takes_a_share_of_every_axis() -> None:
    network = trace(zoo.build("digits_cnn"), zoo.example_inputs("digits_cnn"))
    plan = random_plan(network, 0.3, seed=1)
    left = network.sizes(plan)
    assert random_plan(network, 0.3, seed=1) == plan != random_plan(network, 0.3, seed=2)
    for axis, size in zip(network.axes, left):
        assert size == (axis.size - int(0.3 * axis.size) if axis.prunable else axis.size)
