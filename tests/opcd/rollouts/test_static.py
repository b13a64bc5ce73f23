"""Decoding from a static cache: weights never stale, graphs made anew in time, reasons given.

What both engines must do stands in test_generate.py; tests marked gpu go through a CUDA graph.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from opcd.errors import InputError
from opcd.models.lm import autocast
from opcd.passes.packed import packed_pass
from opcd.passes.plan import find_plan
from opcd.rollouts.capture import Recording
from opcd.rollouts.choice import build_engine
from opcd.rollouts.decode import STEPS_BETWEEN_LOOKS, Decoder
from opcd.rollouts.generate import TransformersEngine
from opcd.rollouts.protocol import SamplingParams
from opcd.rollouts.static import StaticEngine, why_not_static
from tests.conftest import tiny_llama
from tests.opcd.architectures import ARCHITECTURES, build
from tests.opcd.rollouts.played_cuda import FakeGraph, PlayedCuda

CPU = torch.device("cpu")
GREEDY = SamplingParams(max_completion_tokens=12, temperature=0.0)
SHARED = list(range(60, 90))
PROMPTS = [[5], [6, 7, 8], [9, 10], [6, 7, 8], [*SHARED, 11]]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def completions(engine: StaticEngine | TransformersEngine, prompts: list = PROMPTS) -> list:
    return [r.completion_token_ids for r in engine.generate(prompts, GREEDY)]


@torch.no_grad()
def assert_greedy(model: torch.nn.Module, prompt: list, completion: list) -> None:
    """Each token has the largest logit of a full pass; in bf16 nearly, as ties are many."""
    device = next(model.parameters()).device
    ids = torch.tensor([prompt + completion], device=device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
    exact = not torch.is_autocast_enabled(device.type)
    assert (logits.amax(-1) - chosen).max() <= (1e-4 if exact else 0.02 * logits.abs().max())


def optimizer_step(model: torch.nn.Module) -> None:
    """As the training loop makes it: fused, in place, on gradients of a pass."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, fused=True)
    ids = torch.tensor([[5, 6, 7, 8]], device=trained[0].device)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "autocast"])
def test_weights_are_never_stale(dtype: torch.dtype, lora: bool, device: str) -> None:
    model = tiny_llama(tie_word_embeddings=True).to(device)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).eval()
    engine = StaticEngine(model)
    found, decoders = [], []
    for _ in range(3):
        with autocast(torch.device(device), dtype):
            found.append(completions(engine))
            decoders.append(engine._decoder)
            for prompt, completion in zip(PROMPTS, found[-1], strict=True):
                assert_greedy(model, prompt, completion)
        optimizer_step(model)
    assert found[0] != found[1] != found[2], "a step must change what is sampled"
    assert all(d is decoders[0] for d in decoders), "nothing had to be made anew"


