"""TRL 1.16's trainers on `benchmarks.problems`, timed at their own seams.

    sdft          SDFTTrainer: the student without, the teacher with a context, full logits of both;
                  does exactly this, with the options below
    distillation  DistillationTrainer with the context put in front of its teacher's rows (its own
                  teacher sees no context): TRL's fastest loss, in chunks without full logits

Options that cost time and change nothing are off (gradient checkpointing, the check of every loss
for NaN); the rest is as in ours: reverse KL over the whole vocabulary, fp32 weights, the passes in
the dtype of autocast, fused AdamW. All rows have one length, so that no pass needs a mask.

A step's phases come from the trainer's callbacks, `_prepare_inputs` (all of the rollout, and TRL's
tokenising and padding of both prompts, which is left out of the other phases) and hooks on the
teacher.
"""

import tempfile
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

from benchmarks import problems
from benchmarks.problems import Measured, Problem, TokenIds
from opcd.runtime.stopwatch import Stopwatch


def numbers(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the token ids themselves."""
    vocab = {str(i): i for i in range(vocab_size)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    last = str(vocab_size - 1)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=last, pad_token=last)


def text(ids: list[int]) -> str:
    """What `numbers` reads as these tokens."""
    return " ".join(map(str, ids))


class Timed:
    """For a trainer: trains on given completions, or samples; and marks its phases."""

    given: TokenIds | None
    losses: list[Tensor]
    step_watch: Stopwatch

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        inputs = super()._prepare_inputs(generation_batch)
        self.step_watch.mark()
        return inputs

    def _send_telemetry(self) -> None:
        """Nothing leaves this machine."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.detach())
        return loss


class TimedSDFT(Timed, SDFTTrainer):
    def _generate(self, prompt_ids: TokenIds) -> tuple[TokenIds, TokenIds]:
        if self.given is None:
            return super()._generate(prompt_ids)
        return prompt_ids, self.given


class TimedDistillation(Timed, DistillationTrainer):
    context: Tensor  # (P,)

    def _generate_single_turn(self, prompt_ids: TokenIds, *args: Any, **kwargs: Any) -> TokenIds:
        if self.given is None:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        return self.given

    def _get_last_hidden_state(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        if model is self.accelerator.unwrap_model(self.teacher_model):
            input_ids = torch.cat([self.context.expand(len(input_ids), -1), input_ids], 1)
            ones = attention_mask.new_ones(len(input_ids), len(self.context))
            attention_mask = torch.cat([ones, attention_mask], 1)
        return super()._get_last_hidden_state(model, input_ids, attention_mask, *args, **kwargs)


class Phases(TrainerCallback):
    """Collects the seconds of every step, and samples anew in the last one."""

    def __init__(self, trainer: Any, teacher: torch.nn.Module, device: torch.device) -> None:
        self._trainer = trainer
        self._teacher_watch = Stopwatch(device)
        teacher.register_forward_pre_hook(lambda *_: self._teacher_watch.mark())
        teacher.register_forward_hook(lambda *_: self._teacher_watch.mark())
        self.rollout_s: list[float] = []
        self.teacher_s: list[float] = []
        self.update_s: list[float] = []
        self.grad_norms: list[float] = []

    def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step == state.max_steps - 1:
            self._trainer.given = None
        self._trainer.step_watch.mark()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._trainer.step_watch.mark()
        rollout, *rest = self._trainer.step_watch.laps()
        teacher = sum(self._teacher_watch.laps()[::2])  # each second one lies between passes
        self.rollout_s.append(rollout)
        self.teacher_s.append(teacher)
        self.update_s.append(sum(rest) - teacher)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "grad_norm" in logs:
            self.grad_norms.append(logs["grad_norm"])


def options(
    problem: Problem, device: torch.device, dtype: torch.dtype, steps: int, folder: str
) -> dict[str, Any]:
    """What both trainers are told."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": problem.micro_batch,
        "gradient_accumulation_steps": problem.completions // problem.micro_batch,
        "max_steps": steps,
        "learning_rate": problems.LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": problems.WEIGHT_DECAY,
        "max_grad_norm": problems.MAX_GRAD_NORM,
        "optim": "adamw_torch_fused",
        "bf16": dtype == torch.bfloat16,
        "use_cpu": device.type == "cpu",
        "gradient_checkpointing": False,
        "max_completion_length": problem.completion,
        "temperature": 1.0,
        "shuffle_dataset": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def trainer_of(
    kind: str, problem: Problem, student: Any, teacher: Any, shared: dict[str, Any]
) -> Any:
    """The trainer with everything but the completions; `shared` are its options."""
    context, prompts = problems.tokens(problem)
    rows = {"prompt": [text(ids) for ids in prompts]}
    processing = numbers(student.config.vocab_size)
    if kind == "distillation":
        made = TimedDistillation(
            model=student,
            teacher_model=teacher,
            args=DistillationConfig(beta=1.0, **shared),
            train_dataset=Dataset.from_dict(rows),
            processing_class=processing,
        )
        made.context = torch.tensor(context, device=made.accelerator.device)
        return made
    rows["privileged_context"] = [text(context)] * len(prompts)
    made = TimedSDFT(
        model=student,
        args=SDFTConfig(
            distillation_mode="full_logits",
            distillation_alpha=1.0,
            teacher_prompt_template="{privileged_context} {prompt}",
            max_prompt_length=None,
            num_generations=1,
            teacher_model_kind="live",  # "base" would read a folder for what is handed over here
            **shared,
        ),
        train_dataset=Dataset.from_dict(rows),
        processing_class=processing,
    )
    made.teacher_model = made.accelerator.prepare_model(teacher, evaluation_mode=True)
    return made


def measure(
    kind: str,
    problem: Problem,
    device: torch.device,
    dtype: torch.dtype,
    completions: TokenIds,
    rounds: int,
) -> Measured:
    """A step to warm up, `rounds` on the completions given, and one that samples its own."""
    name, student, teacher = problems.models(problem.model, device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        shared = options(problem, device, dtype, rounds + 2, folder)
        trainer = trainer_of(kind, problem, student, teacher, shared)
        trainer.given, trainer.losses, trainer.step_watch = completions, [], Stopwatch(device)
        # The body: DistillationTrainer never calls the head's module.
        phases = Phases(trainer, teacher.base_model, device)
        trainer.add_callback(phases)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    first = trainer.losses[: problem.completions // problem.micro_batch]
    timed = slice(1, rounds + 1)
    return Measured(
        name,
        torch.stack(first).sum().item(),
        phases.grad_norms[0],
        completions,
        phases.rollout_s[-1],
        phases.teacher_s[timed],
        phases.update_s[timed],
        problem.micro_batch,
        "in full",
        problems.sizes_of(student),
    )
