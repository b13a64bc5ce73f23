"""Scoring completions behind a shared context: packed, with an expanded DynamicCache, in full.

The built-in SmolLM2-135M-Instruct, bf16 where the hardware has it. Every way must agree with full
passes before it is timed. Before every round of another provider ours is timed too, so that
`times_ours` compares neighbours.

    P tokens of context, B sequences of 64 new tokens (20 of prompt; mixed: 24 to 104 in all)
    ours-packed     the teacher as it is
    dynamic-cache   one recorded cache, expanded to B rows and grown in the pass; padded rows
    recompute       context, prompt and completion in full, padded rows
"""

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.memory import peak_mib
from opcd.lm import transformer
from opcd.models import load_model, resolve_device, resolve_dtype
from opcd.objective import head_divergence
from opcd.prefix import SharedPrefix
from opcd.teacher import SharedPrefixTeacher

DEVICE = resolve_device("auto")
DTYPE = resolve_dtype("auto", DEVICE)
PROMPT = 20
COMPLETIONS = {"equal": [44] * 8, "mixed": [4, 12, 20, 36, 48, 64, 84, 84]}
CASES = [(256, "mixed", 1), (1024, "equal", 1), (1024, "mixed", 1), (1024, "equal", 2),
         (4096, "mixed", 1)]  # fmt: skip
PROVIDERS = ("ours-packed", "dynamic-cache", "recompute")
TokenIds = list[list[int]]


exact: dict[tuple[int, str, int], Tensor] = {}  # full passes by case


def tokens(*counts: int) -> TokenIds:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(20, 40_000, (n,), generator=generator).tolist() for n in counts]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return load_model("smollm2-135m-instruct", DTYPE, DEVICE)


def dynamic_cache(
    model: torch.nn.Module, prefix: SharedPrefix, prompts: TokenIds, completions: TokenIds
) -> Tensor:
    """Padded on the right; masks are left to transformers."""
    sequences = [[*p, *c][:-1] for p, c in zip(prompts, completions, strict=True)]
    width = max(map(len, sequences))
    ids = torch.tensor([[*s, *[0] * (width - len(s))] for s in sequences], device=DEVICE)
    positions = torch.arange(len(prefix), len(prefix) + width, device=DEVICE)
    hidden = transformer(model)(
        input_ids=ids,
        position_ids=positions[None],
        past_key_values=prefix.expand(len(ids)),
        use_cache=True,
    ).last_hidden_state
    ends = zip(hidden, sequences, completions, strict=True)
    return torch.cat([row[len(s) - len(c) : len(s)] for row, s, c in ends])


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@pytest.mark.parametrize(("p", "kind", "times"), CASES, ids=lambda x: str(x))
@pytest.mark.parametrize("provider", PROVIDERS)
def test_teacher(
    benchmark: Callable, model: torch.nn.Module, provider: str, p: int, kind: str, times: int
) -> None:
    prefix_ids, *rest = tokens(p, *[PROMPT] * 8 * times, *COMPLETIONS[kind] * times)
    prompts, completions = rest[: 8 * times], rest[8 * times :]
    with torch.no_grad():
        prefix = SharedPrefix(model, prefix_ids)
    packed = SharedPrefixTeacher(model, prefix_ids)
    full = SharedPrefixTeacher(model, prefix_ids, 10**9, shared=False)
    assert packed.plan.mode == "packed", packed.plan
    ways: dict[str, Callable[[], Tensor]] = {
        "ours-packed": lambda: packed.score(prompts, completions).hidden,
        "dynamic-cache": torch.no_grad()(
            lambda: dynamic_cache(model, prefix, prompts, completions)
        ),
        "recompute": lambda: full.score(prompts, completions).hidden,
    }
    way, case = ways[provider], (p, kind, times)
    if case not in exact:
        exact[case] = ways["recompute"]()
    hidden: list[Tensor] = []
    peak = peak_mib(DEVICE, lambda: hidden.append(way()))
    found = head_divergence(hidden[0], full.head, exact[case], full.head).per_token
    divergence = found.mean().item()
    assert divergence < (1e-5 if torch.float32 == DTYPE else 0.02), "wrong: not timed"
    ours: list[float] = []
    slow = provider == "recompute" and p * times > 1024
    benchmark.pedantic(
        lambda: seconds(way),
        setup=lambda: ours.append(seconds(ways["ours-packed"])),
        rounds=1 if slow else 5,
    )
    benchmark.extra_info |= {
        "question": "teacher",
        "provider": provider,
        "P": p,
        "B": 8 * times,
        "lengths": kind,
        "dtype": str(DTYPE).removeprefix("torch."),
        "new_tokens": sum(map(len, prompts + completions)),
        "divergence": float(f"{divergence:.1g}"),
        "peak_mib": None if peak is None else round(peak, 1),
        "prefix_mib": round(prefix.nbytes / 2**20, 1),
        "times_ours": round(benchmark.stats.stats.median / statistics.median(ours), 2),
    }
