"""A run on a server, whole: a fake vLLM that is started, a server that runs, transformers alone."""

import json
import shutil
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

import opcd
from opcd.cli import main
from opcd.config.settings import gather
from opcd.errors import InputError
from opcd.evaluation.contenders import load_for_answers
from opcd.evaluation.savings import savings
from opcd.evaluation.verify import verify
from opcd.models.adapter import add_lora
from opcd.models.by_name import load_model
from opcd.runtime.files import write_json
from opcd.runtime.processes import are_known
from opcd.serving import in_process, measure, serve
from opcd.serving.apart import token_logprobs
from opcd.serving.process import Started, servers_folder
from opcd.serving.report import Served
from opcd.serving.wanted import Wanted
from opcd.tasks.prepare import prepare
from tests.conftest import CHATML
from tests.opcd.serving.fake_server import Behaviour

FAKE = str(Path(__file__).parent / "fake_vllm.py")
EACH_BYTES = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, width, float32
linux = pytest.mark.skipif(not are_known(), reason="servers are started on Linux")


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPCD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(Path(opcd.__file__).parent.parent))
    monkeypatch.setattr("opcd.serving.process.OFTEN_S", 0.02)
    monkeypatch.setattr(measure.Asking.__new__, "__defaults__", (150.0, (1, 3)))


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the fake says how it was started."""
    monkeypatch.setenv("FAKE_SEEN", str(tmp_path / "seen.jsonl"))
    return tmp_path / "seen.jsonl"


def answers_of(run: Path, file: Path, model: str = "final") -> None:
    """What the exported model says, as a server would have it, by the request."""
    setup = prepare(gather({}, run / "config.yaml"))
    loaded = load_for_answers(setup, str(run / model))
    found = {}
    for case, answer in zip(setup.task.test, loaded.alone(setup.task.test), strict=True):
        logprobs = token_logprobs(loaded, [case.prompt], [answer.token_ids])
        content = [
            {"top_logprobs": [{"token": f"token_id:{token}", "logprob": logprob}]}
            for token, logprob in zip(answer.token_ids, logprobs, strict=True)
        ]
        choice = {
            "token_ids": answer.token_ids,
            "finish_reason": answer.finish,
            "logprobs": {"content": content},
        }
        said = {"prompt_token_ids": case.prompt.student_ids, "choices": [choice]}
        found[case.example.messages[-1]["content"]] = said
    file.write_text(json.dumps(found))


def report(run: Path, **wanted: Any) -> Served:
    given: dict = {"requests": 3, "max_minutes": 0.2} | wanted
    return serve.serve_report(run, gather({}, run / "config.yaml"), Wanted(**given))


@linux
def test_a_server_is_started_for_each(
    copied_run: Path, seen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers_of(copied_run, tmp_path / "answers.json")
    monkeypatch.setenv("FAKE_ANSWERS", str(tmp_path / "answers.json"))
    found = report(copied_run, server_python=FAKE)
    assert list(servers_folder().iterdir()) == []
    starts = [json.loads(line) for line in seen.read_text().splitlines()]
    models = [start["argv"][start["argv"].index("--model") + 1] for start in starts]
    base = gather({}, copied_run / "config.yaml").model
    assert models == [base, base, str(copied_run / "final")]
    assert ["--enable-prefix-caching" in start["argv"] for start in starts] == [False, True, True]
    assert all(start["files"] == [] for start in starts), "where it starts nothing lies"
    assert len({start["environ"]["VLLM_API_KEY"] for start in starts}) == 3
    assert found.agrees
    assert list(found.same) == ["distilled, float32"]
    assert list(found.contenders) == ["prompted", "prompted_cached", "distilled"]
    cached, alone = (found.contenders[n].figures for n in ("prompted_cached", "distilled"))
    assert cached.cached_tokens == 4, "Answer with one letter."
    assert alone.cached_tokens == 0
    assert cached.prompt_tokens - alone.prompt_tokens == 4
    # In blocks of 8 tokens; 100 of them.
    assert found.contenders["distilled"].room.fits == 100 * 8 // 16
    assert found.contenders["distilled"].room.bytes_per_token == EACH_BYTES
    assert found.verdict.word != "drop the prompt", "ten requests are too few to know"
    assert any("training took" in line for line in found.summary)
    assert any("no claim about GPUs" in line for line in found.summary)
    written = json.loads((copied_run / "serving.json").read_text())
    assert written["verdict"]["word"] == found.verdict.word
    assert written["contenders"]["distilled"]["loads"][1]["at_once"] == 3
    text = (copied_run / "report.md").read_text()
    assert "## What it saves" in text
    assert "| prompted_cached |" in text
    page = (copied_run / "report.html").read_text()
    assert "What it saves" in page
    assert "no claim about GPUs" in page
    # What was written anew is in the evidence.
    verified = verify(copied_run, gather({}, copied_run / "config.yaml"))
    assert verified.agrees, verified.lines
    (copied_run / "serving.json").write_text(json.dumps(written | {"summary": ["free"]}))
    assert not verify(copied_run, gather({}, copied_run / "config.yaml")).agrees


@linux
def test_with_an_adapter_there_is_one_more(
    copied_run: Path, seen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a server that answers otherwise than what was exported, as with old weights, is found."""
    config = gather({}, copied_run / "config.yaml")
    adapted = add_lora(load_model(config.model, torch.float32), 4, 8)
    adapted.get_base_model().model.layers[0].mlp.down_proj.lora_B["default"].weight.data.fill_(1)
    adapted.save_pretrained(copied_run / "final" / "adapter")
    answers_of(copied_run, tmp_path / "answers.json", "final/adapter")
    monkeypatch.setenv("FAKE_ANSWERS", str(tmp_path / "answers.json"))
    arguments = ["serve-report", str(copied_run), "--server-python", FAKE, "--requests", "1"]
    assert main([*arguments, "--max-minutes", "0.1", "--json"]) == 1
    assert "THE SERVED MODEL IS NOT THE MEASURED MODEL" in (copied_run / "report.md").read_text()
    found = json.loads((copied_run / "serving.json").read_text())
    assert list(found["contenders"])[-1] == "adapter"
    assert found["same_answers"]["adapter, float32"]["agrees"]
    assert not found["same_answers"]["distilled, float32"]["agrees"]
    last = json.loads(seen.read_text().splitlines()[-1])["argv"]
    assert last[last.index("--max-lora-rank") + 1] == "8"
    assert f"adapter={copied_run / 'final' / 'adapter'}" in last


