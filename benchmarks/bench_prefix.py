"""Scoring completions behind a shared context: the prefix cached, against every sequence in full.

The built-in SmolLM2-135M-Instruct, bf16 where the CPU has it. Both ways must agree before either
is timed; their divergence goes into `extra_info`.
"""

from collections.abc import Callable

import pytest
import torch

from opcd.models import load_model, resolve_device, resolve_dtype
from opcd.objective import head_divergence
from opcd.teacher import SharedPrefixTeacher

B, PROMPT, COMPLETION = 16, 20, 12
PREFIXES = [256, 700]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    device = resolve_device("auto")
    return load_model("smollm2-135m-instruct", resolve_dtype("auto", device), device)


@pytest.mark.parametrize("prefix_tokens", PREFIXES)
@pytest.mark.parametrize("mode", ["cached", "recompute"])
def test_teacher(
    benchmark: Callable, model: torch.nn.Module, mode: str, prefix_tokens: int
) -> None:
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(20, 40_000, (count,), generator=generator).tolist()

    prefix = tokens(prefix_tokens)
    prompts, completions = (
        [tokens(PROMPT) for _ in range(B)],
        [tokens(COMPLETION) for _ in range(B)],
    )
    cached = SharedPrefixTeacher(model, prefix)
    full = SharedPrefixTeacher(model, prefix, shared=False)
    assert (cached.plan.mode, full.plan.mode) == ("cached", "recompute")
    a, b = (t.score(prompts, completions).hidden for t in (cached, full))
    divergence = head_divergence(a, cached.head, b, cached.head).per_token.mean().item()
    assert divergence < 0.02, "wrong: not timed"
    benchmark.extra_info |= {
        "divergence_nats": divergence,
        "prefix_tokens": prefix_tokens,
        "sequences": B,
        "new_tokens": PROMPT + COMPLETION,
    }
    teacher = cached if mode == "cached" else full
    benchmark.pedantic(teacher.score, (prompts, completions), rounds=5, warmup_rounds=1)
