"""Training on recorded conversations: what is scored and how, and that nothing is sampled."""

from pathlib import Path
from typing import Any

import pytest
import torch

from opcd.config import TrainConfig
from opcd.config.settings import gather
from opcd.errors import InputError
from opcd.preflight.memory import Models
from opcd.preflight.rendering import rendering, rendering_lines
from opcd.runtime.files import read_metrics
from opcd.tasks.prepare import Setup, prepare
from opcd.training.build import build_distiller
from opcd.training.duration import expected_seconds, run_seconds
from opcd.training.run import train
from opcd_kernels import reference
from tests.conftest import CHATML, write_jsonl
from tests.opcd.training.test_duration import ONE

COLOURS = ("red", "blue", "pink", "teal", "gold", "grey")


def turns(*texts: str) -> dict:
    """A row of the user's texts and the assistant's in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]}


@pytest.fixture
def recorded(settings: dict) -> dict:
    rows = [turns(word, word[0], f"not {word}", "no") for word in COLOURS]
    write_jsonl(Path(settings["prompts"]), rows)
    return settings | {"source": "recorded"}


def prepared(settings: dict, **overrides: Any) -> Setup:
    return prepare(TrainConfig(**settings | overrides), for_training=True)


def losses_of(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]


def no_sampling(*_: object) -> None:
    raise AssertionError("nothing is sampled")


@pytest.mark.parametrize("objective", ["forward_kl", "cross_entropy"])
def test_the_loss_stands_on_the_recorded_turns(recorded: dict, objective: str) -> None:
    setup = prepared(recorded, guided_objective=objective)
    d = build_distiller(setup)
    d.engine.generate = no_sampling
    episodes = d.rollout()
    assert len(episodes) == 4
    targets = d.score(episodes)
    total, tokens = 0.0, 0
    for episode, hidden in zip(episodes, targets.hidden.split([*targets.lengths]), strict=True):
        assert (episode.origin, episode.finish) == ("recorded", "stop")
        ids = [*episode.student_ids]
        whole, scored = map(setup.tokenizer.decode, (ids, episode.scored_ids))
        word = next(word for word in COLOURS if f"user\n{word}<" in whole)
        assert scored == f"{word[0]}<|im_end|>no<|im_end|>"
        places = [t for start, n in episode.student_spans for t in range(start, start + n)]
        with torch.no_grad():
            logits = d.student(input_ids=torch.tensor([ids])).logits[0]
        ours = logits[[t - 1 for t in places]]
        if objective == "cross_entropy":
            picked = ours.log_softmax(-1)[range(len(places)), [ids[t] for t in places]]
            total -= picked.sum().item()
        else:
            theirs = reference.logits(hidden, targets.head.weight)
            total += reference.divergence(ours, theirs, "forward_kl").sum().item()
        tokens += len(places)
    metrics = d.update(episodes, targets)
    assert metrics["loss"] == pytest.approx(total / tokens, rel=1e-4)
    assert metrics["guided_loss"] == pytest.approx(total / tokens, rel=1e-4)
    assert metrics["divergence"] is None


def test_the_teachers_side_is_behind_the_context(recorded: dict) -> None:
    """Hidden states as of the whole conversation in one pass."""
    setup = prepared(recorded)
    d = build_distiller(setup)
    episodes = d.rollout()
    targets = d.score(episodes)
    for episode, hidden in zip(episodes, targets.hidden.split([*targets.lengths]), strict=True):
        ids = setup.task.prompted_ids(episode)
        shift = len(setup.task.a_prefix)
        places = [shift + t for start, n in episode.teacher_spans for t in range(start, start + n)]
        with torch.no_grad():
            whole = d.teacher.model.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        assert torch.allclose(hidden, whole[[t - 1 for t in places]], atol=1e-4)


def test_a_run_learns_and_resumes(recorded: dict) -> None:
    recorded |= {"test_data": None, "schedule": "constant", "save_every": 4, "validate_every": 8}
    whole = recorded | {"output_dir": f"{recorded['output_dir']}-whole", "steps": 8}
    train(TrainConfig(**whole))
    losses = losses_of(Path(whole["output_dir"]))
    assert len(losses) == 8
    assert losses[-1] < 0.7 * losses[0]
    train(TrainConfig(**recorded | {"steps": 4}))
    run = Path(recorded["output_dir"])
    train(gather({"steps": 8}, run / "config.yaml"), resume=True)
    assert losses_of(run) == losses
    saved = gather({}, run / "config.yaml")
    assert (saved.source, saved.turns, saved.guided_share) == ("recorded", "all", 0.0)
    rows = Path(recorded["prompts"]).read_text()
    Path(recorded["prompts"]).write_text(rows.replace('"no"', '"na"'))
    with pytest.raises(InputError, match="must see the prompts it was started with"):
        train(gather({"steps": 12}, run / "config.yaml"), resume=True)


def test_turns_that_a_template_writes_otherwise_are_sequences_of_their_own(
    recorded: dict, tmp_path: Path
) -> None:
    """A step takes whole conversations; the loss is a mean over all of their turns' tokens."""
    rows = [turns("sun", "s"), *(turns(word, word[0], f"not {word}", "no") for word in COLOURS)]
    write_jsonl(Path(recorded["prompts"]), rows)
    template = tmp_path / "chat.jinja"
    marked = CHATML.replace("message['content']", "message['content'] + ('' if loop.last else '!')")
    template.write_text(marked.replace("+ ('' if", "+ ('' if message.role == 'user' or"))
    setup = prepared(recorded, chat_template=str(template), prompts_per_step=7)
    assert [len(found) for found in setup.task.recorded] == [1, *[2] * 6]
    assert (
        "6 of 7 recorded conversations are trained on turn by turn, as 12 sequences: the chat "
        "template writes earlier turns otherwise than the last one"
    ) in setup.remarks
    d = build_distiller(setup)
    episodes = d.rollout()
    said = sorted(setup.tokenizer.decode(e.scored_ids) for e in episodes)
    assert said == sorted(
        [*(f"{w[0]}<|im_end|>" for w in ("sun", *COLOURS)), *["no<|im_end|>"] * 6]
    )
    histories = [setup.tokenizer.decode([*e.student_ids]) for e in episodes]
    assert sum("r!<|im_end|>" in text and text.endswith("no<|im_end|>") for text in histories) == 1


