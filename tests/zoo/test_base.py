import pytest
import torch

from metaprune.errors import ConfigError
from metaprune.zoo import MODELS, ZooModel, build, example_inputs, options_for_images


def test_unknown_name_gives_the_nearest():
    with pytest.raises(ConfigError, match=r"no model is named 'cifar_resnet21'. Did you mean 'cifar_resnet\w+'"):
        build("cifar_resnet21")
    with pytest.raises(ConfigError, match="Did you mean 'mlp'"):
        example_inputs("mpl")


def test_unknown_option_gives_the_nearest():
    with pytest.raises(ConfigError, match=r"no option 'num_clases'. Did you mean 'num_classes'\? Known: in_channels"):
        build("cifar_resnet20", num_clases=100)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlp", {"num_classes": 0}),
        ("mlp", {"num_classes": True}),
        ("mlp", {"num_classes": "10"}),
        ("mlp", {"widths": ()}),
        ("mlp", {"widths": (64, 0)}),
        ("mlp", {"widths": 64}),
        ("lstm_classifier", {"bidirectional": 1}),
        ("cifar_mobilenet_v2", {"dropout": -0.5}),
    ],
)
def test_option_of_the_wrong_kind_is_refused(name, options):
    with pytest.raises(ConfigError, match=f"option {next(iter(options))!r} of model {name!r} must be"):
        build(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "rule"),
    [
        ("cifar_resnet20", {"widths": (16, 32)}, "three numbers"),
        ("cifar_resnet20", {"widths": (64, 32, 16)}, "do not shrink"),
        ("cifar_vgg11", {"widths": (8, 8)}, "from 1 to 2"),
        ("cifar_vgg11", {"pool_after": (1, 1)}, "different numbers"),
        ("cifar_vgg11", {"image_size": 30}, "multiple"),
        ("cifar_mobilenet_v2", {"widths": (8, 8)}, "eight numbers"),
        ("cifar_mobilenet_v2", {"repeats": (1, 2)}, "six numbers"),
        ("cifar_mobilenet_v2", {"dropout": 1.5}, "dropout <= 1"),
        ("cifar_resnext29", {"depth": 28}, "9 \\* blocks"),
        ("cifar_densenet40", {"depth": 41}, "6 \\* layers"),
        ("cifar_shufflenet_v2", {"units": (2, 2)}, "two numbers more"),
        ("cifar_shufflenet_v2", {"widths": (24, 47, 96, 192, 512)}, "even"),
        ("vit_tiny", {"num_heads": 5}, "`width` must be a multiple of `num_heads`"),
        ("vit_tiny", {"patch_size": 5}, "`image_size` must be a multiple of `patch_size`"),
        ("llama_tiny", {"num_kv_heads": 3}, "`num_heads` must be a multiple of `num_kv_heads`"),
        ("llama_tiny", {"width": 12}, "even"),
        ("llama_tiny", {"rope_base": 1.0}, "rope_base > 1"),
        ("digits_cnn", {"widths": (8,)}, "two numbers"),
    ],
)
def test_options_that_do_not_fit_each_other_are_refused(name, options, rule):
    with pytest.raises(ConfigError, match=rule):
        build(name, **options)


def test_registered_entries_are_complete():
    assert all(isinstance(MODELS[name], ZooModel) and MODELS[name].task for name in MODELS)


SMALL = {
    "cifar_resnet14": {"widths": (4, 8, 16)},
    "cifar_resnet8_projection": {"widths": (4, 8, 16)},
    "cifar_vgg11": {"widths": (8, 8, 16), "pool_after": (1, 3), "hidden": 16},
    "cifar_mobilenet_v2": {"widths": (4, 4, 4, 8, 8, 8, 16, 32), "repeats": (1, 1, 1, 1, 1, 1), "expansion": 2},
    "cifar_densenet40": {"depth": 10, "growth": 4},
    "cifar_resnext29": {"depth": 11, "cardinality": 2, "group_width": 2},
    "vit_tiny": {"width": 16, "depth": 2, "num_heads": 2, "hidden": 32, "patch_size": 2},
    "mlp": {"widths": (16,)},
}


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
@pytest.mark.parametrize("name", SMALL)
def test_every_family_takes_images_of_several_sizes(name, shape):
    model = build(name, **SMALL[name], **options_for_images(name, shape, 7))
    assert model(torch.randn(2, *shape)).shape == (2, 7)
    assert sum(weight.numel() for weight in model.parameters()) < 60_000
