"""Causal language models.

lm            body, modes and limits of any causal LM of transformers
head          its output head, measured
sdpa          which of torch's attentions its passes take
adapter       LoRA: put on a model, and what it covers, in words
cast_weights  fp32 weights in the dtype of the passes, cast once a step
by_name       models and tokenizers by name or folder
files         a model's own files, and where each tensor lies in them
digest        what tells models apart, wherever their files lie
hub           whether a hub has a model
builtin       SmolLM2-135M-Instruct from the package index
"""
