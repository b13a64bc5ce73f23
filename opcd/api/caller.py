"""What of the caller's process a call leaves as it was."""

import contextlib
import random
import warnings
from collections.abc import Iterator

import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from transformers.utils import logging as transformers_logging


@contextlib.contextmanager
def as_found() -> Iterator[None]:
    """Random generators, gradient mode and threads are the caller's again where it ends."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    state, threads = random.getstate(), torch.get_num_threads()
    try:
        with (
            torch.random.fork_rng(list(devices)),
            torch.inference_mode(False),
            torch.enable_grad(),
            _no_bars_of_transformers(),
        ):
            yield
    finally:
        random.setstate(state)
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _no_bars_of_transformers() -> Iterator[None]:
    """Without a bar for every model that is loaded; the switch is transformers' and the hub's."""
    shown, hubs = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # where the environment has them off
                transformers_logging.enable_progress_bar()
        if not hubs:
            disable_progress_bars()
