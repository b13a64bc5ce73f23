"""vLLM as it is installed: which one, how it is started, and what it must not do meanwhile.

Its interpreter is another than this one's, as a rule: the versions that both need differ. Nothing
of a model's folder is run: weights are safetensors, and code of a model's own is not trusted.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from opcd.errors import InputError
from opcd.evaluation.server import Server
from opcd.runtime.libraries import chosen
from opcd.serving.process import HOST, Started, free_port, running

LOOK_S = 120.0  # for an interpreter to say what it has
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of adapters, that vLLM has room for
CPU_GIB = "2"  # of keys and values, on a CPU; a GPU's memory is vLLM's to take
LOOK = """
import importlib.metadata as m, importlib.util, json, sys
if importlib.util.find_spec("vllm") is None: sys.exit("no module named vllm")
import torch
name = (m.packages_distributions().get("vllm") or ["vllm"])[0]
device = "cuda" if torch.cuda.is_available() else "cpu"
print(json.dumps({"package": name, "version": m.version(name), "device": device}))
"""
# What a user's own environment may say and a measurement must not be changed by.
LEFT_OUT = ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "PYTHONSTARTUP")


class Vllm(NamedTuple):
    """An installed vLLM."""

    python: str  # the interpreter that has it
    package: str
    version: str
    device: str  # "cuda" or "cpu"

    def __str__(self) -> str:
        return f"{self.package} {self.version} on {self.device}"


class Model(NamedTuple):
    """What a server serves, and how."""

    folder: Path
    name: str  # that it is asked by
    dtype: str
    max_tokens: int  # of a prompt with its answer
    at_once: int  # requests under way
    caching: bool  # of prefixes
    adapter: Path | None = None  # a LoRA on it, served in its place
    rank: int = 0  # of that
    chat_template: str | None = None  # where it is not the model's own


def find_vllm(python: str | None) -> Vllm | None:
    """The vLLM of an interpreter; without one that of this one, or None where it has none.

    Raises InputError for an interpreter that has none.
    """
    if python is None:
        if importlib.util.find_spec("vllm") is None:
            return None
        python = sys.executable
    elif os.sep in python:
        python = os.path.abspath(Path(python).expanduser())  # a link stays: it names an environment
    with tempfile.TemporaryDirectory() as nowhere:  # where it starts it looks for modules
        try:
            done = subprocess.run(
                [python, "-c", LOOK],
                cwd=nowhere,
                capture_output=True,
                text=True,
                timeout=LOOK_S,
                stdin=subprocess.DEVNULL,
            )
            found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
            said = " ".join(done.stderr.split())[-300:]
        except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
            found, said = None, str(error)
    if not isinstance(found, dict):
        raise InputError(
            f"server_python must be an interpreter with vLLM, got {python!r}: {said}; name the "
            f"python of the environment that vLLM is installed in"
        )
    return Vllm(python, str(found["package"]), str(found["version"]), str(found["device"]))


@contextmanager
def serving(vllm: Vllm, model: Model) -> Iterator[Server]:
    """A server that answers, within a ``with``; gone behind it."""
    port = free_port()
    url = f"http://{HOST}:{port}/v1"

    def begin(folder: Path) -> list[str]:
        return command(vllm, model, port, folder)

    with running(begin, lambda folder, key: surroundings(os.environ, folder, key)) as started:
        found: list[Server] = []
        started.wait_until(lambda: _answers(url, model.name, started, found))
        yield found[0]


def command(vllm: Vllm, model: Model, port: int, folder: Path) -> list[str]:
    """The program and its arguments; a chat template of its own is written into the folder."""
    caching = "--enable-prefix-caching" if model.caching else "--no-enable-prefix-caching"
    given: dict[str, Any] = {
        "host": HOST,
        "port": port,
        "model": model.folder,
        "served-model-name": "base" if model.adapter else model.name,
        "dtype": model.dtype,
        "load-format": "safetensors",
        "generation-config": "vllm",  # what a model's file says of sampling is not asked for
        "max-model-len": model.max_tokens,
        "max-num-seqs": model.at_once,
    }
    if model.adapter is not None:
        given["max-lora-rank"] = next((r for r in RANKS if r >= model.rank), model.rank)
        given["lora-modules"] = f"{model.name}={model.adapter}"
    if model.chat_template is not None:
        file = folder / "template.jinja"
        file.write_text(model.chat_template, "utf-8")
        given["chat-template"] = file
    return [
        *(vllm.python, "-m", "vllm.entrypoints.openai.api_server"),
        *(text for name, value in given.items() for text in (f"--{name}", str(value))),
        *(caching, "--enable-prompt-tokens-details"),
        *(["--enable-lora"] if model.adapter is not None else []),
        # Compiling takes minutes on a CPU, and gains a small model little.
        *(["--enforce-eager"] if vllm.device == "cpu" else []),
    ]


def surroundings(own: Mapping[str, str], folder: Path, key: str) -> dict[str, str]:
    """The environment of a server: what it writes goes into its folder, and it asks no network.

    Its processes talk over the loopback interface alone.
    """
    kept = {
        name: value for name, value in own.items() if name not in LEFT_OUT and name not in chosen
    }
    return {
        "VLLM_CPU_KVCACHE_SPACE": CPU_GIB,
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        **kept,
        "VLLM_API_KEY": key,
        "VLLM_HOST_IP": HOST,
        "GLOO_SOCKET_IFNAME": "lo",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "VLLM_CONFIG_ROOT": str(folder / "config"),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRITON_CACHE_DIR": str(folder / "cache" / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache" / "inductor"),
    }


def _answers(url: str, name: str, started: Started, found: list[Server]) -> bool:
    """Whether it lists its models; kept in `found`."""
    if not found:
        try:
            found.append(Server(url, name, key=started.key))
        except InputError:
            return False
    return True
