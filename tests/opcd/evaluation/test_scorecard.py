"""The scorecard's numbers."""

import json
import re
import shutil
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opcd.config import TrainConfig
from opcd.config.settings import gather
from opcd.errors import InputError
from opcd.evaluation.contenders import Answer, Contender, answers_of
from opcd.evaluation.evaluate import Evaluation, evaluate
from opcd.evaluation.intervals import PerRequest, paired_difference, wilson_interval
from opcd.evaluation.report import before_after, scorecard_facts, scorecard_table
from opcd.evaluation.scorecard import (
    accuracy,
    classes_of,
    internalised,
    scorecard,
)
from opcd.models.by_name import load_model
from opcd.models.lm import eos_token_ids
from opcd.passes.plan import find_plan
from opcd.rollouts.choice import build_engine
from opcd.rollouts.noise import HELD_OUT
from opcd.rollouts.protocol import Rollout, SamplingParams, complete
from opcd.runtime.files import read_metrics
from opcd.runtime.progress import Progress
from opcd.scoring.scorers import Score, Scorer, load_scorer
from opcd.tasks.messages import user
from opcd.tasks.prepare import Setup, prepare
from opcd.tasks.task import Case, spread
from opcd.training.evaluate import evaluate_run
from opcd.training.run import train
from tests.conftest import tiny_llama, tiny_tokenizer, write_jsonl

GREEDY = SamplingParams(8, temperature=0.0)


class Heard(Progress):
    """What a run tells."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said += text.splitlines()


def test_wilson_interval() -> None:
    """Newcombe (1998), table I: 81 of 263 and 0 of 20."""
    assert wilson_interval(81, 263) == pytest.approx([0.2553, 0.3662], abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx([0.0, 0.1611], abs=5e-5)
    assert wilson_interval(20, 20)[1] == 1.0


def test_internalised() -> None:
    assert internalised(0.2, 0.8, 0.65) == pytest.approx(0.75)
    assert internalised(0.5, 0.5, 0.9) is None
    assert internalised(0.6, 0.5, 0.9) is None


@pytest.fixture
def evaluation(settings: dict, tmp_path: Path) -> Evaluation:
    """A model that always says "a" and stops, against one that never stops."""
    setup = prepare(TrainConfig(**settings))
    distilled = load_model(setup.config.model, torch.float32)
    letter = setup.tokenizer("a")["input_ids"][0]
    with torch.no_grad():
        for layer in distilled.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        # Without layers the next token depends on the last one alone: newline -> a -> EOS.
        embed = distilled.model.embed_tokens.weight
        newline = setup.tokenizer("\n")["input_ids"][0]
        distilled.lm_head.weight.zero_()
        distilled.lm_head.weight[letter] = embed[newline] * 10
        distilled.lm_head.weight[eos_token_ids(distilled)[0]] = embed[letter] * 10
    distilled.save_pretrained(tmp_path / "distilled")
    return evaluate(setup, str(tmp_path / "distilled"), Progress())


def test_scorecard(evaluation: Evaluation, settings: dict) -> None:
    card, answers = evaluation.card, evaluation.answers
    assert json.loads(json.dumps(card)) == card
    assert [card[name] for name in ("context", "model", "teacher")] == [
        settings["context"],
        settings["model"],
        settings["model"],
    ]
    assert card["distilled"].endswith("/distilled")
    names = ["base", "prompted", "distilled", "distilled_prompted"]
    assert list(card["contenders"]) == names, "in the order in which people read them"
    distilled = card["contenders"]["distilled"]
    assert distilled["meaning"] == "after, without the context"
    assert distilled["accuracy"] == 0.25  # "ant" of cat, dog, owl, ant
    assert distilled["accuracy_interval_95"] == pytest.approx([0.0456, 0.6994], abs=1e-4)
    assert distilled["n"] == 4
    assert distilled["mean_completion_tokens"] == 2
    assert distilled["truncated_share"] == 0
    assert card["contenders"]["base"]["truncated_share"] > 0
    assert card["internalised"] is None  # the random model gains nothing from its prompt
    assert card["divergence"]["before"] > 0
    assert card["divergence"]["after"] > 0
    system = "<|im_start|>system\nAnswer with one letter.<|im_end|>\n"
    assert card["prompt_tokens_saved"] == len(system) - len("<|im_start|><|im_end|>") + 2
    assert [row["distilled_right"] for row in answers] == [False, False, False, True]
    assert answers[0]["distilled"] == "a"
    assert answers[0]["accepted"] == ["c"]


def test_anything_that_answers_is_a_contender(settings: dict) -> None:
    """Two that know no model: one is always right, one hears the prompt's first letter as z."""
    task = prepare(TrainConfig(**settings)).task

    def right(cases: Sequence[Case]) -> list[Answer]:
        return [Answer(case.example.answers[0], [0], "stop", "") for case in cases]

    def wrong(cases: Sequence[Case]) -> list[Answer]:
        return [Answer("z", [0] * 7, "length", "z") for _ in cases]

    contenders = [Contender("oracle", "knows", right), Contender("deaf", "guesses", wrong)]
    answers = {c.name: c.answer(task.test) for c in contenders}
    columns, rows = scorecard(contenders, answers, answers["oracle"], task.test, task.scorer)
    assert columns["oracle"]["accuracy"] == 1
    assert columns["deaf"]["accuracy"] == 0
    assert columns["deaf"]["mean_completion_tokens"] == 7
    assert columns["deaf"]["truncated_share"] == 1
    assert rows[1]["oracle"] == "d"
    assert rows[1]["deaf_right"] is False
    assert "reasoning_share" not in columns["oracle"]
    assert "rates" not in columns["oracle"]


