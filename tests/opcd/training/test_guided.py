"""Guided rollouts: who is guided, by what, how that is scored, and where it is kept."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from opcd.config import TrainConfig
from opcd.episodes import Episode, Prompt
from opcd.errors import InputError
from opcd.tasks.prepare import prepare
from opcd.training.build import build_distiller
from opcd.training.loop import Distiller
from opcd.training.sources import OnPolicy
from opcd_kernels import reference
from tests.conftest import tiny_llama, tiny_tokenizer, write_jsonl

WORDS = [
    "red",
    "blue",
    "pink",
    "teal",
    "gold",
    "grey",
    "lime",
    "navy",
    "plum",
    "rust",
    "sand",
    "snow",
]


def distiller(settings: dict, **overrides: object) -> Distiller:
    config = TrainConfig(**settings | {"guided_share": 0.5} | overrides)
    return build_distiller(prepare(config, for_training=True))


def origins(episodes: list[Episode]) -> Counter:
    return Counter(e.origin for e in episodes)


@pytest.mark.parametrize(("share", "guided"), [(0.25, 6), (0.5, 12), (0.1, 2), (1.0, 24)])
def test_the_share_of_guided_prompts_is_kept_over_steps(
    settings: dict, share: float, guided: int
) -> None:
    d = distiller(settings, guided_share=share)
    counts = Counter()
    for d.steps_done in range(6):
        counts += origins(d.rollout())
    assert counts["guided"] == guided
    assert sum(counts.values()) == 24


def test_no_share_is_plain_on_policy_distillation(settings: dict) -> None:
    d = distiller(settings, guided_share=0.0)
    assert isinstance(d.source, OnPolicy)
    assert not (Path(settings["output_dir"]) / "guided.jsonl").exists()


@pytest.mark.parametrize("overrides", [{}, {"lora_rank": 4}, {"completions_per_prompt": 2}])
def test_guided_completions_are_the_prompted_teachers(settings: dict, overrides: dict) -> None:
    """At a temperature near 0 each token is the likeliest behind the context, adapter off."""
    d = distiller(settings, guided_share=1.0, temperature=1e-4, **overrides)
    with torch.no_grad():  # a trained student must not show
        for name, p in d.student.named_parameters():
            if "lora_B" in name:
                p.normal_()
    task = prepare(TrainConfig(**settings)).task
    for episode in d.rollout():
        ids = [*task.a_prefix, *episode.teacher_ids]
        (span,) = episode.spans
        with torch.no_grad(), d.teacher.frozen():
            logits = d.teacher.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        first = len(task.a_prefix) + span.teacher_start
        assert logits[first - 1 : -1].argmax(-1).tolist() == ids[first:]


def test_each_episode_is_scored_as_its_origin_says(settings: dict) -> None:
    """Reverse KL on own completions, forward KL on guided ones; one denominator."""
    d = distiller(settings)
    episodes = d.rollout()
    assert origins(episodes) == {"student": 2, "guided": 2}
    targets = d.score(episodes)
    tokens = sum(e.scored_tokens for e in episodes)
    expected, per_origin = 0.0, Counter()
    for episode, hidden in zip(episodes, targets.hidden.split([*targets.lengths]), strict=True):
        (span,) = episode.spans
        with torch.no_grad():
            logits = d.student(input_ids=torch.tensor([[*episode.student_ids]])).logits[0]
        ours = logits[span.student_start - 1 : -1]
        theirs = reference.logits(hidden, targets.head.weight)
        kind = "reverse_kl" if episode.origin == "student" else "forward_kl"
        found = reference.divergence(ours, theirs, kind).sum().item()
        expected += found / tokens
        per_origin[episode.origin] += found
    metrics = d.update(episodes, targets)
    counts = {o: sum(e.scored_tokens for e in episodes if e.origin == o) for o in per_origin}
    assert metrics["loss"] == pytest.approx(expected, rel=1e-4)
    own, guided = (per_origin[o] / counts[o] for o in ("student", "guided"))
    assert metrics["divergence"] == pytest.approx(own, rel=1e-4)
    assert metrics["guided_loss"] == pytest.approx(guided, rel=1e-4)


def test_cross_entropy_on_guided_completions(settings: dict) -> None:
    """Sequence-level distillation: the mean of −log p, and no divergence."""
    d = distiller(settings, guided_share=1.0, guided_objective="cross_entropy", max_grad_norm=1e9)
    episodes = d.rollout()
    total = torch.zeros(())
    for episode in episodes:
        (span,) = episode.spans
        logits = d.student(input_ids=torch.tensor([[*episode.student_ids]])).logits[0]
        ids = torch.tensor(episode.student_ids[span.student_start :])
        logprobs = logits[span.student_start - 1 : -1].log_softmax(-1)
        total = total - logprobs.gather(1, ids[:, None]).sum()
    loss = total / sum(e.scored_tokens for e in episodes)
    loss.backward()
    expected = [p.grad.clone() for p in d.parameters]
    d.optimizer.zero_grad()
    grads = []
    d.optimizer.register_step_pre_hook(
        lambda *_: grads.extend(p.grad.clone() for p in d.parameters)
    )
    metrics = d.update(episodes, d.score(episodes))
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["guided_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["divergence"] is None
    for a, b in zip(grads, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


def test_own_completions_may_be_scored_by_a_mixture(settings: dict) -> None:
    reverse, mixed, forward = (
        distiller(settings, guided_share=0, forward_share=share).step()["loss"]
        for share in (0.0, 0.5, 1.0)
    )
    assert mixed == pytest.approx((reverse + forward) / 2, rel=1e-4)
    assert reverse != pytest.approx(forward, rel=1e-2)


def test_completions_are_made_once_and_kept(settings: dict) -> None:
    """In later epochs and in a resumed run the same; the file says by what rule."""
    d = distiller(settings, guided_share=1.0)
    made = []
    engine = d.source._completions._engine
    generate = engine.generate
    engine.generate = lambda prompts, *rest: made.append(len(prompts)) or generate(prompts, *rest)
    seen: dict[tuple, list] = {}
    for d.steps_done in range(6):  # 12 prompts, 4 a step: two epochs
        for episode in d.rollout():
            (span,) = episode.spans
            prompt = tuple(episode.student_ids[: span.student_start])
            seen.setdefault(prompt, []).append(episode.student_ids[span.student_start :])
    assert made == [12], "one large batch"
    assert all(len(found) == 2 and found[0] == found[1] for found in seen.values())
    rule, *rows = (Path(settings["output_dir"]) / "guided.jsonl").read_text().splitlines()
    assert json.loads(rule)["seed"] == 0
    assert json.loads(rule)["temperature"] == 1.0
    assert len(rows) == 12
    again = distiller(settings, guided_share=1.0)
    again.source._completions._engine.generate = None  # nothing is left to make
    again.steps_done = d.steps_done = 3
    assert again.rollout() == d.rollout()


@pytest.mark.parametrize("kept", [-30, 40, 0], ids=["last-line", "first-line", "nothing"])
def test_a_line_that_a_kill_cut_off_is_made_anew(settings: dict, kept: int) -> None:
    several = {"guided_share": 1.0, "completions_per_prompt": 2}
    first = distiller(settings, **several).rollout()
    file = Path(settings["output_dir"]) / "guided.jsonl"
    whole = file.read_text()
    file.write_text(whole[:kept])
    d = distiller(settings, **several)
    for d.steps_done in (2, 1, 0):
        again = d.rollout()
    assert again == first
    assert set(file.read_text().splitlines()) == set(whole.splitlines())


def test_many_steps_completions_are_made_at_once(
    settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a few at every step as the window moves on."""
    monkeypatch.setattr("opcd.training.sources.BATCHES_AHEAD", 2)
    d = distiller(settings, guided_share=0.5, rollout_batch_size=3, prompts_per_step=2, steps=12)
    made = []
    engine = d.source._completions._engine
    generate = engine.generate
    engine.generate = lambda prompts, *rest: made.append(len(prompts)) or generate(prompts, *rest)
    for d.steps_done in range(12):
        d.rollout()
    assert made[0] == 6
    assert len(made) <= 3


