"""The contract of the zoo, run for every registered network."""

import copy

import pytest
import torch

from metaprune.zoo import MODELS, build, example_inputs

REQUIRED = {
    *(f"cifar_resnet{depth}{kind}" for depth in (8, 14, 20, 32, 44, 56) for kind in ("", "_projection")),
    *("cifar_vgg11", "cifar_mobilenet_v2", "cifar_densenet40", "cifar_resnext29", "cifar_shufflenet_v2"),
    *("vit_tiny", "llama_tiny", "lstm_classifier", "gru_classifier", "mlp", "digits_cnn"),
}

every_model = pytest.mark.parametrize("name", list(MODELS))


def test_every_promised_network_is_there():
    assert set(MODELS) >= REQUIRED


@every_model
def test_runs_in_both_modes_at_several_batch_sizes(name):
    model, inputs = build(name), example_inputs(name)
    assert len(inputs) == 2
    assert inputs.dtype == (torch.int64 if MODELS[name].task == "language" else torch.float32)
    for training in (True, False):
        model.train(training)
        for batch in (inputs[:1], inputs, torch.cat((inputs, inputs[:1]))):
            output = model(batch)
            assert output.isfinite().all()
            expected = (*batch.shape, 256) if MODELS[name].task == "language" else (len(batch), 10)
            assert output.shape == expected


@every_model
def test_rows_of_a_batch_do_not_touch_each_other(name):
    model, inputs = build(name).eval(), example_inputs(name)
    with torch.no_grad():
        both = model(inputs)
        alone = torch.cat([model(inputs[:1]), model(inputs[1:])])
    assert (both - alone).abs().max() <= 1e-5 * both.abs().max()


@every_model
def test_every_parameter_learns(name):
    model, inputs = build(name), example_inputs(name)
    model(inputs).square().sum().backward()
    idle = [key for key, weight in model.named_parameters() if weight.grad is None or not weight.grad.isfinite().all()]
    assert not idle


@every_model
def test_same_seed_gives_same_weights_and_state_goes_round(name):
    torch.manual_seed(3)
    first = build(name).eval()
    torch.manual_seed(3)
    second, third = build(name).eval(), build(name).eval()
    inputs = example_inputs(name)
    assert torch.equal(inputs, example_inputs(name))
    with torch.no_grad():
        assert torch.equal(first(inputs), second(inputs))
        assert not torch.equal(first(inputs), third(inputs))
        third.load_state_dict(copy.deepcopy(first.state_dict()), strict=True)
        assert torch.equal(first(inputs), third(inputs))


@every_model
def test_runs_on_meta(name):
    """Tracing runs a copy without data, so no `forward` may read a value."""
    model = build(name).to("meta").eval()
    assert model(example_inputs(name).to("meta")).is_meta


@every_model
def test_number_of_classes_is_an_option(name):
    options = {"vocabulary": 300} if MODELS[name].task == "language" else {"num_classes": 7}
    assert build(name, **options)(example_inputs(name)).shape[-1] in (7, 300)


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("cifar_") and name != "cifar_vgg11"])
def test_convolutional_networks_take_images_of_any_size(name):
    model = build(name, in_channels=1).eval()
    assert model(torch.randn(2, 1, 45, 38)).shape == (2, 10)
