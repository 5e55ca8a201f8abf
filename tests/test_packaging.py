"""The folders, the list of packages and the built wheel say the same; doctests of the mapped folders run."""

import doctest
import importlib
import pkgutil
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import metaprune

ROOT = Path(__file__).parent.parent
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
MAPPED = CONFIG["package-dir"]


def folders() -> set[str]:
    """Every package in the tree, by import name."""
    found = set()
    for root, name in (("metaprune", "metaprune"), *((folder, package) for package, folder in MAPPED.items())):
        for init in sorted((ROOT / root).rglob("__init__.py")):
            inner = init.parent.relative_to(ROOT / root).parts
            found.add(".".join((name, *inner)))
    return found


def test_every_folder_is_listed() -> None:
    assert set(CONFIG["packages"]) == folders()


@pytest.mark.long
def test_the_wheel_holds_every_package_and_its_data(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy, because building writes beside the sources
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "*.egg-info", "build", "runs", "demo", "mlruns"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    packages = {str(Path(name).parent).replace("/", ".") for name in names if name.endswith("/__init__.py")}
    assert packages == folders()
    homes = {"metaprune": ROOT / "metaprune", **{name: ROOT / folder for name, folder in MAPPED.items()}}
    files = {
        f"{package.replace('.', '/')}/{path.relative_to(home).as_posix()}"
        for package, home in homes.items()
        for path in home.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files <= set(names)
    assert not any("test" in Path(name).name for name in names)


@pytest.mark.parametrize("folder", ["search", "export"])
def test_mapped_folders_refuse_their_short_name(folder: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {folder}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"metaprune.{folder}" in done.stderr


def modules(package: str) -> list[str]:
    home = importlib.import_module(package)
    return [package, *(info.name for info in pkgutil.walk_packages(home.__path__, f"{package}."))]


@pytest.mark.parametrize(
    "name", [name for package in ("metaprune.search", "metaprune.export") for name in modules(package)]
)
def test_doctests_of_mapped_folders(name: str) -> None:
    if name.endswith("_job"):
        pytest.skip("a script for a fresh process")
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_version_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == metaprune.__version__
    assert f"## {metaprune.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_public_names_are_there() -> None:
    for name in metaprune.__all__:
        assert getattr(metaprune, name) is not None
    assert callable(metaprune.plan)
    assert dir(metaprune) == sorted(metaprune.__all__)
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        metaprune.prun  # noqa: B018


def test_import_is_light() -> None:
    code = "import sys, metaprune; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'mlflow', 'onnx')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
