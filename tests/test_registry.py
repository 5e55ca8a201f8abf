from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from metaprune.errors import ConfigError
from metaprune.registry import Registry


def test_names_are_unique_and_listed() -> None:
    registry: Registry[type] = Registry("thing", "metaprune.things")
    registry.register("b")(int)
    registry.register("a")(str)
    assert list(registry) == ["a", "b"]
    assert "a" in registry
    assert len(registry) == 2
    with pytest.raises(ConfigError, match="registered already"):
        registry.register("a")(float)
    with pytest.raises(ConfigError, match=r"no thing is named 'c'.*Known: a, b"):
        registry["c"]


def test_a_broken_plugin_is_kept_and_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoint("broken", "no_such_module_of_anybody", "metaprune.things")
    monkeypatch.setattr(
        "metaprune.registry.entry_points", lambda group: [broken] if group == "metaprune.things" else []
    )
    registry: Registry[type] = Registry("thing", "metaprune.things")
    registry.register("a")(int)
    assert registry["a"] is int
    assert "no_such_module_of_anybody" in registry.broken["broken"]


def test_a_registry_fills_itself_from_its_home() -> None:
    from metaprune.plans import EDITS

    assert {"keep", "set_weight"} <= set(EDITS)


def test_a_member_knows_its_name() -> None:
    from metaprune.allocate import ALLOCATORS, Uniform

    assert ALLOCATORS.name_of(Uniform) == "uniform"
    assert ALLOCATORS.name_of(dict) is None


def test_a_registry_may_have_several_homes() -> None:
    from metaprune.allocate import ALLOCATORS

    assert {ALLOCATORS[name].__module__.split(".")[1] for name in ALLOCATORS} == {"allocate", "search"}


def test_groups_of_plugins_are_those_that_contributors_are_told() -> None:
    from metaprune.allocate import ALLOCATORS
    from metaprune.criteria import CRITERIA

    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
    assert all(f"`{registry.group}`" in text for registry in (CRITERIA, ALLOCATORS))
