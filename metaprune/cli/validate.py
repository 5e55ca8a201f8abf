"""``metaprune validate``: is this ONNX file the network, and how good is it on the test images?"""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaprune.cli.answer import answer
from metaprune.cli.options import AsJson, Data, Debug, InputShape, Model, ModelArg, RunFolder, Weights

if TYPE_CHECKING:
    from rich.console import Console


def validate(
    file: Annotated[str | None, typer.Argument(metavar="[FILE]", help="An ONNX file. [FOLDER/model.onnx]")] = None,
    run: RunFolder = None,
    model: Model = None,
    weights: Weights = None,
    data: Data = None,
    input_shape: InputShape = None,
    model_arg: ModelArg = None,
    max_drop: Annotated[
        float | None,
        typer.Option(metavar="POINTS", help="Accuracy that may be lost against the dense network of --run."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Check an ONNX file: form, numbers, every answer, accuracy.

    Without --run or --model the file stands alone, and only its form is checked and
    that all ways to run it agree. A failed check ends with exit code 4.
    """
    from pathlib import Path

    from metaprune import export as room
    from metaprune.cli.saved import open_saved
    from metaprune.cli.screen import Screen
    from metaprune.data import load
    from metaprune.errors import ConfigError, GateError
    from metaprune.measure.accuracy import Accuracy, accuracy
    from metaprune.measure.latency import check_file
    from metaprune.subject import model_args, read_subject, shape_of

    if run is not None and model is not None:
        raise ConfigError(
            "`--run` and `--model` both say what the file should be, but one of them must. Leave one out."
        )
    if file is None and run is None:
        raise ConfigError("a file is needed, but none was given. Name an ONNX file, or a result with --run.")
    if max_drop is not None and run is None:
        raise ConfigError("`--max-drop` is a loss against the dense network, which only a result knows. Give --run.")
    if max_drop is not None and max_drop < 0:
        raise ConfigError(f"`--max-drop` must be at least 0, but it is {max_drop:g}.")
    screen = Screen(as_json)
    start = time.perf_counter()
    with screen.watch() as watch:
        watch.step("Reading file, network and data")
        path = None if file is None else check_file(file)
        network, inputs, spec, named = None, None, None, data
        dense: Accuracy | None = None
        if run is not None:
            saved = open_saved(run, data=data)
            network, spec, named = saved.slim, saved.subject.source.spec, saved.subject.spec
            dataset, inputs = saved.subject.dataset, saved.example
        elif model is not None:
            subject = read_subject(
                model,
                weights=weights,
                data=data,
                input_shape=shape_of(input_shape),
                model_args=model_args(model_arg),
            )
            network, spec = subject.module, subject.source.spec
            dataset, inputs = subject.dataset, subject.source.example_inputs
        else:
            dataset = None if data is None else load(data)
        if path is None:
            path = check_file(Path(str(run)) / "model.onnx")
        if run is not None and dataset is not None:
            watch.step("Accuracy of the dense network")
            dense = accuracy(saved.subject.module, dataset.test, progress=watch.samples("dense network"))
        watch.step("Checking the file")
        checked = room.validate(
            path,
            network,
            inputs if dataset is None else dataset.test,
            dense=dense,
            max_drop=max_drop,
            progress=watch.samples("answers of the file"),
        )
    checks = [{"name": check.name, "passed": check.passed, "detail": check.detail} for check in checked.checks]
    deviation = checked["numeric"].values
    of_file = checked.accuracy

    def figures(accuracy: "Accuracy | None") -> dict[str, Any] | None:
        return None if accuracy is None else {"metrics": {"accuracy": accuracy.top1}}

    told = answer(
        "validate",
        model=spec,
        data=named,
        split=None if of_file is None else of_file.split,
        images=None if of_file is None else of_file.n,
        before=figures(dense),
        after=figures(of_file),
        error_max=deviation["error"] / deviation["scale"] if deviation.get("scale") else None,
        checks=checks,
        files={path.name: str(path)},
        seconds={"total": round(time.perf_counter() - start, 3)},
        details=[check.to_json() for check in checked.checks],
        passed=checked.passed,
        culprit=None if checked.culprit is None else checked.culprit.to_json(),
    )

    def draw(console: "Console") -> None:
        from rich.table import Table
        from rich.text import Text

        from metaprune.cli.summary import OUTCOMES

        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column()
        for check in checked.checks:
            word, style = OUTCOMES[check.passed]
            table.add_row(Text(check.name, "bold"), Text(word, style), Text(check.detail.removeprefix("not made: ")))
        console.print(Text(str(path), style="bold"))
        console.print(table)
        if checked.culprit is not None:
            console.print(Text.assemble(("Look at ", "bold"), f"{checked.culprit}"))

    screen.show(told, draw)
    if checked.passed:
        return 0
    failed = ", ".join(check.name for check in checked.checks if check.passed is False)
    screen.say(f"gate failed: {failed}. Do not deploy {path.name}.")
    return GateError.exit_code
