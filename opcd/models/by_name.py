"""Models and tokenizers from a name: a Hugging Face name, a local folder or the built-in one."""

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from opcd.errors import InputError
from opcd.models import builtin
from opcd.models.hub import check_on_hub
from opcd.models.lm import eos_token_ids_in, keep_softcap
from opcd.runtime.untrusted import check_no_kernel

ADAPTER_CONFIG = "adapter_config.json"
# What of a generation_config.json changes which token follows.
SAMPLING = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"),
    *("repetition_penalty", "no_repeat_ngram_size"),
)
_UNLOADABLE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError),
    *(SafetensorError, pickle.UnpicklingError),
)
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
        with torch.cuda.device(device):  # it is asked of the current one
            native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and _cpu_has_bf16()
    return torch.bfloat16 if native else torch.float32


def resolve_model(name: str, what: str = "model") -> str:
    """A path or hub name that `from_pretrained` takes; the built-in model is fetched.

    Raises InputError, which speaks of `what`, for a path that is no folder, a name that the hub
    does not know, and an adapter without its model.
    """
    if name == builtin.NAME:
        return str(builtin.ensure())
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if _is_path(name):
            found = "a file" if folder.exists() else "which is not there"
            raise InputError(f"{what} must be a folder, got {name!r}, {found}; check the path")
        check_on_hub(name, what)
        return name
    if (folder / ADAPTER_CONFIG).is_file():
        raise InputError(
            f'{what} must be whole, got an adapter in {name!r}; merge it first: python -c "from '
            f"peft import AutoPeftModelForCausalLM as M; M.from_pretrained({name!r})"
            f".merge_and_unload().save_pretrained('merged')\", put its base's tokenizer files "
            f"beside it, and name the folder merged"
        )
    check_no_kernel(folder)
    return str(folder)


def check_trainable(name: str) -> None:
    """Raise InputError if a model's weights are quantised: they cannot be written as they were."""
    quantized = getattr(load_config(name), "quantization_config", None)
    if quantized is not None:
        method = dict(quantized).get("quant_method", "an unnamed method")
        raise InputError(
            f"model must hold weights that can be trained and written again, got {name!r} "
            f"quantised by {method}; name the unquantised model that it was made from"
        )


def load_config(name: str) -> PretrainedConfig:
    """The model's configuration, without its weights."""
    return _from_pretrained(AutoConfig, name)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer."""
    return _from_pretrained(AutoTokenizer, name)


def sampling_defaults(name: str) -> dict[str, Any]:
    """What a model's generation_config.json draws by where nobody says otherwise."""
    try:
        found = GenerationConfig.from_pretrained(resolve_model(name)).to_diff_dict()
    except (OSError, ValueError):  # there is none, or it is said elsewhere
        return {}
    return {setting: found[setting] for setting in SAMPLING if setting in found}


def load_eos_token_ids(name: str) -> list[int]:
    """The tokens that end a completion by the model's files, without its weights; [] where they
    name none. Raises InputError for a generation config that cannot be read."""
    configs: list[Any] = [load_config(name).get_text_config()]
    resolved = resolve_model(name)
    try:
        configs.insert(0, GenerationConfig.from_pretrained(resolved))
    except (OSError, ValueError) as error:
        file = Path(resolved) / "generation_config.json"
        if file.is_file():  # else there is none
            raise InputError(
                f"{file} must be a JSON file, got {' '.join(str(error).split())[:200]}; restore or "
                f"remove it"
            ) from error
    return eos_token_ids_in(configs)


def check_same_tokenizer(
    student: PreTrainedTokenizerBase,
    other: PreTrainedTokenizerBase,
    who: str = "teacher and student",
) -> None:
    """Raise InputError if both models do not turn the same text into the same token ids."""
    ours, theirs = student.get_vocab(), other.get_vocab()
    text = "Distil 3,14 naïve things:\n\tdef f(x): return x  # ok 日本語 🙂"
    same = student(text)["input_ids"] == other(text)["input_ids"]
    if ours != theirs or not same:
        differing = len(set(ours.items()) ^ set(theirs.items()))
        raise InputError(
            f"{who} must share one tokenizer, got {len(ours)} and {len(theirs)} "
            f"tokens of which {differing} entries differ ({student.name_or_path!r}, "
            f"{other.name_or_path!r}); name a model of the same family"
        )


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
    keep_softcap(model)
    return model.to(device).eval().requires_grad_(False)


def _from_pretrained(kind: Any, name: str, **options: Any) -> Any:
    try:
        # False, since None asks at a terminal whether a model's own code may run.
        return kind.from_pretrained(resolve_model(name), trust_remote_code=False, **options)
    except ImportError as error:
        raise InputError(
            f"the packages that {name!r} needs must be installed, got "
            f"{' '.join(str(error).split())[:300]}; install them, or name an unquantised model"
        ) from error
    except _UNLOADABLE as error:
        if isinstance(error, InputError):
            raise
        if "custom code" in str(error):
            raise InputError(
                f"model must be one that transformers has the code of, got {name!r}, which brings "
                f"its own, and that is not run; name a model without it"
            ) from error
        raise InputError(
            f"model must be a Hugging Face name, a local folder or {builtin.NAME!r}, got "
            f"{name!r}: {' '.join(str(error).split())[:300]}"
        ) from error


def _is_path(name: str) -> bool:
    """Whether a name can only mean a file or folder: hub names are "name" or "owner/name"."""
    return (
        name.startswith((".", "/", "~"))
        or name.endswith("/")
        or name.count("/") > 1
        or "\\" in name
        or Path(name).exists()
        or ("/" in name and Path(name).parent.is_dir())
    )


def _cpu_has_bf16() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return False
    flags = cpuinfo.read_text(encoding="utf-8", errors="replace")
    return "avx512_bf16" in flags or "amx_bf16" in flags
