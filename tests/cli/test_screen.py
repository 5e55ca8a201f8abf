"""Bars for those who watch, a few plain lines for logs."""

import io
import math
import re

import pytest
from rich.console import Console

from metaprune.cli import screen
from metaprune.cli.screen import Screen, Watch, finite


def drawn(console: Console) -> str:
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def work(watch: Watch) -> None:
    watch.step("Recovering: finetune")
    watch.start(351, "batches", "accuracy of the recovered network", done=100)
    for k in range(5):
        watch.advance(20, f"epoch 1/3, loss 1.{k}00")
    watch.close()
    tell = watch.samples("answers of the file")
    tell(500, 1000)
    tell(1000, 1000)
    share = watch.share("calls in random order")
    share(0.5)
    share(1.0)
    watch.step("Exporting to ONNX")
    watch.end()


def test_a_terminal_gets_bars_that_fit_into_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system="truecolor")
    watch = Watch(console)
    monkeypatch.setattr(screen, "_REFRESH", 1000)
    work(watch)
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\n\r]", drawn(console))]
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "Recovering: finetune" in text
    assert "Exporting to ONNX" in text
    assert "\x1b[" in drawn(console)


def test_a_long_status_leaves_the_bar_its_place() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    watch = Watch(console)
    watch.step("Measuring")
    watch.start(30, "networks", "measuring what pruning does")
    watch.advance(3, "cifar_mobilenet_v2 expansion=4 repeats=1x1x2 widths=8x8x8x12x16 after 12 of 24 epochs: ready")
    assert watch._bars is not None
    watch._bars.refresh()
    shown = drawn(console)
    watch.stop()
    assert "measuring what pruning does" in shown
    assert "3/30 cifar_mobilenet" in shown
    assert "…" in shown


def test_a_log_gets_plain_lines_and_few(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=80)
    work(Watch(console))
    assert [line.rpartition(" s")[0].rpartition(" ")[0].strip() for line in drawn(console).splitlines()] == [
        "Recovering: finetune",
        "Exporting to ONNX",
    ]
    monkeypatch.setattr(screen, "_TELL_EVERY_S", 0.0)
    console = Console(file=io.StringIO(), width=200)
    work(Watch(console))
    assert "accuracy of the recovered network: 120 of 351 batches, " in drawn(console)
    assert "s left (epoch 1/3, loss 1.000)" in drawn(console)
    assert "answers of the file: 1000 of 1000 images" in drawn(console)


def test_a_step_that_fails_is_not_called_done() -> None:
    console = Screen(as_json=False)
    console.err = Console(file=io.StringIO(), width=80)

    def work() -> None:
        with console.watch() as watch:
            watch.step("Cutting")
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        work()
    assert drawn(console.err) == ""


def test_json_has_no_word_for_infinity() -> None:
    assert finite({"a": [1, math.inf, {"b": math.nan}], "c": (0.5, "x")}) == {
        "a": [1, None, {"b": None}],
        "c": [0.5, "x"],
    }
