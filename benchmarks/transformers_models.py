"""transformers, from small configurations: two or so layers of each architecture, with random weights.

The sizes are as small as the architecture allows, and differ from one another, so that no axis passes for another. What the norms are and
where they stand is the architecture's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import transformers as library
from torch import Tensor, nn

from benchmarks.libraries import BATCH, Case

transformers: Any = library
VOCABULARY, LENGTH = 97, 11
Arguments = dict[str, Tensor]


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, length))


def text() -> Arguments:
    """Two sentences, the second three tokens shorter."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, -3:] = 0
    return {"input_ids": tokens(), "attention_mask": mask}


def causal() -> Arguments:
    return {"input_ids": tokens()}


def both() -> Arguments:
    return {**text(), "decoder_input_ids": tokens(7)}


def images(size: int, channels: int = 3) -> Callable[[], Arguments]:
    return lambda: {"pixel_values": torch.randn(BATCH, channels, size, size)}


def masked_images(size: int) -> Callable[[], Arguments]:
    return lambda: {"pixel_values": torch.randn(BATCH, 3, size, size), "pixel_mask": torch.ones(BATCH, size, size, dtype=torch.long)}


def video(size: int, frames: int) -> Callable[[], Arguments]:
    return lambda: {"pixel_values": torch.randn(BATCH, frames, 3, size, size)}


def sound(length: int) -> Callable[[], Arguments]:
    return lambda: {"input_values": torch.randn(BATCH, length)}


def spectrogram(length: int, bands: int) -> Callable[[], Arguments]:
    return lambda: {"input_features": torch.randn(BATCH, bands, length), "decoder_input_ids": tokens(7)}


def pair(size: int) -> Callable[[], Arguments]:
    return lambda: {**text(), "pixel_values": torch.randn(BATCH, 3, size, size)}


class Architecture(NamedTuple):
    name: str
    inputs: Callable[[], Arguments]
    options: Mapping[str, Any] = {}
    config: str | None = None  # the configuration's class, where it is not <name>Config
    model: str | None = None  # the model's class, where it is not <name>Model


