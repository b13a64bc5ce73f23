"""One step and many: gradients that do not depend on the passes, and a divergence that falls."""

import json
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from opcd.config import TrainConfig
from opcd.config.rate import rate_factor, usual_rate
from opcd.episodes import Episode, Span
from opcd.errors import InputError
from opcd.evaluation.agreement import divergences, own_side, teacher_side
from opcd.objective import Targets
from opcd.rollouts.protocol import RolloutEngine, SamplingParams
from opcd.tasks.order import step_rows
from opcd.tasks.prepare import prepare
from opcd.tasks.task import Task
from opcd.teacher import SharedPrefixTeacher
from opcd.training.build import build_distiller
from opcd.training.loop import Distiller, token_weights
from opcd.training.sources import Source
from opcd_kernels import reference
from tests.conftest import tiny_llama, tiny_tokenizer, write_jsonl


def distiller(settings: dict, **overrides: object) -> tuple[Distiller, Task]:
    setup = prepare(TrainConfig(**settings | overrides))
    return build_distiller(setup), setup.task


def held_out_divergence(d: Distiller, task: Task) -> float:
    prompts = [case.prompt for case in task.test]
    params = SamplingParams(d.config.max_completion_tokens, d.config.temperature)
    side = own_side(d.student, d.student_loss.plan, d.engine, prompts, params, d.config)
    theirs = teacher_side(d.teacher, side.episodes)
    return divergences(side, theirs, d.config.temperature).reverse_kl.mean


def student_spans(episode: Episode) -> tuple[Span, ...]:
    """The spans of an episode whose teacher sees what the student does."""
    return tuple(span._replace(teacher_start=span.student_start) for span in episode.spans)


def gradients(d: Distiller, episodes: list, targets: Targets) -> tuple[list, dict]:
    """The gradients of one update, caught where the optimizer would take them."""
    grads = []
    d.optimizer.register_step_pre_hook(
        lambda *_: grads.extend(p.grad.clone() for p in d.parameters)
    )
    metrics = d.update(episodes, targets)
    return grads, metrics


@pytest.fixture(params=[1, 10**9], ids=["shared-start", "whole-prompts"], autouse=True)
def min_tokens_saved(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds whether or not the prompts' common start is computed once."""
    monkeypatch.setattr("opcd.passes.prefix.MIN_TOKENS_SAVED", request.param)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"lora_rank": 8, "learning_rate": 5e-3},
        {"forward_share": 1.0},
        {"forward_share": 0.3},
        {"average_over": "sequences", "completions_per_prompt": 2},
        {"rollout_engine": "static", "completions_per_prompt": 2},
        {"rollout_engine": "static", "dtype": "bfloat16"},
    ],
)
def test_the_divergence_on_held_out_prompts_falls(settings: dict, overrides: dict) -> None:
    d, task = distiller(settings, steps=25, **overrides)
    before = held_out_divergence(d, task)
    for _ in range(25):
        d.step()
    after = held_out_divergence(d, task)
    assert after < 0.7 * before, (before, after)


@pytest.mark.parametrize("average_over", ["tokens", "sequences"])
def test_gradients_do_not_depend_on_the_passes(settings: dict, average_over: str) -> None:
    grads = []
    for size in (1, 300, 4096):
        d, _ = distiller(settings, max_tokens_per_pass=size, average_over=average_over)
        episodes = d.rollout()
        grads.append(gradients(d, episodes, d.score(episodes))[0])
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)


