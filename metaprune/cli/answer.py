"""What every verb says with ``--json``: the same keys in the same meaning, None where a verb has nothing to say."""

from typing import Any

from metaprune import __version__

SHARED = (
    "model",
    "data",
    "split",
    "images",
    "before",
    "after",
    "budget",
    "error_max",
    "checks",
    "files",
    "seconds",
)


def answer(command: str, **found: Any) -> dict[str, Any]:
    """One JSON object; the schema of each verb lies beside this file.

    Args:
        command: The verb.
        **found: By key.

    >>> answer("inspect", model="zoo:mlp")["model"], answer("inspect")["data"]
    ('zoo:mlp', None)
    """
    return {"command": command, "version": __version__, **dict.fromkeys(SHARED), **found}


def schema(command: str) -> str:
    """The JSON Schema of a verb's answer, as text; that of failed commands is called ``error``."""
    from importlib.resources import files

    return (files("metaprune.cli") / "schema" / f"{command.replace(' ', '-')}.json").read_text(encoding="utf-8")
