"""Student, frozen teacher and sampler from a configuration."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from peft import PeftModel

from opcd.errors import InputError
from opcd.evaluation.decoding import replay_params, rollout_params
from opcd.models.adapter import add_lora
from opcd.models.head import head_of
from opcd.models.lm import autocast, switch_off_dropout
from opcd.objective import Divergence, head_divergence
from opcd.passes.plan import find_plan
from opcd.rollouts.choice import build_engine
from opcd.student_loss import StudentLoss
from opcd.tasks.prepare import Setup
from opcd.tasks.replay import WITHOUT
from opcd.teacher import SharedPrefixTeacher, teacher_of
from opcd.training.anchor import ReturnAnchor
from opcd.training.guided import StoredCompletions, TeacherCompletions, teacher_engine
from opcd.training.loop import Distiller
from opcd.training.sources import MakeSource, OnPolicy, PartlyGuided, Recorded, Source, WithReplay


def build_distiller(
    setup: Setup,
    divergence: Divergence = head_divergence,
    source: MakeSource | None = None,  # where source is "played"
) -> Distiller:
    """Student, frozen teacher behind the shared context, and the sampler, ready for step one.

    Raises InputError where games are to be played and nobody brings them.
    """
    config = setup.config
    if (config.source == "played") != (source is not None):
        raise InputError(
            f"source played must come with games, which the experience loop brings, got source "
            f"{config.source}{'' if source is None else ' and games'}; resume the loop, or set "
            f"source to sampled"
        )
    frozen: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    if config.lora_rank:
        model = setup.load(config.model)
        with torch.random.fork_rng([setup.device] if setup.device.type == "cuda" else []):
            torch.manual_seed(config.seed)
            student = add_lora(model, config.lora_rank, config.lora_alpha)
    else:
        student = setup.load(config.model, torch.float32).requires_grad_(True)
    switch_off_dropout(student)
    if isinstance(student, PeftModel) and not config.teacher:
        teacher_model, frozen = student, student.disable_adapter
    else:
        teacher_model = setup.load(config.teacher or config.model)
    if config.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    teacher = teacher_of(teacher_model, setup.task.prefixes, config, frozen)
    student.eval()
    with autocast(setup.device, setup.dtype):  # the arithmetic of its passes, which a plan is of
        plan = find_plan(student, setup.task.a_prefix) if config.teacher else teacher.plan
        engine = build_engine(
            config.rollout_engine,
            student,
            config.rollout_batch_size,
            plan,
            config.max_tokens_per_pass,
        )
    loss = StudentLoss(
        student,
        plan,
        temperature=config.temperature,
        add_weight_grad=head_of(student).weight.requires_grad,
        divergence=divergence,
    )
    anchor = None
    if config.return_anchor:
        anchor = ReturnAnchor(student, plan, setup.task.prefixes, config)
    of_steps = _source(setup, teacher, source)
    return Distiller(loss, teacher, engine, of_steps, config, setup.dtype, anchor)


def _source(setup: Setup, teacher: SharedPrefixTeacher, made: MakeSource | None) -> Source:
    config, replay = setup.config, setup.replay
    if replay is None:
        return _of_task(setup, teacher, made)
    teacher.add_context(WITHOUT, replay.prefix)
    own = config.of_task()
    task = _of_task(setup._replace(config=own), teacher, made) if own.prompts_per_step else None
    return WithReplay(task, replay.prompts, config, replay_params(setup))


def _of_task(setup: Setup, teacher: SharedPrefixTeacher, made: MakeSource | None) -> Source:
    if made is not None:
        return made(setup, teacher)
    config, conversations = setup.config, setup.task.conversations
    params = rollout_params(setup)
    if config.source == "recorded":
        return Recorded(setup.task.recorded, config)
    if not config.guided_share:
        return OnPolicy(conversations, config, params)
    if setup.completions is not None:
        stored = StoredCompletions(setup.completions, config.completions_per_prompt)
        return PartlyGuided(conversations, config, params, stored)
    engine = teacher_engine(teacher, config)
    folder = Path(config.output_dir)
    completions = TeacherCompletions(teacher, engine, setup.task, config, params, folder)
    return PartlyGuided(conversations, config, params, completions)