def test_the_update_is_the_gradient_of_the_definition(settings: dict) -> None:
    """Each sequence alone, full logits, ordinary autograd: the mean reverse KL over all tokens."""
    d, task = distiller(settings, max_grad_norm=1e9, temperature=0.8)
    prompts = step_rows(task.train, 0, d.config)
    episodes = d.rollout()
    # One that ends with EOS: it is a target like any other token.
    episodes[1] = Episode.of_completion(prompts[1], [40, 1])
    targets = d.score(episodes)

    total, tokens = torch.zeros(()), sum(e.scored_tokens for e in episodes)
    for prompt, episode in zip(prompts, episodes, strict=True):
        completion = episode.student_ids[len(prompt.student_ids) :]
        logits = []
        for model, start in (
            (d.student, prompt.student_ids),
            (d.teacher.model, task.prompted_ids(prompt)),
        ):
            out = model(input_ids=torch.tensor([[*start, *completion]]), use_cache=False)
            logits.append(out.logits[0, len(start) - 1 : -1] / d.config.temperature)
        total = total + reference.divergence(logits[0], logits[1].detach()).sum() / tokens
    total.backward()
    expected = [p.grad.clone() for p in d.parameters]
    d.optimizer.zero_grad()

    grads, metrics = gradients(d, episodes, targets)
    assert metrics["loss"] == pytest.approx(total.item(), rel=1e-4)
    for a, b in zip(grads, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


class Fixed(Source):
    """A source of the same completions whatever the weights are."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def episodes(self, step: int, sampler: RolloutEngine) -> list[Episode]:
        return [
            Episode.of_completion(prompt, [40 + (7 * step + 5 * i + k) % 200 for k in range(3 + i)])
            for i, prompt in enumerate(self._task.train[step : step + 3])
        ]


def test_ten_updates_are_those_of_plain_autograd(settings: dict) -> None:
    """Full logits of each sequence alone, ordinary autograd and AdamW; fixed completions."""
    d, task = distiller(settings, steps=10, schedule="linear", max_tokens_per_pass=60)
    d.source = Fixed(task)
    start = [p.detach().clone() for p in d.parameters]
    student, teacher = tiny_llama(), d.teacher.model
    student.load_state_dict(d.student.state_dict())
    optimizer = torch.optim.AdamW(student.parameters(), lr=1.0, weight_decay=d.config.weight_decay)
    for step in range(10):
        episodes = d.source.episodes(step, d.engine)
        tokens = sum(e.scored_tokens for e in episodes)
        loss = torch.zeros(())
        for episode in episodes:
            (span,) = episode.spans
            prefix = task.a_prefix
            logits = [
                model(input_ids=torch.tensor([[*ids]]), use_cache=False).logits[0, first:-1]
                for model, ids, first in (
                    (student, episode.student_ids, span.student_start - 1),
                    (
                        teacher,
                        [*prefix, *episode.teacher_ids],
                        len(prefix) + span.teacher_start - 1,
                    ),
                )
            ]
            loss = loss + reference.divergence(logits[0], logits[1].detach()).sum() / tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), d.config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = d.peak_rate * rate_factor(step, d.config)
        optimizer.step()
        optimizer.zero_grad()
        assert d.step()["loss"] == pytest.approx(loss.item(), rel=1e-5)
    ours, plain = (torch.cat([p.flatten() for p in m.parameters()]) for m in (d.student, student))
    moved = torch.cat([(p - s).flatten() for p, s in zip(d.parameters, start, strict=True)])
    assert moved.norm() > 1e-2 * ours.norm(), "the weights must have moved"
    assert (ours - plain).norm() < 1e-5 * plain.norm()


def test_each_phase_of_a_step_is_timed(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    d, _ = distiller(settings)
    for seconds, phase in ((0.4, "rollout"), (0.2, "score"), (0.3, "update")):

        def slow(
            *args: object, seconds: float = seconds, run: object = getattr(d, phase)
        ) -> object:
            time.sleep(seconds)
            return run(*args)

        monkeypatch.setattr(d, phase, slow)
    metrics = d.step()
    phases = [metrics[f"{name}_time_s"] for name in ("rollout", "teacher", "update")]
    assert all(a >= b for a, b in zip(phases, (0.4, 0.2, 0.3), strict=True)), phases
    assert metrics["step_time_s"] == pytest.approx(sum(phases))


def test_eos_that_was_sampled_is_scored(settings: dict) -> None:
    d, _ = distiller(settings)
    with torch.no_grad():
        d.student.lm_head.weight.zero_()
        d.student.lm_head.weight[1] = 0.01
    episodes = []
    for d.steps_done in range(30):
        episodes += d.rollout()
    stopped = [e for e in episodes if e.finish == "stop"]
    assert stopped
    assert all(e.student_ids[-1] == 1 for e in stopped)
    lengths = [len(e.student_ids) - e.spans[0].student_start for e in episodes]
    assert d.score(episodes).lengths == tuple(lengths)


def test_learning_rate(settings: dict) -> None:
    config = TrainConfig(**settings | {"steps": 8, "warmup_steps": 4})
    assert [rate_factor(i, config) for i in range(8)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    config.schedule = "linear"
    assert [rate_factor(i, config) for i in range(8)] == [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]
    config.warmup_steps = 0
    assert rate_factor(0, config) == 1


def test_a_rate_of_its_own_for_every_size(settings: dict) -> None:
    rates = {n: usual_rate(int(n), adapter=False) for n in (134.5e6, 0.5e9, 1.7e9, 8e9)}
    assert rates[134.5e6] == pytest.approx(1e-4)
    assert 3e-5 < rates[0.5e9] < 5e-5
    assert 1e-6 < rates[8e9] <= 5e-6 < rates[1.7e9] < 2e-5
    assert usual_rate(int(134.5e6), adapter=True) == pytest.approx(1e-3)
    d = build_distiller(prepare(TrainConfig(**settings | {"learning_rate": None})))
    size = sum(p.numel() for p in d.student.parameters())
    assert d.peak_rate == usual_rate(size, adapter=False)
    assert d.step()["learning_rate"] == d.peak_rate  # of one step's warm-up
    lora = settings | {"learning_rate": None, "lora_rank": 2}
    d = build_distiller(prepare(TrainConfig(**lora)))
    size = sum(p.numel() for p in d.student.parameters())
    assert d.peak_rate == usual_rate(size, adapter=True)
    settings["learning_rate"] = 2e-3
    assert build_distiller(prepare(TrainConfig(**settings))).peak_rate == 2e-3


def test_token_weights_sum_to_one_over_the_step(settings: dict) -> None:
    of_task = [Completion(2), Completion(6)]
    tokens = token_weights(of_task, TrainConfig(**settings))
    assert torch.cat(tokens).tolist() == pytest.approx([1 / 8] * 8)
    each = TrainConfig(**settings | {"average_over": "sequences"})
    sequences = token_weights(of_task, each)
    assert sequences[0].tolist() == pytest.approx([1 / 4] * 2)
    assert sequences[1].tolist() == pytest.approx([1 / 12] * 6)
    turns = [*of_task, Completion(30, "replay"), *[Completion(2)] * 20]  # of few conversations
    for config in (TrainConfig(**settings), each):
        config.replay_share = 0.25
        of_each = [weights.sum().item() for weights in token_weights(turns, config)]
        assert of_each[2] == pytest.approx(1 / 4), "its share of the rows"
        assert sum(of_each) == pytest.approx(1)
        assert sum(w.sum() for w in token_weights(of_task, config)) == pytest.approx(1)
        assert token_weights(turns[2:3], config)[0].sum() == pytest.approx(1)


class Completion(NamedTuple):
    scored_tokens: int
    origin: str = "student"


def test_prompts_come_in_shuffled_epochs_that_depend_on_the_step_alone(settings: dict) -> None:
    d, task = distiller(settings)  # 12 prompts, 4 a step
    steps = [step_rows(task.train, i, d.config) for i in range(6)]
    first, second = [*chain(*steps[:3])], [*chain(*steps[3:])]
    assert sorted(first) == sorted(second) == sorted(task.train)
    assert first != second
    wide = TrainConfig(**settings | {"prompts_per_step": 24})
    assert step_rows(task.train, 0, wide) == first + second


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(settings: dict) -> None:
    d, _ = distiller(settings)
    before = [p.clone() for p in d.parameters]
    with torch.no_grad():
        d.teacher.head.weight[3] = torch.nan
    d.teacher.refresh()
    with pytest.raises(InputError, match=r"loss must be finite.*step 1"):
        d.step()
    assert all(torch.equal(a, b) for a, b in zip(before, d.parameters, strict=True))
    assert d.steps_done == 0


def test_gradient_checkpointing_changes_memory_and_not_the_result(settings: dict) -> None:
    losses, passes = [], []
    for on in (False, True):
        d, _ = distiller(settings, gradient_checkpointing=on)
        torch.manual_seed(0)
        count = [0]
        d.student.model.layers[0].mlp.register_forward_pre_hook(
            lambda *_, count=count: count.__setitem__(0, count[0] + torch.is_grad_enabled())
        )
        losses.append([d.step()["loss"] for _ in range(3)])
        passes.append(count[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert passes[1] == 6, "each of three forward passes must be computed again in backward"


def test_layers_alone_are_in_training_mode_to_recompute(settings: dict) -> None:
    """Routers that add noise in that mode, and dropout that only a configuration knows."""
    d, _ = distiller(settings, gradient_checkpointing=True)
    seen = set()
    for module in d.student.modules():
        module.register_forward_pre_hook(lambda m, _: seen.add((type(m).__name__, m.training)))
    d.update(episodes := d.rollout(), d.score(episodes))
    kinds = {name for name, training in seen if training}
    assert "LlamaDecoderLayer" in kinds
    assert not kinds & {"LlamaAttention", "LlamaMLP", "Linear", "LlamaRMSNorm"}


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_dropout_is_off(settings: dict, tmp_path: Path, gradient_checkpointing: bool) -> None:
    """With equal weights and equal sequences the divergence is 0, also on a model with dropout."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
    config = GPT2Config(vocab_size=258, bos_token_id=0, eos_token_id=1, **sizes)
    assert config.resid_pdrop == config.attn_pdrop == 0.1
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    d, task = distiller(
        settings,
        model=str(tmp_path / "gpt2"),
        gradient_checkpointing=gradient_checkpointing,
    )
    same = [replace(e, teacher_ids=e.student_ids, spans=student_spans(e)) for e in d.rollout()]
    d.teacher = SharedPrefixTeacher(d.teacher.model, task.a_prefix, shared=False)
    d.teacher._prefix_ids = {"": []}
    assert d.update(same, d.score(same))["divergence"] < 1e-9


def test_bf16_keeps_weights_and_optimizer_in_fp32(settings: dict) -> None:
    for lora_rank in (0, 4):
        d, _ = distiller(settings, dtype="bfloat16", lora_rank=lora_rank)
        dtypes = set()
        layer = d.student.get_submodule(
            "base_model.model.model.layers.0.mlp" if lora_rank else "model.layers.0.mlp"
        )
        layer.register_forward_hook(lambda _, __, out, seen=dtypes: seen.add(out.dtype))
        d.step()
        assert dtypes == {torch.bfloat16}, "the passes must run in bf16"
        assert {p.dtype for p in d.parameters} == {torch.float32}
        states = [s["exp_avg"].dtype for s in d.optimizer.state.values()]
        assert set(states) == {torch.float32}
        assert next(d.teacher.model.parameters()).dtype == torch.bfloat16


def test_another_teacher(settings: dict, tmp_path: Path) -> None:
    tiny_llama(seed=5, hidden_size=48, vocab_size=270).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    d, task = distiller(settings, teacher=str(tmp_path / "teacher"), steps=20)
    before = held_out_divergence(d, task)
    for _ in range(20):
        d.step()
    after = held_out_divergence(d, task)
    assert after < 0.7 * before


def test_prompts_with_contexts_of_their_own(settings: dict, tmp_path: Path) -> None:
    """Each prompt is scored behind its own context, and the divergence to both falls."""
    contexts = {"vowel": "Answer with a vowel.", "digit": "Answer with one digit, no more."}
    (tmp_path / "contexts.json").write_text(json.dumps(contexts))
    for name, words in (("prompts", "red blue pink teal"), ("test", "cat dog")):
        rows = [
            {"prompt": word, "answer": word[0], "context": list(contexts)[i % 2]}
            for i, word in enumerate(words.split())
        ]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    own = {"context": str(tmp_path / "contexts.json"), "validation_data": None, "steps": 20}
    d, task = distiller(settings, **own)
    assert set(task.prefixes) == set(contexts)
    episodes = d.rollout()
    targets = d.score(episodes)
    parts = targets.hidden.split([*targets.lengths])
    assert {e.context for e in episodes} == set(contexts)
    for episode, hidden in zip(episodes, parts, strict=True):
        ids = torch.tensor([task.prefixes[episode.context] + list(episode.teacher_ids)])
        with torch.no_grad():
            expected = d.teacher.model.model(ids, use_cache=False).last_hidden_state[0]
        assert torch.allclose(hidden, expected[-len(hidden) - 1 : -1], atol=1e-4)
    before = held_out_divergence(d, task)
    for _ in range(20):
        d.step()
    after = held_out_divergence(d, task)
    assert after < 0.7 * before
