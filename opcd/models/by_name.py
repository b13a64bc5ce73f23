"""Models and tokenizers from a name: a Hugging Face name, a local folder or the built-in one."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from opcd.errors import InputError
from opcd.models import builtin

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def resolve_device(name: str) -> torch.device:
    """The torch device that the configuration names. Raises InputError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not name.startswith(("cpu", "cuda")):
        raise InputError(f"device must be auto, cpu or cuda, got {name!r}; pass one of them")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device must be one of this machine's, got {name!r}: {str(error).splitlines()[0]}; "
            f"pass auto or cpu"
        ) from error
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 or float32; `auto` takes bfloat16 where the hardware multiplies it natively."""
    if name in DTYPES:
        return DTYPES[name]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and _cpu_has_bf16()
    return torch.bfloat16 if native else torch.float32


def resolve_model(name: str) -> str:
    """A path or hub name that `from_pretrained` takes; the built-in model is fetched."""
    if name == builtin.NAME:
        return str(builtin.ensure())
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise InputError(
            f"model must be a folder, got {name!r}, which is not there; check the path"
        )
    return str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name


def load_config(name: str) -> PretrainedConfig:
    """The model's configuration, without its weights."""
    return _from_pretrained(AutoConfig, name)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer."""
    return _from_pretrained(AutoTokenizer, name)


def load_model(
    name: str, dtype: torch.dtype | str, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A causal LM in evaluation mode, without gradients; `dtype` "auto" keeps the stored one.

    Raises InputError if the files lack weights: transformers would make them up.
    """
    model, report = _from_pretrained(
        AutoModelForCausalLM, name, dtype=dtype, output_loading_info=True
    )
    lacking = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    if lacking:
        raise InputError(
            f"the files of {name!r} must hold every weight of {type(model).__name__}, but lack "
            f"{len(lacking)}, such as {sorted(lacking)[0]}; fetch them again"
        )
    return model.to(device).eval().requires_grad_(False)


def _from_pretrained(kind: Any, name: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(resolve_model(name), **options)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"model must be a Hugging Face name, a local folder or {builtin.NAME!r}, got "
            f"{name!r}: {' '.join(str(error).split())[:300]}"
        ) from error


def _cpu_has_bf16() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return False
    flags = cpuinfo.read_text(encoding="utf-8", errors="replace")
    return "avx512_bf16" in flags or "amx_bf16" in flags
