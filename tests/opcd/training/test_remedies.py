"""What holds other abilities, and what keeps a model right where its prompt is sent after all."""

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from opcd.config import TrainConfig
from opcd.episodes import Episode
from opcd.errors import InputError
from opcd.models.by_name import load_model
from opcd.passes.plan import WHOLE
from opcd.runtime.files import read_metrics
from opcd.tasks.prepare import prepare
from opcd.tasks.replay import FEWEST_TOKENS, WITHOUT
from opcd.training.anchor import ReturnAnchor
from opcd.training.build import build_distiller
from opcd.training.loop import Distiller, token_weights
from opcd.training.run import train
from tests.conftest import tiny_llama


def a_distiller(settings: dict, **change: object) -> Distiller:
    return build_distiller(prepare(TrainConfig(**settings | change), for_training=True))


def test_replayed_completions_end_as_the_model_ends_answers(settings: dict) -> None:
    """And not as a task of labels does."""
    short = settings | {"max_completion_tokens": 2, "stop": ["a", "e"], "prompts_per_step": 8}
    episodes = a_distiller(short, replay_share=0.5).rollout()
    lengths = {
        kind: [e.scored_tokens for e in episodes if (e.origin == "replay") == kind]
        for kind in (False, True)
    }
    assert max(lengths[False]) <= 2 < max(lengths[True]) <= FEWEST_TOKENS
    assert set(lengths[True]) == {FEWEST_TOKENS}, "cut: this model hardly ends"


def test_a_share_of_a_step_is_replayed(settings: dict) -> None:
    """On which an untrained student is at no distance from the original model."""
    distiller = a_distiller(settings, replay_share=0.5, guided_share=0.5)
    episodes = distiller.rollout()
    assert [e.origin for e in episodes] == ["student", "guided", "replay", "replay"]
    assert [e.context == WITHOUT for e in episodes] == [False, False, True, True]
    metrics = distiller.step()
    assert metrics["replay_divergence"] == pytest.approx(0, abs=1e-5)
    assert metrics["divergence"] > 0.1
    assert metrics["guided_loss"] > 0.1
    own, guided, *_ = (e.scored_tokens for e in episodes)
    of_task = (own * metrics["divergence"] + guided * metrics["guided_loss"]) / (own + guided)
    assert metrics["loss"] == pytest.approx(0.5 * of_task, rel=1e-4), "half of it is replayed"
    later = distiller.step()
    assert later["replay_divergence"] > 1e-4, "the student has moved"


@torch.no_grad()
def test_what_is_replayed_is_held_to_the_original_without_the_context(settings: dict) -> None:
    distiller = a_distiller(settings, replay_share=0.5)
    for parameter in distiller.student.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    episodes = [e for e in distiller.rollout() if e.origin == "replay"]
    out = distiller.student_loss(episodes, distiller.score(episodes))
    original = load_model(settings["model"], torch.float32)
    expected = []
    for episode in episodes:
        n, ids = episode.scored_tokens, torch.tensor([episode.student_ids])
        ours, theirs = (
            model(ids).logits[0, -n - 1 : -1].log_softmax(-1)
            for model in (distiller.student, original)
        )
        expected.append((ours.exp() * (ours - theirs)).sum(-1))
    torch.testing.assert_close(out.per_token, torch.cat(expected), rtol=1e-3, atol=1e-5)


def test_a_teacher_without_the_context_teaches_nothing(settings: dict) -> None:
    """The control: all of a step replayed, on the training prompts.

    From then on the student is where Adam, which knows no size of gradients, takes rounding to.
    """
    control = {"replay_share": 1.0, "replay_data": settings["prompts"], "steps": 2}
    train(TrainConfig(**settings | control))
    _, first, second, *_ = read_metrics(Path(settings["output_dir"]) / "metrics.jsonl")
    assert first["divergence"] is second["divergence"] is None
    assert first["loss"] == pytest.approx(0, abs=1e-5)
    assert first["grad_norm"] < 1e-3


def own_logits(model: torch.nn.Module, episode: Episode, prefix: Sequence[int] | None) -> Tensor:
    """(N, V) that predict an episode's scored tokens; a prefix's keys take no gradient."""
    n = episode.scored_tokens
    if prefix is None:
        return model(torch.tensor([list(episode.student_ids)])).logits[0, -n - 1 : -1]
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.tensor([list(prefix)]), past_key_values=cache)
    ids = torch.tensor([list(episode.teacher_ids)])
    return model(ids, past_key_values=cache).logits[0, -n - 1 : -1]


