"""The configuration: fields in groups, each field's name unique over all of them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from opcd.errors import InputError


@dataclass(kw_only=True)
class Data:
    """What is distilled, and what it is judged by."""

    context: str
    """What only the teacher sees: .txt or .md (one system message) or .json (chat messages, the
    body of an OpenAI request with its tools, or several contexts by name)."""
    prompts: str | None = None
    """Training prompts, not needed to score: JSONL (or a JSON array) of {"prompt": "..."},
    {"messages": [...]}, or rows of OpenAI, TRL, ShareGPT or Alpaca; no answers needed."""
    validation_data: str | None = None
    """Requests to choose the checkpoint by: with "answer"s by what is right, without by how little
    is missing to what the prompted teacher answers."""
    test_data: str | None = None
    """Requests for the scorecard, with "answer"s or without."""
    test_sets: dict[str, Any] = field(default_factory=dict)
    """More test data by name, each file scored by itself beside test_data, as in {typos:
    typos.jsonl, german: german.jsonl}; none may hold a request of another part of the data."""
    turns: Literal["last", "all"] = "last"
    """Which prompts a training row gives: last is the whole row, up to the last assistant turn; all
    is one for each assistant turn, behind what was said before it."""
    held_out_share: float = 0.3
    """Share of the prompts that is kept out of training where neither validation_data nor test_data
    is named: a third of it, at most 64, to choose the checkpoint by; the rest, at most 256, as
    test data."""
    elsewhere_data: str | None = None
    """Requests that have nothing to do with the context, as prompts are written, on which the
    distilled model is held against the original, both without the context; each may have a "kind",
    a text, to be counted under. Default: 300 that come with opcd."""
    scorer: str = "exact"
    """When an answer is right: exact, contains, number, choice (a letter), json, math (by the
    package math-verify), calls (of tools), regex:PATTERN (its first find), regex-last:PATTERN or
    python:FILE.py:function (or python:module:function). Reasoning in front of the answer is not
    judged."""
    context_placement: Literal["auto", "system", "user"] = "auto"
    """Where the context's system message goes: in a system message, or in front of the first user
    message; auto is system unless the chat template refuses, drops or alters it."""
    without_context: str = "default"
    """What the student sees where the context was: default (what the chat template writes by
    itself), none (an empty system message), or a short text that stays at inference."""
    today: str | None = None
    """Date (YYYY-MM-DD) for chat templates that write one; default: the day on which the run
    began, which is kept with it."""


@dataclass(kw_only=True)
class Models:
    """Which models, and how they are written to."""

    model: str = "smollm2-135m-instruct"
    """The student: a Hugging Face name, a local folder, or the built-in smollm2-135m-instruct."""
    teacher: str | None = None
    """The teacher's model, if another than the student's initial weights; same tokenizer."""
    chat_template: str | None = None
    """A Jinja file in place of the tokenizer's chat template; final/ carries it."""
    chat_template_args: dict[str, Any] = field(default_factory=dict)
    """Passed to the chat template, e.g. {"enable_thinking": false}."""
    device: str = "auto"
    """auto (the first GPU, else the CPU), cpu, cuda, cuda:1, ..."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Arithmetic of both models; auto is bfloat16 where the hardware has it. The trained weights
    and the optimizer are kept in float32 either way."""


@dataclass(kw_only=True)
class Sampling:
    """What a step samples."""

    prompts_per_step: int = 16
    """Training rows in a step: a prompt each; with turns all, or source recorded, a conversation
    each, with all of its turns."""
    completions_per_prompt: int = 1
    """Completions sampled for each prompt of a step."""
    max_completion_tokens: int = 256
    """Limit of a completion, in tokens, in training and in evaluation."""
    stop: list[str] = field(default_factory=list)
    """Texts that end a completion where one first appears, in training and in evaluation. What is
    trained on ends with the token that completes it; an answer that is judged ends in front."""
    temperature: float = 1.0
    """Sampling temperature; both models' logits are divided by it in the loss as well."""
    rollout_engine: Literal["auto", "generate", "static"] = "auto"
    """What samples: transformers.generate, or a static cache, whose step a GPU replays as one CUDA
    graph, and which stays in memory between steps; auto is static on a GPU if it is exact on the
    model, else generate."""
    rollout_batch_size: int = 32
    """Sequences of 512 tokens that are sampled at once; shorter ones may be more."""


@dataclass(kw_only=True)
class Evaluation:
    """How a scorecard's answers are drawn; checks and the choice of a checkpoint take the likeliest
    ones, and training samples the whole distribution."""

    eval_temperature: float = 0.0
    """Temperature of a scorecard's answers; 0 is greedy."""
    top_k: int = 0
    """Answers are drawn from so many likeliest tokens; 0 for all. The paper has 20."""
    top_p: float = 1.0
    """And of those from the likeliest until they hold this share of the probability; 1 for all. The
    paper has 0.95."""