# The names that most configurations give to their sizes.
ENCODER = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
DECODER = {**ENCODER, "num_key_value_heads": 2, "head_dim": 12, "use_cache": False, "max_position_embeddings": 64, "pad_token_id": 0}
NO_CACHE = {"use_cache": False, "pad_token_id": 0}
VISION = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80, "image_size": 32, "patch_size": 8}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 72,
    **NO_CACHE,
}
T5 = {"vocab_size": VOCABULARY, "d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, **NO_CACHE}
WAV = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "conv_dim": (16, 24),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
STAGES = {"hidden_sizes": [16, 24, 40, 56], "depths": [1, 1, 1, 1]}
RESNET = {"embedding_size": 12, **STAGES}
DETECTOR = {
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 72,
    "num_queries": 9,
}


def backbone() -> Any:
    """For a detector, which freezes its BatchNorms."""
    return transformers.ResNetConfig(**RESNET, out_features=["stage4"])


def stages() -> Any:
    return transformers.ResNetConfig(**RESNET, out_features=["stage2", "stage3", "stage4"])


TOWER = ENCODER

ARCHITECTURES: tuple[Architecture, ...] = (
    # encoders of text
    Architecture("Albert", text, {**ENCODER, "embedding_size": 20}),
    Architecture("Bert", text, ENCODER),
    Architecture("BigBird", text, {**ENCODER, "attention_type": "original_full"}),
    Architecture(
        "Canine", text, {k: v for k, v in ENCODER.items() if k != "vocab_size"} | {"local_transformer_stride": 4, "downsampling_rate": 2}
    ),
    Architecture("ConvBert", text, {**ENCODER, "embedding_size": 20}),
    Architecture("Deberta", text, {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    Architecture("DebertaV2", text, {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "conv_kernel_size": 3}),
    Architecture("DistilBert", text, {"vocab_size": VOCABULARY, "dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 80}),
    Architecture("Electra", text, {**ENCODER, "embedding_size": 20}),
    Architecture("Esm", text, {**ENCODER, "pad_token_id": 0, "mask_token_id": 1, "position_embedding_type": "rotary"}),
    Architecture("EuroBert", text, {**ENCODER, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    Architecture("FNet", lambda: {"input_ids": tokens()}, {**ENCODER, "pad_token_id": 0}),
    Architecture(
        "Funnel",
        text,
        {"vocab_size": VOCABULARY, "d_model": 48, "n_head": 4, "d_head": 12, "d_inner": 80, "block_sizes": [1, 1], "num_decoder_layers": 1},
    ),
    Architecture("IBert", text, ENCODER),
    Architecture("LayoutLM", text, ENCODER),
    Architecture("Longformer", text, {**ENCODER, "attention_window": 4}),
    Architecture("MobileBert", text, {**ENCODER, "embedding_size": 20, "intra_bottleneck_size": 24, "normalization_type": "no_norm"}),
    Architecture(
        "ModernBert", text, {**ENCODER, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    ),
    Architecture("MPNet", text, ENCODER),
    Architecture("Nystromformer", text, {**ENCODER, "num_landmarks": 11, "segment_means_seq_len": 11}),
    Architecture(
        "Perceiver",
        lambda: {"inputs": torch.randn(BATCH, 13, 30)},
        {
            "num_latents": 7,
            "d_latents": 48,
            "d_model": 30,
            "num_blocks": 1,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 2,
        },
    ),
    Architecture("Roberta", text, ENCODER),
    Architecture("RoFormer", text, ENCODER),
    Architecture(
        "SqueezeBert",
        text,
        {
            **ENCODER,
            "embedding_size": 48,
            "q_groups": 2,
            "k_groups": 2,
            "v_groups": 2,
            "post_attention_groups": 1,
            "intermediate_groups": 2,
            "output_groups": 2,
        },
    ),
    Architecture("XLNet", text, {"vocab_size": VOCABULARY, "d_model": 48, "n_layer": 2, "n_head": 4, "d_inner": 80}),
    # decoders of text
    Architecture("Bloom", causal, {"vocab_size": VOCABULARY, "hidden_size": 48, "n_layer": 2, "n_head": 4, "use_cache": False}),
    Architecture(
        "Codegen",
        causal,
        {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "use_cache": False},
        "CodeGenConfig",
        "CodeGenModel",
    ),
    Architecture("Cohere", causal, {**DECODER, "use_qk_norm": True}),
    Architecture("Cohere2", causal, DECODER),
    Architecture("CTRL", causal, {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "dff": 80, "use_cache": False}),
    Architecture(
        "DeepseekV3",
        causal,
        {
            **{k: v for k, v in DECODER.items() if k != "head_dim"},
            "num_key_value_heads": 4,
            "q_lora_rank": 20,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 12,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
        },
    ),
    Architecture(
        "Falcon",
        causal,
        {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "use_cache": False},
    ),
    Architecture(
        "FalconMamba",
        causal,
        {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 6, "time_step_rank": 5, "use_cache": False},
    ),
    Architecture("Gemma", causal, DECODER),
    Architecture("Gemma2", causal, DECODER),
    Architecture("Gemma3", causal, DECODER, "Gemma3TextConfig", "Gemma3TextModel"),
    Architecture(
        "Gemma3n",
        causal,
        {
            **DECODER,
            "intermediate_size": [80, 80],
            "hidden_size_per_layer_input": 20,
            "vocab_size_per_layer_input": VOCABULARY,
            "laurel_rank": 6,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
            "activation_sparsity_pattern": [0.0, 0.0],
        },
        "Gemma3nTextConfig",
        "Gemma3nTextModel",
    ),
    Architecture("GLM4", causal, DECODER, "Glm4Config", "Glm4Model"),
    Architecture("GPT2", causal, {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "use_cache": False}),
    Architecture("GPTBigCode", causal, {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "use_cache": False}),
    Architecture("GPTJ", causal, {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "use_cache": False}),
    Architecture(
        "GPTNeo",
        causal,
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 48,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "use_cache": False,
        },
    ),
    Architecture("GPTNeoX", causal, {**ENCODER, "use_cache": False}),
    Architecture("GptOss", causal, {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Architecture("Granite", causal, DECODER),
    Architecture(
        "Jamba",
        causal,
        {
            **{k: v for k, v in DECODER.items() if k != "head_dim"},
            "mamba_d_state": 6,
            "mamba_dt_rank": 5,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "use_mamba_kernels": False,
        },
    ),
    Architecture("Lfm2", causal, {**DECODER, "layer_types": ["conv", "full_attention"]}),
    Architecture("Llama", causal, DECODER),
    Architecture(
        "Mamba",
        causal,
        {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 6, "time_step_rank": 5, "use_cache": False},
    ),
    Architecture(
        "Mamba2",
        causal,
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "state_size": 6,
            "num_heads": 8,
            "head_dim": 12,
            "n_groups": 2,
            "chunk_size": 4,
            "use_cache": False,
        },
    ),
    Architecture("Mistral", causal, DECODER),
    Architecture("Mixtral", causal, {**DECODER, "num_local_experts": 4}),
    Architecture("Mpt", causal, {"vocab_size": VOCABULARY, "d_model": 48, "n_layers": 2, "n_heads": 4, "use_cache": False}),
    Architecture("NanoChat", causal, DECODER),
    Architecture("Nemotron", causal, DECODER),
    Architecture("OLMo", causal, DECODER, "OlmoConfig", "OlmoModel"),
    Architecture("OLMo2", causal, DECODER, "Olmo2Config", "Olmo2Model"),
    Architecture(
        "OPT",
        causal,
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 48,
            "ffn_dim": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 48,
            **NO_CACHE,
        },
    ),
    Architecture("Persimmon", causal, {**{k: v for k, v in DECODER.items() if k != "num_key_value_heads"}, "qk_layernorm": True}),
    Architecture("Phi", causal, {**DECODER, "qk_layernorm": True}),
    Architecture("Phi3", causal, DECODER),
    Architecture("Qwen2", causal, DECODER),
    Architecture(
        "Qwen2Moe",
        causal,
        {**DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 32},
    ),
    Architecture("Qwen3", causal, DECODER),
    Architecture(
        "Qwen3Next",
        causal,
        {
            **DECODER,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 32,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 12,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    Architecture(
        "RecurrentGemma", causal, {**{k: v for k, v in DECODER.items() if k != "head_dim"}, "lru_width": 40, "attention_window_size": 8}
    ),
    Architecture(
        "Rwkv",
        causal,
        {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "attention_hidden_size": 48, "use_cache": False},
    ),
    Architecture("SmolLM3", causal, DECODER),
    Architecture(
        "StableLm",
        causal,
        {**DECODER, "qk_layernorm": True, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    Architecture("Starcoder2", causal, DECODER),
    Architecture(
        "XGLM", causal, {"vocab_size": VOCABULARY, "d_model": 48, "ffn_dim": 80, "num_layers": 2, "attention_heads": 4, **NO_CACHE}
    ),
    Architecture(
        "xLSTM",
        causal,
        {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "num_heads": 4, "use_cache": False, "chunk_size": 16},
    ),
    Architecture(
        "Zamba2",
        causal,
        {
            **{k: v for k, v in DECODER.items() if k != "head_dim"},
            "mamba_d_state": 6,
            "mamba_headdim": 12,
            "n_mamba_heads": 8,
            "mamba_ngroups": 1,
            "chunk_size": 4,
            "layers_block_type": ["mamba", "hybrid"],
            "num_mem_blocks": 1,
            "adapter_rank": 6,
        },
    ),
    # encoders and decoders of text
    Architecture("Bart", both, BART),
    Architecture("BlenderbotSmall", both, BART),
    Architecture("LED", both, {**BART, "attention_window": 4}),
    Architecture("M2M100", both, BART),
    Architecture("Marian", both, {**BART, "decoder_start_token_id": 0}),
    Architecture("MBart", both, BART),
    Architecture("MT5", both, T5),
    Architecture("Pegasus", both, BART),
    Architecture(
        "ProphetNet",
        both,
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 48,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
            "encoder_ffn_dim": 80,
            "decoder_ffn_dim": 72,
            **NO_CACHE,
        },
    ),
    Architecture("SwitchTransformers", both, {**T5, "num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}),
    Architecture("T5", both, T5),
    Architecture("UMT5", both, T5),
    # images
    Architecture("Beit", images(32), VISION),
    Architecture("Bit", images(64), {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "num_groups": 4}),
    Architecture("Convnext", images(64), STAGES, "ConvNextConfig", "ConvNextModel"),
    Architecture("ConvnextV2", images(64), STAGES, "ConvNextV2Config", "ConvNextV2Model"),
    Architecture("Cvt", images(64), {"embed_dim": [12, 24, 36], "num_heads": [1, 2, 3], "depth": [1, 2, 3]}),
    Architecture("Data2VecVision", images(32), VISION),
    Architecture("Deit", images(32), VISION, "DeiTConfig", "DeiTModel"),
    Architecture("Dinov2", images(32), VISION),
    Architecture("DINOv3ViT", images(32), VISION),
    Architecture("DINOv3ConvNext", images(64), STAGES),
    Architecture(
        "DPT",
        images(32),
        {
            **VISION,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 12, 16, 20],
            "fusion_hidden_size": 16,
            "use_batch_norm_in_fusion_residual": True,
        },
        model="DPTForSemanticSegmentation",
    ),
    Architecture("EfficientNet", images(64), {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320}),
    Architecture(
        "FocalNet",
        images(32),
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 24,
            "depths": [2, 2],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
            "use_conv_embed": True,
            "use_layerscale": True,
        },
    ),
    Architecture(
        "GLPN",
        images(64),
        {"hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 8], "decoder_hidden_size": 16},
    ),
    Architecture(
        "HGNetV2",
        images(64),
        {
            "stem_channels": [3, 8, 12],
            "stage_in_channels": [12, 16, 24, 32],
            "stage_mid_channels": [8, 12, 16, 20],
            "stage_out_channels": [16, 24, 32, 40],
            "stage_num_blocks": [1, 1, 1, 1],
            "stage_numb_of_layers": [2, 2, 2, 2],
            "embedding_size": 12,
            "hidden_sizes": [16, 24, 32, 40],
            "depths": [1, 1, 1, 1],
        },
        "HGNetV2Config",
        "HGNetV2ForImageClassification",
    ),
    Architecture("Hiera", images(64), {"image_size": [64, 64], "embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]}),
    Architecture(
        "ImageGPT",
        lambda: {"input_ids": torch.randint(0, 63, (BATCH, LENGTH))},
        {"vocab_size": 64, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 4, "use_cache": False},
    ),
    Architecture(
        "Levit",
        images(64),
        {"image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1], "key_dim": [8, 8, 8]},
    ),
    Architecture("MobileNetV1", images(64), {"depth_multiplier": 0.25}),
    Architecture("MobileNetV2", images(64), {"depth_multiplier": 0.35}),
    Architecture(
        "MobileViT",
        images(64),
        {"image_size": 64, "hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 12, 16, 20, 24, 28, 32], "num_attention_heads": 2},
    ),
    Architecture("MobileViTV2", images(64), {"image_size": 64, "width_multiplier": 0.25}),
    Architecture("PoolFormer", images(64), {"hidden_sizes": [16, 24, 40, 56], "depths": [1, 1, 1, 1]}),
    Architecture(
        "Pvt", images(64), {"image_size": 64, "hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 8]}
    ),
    Architecture("RegNet", images(64), {"embedding_size": 12, **STAGES, "groups_width": 8}),
    Architecture("ResNet", images(64), RESNET),
    Architecture(
        "Segformer",
        images(64),
        {"hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 8], "decoder_hidden_size": 20},
        model="SegformerForSemanticSegmentation",
    ),
    Architecture("Siglip", images(32), VISION, "SiglipVisionConfig", "SiglipVisionModel"),
    Architecture("SwiftFormer", images(64), {"image_size": 64, "embed_dims": [16, 24, 40, 56], "depths": [1, 1, 2, 1]}),
    Architecture("Swin", images(32), SWIN),
    Architecture("Swin2SR", images(32), {"image_size": 32, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}),
    Architecture("Swinv2", images(32), SWIN),
    Architecture("VideoMAE", video(32, 4), {**VISION, "num_frames": 4}),
    Architecture("ViT", images(32), VISION),
    Architecture("ViTMSN", images(32), VISION),
    Architecture("Vivit", video(32, 4), {**VISION, "num_frames": 4, "tubelet_size": [2, 8, 8]}),
    Architecture("Yolos", images(32), {**VISION, "image_size": [32, 32], "num_detection_tokens": 9}),
    # detection and segmentation
    Architecture("ConditionalDetr", masked_images(64), {**DETECTOR, "backbone_config": backbone}),
    Architecture("DeformableDetr", masked_images(64), {**DETECTOR, "d_model": 64, "backbone_config": stages, "num_feature_levels": 3}),
    Architecture("Detr", masked_images(64), {**DETECTOR, "backbone_config": backbone}),
    Architecture(
        "RTDetr",
        images(64),
        {
            "d_model": 48,
            "encoder_hidden_dim": 48,
            "encoder_ffn_dim": 80,
            "decoder_ffn_dim": 72,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "decoder_layers": 2,
            "num_queries": 9,
            "num_denoising": 0,
            "decoder_in_channels": [48, 48, 48],
            "encoder_in_channels": [24, 40, 56],
            "backbone_config": lambda: transformers.RTDetrResNetConfig(**RESNET, out_features=["stage2", "stage3", "stage4"]),
        },
    ),
    Architecture("TableTransformer", masked_images(64), {**DETECTOR, "backbone_config": backbone}),
    Architecture(
        "UperNet",
        images(64),
        {
            "hidden_size": 24,
            "pool_scales": [1, 2],
            "auxiliary_in_channels": 40,
            "backbone_config": lambda: transformers.ConvNextConfig(**STAGES, out_features=["stage1", "stage2", "stage3", "stage4"]),
        },
        "UperNetConfig",
        "UperNetForSemanticSegmentation",
    ),
    # sound
    Architecture(
        "ASTransformer",
        lambda: {"input_values": torch.randn(BATCH, 40, 32)},
        {
            **{k: v for k, v in VISION.items() if k not in ("image_size", "patch_size")},
            "max_length": 40,
            "num_mel_bins": 32,
            "patch_size": 16,
            "frequency_stride": 8,
            "time_stride": 8,
        },
        "ASTConfig",
        "ASTModel",
    ),
    Architecture(
        "Encodec",
        lambda: {"input_values": torch.randn(BATCH, 1, 640)},
        {
            "num_filters": 4,
            "hidden_size": 16,
            "codebook_size": 32,
            "codebook_dim": 16,
            "upsampling_ratios": [4, 2],
            "norm_type": "time_group_norm",
            "use_causal_conv": False,
        },
    ),
    Architecture("Hubert", sound(800), WAV),
    Architecture("SEW", sound(800), {**WAV, "squeeze_factor": 2}),
    Architecture(
        "SpeechT5",
        lambda: {**text(), "decoder_input_values": torch.randn(BATCH, 7, 20)},
        {
            **WAV,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 80,
            "decoder_ffn_dim": 72,
            "num_mel_bins": 20,
            "speech_decoder_prenet_units": 24,
            "speech_decoder_postnet_units": 28,
            "speaker_embedding_dim": 0,
            "use_cache": False,
            "reduction_factor": 1,
            "positional_dropout": 0.0,
            "speech_decoder_prenet_dropout": 0.0,
        },
        "SpeechT5Config",
        "SpeechT5ForTextToSpeech",
    ),
    Architecture("Wav2Vec2", sound(800), WAV),
    Architecture(
        "Wav2Vec2 with layer norms",
        sound(800),
        {**WAV, "feat_extract_norm": "layer", "do_stable_layer_norm": True},
        "Wav2Vec2Config",
        "Wav2Vec2Model",
    ),
    Architecture(
        "Wav2Vec2Bert",
        lambda: {"input_features": torch.randn(BATCH, 23, 20)},
        {**ENCODER, "feature_projection_input_dim": 20, "conv_depthwise_kernel_size": 5},
    ),
    Architecture("Wav2Vec2Conformer", sound(800), {**WAV, "conv_depthwise_kernel_size": 5}),
    Architecture("WavLM", sound(800), WAV),
    Architecture(
        "Whisper",
        spectrogram(40, 20),
        {
            **BART,
            "num_mel_bins": 20,
            "max_source_positions": 20,
            "max_target_positions": 30,
            "decoder_start_token_id": 1,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
    # text and images
    Architecture(
        "Blip",
        pair(32),
        {
            "text_config": {**TOWER, "encoder_hidden_size": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sep_token_id": 2},
            "vision_config": VISION,
            "projection_dim": 20,
        },
        model="BlipForImageTextRetrieval",
    ),
    Architecture("ChineseCLIP", pair(32), {"text_config": TOWER, "vision_config": VISION, "projection_dim": 20}),
    Architecture(
        "CLIP",
        pair(32),
        {"text_config": {**TOWER, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, "vision_config": VISION, "projection_dim": 20},
    ),
    Architecture(
        "GroupViT",
        pair(32),
        {
            "text_config": {**TOWER, "eos_token_id": 2},
            "vision_config": {
                **VISION,
                "depths": [1, 1, 1],
                "num_group_tokens": [8, 4, 0],
                "num_output_groups": [8, 4, 0],
                "patch_size": 4,
            },
            "projection_dim": 20,
            "projection_intermediate_dim": 28,
        },
    ),
    Architecture("OwlViT", pair(32), {"text_config": TOWER, "vision_config": VISION, "projection_dim": 20}),
    Architecture(
        "ViLT",
        lambda: {**text(), "pixel_values": torch.randn(BATCH, 3, 32, 32)},
        {**ENCODER, "image_size": 32, "patch_size": 8},
        "ViltConfig",
        "ViltModel",
    ),
    # series
    Architecture(
        "PatchTST",
        lambda: {"past_values": torch.randn(BATCH, 24, 3)},
        {
            "num_input_channels": 3,
            "context_length": 24,
            "patch_length": 6,
            "patch_stride": 6,
            "d_model": 48,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "ffn_dim": 80,
            "norm_type": "batchnorm",
        },
    ),
    Architecture(
        "PatchTSMixer",
        lambda: {"past_values": torch.randn(BATCH, 24, 3)},
        {
            "num_input_channels": 3,
            "context_length": 24,
            "patch_length": 6,
            "patch_stride": 6,
            "d_model": 20,
            "num_layers": 2,
            "norm_mlp": "batchnorm",
        },
    ),
)


def cases() -> list[Case]:
    return [Case(a.name, a.model or f"{a.name}Model", functools.partial(build, a)) for a in ARCHITECTURES]


def build(architecture: Architecture) -> tuple[nn.Module, Any]:
    options = {k: v() if callable(v) else v for k, v in architecture.options.items()}
    config = getattr(transformers, architecture.config or f"{architecture.name}Config")(**options)
    model = getattr(transformers, architecture.model or f"{architecture.name}Model")(config)
    return model, architecture.inputs()
