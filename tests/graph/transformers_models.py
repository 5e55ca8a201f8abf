"""Small configurations of transformers, with widths unlike one another, so that a mix-up shows."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 61


@dataclass(frozen=True)
class Model:
    """One network of the library.

    Attributes:
        kind: Its class.
        config: Fields of its configuration.
        share: Part of the parameters that must lie on prunable axes.
        why: Why that is less than 0.9, where it is.
    """

    kind: str
    config: dict[str, Any]
    share: float = 0.9
    why: str = ""


def build(model: Model, attention: str = "sdpa", seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network in evaluation mode, every parameter random, and inputs for it."""
    import transformers

    from metaprune.zoo.from_config import example_inputs_of

    torch.manual_seed(seed)
    kind = getattr(transformers, model.kind)
    config = kind.config_class(**_made(transformers, model.config))
    attention = attention if kind._supports_sdpa else "eager"
    try:
        made = kind._from_config(config, attn_implementation=attention)
    except ValueError:  # a part of it has no attention
        made = kind(kind.config_class(**_made(transformers, model.config)))
    if getattr(made, "_can_set_experts_implementation", lambda: False)():
        made.set_experts_implementation("batched_mm")  # any width, where grouped products want multiples
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            count = parameter.numel()  # the oracle tells entries apart, so no two of a tensor are alike
            noise = ((torch.randperm(count) * 2 + 1) / count - 1).view_as(parameter)
            if parameter.ndim < 2:  # as made, norms have weights of one and biases of zero, which hides mistakes
                parameter.add_(noise * 0.2)
            elif name.endswith(("layer_scale_parameter", "lambda1")):
                parameter.add_(noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return made.eval(), example_inputs_of(made)


def _made(transformers: Any, item: Any) -> Any:
    """Nested configurations: ``("ResNetConfig", {...})``."""
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and item[0].endswith("Config"):
        return getattr(transformers, item[0])(**_made(transformers, item[1]))
    if isinstance(item, dict):
        return {key: _made(transformers, entry) for key, entry in item.items()}
    return item


_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 42,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "intermediate_size": 52,
    "max_position_embeddings": 32,
}
_VIT = {
    "hidden_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "image_size": 24,
    "patch_size": 6,
    "num_labels": 7,
}

