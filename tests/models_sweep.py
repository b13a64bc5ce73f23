"""Every causal LM of transformers that can be built tiny: is the teacher exact on it, or refused?

    python -m tests.models_sweep [NAME ...]     # `make test-models`: all of them

A model counts as wrong if what the teacher says of a token is not what the model itself says of it
alone, in fp32 and in bf16. Prints a line a model and the table of docs/teacher.md; fails on a wrong
one.
"""

import contextlib
import copy
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from opcd.errors import InputError
from opcd.teacher import SharedPrefixTeacher
from opcd_kernels import reference

LARGEST = 30_000_000  # parameters; beyond that the settings below did not reach
SECONDS = 90  # for one model
BOUND = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # nats a token
PREFIX = [(7 * i) % 200 + 5 for i in range(40)]
PROMPTS = [[11, 12, 13], [14], [15, 16, 17, 18, 19]]
COMPLETIONS = [[21, 22, 23, 24], [25, 26, 27, 28, 29, 30, 31], [32]]
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
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "is_decoder": True,
    "layerdrop": 0.0,
    "initializer_range": 0.2,
}


class Row(NamedTuple):
    """What came out for a model."""

    name: str
    found: str  # "packed", "padded", "recompute", "refused", "not built", "wrong"
    gaps: dict[str, float]  # nats a token, by dtype
    reason: str


def main(names: list[str]) -> int:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = []
    for name in names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        rows.append(row := swept(name))
        gaps = ", ".join(f"{dtype} {gap:.1e}" for dtype, gap in row.gaps.items())
        print(f"{row.name:28} {row.found:10} {gaps:32} {row.reason[:150]}", flush=True)
    print(f"\ntransformers {transformers.__version__}, torch {torch.__version__}")
    for found in ("packed", "padded", "recompute", "refused", "not built", "wrong"):
        those = [row.name for row in rows if row.found == found]
        print(f"| {found} | {len(those)} | {', '.join(those)} |")
    return int(any(row.found == "wrong" for row in rows))


def swept(name: str) -> Row:
    try:
        with limited(SECONDS):
            model = built(name)
    except Exception as error:  # whatever a model's code raises
        return Row(name, "not built", {}, f"{type(error).__name__}: {_line(error)}")
    gaps: dict[str, float] = {}
    plan = None
    for dtype in (torch.float32, torch.bfloat16):
        try:
            with limited(SECONDS):
                teacher = SharedPrefixTeacher(copy.deepcopy(model).to(dtype), PREFIX)
                gaps[str(dtype).removeprefix("torch.")] = gap = gap_of(teacher)
        except InputError as error:
            return Row(name, "refused", gaps, f"{dtype}: {_line(error)}")
        except Exception as error:  # a crash is no refusal
            return Row(name, "wrong", gaps, f"{dtype}: {type(error).__name__}: {_line(error)}")
        plan = plan or teacher.plan
        if not gap <= BOUND[dtype]:
            return Row(name, "wrong", gaps, f"{dtype}, {teacher.plan.mode}")
    assert plan is not None
    return Row(name, plan.mode, gaps, "" if plan.mode == "packed" else plan.reason)


def built(name: str) -> torch.nn.Module:
    """A tiny random model of that type, in evaluation mode."""
    config = CONFIG_MAPPING[name]()
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        shrink(part)
    classes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
    kind = getattr(transformers, classes if isinstance(classes, str) else classes[-1])
    if type(config.get_text_config()) is not type(config) and kind.config_class is not type(config):
        config = config.get_text_config()
    with torch.device("meta"):
        count = sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())
    if count > LARGEST:
        raise ValueError(f"{count / 1e6:.0f} M parameters with these settings")
    torch.manual_seed(0)
    return kind(config).eval()


def shrink(config: Any) -> None:
    """Small numbers under the names that configurations have for them."""
    layers = 2
    for key, value in TINY.items():
        if getattr(config, key, None) is not None and key in config.to_dict():
            with contextlib.suppress(Exception):
                setattr(config, key, value)
    for key, value in list(config.to_dict().items()):
        if isinstance(value, list) and len(value) > layers and ("layer" in key or "block" in key):
            kinds = list(dict.fromkeys(value))
            setattr(config, key, [kinds[0], kinds[-1]])


def gap_of(teacher: SharedPrefixTeacher) -> float:
    """Largest divergence of a scored token's distribution from that of the model itself, alone."""
    targets = teacher.score(PROMPTS, COMPLETIONS)
    head = targets.head
    ours = reference.logits(targets.hidden, head.weight, head.bias, head.softcap).double()
    pairs = zip(PROMPTS, COMPLETIONS, strict=True)
    theirs = torch.cat([alone(teacher.model, *pair) for pair in pairs])
    log_a, log_b = (x[:, : ours.shape[-1]].double().log_softmax(-1) for x in (theirs, ours))
    return float((log_a.exp() * (log_a - log_b)).sum(-1).max())


@torch.no_grad()
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


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
