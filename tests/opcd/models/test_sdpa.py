"""No cuDNN attention around the models; the user's value comes back."""

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from opcd.models.head import head_of
from opcd.models.sdpa import without_cudnn_attention
from opcd.passes.hidden import completion_rows, scored_hidden
from opcd.passes.plan import WHOLE, find_plan, planned_hidden
from opcd.passes.prefix import SharedPrefix
from opcd.rollouts.generate import TransformersEngine
from opcd.rollouts.protocol import SamplingParams
from opcd.rollouts.static import StaticEngine, why_not_static
from tests.conftest import tiny_llama

ROWS = completion_rows([[5, 6, 7], [8, 9]], [[10, 11], [12]])
GREEDY = SamplingParams(3, temperature=0.0)


def allowed() -> bool:
    return torch.backends.cuda.cudnn_sdp_enabled()


@pytest.fixture(params=[True, False])
def before(request: pytest.FixtureRequest) -> Iterator[bool]:
    found = allowed()
    torch.backends.cuda.enable_cudnn_sdp(request.param)
    yield request.param
    torch.backends.cuda.enable_cudnn_sdp(found)


def conversations(model: torch.nn.Module) -> None:
    for engine in (TransformersEngine(model), StaticEngine(model)):
        talk = engine.open([[5, 6], [7]])
        talk.complete(GREEDY)


PASSES: dict[str, Callable[[torch.nn.Module], object]] = {
    "padded": lambda model: scored_hidden(model, ROWS),
    "packed": lambda model: scored_hidden(model, ROWS, packed=True),
    "prefix": lambda model: SharedPrefix(model, [5, 6]),
    "plan": lambda model: find_plan(model, [5, 6, 7]),
    "planned": lambda model: planned_hidden(model, ROWS, WHOLE),
    "head": head_of,
    "generate": lambda model: TransformersEngine(model).generate([[5], [6, 7]], GREEDY),
    "static": lambda model: StaticEngine(model).generate([[5], [6, 7]], GREEDY),
    "trial of static": lambda model: why_not_static(model, find_plan(model, [5, 6])),
    "conversations": conversations,
}


@pytest.mark.parametrize("name", PASSES)
def test_no_pass_of_a_model_may_take_it(name: str, before: bool) -> None:
    model = tiny_llama()
    seen = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: seen.append(allowed()))
    PASSES[name](model)
    assert seen
    assert not any(seen)
    assert allowed() == before


@pytest.mark.parametrize("inside", [False, True])
def test_layers_computed_again_take_the_attention_of_the_forward(
    inside: bool, before: bool
) -> None:
    """Or their saved tensors would be others: all inside, or none."""
    model = tiny_llama().requires_grad_(True).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    head_of(model)  # which passes of its own tell, once
    seen = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: seen.append(allowed()))
    with without_cudnn_attention() if inside else contextlib.nullcontext():
        planned_hidden(model, ROWS, WHOLE).sum().backward()
    assert seen == [before and not inside] * 2


def test_passes_that_overlap_bring_the_value_back(before: bool) -> None:
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))
    seen = []

    def second() -> None:
        first_is_in.wait(5)
        with without_cudnn_attention():
            second_is_in.set()
            first_is_out.wait(5)
            seen.append(allowed())

    thread = threading.Thread(target=second)
    thread.start()
    with without_cudnn_attention(), without_cudnn_attention():
        first_is_in.set()
        second_is_in.wait(5)
    first_is_out.set()
    thread.join()
    assert seen == [False], "the one that is left still needs it"
    assert allowed() == before


def test_the_value_comes_back_after_an_error(before: bool) -> None:
    with pytest.raises(ZeroDivisionError), without_cudnn_attention():
        1 / 0  # noqa: B018
    assert allowed() == before