MODELS: dict[str, Model] = {
    # encoders of text
    "bert": Model("BertForSequenceClassification", {**_BERT, "num_labels": 7}),
    "bert_masked": Model("BertForMaskedLM", _BERT),
    "roberta": Model("RobertaForSequenceClassification", {**_BERT, "num_labels": 7}),
    "distilbert": Model(
        "DistilBertForSequenceClassification",
        {
            "vocab_size": VOCABULARY,
            "dim": 40,
            "n_layers": 2,
            "n_heads": 5,
            "hidden_dim": 52,
            "max_position_embeddings": 32,
            "num_labels": 7,
        },
    ),
    "electra": Model("ElectraForSequenceClassification", {**_BERT, "embedding_size": 36, "num_labels": 7}),
    "albert": Model("AlbertForSequenceClassification", {**_BERT, "embedding_size": 36, "num_labels": 7}),
    "deberta_v2": Model(
        "DebertaV2ForSequenceClassification",
        {
            **_BERT,
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pooler_hidden_size": 40,
            "num_labels": 7,
        },
    ),
    "deberta": Model(
        "DebertaForSequenceClassification",
        {
            **_BERT,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "pooler_hidden_size": 40,
            "num_labels": 7,
        },
    ),
    "mpnet": Model("MPNetForSequenceClassification", {**_BERT, "num_labels": 7}),
    "modernbert": Model(
        "ModernBertForSequenceClassification",
        {
            **_BERT,
            "num_labels": 7,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
    ),
    # causal language models
    "gpt2": Model(
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": 40, "n_layer": 2, "n_head": 5, "n_inner": 52, "n_positions": 32},
    ),
    "opt": Model(
        "OPTForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 5,
            "ffn_dim": 52,
            "max_position_embeddings": 32,
            "word_embed_proj_dim": 36,
        },
    ),
    "gpt_neo": Model(
        "GPTNeoForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 40,
            "num_layers": 2,
            "num_heads": 5,
            "intermediate_size": 52,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 5,
            "max_position_embeddings": 32,
        },
    ),
    "gpt_neox": Model(
        "GPTNeoXForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 5,
            "intermediate_size": 52,
            "max_position_embeddings": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "gptj": Model(
        "GPTJForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 40,
            "n_layer": 2,
            "n_head": 5,
            "n_inner": 52,
            "n_positions": 32,
            "rotary_dim": 4,
        },
    ),
    "phi": Model("PhiForCausalLM", {**_BERT, "num_key_value_heads": 5}),
    "phi3": Model("Phi3ForCausalLM", {**_LLAMA, "hidden_size": 48, "pad_token_id": 0}),
    "bloom": Model("BloomForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 40, "n_layer": 2, "n_head": 5}),
    "falcon": Model(
        "FalconForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 5,
            "ffn_hidden_size": 52,
        },
    ),
    "mpt": Model(
        "MptForCausalLM",
        {"vocab_size": VOCABULARY, "d_model": 40, "n_layers": 2, "n_heads": 5, "expansion_ratio": 3, "max_seq_len": 32},
    ),
    "llama": Model("LlamaForCausalLM", _LLAMA),
    "llama_tied": Model(
        "LlamaForCausalLM", {**_LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
    ),
    "mistral": Model("MistralForCausalLM", {**_LLAMA, "sliding_window": 5}),
    "qwen2": Model("Qwen2ForCausalLM", {**_LLAMA, "hidden_size": 48}),
    "qwen3": Model("Qwen3ForCausalLM", _LLAMA),
    "gemma": Model("GemmaForCausalLM", _LLAMA),
    "gemma2": Model("Gemma2ForCausalLM", {**_LLAMA, "sliding_window": 5, "query_pre_attn_scalar": 7}),
    "gemma3": Model("Gemma3ForCausalLM", {**_LLAMA, "sliding_window": 5, "query_pre_attn_scalar": 7}),
    "stablelm": Model("StableLmForCausalLM", {**_LLAMA, "hidden_size": 48}),
    "olmo2": Model("Olmo2ForCausalLM", {**_LLAMA, "hidden_size": 48, "pad_token_id": 0}),
    "cohere": Model("CohereForCausalLM", {**_LLAMA, "hidden_size": 48}),
    "mixtral": Model("MixtralForCausalLM", {**_LLAMA, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2_moe": Model(
        "Qwen2MoeForCausalLM",
        {
            **_LLAMA,
            "hidden_size": 48,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 28,
            "shared_expert_intermediate_size": 44,
        },
    ),
    "qwen3_moe": Model(
        "Qwen3MoeForCausalLM", {**_LLAMA, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 28}
    ),
    "mamba": Model(
        "MambaForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 40,
            "state_size": 6,
            "num_hidden_layers": 2,
            "expand": 2,
            "time_step_rank": 7,
        },
    ),
    "mamba2": Model(
        "Mamba2ForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 40,
            "state_size": 6,
            "num_hidden_layers": 2,
            "num_heads": 10,
            "head_dim": 8,
            "n_groups": 2,
            "expand": 2,
            "chunk_size": 4,
        },
    ),
    # encoder-decoders
    "t5": Model(
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 40,
            "d_kv": 8,
            "d_ff": 52,
            "num_layers": 2,
            "num_heads": 6,
            "relative_attention_num_buckets": 8,
            "decoder_start_token_id": 0,
        },
    ),
    "flan_t5": Model(
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 40,
            "d_kv": 8,
            "d_ff": 52,
            "num_layers": 2,
            "num_heads": 6,
            "relative_attention_num_buckets": 8,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": Model(
        "BartForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 40,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 5,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 52,
            "decoder_ffn_dim": 44,
            "max_position_embeddings": 32,
        },
        share=0.85,
        why="the last hidden state of the encoder is an output, and its width is that of everything",
    ),
    "whisper": Model(
        "WhisperForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "num_mel_bins": 14,
            "d_model": 40,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 5,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 52,
            "decoder_ffn_dim": 44,
            "max_source_positions": 10,
            "max_target_positions": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "begin_suppress_tokens": None,
        },
    ),
    # sound
    "wav2vec2": Model(
        "Wav2Vec2ForCTC",
        {
            "vocab_size": 23,
            "hidden_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 5,
            "intermediate_size": 52,
            "conv_dim": (14, 22, 18),
            "conv_stride": (5, 2, 2),
            "conv_kernel": (10, 3, 2),
            "num_conv_pos_embeddings": 6,
            "num_conv_pos_embedding_groups": 4,
        },
    ),
    "hubert": Model(
        "HubertForCTC",
        {
            "vocab_size": 23,
            "hidden_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 5,
            "intermediate_size": 52,
            "conv_dim": (14, 22, 18),
            "conv_stride": (5, 2, 2),
            "conv_kernel": (10, 3, 2),
            "num_conv_pos_embeddings": 6,
            "num_conv_pos_embedding_groups": 4,
        },
    ),
    "ast": Model(
        "ASTForAudioClassification",
        {
            "hidden_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 5,
            "intermediate_size": 52,
            "patch_size": 4,
            "frequency_stride": 4,
            "time_stride": 4,
            "max_length": 16,
            "num_mel_bins": 12,
            "num_labels": 7,
        },
    ),
    # images
    "vit": Model("ViTForImageClassification", {**_VIT, "intermediate_size": 52}),
    "deit": Model("DeiTForImageClassification", {**_VIT, "intermediate_size": 52}),
    "beit": Model(
        "BeitForImageClassification",
        {**_VIT, "intermediate_size": 52, "use_relative_position_bias": True, "layer_scale_init_value": 0.5},
    ),
    "dinov2": Model("Dinov2ForImageClassification", {**_VIT, "mlp_ratio": 2}),
    "dinov2_swiglu": Model("Dinov2ForImageClassification", {**_VIT, "mlp_ratio": 2, "use_swiglu_ffn": True}),
    "swin": Model(
        "SwinForImageClassification",
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 18,
            "depths": [2, 2],
            "num_heads": [3, 6],
            "window_size": 4,
            "mlp_ratio": 3.0,
            "num_labels": 7,
        },
    ),
    "swinv2": Model(
        "Swinv2ForImageClassification",
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 18,
            "depths": [2, 2],
            "num_heads": [3, 6],
            "window_size": 4,
            "mlp_ratio": 3.0,
            "num_labels": 7,
        },
    ),
    "segformer": Model(
        "SegformerForSemanticSegmentation",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 2],
            "sr_ratios": [2, 1],
            "hidden_sizes": [14, 24],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [2, 3],
            "mlp_ratios": [3, 2],
            "decoder_hidden_size": 34,
            "num_labels": 7,
            "image_size": 32,
        },
    ),
    "convnext": Model(
        "ConvNextForImageClassification",
        {"hidden_sizes": [14, 22, 26, 34], "depths": [1, 1, 2, 1], "image_size": 64, "num_labels": 7},
    ),
    "convnextv2": Model(
        "ConvNextV2ForImageClassification",
        {"hidden_sizes": [14, 22, 26, 34], "depths": [1, 1, 2, 1], "image_size": 64, "num_labels": 7},
    ),
    "resnet": Model(
        "ResNetForImageClassification",
        {"embedding_size": 14, "hidden_sizes": [24, 40], "depths": [1, 2], "image_size": 32, "num_labels": 7},
    ),
    "poolformer": Model(
        "PoolFormerForImageClassification",
        {"hidden_sizes": [14, 22, 26, 34], "depths": [1, 1, 1, 1], "image_size": 64, "num_labels": 7},
    ),
    "mobilevit": Model(
        "MobileViTForImageClassification",
        {
            "hidden_sizes": [18, 20, 24],
            "neck_hidden_sizes": [8, 10, 14, 16, 18, 22, 40],
            "num_attention_heads": 2,
            "image_size": 32,
            "num_labels": 7,
        },
    ),
    "detr": Model(
        "DetrForObjectDetection",
        {
            "d_model": 40,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_attention_heads": 5,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 52,
            "decoder_ffn_dim": 44,
            "num_queries": 9,
            "num_labels": 7,
            "backbone_config": (
                "ResNetConfig",
                {
                    "embedding_size": 14,
                    "hidden_sizes": [24, 32],
                    "depths": [1, 1],
                    "image_size": 32,
                    "out_features": ["stage2"],
                },
            ),
        },
    ),
    "yolos": Model(
        "YolosForObjectDetection",
        {
            "hidden_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 5,
            "intermediate_size": 52,
            "image_size": [24, 36],
            "patch_size": 6,
            "num_detection_tokens": 5,
            "num_labels": 7,
        },
        share=0.75,
        why="the last hidden state is an output",
    ),
    # pairs
    "clip": Model(
        "CLIPModel",
        {
            "projection_dim": 26,
            "text_config": {
                "vocab_size": VOCABULARY,
                "hidden_size": 40,
                "intermediate_size": 52,
                "num_hidden_layers": 2,
                "num_attention_heads": 5,
                "max_position_embeddings": 16,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 0,
            },
            "vision_config": {
                "hidden_size": 36,
                "intermediate_size": 44,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 24,
                "patch_size": 6,
            },
        },
        share=0.75,
        why="the embeddings and last hidden states of both towers are outputs",
    ),
    "siglip": Model(
        "SiglipModel",
        {
            "text_config": {
                "vocab_size": VOCABULARY,
                "hidden_size": 36,
                "intermediate_size": 52,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": 16,
                "projection_size": 36,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 0,
            },
            "vision_config": {
                "hidden_size": 36,
                "intermediate_size": 44,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 24,
                "patch_size": 6,
            },
        },
        share=0.75,
        why="the embeddings and last hidden states of both towers are outputs",
    ),
}
