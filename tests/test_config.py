"""Recipes: every shipped one is read, and what is wrong in one is said with its file, line and key."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from metaprune.allocate import ALLOCATORS
from metaprune.config import PruneOptions, Recipe, load_recipe, options_of, prune_options, shipped_recipes
from metaprune.criteria import CRITERIA
from metaprune.errors import ConfigError, InputError
from metaprune.metatrain.recipe import KEYS, SECTIONS
from metaprune.recovery import RECOVERIES, resolve
from metaprune.zoo import MODELS

CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = {"criterion": tuple(CRITERIA), "allocator": tuple(ALLOCATORS), "recovery": tuple(RECOVERIES)}


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_every_file_below_configs_is_a_recipe_that_ships() -> None:
    files = {path for path in CONFIGS.rglob("*") if path.suffix in (".yaml", ".yml", ".json", ".toml")}
    assert {path.resolve() for path in shipped_recipes().values()} == {path.resolve() for path in files}
    assert {path.parent.name for path in files} == {"prune", "metatrain", "devices", "search"}


def test_every_shipped_recipe_says_what_it_is() -> None:
    for path in shipped_recipes().values():
        assert path.read_text().startswith("# ")  # the line that `metaprune list configs` shows


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name.startswith("prune/")])
def test_a_shipped_recipe_loads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("METAPRUNE_DATA", "METAPRUNE_CIFAR10"):
        monkeypatch.setenv(variable, f"/somewhere/{variable.lower()}")
    options = prune_options({}, load_recipe(name), NAMES)
    assert options.model.removeprefix("zoo:") in MODELS
    assert "$" not in f"{options.weights}{options.data}"
    assert resolve(options.recovery, **options.training)


def test_the_last_part_of_a_name_is_enough() -> None:
    assert load_recipe("digits").path == shipped_recipes()["prune/digits"]
    assert load_recipe("default", "metatrain", (*KEYS, *SECTIONS)).path == shipped_recipes()["metatrain/default"]
    assert load_recipe("prune/digits", "metatrain").path == shipped_recipes()["prune/digits"]


def test_a_variable_may_stand_for_something_else_where_it_is_not_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, "model: m\nbudget: macs=0.5\nmodel_args: {a: ['${MP_TEST:-b}/c']}\ndata: ${MP_TEST:-}x\n")
    options = prune_options({}, load_recipe(path))
    assert (options.model_args, options.data) == ({"a": ["b/c"]}, "x")
    monkeypatch.setenv("MP_TEST", "d")
    options = prune_options({}, load_recipe(path))
    assert (options.model_args, options.data) == ({"a": ["d/c"]}, "dx")


def test_flags_go_over_a_recipe_and_a_recipe_over_defaults(tmp_path: Path) -> None:
    path = written(tmp_path, "model: zoo:mlp\nbudget: macs=0.5\nlr: 1e-3\ninput_shape: [1, 1, 8, 8]\n")
    options = prune_options({"budget": "macs=0.3", "seed": None}, load_recipe(path))
    assert (options.model, options.budget, options.seed) == ("zoo:mlp", "macs=0.3", 0)
    assert options.lr == 1e-3  # YAML 1.1 reads 1e-3 as a text
    assert options.input_shape == (1, 1, 8, 8)
    assert options.training == {"lr": 1e-3}


def test_names_may_be_a_list(tmp_path: Path) -> None:
    path = written(tmp_path, "model: m\nbudget: macs=0.5\nrecovery: [recalibrate_norm, finetune]\n")
    assert prune_options({}, load_recipe(path), NAMES).recovery == "recalibrate_norm,finetune"


def test_places_decide_nothing() -> None:
    here = prune_options({"model": "m", "budget": "macs=0.5", "out": "here", "track": False})
    there = prune_options({"model": "m", "budget": "macs=0.5", "out": "there", "tracking_uri": "sqlite:///x.db"})
    assert here.deciding == there.deciding
    assert PruneOptions(**here.deciding).deciding == here.deciding


def test_options_are_frozen_and_closed() -> None:
    options = prune_options({"model": "m", "budget": "macs=0.5"})
    with pytest.raises(ValidationError):
        options.seed = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        PruneOptions(model="m", budget="macs=0.5", speed=3)  # type: ignore[call-arg]


def test_variables_are_filled_in_where_they_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(
        tmp_path, "model: m\nbudget: macs=0.5\nweights: ${MP_TEST_HOME}/a.safetensors\ndata: npz:${MP_TEST_HOME}/b\n"
    )
    monkeypatch.setenv("MP_TEST_HOME", "/data")
    options = prune_options({}, load_recipe(path))
    assert (options.weights, options.data) == ("/data/a.safetensors", "npz:/data/b")
    monkeypatch.delenv("MP_TEST_HOME")
    with pytest.raises(ConfigError) as caught:
        prune_options({}, load_recipe(path))
    for part in (f"{path}:3: `weights`", "MP_TEST_HOME", "is not set", "export MP_TEST_HOME=", "`--weights`"):
        assert part in str(caught.value)
    assert prune_options({"weights": "w", "data": "d"}, load_recipe(path)).weights == "w"  # not needed any more


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: m\nbudgte: macs=0.5\n", [":2", "'budgte'", "Did you mean 'budget'?", "batch_size"]),
        ("model: m\nmodel: n\n", [":2", "`model` stands in line 1 too"]),
        ("model: m\nbudget: [macs=0.5\n", [":3", "must be YAML"]),
        ("- model\n- budget\n", ["lines of `key: value`"]),
        ("", ["lines of `key: value`"]),
        ("model: !!python/object/apply:os.system ['true']\n", ["must be YAML", "python/object"]),
        ("model: m\nbudget: macs=0.5\nepochs: 0\n", [":3: `epochs` must be at least 1, but it is 0"]),
        ("model: m\nbudget: macs=0.5\nseed: 1.5\n", [":3: `seed` must be a whole number, but it is 1.5"]),
        ("model: m\nbudget: macs=0.5\nlr: fast\n", [":3: `lr` must be a number, but it is 'fast'"]),
        ("model: m\nbudget: macs=0.5\nlr: .inf\n", [":3: `lr` must be finite"]),
        ("model: m\nbudget: macs=0.5\ntrack: maybe\n", [":3: `track` must be true or false, but it is 'maybe'"]),
        ("model: m\nbudget: macs=0.5\nweights: 3\n", [":3: `weights` must be a text, but it is 3"]),
        ("model: m\nbudget: macs=0.5\nfloor: 2\n", [":3: `floor` must be at most 1, but it is 2"]),
        ("model: m\nbudget: macs=0.5\ninput_shape: [1, 0]\n", [":3: `input_shape` must be at least 1"]),
        ("model: m\nbudget: macs=0.5\nmodel_args: 3\n", [":3: `model_args` must be a mapping of names to values"]),
        ("model: m\nbudget: macs=0.5\naccelerator: gpu\n", [":3: `accelerator` must be 'auto', 'cpu' or 'cuda'"]),
        (
            "model: m\nbudget: macs=0.5\ncriterion: tailor\n",
            [":3: `criterion`", "'tailor'", "Did you mean 'taylor'?", ", ".join(sorted(CRITERIA))],
        ),
        (
            "model: m\nbudget: macs=0.5\nrecovery: recalibrate_norm,finetun\n",
            [":3: `recovery`", "'finetun'", "Did you mean 'finetune'?"],
        ),
        ("model: m\n", ["`--budget` is needed"]),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, text: str, said: list[str]) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        prune_options({}, load_recipe(path), NAMES)
    for part in said:
        assert part in str(caught.value)
    if "--budget" not in said[0]:
        assert str(path) in str(caught.value)


def test_a_wrong_flag_is_named_as_a_flag(tmp_path: Path) -> None:
    path = written(tmp_path, "model: m\nbudget: macs=0.5\nbatch_size: 8\n")
    with pytest.raises(ConfigError, match="`--batch-size` must be at least 1, but it is 0"):
        prune_options({"batch_size": 0}, load_recipe(path))
    with pytest.raises(ConfigError, match="`--criterion` must be a registered name, but it is 'tailor'"):
        prune_options({"criterion": "tailor"}, load_recipe(path), NAMES)


@pytest.mark.parametrize("name", ["digitz", "prune/digit", "nowhere.yaml"])
def test_a_recipe_that_is_not_there_names_what_ships(name: str) -> None:
    with pytest.raises(InputError, match="prune/digits"):
        load_recipe(name)


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="readable text file"):
        load_recipe(tmp_path / "binary.yaml")


def test_a_recipe_knows_its_lines() -> None:
    recipe = Recipe(Path("a.yaml"), {"seed": 1}, {"seed": 7})
    assert recipe.where("seed") == "a.yaml:7: `seed`"
    assert recipe.where("model") == "a.yaml: `model`"


@dataclass(frozen=True, kw_only=True)
class Engine:
    power: int = 1
    colour: str = "red"

    def __post_init__(self) -> None:
        if self.power < 1:
            raise ConfigError(f"`power >= 1` must hold, but power={self.power}.")


KEYS_OF_ENGINE = ("power", "colour")


def engine(path: Path, **flags: Any) -> Engine:
    recipe = load_recipe(path, keys=("model", "engine"))
    return options_of(Engine, flags, recipe.section("engine", KEYS_OF_ENGINE))


def test_a_section_is_read_like_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MP_TEST", "green")
    path = written(tmp_path, "model: m\nengine:\n  power: 3\n  colour: ${MP_TEST}\n")
    assert engine(path) == Engine(power=3, colour="green")
    assert engine(path, power=4) == Engine(power=4, colour="green")
    assert engine(written(tmp_path, "model: m\n")) == engine(written(tmp_path, "engine:\n")) == Engine()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "model: m\nengine: {power: 1,\n  pover: 2}\n",
            ":3: `engine.pover` is no key that is known. Did you mean 'pow",
        ),
        ("model: m\nengine:\n  power: much\n", ":3: `engine.power` must be a whole number, but it is 'much'"),
        ("model: m\nengine:\n  power: 0\n", ":2: `engine`: `power >= 1` must hold, but power=0"),
        ("model: m\nengine: 3\n", ":2: `engine` must be a mapping of names to values, but it is 3"),
        ("model: m\nengine:\n  power: 1\n  power: 2\n", ":4: every key may stand once, but `power` stands in line 3"),
        ("model: m\nengine:\n  colour: ${MP_NONE}\n", ":3: `engine.colour` needs the environment variable MP_NONE"),
    ],
)
def test_what_is_wrong_in_a_section_is_said_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        engine(path)
    assert f"{path}{said}" in str(caught.value)
