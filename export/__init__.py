"""ONNX export and its proof, imported as ``metaprune.export``.

Nothing heavy is imported before a name is used. `validate` and `bench` are functions here, although files of this room
bear the same names.
"""

if __name__ != "metaprune.export":
    raise ImportError("this folder is the package `metaprune.export`; import it by that name.")

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metaprune.export.bench import Bench, bench
    from metaprune.export.culprit import Culprit, find_culprit
    from metaprune.export.session import Session, open_session
    from metaprune.export.structure import Port, Structure, read
    from metaprune.export.to_onnx import Exported, export, weights_hash
    from metaprune.export.validate import Check, Validation, validate

__all__ = [
    "Bench",
    "Check",
    "Culprit",
    "Exported",
    "Port",
    "Session",
    "Structure",
    "Validation",
    "bench",
    "export",
    "find_culprit",
    "open_session",
    "read",
    "validate",
    "weights_hash",
]

_HOME = {
    "Bench": "bench",
    "Check": "validate",
    "Culprit": "culprit",
    "Exported": "to_onnx",
    "Port": "structure",
    "Session": "session",
    "Structure": "structure",
    "Validation": "validate",
    "bench": "bench",
    "export": "to_onnx",
    "find_culprit": "culprit",
    "open_session": "session",
    "read": "structure",
    "validate": "validate",
    "weights_hash": "to_onnx",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


class _Room(ModuleType):
    """The import system binds a loaded file to its package; where a function has that name, the function stays."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Room