@pytest.mark.parametrize("packed", [True, False])
def test_the_anchor_is_what_it_says(settings: dict, packed: bool) -> None:
    """KL(student without, held fixed ‖ student with the context), and its gradient."""
    distiller = a_distiller(settings, return_anchor=0.5, temperature=0.7)
    anchor, student = distiller.anchor, distiller.student
    assert anchor is not None
    assert distiller.student_loss.plan.packed
    if not packed:
        anchor._plan = anchor._plan._replace(mode="padded")
    episodes = distiller.rollout()
    lengths = [e.scored_tokens for e in episodes]
    weights = torch.linspace(0.1, 0.4, sum(lengths))
    anchor.record()
    out = anchor.loss(episodes, weights)
    out.loss.backward()
    found = [p.grad.clone() for p in distiller.parameters]
    distiller.optimizer.zero_grad()
    (prefix,) = distiller.teacher._prefix_ids.values()
    nats = []
    for episode in episodes:
        ours = (own_logits(student, episode, prefix) / 0.7).log_softmax(-1)
        fixed = (own_logits(student, episode, None).detach() / 0.7).log_softmax(-1)
        nats.append((fixed.exp() * (fixed - ours)).sum(-1))
    expected = torch.cat(nats)
    torch.testing.assert_close(out.per_token, expected.detach(), rtol=1e-3, atol=1e-5)
    (0.5 * weights * expected).sum().backward()
    for parameter, gradient in zip(distiller.parameters, found, strict=True):
        error = (gradient - parameter.grad).norm()
        assert error < 1e-3 * parameter.grad.norm() + 1e-7


def test_a_step_adds_the_anchor_of_own_completions(settings: dict) -> None:
    change = {"replay_share": 0.25, "guided_share": 0.25, "max_tokens_per_pass": 70}
    plain = a_distiller(settings, **change)
    anchored = a_distiller(settings, return_anchor=0.5, **change)
    anchored.student.load_state_dict(plain.student.state_dict())
    episodes = plain.rollout()
    own = [e for e in episodes if e.origin == "student"]
    assert 0 < len(own) < len(episodes)
    for distiller in (plain, anchored):
        distiller.backward(episodes, distiller.score(episodes))
    anchor = copy.copy(anchored.anchor)
    assert anchor is not None
    without = [p.grad.clone() for p in plain.parameters]
    with_anchor = [p.grad.clone() for p in anchored.parameters]
    anchored.optimizer.zero_grad()
    of_each = zip(episodes, token_weights(episodes, plain.config), strict=True)
    weights = torch.cat([of_tokens for e, of_tokens in of_each if e.origin == "student"])
    anchor.loss(own, weights).loss.backward()
    for ours, theirs, parameter in zip(with_anchor, without, anchored.parameters, strict=True):
        torch.testing.assert_close(ours - theirs, parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("share", ["guided_share", "replay_share"])
def test_an_anchor_without_own_completions_is_refused(settings: dict, share: str) -> None:
    with pytest.raises(InputError, match="return_anchor must have completions of the student's"):
        TrainConfig(**settings | {"return_anchor": 0.5, share: 1.0}).check()


def test_anchored_steps_bring_both_answers_together(settings: dict) -> None:
    """The distance between the student with and without its prompt, after as many steps."""
    apart = {}
    for weight in (0.0, 5.0):
        distiller = a_distiller(settings, return_anchor=weight, prompts_per_step=8)
        for _ in range(12):
            metrics = distiller.step()
            assert ("anchor_divergence" in metrics) == bool(weight)
        probe = distiller.anchor or ReturnAnchor(
            distiller.student,
            distiller.student_loss.plan,
            distiller.teacher._prefix_ids,
            TrainConfig(**settings | {"return_anchor": 1.0}),
        )
        episodes = distiller.rollout()
        probe.record()
        n = sum(e.scored_tokens for e in episodes)
        with torch.no_grad():
            apart[weight] = probe.loss(episodes, torch.full((n,), 1 / n)).per_token.mean().item()
    assert apart[5.0] < 0.7 * apart[0.0]
    assert math.isfinite(apart[0.0])


def test_a_model_that_cannot_go_on_behind_a_context_is_refused(settings: dict) -> None:
    config = TrainConfig(**settings | {"return_anchor": 0.5})
    with pytest.raises(
        InputError, match=r"goes on behind a context .* got LlamaForCausalLM: asked f"
    ):
        ReturnAnchor(tiny_llama(), WHOLE, {"": [1, 2]}, config)
    with pytest.raises(InputError, match="must go without gradient_checkpointing"):
        TrainConfig(**settings | {"return_anchor": 0.5, "gradient_checkpointing": True}).check()
    with pytest.raises(InputError, match="return_anchor must be at least 0, got -1"):
        TrainConfig(**settings | {"return_anchor": -1.0}).check()


def test_an_adapter_is_anchored_with_itself_on(settings: dict) -> None:
    """A LoRA student's context is read by the student, and not by the frozen base."""
    distiller = a_distiller(settings, return_anchor=0.5, lora_rank=4)
    with torch.no_grad():
        for parameter in distiller.parameters:
            parameter += 0.3 * torch.randn_like(parameter)
    distiller.teacher.refresh()
    anchor, episodes = distiller.anchor, distiller.rollout()
    assert anchor is not None
    anchor.record()
    n = sum(e.scored_tokens for e in episodes)
    with torch.no_grad():
        found = anchor.loss(episodes, torch.full((n,), 1 / n)).per_token
        (prefix,) = distiller.teacher._prefix_ids.values()
        nats = []
        for episode in episodes:
            ours = own_logits(distiller.student, episode, prefix).log_softmax(-1)
            fixed = own_logits(distiller.student, episode, None).log_softmax(-1)
            nats.append((fixed.exp() * (fixed - ours)).sum(-1))
    torch.testing.assert_close(found, torch.cat(nats), rtol=1e-3, atol=1e-5)
