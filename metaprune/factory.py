"""Objects that a user names as ``package.module:name``."""

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from metaprune.errors import ConfigError, MetapruneError, did_you_mean

FORM = "package.module:factory"


def looks_importable(spec: str) -> bool:
    """The text has the form ``package.module:name``.

    >>> looks_importable("my.nets:build"), looks_importable("cifar10:/data")
    (True, False)
    """
    module, colon, name = spec.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), *name.split(".")))


def import_rules(modules: Iterable[str]) -> None:
    """Import modules for the rules that they register (``metaprune.register_rule``), also from the current folder.

    Raises:
        ConfigError: There is no such module, or importing it fails.
    """
    for name in modules:
        unknown = (
            f"rules must come from a module that can be imported, but {name!r} is none. Give e.g. mypackage.rules."
        )
        if not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(unknown)
        _import(name, unknown)


def import_factory(spec: str, unknown: str) -> Any:
    """The object that ``package.module:name`` names; modules in the current folder are found too.

    Args:
        spec: The name.
        unknown: What to say when there is no such module, for a spec that may have been meant as something else.

    Raises:
        ConfigError: There is no such module or name, or importing it fails.
    """
    module_name, _, attribute = spec.partition(":")
    found = _import(module_name, unknown)
    for part in attribute.split("."):
        if not hasattr(found, part):
            place = getattr(found, "__file__", None) or module_name
            raise ConfigError(f"{place} has no {part!r}.{did_you_mean(part, dir(found))}")
        found = getattr(found, part)
    return found


def _import(module_name: str, unknown: str) -> Any:
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as `python -m` does; kept, since factories may import more when they run
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ConfigError(unknown) from error
        raise ConfigError(f"module {module_name!r} cannot be imported: {error}.") from error
    except MetapruneError:
        raise
    except Exception as error:
        raise ConfigError(f"importing module {module_name!r} failed: {type(error).__name__}: {error}.") from error
