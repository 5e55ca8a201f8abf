"""The options of methods: what there is of them, and how they are read."""

from dataclasses import dataclass, fields
from typing import Any, Literal

import pytest

from metaprune.allocate import ALLOCATORS
from metaprune.criteria import CRITERIA, L2, Obs
from metaprune.errors import ConfigError
from metaprune.methods import deal, named, options, spelt
from metaprune.recovery import RECOVERIES
from metaprune.registry import Registry

METHODS = [(registry, name) for registry in (CRITERIA, ALLOCATORS, RECOVERIES) for name in registry]
ENGINES: Registry[type[Any]] = Registry("engine", "metaprune.tests.engines")


@ENGINES.register("petrol")
@dataclass(frozen=True, kw_only=True)
class Petrol:
    """Burns.

    Args:
        power: In horses,
            at ``1`` least.
        octane: What it takes.
    """

    power: int = 1
    octane: float | None = None
    colours: tuple[str, ...] = ("red",)
    mode: bool | Literal["auto"] = "auto"
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.power < 1:
            raise ConfigError(f"`power >= 1` must hold, but power={self.power}.")


@ENGINES.register("electric")
@dataclass(frozen=True, kw_only=True)
class Electric:
    """Hums."""

    power: int = 2
    cells: "int" = 3


@ENGINES.register("steam")
@dataclass(frozen=True, kw_only=True)
class Steam:
    """Needs coal."""

    coal: float


@ENGINES.register("plain")
class Plain:
    """No dataclass."""


@pytest.mark.parametrize(("registry", "name"), METHODS, ids=[f"{one.kind}-{name}" for one, name in METHODS])
def test_every_option_says_what_it_means_and_is_read_back_from_its_default(registry: Registry[Any], name: str) -> None:
    found = options(registry[name])
    assert list(found) == [part.name for part in fields(registry[name]) if part.init]
    for option in found.values():
        assert option.about, option
        assert option.default is not None
    texts = {option.name: option.default for option in found.values()}
    assert deal(registry, [name], texts)[0][name] == registry[name]()


def test_an_option_is_told_with_type_default_and_meaning() -> None:
    found = options(Petrol)
    assert (found["power"].default, found["power"].type, found["power"].about) == ("1", "int", "In horses, at 1 least.")
    assert (found["octane"].default, found["octane"].about) == ("none", "What it takes.")
    assert (found["colours"].default, found["quiet"].about) == ("red", "")
    assert options(Steam)["coal"].default is None
    assert options(Plain) == {}


@pytest.mark.parametrize(
    ("option", "given", "read"),
    [
        ("power", "3", 3),
        ("power", 3, 3),
        ("octane", "1e-4", 1e-4),
        ("octane", "none", None),
        ("octane", 95, 95.0),
        ("colours", "red, blue", ("red", "blue")),
        ("colours", "", ()),
        ("colours", ["red", "blue"], ("red", "blue")),
        ("mode", "true", True),
        ("mode", "auto", "auto"),
        ("quiet", "yes", True),
    ],
)
def test_values_are_read_by_the_type_of_the_field(option: str, given: Any, read: Any) -> None:
    made, values = deal(ENGINES, ["petrol"], {option: given})
    assert getattr(made["petrol"], option) == read == values[option]
    assert deal(ENGINES, ["petrol"], {option: spelt(read)})[1] == values  # as a command line says it again


def test_an_option_goes_to_each_that_has_it_and_that_of_one_goes_over_it() -> None:
    made, read = deal(ENGINES, ["petrol", "electric"], {"electric.power": "9", "power": "7", "cells": 4})
    assert made == {"petrol": Petrol(power=7), "electric": Electric(power=9, cells=4)}
    assert read == {"electric.power": 9, "power": 7, "cells": 4}


@pytest.mark.parametrize(
    ("names", "given", "said"),
    [
        (["petrol"], {"pover": 1}, "engine 'petrol' has no option 'pover'. Did you mean 'power'? Known: colours, mode"),
        (
            ["petrol"],
            {"cells": 1},
            "no option 'cells'. Known: colours, mode, octane, power, quiet. Those that have it: ",
        ),
        (["petrol", "plain"], {"plain.power": 1}, "engine 'plain' has no option 'power'. Known: none."),
        ([], {"power": 1}, "engine 'none' has no option 'power'. Known: none. Those that have it: electric, petrol."),
        (
            ["petrol"],
            {"electric.power": 1},
            "it is for engine 'electric', but 'petrol' was chosen. Leave it out, or ch",
        ),
        (["petrol"], {"petrl.power": 1}, "it is for engine 'petrl', but 'petrol' was chosen. Did you mean 'petrol'?"),
        ([], {"electric.power": 1}, "it is for engine 'electric', but none was chosen."),
        (
            ["petrol"],
            {"power": 1, "petrol.power": 2},
            "an option may be given once, but `power` and `petrol.power` say",
        ),
        (["petrol"], {"power": "much"}, "`power` must be a whole number, but it is 'much'."),
        (["petrol"], {"power": 1.5}, "`power` must be a whole number, but it is 1.5."),
        (["petrol"], {"power": True}, "`power` must be a whole number, but it is True."),
        (["petrol"], {"octane": "nan"}, "`octane` must be finite"),
        (["petrol"], {"octane": "high"}, "`octane` must be a number or none, but it is 'high'."),
        (["petrol"], {"mode": "of"}, "`mode` must be true or false or 'auto', but it is 'of'."),
        (["petrol"], {"quiet": "maybe"}, "`quiet` must be true or false, but it is 'maybe'."),
        (["petrol"], {"colours": 3}, "`colours` must be a list, but it is 3."),
        (["petrol"], {"power": 0}, "`power >= 1` must hold, but power=0."),
        (["steam"], {}, "engine 'steam' cannot be made of {}"),
    ],
)
def test_what_does_not_fit_is_refused(names: list[str], given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        deal(ENGINES, names, given)
    assert said in str(caught.value)


def test_a_method_is_called_by_its_name_and_what_differs_from_its_defaults() -> None:
    assert named(CRITERIA, "obs") == named(CRITERIA, Obs()) == "obs"
    assert named(CRITERIA, Obs(samples=8, ridge=0.1)) == "obs(samples=8, ridge=0.1)"
    assert named(ENGINES, L2()) == "L2()"
