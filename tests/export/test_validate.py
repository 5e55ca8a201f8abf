"""Good files pass, changed ones do not, and every check says what it found."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from metaprune.errors import ConfigError, GateError, InputError, UnsupportedModelError
from metaprune.export import validate as exported_name
from metaprune.export.numeric import Judge, Truth, largest_difference
from metaprune.export.session import open_session
from metaprune.export.to_onnx import export
from metaprune.export.validate import _margin, validate
from metaprune.measure.accuracy import accuracy, of_hits


def test_a_good_file_passes_all_five(file: Path, net: nn.Module, split: object) -> None:
    seen: list[tuple[int, int]] = []
    result = validate(file, net, split, batch_size=100, progress=lambda *done: seen.append(done))
    assert [(check.name, check.passed) for check in result.checks] == [
        ("structure", True),
        ("numeric", True),
        ("third opinion", True),
        ("agreement", True),
        ("accuracy", True),
    ]
    assert result.passed
    assert result.require() is result
    assert set(result["third opinion"].values["ways"]) == {"optimised", "as written", "reference"}
    assert result["agreement"].values["n"] == 203
    assert result.accuracy is not None
    own = accuracy(net, split)  # type: ignore[arg-type]
    assert (result.accuracy.correct == own.correct).all()
    assert seen == [(100, 203), (200, 203), (203, 203)]
    json.loads(json.dumps(result.to_json(), allow_nan=False))


def with_weight(file: Path, folder: Path, index: int, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    model = onnx.load(file)
    weights = [tensor for tensor in model.graph.initializer if numpy_helper.to_array(tensor).dtype == np.float32]
    weights = sorted(weights, key=lambda tensor: -numpy_helper.to_array(tensor).size)
    old = numpy_helper.to_array(weights[index])
    new = change(old.copy()).astype(np.float32)
    assert not np.array_equal(old, new)
    weights[index].CopyFrom(numpy_helper.from_array(new, weights[index].name))
    onnx.save(model, folder / "tampered.onnx")
    return folder / "tampered.onnx"


def shifted(weight: np.ndarray) -> np.ndarray:
    return weight + 1e-3 * weight.std() * np.sign(np.random.default_rng(0).standard_normal(weight.shape))


def swapped(weight: np.ndarray) -> np.ndarray:
    axis = int(np.argmax(np.array(weight.shape) > 1))
    return np.take(weight, [1, 0, *range(2, weight.shape[axis])], axis)


@pytest.mark.parametrize("change", [shifted, swapped])
@pytest.mark.parametrize("index", [0, 1])
def test_a_changed_weight_is_caught(
    file: Path, net: nn.Module, images: Tensor, tmp_path: Path, index: int, change: Callable[..., np.ndarray]
) -> None:
    result = validate(with_weight(file, tmp_path, index, change), net, images)
    assert result["structure"].passed
    assert result["numeric"].passed is False
    assert result["third opinion"].passed is False
    assert "the file is another network" in result["third opinion"].detail
    assert not result.passed
    with pytest.raises(GateError, match=r"'tampered.onnx' fails \d of 5 checks. numeric: error"):
        result.require()


@dataclass
class Labelled:
    x: Tensor
    y: Tensor
    name: str = "validation"

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.x.split(batch_size), self.y.split(batch_size))


@pytest.fixture
def easy() -> tuple[nn.Module, Labelled]:
    """A linear network that is always right, by a wide margin."""
    net = nn.Linear(10, 10, bias=False).eval()
    net.weight.data = torch.eye(10)
    label_N = torch.arange(400) % 10
    return net, Labelled(nn.functional.one_hot(label_N, 10) + 0.1 * torch.rand(400, 10), label_N)


def test_changed_answers_are_listed_and_cost_accuracy(easy: tuple[nn.Module, Labelled], tmp_path: Path) -> None:
    net, split = easy
    export(net, split.x[:2], tmp_path / "net.onnx")
    result = validate(with_weight(tmp_path / "net.onnx", tmp_path, 0, swapped), net, split, reference_limit_s=0)
    assert result["agreement"].passed is False
    assert result["agreement"].values["value"] == pytest.approx(80)
    assert [entry["sample"] for entry in result["agreement"].values["differing"][:4]] == [0, 1, 10, 11]
    assert result["accuracy"].passed is False
    assert "-20.00 points from the network" in result["accuracy"].detail


def test_answers_between_equals_are_ties(easy: tuple[nn.Module, Labelled], tmp_path: Path) -> None:
    net, split = easy
    split.x[7] = 1.0  # all ten answers are the same to the network
    export(net, split.x[:2], tmp_path / "net.onnx")

    def nudged(weight: np.ndarray) -> np.ndarray:
        return weight + np.diag(np.linspace(0, 5e-7, 10))

    result = validate(with_weight(tmp_path / "net.onnx", tmp_path, 0, nudged), net, split, reference_limit_s=0)
    assert result["agreement"].passed
    assert result["agreement"].values["ties"] == 1
    assert result["agreement"].values["value"] == 100


def test_the_loss_against_the_dense_network_may_be_limited(easy: tuple[nn.Module, Labelled], tmp_path: Path) -> None:
    net, split = easy
    export(net, split.x[:2], tmp_path / "net.onnx")
    split.y[:20] = (split.y[:20] + 1) % 10  # the file is wrong on these, the dense network was not
    dense = of_hits(np.ones(400, bool), split.name)
    free = validate(tmp_path / "net.onnx", net, split, dense=dense, reference_limit_s=0)["accuracy"]
    assert free.passed
    assert free.values["against_dense"]["value"] == pytest.approx(-5)
    assert free.values["against_dense"]["p"] < 1e-5
    for limit, passed in ((10.0, True), (5.0, False)):
        check = validate(tmp_path / "net.onnx", net, split, dense=dense, max_drop=limit, reference_limit_s=0)[
            "accuracy"
        ]
        assert check.passed is passed
    with pytest.raises(InputError, match="same samples"):
        validate(tmp_path / "net.onnx", net, split, dense=of_hits(np.ones(9, bool), "test"), reference_limit_s=0)


def test_a_file_alone_is_checked_as_far_as_it_goes(file: Path, tmp_path: Path) -> None:
    result = validate(file)
    assert [check.passed for check in result.checks] == [True, None, True, None, None]
    assert result.passed
    assert all("not made" in check.detail for check in result.checks if check.passed is None)
    assert result["third opinion"].values["ways"]["reference"]["reference"] == "file as it is written"


def test_a_batch_without_labels_is_enough_for_four(conv_file: Path, conv: nn.Module) -> None:
    result = validate(conv_file, conv, torch.randn(40, 3, 16, 16), reference_limit_s=0)
    assert [check.passed for check in result.checks] == [True, True, True, True, None]
    assert "reference evaluator left out" in result["third opinion"].detail
    assert result["numeric"].values["n"] == 40


def test_the_slow_evaluator_is_ended(conv_file: Path, conv: nn.Module) -> None:
    result = validate(conv_file, conv, torch.randn(4, 3, 16, 16), reference_limit_s=0.01)
    assert result["third opinion"].passed
    assert "not done after 0.01 s" in result["third opinion"].detail
    assert result["third opinion"].values["missing"]


def test_data_that_do_not_fit_are_named(conv_file: Path, conv: nn.Module) -> None:
    with pytest.raises(InputError, match="the network must run on the data"):
        validate(conv_file, conv, torch.randn(4, 5, 16, 16))
    with pytest.raises(InputError, match="takes input float32"):
        validate(conv_file, None, torch.randn(4, 5, 16, 16))
    for wrong in ({"samples": 0}, {"max_drop": -1.0}, {"batch_size": 0}, {"max_drop": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            validate(conv_file, conv, torch.randn(4, 3, 16, 16), **wrong)  # type: ignore[arg-type]


def test_a_leak_fails_the_structure(conv_file: Path, conv: nn.Module, tmp_path: Path) -> None:
    model = onnx.load(conv_file)
    model.doc_string = "made in /home/someone/nets"
    onnx.save(model, tmp_path / "leaky.onnx")
    result = validate(tmp_path / "leaky.onnx", conv, torch.randn(4, 3, 16, 16), reference_limit_s=0)
    assert result["structure"].passed is False
    assert "/home/someone/nets" in result["structure"].detail


def test_another_number_of_outputs_is_infinitely_wrong(conv_file: Path, conv: nn.Module, tmp_path: Path) -> None:
    model = onnx.load(conv_file)
    model.graph.output.append(helper.make_tensor_value_info(model.graph.node[0].output[0], 1, None))
    onnx.save(model, tmp_path / "two.onnx")
    result = validate(tmp_path / "two.onnx", conv, torch.randn(4, 3, 16, 16), reference_limit_s=0)
    assert result["numeric"].passed is False
    assert "another shape" in result["numeric"].detail
    json.dumps(result.to_json(), allow_nan=False)


class Baked(nn.Module):
    """A float32 constant in the forward: no float64 copy runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) @ torch.eye(4, dtype=torch.float32)