@pytest.mark.parametrize("device", DEVICES)
def test_an_adapter_is_followed(device: str) -> None:
    model = get_peft_model(
        tiny_llama(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    ).to(device).eval()  # fmt: skip
    engine, plain = StaticEngine(model), TransformersEngine(model)
    adapted = completions(engine)
    assert adapted == completions(plain)
    with model.disable_adapter():
        assert completions(engine) == completions(plain) != adapted
    assert completions(engine) == adapted
    model.merge_adapter()
    assert completions(engine) == completions(plain)


def moved(model: torch.nn.Module) -> contextlib.AbstractContextManager:
    weight = next(p for n, p in model.named_parameters() if "up_proj" in n)
    weight.data = weight.data.clone()
    return contextlib.nullcontext()


@contextlib.contextmanager
def training(model: torch.nn.Module) -> Iterator[None]:
    model.train()
    yield
    model.eval()


@pytest.mark.parametrize(
    "change", [moved, training, lambda model: autocast(CPU, torch.bfloat16),
     lambda model: model.disable_adapter(), lambda model: torch.inference_mode()],
    ids=["moved", "training", "autocast", "adapter", "inference"],
)  # fmt: skip
def test_a_decoder_is_made_anew_where_a_graph_would_be_wrong(change: Callable) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear")).eval()
    engine = StaticEngine(model)
    engine.generate(PROMPTS, GREEDY)
    first = engine._decoder
    engine.generate(PROMPTS, GREEDY)
    assert engine._decoder is first
    with change(model):
        engine.generate(PROMPTS, GREEDY)
    assert engine._decoder is not first
    engine.generate(PROMPTS, GREEDY)
    engine.close()
    assert engine._decoder is None


def test_what_was_in_the_cache_before_is_not_seen() -> None:
    model = tiny_llama()
    engine = StaticEngine(model, 2)
    alone = completions(engine, [[5, 6]])
    completions(engine, [[7] * 30, [8] * 30])
    assert completions(engine, [[5, 6], [5, 6, 7], [5, 6]])[::2] == alone * 2


def test_weights_that_were_not_finite_leave_nothing_behind() -> None:
    model = tiny_llama()
    engine = StaticEngine(model, 2)
    prompts = [[5, 6], [7]]
    before = completions(engine, prompts)
    weight = model.model.layers[0].self_attn.v_proj.weight.data
    good = weight.clone()
    weight.fill_(torch.nan)
    completions(engine, [[9] * 30, [8] * 30])
    weight.copy_(good)
    assert completions(engine, prompts) == before


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> PlayedCuda:
    return PlayedCuda(monkeypatch)


@pytest.fixture
def events(played: PlayedCuda) -> list[str]:
    """Steps and what `capture` asks of torch.cuda, in order; nothing of it needs a GPU."""
    return played.events


def test_capture_tries_the_step_before_it_records_it(events: list[str]) -> None:
    decoder = Decoder(tiny_llama(), 2, 64, [1])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")  # nobody need read of torch's prototype
        decoder.capture()
    tried = ["step", "sync error", "step", "sync 0"]
    assert events == [*tried, "new stream of cpu", "capture", "step", "captured"]
    assert [len(row) for row in decoder.sequences()] == [1, 1], "no row took part"


@pytest.fixture
def refused(played: PlayedCuda) -> list[str]:
    """A CUDA that ends every recording with an error, and leaves torch's stream as it was in it."""
    played.fails = lambda: None
    return played.events


def test_a_capture_that_fails_leaves_auto_with_generate(
    refused: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    plan = find_plan(model, SHARED)

    def captured(model: torch.nn.Module) -> float:
        Decoder(model, 2, 64, []).capture()
        return 0.0

    monkeypatch.setattr("opcd.rollouts.static._gap_to_full_passes", captured)
    gpu = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr("opcd.rollouts.choice.causal_lm", lambda model: gpu)
    engine = build_engine("auto", model, 4, plan)
    assert engine.name == "generate"
    assert refused[-3:-1] == ["step", "back to the stream before"], "the step itself had run"
    assert refused[-1] == "a generator that draws", "it took itself for recorded"
    assert "does not fit into a CUDA graph: CUDA error: operation not permitted" in caplog.text
    with pytest.raises(InputError, match=r"must suit the model.*CUDA graph: CUDA error"):
        build_engine("static", model, 4, plan)


def test_a_capture_that_fails_in_the_middle_of_a_run(
    refused: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """As for a size that was not tried: transformers.generate goes on, and that is said once."""
    model = tiny_llama()
    engine = StaticEngine(model, 4)
    engine._graphed = True
    engine.sync(model, 3)
    expected = completions(TransformersEngine(model))
    assert completions(engine) == completions(engine) == expected
    assert engine.name == "generate"
    assert len(engine.open([[5]]).complete(GREEDY)) == 1
    engine.sync(model, 4)
    assert engine.generate(PROMPTS, GREEDY)[0].weights_version == 4
    (record,) = caplog.records
    assert "from now on, not a static cache: a step of LlamaForCausalLM" in record.getMessage()


class Memory:
    """A GPU that holds decoders of so many rows."""

    def __init__(self, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows = rows
        self.asked: list[int] = []
        place, generate = Decoder.place, TransformersEngine._generate_batch

        def placed(decoder: Decoder, *arguments: object) -> None:
            self.take(decoder.rows)
            place(decoder, *arguments)

        def generated(engine: TransformersEngine, prompts: list, *arguments: object) -> list:
            self.take(len(prompts))
            return generate(engine, prompts, *arguments)

        monkeypatch.setattr(Decoder, "place", placed)
        monkeypatch.setattr(TransformersEngine, "_generate_batch", generated)

    def take(self, rows: int) -> None:
        self.asked.append(rows)
        if rows > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 35.00 GiB")


@pytest.mark.parametrize("kind", [StaticEngine, TransformersEngine])
def test_where_memory_runs_out_fewer_are_sampled_at_once(
    kind: type, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    params = SamplingParams(8, temperature=1.0)
    monkeypatch.setattr("opcd.rollouts.generate.TOKENS_A_ROW", 1)  # no more rows than asked for
    expected = kind(model, 32).generate(PROMPTS, params, range(5))
    memory = Memory(2, monkeypatch)
    engine = kind(model, 32)
    assert engine.generate(PROMPTS, params, range(5)) == expected
    assert memory.asked[0] == 5
    assert set(memory.asked[1:]) == {1, 2}
    tried = len(memory.asked)
    assert engine.generate(PROMPTS, params, range(5)) == expected
    assert max(memory.asked[tried:]) == 2, "what did not fit is not tried again"
    (record,) = caplog.records
    assert "sample 2 sequences at once from now on, not 5" in record.getMessage()
    assert engine.name == kind(model).name


def test_where_not_one_row_fits_generate_takes_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    expected = completions(TransformersEngine(model))
    place = Decoder.place

    def full(decoder: Decoder, *arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Decoder, "place", full)
    engine = StaticEngine(model, 32)
    assert completions(engine) == expected
    assert engine.name == "generate"
    assert "not a static cache: CUDA out of memory" in caplog.text
    monkeypatch.setattr(Decoder, "place", place)
    Memory(0, monkeypatch)
    with pytest.raises(InputError, match=r"must fit the GPU's memory.*of up to 43 tokens alone"):
        completions(engine)


def test_no_pass_over_prompts_holds_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """In packed rows, where a long prompt is cut, and in padded ones."""
    model = tiny_llama()
    prompts = [[*range(40, 100), 5], [*range(100, 140)], [7, 8], [7, 8], [9], [*range(30, 55)]]
    expected = completions(TransformersEngine(model, share_prefix=False), prompts)
    widths, shapes = [], []
    monkeypatch.setattr(
        "opcd.rollouts.decode.packed_pass",
        lambda *a: widths.append(a[1].shape[1]) or packed_pass(*a),
    )
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **o: shapes.append(o["input_ids"].shape) or generate(**o)
    )
    for most in (1000, 50, 16):
        widths.clear()
        shapes.clear()
        engine = StaticEngine(model, max_tokens_per_pass=most)
        assert completions(engine, prompts) == expected
        assert max(widths) <= most
        assert sum(widths) == 60 + 39 + 1 + 24, "nothing twice"
        assert len(widths) == -(-sum(widths) // most)
        assert completions(TransformersEngine(model, max_tokens_per_pass=most), prompts) == expected
        assert all(rows * width <= max(most, width) for rows, width in shapes)


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gpt-oss-sinks"])
def test_prompts_are_cut_behind_a_shared_start_too(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opcd.passes.prefix.MIN_TOKENS_SAVED", 1)
    model = build(name)
    prompts = [[*SHARED, *range(40, 75)], [*SHARED, *range(100, 114)], [*SHARED, 7]]
    engine = StaticEngine(model, max_tokens_per_pass=10)
    assert completions(engine, prompts) == completions(TransformersEngine(model), prompts)


def test_a_graph_is_kept_for_whatever_fits(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    engine = StaticEngine(model, 4)
    engine._graphed = True
    capture = Decoder.capture

    def captured(self: Decoder) -> None:
        capture(self)
        self._recorded.graph.decoder = self

    monkeypatch.setattr(Decoder, "capture", captured)
    long = [[*range(40, 100), 5], [6]]
    sizes = []
    for prompts in (PROMPTS[:1], PROMPTS[:3], [[5]], long, PROMPTS):
        assert completions(engine, prompts) == completions(TransformersEngine(model), prompts)
        sizes.append((engine._decoder.rows, engine._decoder.length))
    assert sizes == [(1, 64), (3, 64), (3, 64), (3, 128), (4, 128)]
    assert events.count("capture") == 4
    assert engine._decoder._recorded.graph.replays > 0


@pytest.mark.parametrize("graphed", [False, True])
@torch.no_grad()
def test_decoding_ends_soon_after_the_last_row(graphed: bool) -> None:
    model = tiny_llama()
    expected = completions(TransformersEngine(model), [[5], [6, 7]])
    eos = expected[0][3], expected[1][5]
    decoder = Decoder(model, 3, 64, eos)
    graph = FakeGraph()
    graph.decoder = decoder
    if graphed:
        decoder._recorded = Recording(None, torch.empty(0), graph)
    steps: list[int] = []
    step = decoder.step
    decoder.step = lambda: (steps.append(1), step())[1]
    decoder.load([[5], [6, 7]], None, SamplingParams(50, 0.0), torch.arange(2))
    decoder.run(SamplingParams(50, 0.0))
    needed = 1 + max(
        min(i for i, t in enumerate(row) if t in eos) for row in expected
    )  # fmt: skip
    assert 1 < needed < STEPS_BETWEEN_LOOKS
    assert len(steps) == (STEPS_BETWEEN_LOOKS if graphed else needed)
    assert graph.replays == (len(steps) if graphed else 0)
    rows = decoder.sequences()
    for prompt, row, full in zip([[5], [6, 7]], rows, expected, strict=False):
        end = min(i for i, t in enumerate(full) if t in eos)
        assert row == prompt + full[: end + 1], "nothing follows the EOS, whatever runs on"
    assert len(rows[2]) == 1, "an idle row stays idle"


def test_what_a_graph_reads_and_writes_never_moves() -> None:
    decoder = Decoder(tiny_llama(), rows=3, length=64, eos_token_ids=[1])

    def places() -> dict[str, int]:
        held = {k: x for k, x in vars(decoder).items() if isinstance(x, torch.Tensor)}
        layers = enumerate(x for layer in decoder._cache._layers.values() for x in layer)
        return {k: x.data_ptr() for k, x in [*held.items(), *layers]}

    with torch.no_grad():
        decoder.load(PROMPTS[:3], None, SamplingParams(4), torch.arange(3))
        decoder.run(SamplingParams(4))
        before = places()
        decoder.load(PROMPTS[1:3], None, SamplingParams(6, 0.0), torch.arange(2))
        decoder.run(SamplingParams(6, 0.0))
    assert places() == before
    assert len(before) > 8


def test_equal_prompts_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    widths = []
    monkeypatch.setattr(
        "opcd.rollouts.decode.packed_pass",
        lambda *a: widths.append(a[1].shape[1]) or packed_pass(*a),
    )
    params = SamplingParams(8, temperature=1.0)
    StaticEngine(model).generate([[5, 6, 7]] * 4 + [[8, 9]] * 4, params, range(8))
    assert widths == [2 + 1]


def test_a_wrong_decoder_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    plan = find_plan(model, SHARED)
    assert why_not_static(model, plan) is None
    assert isinstance(build_engine("static", model, 4, plan), StaticEngine)
    monkeypatch.setattr(
        "opcd.rollouts.decode.cached_attention", lambda q, k, v, *_: v[:, :, 0].repeat(1, 2, 1)
    )
    assert "steps differ from full passes" in why_not_static(model, plan)
    with pytest.raises(InputError, match="must suit the model, got LlamaForCausalLM: steps differ"):
        build_engine("static", model, 4, plan)


def test_auto_is_static_on_a_gpu_where_it_can_be(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    plan = find_plan(model, SHARED)
    assert build_engine("auto", model, 4, plan).name == "generate"
    gpu = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr("opcd.rollouts.choice.causal_lm", lambda model: gpu)
    assert build_engine("auto", model, 4, plan).name == "static"
    assert build_engine("generate", model, 4, plan).name == "generate"
    assert not caplog.records

    def wait(self: Decoder) -> None:
        raise RuntimeError("called a synchronizing CUDA operation\nand more")

    monkeypatch.setattr(Decoder, "step", wait)
    assert build_engine("auto", model, 4, plan).name == "generate"
    assert "not a static cache: called a synchronizing CUDA operation" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_replays_equal_generate(name: str) -> None:
    model = build(name).cuda()
    plan = find_plan(model, SHARED)
    if reason := why_not_static(model, plan):
        assert not plan.packed or "moe" in name or "gpt-oss" in name, reason
        pytest.skip(reason)
    engine = StaticEngine(model, 3)
    prompts = [[*SHARED, *p] for p in PROMPTS]
    assert completions(engine, prompts) == completions(TransformersEngine(model, 3), prompts)
    assert engine._decoder._recorded is not None


@pytest.mark.gpu
def test_replays_draw_what_plain_steps_draw() -> None:
    model = tiny_llama(initializer_range=0.02)
    params = SamplingParams(8, temperature=1.0)
    on_cpu = StaticEngine(model).generate(PROMPTS, params, range(len(PROMPTS)))
    engine = StaticEngine(model.cuda())
    engine.generate([[5] * 20] * 9, params, range(9))  # a larger decoder: rows that stay idle
    assert engine.generate(PROMPTS, params, range(len(PROMPTS))) == on_cpu


@pytest.mark.gpu
def test_a_model_that_waits_for_the_gpu_is_not_captured() -> None:
    model = tiny_llama().cuda()
    plan = find_plan(model, SHARED)
    assert why_not_static(model, plan) is None
    model.lm_head.register_forward_hook(lambda *x: x[-1] * int(x[-1].amax().item() < 1e9))
    assert "synchronizing" in why_not_static(model, plan)
    assert build_engine("auto", model, 4, plan).name == "generate"
