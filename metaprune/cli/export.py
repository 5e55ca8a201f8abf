"""``metaprune export``: a saved result, or any network, as an ONNX file that was proved."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from metaprune.cli.answer import answer
from metaprune.cli.options import AsJson, Debug, Device, InputShape, Model, ModelArg, RunFolder, Weights

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
    bundle: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Put all of a --run that is needed to deploy it into one folder.",
        ),
    ] = None,
    device: Device = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="With --bundle: files in smaller numbers to try, and keep if they are worth it: int8, int8-weights, "
            "int8-dynamic, fp16.",
        ),
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(metavar="POINTS", help="With --precision: accuracy that may be lost. [0.5]")
    ] = None,
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
    import tempfile
    from pathlib import Path

    from rich.text import Text

    from metaprune import export as room
    from metaprune.cli.delivery import told_in_file
    from metaprune.cli.packing import Packing
    from metaprune.cli.saved import open_saved
    from metaprune.cli.screen import Screen
    from metaprune.errors import ConfigError
    from metaprune.report import numbers
    from metaprune.subject import model_args, read_subject, shape_of

    if (run is None) == (model is None):
        raise ConfigError("one of `--run` and `--model` says what to export, but there are none or both.")
    if bundle is None and (precision, device, max_drop) != (None, None, None):
        raise ConfigError("`--precision`, `--device` and `--max-drop` are for a bundle. Give --bundle FOLDER.")
    if bundle is not None and (run is None or out is not None):
        raise ConfigError("`--bundle` is the folder to make from a result. Give --run, and leave out --out.")
    axes = _axes(free)
    screen = Screen(as_json)
    start = time.perf_counter()
    about: dict[str, str] = {}
    with screen.watch() as watch, tempfile.TemporaryDirectory(prefix="metaprune-") as scratch:
        watch.step("Reading the network")
        packing = None
        if bundle is not None:
            packing = Packing(str(run), bundle, device=device, precision=precision, max_drop=max_drop, force=force)
        if run is not None:
            saved = packing.saved if packing is not None else open_saved(run, with_data=False)
            network, example, spec = saved.slim, saved.example, saved.subject.source.spec
            target = Path(out) if out else Path(saved.folder if packing is None else scratch) / "model.onnx"
            about = {
                "metaprune.source": room.weights_hash(saved.subject.module),
                **told_in_file(saved.folder, saved.outcome["budget"], saved.outcome["accuracy"]),
            }
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
            network, example, target, opset=opset, axes=axes, metadata={"metaprune.model": spec, **about},
            overwrite=force,
        )  # fmt: skip
        packed = None if packing is None else packing.pack(made, watch)
    largest = max(made.probes, key=lambda probe: probe.deviation.relative).deviation
    probes = {name: sorted({probe.sizes[name] for probe in made.probes}) for name in made.probes[0].sizes}
    sizes = "; ".join(f"{name} {', '.join(map(str, seen))}" for name, seen in probes.items()) or "the example"
    told = answer(
        "export",
        model=spec,
        weights=weights,
        error_max=made.max_error,
        checks=[{"name": "export", "passed": True, "detail": f"{made.rung}; at {sizes}; {largest}."}],
        files={Path(name).name: name for name in made.files} if packed is None else packed.files,
        seconds={"total": round(time.perf_counter() - start, 3)},
        opset=made.opset,
        rung=made.rung,
        batch=made.batch,
        axes=list(made.axes),
        size_bytes=made.size_bytes,
        sha256=made.sha256,
        refused=[{"rung": refusal.rung, "reason": refusal.reason} for refusal in made.refused],
        offers=[] if packed is None else [offer.to_json() for offer in packed.offers],
        notes=[] if packed is None else list(packed.notes),
    )

    def draw(console: "Console") -> None:
        free = f"any {' and '.join(made.axes)} size" if made.axes else "fixed sizes"
        where = made.path if bundle is None else f"{bundle}/model.onnx"
        console.print(
            Text.assemble(
                ("Wrote ", "bold"), f"{where}: {numbers.size(made.size_bytes)}, ", f"opset {made.opset}, {free}"
            )
        )
        console.print(Text(f"Equals torch at {sizes}: error {made.max_error:.1e} of the largest output"))
        for refusal in made.refused:
            console.print(Text.assemble(("note ", "yellow"), f"not {refusal.rung}: {refusal.reason}"))
        if packed is not None:
            for note in packed.notes:
                console.print(Text.assemble(("note ", "yellow"), note))
            console.print(Text.assemble(("Bundle ", "bold"), f"{bundle}: {', '.join(packed.files)}"))

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