def test_without_float64_the_rule_is_simpler_and_says_so(tmp_path: Path) -> None:
    net, x = Baked().eval(), torch.randn(20, 6)
    result = export(net, x, tmp_path / "net.onnx")
    assert {probe.deviation.reference for probe in result.probes} == {"float32 network"}
    assert validate(tmp_path / "net.onnx", net, x).passed
    assert not validate(with_weight(tmp_path / "net.onnx", tmp_path, 0, shifted), net, x).passed


class Noisy(nn.Module):
    """Its noise is larger than any fault, and must not pass for rounding of torch."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.1 * torch.randn_like(x))


def test_a_network_that_draws_numbers_proves_nothing(conv_file: Path, conv: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match=r"the same every time, .* in training alone"):
        validate(conv_file, Noisy(conv), torch.randn(4, 3, 16, 16), reference_limit_s=0)


def test_the_name_of_the_room_is_the_function() -> None:
    assert callable(exported_name)
    import metaprune.export
    import metaprune.export.bench

    assert callable(metaprune.export.validate)
    assert callable(metaprune.export.bench)


def test_the_margin_is_the_distance_of_the_best_two() -> None:
    assert _margin(np.array([[1.0, 4.0, 2.0], [0.0, 0.0, -1.0]])).tolist() == [2.0, 0.0]
    assert np.isinf(_margin(np.zeros((2, 1)))).all()


def test_truth_is_float64_and_the_network_stays(conv: nn.Module) -> None:
    from metaprune.export.example import as_example

    conv.train()
    truth = Judge(conv).truth(as_example(torch.randn(3, 3, 16, 16)))
    assert conv.training
    assert truth.double is not None
    assert truth.double["output"].dtype == np.float64
    assert truth.deviation(truth.single).passed
    assert truth.deviation({"other name": truth.single["output"]}).passed
    assert not truth.deviation({}).passed
    assert torch.get_default_dtype() == torch.float32


def test_what_float32_cannot_compute_proves_no_file() -> None:
    """Ten times torch's own error would be half of the output."""
    truth = Truth(single={"y": np.array([1.05, 2.0], np.float32)}, double={"y": np.array([1.0, 2.0])})
    assert truth.deviation({"y": np.array([1.01, 2.0])}).passed
    assert not truth.deviation({"y": np.array([1.3, 2.0])}).passed


def test_integers_must_be_equal_and_missing_numbers_match() -> None:
    truth = Truth(single={"index": np.array([1, 2])})
    assert truth.deviation({"index": np.array([1, 2])}).passed
    assert not truth.deviation({"index": np.array([1, 3])}).passed
    assert largest_difference(np.array([np.inf, 1.0]), np.array([np.inf, 1.5])) == 0.5
    assert largest_difference(np.array([np.nan, 1.0]), np.array([0.0, 1.0])) == np.inf


def test_the_session_runs_odd_numbers_of_samples(conv_file: Path, conv: nn.Module) -> None:
    assert open_session(conv_file).predict(torch.randn(3, 3, 16, 16)).shape == (3, 10)
    assert of_hits(np.ones(3, bool), "x").top1 == 100
