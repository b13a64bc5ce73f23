"""Every causal LM of transformers that can be built tiny: is the library exact on it, or refused?

    python -m tests.models_sweep [NAME ...]     # `make test-models`: all of them
    python -m tests.models_sweep --table        # what was found, into docs/teacher.md

A model counts as wrong if what the teacher says of a token is not what the model itself says of it
alone, in fp32 and in bf16, or if a student's loss or its gradient is not that of plain autograd.
Results are kept in build/: without names, models that have one are left out. Fails on a wrong one.
"""

import contextlib
import copy
import json
import re
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from opcd.episodes import Episode, Prompt
from opcd.errors import InputError
from opcd.objective import Targets
from opcd.passes.plan import find_plan
from opcd.student_loss import StudentLoss
from opcd.teacher import SharedPrefixTeacher
from opcd_kernels import reference

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "build" / "models-sweep.json"
DOCS = ROOT / "docs" / "teacher.md"
BEGIN, END = "<!-- models: written by tests/models_sweep.py -->\n", "<!-- end of models -->\n"
LARGEST = 30_000_000  # parameters; beyond that the settings below did not reach
SECONDS = 90  # for one model
BOUND = {torch.float32: 1e-6, torch.bfloat16: 5e-3}  # nats a token
GRADIENT_BOUND = 1e-3  # relative to its norm, in fp32
PREFIX = [(7 * i) % 200 + 5 for i in range(40)]
PROMPTS = [[11, 12, 13], [14], [15, 16, 17, 18, 19], [20], [20]]
COMPLETIONS = [[21, 22, 23, 24], [25, 26, 27, 28, 29, 30, 31], [32], [33, 34], [35]]
FOUND = ("packed", "padded", "recompute", "refused", "not built", "wrong")
TINY = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "padded_vocab_size"), 258),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "dim"), 32),
    **dict.fromkeys(("embedding_size", "attention_hidden_size", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("moe_intermediate_size", "expert_intermediate_size", "d_ffn"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "attention_head_size", "v_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "rotary_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 512),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_d_head"), 8),
    **dict.fromkeys(("mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size"), 9),
    **dict.fromkeys(("hidden_size_per_layer_input", "time_step_rank"), 8),
    **dict.fromkeys(("attention_chunk_size", "index_topk"), 16),
    "index_n_heads": 16,  # with few, keys that no head wants tie, and pads decide between them
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "logits_scaling": 4.0,
    "lm_head_multiplier": 0.5,
    "final_logit_softcapping": 5.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "is_decoder": True,
    "layerdrop": 0.0,
    "initializer_range": 0.2,
}
LATENT = {"num_key_value_heads": 4}  # where keys are latent there is one a head
# What some kinds need besides, or have no default for.
OWN: dict[str, dict[str, Any]] = {
    **{name: {"head_dim": 8} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "bailing_hybrid": {"n_group": 1, "topk_group": 1},
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [64] * 4,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
        "laurel_rank": 8,
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"expert_ffn_hidden_size": 32, "ffn_hidden_size": 64, "zero_expert_num": 2},
    "mamba2": {"head_dim": 16, "n_groups": 1},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "mamba_num_heads": 8,
        "n_groups": 2,
    },
    "prophetnet": {
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
        "max_position_embeddings": 512,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 8,
        "ple_embed_dim": 32,
        "ngram_vocab_size_base": 100,
    },
    "reformer": {"axial_pos_embds_dim": [8, 24], "axial_pos_shape": [16, 32]},
    "xlm": {"emb_dim": 32, "causal": True, "is_encoder": False},
    "xlstm": {"embedding_dim": 32, "num_blocks": 2},
    "zamba": {
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "hybrid_layer_ids": [1],
        "num_key_value_heads": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "adapter_rank": 4,
    },
}


class Row(NamedTuple):
    """What came out for a model."""

    name: str
    found: str  # one of FOUND
    # Nats, the largest token's in fp32, and in bf16 the median: rounding sends some tokens to other
    # experts. And the relative error of the student's gradient.
    gaps: dict[str, float]
    reason: str


