"""A run from its configuration to its scorecard: the folder, the models, the steps, the proof."""

import contextlib
import json
import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.evaluation.report import (
    before_after,
    read_metrics,
    scorecard_facts,
    scorecard_table,
    write_report,
)
from opcd.evaluation.scorecard import answer, evaluate, held_out_divergence, measure
from opcd.models.by_name import (
    load_config,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
)
from opcd.models.lm import autocast, check_rope, head_of, max_positions, stop_at, switch_off_dropout
from opcd.objective import check_head
from opcd.passes.plan import find_plan
from opcd.rollouts.choice import build_engine
from opcd.runtime.files import free_name, make_folder, write_folder, write_json, write_jsonl
from opcd.tasks.chat import Chat, check_same_tokenizer
from opcd.tasks.task import Task, read_task_files, render_task, spread
from opcd.teacher import SharedPrefixTeacher
from opcd.training.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    rotate,
    save_checkpoint,
)
from opcd.training.loop import Distiller, step_prompts

log = logging.getLogger(__name__)

# Fields that may change when a run is continued; the second kind alters the steps to come, and is
# there for a run whose loss was not finite.
HOUSEKEEPING = {"save_every", "keep_checkpoints"}
REMEDIES = {"learning_rate", "max_grad_norm", "dtype"}


class Setup(NamedTuple):
    """What training and evaluation both need; nothing in it has cost long work."""

    config: TrainConfig  # device and dtype resolved
    task: Task
    chat: Chat
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype


def train(config: TrainConfig, resume: bool = False) -> None:
    """Distil, choose a checkpoint on validation data, export it, and score it on test data."""
    setup = prepare(config)
    config = setup.config
    folder = _check_folder(config, resume)
    finished = _fit(config, setup, folder, resume)
    if not finished:
        return
    if config.eval_data:
        base = _load(config.model, setup, setup.dtype)
        final = _load(str(folder / "final"), setup, setup.dtype)
        selection = json.loads(_read(folder / "final" / "selection.json"))
        _score(config, setup, base, final, folder, selection)
    print(f"\n{_next_steps(config, folder)}")


def evaluate_run(config: TrainConfig, distilled: str | None, save_to: str | None) -> None:
    """Score `distilled` (default: the run's final model; "none": only base and prompted)."""
    if not config.eval_data:
        raise InputError("eval_data must name labelled test data, got none; pass --eval_data FILE")
    run = Path(config.output_dir)
    path = str(run / "final") if distilled is None else distilled
    if distilled is None and not Path(path).is_dir():
        raise InputError(
            f"there must be a distilled model, got no folder {path!r}; run `opcd train` first, "
            f"name one with --distilled, or pass --distilled none to measure base and prompted only"
        )
    setup = prepare(config)
    data, config = Path(config.eval_data).stem, setup.config
    selection: dict[str, Any] | None = None
    target = run / f"eval-{path.strip('/.').replace('/', '-')}-{data}"
    if distilled is None:
        selection = json.loads(_read(run / "final" / "selection.json"))
        same = not TrainConfig.load(run / "config.yaml").differing_fields(config)
        target = run if same else run / f"eval-{data}"
    elif distilled != "none":
        selection = {"how": f"{path}, as named"}
    target = make_folder(
        Path(save_to) if save_to else target if target == run else free_name(target)
    )
    base = _load(config.model, setup, setup.dtype)
    final = None if path == "none" else _load(path, setup, setup.dtype)
    if final is not None and head_of(final).weight.shape[0] != head_of(base).weight.shape[0]:
        raise InputError(
            f"the distilled model must have the vocabulary of {config.model!r}, got "
            f"{head_of(final).weight.shape[0]} rows in {path!r} against "
            f"{head_of(base).weight.shape[0]}; name a model distilled from it"
        )
    _score(config, setup, base, final, target, selection)
    print(f"\nwritten: {target / 'scorecard.json'}, {target / 'report.md'}")


