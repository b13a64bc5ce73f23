"""The definitions, against closed forms and finite differences."""

import math

import pytest
import torch

from opcd_kernels import reference


def test_kl_of_two_coins() -> None:
    p, q = 0.9, 0.3
    s = torch.tensor([[math.log(p), math.log(1 - p)]], dtype=torch.float64)
    t = torch.tensor([[math.log(q), math.log(1 - q)]], dtype=torch.float64)
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert reference.divergence(s, t).item() == pytest.approx(expected, rel=1e-14)
    assert reference.divergence(t, s, "forward_kl").item() == pytest.approx(expected, rel=1e-14)


def test_jsd_of_disjoint_distributions_is_log_2() -> None:
    s = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64)
    t = torch.tensor([[-torch.inf, 0.0]], dtype=torch.float64)
    assert reference.divergence(s, t, "jsd", 0.5).item() == pytest.approx(math.log(2), rel=1e-14)
    assert reference.divergence(s, t).item() == math.inf


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_equal_distributions_have_no_divergence(divergence: str) -> None:
    z = torch.randn(3, 11, dtype=torch.float64)
    assert reference.divergence(z, z + 300, divergence).abs().max() < 1e-12


def test_jsd_weighs_the_mixture_with_beta() -> None:
    s, t = torch.randn(2, 1, 7, dtype=torch.float64).unbind(0)
    p, q, beta = s.softmax(-1), t.softmax(-1), 0.2
    m = (1 - beta) * p + beta * q
    expected = beta * (q * (q / m).log()).sum() + (1 - beta) * (p * (p / m).log()).sum()
    assert reference.divergence(s, t, "jsd", beta).item() == pytest.approx(expected.item())


def test_a_mixture_is_linear_in_its_share() -> None:
    s, t = torch.randn(2, 3, 7, dtype=torch.float64).unbind(0)
    shares = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    reverse, forward = (reference.divergence(s, t, d) for d in ("reverse_kl", "forward_kl"))
    expected = reverse + shares * (forward - reverse)
    assert torch.allclose(reference.divergence(s, t, forward_share=shares), expected)
    expected = 0.9 * reverse + 0.1 * forward
    assert torch.allclose(reference.divergence(s, t, forward_share=0.1), expected)


def test_logprobs_are_the_negative_cross_entropy() -> None:
    z, ids = torch.randn(3, 7, dtype=torch.float64), torch.tensor([0, 6, 3])
    expected = torch.nn.functional.cross_entropy(z, ids, reduction="none")
    assert torch.allclose(reference.logprobs(z, ids), -expected)


def test_entropy_of_a_uniform_distribution_is_log_v() -> None:
    z = torch.zeros(1, 32, dtype=torch.float64)
    assert reference.entropy(z).item() == pytest.approx(math.log(32), rel=1e-14)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_gradcheck(divergence: str) -> None:
    torch.manual_seed(0)
    h = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    t = torch.randn(3, 9, dtype=torch.float64)

    def loss(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        z = reference.logits(h, w, softcap=5.0, temperature=0.7)
        return reference.divergence(z, t, divergence, 0.3).sum()

    assert torch.autograd.gradcheck(loss, (h, w))
