"""How many digits each provider keeps as student and teacher come close, bf16 inputs.

    python -m benchmarks.accuracy                  prints a table
    python -m benchmarks.accuracy --json FILE      and writes its rows

Exact values are computed in fp64 from the same bf16 numbers: D 576, V 49152, reverse KL of about
0.4, 0.04, 0.004 and 0.0005 nats a token; a `-mixture` is half the reverse and half the forward KL.
`gradient_error` is the larger relative error (2-norm) of the two gradients over 32 tokens;
`kl_error` the largest relative error of a single token's divergence over eight tokens, `kl_lowest`
the smallest divergence reported for them in multiples of the exact one: below 0 is impossible.
Without a GPU Triton's interpreter runs the Triton kernels. It truncates to bf16 where a GPU rounds
(ours round by themselves there), and Liger's own projection rounds its logits to bf16.
"""

import argparse
import os
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from benchmarks.providers import (
    PROVIDERS,
    Unavailable,
    definition,
    gradient_error,
    gradients,
    plain_loss,
    plain_mixture,
    tensors,
)
from benchmarks.rows import origin, write

NOISE = {0.4: 0.37, 0.04: 0.118, 0.004: 0.0373, 0.0005: 0.0132}
TOKENS, SINGLE = 32, 8
D, V = 576, 49152


def measure(target: float, device: torch.device) -> list[dict]:
    """One row a provider at a divergence of about `target` nats."""
    inputs = tensors(TOKENS, D, V, device, NOISE[target])
    double = tuple(x.double() for x in inputs)
    definitions = (plain_loss, plain_mixture)
    exact = {loss: gradients(loss, double) for loss in definitions}
    with torch.no_grad():
        divergences = {
            loss: [loss(*token(double, i)).item() for i in range(SINGLE)] for loss in definitions
        }
    rows = []
    for name, make in PROVIDERS.items():
        try:
            loss = make(device)
        except Unavailable as reason:
            print(f"{name}: {reason}")
            continue
        mathematical = definition(name)
        error = gradient_error(gradients(loss, inputs), exact[mathematical])
        ratios = [
            gradients(loss, token(inputs, i))[0].item() / value
            for i, value in enumerate(divergences[mathematical])
        ]
        rows.append(
            {
                "provider": name,
                "kl": float(f"{exact[plain_loss][0].item():.2g}"),
                "gradient_error": float(f"{error:.2g}"),
                "kl_error": float(f"{max(abs(r - 1) for r in ratios):.2g}"),
                "kl_lowest": float(f"{min(ratios):.3g}"),
            }
        )
    return rows


def token(inputs: tuple, i: int) -> tuple:
    h_s, w_s, h_t, w_t = inputs
    return h_s[i : i + 1], w_s, h_t[i : i + 1], w_t


def table(rows: list[dict]) -> str:
    """Markdown: providers down, divergences across; gradient error / worst single KL error."""
    columns = list(dict.fromkeys(row["kl"] for row in rows))
    lines = ["| | " + " | ".join(f"KL {kl:g}" for kl in columns) + " |", "|---" * 5 + "|"]
    for name in dict.fromkeys(row["provider"] for row in rows):
        cells = [
            f"{percent(row['gradient_error'])} / {percent(row['kl_error'])}"
            + (" (negative)" if row["kl_lowest"] < 0 else "")
            for row in rows
            if row["provider"] == name
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def percent(x: float) -> str:
    return f"{x:.2%}" if x < 0.1 else f"{x:.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the rows")
    file = parser.parse_args().json
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [row for target in NOISE for row in measure(target, device)]
    print(table(rows))
    if file is not None:
        facts = {"question": "accuracy", "D": D, "V": V, "dtype": "bfloat16"}
        shared = {**origin(), **facts}
        write(({**shared, **row} for row in rows), file)


if __name__ == "__main__":
    main()