def prepare(config: TrainConfig) -> Setup:
    """Read and check everything that can be wrong before weights are loaded."""
    config.check()
    files = read_task_files(config)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    tokenizer = load_tokenizer(config.model)
    configs = [load_config(config.model)]
    if config.teacher:
        check_same_tokenizer(tokenizer, load_tokenizer(config.teacher))
        configs.append(load_config(config.teacher))
    chats = {
        name: Chat(tokenizer, context, config.chat_template_args)
        for name, context in files.contexts.items()
    }
    limits = [x for x in map(max_positions, configs) if x is not None]
    limit = min(limits, default=None)
    task = render_task(files, chats, limit, config.max_completion_tokens)
    prompts = [*task.train, *task.validation, *task.test]
    for model_config in configs:
        for lengths in (
            [len(p.student_ids) for p in prompts],
            [len(task.prompted_ids(p)) for p in prompts],
        ):
            longest = max(lengths) + config.max_completion_tokens
            check_rope(model_config, min(lengths) + 1, longest)
    resolved = replace(config, device=str(device))
    resolved.dtype = "bfloat16" if dtype == torch.bfloat16 else "float32"
    return Setup(resolved, task, next(iter(chats.values())), tokenizer, device, dtype)


def _check_folder(config: TrainConfig, resume: bool) -> Path:
    """The run's folder, if it may be used. A folder without a checkpoint holds no run yet."""
    folder = Path(config.output_dir)
    saved = folder / "config.yaml"
    if not resume:
        if list_checkpoints(folder / "checkpoints") or (folder / "final").exists():
            raise InputError(
                f"output_dir must not hold a run yet, got {str(folder)!r} with one; pass --resume "
                f"to continue it, or choose another output_dir"
            )
        return make_folder(folder)
    if not saved.is_file():
        raise InputError(
            f"--resume needs a run to continue, got no {saved}; leave --resume out to start one"
        )
    before = TrainConfig.load(saved)
    changed = set(before.differing_fields(config)) - HOUSEKEEPING
    if config.schedule == "constant" and config.steps > before.steps:
        changed.discard("steps")
    if changed - REMEDIES:
        raise InputError(
            f"a resumed run must keep its settings, got other values for "
            f"{', '.join(sorted(changed - REMEDIES))}; pass --config {saved}, or start another "
            f"output_dir"
        )
    for name in sorted(changed):
        print(f"continuing with {name} {getattr(config, name)}, was {getattr(before, name)}")
    return folder


def _fit(config: TrainConfig, setup: Setup, folder: Path, resume: bool) -> bool:
    """Train to the last step and write final/; False if a signal ended it before."""
    task, checkpoints = setup.task, folder / "checkpoints"
    distiller = build_distiller(config, setup)
    config.save(folder / "config.yaml")
    best: dict[str, Any] = {"step": None}
    if resume and (done := list_checkpoints(checkpoints)):
        state = load_checkpoint(done[-1], distiller)
        best = state["best"]
        if state["fingerprint"] != task.fingerprint:
            raise InputError(
                f"a resumed run must see the prompts it was started with, but context, prompts or "
                f"chat template give other token ids than in {done[-1]}; restore the files"
            )
    _print_plan(config, setup, distiller)
    metrics_file = folder / "metrics.jsonl"
    write_jsonl(metrics_file, read_metrics(metrics_file, distiller.steps_done))
    extra = {"fingerprint": task.fingerprint}

    with (
        stop_signals() as stop,
        metrics_file.open("a", encoding="utf-8") as metrics_log,
        tqdm(total=config.steps, initial=distiller.steps_done, unit="step", desc="distil") as bar,
    ):
        while distiller.steps_done < config.steps and not stop:
            try:
                metrics = distiller.step(step_prompts(task.train, distiller.steps_done, config))
            except InputError:
                save_checkpoint(checkpoints, distiller, extra | {"best": best})
                raise
            step, last = distiller.steps_done, distiller.steps_done == config.steps
            validated = task.validation and (step % config.validate_every == 0 or last)
            if validated:
                metrics["validation"] = found = _validate(distiller, setup, config)
                if best["step"] is None or _rank(found) > _rank(best):
                    best = {"step": step, **found}
            print(json.dumps(metrics), file=metrics_log, flush=True)
            if validated or last or stop or step % config.save_every == 0:
                save_checkpoint(checkpoints, distiller, extra | {"best": best})
                rotate(checkpoints, config.keep_checkpoints, best["step"])
            bar.set_postfix_str(_postfix(metrics, best), refresh=False)
            bar.update()
    distiller.engine.close()
    if stop:
        left = "" if distiller.steps_done < config.steps else ", the last: to export and score it"
        print(
            f"stopped by {stop[0]} after step {distiller.steps_done}{left}; checkpoint saved. "
            f"Continue:\n"
            f"  opcd train --config {folder / 'config.yaml'} --resume"
        )
        return False
    _export(config, setup, folder, best)
    return True


