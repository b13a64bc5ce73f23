"""What the dual product's bf16 numbers cost, simulated in fp64 (docs/derivation.md).

    python -m benchmarks.roundings

First table: relative error (2-norm) of dH where only E and δ are rounded to bf16, only the gradient
in the logits, or both. Second table, for a head that both models share: relative error under p_s of
δ as the difference of two products with fp32 sums, and as one product of h_s − h_t rounded to bf16.
Hidden states and head are random, in bf16; the teacher's hidden states carry noise.
"""

import torch
from torch import Tensor

TOKENS = 64
TILE = 128
NOISE = (0.35, 0.11, 0.035, 0.012, 0.001, 0.0002)


def inputs(d: int, v: int, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """(N, D), (N, D), (V, D), bf16."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(TOKENS, d, generator=generator)
    w = torch.randn(v, d, generator=generator) * (2.4 / d**0.5)
    h_t = h.bfloat16() + noise * torch.randn(TOKENS, d, generator=generator)
    return h.bfloat16(), h_t.bfloat16(), w.bfloat16()


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().double()


def stored(h_s: Tensor, h_t: Tensor, w: Tensor) -> tuple[float, float, float, float]:
    """KL; error of dH from rounding E and δ, the gradient in the logits, both."""
    z_s, z_t = h_s.double() @ w.double().T, h_t.double() @ w.double().T
    r = z_s.log_softmax(-1) - z_t.log_softmax(-1)
    p = z_s.softmax(-1)
    kl = (p * r).sum(-1, keepdim=True)
    exact = p * (r - kl)

    tiles_s, tiles_t = (z.unflatten(-1, (-1, TILE)) for z in (z_s, z_t))
    max_s, max_t = tiles_s.amax(-1, True), tiles_t.amax(-1, True)
    e = (tiles_s - max_s).exp()
    delta = (tiles_s - max_s) - (tiles_t - max_t)
    mean = (e * delta).sum(-1, True) / e.sum(-1, True)
    scale = (max_s - z_s.logsumexp(-1)[:, None, None]).exp()
    shift = mean + (max_s - max_t) - (z_s.logsumexp(-1) - z_t.logsumexp(-1))[:, None, None]
    from_stored = scale * bf16(e) * (bf16(delta - mean) + shift - kl[..., None])
    from_stored = from_stored.flatten(1)

    def error(dz: Tensor) -> float:
        return (((dz - exact) @ w.double()).norm() / (exact @ w.double()).norm()).item()

    return kl.mean().item(), error(from_stored), error(bf16(exact)), error(bf16(from_stored))


def differences(h_s: Tensor, h_t: Tensor, w: Tensor) -> tuple[float, float, float]:
    """KL; error of z_s − z_t and of the product of the rounded difference."""
    exact = (h_s.double() - h_t.double()) @ w.double().T
    z_s, z_t = h_s.float() @ w.float().T, h_t.float() @ w.float().T
    rounded = (h_s.float() - h_t.float()).bfloat16().float() @ w.float().T
    log_p = z_s.double().log_softmax(-1)
    p = log_p.exp()

    def error(delta: Tensor) -> float:
        return ((p * (delta - exact) ** 2).sum() / (p * exact**2).sum()).sqrt().item()

    kl = (p * (log_p - (h_t.double() @ w.double().T).log_softmax(-1))).sum(-1).mean().item()
    return kl, error(z_s - z_t), error(rounded)


def main() -> None:
    print(f"N {TOKENS}, D 576, V 49152\n      KL    E, delta          dZ        both")
    for noise in NOISE[:4]:
        print("  ".join(f"{x:10.2g}" for x in stored(*inputs(576, 49152, noise))), flush=True)
    for d in (576, 2048):
        print(f"\nN {TOKENS}, D {d}, V 16384\n      KL   z_s - z_t  (h_s - h_t) W^T")
        for noise in NOISE:
            found = differences(*inputs(d, 16384, noise))
            print("  ".join(f"{x:10.2g}" for x in found), flush=True)


if __name__ == "__main__":
    main()
