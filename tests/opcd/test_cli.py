"""What the command line refuses, before any long work and with a way out."""

import json
import re
import signal
from collections.abc import Collection
from pathlib import Path

import pytest

from opcd import __version__
from opcd.cli import main
from opcd.config import TrainConfig
from opcd.config.fields import FIELDS, MEASURING
from opcd.config.settings import write_config
from opcd.errors import InputError
from opcd.runtime.interrupts import Ended
from tests.conftest import CHATML, in_groups, tiny_llama, tiny_tokenizer, write_jsonl


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every refusal here must come before a model's weights are loaded."""

    def refuse(*_: object) -> None:
        raise AssertionError("weights were loaded before the input was checked")

    monkeypatch.setattr("opcd.tasks.prepare.load_model", refuse)


def refused(
    settings: dict, capsys: pytest.CaptureFixture, command: str = "train", *more: str
) -> str:
    """Run the command, expect status 2, return the message."""
    config = Path(settings["output_dir"]).parent / "config.yaml"
    config.write_text(in_groups(settings))
    assert main([command, "--config", str(config), *more]) == 2
    message = capsys.readouterr().err.removeprefix(f"opcd {__version__}: loading\n")
    assert message.startswith(f"opcd {command}: ")
    assert "Traceback" not in message
    assert not (Path(settings["output_dir"]) / "metrics.jsonl").exists()
    return message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": "none.md"}, "none.md"),
        ({"prompts": "none.jsonl"}, "is not there"),
        ({"prompts": "."}, "got the folder"),
        ({"scorer": "fuzzy"}, "exact, contains"),
        ({"scorer": "python:nowhere:f"}, "importable"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"seed": 2**70}, "seed must be below"),
        ({"model": " "}, "model must not be blank"),
        ({"chat_template_args": {"tokenize": True}}, "chat_template_args must name"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
        ({"weight_decay": float("inf")}, "weight_decay must be finite, got inf"),
        ({"weight_decay": float("nan")}, "weight_decay must be finite, got nan"),
        ({"max_minutes": 0}, "max_minutes must be positive and finite, got 0"),
        ({"trackers": "wandb"}, "trackers must be tensorboard or python:FILE.py:function, got"),
        ({"device": "cuda:93"}, "device must be"),
        ({"device": "tpu-ish"}, "device must be"),
        ({"model": "./no/such/folder"}, "is not there"),
        ({"max_completion_tokens": 500}, "512 positions, got"),
    ],
)
def test_settings(
    settings: dict, capsys: pytest.CaptureFixture, change: dict, message: str
) -> None:
    assert message in refused(settings | change, capsys)


def test_settings_that_no_command_line_has_read(settings: dict) -> None:
    for change in ({"rollout_engine": "vllm"}, {"schedule": "cosine"}):
        (name,) = change
        with pytest.raises(InputError, match=f"{name} must be one of .*, got '{change[name]}'"):
            TrainConfig(**settings | change).check()
    for change, wanted in (
        ({"learning_rate": "1e-4"}, "type float | None, got '1e-4'"),
        ({"steps": 2.5}, "type int, got 2.5"),
        ({"test_data": Path("test.jsonl")}, "type str | None, got PosixPath"),
        ({"chat_template_args": None}, "type dict, got None"),
    ):
        (name,) = change
        with pytest.raises(InputError, match=re.escape(f"{name} must be of the {wanted}")):
            TrainConfig(**settings | change).check()
    TrainConfig(**settings | {"temperature": 1, "teacher": None}).check()


def test_empty_and_broken_files(settings: dict, capsys: pytest.CaptureFixture) -> None:
    Path(settings["prompts"]).write_text("")
    assert "must not be empty" in refused(settings, capsys)
    Path(settings["prompts"]).write_text('{"prompt": "a"}\n{"prompt": \n')
    assert "prompts.jsonl:2" in refused(settings, capsys)
    Path(settings["prompts"]).write_text('{"messages": [{"role": "bot", "content": "a"}]}\n')
    assert "'bot'" in refused(settings, capsys)


def test_a_scorer_that_raises(settings: dict, capsys: pytest.CaptureFixture) -> None:
    message = refused(settings | {"scorer": "python:operator:truediv"}, capsys)
    assert "it raised TypeError" in message
    assert "('', ['a'])" in message or "for '' and ['a']" in message


