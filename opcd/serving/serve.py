"""A run on a server: its contenders measured one after the other, compared, and written down."""

from dataclasses import replace
from datetime import date
from pathlib import Path

from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.runtime.environment import environment
from opcd.runtime.progress import Progress
from opcd.runtime.untrusted import check_run_folder
from opcd.serving.break_even import BreakEven, Counted, break_even, priced, verdict
from opcd.serving.contenders import CACHED, DISTILLED, cases_of
from opcd.serving.measure import Asking, Figures
from opcd.serving.report import Served, write_served
from opcd.serving.trained import Trained, read_trained
from opcd.serving.vllm import find_vllm
from opcd.serving.wanted import Wanted
from opcd.serving.ways import Found, Run, at_address, in_process, started
from opcd.tasks.prepare import on_this_machine, prepare


def serve_report(
    run: Path, config: TrainConfig, wanted: Wanted, progress: Progress | None = None
) -> Served:
    """Measure a run on a server, and write serving.json, report and page into its folder.

    config: as the run's config.yaml has it.
    Raises InputError for a run without an exported model, for what it was measured by that is not
    here any more, and for a server that does not do what is asked of it. A server that was started
    is gone at the end, whatever that is.
    """
    wanted.check()
    progress = progress or Progress()
    check_run_folder(run)
    final = run / "final"
    if not final.is_dir():
        raise InputError(
            f"there must be a distilled model, got no folder {str(final)!r}; name the folder of a "
            f"run that has ended"
        )
    here_now = replace(on_this_machine(config), output_dir=str(run))
    setup, today = prepare(here_now), date.today().isoformat()
    dated = setup.config.today not in (None, today)
    if dated:  # a server's template takes the day's own
        setup = prepare(replace(setup.config, today=today))
    trained = read_trained(run, config.max_completion_tokens)
    cases = cases_of(setup)
    asking = Asking(trained.answer_tokens, config.chat_template_args, wanted.requests)
    here = Run(run, setup, cases, asking, progress)
    vllm = None if wanted.base_url else find_vllm(wanted.server_python)
    if wanted.base_url is not None:
        found = at_address(
            *(here, wanted.base_url, wanted.served_model, wanted.served_distilled),
            wanted.max_minutes,
        )
    elif vllm is not None:
        found = started(here, vllm, wanted.max_minutes)
    else:
        found = in_process(here, wanted.max_minutes)
    if dated:
        found.how.append(
            f"the chat template writes today's date: all were given that of {today}, the run has "
            f"{config.today}"
        )
    paid = _paid(found, wanted, trained)
    decided = verdict(trained.word, paid[-1] if paid else None, wanted.expected_requests)
    served = Served(
        decided,
        found.contenders,
        paid,
        found.same,
        found.failed,
        found.how,
        environment(setup.device),
    )
    write_served(run, config, served)
    return served


def _paid(found: Found, wanted: Wanted, trained: Trained) -> list[BreakEven]:
    """Against the cached prompt: in seconds of the device, and in money where there are prices."""
    cached, without = found.contenders.get(CACHED), found.contenders.get(DISTILLED)
    if cached is None or without is None:
        return []
    took, on = trained.seconds, trained.device
    same = took is not None and found.device is not None and on == found.device
    more, less = cached.figures, without.figures
    words = [
        f"{_ms(figures)} of the device a request {what} ({figures.best.at_once} at once)"
        for what, figures in (("with the cached prompt", more), ("without it", less))
    ]
    if took is not None:
        steps = f"training took {took:,.0f} s (steps and validations) on {on or 'another device'}"
        other = "" if same else ", whose seconds are not those of the server's device"
        words.append(steps + other)
    in_seconds = Counted("s", more.device_s, less.device_s, took if same else None, words)
    paid = [break_even(in_seconds, wanted.requests_a_day)]
    if (prices := wanted.prices) is not None:
        counted = priced(
            prices, more.prompt_tokens, more.cached_tokens or 0.0, less.prompt_tokens, took
        )
        paid.append(break_even(counted, wanted.requests_a_day))
    return paid


def _ms(figures: Figures) -> str:
    s = figures.device_s.scaled(1000)
    return f"{s.median:,.1f} ms ({s.low:,.1f} to {s.high:,.1f})"
