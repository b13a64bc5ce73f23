"""What the trainers of `trainers.py` are given: a step's sizes, its tokens, the models."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from opcd.models import builtin
from opcd.models.by_name import load_model
from opcd.models.lm import causal_lm, switch_off_dropout
from opcd.runtime.cache import cache_dir

TokenIds = list[list[int]]
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-6, 0.01, 1.0

SMOLLM2 = "smollm2-135m"
SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    SMOLLM2: lambda: LlamaConfig(
        vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, intermediate_size=1536, max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    ),
    "qwen2.5-1.5b": lambda: Qwen2Config(
        vocab_size=151936, hidden_size=1536, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, intermediate_size=8960, max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
    ),
    "qwen2.5-tiny": lambda: Qwen2Config(
        vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=128, tie_word_embeddings=True,
    ),
}  # fmt: skip


class Problem(NamedTuple):
    """What one step does."""

    model: str  # of SHAPES
    context: int  # tokens that only the teacher sees, in front of every prompt
    prompt: int  # tokens
    completions: int  # sequences, each of a prompt of its own
    completion: int  # tokens
    micro_batch: int  # sequences in one pass of the student


class Tokens(NamedTuple):
    """A problem's token ids: random ones, as only their number matters."""

    context: list[int]
    prompts: TokenIds


class Sizes(NamedTuple):
    """What counts of a model whose layers are alike, see `sizes_of`."""

    body: int  # weights of its linear layers
    head: int  # V · D
    attended: int  # heads · width, of all layers: products of a query and a key, or a value
    kept: int  # numbers that a token leaves in the cache
    trained: int  # weights


class Measured(NamedTuple):
    """What a trainer did."""

    model: str
    loss: float  # of the first step, like the norm
    grad_norm: float
    completions: TokenIds  # of all steps but those that were sampled for their time
    rollout_s: float
    teacher_s: list[float]  # a step each
    update_s: list[float]
    micro_batch: int
    teacher: str  # how its passes were made
    sizes: Sizes  # of the student
    peak_mib: float | None = None  # beyond what was held before: weights, optimizer and all

    @property
    def seconds(self) -> list[float]:
        """Teacher and update together, a step each."""
        return [t + u for t, u in zip(self.teacher_s, self.update_s, strict=True)]


def sizes_of(model: torch.nn.Module) -> Sizes:
    """Of a causal LM of transformers whose layers are alike."""
    lm = causal_lm(model)
    head, config = lm.get_output_embeddings(), lm.config
    linear = [m for m in lm.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = config.num_hidden_layers
    return Sizes(
        body=sum(m.weight.numel() for m in linear),
        head=head.weight.numel(),
        attended=layers * config.num_attention_heads * width,
        kept=layers * 2 * config.num_key_value_heads * width,
        trained=sum(p.numel() for p in model.parameters()),
    )


def tokens(problem: Problem) -> Tokens:
    """The same for everybody."""
    generator = torch.Generator().manual_seed(0)
    counts = [problem.context, *[problem.prompt] * problem.completions]
    vocab = SHAPES[problem.model]().vocab_size
    ids = torch.randint(20, vocab - 20, (sum(counts),), generator=generator)
    context, *prompts = (x.tolist() for x in ids.split(counts))
    return Tokens(context, prompts)


def has_smollm2() -> bool:
    """Whether its weights are at hand: benchmarks fetch nothing."""
    return (cache_dir() / builtin.NAME / "model.safetensors").is_file()


def frozen_model(
    name: str, device: torch.device, dtype: torch.dtype
) -> tuple[str, PreTrainedModel]:
    """A name and a model of SHAPES that is not trained: with random weights, but SmolLM2's where
    they are at hand."""
    if name == SMOLLM2 and has_smollm2():
        return builtin.NAME, load_model(builtin.NAME, dtype, device)
    torch.manual_seed(0)
    with torch.device(device):
        made = AutoModelForCausalLM.from_config(SHAPES[name](), dtype=dtype)
    made.get_output_embeddings().weight.data *= 4  # or wrong states would hardly change logits
    return f"{name} random", made.requires_grad_(False).eval()


def models(
    name: str, device: torch.device, dtype: torch.dtype
) -> tuple[str, PreTrainedModel, PreTrainedModel]:
    """A name, the student with weights in fp32, and the frozen teacher that it starts from.

    SmolLM2 has its own weights where they are at hand. Its EOS is a token that it hardly samples:
    completions have their full length.
    """
    if name == SMOLLM2 and has_smollm2():
        found = builtin.NAME
        student = load_model(found, torch.float32, device)
    else:
        found = f"{name} random"
        torch.manual_seed(0)
        with torch.device(device):
            student = AutoModelForCausalLM.from_config(SHAPES[name](), dtype=torch.float32)
    student.generation_config.eos_token_id = student.config.vocab_size - 1
    with torch.device(device):  # a copy that is cast would have its rotary frequencies rounded
        teacher = AutoModelForCausalLM.from_config(student.config, dtype=dtype)
    teacher.load_state_dict(student.state_dict())
    switch_off_dropout(student)
    return found, student.requires_grad_(True).eval(), teacher.requires_grad_(False).eval()
