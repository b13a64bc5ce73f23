"""Three ways to measure a run: a vLLM that is started, a server that runs, transformers alone."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from opcd.errors import InputError
from opcd.evaluation.server import Server
from opcd.models.adapter import load_adapter
from opcd.models.by_name import load_config
from opcd.models.lm import max_positions
from opcd.runtime.environment import environment
from opcd.runtime.memory import release_memory
from opcd.runtime.progress import Progress
from opcd.serving.contenders import (
    ADAPTER,
    CACHED,
    DISTILLED,
    PROMPTED,
    Contender,
    contenders_of,
    longest,
    messages_of,
)
from opcd.serving.in_process import measured_here
from opcd.serving.measure import ALONE_TOKENS, Asking, Figures, measured
from opcd.serving.report import CPU, Measured
from opcd.serving.room import Blocks, blocks_of, bytes_per_token, room
from opcd.serving.same_answers import Same, Served, compared, in_float32, served_answers
from opcd.serving.vllm import Model, Vllm, serving
from opcd.tasks.prepare import Setup
from opcd.tasks.task import Case, spread

BYTES = {"bfloat16": 2, "float32": 4}
BLOCK = 128  # tokens: lengths that servers are started for are whole ones
COMPARED = 500  # requests, on which served and measured model are compared
LONGEST_REASON = 300  # characters


class Run(NamedTuple):
    """What all ways of measuring need."""

    folder: Path
    setup: Setup
    cases: list[Case]
    asking: Asking
    progress: Progress


class Found(NamedTuple):
    """What a way of measuring gives."""

    contenders: dict[str, Measured]
    how: list[str]
    device: str | None  # what was measured on; None: not known here
    same: dict[str, Same]
    failed: dict[str, str]


def started(run: Run, vllm: Vllm, max_minutes: float) -> Found:
    """On an installed vLLM, one server after the other."""
    setup, cases, asking, progress = run.setup, run.cases, run.asking, run.progress
    everyone = contenders_of(setup, run.folder / "final")
    asking = asking._replace(seconds=60 * max_minutes / len(everyone))
    max_tokens = _room_for(setup, cases, asking)
    each_bytes = bytes_per_token(load_config(setup.config.model), BYTES[setup.config.dtype])
    exported = [one for one in everyone if one.name in (DISTILLED, ADAPTER)]
    compared_cases = spread(cases, COMPARED)
    contenders: dict[str, Measured] = {}
    said: dict[str, list[Served]] = {}
    failed: dict[str, str] = {}
    with _phase(progress, "serve", len(everyone) * (4 + len(asking.at_once))):
        for one in everyone:
            # Not every server takes an adapter: the others' figures are there all the same.
            with _spared(one.name, failed) if one.name == ADAPTER else contextlib.nullcontext():
                requests = messages_of(setup, cases, one.prompted)
                with serving(vllm, _model(one, setup, asking, max_tokens)) as server:
                    progress.part(f"{one.name}, started")
                    figures = measured(server, requests, asking, partial(_tell, progress, one.name))
                    # It counts cached tokens, and leaves the count out where it is 0.
                    figures = figures._replace(cached_tokens=figures.cached_tokens or 0.0)
                    blocks = blocks_of(server)
                    if one in exported:
                        said[one.name] = served_answers(server, compared_cases, setup)
                contenders[one.name] = _measured(one.meaning, figures, blocks, each_bytes)
            progress.part(f"{one.name}, ended")
    same = {}
    exact = in_float32(setup)
    with _phase(progress, "compare", len(exported)):
        for one in exported:
            if one.name not in said:
                continue
            name = f"{one.name}, {setup.config.dtype}"
            with _spared(name, failed):
                same[name] = _compared(one, compared_cases, said[one.name], setup)
            if exact.config.dtype != setup.config.dtype:
                name = f"{one.name}, {exact.config.dtype}"
                with _spared(name, failed):
                    with serving(vllm, _model(one, exact, asking, max_tokens)) as server:
                        again = served_answers(server, compared_cases, exact)
                    same[name] = _compared(one, compared_cases, again, exact)
            progress.part(one.name)
    device = str(environment(setup.device)["device"])
    how = [
        f"by {vllm}, {_cores()} of {device.partition(': ')[2] or device}, {setup.config.dtype}; "
        f"{asking.alone} requests alone, answers of {asking.answer_tokens} tokens under load, "
        f"warm-up left out; medians with quartiles (rounds: least and most)",
        *([CPU] if vllm.device == "cpu" else []),
    ]
    own = device if vllm.device == setup.device.type else None
    return Found(contenders, how, own, same, failed)


@contextlib.contextmanager
def _spared(name: str, failed: dict[str, str]) -> Iterator[None]:
    """What fails here costs none of the figures: why is kept."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError) as error:
        failed[name] = " ".join(str(error).split())[:LONGEST_REASON]
        release_memory()


def _compared(
    one: Contender, cases: Sequence[Case], served: Sequence[Served], setup: Setup
) -> Same:
    found = compared(str(one.adapter or one.folder), cases, served, setup)
    release_memory()
    return found