def test_contexts_share_their_prefix_when_completions_are_made(
    settings: dict, tmp_path: Path
) -> None:
    contexts = {"vowel": "Answer with a vowel.", "digit": "Answer with one digit, no more."}
    (tmp_path / "contexts.json").write_text(json.dumps(contexts))
    for name, words in (("prompts", WORDS), ("test", ("cat", "dog"))):
        rows = [
            {"prompt": word, "answer": word[0], "context": list(contexts)[i % 2]}
            for i, word in enumerate(words)
        ]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    own = {"context": str(tmp_path / "contexts.json"), "validation_data": None}
    d = distiller(settings, guided_share=1.0, **own)
    task = d.source._completions._task
    starts = []
    engine = d.source._completions._engine
    generate = engine.generate

    def watched(prompts: list, *rest: object) -> list:
        starts.append(prompts)
        return generate(prompts, *rest)

    engine.generate = watched
    assert {e.context for e in d.rollout()} == set(contexts)
    assert len(starts) == 2
    for prompts in starts:
        assert any(
            all(ids[: len(prefix)] == prefix for ids in prompts)
            for prefix in task.prefixes.values()
        )


def test_completions_of_another_rule_are_refused(settings: dict) -> None:
    distiller(settings, guided_share=1.0).rollout()
    with pytest.raises(InputError, match="got another seed, temperature; delete the file"):
        distiller(settings, guided_share=1.0, seed=1, temperature=0.5)


