"""Architectures of transformers from configurations of small sizes."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from given import CLASSES, SAMPLES, WORDS, Architecture, Given, images, rises
from torch import nn

from spectrim.fetch import pretrained
from spectrim.losses import TokenLoss

LENGTH = 12  # tokens of a sequence
# Names that most configurations share; one that lacks a name takes it as an attribute that nothing reads.
SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
ROUTED = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}

# Each entry: the model's class, and settings beside SIZES.
DECODERS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": GROUPED,
    "MistralForCausalLM": GROUPED,
    "Qwen2ForCausalLM": GROUPED,
    "Qwen3ForCausalLM": GROUPED,
    "Gemma2ForCausalLM": GROUPED,
    "Phi3ForCausalLM": GROUPED,
    "SmolLM3ForCausalLM": GROUPED,
    "Olmo2ForCausalLM": {},
    "GraniteForCausalLM": {},
    "Starcoder2ForCausalLM": GROUPED,
    "GPT2LMHeadModel": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "GPTNeoXForCausalLM": {},
    "GPTBigCodeForCausalLM": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "OPTForCausalLM": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "BloomForCausalLM": {"n_layer": 2, "n_head": 4},
    "FalconForCausalLM": {},
    "MixtralForCausalLM": {**GROUPED, "num_local_experts": 4},
    "Qwen3MoeForCausalLM": {**GROUPED, **ROUTED},
    "OlmoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2},
    "GptOssForCausalLM": {
        **GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2,
    },
    "DeepseekV3ForCausalLM": {
        **LATENT, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4,
    },
    "MambaForCausalLM": {"state_size": 8},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 4},
    "Lfm2ForCausalLM": {**GROUPED, "layer_types": ["conv", "full_attention"]},
}  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    "BertForSequenceClassification": {},
    "RobertaForSequenceClassification": {},
    "DistilBertForSequenceClassification": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "AlbertForSequenceClassification": {"embedding_size": 16},
    "ElectraForSequenceClassification": {"embedding_size": 16},
    "DebertaV2ForSequenceClassification": {
        "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"], "share_att_key": True,
    },
    "MPNetForSequenceClassification": {},
    "LongformerForSequenceClassification": {"attention_window": 4},
    "ModernBertForSequenceClassification": {"cls_token_id": 1, "sep_token_id": 2},
    "FNetForSequenceClassification": {},
    "LlamaForSequenceClassification": GROUPED,
}  # fmt: skip
OTHER_TASKS: dict[str, dict[str, Any]] = {
    "BertForMaskedLM": {},
    "BertForTokenClassification": {},
    "BertForQuestionAnswering": {},
}
BART = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": 1,
}  # fmt: skip
PAIRED: dict[str, dict[str, Any]] = {
    "T5ForConditionalGeneration": {
        "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0,
    },
    "BartForConditionalGeneration": BART,
    "MarianMTModel": BART,
    "PegasusForConditionalGeneration": BART,
}  # fmt: skip
PATCHED = {"image_size": 32, "patch_size": 8}
STAGES = {
    "embed_dim": 24,
    "depths": [1, 1],
    "num_attention_heads": [2, 4],
    "window_size": 4,
    "image_size": 32,
    "patch_size": 4,
}
PICTURES: dict[str, dict[str, Any]] = {
    "ViTForImageClassification": PATCHED,
    "DeiTForImageClassification": PATCHED,
    "BeitForImageClassification": PATCHED,
    "Dinov2ForImageClassification": PATCHED,
    "SwinForImageClassification": STAGES,
    "Swinv2ForImageClassification": STAGES,
    "ConvNextForImageClassification": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
    "ConvNextV2ForImageClassification": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
    "ResNetForImageClassification": {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1]},
    "MobileViTForImageClassification": {
        "image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64],
        "initializer_range": 0.3,  # with the usual one nothing arrives at the last layers
    },
    "SegformerForImageClassification": {
        "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
        "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
    },
    "PvtV2ForImageClassification": {
        "image_size": 64, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2],
    },
}  # fmt: skip


def architectures() -> list[Architecture]:
    """Return one row for each class."""
    makers: list[tuple[Callable[..., Given], Mapping[str, Any]]] = [
        (_decoder, DECODERS),
        (_encoder, ENCODERS),
        (_labelled, OTHER_TASKS),
        (_pair, PAIRED),
        (_picture, PICTURES),
    ]
    rows = [_row(name, partial(make, name), make is _picture) for make, names in makers for name in names]
    others = (_bert_pooled, _clip, _whisper, _wav2vec2, _yolos, _patchtst, _vilt)
    return rows + [_row(OTHERS[make.__name__], make) for make in others]


OTHERS = {
    "_bert_pooled": "BertModel",
    "_clip": "CLIPModel",
    "_whisper": "WhisperForConditionalGeneration",
    "_wav2vec2": "Wav2Vec2ForSequenceClassification",
    "_yolos": "YolosForObjectDetection",
    "_patchtst": "PatchTSTForPrediction",
    "_vilt": "ViltModel",
}


def _row(name: str, make: Callable[[], Given], onnx: bool = False) -> Architecture:
    return Architecture("transformers", name, make, onnx)


def _made(name: str, settings: Mapping[str, Any]) -> nn.Module:
    """Return the model of the class ``name`` with random weights, in eval mode."""
    library = pretrained.library()
    library.utils.logging.set_verbosity_error()  # it warns of token ids and kernels that small models lack
    kind = getattr(library, name)
    config = kind.config_class(**{**SIZES, **settings})
    config.use_cache = False
    return kind(config).eval()


def _ids(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(5, WORDS, (SAMPLES, length))


def _classes(*shape: int) -> torch.Tensor:
    return torch.randint(0, CLASSES, (SAMPLES, *shape))


def _decoder(name: str) -> Given:
    batches = [{"input_ids": ids, "labels": ids} for ids in (_ids(), _ids())]
    return Given(_made(name, DECODERS[name]), batches)


def _encoder(name: str) -> Given:
    model = _made(name, {**ENCODERS[name], "num_labels": CLASSES})
    return Given(model, [{"input_ids": _ids(), "labels": _classes()} for _ in range(2)])


def _labelled(name: str) -> Given:
    tokens: dict[str, Callable[[], dict[str, Any]]] = {
        "BertForMaskedLM": lambda: {"labels": _ids()},
        "BertForTokenClassification": lambda: {"labels": _classes(LENGTH)},
        "BertForQuestionAnswering": lambda: {"start_positions": _classes(), "end_positions": _classes()},
    }
    model = _made(name, {**OTHER_TASKS[name], "num_labels": 2 if "Question" in name else CLASSES})
    return Given(model, [{"input_ids": _ids(), **tokens[name]()} for _ in range(2)])


def _pair(name: str) -> Given:
    batches = [({"input_ids": _ids(), "decoder_input_ids": _ids(6)}, _ids(6)) for _ in range(2)]
    return Given(_made(name, PAIRED[name]), batches, TokenLoss(ahead=0))


def _picture(name: str) -> Given:
    model = _made(name, {**PICTURES[name], "num_labels": CLASSES})
    size = getattr(model.config, "image_size", 32)
    return images(model, size if isinstance(size, int) else 32)


def _bert_pooled() -> Given:
    """Return an encoder whose mean is read and whose pooler is outside of the loss."""
    return Given(
        _made("BertModel", {}),
        [({"input_ids": _ids()}, torch.zeros(SAMPLES)) for _ in range(2)],
        lambda outputs, _: outputs.last_hidden_state.mean(1).square().mean(),
    )


def _clip() -> Given:
    part = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {**part, "vocab_size": WORDS, "max_position_embeddings": 16, "eos_token_id": 2}
    settings = {"text_config": text, "vision_config": {**part, **PATCHED}, "projection_dim": 16}
    batches = [
        ({"input_ids": _ids(), "pixel_values": torch.randn(SAMPLES, 3, 32, 32)}, torch.zeros(SAMPLES)) for _ in range(2)
    ]
    return Given(_made("CLIPModel", settings), batches, lambda o, _: -(o.text_embeds * o.image_embeds).sum(1).mean())


def _whisper() -> Given:
    sounds = {"num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 24}
    sound = (SAMPLES, 16, 40)
    batches = [({"input_features": torch.randn(*sound), "decoder_input_ids": _ids(6)}, _ids(6)) for _ in range(2)]
    return Given(_made("WhisperForConditionalGeneration", {**BART, **sounds}), batches, TokenLoss(ahead=0))


def _wav2vec2() -> Given:
    sizes = {"conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 3), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "num_labels": CLASSES}
    model = _made("Wav2Vec2ForSequenceClassification", {**sizes, **positions, "classifier_proj_size": 16})
    return Given(model, [{"input_values": torch.randn(SAMPLES, 400), "labels": _classes()} for _ in range(2)])


def _yolos() -> Given:
    model = _made("YolosForObjectDetection", {**PATCHED, "image_size": [32, 32], "num_detection_tokens": 5})
    return Given(model, [(torch.randn(SAMPLES, 3, 32, 32), torch.zeros(SAMPLES)) for _ in range(2)], rises)


def _patchtst() -> Given:
    series = {"num_input_channels": 2, "context_length": 32, "patch_length": 8, "patch_stride": 8}
    settings = {**series, "prediction_length": 4, "d_model": 32, "ffn_dim": 64}
    batches = [({"past_values": torch.randn(SAMPLES, 32, 2)}, torch.randn(SAMPLES, 4, 2)) for _ in range(2)]
    return Given(_made("PatchTSTForPrediction", settings), batches, _distance)


def _distance(outputs: Any, targets: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(outputs.prediction_outputs, targets)


def _vilt() -> Given:
    batches = [
        ({"input_ids": _ids(), "pixel_values": torch.randn(SAMPLES, 3, 32, 32)}, torch.zeros(SAMPLES)) for _ in range(2)
    ]
    return Given(_made("ViltModel", PATCHED), batches, rises)
