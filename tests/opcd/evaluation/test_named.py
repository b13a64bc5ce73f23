"""Contenders that people name: a model, an adapter, a prompt, a soft prompt."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

from opcd.cli import main
from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.evaluation.contenders import Models
from opcd.evaluation.evaluate import Evaluation
from opcd.evaluation.named import named_contenders
from opcd.models.by_name import load_model
from opcd.models.lm import eos_token_ids
from opcd.tasks.messages import assistant, system, user
from opcd.tasks.prepare import Setup, prepare
from opcd.training.evaluate import evaluate_run
from tests.conftest import in_groups, tiny_llama, tiny_tokenizer, write_jsonl

CAUSAL = "CAUSAL_LM"


def saved(model: Any, base: str, folder: Path) -> Path:
    """An adapter with weights that matter."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.5 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
    return folder


def lora(base: str, folder: Path, **overrides: Any) -> Path:
    config = LoraConfig(r=4, target_modules="all-linear", task_type=CAUSAL)
    return saved(get_peft_model(tiny_llama(**overrides), config), base, folder)


def soft(base: str, folder: Path, tokens: int = 5, **overrides: Any) -> Path:
    config = PromptTuningConfig(task_type=CAUSAL, num_virtual_tokens=tokens)
    return saved(get_peft_model(tiny_llama(**overrides), config), base, folder)


def scored(settings: dict, contenders: dict[str, str], distilled: str = "none") -> Evaluation:
    target = Path(settings["output_dir"]).parent / "scored"
    return evaluate_run(TrainConfig(**settings), distilled, str(target), contenders=contenders)[1]


@torch.no_grad()
def greedy(model: Any, ids: list[int], front: torch.Tensor | None = None) -> list[int]:
    """Token by token, from all logits of the whole sequence."""
    answer: list[int] = []
    embed = model.get_input_embeddings()
    while len(answer) < 8 and (not answer or answer[-1] not in eos_token_ids(model)):
        embedded = embed(torch.tensor([ids + answer]))
        parts = [embedded] if front is None else [front[None], embedded]
        answer.append(int(model(inputs_embeds=torch.cat(parts, 1)).logits[0, -1].argmax()))
    return answer


def test_a_soft_prompt_stands_in_front_of_the_request(settings: dict, tmp_path: Path) -> None:
    rows = [{"prompt": p, "answer": p[0]} for p in ("cat", "horse", "cow", "a")]  # three lengths
    write_jsonl(Path(settings["test_data"]), rows)
    folder = soft(settings["model"], tmp_path / "soft")
    found = scored(settings, {"soft": str(folder)})
    setup = prepare(TrainConfig(**settings))
    model = load_model(settings["model"], torch.float32)
    peft_model = get_peft_model(
        load_model(settings["model"], torch.float32),
        PromptTuningConfig(task_type=CAUSAL, num_virtual_tokens=5),
    )
    peft_model.load_adapter(str(folder), "default")
    front = peft_model.get_prompt(1)[0].detach()
    for case, row in zip(setup.task.test, found.answers, strict=True):
        ids = greedy(model, case.prompt.student_ids, front)
        assert row["soft"] == setup.chat.decode(ids)
        assert row["soft"] != row["base"], "else nothing was in front"
    assert found.card["contenders"]["soft"]["meaning"] == "before, behind a soft prompt of 5"


@torch.no_grad()
def test_an_adapter_answers_on_the_base(settings: dict, tmp_path: Path) -> None:
    folder = lora(settings["model"], tmp_path / "adapter")
    found = scored(settings, {"mine": str(folder)})
    setup = prepare(TrainConfig(**settings))
    merged: Any = get_peft_model(
        load_model(settings["model"], torch.float32),
        LoraConfig(r=4, target_modules="all-linear", task_type=CAUSAL),
    )
    merged.load_adapter(str(folder), "default")
    plain = merged.merge_and_unload().eval()
    for case, row in zip(setup.task.test, found.answers, strict=True):
        assert row["mine"] == setup.chat.decode(greedy(plain, case.prompt.student_ids))
        assert row["mine"] != row["base"]
    # As the distilled model it has all that one has.
    card = scored(settings, {}, str(folder)).card
    assert list(card["contenders"]) == ["base", "prompted", "distilled", "distilled_prompted"]
    assert (
        card["contenders"]["distilled"]["accuracy"] == found.card["contenders"]["mine"]["accuracy"]
    )
    assert card["divergence"]["after"] > card["divergence"]["before"]


def test_a_prompt_and_a_model_answer(settings: dict, tmp_path: Path) -> None:
    (tmp_path / "short.md").write_text("One letter!", encoding="utf-8")
    tiny_llama(seed=5).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    given = {"short": str(tmp_path / "short.md"), "other": str(tmp_path / "other")}
    found = scored(settings, given)
    assert list(found.card["contenders"]) == ["base", "prompted", "short", "other"]
    setup = prepare(TrainConfig(**settings))
    base, other = (load_model(m, torch.float32) for m in (settings["model"], given["other"]))
    for case, row in zip(setup.task.test, found.answers, strict=True):
        request = list(case.example.messages)
        ids = setup.chat.template.ids([system("One letter!"), *request])
        assert row["short"] == setup.chat.decode(greedy(base, ids))
        alone = setup.chat.template.ids([user(request[0]["content"])])
        assert row["other"] == setup.chat.decode(greedy(other, alone))


