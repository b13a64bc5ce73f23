"""The memory of a run, part by part, before its weights are read.

Every tensor is counted on models without numbers (`weightless.py`), in the passes that the run will
make: of its largest step, with every completion at its limit.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from peft import PeftModel

from opcd.episodes import Episode, Prompt
from opcd.evaluation.decoding import answer_params, replay_params, rollout_params
from opcd.models.cast_weights import CastWeights
from opcd.models.files import ModelFiles
from opcd.models.head import head_of
from opcd.models.lm import autocast, recompute_activations
from opcd.objective import scratch_bytes
from opcd.passes.hidden import Row, scored_hidden
from opcd.passes.packed import packing_backends
from opcd.passes.plan import Plan, planned_hidden
from opcd.passes.prefix import SharedPrefix, UnsupportedModelError
from opcd.preflight.disk import Sizes
from opcd.preflight.generation import Sampling, prefix_bytes, sampling
from opcd.preflight.weightless import Tally, Weightless, nbytes
from opcd.rollouts.protocol import SamplingParams
from opcd.runtime.batches import batches_by_tokens
from opcd.runtime.memory import resident_memory
from opcd.tasks.order import step_rows
from opcd.tasks.prepare import Setup
from opcd.tasks.replay import WITHOUT, limit_of

T = TypeVar("T")


class Memory(NamedTuple):
    """Bytes on the device of a run; on a CPU those of its process."""

    parts: dict[str, int]  # what takes them
    phases: dict[str, int]  # all that is there at the height of each phase

    @property
    def peak(self) -> int:
        """The most that is there at a time."""
        return max(self.phases.values())

    @property
    def needed(self) -> int:
        """What is taken beside what the process has already."""
        return self.peak - self.parts["process"]


class Models:
    """Student and teacher of a run without numbers, as `build_distiller` puts them together."""

    def __init__(self, setup: Setup) -> None:
        config, dtype = setup.config, setup.dtype
        self.setup, self.config = setup, config
        self.on_cpu = setup.device.type == "cpu"
        self.make = Weightless(setup.device)
        self.base: Any = self.make.model(config.model, dtype)
        self.student: Any = self.make.student(
            config.model, dtype, config.lora_rank, config.lora_alpha
        )
        self.frozen: Callable[[], AbstractContextManager[object]] = nullcontext
        self.teacher: Any = self.base
        if config.teacher:
            self.teacher = self.make.model(config.teacher, dtype)
        elif isinstance(self.student, PeftModel):
            self.teacher, self.frozen = self.student, self.student.disable_adapter
        if config.gradient_checkpointing:
            self.student.gradient_checkpointing_enable({"use_reentrant": False})
        self.casts = CastWeights(self.student, dtype) if dtype != torch.float32 else None
        self.trained = [p for p in self.student.parameters() if p.requires_grad]
        with torch.no_grad(), Tally(), self.frozen():
            self.plan, self.prefix = _plan(self.teacher, setup.task.a_prefix)

    def memory(self) -> Memory:
        """What a training run takes.

        On a CPU the process itself is what is resident now, before weights are read, and gradients
        stay between steps; on a GPU they are made anew in each. CUDA's own context is not counted.
        """
        task = self.setup.task
        prefixes = self._prefixes()
        weights, gradients = _weights(self.student), nbytes(self.trained)
        casts = self.casts.nbytes if self.casts is not None else 0
        teacher = 0 if self.teacher is self.student else _weights(self.teacher)
        process = resident_memory() if self.on_cpu else 0
        rollouts = self._rollouts()
        update = self._update()
        held = process + weights + casts + teacher + prefixes + 2 * gradients
        between = held + (gradients if self.on_cpu else 0)
        phases = {
            "rollout": between + rollouts.peak,
            "teacher": between + self._teacher_pass(),
            "update": between + update.peak,
            "optimizer": held + gradients,
        }
        if self.on_cpu:  # the base merged, as it is mapped, and copied into the new file
            copies = 2 if isinstance(self.student, PeftModel) else 1
            phases["export"] = process + copies * self.sizes().final
        if task.test:
            phases["scorecard"] = process + self._scorecard()
        parts = {
            "process": process,
            "weights": weights,
            "casts": casts,
            "teacher": teacher,
            "gradients": gradients,
            "adam": 2 * gradients,
            "prefixes": prefixes,
            "activations": update.activations,
            "loss": update.loss,
            "rollouts": rollouts.cache,
        }
        return Memory(parts, phases)

    def sizes(self) -> Sizes:
        """What the run writes."""
        adapter, name = isinstance(self.student, PeftModel), self.config.model
        try:
            return Sizes.of(ModelFiles(name), self.trained, adapter)
        except AssertionError:  # of a hub's model that is not fetched yet
            return Sizes.of(self.base, self.trained, adapter)

    # ---- what is kept of contexts ----

    def _prefixes(self) -> int:
        """Keys and values of every context; of more than the budget, what it holds and one more."""
        if self.prefix is None or not self.plan.shares_prefix:
            return 0
        sizes = [prefix_bytes(self.prefix, len(ids)) for ids in self.setup.task.prefixes.values()]
        anchors = sum(sizes) if self.config.return_anchor else 0  # the student's own, all of them
        return min(sum(sizes), self.config.prefix_cache_mib * 2**20 + max(sizes)) + anchors

    # ---- passes ----

    def _low(self, function: Callable[[], T], head: bool) -> T:
        """As `Distiller` makes the student's passes."""
        with autocast(self.setup.device, self.setup.dtype):
            if self.casts is None or (self.config.gradient_checkpointing and not head):
                return function()
            return self.casts.run(function, head)

    def _update(self) -> "_Update":
        """Of the pass with the most tokens of all steps, behind those before it."""
        config, student = self.config, self.student
        rows = self._largest_pass(lambda item: item.student_ids)
        for p in self.trained:
            p.grad = self.make.like(p) if self.on_cpu else None
        tally = Tally()
        recompute_activations(student, config.gradient_checkpointing)
        hidden, activations = tally.kept_by(
            lambda: self._low(lambda: planned_hidden(student, rows, self.plan), head=False)
        )
        forward, left = tally.peak, tally.live
        heads = head_of(student).weight, head_of(self.teacher).weight
        loss = scratch_bytes(len(hidden), *heads, self.setup.dtype)
        with tally:
            torch.autograd.backward(hidden, torch.empty_like(hidden))
        student.eval()
        return _Update(activations, loss, max(forward, left + hidden.nbytes + loss, tally.peak))

    @torch.no_grad()
    def _teacher_pass(self) -> int:
        """The height of the teacher's largest pass."""
        shared = self.plan.shares_prefix
        rows = self._largest_pass(
            lambda item: (
                item.teacher_ids
                if shared or item.context == WITHOUT
                else self.setup.task.prompted_ids(item)
            )
        )
        prefix, copies = self.prefix if shared else None, 0
        if prefix is not None and not prefix.only_attention:
            # Copies of other states cannot be made without numbers: of all, so that it is enough.
            copies = len(rows) * prefix.nbytes
            prefix = None
        rows = [row._replace(prefix=prefix) for row in rows]
        with Tally() as tally, self.frozen():
            scored_hidden(self.teacher, rows, self.plan.packed)
        return tally.peak + copies

    def _largest_pass(self, ids_of: Callable[[Prompt | Episode], Sequence[int]]) -> list[Row]:
        """The rows of a step's pass that holds the most tokens, of all steps; without a prefix.

        Completions are at their limit; recorded turns stand in their conversations.
        """
        config, task = self.config, self.setup.task
        rows: Sequence[Sequence[Prompt | Episode]] = task.recorded or task.conversations
        more = 0 if task.recorded else config.max_completion_tokens

        def new(item: Prompt | Episode) -> int:
            return limit_of(config) if item.context == WITHOUT else more

        replay = self.setup.replay
        others = sorted(replay.prompts, key=lambda p: -len(ids_of(p))) if replay else []
        own = config.of_task()
        largest: tuple[int, list[Prompt | Episode]] = (0, [])
        for step in range(config.steps):
            items = [*chain.from_iterable(step_rows(rows, step, own)), *others[: config.replayed]]
            chosen = [item for item in items for _ in range(config.completions_per_prompt)]
            lengths = [len(ids_of(item)) + new(item) for item in chosen]
            for batch in batches_by_tokens(lengths, config.max_tokens_per_pass):
                found = sum(lengths[i] for i in batch), [chosen[i] for i in batch]
                largest = max(largest, found, key=lambda x: x[0])
        return [_row(ids_of(item), item, new(item)) for item in largest[1]]

    # ---- sampling ----

    def _rollouts(self) -> Sampling:
        """Of the student's largest call: a step's prompts, or those of a validation."""
        config, task = self.config, self.setup.task
        calls = [[case.prompt.student_ids for case in task.validation]]
        if not task.recorded:
            rows = [[p.student_ids for p in row] for row in task.conversations]
            longest = sorted(rows, key=lambda row: sum(map(len, row)), reverse=True)
            step = [*chain.from_iterable(longest[: config.prompts_per_step])]
            calls.append(step * config.completions_per_prompt)
        largest = max(calls, key=lambda x: sum(map(len, x)))
        found = (
            [self._sampling(self.student, largest, rollout_params(self.setup))] if largest else []
        )
        if (replay := self.setup.replay) is not None:
            longest_first = sorted((p.student_ids for p in replay.prompts), key=len, reverse=True)
            again = longest_first[: config.replayed] * config.completions_per_prompt
            found.append(self._sampling(self.student, again, replay_params(self.setup)))
        return max(found, key=lambda sampling: sampling.peak, default=Sampling(0, 0))

    def _scorecard(self) -> int:
        """One model, and what it takes to answer test requests behind their contexts."""
        by_context: dict[str, list[list[int]]] = {}
        for case in self.setup.task.scored:
            ids = self.setup.task.prompted_ids(case.prompt)
            by_context.setdefault(case.prompt.context, []).append(ids)
        largest = max(by_context.values(), key=lambda x: sum(map(len, x)), default=None)
        if largest is None:
            return 0
        params = answer_params(self.setup)
        return _weights(self.base) + self._sampling(self.base, largest, params).peak

    def _sampling(
        self, model: Any, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> Sampling:
        return sampling(
            model,
            prompts,
            self.config,
            params,
            self.plan.shares_prefix,
            lambda call: self._low(call, head=True) if model is self.student else call(),
        )


class _Update(NamedTuple):
    """Bytes of an update's largest pass, beyond what is held."""

    activations: int  # that backward waits for
    loss: int  # scratch of the loss
    peak: int


def _row(ids: Sequence[int], item: Prompt | Episode, more: int) -> Row:
    """What a pass computes of a recorded conversation, or of a prompt and so many new tokens."""
    if isinstance(item, Prompt):
        return Row([*ids, *[0] * more], [(len(ids), more)])
    # Turns count from the end: in front of them the ids of a side may hold the context.
    first = len(ids) - len(item.student_ids)
    return Row([*ids], [(first + start, n) for start, n in item.student_spans])


def _weights(model: torch.nn.Module) -> int:
    return nbytes([*model.parameters(), *model.buffers()])


def _plan(model: torch.nn.Module, ids: Sequence[int]) -> tuple[Plan, SharedPrefix | None]:
    """What `find_plan` finds, by the structure alone; and the prefix that it is tried on."""
    try:
        prefix = SharedPrefix(model, ids)
    except UnsupportedModelError as error:
        return Plan("recompute", "", str(error)), None
    if not prefix.attention_layers:
        # Recurrent states alone: whether a pass goes on from them shows in numbers only (Mamba of
        # transformers 5.24 begins anew). What takes more is foreseen.
        return Plan("recompute", "", "no layer has keys and values"), None
    try:
        backends = packing_backends(model, prefix)
        return Plan("packed", backends.forward, "", backends.with_gradients), prefix
    except Exception as error:  # whatever a model's code says, as there
        return Plan("padded", "", str(error)), prefix
