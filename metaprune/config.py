"""What a command is asked to do: from flags, and from recipes in YAML that flags override.

A recipe of `metaprune prune` holds the same keys as the command has options (``batch_size`` for ``--batch-size``).
``${NAME}`` in a text stands for an environment variable, so that a recipe names no folder of one machine, and
``${NAME:-text}`` for `text` where it is not set. Neither torch nor a registry is imported here; who knows the
registered names hands them in.
"""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from metaprune.errors import ConfigError, InputError, did_you_mean

_VARIABLE = re.compile(r"\$\{([^}]*?)(?::-([^}]*))?\}")
_PLACES = frozenset({"out", "track", "tracking_uri"})  # where results go plays no part in what they are
_NONE = "none"

T = TypeVar("T")


def _numbers(value: Any) -> Any:
    """``"1,3,224,224"`` as a tuple; anything else is left to pydantic."""
    if not isinstance(value, str):
        return value
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise ValueError("must be whole numbers separated by commas, e.g. 1,3,224,224") from None


def _list(value: Any) -> Any:
    """One text as a list of one."""
    return (value,) if isinstance(value, str) else value


def _names(value: Any) -> Any:
    """A list of names as one text, as on the command line."""
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _by_name(value: Any, number: type[int] | type[float], rule: str) -> Any:
    """A number, or numbers by name; also as text, ``8`` or ``channel=8,head=1``."""
    if isinstance(value, str) and "=" in value:
        value = {name.strip(): text for name, _, text in (part.rpartition("=") for part in value.split(","))}
    values = value if isinstance(value, dict) else {"": value}
    try:
        read = {name: _number(text, number) for name, text in values.items()}
    except ValueError:
        raise ValueError(rule) from None
    return read if isinstance(value, dict) else read[""]


def _number(value: Any, kind: type[int] | type[float]) -> int | float:
    if isinstance(value, bool) or not isinstance(value, str | int | kind):
        raise ValueError
    return kind(value)


def _shares(value: Any) -> Any:
    """A share, or shares by pattern of axes."""
    read = _by_name(value, float, "must be a number, or numbers by patterns of axes, e.g. 0.1 or 'layer1.*=0.5'")
    for share in read.values() if isinstance(read, dict) else [read]:
        if not 0 <= share <= 1:
            raise ValueError(f"must be at {'most 1' if share > 1 else 'least 0'}")
    return read


def _multiples(value: Any) -> Any:
    """A number that sizes are multiples of, or such numbers by kind of axis."""
    if value is None:
        return None
    read = _by_name(value, int, "must be a whole number, or whole numbers by kind of axis, e.g. 8 or channel=8,head=1")
    if min(read.values() if isinstance(read, dict) else [read], default=1) < 1:
        raise ValueError("must be at least 1")
    return read


Texts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_list)]


