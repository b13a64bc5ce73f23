"""Scoring completions behind a shared context: packed, with an expanded DynamicCache, in full.

The built-in SmolLM2-135M-Instruct (of random weights where its own are not at hand: nothing is
fetched), bf16 where the hardware has it; on a GPU also four layers of
Llama-3.1-8B's shape with random weights. Every way must agree with full passes before it is timed.
Before every round of another provider ours is timed too, so that `times_ours` compares neighbours.

    P tokens of context, B sequences of new tokens: 20 of prompt, and a completion of 44 (equal), 4
    to 84 (mixed) or 236 to 492 tokens (long)
    ours-packed     the teacher as it is
    dynamic-cache   one recorded cache, expanded to B rows and grown in the pass; padded rows
    recompute       context, prompt and completion in full, padded rows

`rates_floor_share` is what `floors.forward` counts for the new tokens, whoever computes more than
these, at the rates that `rates.py` measured, over the time; `sheet_floor_share` the same at those
of the data sheet. Nobody attends by cuDNN (`conftest.py`).

`test_contexts`: as many sequences, each behind a context of its own or all behind one; the prefixes
are recorded before. `times_one` is the median over that of one context, rounds interleaved.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import floors, rates
from benchmarks.memory import peak_mib
from benchmarks.problems import SMOLLM2, frozen_model, has_smollm2, sizes_of
from benchmarks.rounds import Rounds
from opcd.models.by_name import resolve_device, resolve_dtype
from opcd.models.lm import cache_argument, transformer
from opcd.objective import head_divergence
from opcd.passes.prefix import SharedPrefix
from opcd.teacher import SharedPrefixTeacher

DEVICE = resolve_device("auto")
DTYPE = resolve_dtype("auto", DEVICE)
ON_GPU = DEVICE.type == "cuda"
PROMPT = 20
COMPLETIONS = {
    "equal": [44] * 8,
    "mixed": [4, 12, 20, 36, 48, 64, 84, 84],
    "long": [236 + 256 * i // 15 for i in range(16)],
}
ROUNDS, SLOW_ROUNDS = 5, 3 if ON_GPU else 1  # slow: full passes behind a long context
FULL_PASS = 2**17  # tokens of a full pass, which must fit into a GPU
PROVIDERS = ("ours-packed", "dynamic-cache", "recompute")
TokenIds = list[list[int]]
Model = tuple[str, torch.nn.Module]  # its name in the rows


class Case(NamedTuple):
    model: str  # among MODELS
    p: int
    lengths: str  # among COMPLETIONS
    times: int  # those lengths are there so many times

    def __str__(self) -> str:
        return "-".join(map(str, self))


SMOL = [
    Case("smollm2", *case)
    for case in [
        (256, "mixed", 1),
        (1024, "equal", 1),
        (1024, "mixed", 1),
        (1024, "equal", 2),
        (4096, "mixed", 1),
    ]
]
LLAMA = [Case("llama", p, "long", times) for p in (2048, 8192) for times in (1, 4)]
CASES = SMOL + (LLAMA if ON_GPU else [])

exact: dict[Case, Tensor] = {}  # full passes


def smollm2() -> Model:
    _, model = frozen_model(SMOLLM2, DEVICE, DTYPE)
    own, random = "SmolLM2-135M-Instruct", "SmolLM2-135M's shape with random weights"
    return own if has_smollm2() else random, model


def llama() -> Model:
    model = random_llama(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    return "4 layers of Llama-3.1-8B's shape with random weights", model


def random_llama(**shape: int) -> torch.nn.Module:
    """Made in place, without files; its logits are as far apart as those of a trained model."""
    torch.manual_seed(0)
    config = LlamaConfig(max_position_embeddings=2**17, **shape)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    model.lm_head.weight.data *= 4  # or wrong hidden states would hardly change the divergence
    return model.eval().requires_grad_(False)


MODELS: dict[str, Callable[[], Model]] = {"smollm2": smollm2, "llama": llama}


@functools.cache
def load(name: str) -> Model:
    return MODELS[name]()


def tokens(*counts: int) -> TokenIds:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(20, 40_000, (n,), generator=generator).tolist() for n in counts]


@torch.no_grad()
def dynamic_cache(
    model: torch.nn.Module, prefix: SharedPrefix, prompts: TokenIds, completions: TokenIds
) -> Tensor:
    """Padded on the right; masks are left to transformers."""
    sequences = [[*p, *c][:-1] for p, c in zip(prompts, completions, strict=True)]
    width = max(map(len, sequences))
    ids = torch.tensor([[*s, *[0] * (width - len(s))] for s in sequences], device=DEVICE)
    positions = torch.arange(len(prefix), len(prefix) + width, device=DEVICE)
    body = transformer(model)
    hidden = body(
        input_ids=ids,
        position_ids=positions[None],
        **cache_argument(body, prefix.expand(len(ids))),
        use_cache=True,
    ).last_hidden_state
    ends = zip(hidden, sequences, completions, strict=True)
    return torch.cat([row[len(s) - len(c) : len(s)] for row, s, c in ends])


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_teacher(benchmark: Rounds, provider: str, case: Case) -> None:
    name, model = load(case.model)
    lengths = COMPLETIONS[case.lengths] * case.times
    prefix_ids, *rest = tokens(case.p, *[PROMPT] * len(lengths), *lengths)
    prompts, completions = rest[: len(lengths)], rest[len(lengths) :]
    with torch.no_grad():
        prefix = SharedPrefix(model, prefix_ids)
    packed = SharedPrefixTeacher(model, prefix_ids)
    full = SharedPrefixTeacher(model, prefix_ids, FULL_PASS, shared=False)
    assert packed.plan.mode == "packed", packed.plan
    ways: dict[str, Callable[[], Tensor]] = {
        "ours-packed": lambda: packed.score(prompts, completions).hidden,
        "dynamic-cache": lambda: dynamic_cache(model, prefix, prompts, completions),
        "recompute": lambda: full.score(prompts, completions).hidden,
    }
    way = ways[provider]
    hidden: list[Tensor] = []
    try:
        if case not in exact:
            exact[case] = ways["recompute"]()
        peak = peak_mib(DEVICE, lambda: hidden.append(way()))
    except torch.OutOfMemoryError:
        pytest.skip("out of memory")
    found = head_divergence(hidden[0], full.head, exact[case], full.head).per_token
    divergence = found.mean().item()
    assert divergence < (1e-5 if torch.float32 == DTYPE else 0.02), "wrong: not timed"
    ours: list[float] = []
    slow = provider == "recompute" and case.p * len(lengths) > 8192
    benchmark.time(
        lambda: seconds(way),
        SLOW_ROUNDS if slow else ROUNDS,
        before=lambda: ours.append(seconds(ways["ours-packed"])),
    )
    new = [(PROMPT + length - 1, case.p) for length in lengths]
    work = [floors.forward(sizes_of(model), new)]
    sheet, floor = rates.sheet(DEVICE), floors.floor_s(work, rates.measured(DEVICE))
    benchmark.facts |= {
        "question": "teacher",
        "provider": provider,
        "model": name,
        "P": case.p,
        "B": len(lengths),
        "lengths": case.lengths,
        "dtype": str(DTYPE).removeprefix("torch."),
        "new_tokens": sum(map(len, prompts + completions)),
        "divergence": float(f"{divergence:.2g}"),
        "peak_mib": None if peak is None else round(peak, 1),
        "prefix_mib": round(prefix.nbytes / 2**20, 1),
        "rates_floor_share": round(floor / benchmark.median, 3),
        "sheet_floor_share": sheet and round(floors.floor_s(work, sheet) / benchmark.median, 3),
        "times_ours": round(benchmark.median / statistics.median(ours), 2),
    }


@pytest.mark.parametrize("contexts", [1, 16])
def test_contexts(benchmark: Rounds, contexts: int) -> None:
    name, model = load("smollm2")
    p, sequences = 512, 16
    lengths = [44] * sequences
    parts = tokens(*[p] * sequences, *[PROMPT] * sequences, *lengths)
    prefixes, prompts, completions = (parts[i : i + sequences] for i in (0, 16, 32))
    teacher = SharedPrefixTeacher(model, {str(i): ids for i, ids in enumerate(prefixes)})

    def score(count: int) -> Tensor:
        names = [str(i % count) for i in range(sequences)]
        return teacher.score(prompts, completions, names).hidden

    alone = torch.cat(
        [
            SharedPrefixTeacher(model, prefixes[i % contexts], shared=False).score([a], [b]).hidden
            for i, (a, b) in enumerate(zip(prompts, completions, strict=True))
        ]
    )
    found = head_divergence(score(contexts), teacher.head, alone, teacher.head).per_token
    divergence = found.mean().item()
    assert divergence < (1e-5 if torch.float32 == DTYPE else 0.02), "wrong: not timed"
    one: list[float] = []
    score(1)
    benchmark.time(
        lambda: seconds(lambda: score(contexts)),
        2 * ROUNDS,
        before=lambda: one.append(seconds(lambda: score(1))),
    )
    benchmark.facts |= {
        "question": "contexts",
        "provider": "ours-packed",
        "model": name,
        "P": p,
        "B": sequences,
        "contexts": contexts,
        "dtype": str(DTYPE).removeprefix("torch."),
        "divergence": float(f"{divergence:.2g}"),
        "times_one": round(benchmark.median / statistics.median(one), 2),
    }
