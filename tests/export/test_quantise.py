"""Smaller numbers: files that run and say how they were made, and that are offered only for good reasons."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from metaprune.data import load
from metaprune.errors import ConfigError, InputError, UnsupportedModelError
from metaprune.export.devices import Device, load_device
from metaprune.export.quantise import METHODS, Calibration, _verdict, calibration_of, offers, quantise
from metaprune.export.session import open_session
from metaprune.export.structure import read
from metaprune.export.to_onnx import export
from metaprune.export.validate import validate
from metaprune.measure.accuracy import Paired, compare, of_hits
from metaprune.measure.latency import Comparison
from metaprune.measure.quantity import Quantity
from tests.export.conftest import Labelled, make

HOST = load_device("host")


def calibration(*shape: int) -> Calibration:
    return Calibration("40 samples of noise", [{"input": torch.randn(8, *shape).numpy()} for _ in range(5)])


@pytest.fixture
def mlp_file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    return Path(export(net, torch.randn(2, 64), tmp_path / "mlp.onnx").path)


@pytest.mark.parametrize("method", METHODS)
def test_a_file_in_smaller_numbers_runs_and_says_how_it_was_made(method: str, mlp_file: Path, tmp_path: Path) -> None:
    x = torch.randn(200, 64)
    made = quantise(mlp_file, tmp_path / "small.onnx", method, device=HOST, calibration=calibration(64))  # type: ignore[arg-type]
    assert made.stat().st_size < 0.75 * mlp_file.stat().st_size
    structure = read(made)
    assert structure.metadata["metaprune.precision"] == method
    assert structure.metadata["metaprune.network"] == read(mlp_file).metadata["metaprune.network"]
    assert ("metaprune.calibration" in structure.metadata) == (method == "int8")
    full, small = (open_session(path).predict(x) for path in (mlp_file, made))
    assert small.dtype == torch.float32
    error = float((small - full).std() / full.std())
    assert error < 0.1  # 20 dB
    assert (small.argmax(1) == full.argmax(1)).float().mean() > 0.9


def test_convolutions_have_a_scale_for_every_channel(conv_file: Path, tmp_path: Path) -> None:
    for device, kind, most in [
        (HOST, onnx.TensorProto.UINT8, 127),
        (load_device("rpi4"), onnx.TensorProto.INT8, 127),
        (load_device("x86-avx2-1core"), onnx.TensorProto.UINT8, 64),
    ]:
        quantise(conv_file, tmp_path / "int8.onnx", "int8", device=device, calibration=calibration(3, 16, 16))
        model = onnx.load(tmp_path / "int8.onnx")
        weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        kernels = [array for array in weights.values() if array.dtype == np.int8 and array.ndim == 4]
        assert {array.shape[0] for array in kernels} == {17, 12}
        assert max(int(np.abs(array).max()) for array in kernels) <= most
        scales = [array for name, array in weights.items() if name.endswith("_scale") and array.shape == (17,)]
        assert scales
        zeros = [tensor.data_type for tensor in model.graph.initializer if "zero_point" in tensor.name]
        assert kind in zeros


def test_what_does_nothing_good_is_refused(conv_file: Path, mlp_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.onnx"
    with pytest.raises(UnsupportedModelError, match="without convolutions"):
        quantise(conv_file, out, "int8-dynamic", device=HOST)
    with pytest.raises(ConfigError, match="needs calibration data"):
        quantise(conv_file, out, "int8", device=HOST)
    with pytest.raises(InputError, match=r"takes input float32\['batch', 3, 16, 16\], and was given"):
        quantise(conv_file, out, "int8", device=HOST, calibration=calibration(3, 8))
    with pytest.raises(ConfigError, match="one of int8"):
        quantise(conv_file, out, "int3", device=HOST)  # type: ignore[arg-type]
    big = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    nn.init.constant_(big[0].weight, 1e5)
    export(big, torch.randn(2, 3, 8, 8), tmp_path / "big.onnx")
    with pytest.raises(UnsupportedModelError, match=r"fp16 ends at 65504, but a weight is 100000"):
        quantise(tmp_path / "big.onnx", out, "fp16", device=HOST)
    with pytest.raises(UnsupportedModelError, match="the network has none"):
        quantise(tmp_path / "big.onnx", out, "int8-weights", device=HOST)
    assert not out.exists()


def test_calibration_is_drawn_from_the_split_it_names(tmp_path: Path) -> None:
    data = load("digits")
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    export(net, torch.randn(2, 1, 8, 8), tmp_path / "net.onnx")
    found = calibration_of(tmp_path / "net.onnx", data.train, samples=70, seed=3)
    assert found.about == "70 samples of train, seed 3"
    assert sum(len(feed["input"]) for feed in found.feeds) == 70


def timed(ratio: float, verdict: str) -> Comparison:
    number = Quantity(value=ratio, unit="x", n=200, low=ratio, high=ratio)
    return Comparison(file="a", ratio=number, cpu_ratio=number, verdict=verdict, reason="a test")  # type: ignore[arg-type]


def lost(points: float) -> Paired:
    right = np.arange(2000) >= 20 * points
    return compare(of_hits(np.ones(2000, bool), "validation"), of_hits(right, "validation"))


@pytest.mark.parametrize(
    ("timing", "difference", "device", "offered", "said"),
    [
        (timed(0.5, "faster"), lost(0.0), HOST, True, "x0.500 the time"),
        (timed(0.97, "faster"), lost(0.0), HOST, False, "must take 5% less time"),
        (timed(1.2, "slower"), lost(0.0), HOST, False, "(slower)"),
        (timed(0.5, "faster"), lost(3.0), HOST, False, "is not excluded"),
        (timed(0.5, "faster"), None, HOST, False, "cannot be judged"),
        (timed(0.5, "faster"), lost(0.0), load_device("rpi4"), False, "cannot be measured here"),
        (timed(1.5, "slower"), lost(0.0), load_device("mcu-256k"), True, "takes no other numbers"),
    ],
)
def test_what_is_offered(
    timing: Comparison, difference: Paired | None, device: Device, offered: bool, said: str
) -> None:
    got, reason = _verdict(timing, difference, device, max_drop=0.5)
    assert got is offered
    assert said in reason


def test_only_what_is_offered_is_left(tmp_path: Path) -> None:
    net, x = make("conv"), torch.randn(600, 3, 16, 16)
    export(net, x[:2], tmp_path / "net.onnx")
    with torch.no_grad():
        judge = Labelled(x, net(x).argmax(1))
    found = offers(
        tmp_path / "net.onnx", tmp_path, device=HOST, methods=METHODS, calibration=calibration(3, 16, 16), judge=judge,
        max_drop=5.0, seconds=0.2,
    )  # fmt: skip
    assert [offer.method for offer in found] == list(METHODS)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"net.onnx", *(Path(offer.path).name for offer in found if offer.offered)}
    for offer in found:
        assert offer.reason
        assert (offer.latency is None) == (offer.method == "int8-dynamic")
        assert offer.to_json()["offered"] is offer.offered
    assert found[0].calibration == "40 samples of noise"


def test_smaller_numbers_are_checked_by_gates_of_their_own(tmp_path: Path) -> None:
    net, x = make("conv"), torch.randn(400, 3, 16, 16)
    with torch.no_grad():
        split = Labelled(x, net(x).argmax(1))
    export(net, x[:2], tmp_path / "net.onnx")
    for method, least in (("int8", 20.0), ("fp16", 40.0)):
        quantise(
            tmp_path / "net.onnx", tmp_path / "small.onnx", method, device=HOST, calibration=calibration(3, 16, 16)
        )
        found = validate(tmp_path / "small.onnx", net, split, reference_limit_s=0)
        assert found["structure"].passed
        assert found["numeric"].passed, found["numeric"].detail
        assert found["third opinion"].passed, found["third opinion"].detail
        assert f"in {method}" in found["numeric"].detail
        assert found.culprit is None
        if method == "int8":
            assert found["numeric"].values["sqnr_db"] >= least
        else:
            assert found.passed, found.to_json()
    wrong = make("conv")
    nn.init.normal_(wrong[9].weight)
    assert not validate(tmp_path / "small.onnx", wrong, split, reference_limit_s=0).passed
