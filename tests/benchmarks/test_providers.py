"""Everybody computes what the reference defines, and the oracle is right without its graph."""

import pytest
import torch

from benchmarks import providers
from benchmarks.providers import (
    DIVERGENCES,
    PROVIDERS,
    Provider,
    Unavailable,
    divergence_of,
    exact_gradients,
    gradient_error,
    gradients,
    in_a_step,
    tensors,
)
from opcd_kernels import reference

CPU = torch.device("cpu")
INPUTS = tensors(24, 16, 301, CPU, noise=0.3)
TRITON = ("ours-triton", "ours-triton-dual", "liger-fused")


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_the_formula_is_the_reference(kind: str) -> None:
    z_s, z_t = (torch.randn(5, 40, dtype=torch.float64) for _ in range(2))
    s, t = z_s.log_softmax(-1), z_t.log_softmax(-1)
    expected = (
        sum(reference.divergence(z_s, z_t, k, 0.5) for k in ("reverse_kl", "forward_kl")) / 2
        if kind == "mixture"
        else reference.divergence(z_s, z_t, kind, 0.5)
    )
    torch.testing.assert_close(divergence_of(s, t, kind), expected)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_the_oracle_is_autograd_in_fp64(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "SLAB", 100)

    def loss(h_s: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        w_s, h_t, w_t = rest
        s, t = (h_s @ w_s.T).log_softmax(-1), (h_t @ w_t.T).log_softmax(-1)
        return divergence_of(s, t, kind).mean()

    h_s, w_s, h_t, w_t = (x.double() for x in INPUTS)
    expected = gradients(Provider(loss), (h_s, w_s, h_t, w_t))
    found = exact_gradients(INPUTS, kind)
    assert gradient_error(found, expected) < 1e-7  # the head's is kept in fp32
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-12)
    assert len(exact_gradients(INPUTS, kind, frozen=True)) == 2


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("name", [n for n in PROVIDERS if n not in TRITON])
def test_a_provider_computes_the_divergence(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda f=None, **_: f or (lambda g: g))
    monkeypatch.setitem(providers.CHECKPOINTED_TOKENS, "cpu", 10)  # a tail of four
    try:
        provider = PROVIDERS[name](CPU, kind)
    except Unavailable as reason:
        pytest.skip(str(reason))
    exact = exact_gradients(INPUTS, kind)
    rounds_logits = name in ("plain-bf16", "torch.compile", "liger-chunked")
    bound = 0.1 if rounds_logits else 0.005
    assert gradient_error(gradients(provider, INPUTS), exact) < bound
    call = in_a_step(provider, INPUTS)
    once = [x.clone() for x in call()]
    assert gradient_error(once, exact) < bound
    twice = call()[2]
    torch.testing.assert_close(twice, 2 * once[2])  # added to what is there


def test_who_cannot_run_here_says_why() -> None:
    with pytest.raises(Unavailable, match="must have bf16"):
        PROVIDERS["ours-triton-dual"](CPU, "mixture")  # in the interpreter: never a mixture
    with pytest.raises(Unavailable, match="mixture"):
        PROVIDERS["trl"](CPU, "mixture")


def test_products_may_round_within_and_not_behind() -> None:
    setting = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(setting, "fp32_precision"):
        with pytest.raises(Unavailable, match=r"fp32_precision \(2.9\)"):
            providers.fast_fp32_products(CPU)
        return
    before = setting.fp32_precision
    with providers.fast_fp32_products(CPU)():
        assert setting.fp32_precision == "bf16"
    assert setting.fp32_precision == before
