"""A tiny random model with a real tokenizer and chat template, and a task for it."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from opcd.config.fields import FIELDS

if "PYTEST_XDIST_WORKER" in os.environ:  # a core each, and so for the processes that tests start
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Bytes as tokens, and ChatML's special tokens; <|im_end|> is EOS and pad, as in SmolLM2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<|im_start|>", "<|im_end|>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_llama(seed: int = 0, **overrides: object) -> LlamaForCausalLM:
    """A random Llama whose distributions depend strongly on what stands in front."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | overrides)).eval()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Where a fault has ended the GPU's work for this process, all further tests would fail."""
    outcome = yield
    if outcome.get_result().failed and item.get_closest_marker("gpu") and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except Exception as error:  # whatever the driver says
            item.session.shouldstop = f"the GPU takes no more work of this process: {error}"


BUDGETED = ("test_budget", "test_check", "test_a_run_leaves_everything")


@pytest.fixture(autouse=True)
def _no_budget(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second a run, which few tests are about."""
    if "opcd.training.run" in sys.modules and not any(n in request.node.nodeid for n in BUDGETED):
        monkeypatch.setattr("opcd.training.run.announce_budget", lambda *_: None)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that from_pretrained loads: tiny Llama and tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def settings(tmp_path: Path, model_dir: Path) -> dict:
    """A complete configuration of a short run on the tiny model; files in tmp_path."""
    return tiny_settings(tmp_path, model_dir)


def tiny_settings(folder: Path, model_dir: Path) -> dict:
    """See `settings`; files in `folder`."""
    (folder / "context.md").write_text("Answer with one letter.", encoding="utf-8")
    for name, words in (
        ("prompts", "red blue pink teal gold grey lime navy plum rust sand snow"),
        ("validation", "apple pear fig"),
        ("test", "cat dog owl ant"),
    ):
        rows = [{"prompt": word, "answer": word[0]} for word in words.split()]
        if name == "prompts":
            rows = [{"prompt": row["prompt"]} for row in rows]
        write_jsonl(folder / f"{name}.jsonl", rows)
    return {
        "output_dir": str(folder / "run"),
        "context": str(folder / "context.md"),
        "prompts": str(folder / "prompts.jsonl"),
        "validation_data": str(folder / "validation.jsonl"),
        "test_data": str(folder / "test.jsonl"),
        "model": str(model_dir),
        "dtype": "float32",
        "device": "cpu",
        "steps": 6,
        "prompts_per_step": 4,
        "max_completion_tokens": 8,
        "learning_rate": 3e-3,
        "schedule": "constant",
        "guided_share": 0.0,
        "warmup_steps": 1,
        "validate_every": 3,
        "save_every": 2,
        "elsewhere_prompts": 0,
        "leak_tokens": 0,
    }


def in_groups(settings: dict) -> str:
    """A configuration file with these settings; what is no field stands outside of any group."""
    groups: dict = {}
    for name, value in settings.items():
        (groups.setdefault(FIELDS[name], {}) if name in FIELDS else groups)[name] = value
    return yaml.safe_dump(groups)


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """A run's folder, scored on requests with markup in them; tests that write take a copy."""
    from opcd.config import TrainConfig
    from opcd.training.run import train

    folder = tmp_path_factory.mktemp("finished")
    settings = tiny_settings(folder, model_dir)
    words = ("cat", "dog", "owl", "ant", "cow", "cod", "doe", "oryx", "auk", "crab")
    rows = [{"prompt": f"<script>alert(1)</script> & {w}", "answer": w[0]} for w in words]
    write_jsonl(folder / "test.jsonl", rows)
    settings |= {"steps": 4, "validate_every": 2, "elsewhere_prompts": 6, "guided_share": 0.5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opcd.training.run.announce_budget", lambda *_: None)
        train(TrainConfig(**settings))
    return Path(settings["output_dir"])


@pytest.fixture
def copied_run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed; its inputs stay where they were."""
    return Path(shutil.copytree(finished_run, tmp_path / "copied"))
