"""Settings for the usual cases; what a file or a command line says goes before them."""

from collections.abc import Mapping
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # A model below a billion parameters, all weights, on a CPU or a small GPU.
    "laptop": {
        "max_completion_tokens": 64,
        "divergence_prompts": 48,
    },
    # A model of a few billion parameters, all weights, on one GPU of 80 GB. Not measured.
    "one-gpu": {
        "prompts_per_step": 64,
        "gradient_checkpointing": True,
        "max_tokens_per_pass": 16_384,
        "rollout_batch_size": 64,
    },
    # An adapter: a model that is too large to train whole.
    "lora": {
        "lora_rank": 16,
    },
}
