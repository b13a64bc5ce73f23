"""Tiny models in the files that publishers ship: configurations in the layout of transformers 4."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import CHATML, tiny_tokenizer

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0",
}
QWEN3_MOE = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
GEMMA3 = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "boi_token_index": 250,
    "eoi_token_index": 251,
    "image_token_index": 252,
    "mm_tokens_per_image": 4,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": [1],
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0",
    "text_config": {
        "model_type": "gemma3_text",
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "sliding_window": 16,
        "initializer_range": 0.2,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 8,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "vision_use_head": False,
    },
}


def _rope(**scaling: Any) -> dict[str, Any]:
    return LLAMA | {"rope_scaling": scaling}


CONFIGS: dict[str, dict[str, Any]] = {
    "llama-default": LLAMA,
    "llama-tied": LLAMA | {"tie_word_embeddings": True},
    "llama-fp16": LLAMA | {"torch_dtype": "float16"},
    "llama-sharded": LLAMA | {"torch_dtype": "float32"},
    "llama-bin": LLAMA,
    "llama-linear": _rope(type="linear", factor=2.0),
    "llama-dynamic": _rope(type="dynamic", factor=4.0),
    "llama-llama3": _rope(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=128,
    ),
    "llama-yarn": _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=128),
    "phi3-longrope": LLAMA
    | {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "original_max_position_embeddings": 256,
        "sliding_window": 512,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
        },
    },
    "qwen3-moe": QWEN3_MOE,
    "gemma3-multimodal": GEMMA3,
}


def publish(name: str, folder: Path) -> Path:
    """A base of that name in a folder of its own, with what a tokenizer and a processor bring."""
    config = CONFIGS[name]
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    torch.manual_seed(0)
    dtype = getattr(torch, config["torch_dtype"])
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    if name == "llama-bin":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        size = "40KB" if name == "llama-sharded" else "5GB"
        model.save_pretrained(folder / "saved", max_shard_size=size)
        for file in (folder / "saved").glob("model*"):
            file.rename(folder / file.name)
        shutil.rmtree(folder / "saved")
    write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
    if name == "gemma3-multimodal":
        _name_as_published(folder / "model.safetensors")
    tiny_tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    write_json(folder / "special_tokens_map.json", special)
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHATML} | special
    write_json(folder / "tokenizer_config.json", tokenizer)
    write_json(folder / "preprocessor_config.json", {"size": {"height": 16, "width": 16}})
    (folder / "tokenizer.model").write_bytes(b"\x0a\x05not a real one")
    (folder / "LICENSE").write_text("do as you like\r\n")
    return folder


def _name_as_published(file: Path) -> None:
    """Gemma 3's vision tower under the names that transformers 4 gave it."""
    inner = "vision_tower.vision_model."
    renamed = {k.replace("vision_tower.", inner): t for k, t in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})


def write_json(file: Path, value: Any) -> None:
    """As a publisher's file: its own indentation, no newline at the end."""
    file.write_text(json.dumps(value, indent=4))
