"""Imports point one way: a room imports only what stands left of it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAPPED = {"search": "search", "export": "export", "configs": "configs"}

# From left to right; rooms in one row do not import each other, except those that share a row with themselves.
ROWS = [
    {"errors"},
    {"registry", "files"},
    {"factory", "progress", "modes", "configs", "shards"},
    {"task", "budget", "plans", "config", "run"},
    {"methods"},
    {"graph"},
    {"data", "zoo", "tracking"},
    {"measure"},
    {"edits", "metanet"},
    {"criteria", "allocate"},
    {"recovery"},
    {"gates"},
    {"metatrain"},
    {"export"},
    {"rounds"},
    {"planning"},
    {"sparsity"},
    {"pipeline"},
    {"stream", "subject"},
    {"search"},
    {"audit", "report"},
    {"cli"},
]
RANK = {room: rank for rank, row in enumerate(ROWS) for room in row}


def files() -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / "metaprune").rglob("*.py")):
        parts = path.relative_to(ROOT / "metaprune").with_suffix("").parts
        yield parts[0], path
    for room, folder in MAPPED.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield room, path


def imported_rooms(path: Path) -> Iterator[tuple[int, str]]:
    """Rooms that a file imports when it runs; what only type checkers read does not count."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            names = [
                f"{node.module}.{alias.name}" if node.module == "metaprune" else str(node.module)
                for alias in node.names
            ]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "metaprune" and len(parts) > 1:
                yield node.lineno, parts[1]


@pytest.mark.parametrize(
    ("room", "path"), [pytest.param(room, path, id=str(path.relative_to(ROOT))) for room, path in files()]
)
def test_a_file_imports_only_from_the_left(room: str, path: Path) -> None:
    if room == "__init__":
        return  # the package's front door names rooms without importing them
    assert room in RANK, f"room {room!r} has no place in the order of rooms"
    for line, other in imported_rooms(path):
        if other.startswith("__"):
            continue
        assert other in RANK, f"{path}:{line} imports room {other!r}, which has no place in the order"
        assert other == room or RANK[other] < RANK[room], f"{path}:{line}: {room} must not import {other}"