def main(names: list[str]) -> int:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = {row.name: row for row in stored()}
    if names == ["--table"]:
        write_table([*rows.values()])
        return 0
    for name in names or sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(rows)):
        rows[name] = row = swept(name)
        gaps = ", ".join(f"{what} {gap:.1e}" for what, gap in row.gaps.items())
        print(f"{row.name:24} {row.found:10} {gaps:48} {row.reason[:150]}", flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps([row._asdict() for row in rows.values()], indent=1))
    print(f"\ntransformers {transformers.__version__}, torch {torch.__version__}")
    for found, count in Counter(row.found for row in rows.values()).items():
        print(f"{found}: {count}")
    return int(any(row.found == "wrong" for row in rows.values()))


def stored() -> list[Row]:
    return [Row(**row) for row in json.loads(RESULTS.read_text())] if RESULTS.exists() else []


def swept(name: str) -> Row:
    try:
        with limited(SECONDS):
            model = built(name)
    except Exception as error:  # whatever a model's code raises
        return Row(name, "not built", {}, f"{type(error).__name__}: {_line(error)}")
    gaps: dict[str, float] = {}
    plan = None
    for dtype in (torch.float32, torch.bfloat16):
        what = str(dtype).removeprefix("torch.")
        try:
            with limited(SECONDS):
                cast = copy.deepcopy(model).to(dtype)
                if dtype != torch.float32 and not runs(cast):
                    continue
                teacher = SharedPrefixTeacher(cast, PREFIX)
                every = gaps_of(teacher)
                gap = (every.max() if dtype == torch.float32 else every.median()).item()
                gaps[what] = gap
                if dtype == torch.float32:
                    gaps["gradient"] = student_error(cast, teacher)
        except InputError as error:
            return Row(name, "refused", gaps, f"{dtype}: {_line(error)}")
        except Exception as error:  # a crash is no refusal
            return Row(name, "wrong", gaps, f"{dtype}: {type(error).__name__}: {_line(error)}")
        plan = plan or teacher.plan
        if not gap <= BOUND[dtype] or not gaps["gradient"] <= GRADIENT_BOUND:
            return Row(name, "wrong", gaps, f"{dtype}, {teacher.plan.mode}")
    assert plan is not None
    return Row(name, plan.mode, gaps, "" if plan.mode == "packed" else plan.reason)


def built(name: str) -> torch.nn.Module:
    """A tiny random model of that type that runs, in evaluation mode."""
    try:
        return running(name, constructed(name))
    except Exception:  # whatever a configuration or a model says to such numbers
        return running(name, shrunk(name))


@torch.no_grad()
def running(name: str, config: Any) -> torch.nn.Module:
    model = made(name, config)
    alone(model, PROMPTS[0], COMPLETIONS[0])
    return model


def made(name: str, config: Any) -> torch.nn.Module:
    classes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
    kind = getattr(transformers, classes if isinstance(classes, str) else classes[-1])
    if kind.config_class is not type(config):
        config = config.get_text_config()
    with torch.device("meta"):
        count = sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())
    if count > LARGEST:
        raise ValueError(f"{count / 1e6:.0f} M parameters with these settings")
    torch.manual_seed(0)
    model = kind(config).eval()
    if hasattr(model, "set_default_language"):
        model.set_default_language("en_XX")
    return model


def constructed(name: str) -> Any:
    """A configuration made with small numbers: what it derives from them is derived anew."""
    kind = CONFIG_MAPPING[name]
    return kind(**small(name, kind().to_dict()))


def shrunk(name: str) -> Any:
    """A configuration whose numbers, and those of its parts, are replaced."""
    whole = CONFIG_MAPPING[name]()
    parts = [getattr(whole, key, None) for key in whole.sub_configs]
    for config in (whole, *(part for part in parts if part is not None)):
        for key, value in small(config.model_type, config.to_dict()).items():
            with contextlib.suppress(Exception):
                setattr(config, key, value)
    return whole


def small(name: str, known: dict[str, Any]) -> dict[str, Any]:
    """Small numbers under the names that a configuration has for them."""
    settings = {key: value for key, value in TINY.items() if known.get(key) is not None}
    latent = LATENT if known.get("kv_lora_rank") is not None else {}
    return settings | few_layers(known) | latent | OWN.get(name, {})


def few_layers(known: dict[str, Any]) -> dict[str, Any]:
    """Lists with an item a layer, cut to the first kind and the last."""
    lists = {k: v for k, v in known.items() if isinstance(v, list) and len(v) > 2}
    kinds = {k: list(dict.fromkeys(v)) for k, v in lists.items() if "layer" in k or "block" in k}
    return {key: [those[0], those[-1]] for key, those in kinds.items()}


