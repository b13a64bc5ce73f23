"""LoRA adapters: put on a model, and what one covers, in words."""

from collections import Counter

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

WORTH_NAMING = 0.01  # of a model's weights


def add_lora(model: PreTrainedModel, rank: int, alpha: float) -> PeftModel:
    """The model with an adapter on all linear layers but the head, drawn from torch's generator."""
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted: PeftModel = get_peft_model(model, lora)
    return adapted


def lora_coverage(model: PeftModel) -> str:
    """Which layers are adapted, their share of the weights, and which larger ones are not."""
    covered = {
        id(weight)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        # Experts are no linear layers: there a wrapper adapts one parameter of the module.
        if (weight := getattr(module.get_base_layer(), _parameter_name(module), None)) is not None
    }
    adapted, left = Counter[str](), Counter[str]()
    for name, weight in model.named_parameters():
        if not weight.requires_grad:  # the adapter's own do
            (adapted if id(weight) in covered else left)[_layer(name)] += weight.numel()
    total = adapted.total() + left.total()
    text = f"{', '.join(adapted)}: {adapted.total() / total:.0%} of the weights"
    others = [
        f"{layer} ({n / total:.0%})" for layer, n in left.items() if n >= WORTH_NAMING * total
    ]
    return f"{text}; not on {', '.join(others)}" if others else text


def _parameter_name(module: BaseTunerLayer) -> str:
    return getattr(module, "parameter_name", "weight")


def _layer(name: str) -> str:
    """The part of a parameter's name that tells kinds of layers apart."""
    parts = [p for p in name.split(".") if p not in ("base_layer", "weight", "bias")]
    return parts[-1]