def test_completions_are_the_teachers_wherever_it_lies(settings: dict, tmp_path: Path) -> None:
    distiller(settings, guided_share=1.0).rollout()
    file = Path(settings["output_dir"]) / "guided.jsonl"
    kept = file.read_text()
    moved = shutil.copytree(settings["model"], tmp_path / "moved")
    distiller(settings, guided_share=1.0, model=str(moved)).rollout()
    assert file.read_text() == kept, "nothing was made anew"
    rule, *rows = kept.splitlines(keepends=True)
    named = json.loads(rule) | {"teacher": settings["model"]}  # as versions before wrote it
    file.write_text("".join([json.dumps(named) + "\n", *rows]))
    distiller(settings, guided_share=1.0).rollout()
    tiny_llama(3).save_pretrained(moved)
    with pytest.raises(InputError, match="got another teacher"):
        distiller(settings, guided_share=1.0, model=str(moved))


def stored(settings: dict, change: Callable[[list], object] = lambda _: None) -> str:
    rows = [{"prompt": word, "completion": word[0]} for word in WORDS]
    change(rows)
    path = Path(settings["output_dir"]).parent / "stored.jsonl"
    return str(write_jsonl(path, rows))


def test_stored_completions_are_trained_on(settings: dict) -> None:
    d = distiller(settings, guided_share=1.0, guided_completions=stored(settings))
    for episode in d.rollout():
        (span,) = episode.spans
        *text, end = episode.student_ids[span.student_start :]
        assert len(text) == 1
        assert end == 1, "the turn ends"
        assert episode.origin == "guided"


def test_every_stored_completion_of_a_prompt_has_its_turn(settings: dict) -> None:
    several = [{"prompt": word, "completion": c} for word in WORDS for c in "abc"]
    path = write_jsonl(Path(settings["output_dir"]).parent / "several.jsonl", several)
    change = {"guided_share": 1.0, "guided_completions": str(path), "prompts_per_step": len(WORDS)}
    tokenizer = tiny_tokenizer()
    wide = change | {"prompts_per_step": 2 * len(WORDS)}  # two epochs in a step
    d = distiller(settings, **wide)
    said = [tokenizer.decode(e.scored_ids[:1]) for e in d.rollout()]
    assert said == ["a"] * len(WORDS) + ["b"] * len(WORDS)
    for each, expected in ((1, ["a", "b", "c", "a"]), (2, ["ab", "ca", "bc", "ab"])):
        d = distiller(settings, **change, completions_per_prompt=each)
        found = []
        for d.steps_done in range(4):  # an epoch each
            said = [tokenizer.decode(e.scored_ids[:1]) for e in d.rollout()]
            assert said == said[:each] * len(WORDS)
            found.append("".join(said[:each]))
        assert found == expected


