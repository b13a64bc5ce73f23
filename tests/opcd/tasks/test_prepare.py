"""What is decided before weights are loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, RwkvConfig, RwkvForCausalLM

from opcd.config import TrainConfig
from opcd.config.settings import write_config
from opcd.errors import InputError
from opcd.models.lm import eos_token_ids
from opcd.tasks.prepare import on_this_machine, prepare
from tests.conftest import CHATML, tiny_llama, tiny_tokenizer, write_jsonl

DATED = "{{ strftime_now('%d %b %Y') }}" + CHATML


def model_with(template: str, folder: Path) -> str:
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer(template).save_pretrained(folder)
    return str(folder)


def test_a_run_keeps_the_day_on_which_it_began(settings: dict, tmp_path: Path) -> None:
    settings |= {"model": model_with(DATED, tmp_path / "model")}
    first = prepare(TrainConfig(**settings, today="2026-05-01"))
    assert first.chat.stand_in.startswith("01 May 2026<|im_start|>user")
    assert first.remarks == [
        "the chat template writes today's date: this run keeps 2026-05-01",
    ]
    run = Path(settings["output_dir"])
    run.mkdir()
    write_config(first.config, run / "config.yaml")
    again = prepare(TrainConfig(**settings))
    assert again.config.today == "2026-05-01"
    assert again.fingerprint == first.fingerprint
    assert not again.config.differing_fields(first.config)
    other = prepare(TrainConfig(**settings, today="2026-05-02"))
    assert other.fingerprint != first.fingerprint
    with pytest.raises(InputError, match="today must be a date like 2026-11-26, got '1 May'"):
        prepare(TrainConfig(**settings, today="1 May"))


def test_stand_ins_of_several_contexts(settings: dict, tmp_path: Path) -> None:
    """What a student's prompts begin with is said once where it is the same for all."""
    (tmp_path / "contexts.json").write_text('{"a": "One letter.", "b": "Two."}', encoding="utf-8")
    settings |= {"context": str(tmp_path / "contexts.json")}
    for name in ("prompts", "validation_data", "test_data"):
        rows = [json.loads(x) for x in Path(settings[name]).read_text("utf-8").splitlines()]
        write_jsonl(
            Path(settings[name]), [r | {"context": "ab"[i % 2]} for i, r in enumerate(rows)]
        )
    assert prepare(TrainConfig(**settings)).prompt_lines == [
        "without   '<|im_start|>user\\n' stands in front of a request",
        "answers   end with <|im_end|>, or at 8 tokens",
    ]


@pytest.mark.parametrize("given", ["None", "NONE", " default", "Default"])
def test_a_keyword_in_another_spelling_is_no_text_for_the_model(settings: dict, given: str) -> None:
    with pytest.raises(InputError, match=f"write {given.strip().lower()}"):
        TrainConfig(**settings, without_context=given).check()


def test_what_ends_an_answer_may_stand_in_the_tokenizer_alone(
    settings: dict, tmp_path: Path
) -> None:
    model = tiny_llama(eos_token_id=None)
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    settings |= {"model": str(tmp_path / "model")}
    setup = prepare(TrainConfig(**settings))
    assert setup.stop_ids == [1]
    assert eos_token_ids(setup.load(settings["model"])) == [1]
    (tmp_path / "model" / "generation_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"generation_config\.json must be a JSON file"):
        prepare(TrainConfig(**settings))


def test_what_ends_the_teachers_answers_ends_the_students(settings: dict, tmp_path: Path) -> None:
    for name, ends in (("student", [1, 7]), ("teacher", [1, 9])):
        model = tiny_llama(eos_token_id=ends)
        model.generation_config.eos_token_id = ends
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    settings |= {"model": str(tmp_path / "student"), "teacher": str(tmp_path / "teacher")}
    setup = prepare(TrainConfig(**settings), for_training=True)
    assert setup.stop_ids == [1, 7, 9]
    for name in ("student", "teacher"):
        assert sorted(eos_token_ids(setup.load(str(tmp_path / name)))) == [1, 7, 9]


def test_a_model_that_changes_its_weights_is_refused(settings: dict, tmp_path: Path) -> None:
    """RWKV divides them in a pass of evaluation mode; written and read they are divided twice."""
    sizes = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 8, "context_length": 512}
    model = RwkvForCausalLM(RwkvConfig(**sizes, bos_token_id=0, eos_token_id=1))
    model.save_pretrained(tmp_path / "rwkv")
    tiny_tokenizer().save_pretrained(tmp_path / "rwkv")
    settings |= {"model": str(tmp_path / "rwkv")}
    setup = prepare(TrainConfig(**settings))
    with pytest.raises(InputError, match="must leave its weights as they are when it is called"):
        setup.load(settings["model"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="its device is here")
def test_a_run_of_another_machines_device_is_looked_at_on_this_one(settings: dict) -> None:
    config = TrainConfig(**settings | {"device": "cuda"})
    with pytest.raises(InputError, match="device must be one of this machine's"):
        prepare(config)
    assert prepare(on_this_machine(config)).device.type == "cpu"
    assert on_this_machine(TrainConfig(**settings)) == TrainConfig(**settings)


def test_a_template_without_a_date_has_none(settings: dict) -> None:
    setup = prepare(TrainConfig(**settings, today="2026-05-01"))
    assert setup.remarks == []
    assert prepare(TrainConfig(**settings)).config.today is None


def test_what_servers_would_draw_by_is_said(settings: dict, tmp_path: Path) -> None:
    base = Path(shutil.copytree(settings["model"], tmp_path / "base"))
    (base / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 0, "do_sample": True, "top_k": 20, "repetition_penalty": 1.1})
    )
    (remark,) = prepare(TrainConfig(**settings | {"model": str(base)})).remarks
    assert "sets do_sample True, top_k 20, repetition_penalty 1.1: nothing here is drawn" in remark


