"""Sampling completions: a static cache (on a GPU one CUDA graph a step), generate, generate_batch.

Greedy completions of every engine must follow a full pass before it is timed. Before every round
of another engine ours is timed too, so that `times_ours` compares neighbours. Sequences run to
their full length: the token that would end them is one that the model hardly samples.

    B sequences, P tokens of prompt (of P − 15 to P), `new_tokens` of all completions together, if
    none ends early; `peak_mib` with what an engine makes on first use and keeps
    ours-static           the engine as it is; what it makes on first use is made before
    generate              transformers.generate, the engine of CPUs
    continuous-batching   transformers.generate_batch with a manager that is kept, and graphs

The second model has the shape of Qwen2.5-1.5B and random weights, as the first where its own are
not at hand. `rates_floor_share` is what `floors.decoding` counts (each token reads the weights
once, and the keys and values of its row), at the rates that `rates.py` measured, over the time;
`sheet_floor_share` the same at those of the data sheet. Nobody attends by cuDNN (`conftest.py`).
"""

import logging
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from benchmarks import floors, rates
from benchmarks.memory import peak_mib
from benchmarks.problems import SMOLLM2, frozen_model, has_smollm2, sizes_of
from benchmarks.rounds import Rounds
from opcd.models.by_name import resolve_device, resolve_dtype
from opcd.models.head import head_of
from opcd.passes.hidden import completion_rows, scored_hidden
from opcd.passes.plan import find_plan
from opcd.rollouts.generate import TransformersEngine
from opcd.rollouts.protocol import RolloutEngine, SamplingParams
from opcd.rollouts.static import StaticEngine, why_not_static
from opcd_kernels import reference

DEVICE = resolve_device("auto")
DTYPE = resolve_dtype("auto", DEVICE)
ON_GPU = DEVICE.type == "cuda"
PROMPT = 32
TokenIds = list[list[int]]
Sample = Callable[[TokenIds, SamplingParams], TokenIds]


class Case(NamedTuple):
    """What is sampled."""

    model: str
    sequences: int
    most_tokens: int  # new ones of each sequence


CASES = [Case(SMOLLM2, 16, 128), Case("qwen2.5-1.5b", 64, 256)] if ON_GPU else []
CASES = CASES or [Case(SMOLLM2, 8, 32)]
NAMES = {SMOLLM2: "SmolLM2-135M", "qwen2.5-1.5b": "Qwen2.5-1.5B shape"}  # of models, in rows
PROVIDERS = ("ours-static", "generate", "continuous-batching")


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{c.sequences}x{c.most_tokens}")
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def model(case: Case) -> Iterator[PreTrainedModel]:
    _, made = frozen_model(case.model, DEVICE, DTYPE)
    made.generation_config.eos_token_id = made.config.vocab_size - 1
    yield made
    made.destroy_cached_continuous_batching_manager()