@dataclass(kw_only=True)
class Objective:
    """What is minimised."""

    source: Literal["sampled", "recorded", "played"] = "sampled"
    """What is trained on: completions that are sampled (the student's own, and guided ones), or the
    assistant turns of the training rows as they were recorded, all of them, without sampling; or
    played: games, which the experience loop brings."""
    replay_share: float = 0.0
    """Share of a step's prompts, and of its loss, that has nothing to do with the context: there
    the student is held to the original model without it, which keeps other abilities. At least one
    prompt a step where it is above 0; 1 trains on nothing else."""
    replay_data: str | None = None
    """Prompts of that kind, as prompts are written. Default: 160 that come with opcd, none of them
    among those elsewhere."""
    return_anchor: float = 0.0
    """Weight of a second loss on the student's own completions, KL(student without the context ‖
    student with it), the first held fixed: what keeps a distilled model right where its prompt is
    sent all the same. 0 leaves that pass out; arXiv 2606.11627 has 0.5."""
    forward_share: float = 0.0
    """What is minimised at every token of the student's own completions: 0 is the reverse KL
    (settle on what the teacher finds likely), 1 the forward KL (cover all of it), between them
    their weighted sum, which is no JSD."""
    guided_share: float = 0.25
    """Share of a step's rows that are completed by the teacher, with the context in view, and
    scored with the forward KL: behaviour that the student never shows by itself. 0 is the paper's
    plain form, 1 its off-policy baseline; GKD's λ is 1 minus it (arXiv 2306.13649)."""
    guided_completions: str | None = None
    """File with a completion for every training prompt (or another run's guided.jsonl), used for
    the guided share in place of the teacher's own."""
    guided_objective: Literal["forward_kl", "cross_entropy"] = "forward_kl"
    """What is minimised on guided completions and recorded turns; cross_entropy is sequence-level
    distillation."""
    average_over: Literal["tokens", "sequences"] = "tokens"
    """Every completion token of a step weighs the same, or every sequence does."""


@dataclass(kw_only=True)
class Optimizer:
    """AdamW, and how long."""

    steps: int = 50
    """Optimizer steps."""
    learning_rate: float | None = None
    """Peak rate of AdamW; by default one for the model's size, which a run prints: 1e-4 at 135
    million parameters, 4.7e-6 at 8 billion, and ten times as much for LoRA."""
    warmup_steps: int = 5
    """Steps over which the rate rises linearly to its peak, which a shorter run does not reach."""
    schedule: Literal["linear", "constant"] = "linear"
    """The rate after the warm-up: falls linearly towards 0 at the last step, as in all that was
    measured, or stays. A run with linear keeps its steps; one with constant can be prolonged
    (--resume with more steps)."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""


@dataclass(kw_only=True)
class Lora:
    """An adapter in place of all weights."""

    lora_rank: int = 0
    """Rank of LoRA on all linear layers but the head; 0 trains every weight."""
    lora_alpha: float = 32.0
    """LoRA's scale is lora_alpha / lora_rank."""


@dataclass(kw_only=True)
class Run:
    """Where a run is kept, what it watches, and what it may use."""

    output_dir: str
    """Folder of the run; for a new run it must not hold one yet."""
    seed: int = 0
    """Seed of sampling, data order and LoRA's initial weights."""
    max_minutes: float | None = None
    """Training ends after this time, with a model; --resume goes on."""
    trackers: str = ""
    """Where metrics go beside metrics.jsonl: tensorboard, python:FILE.py:function, or several,
    separated by commas."""
    validate_every: int = 10
    """Steps between validations, on validation_data or on prompts that are kept out of training;
    each is saved as a checkpoint."""
    save_every: int = 50
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints a run keeps while it goes on, beside the best one. The
    newest alone holds the optimizer's state (--resume); the others are models to look at. Once
    final/ is written, one is left, or none with the schedule linear."""
    without_texts: bool = False
    """Leave what people and models wrote out of report.html and evidence.json, which may then be
    shown; the other files of a run keep it."""
    on_alarm: Literal["warn", "stop"] = "warn"
    """What follows an alarm, a sign that the run goes wrong: warn, or stop (save a checkpoint and
    end without a model, with status 3; --resume goes on all the same)."""
    divergence_prompts: int = 64
    """Prompts on which the divergence to the teacher is measured: of validation_data in training,
    of test_data in the scorecard."""
    elsewhere_prompts: int = 300
    """How many of elsewhere_data are asked, spread over the file; 0 leaves that out."""
    elsewhere_tasks: str = ""
    """Tasks of lm-eval (the extra elsewhere), their names or YAML files, separated by commas, by
    which original and distilled model are judged as well, both without the context."""
    leak_tokens: int = 128
    """Limit of an answer, in tokens, to twenty requests to reveal the context, of which the
    scorecard counts what they bring out of the models; 0 leaves that out."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    max_tokens_per_pass: int = 4096
    """New tokens in one forward pass of teacher and student, pads included (a longer sequence is a
    pass alone); memory only, never the result."""
    prefix_cache_mib: int = 2048
    """Memory for the keys and values of several contexts; the least recently used go first."""


