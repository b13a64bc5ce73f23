"""Student, frozen teacher and sampler from a configuration."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from peft import PeftModel

from opcd.evaluation.decoding import rollout_params
from opcd.models.adapter import add_lora
from opcd.models.head import head_of
from opcd.models.lm import autocast, switch_off_dropout
from opcd.passes.plan import find_plan
from opcd.rollouts.choice import build_engine
from opcd.student_loss import StudentLoss
from opcd.tasks.prepare import Setup
from opcd.teacher import SharedPrefixTeacher, teacher_of
from opcd.training.guided import StoredCompletions, TeacherCompletions
from opcd.training.loop import Distiller
from opcd.training.sources import OnPolicy, PartlyGuided, Recorded, Source


def build_distiller(setup: Setup) -> Distiller:
    """Student, frozen teacher behind the shared context, and the sampler, ready for step one."""
    config = setup.config
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
    plan = find_plan(student, setup.task.a_prefix) if config.teacher else teacher.plan
    student.eval()
    with autocast(setup.device, setup.dtype):
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
    )
    source = _source(setup, teacher)
    return Distiller(loss, teacher, engine, source, config, setup.dtype)


def _source(setup: Setup, teacher: SharedPrefixTeacher) -> Source:
    config, conversations = setup.config, setup.task.conversations
    params = rollout_params(setup)
    if config.source == "recorded":
        return Recorded(setup.task.recorded, config)
    if not config.guided_share:
        return OnPolicy(conversations, config, params)
    if setup.completions is not None:
        return PartlyGuided(conversations, config, params, StoredCompletions(setup.completions))
    with teacher.frozen():
        engine = build_engine(
            config.rollout_engine,
            teacher.model,
            config.rollout_batch_size,
            teacher.plan,
            config.max_tokens_per_pass,
        )
    folder = Path(config.output_dir)
    completions = TeacherCompletions(teacher, engine, setup.task, config, params, folder)
    return PartlyGuided(conversations, config, params, completions)
