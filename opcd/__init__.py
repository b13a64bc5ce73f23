"""On-policy context distillation: move a long context into a model's weights, and prove it."""

__version__ = "0.1.0"