def build_distiller(config: TrainConfig, setup: Setup) -> Distiller:
    """Student, frozen teacher behind the shared context, and the sampler, ready for step one."""
    torch.manual_seed(config.seed)
    frozen: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    if config.lora_rank:
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        student = get_peft_model(_load(config.model, setup, setup.dtype), lora)
    else:
        student = _load(config.model, setup, torch.float32).requires_grad_(True)
    switch_off_dropout(student)
    if isinstance(student, PeftModel) and not config.teacher:
        scorer, frozen = student, student.disable_adapter
    else:
        scorer = _load(config.teacher or config.model, setup, setup.dtype)
    if config.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    teacher = _teacher(scorer, setup, frozen)
    plan = find_plan(student, setup.task.a_prefix) if config.teacher else teacher.plan
    student.eval()
    with autocast(setup.device, setup.dtype):
        engine = build_engine(config.rollout_engine, student, config.rollout_batch_size, plan)
    return Distiller(student, teacher, engine, config, setup.dtype, plan)


def _teacher(
    model: torch.nn.Module,
    setup: Setup,
    frozen: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
) -> SharedPrefixTeacher:
    config = setup.config
    return SharedPrefixTeacher(
        model,
        setup.task.prefixes,
        config.max_tokens_per_pass,
        frozen,
        prefix_cache_bytes=config.prefix_cache_mib * 2**20,
    )


def _load(name: str, setup: Setup, dtype: torch.dtype) -> Any:
    """A model that stops where the chat template does and whose head the loss can use."""
    model = load_model(name, dtype, setup.device)
    stop_at(model, setup.tokenizer.eos_token_id)
    check_head(model, setup.task.train[0].student_ids)
    return model