def test_another_prompt_is_drawn_for_as_all_are(settings: dict, tmp_path: Path) -> None:
    """The same words in another file draw the same answers."""
    (tmp_path / "same.md").write_text(Path(settings["context"]).read_text(), encoding="utf-8")
    found = scored(settings | {"eval_temperature": 1.0}, {"same": str(tmp_path / "same.md")})
    assert [row["same"] for row in found.answers] == [row["prompted"] for row in found.answers]


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights may be read."""
    monkeypatch.setattr("opcd.tasks.prepare.load_model", None)


def refused(setup: Setup, what: str | Path, message: str, name: str = "it") -> None:
    with pytest.raises(InputError, match=message):
        named_contenders({name: str(what)}, setup)(Models(setup))


@pytest.mark.usefixtures("untouched")
def test_what_is_of_another_base_is_refused(settings: dict, tmp_path: Path) -> None:
    setup, base = prepare(TrainConfig(**settings)), settings["model"]
    other = lora("org/another-model", tmp_path / "other")
    refused(setup, other, r"must be of the model .* got one of 'org/another-model' in .*name its")
    wide = lora(base, tmp_path / "wide", hidden_size=64)
    refused(setup, wide, r"an adapter must fit the weights of .* got 64 inputs of model\.layers")
    vectors = soft(base, tmp_path / "vectors", hidden_size=64)
    refused(setup, vectors, r"must be as wide as the embeddings of .*, 32, got 64 in")
    theirs = soft("org/another-model", tmp_path / "theirs")
    refused(setup, theirs, "must be of the model .* got one of 'org/another-model' in")
    changed = tmp_path / "changed"  # another model in a folder of the same name
    tiny_llama(seed=9).save_pretrained(changed / Path(base).name)
    moved = lora(str(changed / Path(base).name), tmp_path / "moved")
    refused(setup, moved, "must be of the model")
    tuned = get_peft_model(
        tiny_llama(),
        PromptEncoderConfig(task_type=CAUSAL, num_virtual_tokens=3, encoder_hidden_size=8),
    )
    tuned.save_pretrained(tmp_path / "encoder")
    refused(setup, tmp_path / "encoder", "must be one of peft's prompt tuning, got P_TUNING")


def test_a_base_that_was_moved_is_still_the_base(settings: dict, tmp_path: Path) -> None:
    shutil.copytree(settings["model"], tmp_path / "copy")
    folder = lora(str(tmp_path / "copy"), tmp_path / "adapter")
    setup = prepare(TrainConfig(**settings))
    (contender,) = named_contenders({"it": str(folder)}, setup)(Models(setup))
    assert contender.name == "it"


@pytest.mark.usefixtures("untouched")
def test_an_adapter_of_more_layers_is_not_read_in_part(settings: dict, tmp_path: Path) -> None:
    deep = lora(settings["model"], tmp_path / "deep", num_hidden_layers=3)
    setup = prepare(TrainConfig(**settings))
    refused(setup, deep, r"every weight of an adapter must have a place .*model\.layers\.2")


def test_a_home_folder_is_found(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    lora(settings["model"], tmp_path / "adapter")
    found = scored(settings, {"mine": "~/adapter"})
    assert found.card["contenders"]["mine"]["meaning"] == "adapter adapter, without the context"


@pytest.mark.usefixtures("untouched")
def test_what_is_not_there_or_does_not_fit_is_refused(settings: dict, tmp_path: Path) -> None:
    setup = prepare(TrainConfig(**settings))
    refused(setup, tmp_path / "nowhere", "contender it must be a folder, got .* not there")
    refused(setup, tmp_path / "nowhere.md", "context must be a file, got .* not there")
    (tmp_path / "long.md").write_text("so " * 200, encoding="utf-8")
    refused(setup, tmp_path / "long.md", r"must fit the model's 512 positions, got \d+ with")
    asked = setup.task.test[0].example
    few = [user(asked.text), assistant(asked.answers[0])]
    (tmp_path / "few.json").write_text(json.dumps(few), encoding="utf-8")
    refused(setup, tmp_path / "few.json", "contender it: .* must be disjoint .* demonstrations")
    vectors = soft(settings["model"], tmp_path / "vectors", tokens=500)
    refused(setup, vectors, r"soft prompt, request and answer must fit the model's 512 positions")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    refused(setup, tmp_path / "half", r"an adapter must hold adapter_model.safetensors, got none")
    for name in ("base", "prompt", "it_right", "it_prompted", "a b", "1"):
        refused(setup, tmp_path, "a contender's name must be one word of its own", name)
    with pytest.raises(InputError, match="served_model must come with a server, got 'x' alone"):
        named_contenders({}, setup, "x")


def test_the_command_line_names_them(
    settings: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "short.md").write_text("One letter!", encoding="utf-8")
    config = tmp_path / "config.yaml"
    config.write_text(in_groups(settings), encoding="utf-8")
    command = ["eval", "--config", str(config), "--distilled", "none"]
    short = f"short={tmp_path / 'short.md'}"
    assert main([*command, "--contender", short]) == 0
    assert "before, with short.md" in capsys.readouterr().out
    written = list(Path(settings["output_dir"]).glob("*/scorecard.json"))
    assert [file.parent.name for file in written] == ["eval-none-short-test"]
    for wrong in ("short.md", "=x", f"{short}|{short}"):
        given = [word for part in wrong.split("|") for word in ("--contender", part)]
        assert main([*command, *given]) == 2
        assert "a contender must be given as NAME=WHAT, each name once" in capsys.readouterr().err
    assert main([*command, "--base-url", "ftp://x"]) == 2
    assert "contender server must be a folder" in capsys.readouterr().err