@dataclass(kw_only=True)
class TrainConfig(Data, Models, Sampling, Evaluation, Objective, Optimizer, Lora, Run):
    """On-policy context distillation of a context, or several, into one model."""

    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Where fields' values came from, of those that are no defaults; see `settings.gather`."""

    def check(self) -> "TrainConfig":
        """Raise InputError for values of another kind or out of range; returns self."""
        for name in FIELDS:
            _check_kind(name, get_type_hints(type(self))[name], getattr(self, name))
        least = dict.fromkeys(
            (
                "steps",
                "prompts_per_step",
                "completions_per_prompt",
                "max_completion_tokens",
                "max_tokens_per_pass",
                "rollout_batch_size",
                "validate_every",
                "save_every",
                "keep_checkpoints",
                "divergence_prompts",
            ),
            1,
        ) | dict.fromkeys(
            (
                *("warmup_steps", "lora_rank", "weight_decay", "seed", "prefix_cache_mib"),
                *("elsewhere_prompts", "leak_tokens", "return_anchor", "top_k"),
            ),
            0,
        )
        for name in ("output_dir", "context", "model", "scorer", "without_context"):
            if not getattr(self, name).strip():
                raise InputError(f"{name} must not be blank, got {getattr(self, name)!r}")
        if self.seed >= 2**62:
            raise InputError(f"seed must be below 2**62, got {self.seed}")
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise InputError(f"{name} must be at least {bound}, got {getattr(self, name)}")
        for name in ("weight_decay", "return_anchor"):
            if not getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be finite, got {getattr(self, name)}")
        for name in ("temperature", "learning_rate", "max_grad_norm", "lora_alpha", "max_minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{name} must be positive and finite, got {value}")
        for keyword in ("default", "none"):
            if self.without_context != keyword and self.without_context.strip().lower() == keyword:
                raise InputError(
                    f"without_context must be default, none or a text for the model, got "
                    f"{self.without_context!r}; write {keyword}"
                )
        for name in ("forward_share", "guided_share", "held_out_share", "replay_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.held_out_share == 1:
            raise InputError(
                "held_out_share must be below 1, got 1: nothing would be left to train on; lower it"
            )
        self._check_answers()
        for text in self.stop:
            if not text.strip():
                raise InputError(
                    f"stop must hold texts that are not blank, got {text!r}, at which completions "
                    f"would end where nobody means it; remove it, or add a word"
                )
        if self.source == "recorded":
            self._check_recorded()
        if self.guided_completions is not None and not self.guided_share:
            raise InputError(
                "guided_completions must come with a guided_share above 0, got 0: nothing would be "
                "trained on them; set guided_share to 1 to train on them alone"
            )
        self._check_remedies()
        for name, file in self.test_sets.items():
            if not isinstance(name, str) or not name.strip() or name in PARTS:
                raise InputError(
                    f"a name of test_sets must be a text other than {', '.join(PARTS)}, got "
                    f"{name!r}; rename it"
                )
            if not isinstance(file, str) or not file.strip():
                raise InputError(
                    f"test_sets must name a file for {name!r}, got {file!r}; write {{{name}: "
                    f"FILE.jsonl}}"
                )
        return self

    def _check_remedies(self) -> None:
        """Raise InputError for remedies that would do nothing, or something else."""
        if self.replay_data is not None and not self.replay_share:
            raise InputError(
                "replay_data must come with a replay_share above 0, got 0: nothing would be "
                "trained on them; set replay_share to 0.25, or leave them out"
            )
        if self.replay_share and self.teacher is not None:
            raise InputError(
                f"replay_share must go without a teacher of its own, which would be the target in "
                f"place of the original model, got {self.teacher!r}; leave one of both out"
            )
        if self.return_anchor and (
            self.guided_share == 1 or self.replayed == self.prompts_per_step
        ):
            raise InputError(
                "return_anchor must have completions of the student's own, on which it is "
                "measured, got none where all of a step is guided or replayed; lower guided_share "
                "or replay_share, or set return_anchor to 0"
            )
        if self.return_anchor and self.gradient_checkpointing:
            raise InputError(
                "return_anchor must go without gradient_checkpointing, whose backward runs the "
                "layers again without the context's keys and values; leave one of both out"
            )

    def _check_answers(self) -> None:
        """Raise InputError for answers that cannot be drawn so."""
        if not 0 <= self.eval_temperature < float("inf"):
            raise InputError(
                f"eval_temperature must be 0 or positive, and finite, got {self.eval_temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.eval_temperature == 0 and (self.top_k or self.top_p < 1):
            raise InputError(
                f"top_k and top_p must come with an eval_temperature above 0, got top_k "
                f"{self.top_k} and top_p {self.top_p} for greedy answers, where they do nothing; "
                f"set eval_temperature, or leave them out"
            )

    @property
    def replayed(self) -> int:
        """How many prompts of a step are replayed; the others are the task's."""
        if not self.replay_share:
            return 0
        return max(1, round(self.replay_share * self.prompts_per_step))

    def of_task(self) -> "TrainConfig":
        """This run with the task's own prompts of a step alone."""
        return replace(self, prompts_per_step=self.prompts_per_step - self.replayed, replay_share=0)

    def _check_recorded(self) -> None:
        """Raise InputError for a field that would do nothing, unless it is at its default and
        nobody has named it."""
        for name, implied in RECORDED.items():
            value = getattr(self, name)
            untouched = value == getattr(TrainConfig, name) and name not in self.origins
            if value == implied or untouched:
                continue
            raise InputError(
                f"{name} must be {'null' if implied is None else implied} or left out with source "
                f"recorded, got {value}: nothing is sampled in training, and every assistant turn "
                f"is trained on as it was recorded; leave it out, or set source to sampled"
            )

    def with_implied(self) -> "TrainConfig":
        """With the values that source recorded implies."""
        return replace(self, **RECORDED) if self.source == "recorded" else self

    @property
    def shown_share(self) -> float:
        """Share of a step's sequences that another than the student wrote."""
        return 1.0 if self.source == "recorded" else self.guided_share

    def differing_fields(self, other: "TrainConfig") -> list[str]:
        """Names of the fields in which two configurations differ; paths to one file do not."""
        return [name for name in FIELDS if not _same(getattr(self, name), getattr(other, name))]

    def measured_as(self, other: "TrainConfig") -> "TrainConfig":
        """This run, measured as the other configuration says."""
        return replace(self, **{name: getattr(other, name) for name in MEASURING})


PARTS = ("train", "validation", "test")
"""What parts of a run's data are called."""
GROUPS: Mapping[str, type] = MappingProxyType(
    {group.__name__.lower(): group for group in TrainConfig.__bases__}
)
FIELDS: Mapping[str, str] = MappingProxyType(
    {field_.name: name for name, group in GROUPS.items() for field_ in fields(group)}
)
"""The group of each field, in the order of the groups."""
RECORDED: Mapping[str, Any] = MappingProxyType(
    {
        "turns": "all",
        "completions_per_prompt": 1,
        "forward_share": 0.0,
        "guided_share": 0.0,
        "guided_completions": None,
        "replay_share": 0.0,
        "return_anchor": 0.0,
    }
)
"""What the fields of sampled completions are with source recorded."""
MEASURING = frozenset(
    {
        *(name for name, group in FIELDS.items() if group in ("data", "models")),
        *(name for name, group in FIELDS.items() if group == "evaluation"),
        *("max_completion_tokens", "stop", "temperature", "rollout_engine", "rollout_batch_size"),
        *("output_dir", "seed", "divergence_prompts", "elsewhere_prompts", "without_texts"),
        *("elsewhere_tasks", "leak_tokens"),
        *("max_tokens_per_pass", "prefix_cache_mib"),
    }
) - {"turns"}
"""The fields that a model is measured by; the others are for training alone."""


def _check_kind(name: str, kind: Any, value: Any) -> None:
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise InputError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}")
    elif kind == list[str]:
        if not (isinstance(value, list) and all(isinstance(text, str) for text in value)):
            raise InputError(f"{name} must be a list of texts, got {value!r:.80}")
    elif not isinstance(value, {float: float | int, dict[str, Any]: dict}.get(kind, kind)):
        kind = getattr(kind, "__name__", kind)
        raise InputError(f"{name} must be of the type {kind}, got {value!r}")


def _same(one: Any, other: Any) -> bool:
    if one == other:
        return True
    texts = isinstance(one, str) and isinstance(other, str)
    return texts and all(map(os.path.exists, (one, other))) and os.path.samefile(one, other)
