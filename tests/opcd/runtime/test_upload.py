"""What a pass needs is worked out on the host: it must not wait for the device."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from opcd.models.head import head_of
from opcd.objective import head_divergence
from opcd.passes.hidden import completion_rows, scored_hidden
from opcd.passes.plan import Plan, find_plan, planned_hidden
from opcd.passes.prefix import SharedPrefix, empty_cache
from opcd.runtime.upload import uploaded
from tests.conftest import tiny_llama
from tests.opcd.architectures import ARCHITECTURES, build

PREFIX = list(range(30, 70))
PROMPTS = [[5, 6, 7], [8, 9], [10] * 9]
COMPLETIONS = [[20, 21], [22] * 7, [23] * 3]


def test_nothing_is_decided_by_what_the_device_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device there is nothing to read: a pass that asks for a value fails."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)  # which does not know meta
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    model = tiny_llama()
    head_of(model)  # measured once, from values
    model.to("meta")
    prefix = SharedPrefix(model, PREFIX)
    with torch.no_grad():
        teacher = scored_hidden(model, completion_rows(PROMPTS, COMPLETIONS, prefix), packed=True)
    student = scored_hidden(model, completion_rows(PROMPTS, COMPLETIONS, prefix))
    plan = Plan("padded", "", "")
    whole = planned_hidden(model, completion_rows(PROMPTS, COMPLETIONS), plan)
    head = head_of(model)
    out = head_divergence(student, head, teacher, head, torch.full((12,), 1 / 12))
    out.loss.backward()
    assert teacher.shape == student.shape == whole.shape == (12, 32)
    assert model.lm_head.weight.grad.shape == head.weight.shape
    with pytest.raises(RuntimeError):
        out.loss.item()  # or this test shows nothing


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_empty_cache_changes_no_bit(name: str) -> None:
    """And is not given to what keeps other states than keys and values."""
    model = build(name)
    made = empty_cache(model)
    kept = find_plan(model, PREFIX)
    rows = completion_rows(PROMPTS, COMPLETIONS)
    assert (made is None) == ("hybrid" in name or name == "mamba")
    if made is None or not kept.shares_prefix:
        return
    with torch.no_grad():
        expected = scored_hidden(model, rows)
        assert torch.equal(scored_hidden(model, rows, takes_cache=True), expected)


def test_uploaded_is_the_tensor_itself_on_the_host() -> None:
    x = torch.arange(3)
    assert uploaded(x, torch.device("cpu")) is x


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_packed_pass_does_not_synchronise() -> None:
    model = tiny_llama().to("cuda", torch.bfloat16)
    with torch.no_grad():
        prefix = SharedPrefix(model, PREFIX)
        expected = scored_hidden(model, completion_rows(PROMPTS, COMPLETIONS, prefix), packed=True)
        with no_synchronisation():
            actual = scored_hidden(
                model, completion_rows(PROMPTS, COMPLETIONS, prefix), packed=True
            )
    assert torch.equal(actual, expected)