def card_of(
    settings: dict, answers: list[str], judge: Callable[[str, Sequence[str]], Score]
) -> tuple[dict, list[dict]]:
    """What one contender's four answers to cat, dog, owl and ant are worth to a function."""
    task = prepare(TrainConfig(**settings)).task
    scorer = Scorer("python:m:f", lambda it: judge(it.completion, it.answers), None)
    given = {"it": [Answer(text, [0], "stop", text) for text in answers]}
    columns, rows = scorecard(
        [Contender("it", "says", list)], given, given["it"], task.test, scorer
    )
    return {"contenders": columns}, rows


def test_rates_of_classes_are_balanced(settings: dict) -> None:
    """Cat is a class of its own: 1 of 1, and of the other three 1."""

    def judge(answer: str, accepted: Sequence[str]) -> Score:
        right = float(answer == "yes")
        return Score(right, {"cats" if accepted[0] == "c" else "others": right})

    card, rows = card_of(settings, ["yes", "yes", "no", "no"], judge)
    column = card["contenders"]["it"]
    assert column["accuracy"] == 0.5
    assert column["rates"] == {
        "cats": {"mean": 1.0, "n": 1},
        "others": {"mean": pytest.approx(1 / 3), "n": 3},
    }
    assert column["balanced_accuracy"] == pytest.approx(2 / 3)
    assert rows[2]["it_rates"] == {"others": 0.0}
    table = [line.split() for line in scorecard_table(card).splitlines()[-4:]]
    assert table == [
        ["it"],
        ["cats", "(1)", "100.0%"],
        ["others", "(3)", "33.3%"],
        ["balanced", "66.7%"],
    ]


def test_few_answers_are_classes(settings: dict) -> None:
    """Of a built-in scorer; the better class cannot hide the worse one behind its number."""
    test = Path(settings["test_data"])
    rows = [{"prompt": f"n {i}", "answer": "a" if i < 15 else "b"} for i in range(20)]

    def columns(rows: list[dict]) -> dict:
        write_jsonl(test, rows)
        task = prepare(TrainConfig(**settings)).task
        always = Contender(
            "always a", "", lambda cases: [Answer("a", [0], "stop", "a")] * len(cases)
        )
        answers = {always.name: always.answer(task.test)}
        return scorecard([always], answers, answers[always.name], task.test, task.scorer)[0][
            "always a"
        ]

    found = columns(rows)
    assert found["accuracy"] == 0.75
    assert found["rates"] == {"a": {"mean": 1.0, "n": 15}, "b": {"mean": 0.0, "n": 5}}
    assert found["balanced_accuracy"] == 0.5
    assert "rates" not in columns(rows[:19]), "a class of four"
    assert "rates" not in columns(rows[:15]), "one class"
    assert classes_of([]) is None
    spelled = [r | {"answer": "A."} if i < 7 else r for i, r in enumerate(rows)]
    assert columns(spelled)["rates"]["a"]["n"] == 15, "spellings of one label are one class"
    assert "rates" not in columns([*rows, {"prompt": "n 20", "answer": ["a", "b"]}])
    assert "rates" not in columns([r | {"answer": f"{i % 11}"} for i, r in enumerate(rows)])


