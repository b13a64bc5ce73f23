"""Run folders that a stranger made: each tries to run code, to lead out, or to fill the memory."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from opcd.api.results import Distilled
from opcd.cli import main
from opcd.errors import InputError
from opcd.runtime.strict_yaml import parse_yaml
from opcd.runtime.untrusted import check_header, check_run_folder, plain_name
from opcd.tasks.records import read_text


class Bomb:
    """Touches a file where it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return Path.touch, (self.canary,)


def scorer(run: Path, canary: Path) -> None:
    (run / "evil.py").write_text(
        f"open({str(canary)!r}, 'w')\ndef f(completion, answers): return 1"
    )
    _configure(run, "scorer: exact", "scorer: python:evil.py:f")


def tracker(run: Path, canary: Path) -> None:
    (run / "evil.py").write_text(f"open({str(canary)!r}, 'w')\ndef f(folder): return 1")
    _configure(run, "trackers: ''", "trackers: python:evil.py:f")


def _configure(run: Path, old: str, new: str) -> None:
    text = (run / "config.yaml").read_text()
    assert old in text
    (run / "config.yaml").write_text(text.replace(old, new))


def pickled_state(run: Path, canary: Path) -> None:
    (state,) = run.glob("checkpoints/*/trainer.pt")
    state.write_bytes(pickle.dumps(Bomb(canary)))


def pickled_weights(run: Path, canary: Path) -> None:
    (run / "final" / "model.safetensors").unlink()
    (run / "final" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(canary)))


def pickle_under_another_name(run: Path, canary: Path) -> None:
    (run / "final" / "model.safetensors").write_bytes(pickle.dumps(Bomb(canary)))


def long_header(run: Path, canary: Path) -> None:
    file = run / "final" / "model.safetensors"
    file.write_bytes((1 << 40).to_bytes(8, "little") + file.read_bytes()[8:])


def shard_elsewhere(run: Path, canary: Path) -> None:
    final = run / "final"
    (final / "model.safetensors").rename(run.parent / "stolen.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../../stolen.safetensors"}}
    (final / "model.safetensors.index.json").write_text(json.dumps(index))


def link_out_of_the_folder(run: Path, canary: Path) -> None:
    (run.parent / "secret.json").write_text("{}")
    (run / "final" / "config.json").unlink()
    (run / "final" / "config.json").symlink_to("../../secret.json")


def link_that_is_written_through(run: Path, canary: Path) -> None:
    (run / "report.md").unlink()
    (run / "report.md").symlink_to(canary)


def linked_folder(run: Path, canary: Path) -> None:
    (run / "final").rename(run / ".final")
    (run / "final").symlink_to(".final")


def pipe(run: Path, canary: Path) -> None:
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")


