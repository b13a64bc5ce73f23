"""The learning rate: its peak where none is set, and its course over the steps."""

from opcd.config.fields import TrainConfig

# 1e-4 was the best of three at 135M (docs/results.md); the paper's runs of 50 steps took 1e-6 to
# 5e-6 for 1.7 to 8 billion parameters (arXiv 2602.12275). Between the two a power of the size.
MEASURED_SIZE, MEASURED_RATE = 135e6, 1e-4
EXPONENT = 0.75
LORA = 10.0  # an adapter wants ten times as much: 1e-3 was its best of three at 135M


def usual_rate(parameters: int, adapter: bool) -> float:
    """AdamW's peak rate for a model of so many parameters; 4.7e-6 at 8 billion.

    adapter: whether LoRA is trained in place of every weight.
    """
    rate = MEASURED_RATE * (MEASURED_SIZE / parameters) ** EXPONENT
    return float(f"{rate * (LORA if adapter else 1.0):.1e}")


def rate_factor(step: int, config: TrainConfig) -> float:
    """Share of the peak learning rate in step number `step`, from 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    return max(config.steps - step, 0) / max(config.steps - config.warmup_steps, 1)