def test_a_template_that_takes_no_system_message(settings: dict, tmp_path: Path) -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    settings |= {"model": model_with(refusing + CHATML, tmp_path / "model")}
    setup = prepare(TrainConfig(**settings))
    prompt = setup.task.train[0]
    decode = AutoTokenizer.from_pretrained(settings["model"]).decode
    assert decode(setup.task.prompted_ids(prompt)) == (
        "<|im_start|>user\nAnswer with one letter.\n\nred<|im_end|>\n<|im_start|>assistant\n"
    )
    assert decode(setup.task.prefixes[""]) == "<|im_start|>user\nAnswer with one letter.\n\n"
    assert setup.remarks == [
        "the chat template does not take the context as a system message, or a request's own "
        "behind it: it stands in front of the first user message",
    ]


def test_a_context_that_does_not_stand_in_front_of_the_prompts(
    settings: dict, tmp_path: Path
) -> None:
    """Behind earlier turns, where a template writes it into the last one."""
    last = (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
        "{{ messages[0].content + '|' if loop.last and messages[0].role == 'system' }}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [
        {"role": "user", "content": "tea"},
        {"role": "assistant", "content": "t"},
        {"role": "user", "content": "oat"},
    ]
    with Path(settings["test_data"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"messages": turns, "answer": "o"}) + "\n")
    settings |= {"model": model_with(last, tmp_path / "model")}
    setup = prepare(TrainConfig(**settings))
    assert setup.task.shared_tokens == len("#user\n")
    assert setup.remarks == [
        "only 6 of about 24 context tokens stand in front of all prompts: the chat template puts "
        "the rest elsewhere, and it is computed with every sequence"
    ]


def test_a_template_from_a_file_stops_where_it_ends_a_turn(settings: dict, tmp_path: Path) -> None:
    ends_otherwise = CHATML.replace("<|im_end|>", "<|im_start|>")  # a token that is no EOS
    file = tmp_path / "chat.jinja"
    file.write_text(ends_otherwise, encoding="utf-8")
    setup = prepare(TrainConfig(**settings, chat_template=str(file)))
    assert setup.chat.stand_in == "<|im_start|>user\n"
    model = setup.load(settings["model"])
    assert eos_token_ids(model) == [1, 0]


@pytest.mark.parametrize("part", ["prompts", "test_data"])
def test_an_added_token_without_an_embedding_in_a_later_row(
    settings: dict, tmp_path: Path, part: str
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<badge>"])
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings |= {"model": str(tmp_path / "model")}
    with Path(settings[part]).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "a <badge>", "answer": "b"}) + "\n")
    last = len(Path(settings[part]).read_text(encoding="utf-8").splitlines())
    file = Path(settings[part]).name
    with pytest.raises(InputError, match=rf"{file}:{last}: .*got token 258 \('<badge>'\) and 258"):
        prepare(TrainConfig(**settings))
