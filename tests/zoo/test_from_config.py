"""Networks of transformers, by class or folder, and inputs that fit them."""

import json

import pytest
import torch

from metaprune.errors import ConfigError
from metaprune.zoo import resolve_model
from tests.graph.transformers_models import MODELS, build

pytest.importorskip("transformers")

TINY = {
    "vocab_size": 29,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 32,
}


def test_a_model_class():
    found = resolve_model("hf:LlamaForCausalLM", options=TINY)
    assert type(found.module).__name__ == "LlamaForCausalLM"
    assert (found.task, found.name, found.trained) == ("language", "LlamaForCausalLM", False)
    ids = found.example_inputs["input_ids"]
    assert ids.shape == (2, 12)
    assert torch.equal(ids, resolve_model("hf:LlamaForCausalLM", options=TINY).example_inputs["input_ids"])
    assert found.module(**found.example_inputs).logits.shape == (2, 12, 29)


def test_a_configuration_class():
    found = resolve_model("hf:BertConfig", options={key: item for key, item in TINY.items() if "key_value" not in key})
    assert type(found.module).__name__ == "BertModel"
    assert found.task == "classification"


def test_a_folder_with_weights_and_one_without(tmp_path):
    given = resolve_model("hf:LlamaForCausalLM", options=TINY).module
    given.save_pretrained(tmp_path / "whole")
    found = resolve_model(f"hf:{tmp_path / 'whole'}")
    assert (found.name, found.trained) == ("whole", True)
    assert type(found.module) is type(given)
    assert all(torch.equal(a, b) for a, b in zip(given.parameters(), found.module.parameters(), strict=True))
    given.config.save_pretrained(tmp_path / "bare")
    assert not resolve_model(f"hf:{tmp_path / 'bare'}").trained


def test_options_of_a_folder_and_of_the_network(tmp_path):
    resolve_model("hf:LlamaForCausalLM", options=TINY).module.config.save_pretrained(tmp_path)
    found = resolve_model(f"hf:{tmp_path}", options={"num_hidden_layers": 2, "attn_implementation": "eager"})
    assert len(found.module.layers) == 2
    assert found.module.config._attn_implementation == "eager"


def test_a_large_network_stays_without_weights():
    found = resolve_model("hf:LlamaForCausalLM", options={"num_hidden_layers": 8})
    assert {parameter.device.type for parameter in found.module.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("LlamaForCausalLMs", {}, "Did you mean 'LlamaForCausalLM'"),
        ("pipeline", {}, "neither"),
        ("PreTrainedModel", {}, "base class"),
        ("LlamaForCausalLM", {"hidden_sizes": 24}, "no field 'hidden_sizes'. Did you mean 'hidden_size'"),
        ("LlamaForCausalLM", {**TINY, "num_attention_heads": 5}, "could not be built"),
    ],
)
def test_names_and_options_that_do_not_fit(name, options, message):
    with pytest.raises(ConfigError, match=message):
        resolve_model(f"hf:{name}", options=options)


@pytest.mark.parametrize("content", [None, "{", json.dumps({"model_type": "no_such_model"})])
def test_folders_that_do_not_fit(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        resolve_model(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("t5", {"input_ids": (2, 12), "decoder_input_ids": (2, 12)}),
        ("whisper", {"input_features": (2, 14, 20), "decoder_input_ids": (2, 12)}),
        ("clip", {"input_ids": (2, 12), "pixel_values": (2, 3, 24, 24)}),
        ("yolos", {"pixel_values": (2, 3, 24, 36)}),
        ("wav2vec2", {"input_values": (2, 490)}),
        ("ast", {"input_values": (2, 16, 12)}),
    ],
)
def test_example_inputs(name, shapes):
    _, inputs = build(MODELS[name])
    assert {key: tuple(tensor.shape) for key, tensor in inputs.items()} == shapes


def test_a_shape_replaces_that_of_the_main_input():
    found = resolve_model("hf:LlamaForCausalLM", input_shape=(3, 7), options=TINY)
    assert found.example_inputs["input_ids"].shape == (3, 7)


def test_an_option_may_be_a_property_of_the_configuration() -> None:
    options = {"image_size": 8, "patch_size": 4, "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2}
    found = resolve_model("hf:ViTForImageClassification", options={**options, "num_labels": 7})
    assert found.module.classifier.out_features == 7
