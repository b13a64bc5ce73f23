"""A run's memory, held against the tensors of a run that is there."""

from pathlib import Path
from typing import Any

import pytest
import torch

from opcd.config import TrainConfig
from opcd.episodes import Episode
from opcd.models.lm import recompute_activations
from opcd.passes.hidden import Row
from opcd.passes.plan import planned_hidden
from opcd.preflight.memory import Memory, Models
from opcd.preflight.weightless import Tally, nbytes
from opcd.tasks.order import step_rows
from opcd.tasks.prepare import Setup, prepare
from opcd.training.build import build_distiller
from opcd.training.loop import Distiller
from tests.conftest import tiny_tokenizer
from tests.opcd.architectures import build

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, bfloat16": {"dtype": "bfloat16"},
    "full, checkpointing": {"dtype": "bfloat16", "gradient_checkpointing": True},
    "lora": {"lora_rank": 4, "dtype": "bfloat16"},
    "lora, checkpointing": {"lora_rank": 4, "gradient_checkpointing": True},
}
HELD = ("process", "weights", "casts", "teacher", "gradients", "adam", "prefixes")


def both(settings: dict, **overrides: Any) -> tuple[Setup, Memory, Distiller]:
    setup = prepare(TrainConfig(**settings | overrides), for_training=True)
    return setup, Models(setup).memory(), build_distiller(setup)


def state_bytes(distiller: Distiller) -> int:
    states = distiller.optimizer.state_dict()["state"].values()
    return sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_those_of_the_run(kind: str, settings: dict) -> None:
    _, found, distiller = both(settings, **KINDS[kind])
    distiller.step()
    student, teacher = distiller.student, distiller.teacher.model
    parts = found.parts
    assert parts["weights"] == nbytes([*student.parameters(), *student.buffers()])
    assert parts["gradients"] == sum(p.grad.nbytes for p in distiller.parameters)
    assert parts["adam"] == state_bytes(distiller)
    assert parts["casts"] == (distiller.casts.nbytes if distiller.casts else 0)
    own = 0 if teacher is student else nbytes([*teacher.parameters(), *teacher.buffers()])
    assert parts["teacher"] == own
    assert parts["prefixes"] == distiller.teacher._prefixes.nbytes > 0


@pytest.mark.parametrize("name", ["qwen2", "qwen3-moe", "gemma3-interleaved", "bamba-hybrid"])
def test_parts_of_other_architectures(name: str, settings: dict, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    _, found, distiller = both(settings, model=str(tmp_path / "model"), dtype="bfloat16")
    distiller.step()
    student, teacher = distiller.student, distiller.teacher.model
    assert found.parts["weights"] == nbytes([*student.parameters(), *student.buffers()])
    assert found.parts["teacher"] == nbytes([*teacher.parameters(), *teacher.buffers()])
    assert found.parts["gradients"] == sum(p.grad.nbytes for p in distiller.parameters)
    assert found.parts["adam"] == state_bytes(distiller)
    assert found.parts["prefixes"] == distiller.teacher._prefixes.nbytes > 0


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_those_of_the_run(kind: str, settings: dict) -> None:
    setup, found, distiller = both(settings, **KINDS[kind], max_completion_tokens=200)
    prompts = step_rows(setup.task.train, 0, setup.config)
    rows = [Row([*p.student_ids, *[7] * 200], [(len(p.student_ids), 200)]) for p in prompts]
    student, plan = distiller.student, distiller.student_loss.plan
    low = setup.dtype == torch.bfloat16

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            if distiller.casts is None or setup.config.gradient_checkpointing:
                return planned_hidden(student, rows, plan)
            return distiller.casts.run(lambda: planned_hidden(student, rows, plan))

    if distiller.casts is not None:
        distiller.casts.refresh()
    recompute_activations(student, setup.config.gradient_checkpointing)
    _, kept = Tally().kept_by(forward)
    # The longest of all steps: words differ by a letter or two.
    assert found.parts["activations"] == pytest.approx(kept, rel=0.01)


# With LoRA the loss is one operator, whose inside a tally of real tensors does not see.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("full")])
def test_an_update_takes_what_was_counted(kind: str, settings: dict) -> None:
    setup, found, distiller = both(settings, **KINDS[kind], max_completion_tokens=200)
    prompts = step_rows(setup.task.train, 0, setup.config)
    episodes = [Episode.of_completion(prompt, [7] * 200) for prompt in prompts]
    targets = distiller.score(episodes)
    distiller.backward(episodes, targets)  # gradients stay from here on
    with Tally() as tally:
        distiller.backward(episodes, targets)
    held = sum(found.parts[part] for part in HELD)
    assert found.phases["update"] - held == pytest.approx(tally.peak, rel=0.05)


def test_the_longest_pass_counts_within_its_limit(settings: dict) -> None:
    wide = both(settings, max_completion_tokens=200)[1].parts["activations"]
    narrow = both(settings, max_completion_tokens=200, max_tokens_per_pass=500)[1].parts
    assert narrow["activations"] == pytest.approx(wide / 2, rel=0.05), "two of four sequences"


def test_several_contexts_stay_within_their_cache(settings: dict, tmp_path: Path) -> None:
    one = both(settings)[1].parts["prefixes"]
    assert one > 0
    assert both(settings, prefix_cache_mib=0)[1].parts["prefixes"] == one, "one is always kept"


def test_all_is_there_at_the_height_of_a_phase(settings: dict) -> None:
    found = both(settings, dtype="bfloat16")[1]
    held = sum(found.parts[part] for part in HELD)
    assert found.phases["optimizer"] == held
    assert found.phases["update"] >= held + found.parts["activations"]
    assert found.phases["rollout"] >= held + found.parts["rollouts"]
    assert found.peak == max(found.phases.values()) == found.needed + found.parts["process"]