def test_what_is_scored_is_shown(recorded: dict) -> None:
    setup = prepared(recorded)
    (line,) = [x for x in rendering_lines(rendering(setup, setup.task.test)) if "⟦" in x]
    assert line == (
        r"recorded  5 of 54 tokens are scored, those in ⟦⟧: "
        r"'<|im_start|>user\nred<|im_end|>\n<|im_start|>assistant\n' ⟦'r<|im_end|>'⟧ "
        r"'\n<|im_start|>user\nnot red<|im_end|>\n<|im_start|>assistant\n' ⟦'no<|im_end|>'⟧"
    )


def test_before_a_run(recorded: dict) -> None:
    """Memory counts whole conversations, time no completions of the teacher's."""
    short, alone = prepared(recorded), prepared(recorded, validation_data=None)
    assert run_seconds(ONE, short).guided == 0
    Models(alone).memory()
    assert expected_seconds(alone) > 0
    rows = [turns(word, word[0], f"not {word}", "no" * 80) for word in COLOURS]
    write_jsonl(Path(recorded["prompts"]), rows)
    long = prepared(recorded)
    assert long.fingerprint != short.fingerprint
    more = Models(long).memory().parts["activations"] / Models(short).memory().parts["activations"]
    assert 2 < more < 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guided_share": 0.5}, r"guided_share must be 0\.0 or left out .*, got 0\.5: nothing is"),
        (
            {"guided_completions": "x"},
            "guided_completions must be null or left out with source rec",
        ),
        ({"forward_share": 0.5}, r"forward_share must be 0\.0"),
        ({"completions_per_prompt": 2}, "completions_per_prompt must be 1"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(
    settings: dict, change: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig(**settings | {"source": "recorded"} | change).check()


def test_a_default_is_not_refused_and_the_same_by_name_is(settings: dict) -> None:
    del settings["guided_share"]
    settings["source"] = "recorded"
    gather(settings).check()
    for name, value in (("guided_share", 0.25), ("turns", "last")):
        with pytest.raises(InputError, match=f"{name} must be .* got {value}"):
            gather(settings | {name: value}).check()
    gather(settings | {"guided_share": 0, "turns": "all"}).check()


def test_a_conversation_that_does_not_fit_is_refused(recorded: dict) -> None:
    rows = [turns("red", "r"), turns("blue", "b" * 470)]
    write_jsonl(Path(recorded["prompts"]), rows)
    with pytest.raises(InputError, match=r"prompts\.jsonl:2: context and recorded conversation"):
        prepared(recorded)
    rows = [turns("red", "r" * 300)]  # longer than max_completion_tokens
    write_jsonl(Path(recorded["prompts"]), rows)
    assert prepared(recorded).task.recorded[0][0].scored_tokens == 301