def test_a_template_that_rejects_one_prompt(
    settings: dict, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    template = (
        "{% if messages | length > 2 %}{{ raise_exception('too many turns') }}{% endif %}" + CHATML
    )
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer(template).save_pretrained(tmp_path / "model")
    with Path(settings["prompts"]).open("a") as file:
        turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
        file.write(json.dumps({"messages": turns}) + "\n")
    message = refused(settings | {"model": str(tmp_path / "model")}, capsys)
    assert "prompts.jsonl:13" in message
    assert "too many turns" in message


def test_test_prompts_that_were_trained_on(settings: dict, capsys: pytest.CaptureFixture) -> None:
    write_jsonl(Path(settings["test_data"]), [{"prompt": "RED ", "answer": "r"}])
    assert "must be disjoint" in refused(settings, capsys)


def test_a_prompt_that_does_not_fit(settings: dict, capsys: pytest.CaptureFixture) -> None:
    with Path(settings["prompts"]).open("a") as file:
        file.write(json.dumps({"prompt": "x" * 600}) + "\n")
    message = refused(settings, capsys)
    assert "prompts.jsonl:13" in message
    assert "512 positions" in message


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "must have a chat template"),
        (
            "{{ raise_exception('System role not supported') }}" + CHATML,
            "must accept these messages",
        ),
    ],
)
def test_templates(
    settings: dict, capsys: pytest.CaptureFixture, tmp_path: Path, template: str, message: str
) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer(template).save_pretrained(tmp_path / "model")
    assert message in refused(settings | {"model": str(tmp_path / "model")}, capsys)


def test_rotary_embeddings_that_depend_on_the_batch(
    settings: dict, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    half = [1.0] * 4
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "factor": 4.0}
    rope |= {"short_factor": half, "long_factor": half, "original_max_position_embeddings": 60}
    tiny_llama(rope_parameters=rope).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    capsys.readouterr()
    message = refused(settings | {"model": str(tmp_path / "m")}, capsys)
    assert "longrope all sequences must lie on one side of 60 tokens" in message


def test_a_teacher_with_another_tokenizer(
    settings: dict, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    other = tiny_tokenizer()
    other.add_tokens(["<extra>"])
    other.save_pretrained(tmp_path / "teacher")
    tiny_llama().save_pretrained(tmp_path / "teacher")
    message = refused(settings | {"teacher": str(tmp_path / "teacher")}, capsys)
    assert "share one tokenizer" in message


def test_a_teacher_with_fewer_rows_than_the_student_can_sample(
    settings: dict, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """Models of one family pad their vocabularies to different sizes."""
    for name, rows in (("few", 258), ("many", 384)):
        tiny_llama(vocab_size=rows).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    settings |= {"model": str(tmp_path / "many"), "teacher": str(tmp_path / "few")}
    capsys.readouterr()
    assert "every token of the student, got 258 and 384 rows" in refused(settings, capsys)


def test_a_folder_that_holds_a_run(settings: dict, capsys: pytest.CaptureFixture) -> None:
    run = Path(settings["output_dir"])
    (run / "checkpoints" / "step-000002").mkdir(parents=True)
    assert "resume it, or choose another" in refused(settings, capsys)


def test_a_folder_with_a_configuration_of_ones_own(
    settings: dict, capsys: pytest.CaptureFixture
) -> None:
    Path(settings["output_dir"]).mkdir()
    own = Path(settings["output_dir"]) / "config.yaml"
    own.write_text(in_groups(settings))
    assert "must not hold a config.yaml of yours" in refused(settings, capsys)
    assert own.read_text() == in_groups(settings)


def test_a_folder_that_cannot_be_written(
    settings: dict, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    config = tmp_path / "config.yaml"
    config.write_text(in_groups(settings))
    assert main(["train", "--config", str(config), "--output_dir", str(tmp_path / "file")]) == 2
    assert "must go to a folder that can be written" in capsys.readouterr().err


def test_resume_without_a_run_and_with_other_settings(
    settings: dict, capsys: pytest.CaptureFixture
) -> None:
    config = Path(settings["output_dir"]).parent / "config.yaml"
    config.write_text(in_groups(settings))
    assert main(["train", "--config", str(config), "--resume"]) == 2
    assert "to resume there must be a run" in capsys.readouterr().err
    Path(settings["output_dir"]).mkdir()
    write_config(TrainConfig(**settings), Path(settings["output_dir"]) / "config.yaml")
    resume = ["train", "--config", str(config), "--resume"]
    assert main([*resume, "--seed=3", "--prompts_per_step=5"]) == 2
    assert "other values for prompts_per_step, seed" in capsys.readouterr().err
    assert main([*resume, "--steps=4"]) == 2
    assert "prolonged and not shortened, got 4 steps and 6 before" in capsys.readouterr().err
    write_config(
        TrainConfig(**settings | {"schedule": "linear"}),
        Path(settings["output_dir"]) / "config.yaml",
    )
    assert main([*resume, "--schedule=linear", "--steps=8"]) == 2
    message = capsys.readouterr().err
    assert "the schedule linear must keep its steps, got 8 and 6 before: they set the" in message
    assert "set steps to 6, or start another output_dir" in message
    (Path(settings["output_dir"]) / "config.yaml").write_text("")
    assert main(resume) == 2
    assert "must hold settings in groups" in capsys.readouterr().err


def test_evaluation_without_a_distilled_model_or_test_data(
    settings: dict, capsys: pytest.CaptureFixture
) -> None:
    assert "run `opcd train` first" in refused(settings, capsys, "eval")
    without = settings | {"test_data": None}
    assert "there must be test data" in refused(without, capsys, "eval", "--distilled", "none")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--no_such_field", "1"], "there is no option --no_such_field; see"),
        (["train", "--learning-rte", "1"], "did you mean --learning_rate?"),
        (["train", "--steps", "many"], "command line: steps must be a whole number, got 'many'"),
        (["train", "--steps", "2.5"], "steps must be a whole number, got '2.5'"),
        (["train", "--schedule", "liner"], "must be one of linear, constant, got 'liner'; did you"),
        (
            ["train", "--chat_template_args", "3"],
            "must be a mapping, like {enable",
        ),
        (["train", "--preset", "labtop"], "got 'labtop'; did you mean laptop?"),
        (["train", "--step", "1"], "there is no option --step; did you mean --steps?"),
        (["eval", "--steps", "5"], "opcd eval: --steps does nothing in opcd eval"),
        (["eval", "--gradient_checkpointing"], "--gradient_checkpointing does nothing in"),
        (["eval", "--resume"], "there is no option --resume"),
        (["train"], "output_dir and context must be given"),
        (["train", "--gradient_checkpointing", "yes"], "must be true or false, got 'yes'"),
        (["evaluate"], "there is no command evaluate; did you mean eval?"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "loose"], "there is no option loose"),
        (["train", "--config"], "--config: expected one argument"),
        (["train", "--config", "none.yaml"], "got none: it is not there"),
        (["chat"], "the following arguments are required: RUN"),
        (["chat", "nowhere"], "config.yaml must hold a configuration, got none"),
        (["init"], "required: FOLDER"),
    ],
)
def test_arguments_that_do_not_parse(
    capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_no_command_says_what_to_do_first(capsys: pytest.CaptureFixture) -> None:
    assert main([]) == 0
    assert "opcd init my-task" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("context: c.md\neval_data: t\n", "data:\n  context: c.md\n  test_data: t"),
        ("data: {context: a, context: b}", "'context' for the second time in line 1"),
        ("data: {contxt: a}", "there is no field 'contxt'; did you mean context?"),
        ("date: {context: a}", "got 'date'; did you mean data?"),
        ("optimizer: {temperature: 2}", "temperature must stand in the group sampling"),
        ("data: text", "the group data must hold fields, got 'text'"),
        ("optimizer: {steps: true}", "steps must be a whole number, got True"),
        ("format: 7", "must have format 1"),
        ("", "must hold settings in groups"),
        ("- a", "must hold settings in groups"),
        ("a: " + "[" * 5000, "values nested too deeply"),
        ("data: [", "in line 1"),
        ("data:\n\tcontext: x", "in line 2"),
        ('data: {context: "C:\\Users\\me.md"}', "write the path with '/', or in single quotes"),
        ("preset: [laptop]", "preset must be one of laptop, one-gpu, lora, got ['laptop']"),
        ("data: {1: x}", "there is no field 1"),
        ("models: {model: 1e3}", "model must be text, got 1000.0; put it in quotes"),
        ("models: {chat_template_args: {a: no}}", "no: write true or false, or the word in quotes"),
        ("preset: fast", "preset must be one of laptop, one-gpu, lora, got 'fast'"),
    ],
)
def test_files_that_are_no_configuration(
    capsys: pytest.CaptureFixture, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "config.yaml")]) == 2
    assert message in capsys.readouterr().err