@pytest.fixture(scope="module")
def prompts(case: Case) -> TokenIds:
    generator = torch.Generator().manual_seed(0)
    lengths = (PROMPT - i % 16 for i in range(case.sequences))
    return [torch.randint(20, 40_000, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def static(model: PreTrainedModel, case: Case) -> RolloutEngine:
    reason = why_not_static(model, find_plan(model, list(range(50, 90))))
    assert reason is None, f"not timed: {reason}"
    return StaticEngine(model, case.sequences)


def engine_sample(engine: RolloutEngine) -> Sample:
    return lambda prompts, params: [
        r.completion_token_ids for r in engine.generate(prompts, params, range(len(prompts)))
    ]


def continuous_batching(model: PreTrainedModel) -> Sample:
    """Blocks are not shared: a manager that is kept would serve keys of weights before a step.

    It keeps the sampling parameters that it was made for, too, so that others need another.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = ContinuousBatchingConfig(
        allow_block_sharing=False, use_cuda_graph=ON_GPU, max_memory_percent=0.3 if ON_GPU else 0.05
    )

    made_for: list[SamplingParams] = []

    def sample(prompts: TokenIds, params: SamplingParams) -> TokenIds:
        if made_for != [params]:
            model.destroy_cached_continuous_batching_manager()
            made_for[:] = [params]
        greedy = {"do_sample": False}
        drawn = {"do_sample": True, "temperature": params.temperature, "top_k": 0, "top_p": 1.0}
        found = model.generate_batch(
            prompts,
            GenerationConfig(
                max_new_tokens=params.max_completion_tokens,
                eos_token_id=model.generation_config.eos_token_id,
                **(drawn if params.temperature else greedy),
            ),
            continuous_batching_config=config,
            persistent_manager=True,
        )
        return [output.generated_tokens for output in found.values()]

    return sample


@torch.no_grad()
def gap_to_full_pass(model: PreTrainedModel, prompts: TokenIds, completions: TokenIds) -> float:
    """By how much a full pass's largest logit exceeds that of the token taken, over its size."""
    head = head_of(model)
    hidden = scored_hidden(model, completion_rows(prompts, completions)).to(head.weight.dtype)
    logits = reference.logits(hidden, head.weight, head.bias, head.softcap).float()
    taken = torch.tensor([t for c in completions for t in c], device=logits.device)
    largest = logits.amax(-1)
    gap = largest - logits.gather(1, taken[:, None])[:, 0]
    return (gap / largest.abs()).max().item()


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start


@pytest.mark.parametrize("provider", PROVIDERS)
def test_rollout(
    benchmark: Rounds,
    model: PreTrainedModel,
    static: RolloutEngine,
    case: Case,
    prompts: TokenIds,
    provider: str,
) -> None:
    ours = engine_sample(static)
    ways: dict[str, Callable[[], Sample]] = {
        "ours-static": lambda: ours,
        "generate": lambda: engine_sample(TransformersEngine(model, case.sequences)),
        "continuous-batching": lambda: continuous_batching(model),
    }
    way = ways[provider]()
    params = SamplingParams(case.most_tokens)
    ours(prompts, params)  # at its full size, or the next call would make it anew
    greedy = way(prompts, SamplingParams(8, temperature=0.0))
    if provider == "continuous-batching" and len(greedy) < case.sequences:
        pytest.skip(f"generate_batch returned {len(greedy)} of {case.sequences} sequences")
    assert [len(c) for c in greedy] == [8] * case.sequences
    gap = gap_to_full_pass(model, prompts, greedy)
    assert gap < 0.05, f"tokens with logits {gap:.0%} below the largest: not timed"
    found: list[TokenIds] = []
    if provider == "ours-static":
        static.close()  # or what it keeps would not count
    peak = peak_mib(DEVICE, lambda: found.append(way(prompts, params)))
    neighbours: list[float] = []
    benchmark.time(
        lambda: seconds(lambda: way(prompts, params)),
        3,
        before=lambda: neighbours.append(seconds(lambda: ours(prompts, params))),
    )
    work = floors.decoding(
        sizes_of(model), case.sequences, PROMPT, case.most_tokens, DTYPE.itemsize
    )
    sheet = rates.sheet(DEVICE)
    median = benchmark.median
    sampled = sum(map(len, found[0]))
    benchmark.facts |= {
        "question": "rollout",
        "provider": provider,
        "model": NAMES[case.model] + ("" if case.model != SMOLLM2 or has_smollm2() else " random"),
        "P": PROMPT,
        "B": case.sequences,
        "dtype": str(DTYPE).removeprefix("torch."),
        "new_tokens": case.sequences * case.most_tokens,
        "tokens_per_s": round(sampled / median),
        "logit_gap": float(f"{gap:.1g}"),
        "peak_mib": None if peak is None else round(peak, 1),
        "rates_floor_share": round(floors.floor_s(work, rates.measured(DEVICE)) / median, 3),
        "sheet_floor_share": sheet and round(floors.floor_s(work, sheet) / median, 3),
        "times_ours": round(median / statistics.median(neighbours), 2),
    }