def test_rows_of_a_fine_tuning_file_are_stored_completions(settings: dict) -> None:
    """Its system message is the context; the assistant's message is the completion."""

    def openai(rows: list) -> None:
        for row in rows:
            turns = [("system", "Answer with one letter."), ("user", row.pop("prompt"))]
            turns.append(("assistant", row.pop("completion")))
            row["messages"] = [{"role": role, "content": text} for role, text in turns]

    config = TrainConfig(**settings | {"guided_share": 1.0, "guided_completions": stored(settings)})
    plain = prepare(config, True).completions
    stored(settings, openai)
    assert prepare(config, True).completions == plain
    assert plain is not None
    assert len(plain) == 12


def test_completions_of_other_prompts_are_left_out_and_said(settings: dict) -> None:
    def renamed(rows: list) -> None:
        rows.insert(1, {"prompt": "no such prompt", "completion": "x"})

    path = stored(settings, renamed)
    setup = prepare(
        TrainConfig(**settings | {"guided_share": 1.0, "guided_completions": path}), True
    )
    assert setup.completions is not None
    assert len(setup.completions) == 12
    assert setup.remarks == [
        f"stored.jsonl: 1 row of completions left out, of no training prompt, first {path}:2"
    ]


def test_another_runs_completions_are_stored_ones(settings: dict, tmp_path: Path) -> None:
    d = distiller(settings, guided_share=1.0)
    first = d.rollout()
    file = tmp_path / "of-another-run.jsonl"
    (Path(settings["output_dir"]) / "guided.jsonl").rename(file)
    other = distiller(settings, guided_share=1.0, guided_completions=str(file))
    assert [e.student_ids for e in other.rollout()] == [e.student_ids for e in first]
    (tmp_path / "context.md").write_text("Answer with two letters.")
    with pytest.raises(InputError, match="made for another one"):
        distiller(settings, guided_share=1.0, guided_completions=str(file))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.pop(), r"none for .*prompts.jsonl:12 \('snow'\)"),
        (lambda rows: rows[3].update(completion=" "), r"stored.jsonl:4: each line must have"),
        (lambda rows: rows[0].pop("completion"), r"stored.jsonl:1: each line must have"),
        (lambda rows: rows[2].update(completion_token_ids=[5, 300]), "ids of this tokenizer"),
        (lambda rows: rows[2].update(completion_token_ids=[5, "a"]), "ids of this tokenizer"),
        (lambda rows: rows[2].update(completion="long " * 9), "at most max_completion_tokens 8"),
        (lambda rows: rows[2].update(messages=5), "one column, got prompt and messages"),
        (lambda rows: rows[2].update(context=["a"]), ".context. must be the name of one"),
        (lambda rows: rows.append({"key": ["a"], "completion": "p"}), '"key" must be a number'),
    ],
)
def test_stored_completions_that_do_not_fit_are_refused_before_weights_are_loaded(
    settings: dict, change: Callable[[list], object], message: str
) -> None:
    path = stored(settings, change)
    with pytest.raises(InputError, match=message):
        prepare(TrainConfig(**settings | {"guided_share": 1.0, "guided_completions": path}), True)
    prepare(TrainConfig(**settings | {"guided_share": 1.0, "guided_completions": path}))  # to score


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guided_share": 1.5}, "guided_share must lie between 0 and 1, got 1.5"),
        ({"forward_share": -0.1}, "forward_share must lie between 0 and 1"),
        ({"guided_completions": "x.jsonl"}, "must come with a guided_share above 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict, change: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig(**settings | change).check()


def test_a_key_tells_prompts_apart() -> None:
    assert Prompt([1], [2], "a").key == Prompt([1], [2], "a").key
    others = [Prompt([1], [2], "b"), Prompt([2], [2], "a"), Prompt([1], [1], "a")]
    assert len({p.key for p in [Prompt([1], [2], "a"), *others]}) == 4
