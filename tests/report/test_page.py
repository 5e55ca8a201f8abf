"""The page is whole, safe, honest, and opens anywhere."""

import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import metaprune as mp
from metaprune import zoo
from metaprune.data import load
from metaprune.errors import InputError
from metaprune.measure import Comparison, Latency, Quantity
from metaprune.measure.accuracy import compare, of_hits
from metaprune.measure.host import host
from metaprune.measure.latency import Arm
from metaprune.report import Findings, render, write
from metaprune.report.charts import accuracy_spans, axis_bars, cost_maps, loss_curve, tradeoff
from metaprune.report.numbers import count


class Page(HTMLParser):
    """Tags that must be closed are, in order; text and attributes are collected."""

    VOID = ("meta", "link", "br", "rect", "line", "polyline")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.stack[-1:] != ["style"]:
            self.text += data


def timing(verdict: str, ratio: float) -> Latency:
    def quantity(value: float, unit: str) -> Quantity:
        return Quantity(value=value, unit=unit, n=200, low=0.98 * value, high=1.02 * value, spread="95 % interval")

    def arm(file: str, value: float) -> Arm:
        return Arm(file=file, **{name: quantity(value, "ms") for name in ("p50", "p95", "p99", "minimum", "cpu")})

    said = Comparison(
        file="model.onnx",
        ratio=quantity(ratio, "x"),
        cpu_ratio=quantity(ratio, "x"),
        verdict=verdict,  # type: ignore[arg-type]
        reason="a test says so",
    )
    return Latency(
        arms=(arm("dense.onnx", 1.0), arm("model.onnx", ratio)),
        comparisons=(said,),
        control=quantity(1.0, "x"),
        resolution=0.01,
        batch=1,
        threads=1,
        rounds=200,
        processes=2,
        cores=(0,),
        steal_ticks=0,
        involuntary_switches=0,
        runtime="onnxruntime",
        host=host(),
    )


@pytest.fixture(scope="module")
def findings() -> Findings:
    """A small network, cut and trained a little on digits."""
    network = zoo.build("digits_cnn", widths=(4, 8))
    options = {"epochs": 3, "batch_size": 128}
    result = mp.prune(
        network, zoo.example_inputs("digits_cnn"), "macs=0.5", data=load("digits"), recovery="finetune",
        recovery_options=options, calibration=64,
    )  # fmt: skip
    return Findings(
        result=result,
        model="zoo:digits_cnn",
        data="digits",
        budget="macs=0.5",
        recoveries=["finetune"],
        latency=timing("faster", 0.8),
        checks=[
            {"name": "numeric", "passed": True, "detail": "close"},
            {"name": "accuracy", "passed": None, "detail": "not made"},
            {"name": "structure", "passed": False, "detail": "a path <leaks>"},
        ],
        notes=["Something to know."],
        commands=["metaprune prune --model zoo:digits_cnn"],
        files={"model.onnx": "the pruned network"},
    )


def test_the_page_is_well_formed_and_says_everything(findings: Findings) -> None:
    page = Page(render(findings))
    result = findings.result
    for part in (
        "zoo:digits_cnn at macs=0.5",
        findings.headline,
        f"{result.after.metrics['accuracy']:.2f} %",
        "directly after the cut",
        "Bonett-Price",
        "359 images",
        "block2.conv1",
        "the output of the network",
        "made it 1.25 times as fast here",
        "The dense file against itself",
        "a path <leaks>",
        "not made",
        "training loss by epoch",
        "Something to know.",
        "metaprune prune --model zoo:digits_cnn",
        "onnxruntime",
        "torch",
    ):
        assert part in " ".join(page.text.split()), part
    for axis in result.network.axes:
        assert axis.name in page.text


def test_nothing_is_fetched_and_nothing_runs(findings: Findings) -> None:
    source = render(findings)
    page = Page(source)
    assert "default-src 'none'" in source
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "img", "object", "embed", "form"}
    for tag, attributes in page.tags:
        for name in ("src", "href", "action"):
            assert attributes.get(name) in (None, "data:,"), (tag, name)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"@import|url\(|https?://", source)
    assert "prefers-color-scheme: dark" in source
    assert 'name="viewport"' in source


def test_pictures_are_valid_and_inside_their_boxes(findings: Findings) -> None:
    pictures = re.findall(r"<svg.*?</svg>", render(findings), re.DOTALL)
    assert len(pictures) >= len(findings.result.network.axes) + 6
    for picture in pictures:
        root = ET.fromstring(picture)
        assert root.get("aria-label")
        for shape in root.iter("rect"):
            assert 0 <= float(shape.attrib["x"]) <= 100
            assert 0 <= float(shape.attrib["x"]) + float(shape.attrib["width"]) <= 100.01


