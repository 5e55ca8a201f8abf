import sys
import types

import pytest
import torch
from torch import nn

from metaprune.errors import ConfigError, InputError, MissingExtraError
from metaprune.zoo import SourceModel, resolve_model


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A module in the current folder, as a user has it."""
    (tmp_path / "my_networks.py").write_text(
        """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.linear = nn.Linear(4, classes)
    def forward(self, x, y=None):
        return self.linear(x if y is None else x + y)

class WithExample(Net):
    task = "language"
    example_inputs = torch.zeros(1, 4)

def with_example(classes=3):
    return Net(classes), {"x": torch.zeros(2, 4), "y": torch.ones(2, 4)}

def nothing():
    return 5

def odd_example():
    return Net(), [1, 2]

def broken():
    raise RuntimeError("no disk")

made = Net()
"""
    )
    (tmp_path / "raises_on_import.py").write_text("1 / 0")
    (tmp_path / "lacks_library.py").write_text("import a_library_that_is_not_there")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("my_networks", "raises_on_import", "lacks_library"):
        sys.modules.pop(name, None)


def test_zoo_with_and_without_prefix():
    full, bare = resolve_model("zoo:cifar_resnet8"), resolve_model("cifar_resnet8")
    assert isinstance(full, SourceModel)
    assert (full.spec, full.name, full.task) == (bare.spec, bare.name, bare.task)
    assert full.spec == "zoo:cifar_resnet8"
    assert torch.equal(full.example_inputs, bare.example_inputs)
    assert resolve_model("llama_tiny").task == "language"


def test_options_and_shape_reach_the_network():
    found = resolve_model("zoo:cifar_resnet8", input_shape=(1, 1, 40, 40), options={"in_channels": 1, "num_classes": 4})
    assert found.example_inputs.shape == (1, 1, 40, 40)
    assert found.module.training
    assert found.module(torch.randn(2, 1, 40, 40)).shape == (2, 4)


def test_shape_of_a_language_model_gives_tokens():
    found = resolve_model("zoo:llama_tiny", input_shape=(3, 8))
    assert found.example_inputs.dtype == torch.int64
    assert found.example_inputs.shape == (3, 8)


@pytest.mark.parametrize("shape", [(1, 4, 32, 32), (3, 32), (2, 3)])
def test_shape_that_the_network_rejects(shape):
    with pytest.raises(InputError, match=r"'zoo:cifar_resnet8' rejects an input of shape \(.*--input-shape"):
        resolve_model("zoo:cifar_resnet8", input_shape=shape)


def test_shape_that_is_none():
    for shape in ((), (1, 0, 4)):
        with pytest.raises(ConfigError, match="at least 1"):
            resolve_model("zoo:cifar_resnet8", input_shape=shape)


def test_options_that_need_another_example_input():
    with pytest.raises(InputError, match="input-shape"):
        resolve_model("zoo:vit_tiny", options={"image_size": 16})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("zoo:cifar_resnet21", "Did you mean 'cifar_resnet"),
        ("cifar_resnet21", "Did you mean 'cifar_resnet"),
        ("zooo:mlp", "Did you mean 'zoo'"),
        ("huh:some/folder", "Known: zoo:NAME, timm:NAME, torchvision:NAME, hf:NAME, package.module:factory"),
        ("no_such_package.part:make", "neither a source of models nor a module"),
        ("zoo:", "no model is named ''"),
        ("", "no model is named ''"),
    ],
)
def test_unknown_specs(spec, message):
    with pytest.raises(ConfigError, match=message):
        resolve_model(spec)


@pytest.mark.usefixtures("user_module")
class TestFactory:
    def test_with_a_shape(self):
        found = resolve_model("my_networks:Net", input_shape=(2, 4), options={"classes": 5})
        assert found.module(found.example_inputs).shape == (2, 5)
        assert (found.name, found.task) == ("Net", "classification")

    def test_without_a_shape(self):
        with pytest.raises(ConfigError, match="gives no example input"):
            resolve_model("my_networks:Net")

    def test_that_returns_an_example(self):
        found = resolve_model("my_networks:with_example", options={"classes": 4})
        assert found.module(**found.example_inputs).shape == (2, 4)

    def test_whose_module_has_an_example(self):
        found = resolve_model("my_networks:WithExample")
        assert found.example_inputs.shape == (1, 4)
        assert found.task == "language"

    def test_that_is_a_module(self):
        assert isinstance(resolve_model("my_networks:made", input_shape=(1, 4)).module, nn.Linear | nn.Module)
        with pytest.raises(ConfigError, match="takes no options"):
            resolve_model("my_networks:made", input_shape=(1, 4), options={"classes": 2})

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("my_networks:nothing", "returned a int"),
            ("my_networks:odd_example", "it is a list"),
            ("my_networks:broken", "RuntimeError: no disk"),
            ("my_networks:Nett", "Did you mean 'Net'"),
            ("my_network:Net", "neither a source of models nor a module"),
            ("raises_on_import:make", "ZeroDivisionError"),
            ("lacks_library:make", "a_library_that_is_not_there"),
        ],
    )
    def test_errors(self, spec, message):
        with pytest.raises(ConfigError, match=message):
            resolve_model(spec, input_shape=None)

    def test_unknown_option(self):
        with pytest.raises(ConfigError, match="clases"):
            resolve_model("my_networks:Net", input_shape=(1, 4), options={"clases": 2})


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_missing_library_names_the_way_to_install_it(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=f"pip install {library}"):
        resolve_model(f"{library}:resnet18")


def test_missing_transformers_names_the_way_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install transformers, or .*metaprune\[transformers\]"):
        resolve_model("hf:LlamaForCausalLM")


class Small(nn.Module):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, num_classes, 3)
        self.pretrained_cfg = {"input_size": (3, 16, 16)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean(dim=(2, 3))


def test_timm(monkeypatch):
    def create_model(model_name, pretrained, **options):
        assert model_name == "small"
        assert not pretrained
        return Small(**options)

    library = types.SimpleNamespace(
        create_model=create_model, is_model=lambda name: name == "small", list_models=lambda: ["small"]
    )
    monkeypatch.setitem(sys.modules, "timm", library)
    found = resolve_model("timm:small", options={"num_classes": 4})
    assert found.example_inputs.shape == (2, 3, 16, 16)
    assert found.spec == "timm:small"
    with pytest.raises(ConfigError, match=r"timm has no model 'smal'\. Did you mean 'small'"):
        resolve_model("timm:smal")
    with pytest.raises(ConfigError, match="could not be built with options"):
        resolve_model("timm:small", options={"classes": 4})


def test_torchvision(monkeypatch):
    def small(*, weights="download", **options):
        assert weights is None
        return Small(**options)

    def in_parts(*, weights="download", weights_backbone="download"):
        assert weights is weights_backbone is None
        return Small()

    builders = {"small": small, "in_parts": in_parts}
    models = types.SimpleNamespace(get_model_builder=builders.__getitem__, list_models=lambda: list(builders))
    library = types.SimpleNamespace(models=models)
    monkeypatch.setitem(sys.modules, "torchvision", library)
    for name in builders:
        assert resolve_model(f"torchvision:{name}").example_inputs.shape == (2, 3, 224, 224)
    with pytest.raises(ConfigError, match=r"torchvision has no model 'smal'\. Did you mean 'small'"):
        resolve_model("torchvision:smal")
