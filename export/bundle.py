"""One folder that holds all that is needed to deploy a network and to make it again.

It is put together beside its place and moved there whole, after its own ``run.py`` has answered in a fresh process.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from metaprune.errors import GateError, InputError
from metaprune.export.devices import Device
from metaprune.export.numeric import largest_difference
from metaprune.export.session import Session, first_line, open_session
from metaprune.export.structure import paths_in

MODEL, ORT, RUN, CARD, SUMS = "model.onnx", "model.ort", "run.py", "card.md", "SHA256SUMS"
_RUN = Path(__file__).with_name("_bundle_run.py")
_TEXTS = (".json", ".html", ".md")
_LIMIT_S = 120.0


@dataclass(frozen=True)
class Bundle:
    """A folder that was made.

    Args:
        folder: Where.
        files: What is in it: name to SHA-256.
        notes: What was left out and why.
    """

    folder: str
    files: Mapping[str, str]
    notes: tuple[str, ...]


def write_bundle(
    folder: str | Path,
    model: str | Path,
    *,
    example: Mapping[str, NDArray[Any]],
    card: str,
    beside: Mapping[str, str | Path] | None = None,
    device: Device | None = None,
    overwrite: bool = False,
) -> Bundle:
    """Make the folder.

    Args:
        folder: Where; its parent must exist.
        model: The ONNX file.
        example: Inputs by name; what they give is kept with them, for ``run.py`` to prove itself.
        card: Text of ``card.md``.
        beside: Other files by the name that they get.
        device: What it is for: decides about an ``.ort`` file.
        overwrite: Whether a folder that is there may be replaced.

    Raises:
        InputError: The folder cannot be written, is there already, or a file cannot be used.
        GateError: The finished folder does not give what the file gives.
    """
    target = Path(folder)
    if target.exists() and not overwrite:
        raise InputError(f"{str(target)!r} is there already. Name another folder, or allow to replace it (--force).")
    session = open_session(model, threads=1)
    expected = session.run(example)
    notes: list[str] = []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=target.parent, prefix=".metaprune-"))
    except OSError as error:
        raise InputError(f"{str(target.parent)!r} must be a folder to write in, but: {error.strerror}.") from error
    try:
        for name in session.structure.external:
            shutil.copyfile(Path(model).parent / name, made / name)
        for name, source in {MODEL: model, **(beside or {})}.items():
            _copy(Path(source), made / name)
        shutil.copyfile(_RUN, made / RUN)
        np.savez(made / "example.npz", **example)  # type: ignore[arg-type]
        np.savez(made / "expected.npz", **expected)  # type: ignore[arg-type]
        (made / CARD).write_text(_without_paths(card), encoding="utf-8")
        if device is not None and device.ort is not None:
            notes += _to_ort(made, session, example, device)
        _prove(made)
        sums = {path.name: _sha256(path) for path in sorted(made.iterdir())}
        (made / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()), encoding="utf-8")
        made.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        made.replace(target)
    except OSError as error:
        raise InputError(f"the bundle needs all its files, but: {error.strerror} ({error.filename}).") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return Bundle(str(target), sums, tuple(notes))


def _copy(source: Path, target: Path) -> None:
    """Texts lose the paths of this machine on the way."""
    if source.suffix in _TEXTS:
        target.write_text(_without_paths(source.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        shutil.copyfile(source, target)


def _without_paths(text: str) -> str:
    for path in sorted(set(paths_in(text)), key=len, reverse=True):
        text = text.replace(path, PurePath(path).name)
    return text


def _to_ort(folder: Path, session: Session, example: Mapping[str, NDArray[Any]], device: Device) -> list[str]:
    """The file in the format that loads faster; kept only if it gives the same."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / ORT)
    options.add_session_config_entry("session.save_model_format", "ORT")
    # Blocks of channels are those of this processor: a file for another one must do without.
    disabled = [] if device.ort == "host" else ["NchwcTransformer"]
    try:
        onnxruntime.InferenceSession(
            str(folder / MODEL), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
        )
        runtime = onnxruntime.InferenceSession(str(folder / ORT), providers=["CPUExecutionProvider"])
        got = runtime.run(None, dict(example))
    except Exception as error:  # a family of classes with no common base of their own
        (folder / ORT).unlink(missing_ok=True)
        return [f"No {ORT}: {first_line(error)}"]
    wanted = session.run(example)
    for value, truth in zip(got, wanted.values()):
        scale = float(np.abs(truth).max(initial=0.0))
        if value.shape != truth.shape or largest_difference(value, truth) > 1e-4 * scale:
            (folder / ORT).unlink()
            return [f"No {ORT}: it does not give what {MODEL} gives."]
    return []


def _prove(folder: Path) -> None:
    run = [sys.executable, "-P", str(folder / RUN)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise GateError(f"{RUN} of the bundle must give what the file gives, but says: {said}")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