@linux
def test_in_16_bits_a_server_is_started_once_more(
    copied_run: Path, seen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers_of(copied_run, tmp_path / "answers.json")
    monkeypatch.setenv("FAKE_ANSWERS", str(tmp_path / "answers.json"))
    config = gather({"dtype": "bfloat16"}, copied_run / "config.yaml")
    found = serve.serve_report(
        copied_run, config, Wanted(server_python=FAKE, requests=1, max_minutes=0.1)
    )
    assert list(found.same) == ["distilled, bfloat16", "distilled, float32"]
    starts = [json.loads(line)["argv"] for line in seen.read_text().splitlines()]
    dtypes = [argv[argv.index("--dtype") + 1] for argv in starts]
    assert dtypes == ["bfloat16"] * 3 + ["float32"]


@linux
def test_what_cannot_be_compared_costs_no_figures(
    copied_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers_of(copied_run, tmp_path / "answers.json")
    monkeypatch.setenv("FAKE_ANSWERS", str(tmp_path / "answers.json"))
    monkeypatch.setenv("FAKE_TROUBLE", "float32")  # no room for it
    config = gather({"dtype": "bfloat16"}, copied_run / "config.yaml")
    wanted = Wanted(server_python=FAKE, requests=1, max_minutes=0.1)
    found = serve.serve_report(copied_run, config, wanted)
    assert list(found.contenders) == ["prompted", "prompted_cached", "distilled"]
    assert list(found.same) == ["distilled, bfloat16"]
    assert "no room for the weights" in found.failed["distilled, float32"]
    assert found.agrees == found.same["distilled, bfloat16"].agrees
    assert any("was not compared (distilled, float32)" in line for line in found.summary)

    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("opcd.serving.ways.compared", no_room)
    found = serve.serve_report(copied_run, config, wanted)
    assert not found.agrees, "in no dtype"
    written = json.loads((copied_run / "serving.json").read_text())
    assert "out of memory" in written["not_compared"]["distilled, bfloat16"]


@linux
def test_a_server_without_adapters_is_measured_all_the_same(
    copied_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = gather({}, copied_run / "config.yaml")
    adapted = add_lora(load_model(config.model, torch.float32), 4, 8)
    adapted.save_pretrained(copied_run / "final" / "adapter")
    answers_of(copied_run, tmp_path / "answers.json")
    monkeypatch.setenv("FAKE_ANSWERS", str(tmp_path / "answers.json"))
    monkeypatch.setenv("FAKE_TROUBLE", "lora")
    found = report(copied_run, server_python=FAKE, requests=1)
    assert list(found.contenders) == ["prompted", "prompted_cached", "distilled"]
    assert list(found.failed) == ["adapter"]
    assert not found.agrees


@linux
def test_a_template_with_a_date_is_that_of_the_day(
    copied_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run keeps the day that it began on; a server's template does not."""
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%d %B %Y') }}" + CHATML)
    config = gather({}, copied_run / "config.yaml")
    config = replace(config, chat_template=str(template), today="2026-01-02")
    asked, real = [], serve.in_process

    def way(run: Any, *rest: Any) -> Any:
        asked.append(run.setup.config.today)
        return real(run, *rest)

    monkeypatch.setattr(serve, "in_process", way)
    found = serve.serve_report(copied_run, config, Wanted(requests=1))
    assert asked == [date.today().isoformat()]
    assert any("the run has 2026-01-02" in line for line in found.how)


@linux
@pytest.mark.parametrize("trouble", ["dies", "deaf"])
def test_a_server_that_does_not_come_up_leaves_nothing(
    copied_run: Path,
    trouble: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv("FAKE_TROUBLE", trouble)
    monkeypatch.setattr(Started.wait_until, "__defaults__", (1.0,))
    before = sorted(path.name for path in copied_run.iterdir())
    assert main(["serve-report", str(copied_run), "--server-python", FAKE]) == 2
    said = capsys.readouterr().err
    wanted = {"dies": "no room for the weights", "deaf": "loading for ever"}[trouble]
    assert wanted in said
    assert list(servers_folder().iterdir()) == []
    assert sorted(path.name for path in copied_run.iterdir()) == before


def test_a_server_that_runs(copied_run: Path, url: str, behaviour: Behaviour) -> None:
    behaviour.models, behaviour.caching = ["large", "small"], True
    given = {"base_url": url, "served_model": "large", "served_distilled": "small"}
    found = report(copied_run, **given, requests_a_day=100)
    assert list(found.contenders) == ["prompted_cached", "distilled"]
    assert {body["model"] for body in behaviour.bodies} == {"large", "small"}
    with_prompt = [b for b in behaviour.bodies if b["model"] == "large"]
    assert all(b["messages"][0]["content"] == "Answer with one letter." for b in with_prompt)
    assert found.same == {}
    (paid,) = found.break_even
    assert paid.training is None
    assert any("are not those of the server's device" in line for line in paid.lines)
    priced = {"price_fresh": 2.0, "price_cached": 0.2, "price_hour": 1.0}
    _, money = report(copied_run, **given, **priced).break_even
    assert money.unit == "price"
    assert money.training is not None
    assert money.saved.median == pytest.approx(4 * 0.2 / 1e6)


def test_one_model_is_asked_with_and_without(
    copied_run: Path, url: str, behaviour: Behaviour, monkeypatch: pytest.MonkeyPatch
) -> None:
    behaviour.details = False
    found = report(copied_run, base_url=url)
    assert list(found.contenders) == ["prompted", "distilled"]
    assert found.break_even == []
    assert "was not measured behind a server's prefix cache" in found.verdict.reason
    assert any("takes as long" in line for line in found.how)


def test_without_a_server_it_is_transformers(copied_run: Path) -> None:
    found = report(copied_run, requests=4)
    assert list(found.contenders) == ["prompted", "prompted_cached", "distilled"]
    whole, cached, alone = (c.figures for c in found.contenders.values())
    assert whole.prompt_tokens == cached.prompt_tokens > alone.prompt_tokens
    setup = prepare(gather({}, copied_run / "config.yaml"))
    assert cached.cached_tokens == len(setup.task.a_prefix)
    assert "no server is installed" in found.how[0]
    assert found.break_even[0].training is not None, "trained on this very device"
    assert [load.at_once for load in alone.loads] == [1]
    assert alone.first_s.n == 4
    adapted = add_lora(load_model(setup.config.model, torch.float32), 4, 8)
    adapted.save_pretrained(copied_run / "final" / "adapter")
    assert "adapter" in report(copied_run, requests=1).contenders


def test_a_prefix_that_is_kept_gives_the_same_as_reading_all(copied_run: Path) -> None:
    """The cache is cut back behind each request."""
    setup = prepare(gather({}, copied_run / "config.yaml"))
    model = setup.load(setup.config.model)
    prefix = setup.task.a_prefix
    said: list[int] = []

    def watched(lm: Any, ids: Any, cache: Any) -> torch.Tensor:
        token = read(lm, ids, cache)
        said.append(int(token))
        return token

    read = in_process._read
    prompts = [case.prompt.teacher_ids for case in setup.task.test[:4]]
    asking = measure.Asking(3, {}, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_process, "_read", watched)
        in_process.measured_here(model, [[*prefix, *p] for p in prompts], asking)
        whole, said[:] = [*said], []
        in_process.measured_here(model, prompts, asking, prefix)
    assert len(whole) == 18, "three tokens of two requests to warm up, and of four"
    assert said[1:] == whole, "behind the token that follows the prefix alone"


def test_a_model_after_this_one_has_no_savings(copied_run: Path) -> None:
    report(copied_run, requests=1)
    assert savings(copied_run) is not None
    selection = json.loads((copied_run / "final" / "selection.json").read_text())
    write_json(copied_run / "final" / "selection.json", selection | {"step": 2})
    assert savings(copied_run) is None


def test_from_python(copied_run: Path) -> None:
    found = opcd.serve_report(copied_run, requests=1, quiet=True)
    assert found.table[0][1] == "prompt tokens"
    assert len(found.table) == 4
    with pytest.raises(InputError, match=r"no argument 'reqests'; did you mean requests\?"):
        opcd.serve_report(copied_run, reqests=1)
    text = (copied_run / "config.yaml").read_text()
    code = text.replace("scorer: exact", "scorer: python:evil.py:score")
    assert code != text
    (copied_run / "config.yaml").write_text(code)
    with pytest.raises(InputError, match=r"runs no Python code .* names, got scorer"):
        opcd.serve_report(copied_run)
    assert main(["serve-report", str(copied_run)]) == 2


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"requests": 0}, "requests must be a positive number"),
        ({"max_minutes": float("nan")}, "max_minutes must be a positive number"),
        ({"price_fresh": -1.0, "price_cached": 0.0}, "price_fresh must be a price"),
        ({"price_fresh": 1.0}, "of fresh and of cached tokens, got one of them; pass both"),
        ({"price_hour": 1.0}, "price_hour must come with price_fresh"),
        ({"served_model": "x"}, "must come with a server, got none"),
        ({"base_url": "http://x/v1", "server_python": "y"}, "leave one out"),
    ],
)
def test_what_cannot_be(wanted: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Wanted(**wanted).check()


def test_what_is_no_run(
    copied_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["serve-report", str(tmp_path / "none")]) == 2
    (copied_run / "final" / "weights.bin").write_bytes(b"\x80\x04")
    with pytest.raises(InputError, match="loads by pickle, which can run code"):
        report(copied_run)
    shutil.rmtree(copied_run / "final")
    with pytest.raises(InputError, match="there must be a distilled model, got no folder"):
        report(copied_run)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("scorecard.json", '{"contenders": []}'),
        ("scorecard.json", '{"contenders": {"prompted": {"mean_completion_tokens": NaN}}}'),
        ("scorecard.json", '{"verdict": 7}'),
        ("metrics.jsonl", '{"step": 1, "step_time_s": "long"}'),
        ("metrics.jsonl", '{"step": 1, "validation": 3}'),
    ],
)
def test_a_strangers_files_are_refused(copied_run: Path, file: str, text: str) -> None:
    """Before anything is measured."""
    (copied_run / file).write_text(text)
    with pytest.raises(InputError, match="must be as opcd writes them"):
        report(copied_run)
    assert not (copied_run / "serving.json").exists()


def test_figures_that_no_report_can_be_made_of(copied_run: Path) -> None:
    """What was measured is kept."""
    write_json(copied_run / "scorecard.json", {"contenders": {"prompted": {}}})
    with pytest.raises(InputError, match="must be as opcd writes them"):
        report(copied_run, requests=1)
    assert (copied_run / "serving.json").is_file()
