"""``metaprune doctor``: is everything here that metaprune needs, and what would colour a measurement?"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaprune import __version__
from metaprune.cli.options import AsJson, Debug
from metaprune.errors import ConfigError, MissingExtraError, ResourceError
from metaprune.files import cache_folder

if TYPE_CHECKING:
    from rich.console import Console

NEEDED = (
    *("torch", "torch-geometric", "numpy", "scipy", "scikit-learn", "safetensors", "pillow"),
    *("onnx", "onnxscript", "onnxruntime", "optuna", "mlflow"),
    *("typer", "rich", "pydantic", "pyyaml", "jinja2", "platformdirs"),
)
OPTIONAL = {"timm": "timm: models", "torchvision": "torchvision: models", "transformers": "hf: models"}
CACHES = {
    "test-data": "data that tests unpacked",
    "latency": "tables of what networks take here",
}  # the only entries that --clean deletes
_BUSY = 0.5  # load per core above which a measurement is in doubt


def doctor(
    cache: Annotated[bool, typer.Option("--cache", help="Show what the cache holds.")] = False,
    clean: Annotated[bool, typer.Option("--clean", help="With --cache: delete it.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Show versions, hardware, broken plug-ins, sources of noise."""
    from metaprune.cli.screen import Screen

    if clean and not cache:
        raise ConfigError("`--clean` deletes what `--cache` shows, but that was not given. Give both.")
    screen = Screen(as_json)
    told: dict[str, Any] = {"command": "doctor", "version": __version__}
    if cache:
        told["cache"] = _cache(clean)
        screen.show(told, lambda console: _draw_cache(told["cache"], console))
        return 0
    told |= _look_around()
    screen.show(told, lambda console: _draw(told, console))
    return 0 if not told["missing"] else MissingExtraError.exit_code


def _look_around() -> dict[str, Any]:
    import onnxruntime
    import torch

    from metaprune.allocate import ALLOCATORS
    from metaprune.criteria import CRITERIA
    from metaprune.data import DATASETS
    from metaprune.measure.host import host
    from metaprune.plans import EDITS
    from metaprune.recovery import RECOVERIES
    from metaprune.task import TASKS
    from metaprune.zoo import MODELS

    here = host()
    libraries = {name: _version(name) for name in (*NEEDED, *OPTIONAL)}
    broken: dict[str, str] = {}
    for registry in (CRITERIA, ALLOCATORS, RECOVERIES, EDITS, TASKS, MODELS, DATASETS):
        len(registry)  # loads its plug-ins
        broken |= {f"{registry.group}: {name}": reason for name, reason in registry.broken.items()}
    return {
        "host": here.to_json(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "providers": list(onnxruntime.get_available_providers()),
        "libraries": libraries,
        "missing": [name for name in NEEDED if libraries[name] is None],
        "broken_plugins": broken,
        "cache": _cache(clean=False),
        "hints": _hints(here),
    }


def _hints(here: Any) -> list[str]:
    hints = []
    if here.load_1min is not None and here.load_1min > _BUSY * here.usable_cores:
        hints.append(
            f"The load is {here.load_1min:g} on {here.usable_cores} usable cores: timings will be noisy. End what is "
            "running, or give `metaprune bench` more --seconds."
        )
    if here.governor not in (None, "performance"):
        hints.append(
            f"The frequency governor is {here.governor!r}: timings drift with temperature and load. "
            "`cpupower frequency-set -g performance` makes them steadier."
        )
    if here.usable_cores < here.cores:
        hints.append(f"This process may use {here.usable_cores} of {here.cores} cores.")
    return hints


def _version(distribution: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    for name in (f"{distribution}-gpu", distribution) if distribution == "onnxruntime" else (distribution,):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _cache(clean: bool) -> dict[str, Any]:
    folder = cache_folder()
    entries = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        ours = path.name in CACHES
        entries.append(
            {
                "name": path.name,
                "about": CACHES.get(path.name, "not of metaprune; it stays"),
                "bytes": _size(path),
                "deleted": clean and ours,
            }
        )
        if clean and ours:
            try:
                shutil.rmtree(path)
            except OSError as error:
                raise ResourceError(f"{path} must be deleted, but {error.strerror}. Look at who owns it.") from error
    return {"folder": str(folder), "entries": entries}


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sum(file.lstat().st_size for file in files if not file.is_dir())


def _draw(told: dict[str, Any], console: "Console") -> None:
    from rich.table import Table
    from rich.text import Text

    from metaprune.report import numbers

    here = told["host"]
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    rows = {
        "metaprune": f"{told['version']}, Python {here['python']}, {here['system']}",
        "processor": f"{here['cpu']}, {here['usable_cores']} of {here['cores']} cores, {', '.join(here['isa'])}",
        "torch threads": str(told["threads"]),
        "GPUs": ", ".join(told["gpus"]) or "none that torch can see",
        "onnxruntime": ", ".join(told["providers"]),
        "libraries": ", ".join(f"{name} {found}" for name, found in told["libraries"].items() if found),
        "cache": f"{told['cache']['folder']}, {numbers.size(sum(e['bytes'] for e in told['cache']['entries']))}",
    }
    for name, text in rows.items():
        table.add_row(name, Text(text))
    console.print(table)
    for name, what in OPTIONAL.items():
        if told["libraries"][name] is None:
            console.print(Text.assemble(("optional ", "dim"), f"{name} is not installed ({what}): pip install {name}"))
    for name in told["missing"]:
        console.print(Text.assemble(("missing ", "bold red"), f"{name}: pip install {name}"))
    for name, reason in told["broken_plugins"].items():
        console.print(Text.assemble(("broken plug-in ", "bold red"), f"{name}: {reason}"))
    for hint in told["hints"]:
        console.print(Text.assemble(("noise ", "yellow"), hint))


def _draw_cache(cache: dict[str, Any], console: "Console") -> None:
    from rich.text import Text

    from metaprune.report import numbers

    console.print(Text(cache["folder"], style="bold"), soft_wrap=True)
    for entry in cache["entries"]:
        done = ", deleted" if entry["deleted"] else ""
        console.print(Text(f"  {entry['name']}: {numbers.size(entry['bytes'])}, {entry['about']}{done}"))
    if not cache["entries"]:
        console.print(Text("  empty"))