def test_names_of_users_cannot_break_out(findings: Findings) -> None:
    evil = "<script>alert('x')</script>"
    page = Page(render(replace(findings, model=evil, data=evil, notes=[evil], commands=[evil])))
    assert "script" not in {tag for tag, _ in page.tags}
    assert evil in page.text


@pytest.mark.parametrize(
    ("verdict", "ratio", "said"),
    [
        ("slower", 1.3, "made it slower here"),
        ("no difference", 1.0, "made no difference to its speed"),
        ("too noisy", 0.9, "too noisy to say"),
    ],
)
def test_a_disappointing_latency_is_said_at_the_top(findings: Findings, verdict: str, ratio: float, said: str) -> None:
    page = render(replace(findings, latency=timing(verdict, ratio)))
    assert said in page[: page.index("Before and after")]


def test_the_headline_claims_no_more_than_the_interval(findings: Findings) -> None:
    def with_hits(hits: int) -> str:
        dense, small = (of_hits(np.arange(1000) < count, "test") for count in (900, hits))
        figures = replace(findings.result.after, metrics={"accuracy": small.top1})
        result = replace(findings.result, after=figures, difference=compare(dense, small))
        return replace(findings, result=result).headline

    assert with_hits(899).endswith("; no difference to the dense network is proved.")
    assert with_hits(850).endswith(", 5.00 points below the dense network.")
    assert with_hits(950).endswith(", 5.00 points above the dense network.")
    assert "right on 85.00 % of 1000 test images" in with_hits(850)


def test_a_result_without_data_training_or_files_has_a_page() -> None:
    result = mp.prune(zoo.build("mlp"), zoo.example_inputs("mlp"), "macs=0.5")
    page = Page(render(Findings(result=result, model="zoo:mlp", data=None, budget="macs=0.5")))
    assert "Accuracy" not in page.text
    assert "Latency" not in page.text
    assert "times fewer MACs" in page.text


def test_write_makes_the_file_or_says_why_not(findings: Findings, tmp_path: Path) -> None:
    path = write(findings, tmp_path / "page.html")
    assert path.read_text() == render(findings)
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(InputError, match="must be a folder"):
        write(findings, tmp_path / "nowhere" / "page.html")


def test_an_axis_of_accuracies_begins_below_every_interval() -> None:
    chart = accuracy_spans({"dense": of_hits(np.arange(100) < 93, "test")}, {"dense": "dense"})
    assert (chart.first, chart.last, chart.from_zero) == ("80 %", "100 %", False)
    assert 0 < chart.rows[0].low < chart.rows[0].value < chart.rows[0].high < 100
    assert accuracy_spans({"cut": of_hits(np.arange(100) < 5, "test")}, {}).from_zero
    assert accuracy_spans({"all": of_hits(np.ones(10**6, bool), "test")}, {}).rows[0].value == 100


def test_bars_show_what_stays() -> None:
    row = {"prunable": True, "reason": "", "macs_share": 0.5, "params_share": 0.25}
    frozen = row | {"prunable": False, "reason": "the output"}
    bars = axis_bars(
        [
            row | {"name": "layer1.conv", "size": 64},
            row | {"name": "layer1.fc#2", "size": 16},
            frozen | {"name": "head", "size": 4},
        ],
        {"layer1.conv": 16},
    )
    assert list(bars) == ["layer1", "head"]
    wide, narrow = bars["layer1"]
    assert (wide.kept, wide.filled, wide.width) == (16, 25.0, 100.0)
    assert (narrow.kept, narrow.filled, narrow.width) == (16, 100.0, 50.0)
    assert bars["head"][0].note == "the output"