def at_address(
    run: Run,
    base_url: str,
    served_model: str | None,
    served_distilled: str | None,
    max_minutes: float,
) -> Found:
    """On a server that runs already."""
    setup, cases = run.setup, run.cases
    asking = run.asking._replace(seconds=60 * max_minutes / 2)
    original = Server(base_url, served_model)
    distilled = original
    if served_distilled:
        distilled = Server(base_url, served_distilled)
    blocks = blocks_of(original)
    each_bytes = bytes_per_token(load_config(setup.config.model), BYTES[setup.config.dtype])
    contenders = {}
    with _phase(run.progress, "serve", 2 * (1 + len(asking.at_once) + 1)):
        for name, server, prompted in (
            (CACHED, original, True),
            (DISTILLED, distilled, False),
        ):
            figures = measured(
                server,
                messages_of(setup, cases, prompted),
                asking,
                partial(_tell, run.progress, name),
            )
            if prompted and not figures.cached_tokens:
                name = PROMPTED
            meaning = f"{server.model}, {'with' if prompted else 'without'} the prompt"
            contenders[name] = _measured(meaning, figures, blocks, each_bytes)
    how = [
        f"by the server at {base_url}, as it is ({original.model} with the prompt, "
        f"{distilled.model} without); {asking.alone} requests alone, answers of "
        f"{asking.answer_tokens} tokens under load, or as the server ends them; warm-up left out; "
        f"medians with quartiles (rounds: least and most)",
    ]
    if distilled is original:
        how.append(
            "the distilled model was not asked: the original without the prompt takes as long"
        )
    return Found(contenders, how, None, {}, {})


def in_process(run: Run, max_minutes: float) -> Found:
    """With transformers, one request at a time."""
    setup, progress = run.setup, run.progress
    context = run.cases[0].prompt.context
    cases = [case for case in run.cases if case.prompt.context == context]
    prefix = setup.task.prefixes[context]
    whole = [setup.task.prompted_ids(case.prompt) for case in cases]
    behind = [list(case.prompt.teacher_ids) for case in cases]
    alone = [list(case.prompt.student_ids) for case in cases]
    final = run.folder / "final"
    everyone: list[tuple[str, str, Sequence[Sequence[int]], Sequence[int]]] = [
        (PROMPTED, "before, with the prompt, read whole", whole, ()),
        (CACHED, "before, with the prompt, its keys and values kept", behind, prefix),
        (DISTILLED, "after, without the prompt", alone, ()),
    ]
    adapter = final / "adapter"
    if adapter.is_dir():
        meaning = "before with the adapter, without the prompt"
        everyone.append((ADAPTER, meaning, alone, ()))
    asking = run.asking._replace(seconds=60 * max_minutes / len(everyone))
    each_bytes = bytes_per_token(load_config(setup.config.model), BYTES[setup.config.dtype])
    contenders: dict[str, Measured] = {}
    model: Any = None
    with _phase(progress, "time", len(everyone)):
        for name, meaning, prompts, shared in everyone:
            if name == PROMPTED:
                model = setup.load(setup.config.model)
            elif name == DISTILLED:
                model = setup.load(str(final))
            elif name == ADAPTER:
                model = load_adapter(setup.load(setup.config.model), adapter)
            figures = measured_here(model, prompts, asking, shared)
            if figures is not None:
                contenders[name] = _measured(meaning, figures, None, each_bytes)
            progress.part(name)
    device = str(environment(setup.device)["device"])
    how = [
        f"no server is installed: prompts were read and tokens decoded by transformers, a request "
        f"at a time, {setup.config.dtype}, {device}; a server batches, and its figures are others",
        *([CPU] if setup.device.type == "cpu" else []),
    ]
    return Found(contenders, how, device, {}, {})


def _measured(
    meaning: str, figures: Figures, blocks: Blocks | None, each_bytes: int | None
) -> Measured:
    its = room(
        figures.prompt_tokens, figures.cached_tokens, figures.answer_tokens, blocks, each_bytes
    )
    return Measured(meaning, figures, its)


def _model(one: Contender, setup: Setup, asking: Asking, max_tokens: int) -> Model:
    config = setup.config
    template = setup.tokenizer.get_chat_template() if config.chat_template else None
    return Model(
        *(one.folder, one.name, config.dtype, max_tokens, max(asking.at_once), one.caching),
        *(one.adapter, one.rank, template),
    )


def _room_for(setup: Setup, cases: Sequence[Case], asking: Asking) -> int:
    """Tokens of the longest prompt with its answer, in whole blocks, as far as the model goes."""
    answer = max(asking.answer_tokens, ALONE_TOKENS, setup.config.max_completion_tokens)
    wanted = -(-(longest(setup, cases) + answer) // BLOCK) * BLOCK
    limit = max_positions(load_config(setup.config.model))
    return wanted if limit is None else min(wanted, limit)


def _cores() -> str:
    """What this process, and so a server that it starts, may use of a machine."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{count} core{'' if count == 1 else 's'}"


def _tell(progress: Progress, name: str, what: str) -> None:
    progress.part(f"{name}, {what}")


@contextlib.contextmanager
def _phase(progress: Progress, what: str, total: int) -> Iterator[None]:
    progress.begin(what, total)
    try:
        yield
    finally:
        progress.end()