class PruneOptions(BaseModel):
    """Everything that `metaprune prune` can be asked for; the command's help says what each option means.

    Criterion, recovery and task are None where the choice is left to the pipeline. Entries of `set` are options of
    methods by ``KIND.option``, in a recipe and by flags together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str = Field(min_length=1)
    weights: str | None = None
    data: str | None = None
    input_shape: Annotated[tuple[Annotated[int, Field(ge=1)], ...] | None, BeforeValidator(_numbers)] = None
    model_args: dict[str, Any] = Field(default_factory=dict)
    task: str | None = None
    rules: Texts = ()

    freeze: Texts = ()
    only: Texts = ()
    budget: str = ""
    pattern: Annotated[str | None, Field(min_length=1)] = None
    device: Annotated[str | None, Field(min_length=1)] = None
    metanet: Annotated[str | None, Field(min_length=1)] = None
    criterion: str | None = None
    allocator: str = "global"
    round_to: Annotated[int | dict[str, int] | None, BeforeValidator(_multiples)] = None
    floor: Annotated[float | dict[str, float], BeforeValidator(_shares)] = 0.1
    ceiling: Annotated[float | dict[str, float], BeforeValidator(_shares)] = 1.0
    rounds: int = Field(default=1, ge=1)
    calibration: int = Field(default=2048, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**32)

    recovery: Annotated[str | None, BeforeValidator(_names)] = None
    epochs: int | None = Field(default=None, ge=1)
    lr: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    batch_size: int | None = Field(default=None, ge=1)
    weight_decay: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    distil: float | None = Field(default=None, ge=0, le=1)
    temperature: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    set: dict[str, Any] = Field(default_factory=dict)

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    stream: bool = False
    export: bool = True
    bench: bool = True
    out: str | None = None
    track: bool = True
    tracking_uri: str | None = None

    @property
    def training(self) -> dict[str, Any]:
        """The options of recoveries that were given."""
        names = ("epochs", "lr", "batch_size", "weight_decay", "distil", "temperature")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def deciding(self) -> dict[str, Any]:
        """All that decides the result, as plain JSON: what a run must share with the one that it goes on with."""
        return self.model_dump(mode="json", exclude=set(_PLACES))


@dataclass(frozen=True)
class Recipe:
    """What a YAML file says, with ``${NAME}`` as it stands there: a variable is needed only where no flag overrides it.

    Args:
        path: The file.
        values: By key.
        lines: Line of each key, counted from 1; of the keys within one as ``key.inner``.
        within: The key of the file that all this stands under, where it is a section.
    """

    path: Path
    values: Mapping[str, Any] = field(default_factory=dict)
    lines: Mapping[str, int] = field(default_factory=dict)
    within: str = ""

    def where(self, key: str = "") -> str:
        """The place of a key, or of the whole, for messages."""
        name = ".".join(part for part in (self.within, key) if part)
        line = f":{self.lines[key]}" if key in self.lines else ""
        return f"{self.path}{line}: `{name}`" if name else f"{self.path}"

    def section(self, key: str, keys: Collection[str]) -> "Recipe":
        """What stands under a key that has keys of its own; nothing where it is not there.

        Args:
            key: Its name.
            keys: What it may say.

        Raises:
            ConfigError: It has no keys, or an unknown one.
        """
        values = self.values.get(key) or {}
        if not isinstance(values, dict):
            raise ConfigError(f"{self.where(key)} must be a mapping of names to values, but it is {values!r}.")
        lines = {name.partition(".")[2]: line for name, line in self.lines.items() if name.partition(".")[0] == key}
        section = Recipe(self.path, values, lines, key)
        for name in values:
            if name not in keys:
                raise ConfigError(
                    f"{section.where(str(name))} is no key that is known.{did_you_mean(str(name), keys)} Known: "
                    f"{', '.join(keys)}."
                )
        return section


def prune_options(
    flags: Mapping[str, Any], recipe: Recipe | None = None, names: Mapping[str, Collection[str]] | None = None
) -> PruneOptions:
    """Flags over a recipe over the defaults.

    Args:
        flags: By key; None where a flag was not given.
        recipe: A recipe, or None.
        names: The registered names that the values of some keys must be among, e.g. ``{"criterion": CRITERIA}``; a
            value may hold several, separated by commas, or be ``none``.

    Raises:
        ConfigError: A value does not fit, or one that is needed is missing; the message names its file and line, or its
            flag.
    """
    recipe = recipe or Recipe(Path())
    written = recipe.values.get("set")
    if flags.get("set") and isinstance(written, dict):  # entry by entry
        recipe = replace(recipe, values={**recipe.values, "set": {**written, **flags["set"]}})
        flags = {**flags, "set": None}
    options = options_of(PruneOptions, flags, recipe)
    if (
        not options.budget and options.device is None and options.pattern is None
    ):  # these may limit weights by themselves
        given = flags.get("budget") is not None or "budget" in recipe.values
        rule = "must not be empty, but it is ''" if given else "is needed, but was not given"
        raise ConfigError(f"{place_of('budget', flags, recipe)} {rule}. For example: {_EXAMPLES['budget']}.")
    for key, known in (names or {}).items():
        text = getattr(options, key)
        for name in (part.strip() for part in (text or _NONE).split(",")):
            if name not in (_NONE, *known):
                legal = ", ".join(sorted(known))
                raise ConfigError(
                    f"{place_of(key, flags, recipe)} must be a registered name, but it is {name!r}."
                    f"{did_you_mean(name, known)} Known: {legal}."
                )
    return options


def set_entries(texts: Sequence[str] | None) -> dict[str, str] | None:
    """The entries of `set` from ``KIND.OPTION=VALUE``; who knows the methods reads the values.

    Raises:
        ConfigError: There is no ``=``, or one is given twice.

    >>> set_entries(["criterion.samples=256", "recovery.layers=a,b"])
    {'criterion.samples': '256', 'recovery.layers': 'a,b'}
    """
    found: dict[str, str] = {}
    for text in texts or ():
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not key:
            raise ConfigError(f"`--set` must read KIND.OPTION=VALUE, e.g. criterion.samples=256, but it is {text!r}.")
        if key in found:
            raise ConfigError(f"an option may be given once, but `--set {key}` is {found[key]!r} and {value!r}.")
        found[key] = value
    return found or None


def options_of(kind: type[T], flags: Mapping[str, Any], recipe: Recipe) -> T:
    """Flags over a recipe over the defaults, as an instance of `kind`.

    Args:
        kind: A pydantic model or a dataclass; keys of the recipe that it lacks must not be there.
        flags: By key; None where a flag was not given.
        recipe: What was read.

    Raises:
        ConfigError: A value does not fit, or one that is needed is missing; the message names its place.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    written = {key: _filled_in(value, key, recipe) for key, value in recipe.values.items() if key not in given}
    try:
        return TypeAdapter(kind).validate_python({**written, **given})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key, *inner = first["loc"]
        named = any(isinstance(part, str) for part in inner)
        within = [f", no. {part + 1}" if isinstance(part, int) else f", `{part}`" for part in inner if named]
        raise ConfigError(f"{place_of(str(key), flags, recipe)}{''.join(within)} {_rule(first)}.") from error
    except ConfigError as error:  # a rule of the dataclass itself, which knows no places
        raise ConfigError(f"{recipe.where()}: {error}") from error


