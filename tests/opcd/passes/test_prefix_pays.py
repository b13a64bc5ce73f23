"""When what prompts start with is worth computing apart, and when a pass is packed."""

import pytest

from opcd.passes.plan import Plan
from opcd.passes.prefix import tokens_that_pay, worthwhile_prefix


def test_a_pass_of_its_own_costs_a_gpu_more_than_a_cpu() -> None:
    on_cpu = {tokens_that_pay("cpu", grad, row) for grad in (0, 1) for row in (0, 1)}
    in_row, forward, both = (
        tokens_that_pay("cuda", *how) for how in ((True, True), (False, False), (True, False))
    )
    assert on_cpu == {128}
    assert 128 < in_row < forward < both >= 4096
    assert tokens_that_pay("cuda", False, True) == in_row


@pytest.mark.parametrize(("tokens", "length"), [(48, 24), (49, 0)])
def test_a_prefix_pays_by_the_tokens_it_saves(tokens: int, length: int) -> None:
    start = list(range(24))
    assert worthwhile_prefix([[*start, 90], [*start, 91], [*start, 92]], tokens) == length


def test_a_pass_with_gradients_is_packed_where_its_attention_is_fused() -> None:
    fused = Plan("packed", "flash-attn package", "", "aten flash, cuda")
    for plan, device, grad, packs in (
        (fused, "cuda", True, True),
        (fused, "cuda", False, True),
        (fused._replace(with_gradients="aten flash, cuda and plain"), "cuda", True, False),
        (fused._replace(with_gradients="plain"), "cuda", False, True),
        (fused._replace(with_gradients="plain"), "cpu", True, True),
        (fused._replace(mode="padded"), "cuda", False, False),
    ):
        assert plan.packs(device, grad) == packs, (plan, device, grad)
