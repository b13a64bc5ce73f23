"""Adapters: put on a model, read onto one, and what one covers, in words."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from transformers import PreTrainedModel

from opcd.errors import InputError
from opcd.models.by_name import ADAPTER_CONFIG
from opcd.models.digest import model_digest
from opcd.models.files import ModelFiles

WEIGHTS = "adapter_model.safetensors"

WORTH_NAMING = 0.01  # of a model's weights
_LAYER = re.compile(r"\.\d+(?=\.)")  # of a weight's name


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


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter alone, without its model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def adapter_settings(folder: Path) -> dict[str, Any]:
    """What adapter_config.json says. Raises InputError where the folder holds no whole adapter."""
    try:
        settings = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder / ADAPTER_CONFIG} must be a JSON file, got {error}; restore it"
        ) from error
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"an adapter must hold {WEIGHTS}, got none in {str(folder)!r}; restore it")
    return dict(settings)


def check_adapter(folder: Path, base: str) -> None:
    """Raise InputError for an adapter of another base: by its name, or by its weights' shapes."""
    settings = adapter_settings(folder)
    of = settings.get("base_model_name_or_path") or ""
    if of and not _same_model(of, base):
        raise InputError(
            f"an adapter must be of the model {base!r}, got one of {of!r} in {str(folder)!r}; name "
            f"its base as model, or, if that is the same under another name, write the name into "
            f"base_model_name_or_path of its {ADAPTER_CONFIG}"
        )
    slots = ModelFiles(base).slots
    kinds = {_LAYER.sub("", name) for name in slots}
    for name, (_, width) in _low_rank_inputs(folder).items():
        own = slots.get(name)
        if own is None and _LAYER.sub("", name) in kinds:
            raise InputError(
                f"every weight of an adapter must have a place in the model {base!r}, got {name} "
                f"in {str(folder)!r} where there is none; name the adapter's own base as model"
            )
        if own is not None and own.shape[-1] != width:
            raise InputError(
                f"an adapter must fit the weights of {base!r}, got {width} inputs of {name} in "
                f"{str(folder)!r} against {own.shape[-1]}; name the adapter's own base as model"
            )


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """A model with an adapter that was saved, frozen; its layers are not merged.

    Raises InputError for one that does not fit, also where some of its weights have no place.
    """
    try:
        adapted: PeftModel = PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"an adapter must fit the model {model.name_or_path!r}, got {str(folder)!r}: "
            f"{' '.join(str(error).split())[:200]}; name the adapter's own base as model"
        ) from error
    with safe_open(folder / WEIGHTS, "pt") as file:
        stored = set(file.keys())
    if stored != (taken := set(get_peft_model_state_dict(adapted))):
        raise InputError(
            f"every weight of an adapter must have a place in the model {model.name_or_path!r}, "
            f"got {len(stored ^ taken)} without one in {str(folder)!r}, such as "
            f"{sorted(stored ^ taken)[0]}; name the adapter's own base as model"
        )
    return adapted.to(model.device).eval().requires_grad_(False)


def _same_model(one: str, other: str) -> bool:
    """Whether two names mean one model: by what is in their folders, else by their last part."""
    if one == other:
        return True
    if Path(one).is_dir() and Path(other).is_dir():
        return model_digest(one) == model_digest(other)
    return Path(one).name == Path(other).name


def _low_rank_inputs(folder: Path) -> dict[str, tuple[int, int]]:
    """(rank, inputs) of LoRA's first matrices, by the name of the weight that each adapts."""
    found = {}
    with safe_open(folder / WEIGHTS, "pt") as file:
        for key in file.keys():  # noqa: SIM118  # it is no mapping
            if key.endswith(".lora_A.weight"):
                name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                rank, inputs = file.get_slice(key).get_shape()
                found[f"{name}.weight"] = rank, inputs
    return found