def test_names_cannot_break_a_table(settings: dict) -> None:
    test = Path(settings["test_data"])
    names = ["a" * 60, "two\nlines", "a|b", "\x1b[31mred"]
    write_jsonl(test, [{"prompt": f"n {i}", "answer": names[i % 4]} for i in range(20)])
    task = prepare(TrainConfig(**settings)).task
    given = {"it": [Answer("a", [0], "stop", "a")] * 20}
    columns, _ = scorecard(
        [Contender("it", "says", list)], given, given["it"], task.test, task.scorer
    )
    table = scorecard_table({"contenders": columns}).splitlines()
    shown = [line.removesuffix("0.0%").rstrip() for line in table[-5:-1]]
    assert shown == ["[31mred (5)", "a" * 39 + "… (5)", "a|b (5)", "two lines (5)"]


def test_answers_that_name_several_labels_are_counted(settings: dict) -> None:
    """Of `contains`, which finds them right; a label within the right one is no other."""
    test = Path(settings["test_data"])
    labels = ["refund", "refund status", "delivery"]
    rows = [{"prompt": f"n {i}", "answer": labels[i % 3]} for i in range(15)]
    said = {"refund": "refund, delivery", "refund status": "Refund status.", "delivery": "refund"}

    def share(rows: list[dict], scorer: str = "contains") -> float:
        write_jsonl(test, rows)
        cases = prepare(TrainConfig(**settings)).task.test
        texts = [said.get(case.example.answers[0], "refund, delivery") for case in cases]
        given = {"it": [Answer(text, [0], "stop", text) for text in texts]}
        contender = Contender("it", "says", list)
        columns, _ = scorecard([contender], given, given["it"], cases, load_scorer(scorer))
        return columns["it"].get("several_labels_share", 0)

    assert share(rows) == pytest.approx(1 / 3)
    assert share(rows, "regex:(refund)") == 0
    assert share(rows[:14]) == 0, "too few of each for labels"
    assert share([*rows, {"prompt": "n 15", "answer": ["refund", "delivery"]}]) == 0
    said["refund"] = "refund"
    assert share(rows) == 0


def test_answers_name_their_context(settings: dict, tmp_path: Path) -> None:
    contexts = {"bank": "Answer with one letter.", "shop": "Answer with two letters."}
    (tmp_path / "contexts.json").write_text(json.dumps(contexts))
    for name in ("prompts", "validation_data", "test_data"):
        rows = [json.loads(line) for line in Path(settings[name]).read_text().splitlines()]
        rows = [row | {"context": ["bank", "shop"][i % 2]} for i, row in enumerate(rows)]
        write_jsonl(Path(settings[name]), rows)
    task = prepare(TrainConfig(**settings | {"context": str(tmp_path / "contexts.json")})).task
    given = {"it": [Answer("a", [0], "stop", "a")] * 4}
    _, rows = scorecard([Contender("it", "says", list)], given, given["it"], task.test, task.scorer)
    assert [row["context"] for row in rows] == ["bank", "shop", "bank", "shop"]


def test_rates_of_every_item_are_not_balanced(settings: dict) -> None:
    def judge(answer: str, accepted: Sequence[str]) -> Score:
        return Score(0.75, {"form": 1.0, "topic": 0.5})

    card, rows = card_of(settings, ["a"] * 4, judge)
    column = card["contenders"]["it"]
    assert column["accuracy"] == 0.75
    assert column["accuracy_interval_95"] == pytest.approx(wilson_interval(3, 4))
    assert column["rates"] == {"form": {"mean": 1.0, "n": 4}, "topic": {"mean": 0.5, "n": 4}}
    assert "balanced_accuracy" not in column
    assert [row["it_right"] for row in rows] == [0.75] * 4
    assert "75% base" in before_after([{**rows[0], "base": "a", "base_right": 0.75}])


