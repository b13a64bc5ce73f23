"""Without a GPU Triton interprets its kernels; it decides so when it is first imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
