"""``metaprune export``: a saved result, or any network, as an ONNX file that was proved."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from metaprune.cli.answer import answer
from metaprune.cli.options import AsJson, Debug, InputShape, Model, ModelArg, RunFolder, Weights

if TYPE_CHECKING:
    from rich.console import Console


def export(
    run: RunFolder = None,
    model: Model = None,
    weights: Weights = None,
    input_shape: InputShape = None,
    model_arg: ModelArg = None,
    out: Annotated[
        str | None, typer.Option(metavar="FILE", help="The file to write. [FOLDER/model.onnx, or MODEL.onnx]")
    ] = None,
    opset: Annotated[int | None, typer.Option(metavar="N", help="Operator set of ONNX. [20]")] = None,
    free: Annotated[
        str | None,
        typer.Option(metavar="AXES", help="Dimensions whose sizes stay free beside the batch, e.g. 2=height,3=width."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Write a network as ONNX, and keep it only if it is right.

    The file is compared with torch at several batch sizes.
    """
    from pathlib import Path

    from rich.text import Text

    from metaprune import export as room
    from metaprune.cli.saved import open_saved
    from metaprune.cli.screen import Screen
    from metaprune.errors import ConfigError
    from metaprune.report import numbers
    from metaprune.subject import model_args, read_subject, shape_of

    if (run is None) == (model is None):
        raise ConfigError("one of `--run` and `--model` says what to export, but there are none or both.")
    axes = _axes(free)
    screen = Screen(as_json)
    start = time.perf_counter()
    with screen.watch() as watch:
        watch.step("Reading the network")
        if run is not None:
            saved = open_saved(run, with_data=False)
            network, example, spec = saved.slim, saved.example, saved.subject.source.spec
            target = Path(out) if out else saved.folder / "model.onnx"
        else:
            subject = read_subject(
                str(model), weights=weights, input_shape=shape_of(input_shape), model_args=model_args(model_arg)
            )  # fmt: skip
            network, example, spec = subject.module, subject.source.example_inputs, subject.source.spec
            target = Path(out) if out else Path(f"{subject.source.name.rpartition(':')[2]}.onnx")
        if target.exists() and not force:
            raise ConfigError(f"{target} is there already. Give --out another name, or --force to replace it.")
        watch.step("Exporting to ONNX")
        made = room.export(
            network, example, target, opset=opset, axes=axes, metadata={"metaprune.model": spec}, overwrite=force
        )  # fmt: skip
    largest = max(made.probes, key=lambda probe: probe.deviation.relative).deviation
    probes = {name: sorted({probe.sizes[name] for probe in made.probes}) for name in made.probes[0].sizes}
    sizes = "; ".join(f"{name} {', '.join(map(str, seen))}" for name, seen in probes.items()) or "the example"
    told = answer(
        "export",
        model=spec,
        weights=weights,
        error_max=made.max_error,
        checks=[{"name": "export", "passed": True, "detail": f"{made.rung}; at {sizes}; {largest}."}],
        files={Path(name).name: name for name in made.files},
        seconds={"total": round(time.perf_counter() - start, 3)},
        opset=made.opset,
        rung=made.rung,
        batch=made.batch,
        axes=list(made.axes),
        size_bytes=made.size_bytes,
        sha256=made.sha256,
        refused=[{"rung": refusal.rung, "reason": refusal.reason} for refusal in made.refused],
    )

    def draw(console: "Console") -> None:
        free = f"any {' and '.join(made.axes)} size" if made.axes else "fixed sizes"
        console.print(
            Text.assemble(
                ("Wrote ", "bold"), f"{made.path}: {numbers.size(made.size_bytes)}, ", f"opset {made.opset}, {free}"
            )
        )
        console.print(Text(f"Equals torch at {sizes}: error {made.max_error:.1e} of the largest output"))
        for refusal in made.refused:
            console.print(Text.assemble(("note ", "yellow"), f"not {refusal.rung}: {refusal.reason}"))

    screen.show(told, draw)
    return 0


def _axes(text: str | None) -> dict[int, str]:
    """Dimensions and their names from ``1=length``.

    >>> _axes("2=height,3=width")
    {2: 'height', 3: 'width'}
    """
    from metaprune.errors import ConfigError

    axes: dict[int, str] = {}
    for part in (text or "").split(",") if text is not None else ():
        dim, equals, name = part.partition("=")
        if not equals or not dim.strip().isdecimal() or not name.strip().isidentifier():
            raise ConfigError(f"`--free` must read DIMENSION=NAME, e.g. 1=length, but it is {text!r}.")
        axes[int(dim)] = name.strip()
    return axes