def test_reasoning_is_counted_and_not_judged(settings: dict) -> None:
    task = prepare(TrainConfig(**settings)).task
    texts = ["<think>d</think>c", "<think>d", "o", "<think></think>a"]
    given = {"it": [Answer(text, [0], "stop", text) for text in texts]}
    columns, rows = scorecard(
        [Contender("it", "says", list)], given, given["it"], task.test, task.scorer
    )
    assert [row["it_right"] for row in rows] == [True, False, True, True]
    assert columns["it"]["reasoning_share"] == 0.5


def test_remarks_on_the_data_reach_people(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scorer_of_labels.py").write_text("def f(c, a): return c == 'never'\n")
    monkeypatch.chdir(tmp_path)
    heard = Heard()
    config = TrainConfig(**settings | {"scorer": "python:scorer_of_labels:f"})
    evaluate_run(config, "none", str(tmp_path / "out"), heard)
    labels = "note      accepted answers are labels to scorer python:scorer_of_labels:f: as a comp"
    assert heard.said[2].startswith(labels)
    assert "none of the 7 would" in heard.said[2]
    heard.said.clear()
    train(replace(config, steps=1, test_data=None), progress=heard)
    assert any(line.startswith(labels) and "of the 3 would" in line for line in heard.said)


def divergence_in_full(setup: Setup, student: object, teacher: object, cases: list[Case]) -> float:
    """Mean over all sampled tokens, by whole sequences and all logits."""
    engine = build_engine("generate", student, 32, find_plan(student, setup.task.a_prefix))
    params = SamplingParams(setup.config.max_completion_tokens, setup.config.temperature)
    episodes = complete(engine, [c.prompt for c in cases], params, setup.config.seed, HELD_OUT)
    found = []
    for episode in episodes:
        count = len(episode.scored_ids)
        both = (
            (student, episode.student_ids),
            (teacher, [*setup.task.a_prefix, *episode.teacher_ids]),
        )
        ours, theirs = (
            model(torch.tensor([ids])).logits[0, -count - 1 : -1].log_softmax(-1)
            for model, ids in both
        )
        found.append((ours.exp() * (ours - theirs)).sum(-1))
    assert len({len(kl) for kl in found}) > 1, "else a mean of means is the same"
    return torch.cat(found).mean().item()


@torch.no_grad()
def test_the_divergence_is_that_of_all_tokens_of_the_prompts_to_the_teacher(settings: dict) -> None:
    """In the scorecard and in validation."""
    folder = Path(settings["output_dir"]).parent
    for seed, name in enumerate(("model", "teacher")):
        ends = list(range(1, 60))  # so that completions have several lengths
        tiny_llama(seed, eos_token_id=ends).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
        settings[name] = str(folder / name)
    setup = prepare(TrainConfig(**settings | {"divergence_prompts": 3}))
    base, teacher = (load_model(settings[name], torch.float32) for name in ("model", "teacher"))
    test = setup.task.test
    card = evaluate(setup, None, Progress()).card
    expected = divergence_in_full(setup, base, teacher, [test[0], test[1], test[2]])
    assert card["divergence"]["before"] == pytest.approx(expected, rel=1e-4)
    assert card["divergence"]["prompts"] == 3
    assert card["teacher"] == settings["teacher"]
    columns = card["contenders"]
    assert list(columns) == ["base", "prompted", "teacher"]
    assert columns["teacher"]["meaning"] == "teacher, with the context"
    assert columns["teacher"]["greedy_agreement"]["mean"] == 1.0
    assert columns["prompted"]["greedy_agreement"]["mean"] < 1.0
    gain = columns["teacher"]["accuracy"] - columns["base"]["accuracy"]
    assert card["differences"]["gain"]["mean"] == gain

    config = TrainConfig(**settings | {"steps": 1, "test_data": None})
    with torch.enable_grad():
        train(config)
    run = Path(settings["output_dir"])
    _, metrics = read_metrics(run / "metrics.jsonl")
    student = load_model(str(run / "final"), torch.float32)
    expected = divergence_in_full(setup, student, teacher, setup.task.validation)
    assert metrics["validation"]["divergence"] == pytest.approx(expected, rel=1e-4)
    selection = json.loads((run / "final" / "selection.json").read_text())
    assert selection["how"].startswith("step 1 of 1, the only one validated (accuracy ")


def test_an_evaluation_names_files_that_are_there(settings: dict, tmp_path: Path) -> None:
    folder, _ = evaluate_run(TrainConfig(**settings), "none")
    assert folder == tmp_path / "run" / "eval-none-test"
    named = re.findall(r"`(\w+\.\w+)`", (folder / "report.md").read_text(encoding="utf-8"))
    assert named == ["answers.jsonl", "answers.csv", "config.yaml"]
    assert all((folder / name).is_file() for name in named)
    assert gather({}, folder / "config.yaml").model == settings["model"]
    (folder / "metrics.jsonl").write_text("{}\n")  # as if it were a run
    with pytest.raises(InputError, match="must not be the folder of a run, whose scorecard"):
        evaluate_run(TrainConfig(**settings), "none", str(folder))


def test_a_distilled_model_of_another_tokenizer_is_refused(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same size, with two tokens exchanged; before weights are loaded."""
    shutil.copytree(settings["model"], tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(content), encoding="utf-8")
    setup = prepare(TrainConfig(**settings))
    monkeypatch.setattr(Setup, "load", None)  # it must not be called
    message = "distilled model and base must share one tokenizer, got 258 and 258 tokens of which 4"
    with pytest.raises(InputError, match=message):
        evaluate(setup, str(tmp_path / "other"), Progress())


def test_what_a_model_is_given_is_said_and_must_be_what_it_was_trained_on(settings: dict) -> None:
    """A run's model is scored on the prompts of its training, or named to try others."""
    settings |= {"steps": 1, "test_data": None, "without_context": "You are Ada."}
    train(TrainConfig(**settings))
    settings |= {"test_data": str(Path(settings["output_dir"]).parent / "test.jsonl")}
    heard = Heard()
    evaluate_run(TrainConfig(**settings), progress=heard)
    assert heard.said == [
        "without   '<|im_start|>system\\nYou are Ada.<|im_end|>\\n<|im_start|>user\\n' stands in "
        "front of a request",
        "answers   end with <|im_end|>, or at 8 tokens",
        "note      not as in training: test_data",
    ]
    run, folder = Path(settings["output_dir"]), Path(settings["output_dir"]).parent
    final = str(run / "final")
    config = TrainConfig(**settings | {"without_context": "default"})
    with pytest.raises(InputError, match=r"other values for without_context than in"):
        evaluate_run(config)
    evaluate_run(config, final)
    moved = folder / "moved"
    shutil.copytree(run, moved)
    shutil.rmtree(run)
    settings |= {"output_dir": str(moved)}
    evaluate_run(TrainConfig(**settings))
    folders = sorted(p.name for p in moved.iterdir())
    tiny_llama(hidden_size=64).save_pretrained(folder / "other")
    tiny_tokenizer().save_pretrained(folder / "other")
    with pytest.raises(InputError, match=r"got hidden_size 32 in .* against 64"):
        evaluate_run(TrainConfig(**settings | {"model": str(folder / "other")}))
    assert sorted(p.name for p in moved.iterdir()) == folders, "an empty folder is left"
    (folder / "context.md").write_text("Answer with two letters.", encoding="utf-8")
    with pytest.raises(
        InputError, match="other tokens around a request than in training, with other files"
    ):
        evaluate_run(TrainConfig(**settings))
    (moved / "final" / "selection.json").write_text('{"st', encoding="utf-8")
    with pytest.raises(InputError, match=r"selection\.json must say how the model was chosen"):
        evaluate_run(TrainConfig(**settings))
    (moved / "final" / "selection.json").unlink()
    _, found = evaluate_run(TrainConfig(**settings))
    assert "selection" not in found.card
    (moved / "config.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(InputError, match=r"config\.yaml must hold a configuration as YAML"):
        evaluate_run(TrainConfig(**settings))


def test_one_model_is_in_memory_at_a_time(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = prepare(TrainConfig(**settings))
    alive: list[weakref.ref] = []
    load = Setup.load

    def watched(self: Setup, name: str, *dtype: torch.dtype) -> object:
        assert not any(ref() is not None for ref in alive), "the model before is still there"
        model = load(self, name, *dtype)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(Setup, "load", watched)
    copy = Path(settings["output_dir"]).parent / "copy"
    shutil.copytree(settings["model"], copy)
    evaluate(setup, str(copy), Progress())
    assert len(alive) == 3  # the teacher again, to score what the distilled model says
    assert not any(ref() is not None for ref in alive)


def test_equal_prompts_are_answered_once(settings: dict) -> None:
    setup = prepare(TrainConfig(**settings))
    asked: list[int] = []

    class Echo:
        def generate(self, prompts: Sequence, params: SamplingParams, _: Any) -> list[Rollout]:
            asked.append(len(prompts))
            return [Rollout(p, [p[-1] + 2], "stop", 0) for p in prompts]

    answers = answers_of(Echo(), [[40], [50], [40]], [1, 2, 3], GREEDY, setup)
    assert asked == [2]
    assert [a.text for a in answers] == [setup.chat.decode([x]) for x in (42, 52, 42)]
    answers_of(Echo(), [[40], [50], [40]], [1, 2, 3], SamplingParams(8, 0.7), setup)
    assert asked == [2, 3], "each draws for itself"


def test_a_scorer_sees_special_tokens(settings: dict) -> None:
    setup = prepare(TrainConfig(**settings))
    stop = setup.tokenizer.eos_token_id

    class Stopping:
        def generate(self, prompts: Sequence, params: SamplingParams, _: Any) -> list[Rollout]:
            return [Rollout(p, [40, stop] if p[-1] > 45 else [40], "stop", 0) for p in prompts]

    answers = answers_of(Stopping(), [[40], [50], [40], [50]], [0] * 4, GREEDY, setup)
    scorer = Scorer("python:m:f", lambda it: Score("<|im_end|>" in it.raw, {}), None)
    assert accuracy(answers[:3], setup.task.test[:3], scorer, [""] * 3) == pytest.approx(1 / 3)


def test_what_people_read(evaluation: Evaluation) -> None:
    card, answers = evaluation.card, evaluation.answers
    table = scorecard_table(card)
    assert "25.0%" in table
    assert "4.6% – 69.9%" in table
    assert "nothing to take over" in " ".join(scorecard_facts(card))
    shown = before_after(answers)
    assert shown.count("distilled") == 4
    assert "✓ distilled  a" in shown


def a_card(**accuracies: float) -> dict:
    columns = {
        name: {
            "meaning": "",
            "accuracy": accuracy,
            "accuracy_interval_95": wilson_interval(100 * accuracy, 100),
            "greedy_agreement": {"mean": 0.5, "interval_95": [0.4, 0.6], "requests": 100},
            "n": 100,
            "truncated_share": 0.0,
        }
        for name, accuracy in accuracies.items()
    }
    for name, nats, top in (("base", 2.5, 0.4), ("distilled", 0.12, 0.93)):
        if name in columns:
            columns[name]["gap"] = {"mean": nats, "interval_95": [nats / 2, nats * 2]}
            columns[name]["top1_agreement"] = {"mean": top}
    gain = [(i < 100 * accuracies["prompted"]) - (i < 100 * accuracies["base"]) for i in range(100)]
    apart = PerRequest([float(x) for x in gain], [1] * 100)
    none = PerRequest([0.0] * 100, [1] * 100)
    return {
        "contenders": columns,
        "differences": {"gain": paired_difference(apart, none).summary()},
        "internalised": 0.925,
        "divergence": {"before": 1.294, "after": 0.217, "prompts": 48},
        "prompt_tokens_saved": 678.4,
        "decoding": {"temperature": 0.0, "max_completion_tokens": 12},
        "data": {"part": "test", "file": "test.jsonl"},
        "selection": {"how": "step 30 of 50"},
    }


def test_a_share_of_what_may_be_chance_says_nothing() -> None:
    card = a_card(base=0.1, prompted=0.5, distilled=0.47, distilled_prompted=0.4)
    about = "internalised: 92.5% (81% to 104%) of what the prompt gained is now in the weights"
    assert about in scorecard_facts(card | {"internalised_interval_95": [0.812, 1.04]})
    nothing = "internalised: what the prompt gained may be chance, so a share of it says nothing"
    assert nothing in scorecard_facts(card | {"internalised_interval_95": None})


def test_every_fact_has_its_number() -> None:
    card = a_card(base=0.1, prompted=0.5, distilled=0.47, distilled_prompted=0.4)
    columns = card["contenders"]
    for name, share in (("base", 0.97), ("prompted", 0.5), ("distilled", 0.51)):
        columns[name]["truncated_share"] = share
    columns["prompted"]["reasoning_share"] = 0.25
    columns["base"]["several_labels_share"] = 0.31
    assert scorecard_facts(card) == [
        "the prompt: 10.0% → 50.0%, a gain of 31.0 to 50.0 points: there is something to distil",
        "internalised: 92.5% of what the prompt gained is now in the weights",
        "most answers were cut (base 97%, distilled 51%): raise max_completion_tokens, or look at "
        "what ends an answer there",
        "answers that hold the right label and others of the data, which contains finds right "
        "(base 31%): the scorers exact, choice and regex do not",
        "gap on the prompted model's answers: 2.500 → 0.120 nats a token (0.060 – 0.240); its next "
        "token is the likeliest at 40% → 93% of places",
        "divergence to the teacher on 48 held-out prompts: 1.294 → 0.217 nats a token, "
        "of answers of at most 12",
        "prompt tokens saved a request: 678",
        "scored on test data: test.jsonl",
        "agrees: answers that are the prompted model's word for word; tokens: mean length of an "
        "answer; cut: share that reached max_completion_tokens (12)",
        "answers with reasoning, which is not judged: prompted 25%",
        "checkpoint: step 30 of 50",
    ]


def test_nothing_is_advised_where_base_alone_rambles() -> None:
    card = a_card(base=0.1, prompted=0.5, distilled=0.47, distilled_prompted=0.4)
    card["contenders"]["base"]["truncated_share"] = 1.0
    assert (
        "most answers of base alone were cut (base 100%): without the prompt it does not know how "
        "short they are to be"
    ) in scorecard_facts(card)
    card["contenders"]["base_short"] = {**card["contenders"]["base"]}
    card["contenders"]["base"]["truncated_share"] = 0.0
    assert any("raise max_completion_tokens" in fact for fact in scorecard_facts(card))


@pytest.mark.parametrize(
    ("base", "prompted", "verdict"),
    [
        (0.1, 0.5, "a gain of 31.0 to 50.0 points: there is something to distil"),
        (0.5, 0.54, "which may be chance (requests: 100): mend the prompt or measure on more"),
        (0.5, 0.1, "a loss of 31.0 to 50.0 points: mend the prompt before it is distilled"),
    ],
)
def test_what_a_prompt_is_worth_before_anything_is_distilled(
    base: float, prompted: float, verdict: str
) -> None:
    card = a_card(base=base, prompted=prompted) | {"internalised": None}
    card["divergence"]["after"] = None
    facts = scorecard_facts(card)
    assert facts[0] == f"the prompt: {base:.1%} → {prompted:.1%}, {verdict}"
    assert facts[2] == (
        "divergence to the teacher on 48 held-out prompts: 1.294 nats a token, of answers of at "
        "most 12"
    )


def test_prompts_before_and_after_are_spread_over_the_file() -> None:
    rows = [
        {"prompt": [user(f"n {i}")], "base": f"b {i}", "base_right": i % 2 == 0} for i in range(12)
    ]
    shown = [line.split() for line in before_after(rows).splitlines()]
    assert shown[::2] == [["n", str(i)] for i in (0, 2, 4, 7, 9)]
    assert shown[1::2] == [["✗" if i % 2 else "✓", "base", "b", str(i)] for i in (0, 2, 4, 7, 9)]
    assert [line.split()[1] for line in before_after(rows[:3]).splitlines()[::2]] == list("012")


def test_spread_takes_evenly_from_the_whole_file() -> None:
    assert spread(list(range(10)), 4) == [0, 2, 5, 7]
    assert spread(list(range(3)), 3) == [0, 1, 2]
    assert spread(list(range(3)), 4) == [0, 1, 2]


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert read_metrics(tmp_path / "m.jsonl", last_step=2) == [{"step": 1}, {"step": 2}]