@torch.no_grad()
def runs(model: torch.nn.Module) -> bool:
    """Whether the model's own pass works in its dtype."""
    try:
        alone(model, PROMPTS[0], COMPLETIONS[0])
    except RuntimeError:
        return False
    return True


@torch.no_grad()
def gaps_of(teacher: SharedPrefixTeacher) -> Tensor:  # (N,)
    """Divergence of each scored token's distribution from that of the model itself, alone."""
    ours = logits_of(teacher.score(PROMPTS, COMPLETIONS)).double()
    pairs = zip(PROMPTS, COMPLETIONS, strict=True)
    theirs = torch.cat([alone(teacher.model, *pair) for pair in pairs])
    log_a, log_b = (x[:, : ours.shape[-1]].double().log_softmax(-1) for x in (theirs, ours))
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def student_error(model: torch.nn.Module, teacher: SharedPrefixTeacher) -> float:
    """Relative error of a student's gradient, its passes as its plan makes them.

    The sequences begin with the same tokens, which the student computes once.
    """
    prompts = [Prompt([*PREFIX, *prompt], prompt) for prompt in PROMPTS]
    pairs = [*zip(prompts, COMPLETIONS, strict=True)]
    targets = teacher.score([Episode.of_completion(*pair) for pair in pairs])
    targets = targets._replace(hidden=targets.hidden.flip(0))  # or there was nothing to learn
    student = copy.deepcopy(model)
    weights = [p for p in student.parameters() if p.requires_grad]
    loss = StudentLoss(student, find_plan(student, PREFIX))
    ours = loss([Episode.of_completion(*pair) for pair in pairs], targets).loss
    found = torch.autograd.grad(ours, weights, allow_unused=True)
    log_t = logits_of(targets).log_softmax(-1)
    own = zip(PROMPTS, COMPLETIONS, strict=True)
    log_s = torch.cat([alone(student, *pair)[:, : log_t.shape[-1]] for pair in own]).log_softmax(-1)
    plain = (log_s.exp() * (log_s - log_t)).sum(-1).mean()
    expected = torch.autograd.grad(plain, weights, allow_unused=True)
    wrong = sum(norm(a, b) for a, b in zip(found, expected, strict=True))
    whole = sum(norm(b, None) for b in expected)
    return max((wrong / whole) ** 0.5, abs(ours.item() - plain.item()) / plain.item())


def norm(a: Tensor | None, b: Tensor | None) -> float:
    """Σ (a − b)², where no gradient is 0."""
    a, b = (torch.zeros(()) if x is None else x.detach().double() for x in (a, b))
    return (a - b).square().sum().item()


def logits_of(targets: Targets) -> Tensor:
    head = targets.head
    weight, bias = head.weight.float(), None if head.bias is None else head.bias.float()
    return reference.logits(targets.hidden.float(), weight, bias, head.softcap).detach()


def alone(model: Any, prompt: list[int], completion: list[int]) -> Tensor:
    ids = torch.tensor([[*PREFIX, *prompt, *completion]])
    logits = model(input_ids=ids, use_cache=False).logits[0]
    return logits[-len(completion) - 1 : -1]


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError after that many seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def write_table(rows: list[Row]) -> None:
    """Which models are computed how, and why some are refused."""
    groups: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: (FOUND.index(row.found), row.name)):
        groups.setdefault(kind_of(row), []).append(row.name)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
    lines = [f"| {kind} | {len(those)} | {', '.join(those)} |\n" for kind, those in groups.items()]
    table = f"| {versions} | | |\n|---|---|---|\n{''.join(lines)}"
    before, rest = DOCS.read_text(encoding="utf-8").split(BEGIN)
    DOCS.write_text(before + BEGIN + table + END + rest.split(END)[1], encoding="utf-8")


def kind_of(row: Row) -> str:
    """What the table calls it: refused ones by their reason, without the model's name."""
    if row.found != "refused":
        return row.found
    reason = re.sub(r"^torch\.\w+: | with '.*'", "", row.reason).split(";")[0]
    return "refused: " + " ".join(re.sub(r"\b(of |in )?[A-Z]\w+\b", "", reason).split())


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