def load_recipe(path: str | Path, command: str = "prune", keys: Collection[str] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        path: A YAML file, or the name of a recipe that ships with metaprune (``metaprune list configs``).
        command: The verb that it is for; by its short name a shipped recipe is found among those of this verb.
        keys: What it may say; None means the options of `metaprune prune`.

    Raises:
        InputError: There is no such file, or it cannot be read.
        ConfigError: It is no YAML, a key is unknown or stands there twice, or it needs a variable that is not set.
    """
    file, known = _find(path, command), PruneOptions.model_fields if keys is None else keys
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"a recipe must be a readable text file, but {file} is not ({error}).") from error
    try:
        node, values = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}" if mark is not None else f"{file}"
        raise ConfigError(f"{place}: a recipe must be YAML, but {getattr(error, 'problem', None) or error}.") from error
    if not isinstance(node, yaml.MappingNode) or not isinstance(values, dict):
        raise ConfigError(
            f"{file}: a recipe must be lines of `key: value`, but it is not. See `metaprune list configs`."
        )
    lines = _lines(node, file)
    for key_node, value in node.value:
        key = str(key_node.value)
        if key not in known:
            raise ConfigError(
                f"{file}:{lines[key]}: no key is named {key!r}.{did_you_mean(key, known)} Known: {', '.join(known)}."
            )
        if isinstance(value, yaml.MappingNode):
            lines |= {f"{key}.{name}": line for name, line in _lines(value, file).items()}
    return Recipe(file, values, lines)


def _lines(node: yaml.MappingNode, file: Path) -> dict[str, int]:
    """Line of each key, counted from 1."""
    lines: dict[str, int] = {}
    for key_node, _ in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in lines:
            raise ConfigError(f"{file}:{line}: every key may stand once, but `{key}` stands in line {lines[key]} too.")
        lines[key] = line
    return lines


@cache
def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with metaprune, by name: their path below ``configs/`` without the suffix."""
    root = Path(str(files("metaprune.configs")))
    return {str(path.relative_to(root).with_suffix("")): path for path in sorted(root.rglob("*.yaml"))}


def _find(path: str | Path, command: str) -> Path:
    """A file of that name; else a shipped recipe, by its whole name or by that within the folder of the command."""
    file, shipped = Path(path), shipped_recipes()
    if file.is_file():
        return file
    for name in (str(path), f"{command}/{path}"):
        if name in shipped:
            return shipped[name]
    own = [name for name in shipped if name.startswith(f"{command}/")]
    hint = did_you_mean(str(path), [*own, *(Path(name).name for name in own)])
    raise InputError(
        f"a recipe must be a YAML file or one that ships with metaprune, but {str(path)!r} is neither.{hint} "
        f"Shipped: {', '.join(shipped)}."
    )


def place_of(key: str, flags: Mapping[str, Any], recipe: Recipe | None = None) -> str:
    """Where a key was given, for messages.

    Args:
        key: A key of a recipe, or ``set.ENTRY`` for one of those that are set one by one.
        flags: As for :func:`prune_options`.
        recipe: Likewise.
    """
    name, _, entry = key.partition(".")
    given, written = flags.get(name), {} if recipe is None else recipe.values
    if entry:
        by_flag = entry in (given or {}) or entry not in (written.get(name) or {})
        return f"`--{name} {entry}`" if by_flag or recipe is None else recipe.where(key)
    return recipe.where(key) if recipe is not None and given is None and key in written else _flag(key)


def _flag(key: str) -> str:
    name = "model_arg" if key == "model_args" else key  # given once for each of them
    return f"`--{name.replace('_', '-')}`"


def _filled_in(value: Any, key: str, recipe: Recipe) -> Any:
    if isinstance(value, list):
        return [_filled_in(part, key, recipe) for part in value]
    if isinstance(value, dict):
        return {name: _filled_in(part, key, recipe) for name, part in value.items()}
    if not isinstance(value, str):
        return value

    def content(match: re.Match[str]) -> str:
        name, otherwise = match.groups()
        if not os.environ.get(name):
            if otherwise is not None:
                return str(otherwise)
            raise ConfigError(
                f"{recipe.where(key)} needs the environment variable {name}, but it is not set. Set it "
                f"(export {name}=...), or give {_flag(key)}."
            )
        return os.environ[name]

    return _VARIABLE.sub(content, value)


_EXAMPLES = {
    "model": "zoo:digits_cnn (`metaprune list models` shows more)",
    "budget": "macs=0.5, which is half of them",
}
_LISTS = {
    "input_shape": "must be whole numbers separated by commas, e.g. 1,3,224,224",
    **dict.fromkeys(("rules", "freeze", "only"), "must be a text or a list of texts"),
}
_RULES = {
    "missing": "is needed, but was not given",
    "greater_than_equal": "must be at least {ge:g}",
    "greater_than": "must be above {gt:g}",
    "less_than_equal": "must be at most {le:g}",
    "less_than": "must be below {lt:g}",
    "finite_number": "must be finite",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_type": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "string_type": "must be a text",
    "string_too_short": "must not be empty",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping of names to values",
    "tuple_type": "must be a list",
    "dataclass_type": "must be a mapping of names to values",
    "unexpected_keyword_argument": "is no key that is known",
    "literal_error": "must be {expected}",
}


def rule_of(error: Mapping[str, Any]) -> str:
    """What pydantic found, as the rule that does not hold."""
    kind, context = error["type"], error.get("ctx", {})
    return str(context.get("error")) if kind == "value_error" else _RULES.get(kind, error["msg"]).format(**context)


def _rule(error: Mapping[str, Any]) -> str:
    """The rule and the value seen."""
    kind, rule = error["type"], rule_of(error)
    if kind == "tuple_type":
        rule = _LISTS.get(error["loc"][0], rule)
    found = rule if kind == "missing" else f"{rule}, but it is {error['input']!r}"
    example = _EXAMPLES.get(str(error["loc"][0])) if kind in ("missing", "string_too_short") else None
    return f"{found}. For example: {example}" if example else found