def own_code(run: Path, canary: Path) -> None:
    config = json.loads((run / "final" / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (run / "final" / "config.json").write_text(json.dumps(config))
    (run / "final" / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Config: pass")


def kernel_of_a_hub(run: Path, canary: Path) -> None:
    config = json.loads((run / "final" / "config.json").read_text())
    config["attn_implementation"] = "stranger/kernel"
    (run / "final" / "config.json").write_text(json.dumps(config))


def module_by_name(run: Path, canary: Path) -> None:
    (run / "final" / "adapter").mkdir()
    settings = {"megatron_config": {"a": 1}, "megatron_core": "evil"}
    (run / "final" / "adapter" / "adapter_config.json").write_text(json.dumps(settings))


def aliases(run: Path, canary: Path) -> None:
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    (run / "config.yaml").write_text("\n".join(lines))


def deep_yaml(run: Path, canary: Path) -> None:
    (run / "config.yaml").write_text("data: " + "[" * 100_000)


def deep_json(run: Path, canary: Path) -> None:
    (run / "evidence.json").write_text("[" * 1_000_000)


def long_number(run: Path, canary: Path) -> None:
    (run / "evidence.json").write_text('{"format": ' + "9" * 100_000 + "}")


def deep_model_settings(run: Path, canary: Path) -> None:
    (run / "final" / "config.json").write_text('{"a":' * 100_000)


def file_of_a_size(run: Path, canary: Path) -> None:
    os.truncate(run / "evidence.json", 1 << 40)


VERIFY = ("verify", "{run}")
EVAL = ("eval", "--config", "{run}/config.yaml", "--output_dir", "{run}")
RESUME = ("train", "--resume", "--steps", "6", *EVAL[1:])
NO_CODE = "runs no Python code that a file in a run's folder names"
HOSTILE: list[tuple[Callable[[Path, Path], None], tuple[str, ...], str]] = [
    (scorer, EVAL, f"opcd eval {NO_CODE}, got scorer"),
    (scorer, VERIFY, f"opcd verify {NO_CODE}, got scorer"),
    (scorer, RESUME, f"opcd train {NO_CODE}, got scorer"),
    *(
        (scorer, (command, *EVAL[1:]), f"opcd {command} {NO_CODE}")
        for command in ("check", "rivals", "train")
    ),
    (scorer, ("chat", "{run}", "--message", "x"), "opcd chat runs no Python code"),
    (tracker, RESUME, f"opcd train {NO_CODE}, got trackers"),
    (pickled_state, RESUME, "must hold a checkpoint of this run, got Weights only load failed"),
    (pickled_weights, EVAL, "pytorch_model.bin must not be in a run folder"),
    (pickle_under_another_name, EVAL, "must be a safetensors file with a header of at most 64 MiB"),
    (long_header, EVAL, "got a header of 1099511627776 bytes in a file of"),
    (shard_elsewhere, EVAL, "must name shards that lie beside it, got '../../stolen.safetensors'"),
    (link_out_of_the_folder, EVAL, "must be a file or a link to one in the run folder, got a link"),
    (link_that_is_written_through, EVAL, "got a link to nothing"),
    (linked_folder, EVAL, "must be a file or a link to one in the run folder, got a link"),
    (pipe, VERIFY, "metrics.jsonl must be a file, got a pipe, a socket or a device"),
    (own_code, EVAL, "which brings its own, and that is not run"),
    (kernel_of_a_hub, EVAL, "must not name code, got attn_implementation 'stranger/kernel'"),
    (module_by_name, EVAL, "must not name code, got a megatron_config"),
    (aliases, VERIFY, "the alias *a0: write out what it names in line 2"),
    (deep_yaml, VERIFY, "must hold a configuration as YAML, got values nested too deeply"),
    (deep_json, VERIFY, "got none: values nested too deeply"),
    (long_number, VERIFY, "got none: a whole number of 100000 digits"),
    (deep_model_settings, EVAL, "must be JSON, got "),
    (file_of_a_size, VERIFY, "evidence.json must have at most 256 MiB, got 1048576"),
]


@pytest.mark.parametrize(
    ("plant", "command", "message"),
    HOSTILE,
    ids=[f"{plant.__name__}-{command[0]}" for plant, command, _ in HOSTILE],
)
def test_a_hostile_folder(
    copied_run: Path,
    tmp_path: Path,
    plant: Callable[[Path, Path], None],
    command: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture,
) -> None:
    canary = tmp_path / "canary"
    plant(copied_run, canary)
    assert main([word.format(run=copied_run) for word in command]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert not canary.exists()


@pytest.mark.parametrize("way", ["--allow-code", "--scorer"])
def test_code_that_the_user_asks_for_runs(copied_run: Path, tmp_path: Path, way: str) -> None:
    canary = tmp_path / "canary"
    scorer(copied_run, canary)
    named = [way] if way == "--allow-code" else [way, f"python:{copied_run / 'evil.py'}:f"]
    assert main(["verify", str(copied_run), *named]) == 1  # it was judged by another
    assert canary.exists()


def test_a_loop_runs_no_game_that_a_file_in_a_runs_folder_names(
    copied_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    canary = tmp_path / "canary"
    (copied_run / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass G: pass")
    loop = tmp_path / "loop"
    (loop / "round-1").mkdir(parents=True)
    (loop / "evil.py").write_text((copied_run / "evil.py").read_text())
    for folder in (copied_run, loop):
        config = folder / "config.yaml"
        config.write_text(
            "models:\n  model: smollm2-135m-instruct\nrun:\n  output_dir: again\n"
            "experience:\n  game: python:evil.py:G\n"
        )
        _refused_game(config, canary, capsys)


def _refused_game(config: Path, canary: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["experience", "--config", str(config)]) == 2
    assert f"opcd experience {NO_CODE}, got game" in (capsys.readouterr().err)
    assert not canary.exists()


@pytest.mark.parametrize("command", ["check", "eval"])
def test_a_tracker_hinders_no_command_that_opens_none(
    copied_run: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture
) -> None:
    tracker(copied_run, tmp_path / "canary")
    given = [word.format(run=copied_run) for word in EVAL[1:]]
    assert main([command, *given, "--model", "./nowhere"]) == 2
    assert "model must be a folder" in capsys.readouterr().err
    assert not (tmp_path / "canary").exists()


def test_a_kernel_of_a_hub_is_refused_wherever_the_model_lies(
    settings: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from tests.conftest import in_groups

    model = tmp_path / "weights"
    shutil.copytree(settings["model"], model)
    found = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps(found | {"attn_implementation": "stranger/kernel"})
    )
    config = tmp_path / "config.yaml"
    config.write_text(in_groups(settings | {"model": str(model)}))
    assert main(["train", "--config", str(config)]) == 2
    assert "must not name code, got attn_implementation" in capsys.readouterr().err


def test_the_configuration_of_a_new_run_is_the_users_own(
    settings: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from tests.conftest import in_groups

    (tmp_path / "own.py").write_text("def f(completion, answers): return 1")
    config = tmp_path / "config.yaml"
    config.write_text(in_groups(settings | {"scorer": "python:own.py:f", "model": "./nowhere"}))
    assert main(["train", "--config", str(config)]) == 2
    assert "model must be a folder" in capsys.readouterr().err, "the scorer was no hindrance"


def test_an_honest_folder_passes(copied_run: Path) -> None:
    (copied_run / ".venv").symlink_to("/usr")  # nothing reads what is hidden
    (copied_run / "again.md").symlink_to("report.md")
    check_run_folder(copied_run)
    linked = copied_run.with_name("linked")
    linked.symlink_to(copied_run)
    check_run_folder(linked)


def test_a_run_in_a_hubs_cache_is_made_of_links(
    copied_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    repository = tmp_path / "models--me--run"
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    blobs.mkdir(parents=True)
    for i, file in enumerate(sorted(f for f in copied_run.rglob("*") if f.is_file())):
        place = snapshot / file.relative_to(copied_run)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.rename(blobs / str(i))
        place.symlink_to(os.path.relpath(blobs / str(i), place.parent))
    assert main(["verify", str(snapshot)]) == 0
    moved = tmp_path / "elsewhere"
    blobs.rename(moved)
    blobs.symlink_to(moved)
    with pytest.raises(InputError, match="must be a file or a link to one in the run folder"):
        check_run_folder(snapshot)
    shutil.rmtree(moved)
    with pytest.raises(InputError, match="a link to nothing"):
        check_run_folder(snapshot)


def test_opening_a_run_in_python_looks_first(copied_run: Path, tmp_path: Path) -> None:
    Distilled(copied_run)
    pickled_weights(copied_run, tmp_path / "canary")
    with pytest.raises(InputError, match="loads by pickle"):
        Distilled(copied_run)


@pytest.mark.parametrize("name", ["..", "a/b", "a\\b", "/a", "", "a\0b", 3, None])
def test_names_of_other_places(name: object) -> None:
    assert not plain_name(name)
    assert plain_name("model-00001-of-00002.safetensors")


def test_headers(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    for data in (b"", b"1234567", (9).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little")):
        file.write_bytes(data)
        with pytest.raises(InputError, match="must be a safetensors file"):
            check_header(file)
    file.write_bytes((2).to_bytes(8, "little") + b"{}")
    check_header(file)


def test_many_keys_take_no_square_of_time() -> None:
    assert len(parse_yaml("\n".join(f"k{i}: 1" for i in range(20_000)))) == 20_000
    with pytest.raises(ValueError, match="more than 1 MiB"):
        parse_yaml("#" * (1 << 20) + "\n")


def test_data_that_gzip_packed_have_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip

    monkeypatch.setattr("opcd.tasks.records.MOST_UNPACKED", 1000)
    file = tmp_path / "prompts.jsonl.gz"
    file.write_bytes(gzip.compress(b" " * 999 + b"x"))
    assert read_text(str(file), "prompts").endswith("x")
    file.write_bytes(gzip.compress(b" " * 1000 + b"x"))
    with pytest.raises(InputError, match="must unpack to at most"):
        read_text(str(file), "prompts")