@contextlib.contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Collect SIGINT and SIGTERM as names, so that a step is finished; a second one kills."""
    stop: list[str] = []

    def handle(number: int, _frame: Any) -> None:
        stop.append(signal.Signals(number).name)
        print("\nfinishing this step, then saving (once more to stop at once)", flush=True)
        signal.signal(number, previous[signal.Signals(number)])

    previous: dict[signal.Signals, Any] = {}
    for caught in (signal.SIGINT, signal.SIGTERM):
        previous[caught] = signal.signal(caught, handle)
    try:
        yield stop
    finally:
        for caught, handler in previous.items():
            signal.signal(caught, handler)


def _validate(distiller: Distiller, setup: Setup, config: TrainConfig) -> dict[str, float]:
    """Accuracy without the context, and divergence to the teacher, on the validation prompts."""
    prompts = setup.task.validation
    begin = time.perf_counter()
    with distiller.autocast():
        ids = [p.student_ids for p in prompts]
        distiller.engine.sync(distiller.student, distiller.steps_done)
        rollouts = answer(distiller.engine, ids, config)
        column, _ = measure(rollouts, prompts, setup.task, setup.chat)
        divergence = held_out_divergence(
            distiller.student,
            distiller.engine,
            distiller.teacher,
            spread(prompts, config.divergence_prompts),
            config,
            distiller.plan,
        )
    return {
        "accuracy": column["accuracy"],
        "divergence": divergence,
        "time_s": time.perf_counter() - begin,
    }


def _rank(found: dict[str, Any]) -> tuple[float, float]:
    return found["accuracy"], -found["divergence"]


def _export(config: TrainConfig, setup: Setup, folder: Path, best: dict[str, Any]) -> None:
    """Write the chosen checkpoint as final/, in the precision the model was stored in."""
    newest = list_checkpoints(folder / "checkpoints")[-1]
    step = best["step"] or int(newest.name.removeprefix("step-"))
    checkpoint = folder / "checkpoints" / f"step-{step:06d}"
    stored = getattr(load_config(config.model), "dtype", None) or torch.float32
    adapter = None
    if config.lora_rank > 0:
        base = load_model(config.model, stored)
        adapter = PeftModel.from_pretrained(base, str(checkpoint))
        model: PreTrainedModel = adapter.merge_and_unload()
    else:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=stored)

    if best["step"] is None:
        how = f"step {step}, the last (no validation data)"
    else:
        how = (
            f"step {step} of {config.steps}, chosen on validation data by accuracy "
            f"({best['accuracy']:.1%}), then divergence"
        )
    selection = {"how": how, "step": step, "data": config.validation_data, "validation": best}

    def write(aside: Path) -> None:
        model.save_pretrained(aside)
        setup.tokenizer.save_pretrained(aside)
        write_json(aside / "selection.json", selection)

    write_folder(folder / "final", write)


def _score(
    config: TrainConfig,
    setup: Setup,
    base: PreTrainedModel,
    distilled: PreTrainedModel | None,
    folder: Path,
    selection: dict[str, Any] | None,
) -> None:
    """Measure, print and write scorecard.json, answers.jsonl and report.md."""
    frozen = _load(config.teacher, setup, setup.dtype) if config.teacher else base
    teacher = _teacher(frozen, setup)
    with tqdm(total=6 if distilled is not None else 3, desc="evaluate", leave=False) as bar:

        def say(what: str) -> None:
            bar.update(1 if bar.postfix else 0)
            bar.set_postfix_str(what)

        card, answers = evaluate(base, distilled, teacher, setup.task, setup.chat, config, say)
    if selection is not None:
        card["selection"] = selection
    write_json(folder / "scorecard.json", card)
    write_jsonl(folder / "answers.jsonl", answers)
    write_report(folder, card, answers, config, read_metrics(folder / "metrics.jsonl"))
    print(f"\n{scorecard_table(card)}\n")
    print("\n".join(f"  {fact}" for fact in scorecard_facts(card)))
    print(f"\nTest prompts, before and after\n\n{before_after(answers)}")


def _print_plan(config: TrainConfig, setup: Setup, distiller: Distiller) -> None:
    task = setup.task
    shared = fmean(len(task.prefixes[p.context]) for p in task.test or task.train)
    if shared < 0.8 * task.prompt_tokens_saved:
        log.warning(
            "only %.0f of about %.0f context tokens stand in front of all prompts: the chat "
            "template puts the rest elsewhere, and it is computed with every sequence",
            shared,
            task.prompt_tokens_saved,
        )
    trained = sum(p.numel() for p in distiller.parameters)
    kind = f"LoRA rank {config.lora_rank}" if config.lora_rank else "every weight"
    plan = distiller.teacher.plan
    often = "once" if plan.shares_prefix else "with every sequence"
    several = f"{len(task.prefixes)} of about " if len(task.prefixes) > 1 else ""
    print(
        f"context   {several}{shared:.0f} tokens, computed {often}; sequences {plan.mode}, "
        f"{plan.backend} ({plan.reason})\n"
        f"student   {config.model} on {config.device}, {config.dtype}, training {kind} "
        f"({trained / 1e6:.1f} M)\n"
        f"rollouts  {distiller.engine.name} engine, {config.rollout_batch_size} at once\n"
        f"data      {len(task.train)} training, {len(task.validation)} validation, "
        f"{len(task.test)} test prompts"
    )


def _postfix(metrics: dict[str, Any], best: dict[str, Any]) -> str:
    text = (
        f"divergence {metrics['divergence']:.3f}, {metrics['completion_tokens_mean']:.1f} tokens "
        f"each, {metrics['completion_tokens_per_s']:.0f} tokens/s"
    )
    return text + (f", best {best['accuracy']:.0%}" if best["step"] is not None else "")


def _next_steps(config: TrainConfig, folder: Path) -> str:
    report = f"  report       {folder / 'report.md'}\n" if config.eval_data else ""
    return (
        f"Done. The model that no longer needs the context is {folder / 'final'}\n"
        f"{report}"
        f"  load it      AutoModelForCausalLM.from_pretrained({str(folder / 'final')!r})\n"
        f"  score again  opcd eval --config {folder / 'config.yaml'}\n"
        f"  your prompt  opcd train --help, and a config like {folder / 'config.yaml'}"
    )


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")