def test_a_file_in_another_encoding(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"context: caf\xe9.md\n")
    assert main(["train", "--config", str(tmp_path / "config.yaml")]) == 2
    assert "UTF-8" in capsys.readouterr().err


def test_a_windows_path_whose_backslash_became_a_tab(
    settings: dict, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(in_groups(settings | {"context": "x"}).replace(": x", ': "C:\\temp.md"'))
    assert main(["train", "--config", str(config)]) == 2
    assert "it holds a tab or a line break" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "fields", "own"),
    [
        ("train", FIELDS, {"resume", "allow_code"}),
        ("rivals", FIELDS, {"rival", "other_context", "allow_code"}),
        (
            *("eval", MEASURING),
            {
                *("distilled", "save_to", "contender", "base_url", "served_model", "compare"),
                "allow_code",
            },
        ),
    ],
)
def test_help_explains_the_fields_of_a_command_and_no_others(
    command: str, fields: Collection[str], own: set[str], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    explained = set(re.findall(r"^  --(\w+)", text, re.MULTILINE))
    assert explained == {*fields, *own, "config", "preset", "json"}
    text = " ".join(text.split())
    assert "Limit of a completion, in tokens" in text
    trains = "by default one for the model's size" in text
    assert trains == (command != "eval")


@pytest.mark.parametrize(
    ("raised", "status"), [(KeyboardInterrupt(), 130), (Ended(signal.SIGTERM), 143)]
)
def test_a_signal_is_the_exit_status(
    raised: BaseException,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    def interrupted(_: object) -> int:
        raise raised

    monkeypatch.setattr("opcd.commands.run", interrupted)
    assert main(["serve-report", "run"]) == status
    assert "opcd serve-report: interrupted" in capsys.readouterr().err
