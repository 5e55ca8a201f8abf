import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from metaprune.errors import InputError
from metaprune.zoo import build, load_weights


@pytest.fixture
def model() -> nn.Module:
    return build("cifar_resnet8")


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return build("cifar_resnet8").state_dict()


def assert_loaded(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def refused(model: nn.Module, path, message: str) -> None:
    """`load_weights` raises, and nothing has changed."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        load_weights(model, path)
    assert_loaded(model, before)


def test_safetensors(model, state, tmp_path):
    save_file(state, tmp_path / "w.safetensors")
    load_weights(model, str(tmp_path / "w.safetensors"))
    assert_loaded(model, state)


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "module"])
def test_torch_files_and_their_wrappings(wrap, suffix, model, state, tmp_path):
    wrapped = {
        "plain": state,
        "state_dict": {"state_dict": state, "epoch": 3},
        "model": {"model": state},
        "module": {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    }[wrap]
    torch.save(wrapped, tmp_path / f"w{suffix}")
    load_weights(model, tmp_path / f"w{suffix}")
    assert_loaded(model, state)


def test_batch_counters_may_be_left_out(model, state, tmp_path):
    save_file({key: v for key, v in state.items() if "num_batches" not in key}, tmp_path / "w.safetensors")
    load_weights(model, tmp_path / "w.safetensors")
    assert_loaded(model, state)


def test_other_precision_is_cast(model, state, tmp_path):
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    save_file(half, tmp_path / "w.safetensors")
    load_weights(model, tmp_path / "w.safetensors")
    assert model.conv1.weight.dtype == torch.float32
    assert torch.equal(model.conv1.weight, half["conv1.weight"].float())


def test_tied_weights(tmp_path):
    tied, path = build("llama_tiny", tied=True), tmp_path / "w.safetensors"
    state = {key: value.clone() for key, value in build("llama_tiny", tied=True).state_dict().items()}
    save_file(state, path)
    load_weights(tied, path)
    assert_loaded(tied, state)
    save_file({**state, "head.weight": state["head.weight"] + 1}, path)
    refused(tied, path, "'embedding.weight' and 'head.weight' are one weight in the model but differ")
    del state["head.weight"]
    state["embedding.weight"] += 1
    save_file(state, path)
    load_weights(tied, path)
    assert torch.equal(tied.head.weight, state["embedding.weight"])
    refused(build("llama_tiny"), path, r"'head.weight' \(256, 64\) is missing")


def test_missing_file(model, state, tmp_path):
    save_file(state, tmp_path / "weights.safetensors")
    refused(model, tmp_path / "weight.safetensors", "there is no file.*Did you mean .*weights.safetensors")
    refused(model, tmp_path, "weights are read from .safetensors, .pt, .pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("size", [0, 7, 1000, -10])
def test_truncated_file(suffix, size, model, state, tmp_path):
    path = tmp_path / f"w{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    content = path.read_bytes()[:size]
    path.write_bytes(content)
    refused(model, path, rf"\({len(content)} bytes\) cannot be read as weights")


class Evil:
    def __reduce__(self):
        return os.system, ("echo unpickled",)


def test_pickled_objects_are_not_run(model, tmp_path, capfd):
    torch.save({"state_dict": Evil()}, tmp_path / "w.pt")
    refused(model, tmp_path / "w.pt", "more than tensors")
    assert "unpickled" not in capfd.readouterr().out


def test_content_that_is_no_state(model, tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "w.pt")
    refused(model, tmp_path / "w.pt", "it holds a list")
    torch.save({}, tmp_path / "w.pt")
    refused(model, tmp_path / "w.pt", "is missing")


def test_the_first_three_differences_are_named(model, state, tmp_path):
    wider = build("cifar_resnet8", widths=(16, 32, 128), num_classes=5).state_dict()
    save_file(wider, tmp_path / "w.safetensors")
    refused(
        model,
        tmp_path / "w.safetensors",
        r"'layer3.0.conv1.weight' is \(64, 32, 3, 3\) in the model but \(128, 32, 3, 3\) in the file; "
        r"'layer3.0.bn1.weight' is .*; 'layer3.0.bn1.bias' is .* and \d+ more",
    )
    changed = {**state, "extra.weight": torch.zeros(2, 3)}
    del changed["linear.bias"]
    save_file(changed, tmp_path / "w.safetensors")
    refused(model, tmp_path / "w.safetensors", r"'linear.bias' \(10\) is missing; 'extra.weight' \(2, 3\) is unknown\.")


def test_values_of_another_kind(model, state, tmp_path):
    torch.save({**state, "conv1.weight": state["conv1.weight"].to(torch.int8), "bn1.bias": 5}, tmp_path / "w.pt")
    refused(model, tmp_path / "w.pt", r"\(16, 3, 3, 3\) int8 in the file; 'bn1.bias' is \(16\) in .* but a int in the")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_must_be_finite(value, model, state, tmp_path):
    state["layer2.0.conv1.weight"][3, 1] = value
    save_file(state, tmp_path / "w.safetensors")
    refused(model, tmp_path / "w.safetensors", "'layer2.0.conv1.weight' in .* has 9 of 4608 values that are NaN")


def test_values_too_large_for_the_dtype_of_the_network(model, state, tmp_path):
    state["linear.bias"][0] = 1e6
    save_file(state, tmp_path / "w.safetensors")
    refused(model.half(), tmp_path / "w.safetensors", "'linear.bias'")
