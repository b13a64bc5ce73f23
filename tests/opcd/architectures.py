"""Tiny random models of many kinds, for what must hold on every architecture."""

import torch
import transformers
from transformers import PreTrainedModel

from opcd.models.lm import keep_softcap

COMMON = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}

# name: (config class, model class, settings)
ARCHITECTURES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "mistral-sliding": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 9}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}),
    "gemma2-softcap": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {"sliding_window": 9, "final_logit_softcapping": 5.0},
    ),
    "gemma3-interleaved": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt-oss-sinks": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "phimoe-window-in-mask": (
        "PhimoeConfig",
        "PhimoeForCausalLM",
        {"sliding_window": 64, "num_local_experts": 2, "num_experts_per_tok": 2},
    ),
    "deepseek-v3-latent": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 2,
        },
    ),
    "granite-scaled": (
        "GraniteConfig",
        "GraniteForCausalLM",
        {"logits_scaling": 4.0, "residual_multiplier": 0.5},
    ),
    "cohere-scaled": ("CohereConfig", "CohereForCausalLM", {"logit_scale": 0.25}),
    "mpt-alibi": (
        "MptConfig",
        "MptForCausalLM",
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512},
    ),
    "qwen3-next-hybrid": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "mlp_only_layers": [0, 1],
        },
    ),
    "bamba-hybrid": (
        "BambaConfig",
        "BambaForCausalLM",
        {
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
        },
    ),
    "mamba": ("MambaConfig", "MambaForCausalLM", {"state_size": 8}),
}


def build(name: str) -> PreTrainedModel:
    """A random model of that architecture, fp32, in evaluation mode."""
    config, model, settings = ARCHITECTURES[name]
    torch.manual_seed(0)
    built = getattr(transformers, model)(getattr(transformers, config)(**COMMON | settings)).eval()
    keep_softcap(built)
    return built