def test_maps_show_where_the_cost_lies_to_one_scale(findings: Findings) -> None:
    page = Page(render(findings))
    maps = [attributes for tag, attributes in page.tags if tag == "svg" and "101" in str(attributes.get("viewbox"))]
    before, after = findings.result.before, findings.result.after
    for name, dense, small in (("MACs", before.macs, after.macs), ("parameters", before.params, after.params)):
        for which, amount in (("dense", dense), ("pruned", small)):
            assert f"{name}, {which}: {count(amount)}" in page.text
    assert len(maps) == 4
    assert "latency (measured)" not in page.text
    whole, rest = cost_maps("MACs", {"a.b": 300.0, "a.c": 100.0}, {"a.b": 50.0, "a.c": 50.0}, str) or ()
    assert [tile.kept for tile in whole.tiles] == pytest.approx([1 / 6, 0.5])
    assert whole.tiles[0].text == "a.b: 300.0 before, 50.0 after (17%)"
    assert rest.side == pytest.approx(50)
    assert cost_maps("MACs", {"a": 0.0}, {"a": 0.0}, str) is None
    whole, rest = cost_maps("ms", {"": 1.0}, {"": 3.0, "(other).Pad": 1.0}, str) or ()
    assert (whole.side, rest.side) == (pytest.approx(50), 100)  # a slower network is the larger one
    assert [tile.text for tile in rest.tiles] == [
        "the network itself: 1.0 before, 3.0 after (300%)",
        "(other).Pad: 0.0 before, 1.0 after",
    ]
    longest = "layer1.a_name_that_is_too_long_for_this"
    whole, _ = cost_maps("MACs", {longest: 1.0, "layer1.conv": 1.0}, {longest: 1.0}, str) or ()
    assert [tile.label for tile in whole.tiles] == ["", "layer1.conv"]
    many = {f"layer{k % 3}.{k}": 1.0 + k for k in range(200)}
    assert {tile.name for tile in cost_maps("MACs", many, many, str)[0].tiles} >= {"layer0.others", "layer1.199"}  # type: ignore[index]


def test_a_map_shows_where_the_time_goes(findings: Findings) -> None:
    times = {"block2.conv1": 0.6, "fc": 0.4}, {"block2.conv1": 0.3, "(other).ReorderInput": 0.5}
    page = Page(render(replace(findings, times=times)))
    for part in (
        "latency (measured), dense: 1 ms",
        "latency (measured), pruned: 0.8 ms",
        "block2.conv1: 0.6 ms before, 0.3 ms after (50%)",
        "fc: 0.4 ms before, 0 ms after (0%)",
        "(other).ReorderInput: 0 ms before, 0.5 ms after",
        "as onnxruntime tells the times of its kernels",
    ):
        assert part in page.text, part


def test_a_network_is_a_dot_between_latency_and_accuracy(findings: Findings) -> None:
    text = Page(render(findings)).text
    assert "Accuracy over latency" in text
    assert "Accuracy over latency" not in Page(render(replace(findings, latency=None))).text
    accuracies = [of_hits(np.arange(100) < hits, "test") for hits in (95, 90)]
    dense, small = tradeoff(accuracies, timing("faster", 0.5), ("dense", "pruned"))
    assert (dense.text, small.text) == ("95.00 % at 1 ms", "90.00 % at 0.5 ms")
    assert dense.left < dense.x < dense.right
    assert small.low < small.y < dense.y < dense.high
    assert small.x == pytest.approx(dense.x / 2, abs=0.01)


def test_a_curve_needs_two_epochs() -> None:
    assert loss_curve([{"train/loss": 1.0}]) is None
    curve = loss_curve([{"train/loss": 3.0}, {"train/loss": 1.0}, {"train/loss": 2.0}])
    assert curve is not None
    assert curve.points == "0.00,0.00 50.00,100.00 100.00,50.00"
    assert (curve.top, curve.bottom) == ("3", "1")


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")
@pytest.mark.parametrize("width", [390, 1000])
def test_a_browser_shows_it_without_scrolling_sideways(findings: Findings, tmp_path: Path, width: int) -> None:
    assert CHROMIUM is not None
    probe = "<script>document.title=document.documentElement.scrollWidth+' of '+innerWidth</script></body>"
    page = render(findings).replace("default-src 'none'", "script-src 'unsafe-inline'").replace("</body>", probe)
    # A frame, because a window of headless Chromium cannot be as narrow as a phone.
    (tmp_path / "page.html").write_text(page)
    (tmp_path / "frame.html").write_text(
        f"<iframe id=f src=page.html style='width:{width}px;height:900px;border:0'></iframe>"
        "<script>f.onload=()=>{document.body.append(f.contentDocument.title)}</script>"
    )
    options = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"),
        *("--disable-component-update", "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}"),
        *("--allow-file-access-from-files", "--virtual-time-budget=2000", "--dump-dom"),
    ]
    done = subprocess.run(
        [CHROMIUM, *options, f"file://{tmp_path / 'frame.html'}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found = re.search(r"(\d+) of (\d+)", done.stdout)
    assert found is not None, done.stdout[-500:]
    assert int(found[2]) == width
    assert int(found[1]) <= width
