"""How many digits each provider keeps as student and teacher come close, bf16 inputs.

    python -m benchmarks.accuracy                  prints a table
    python -m benchmarks.accuracy --json FILE      and writes its rows

Exact values are computed in fp64 from the same bf16 numbers: D 576, V 49152, reverse KL of about
0.4, 0.04, 0.004 and 0.0005 nats a token (`--kl` takes some of them, `--only` some providers);
`-forward`, `-jsd` and `-mixture`, half of either KL, are other divergences of the same models. What
`plain-fp32` shows is the floor: its results are rounded to bf16, and nothing else is.
`gradient_error` is the larger relative error (2-norm) of the two gradients over 32 tokens;
`kl_error` the largest relative error of a single token's divergence over eight tokens, `kl_lowest`
the smallest divergence reported for them in multiples of the exact one: below 0 is impossible.
Without a GPU Triton's interpreter runs the Triton kernels. It truncates to bf16 where a GPU rounds
(ours round by themselves there), and Liger's own projection rounds its logits to bf16.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from benchmarks.providers import (
    DIVERGENCES,
    PROVIDERS,
    Provider,
    Unavailable,
    exact_gradients,
    gradient_error,
    gradients,
    tensors,
)
from benchmarks.rows import origin, write

NOISE = {0.4: 0.37, 0.04: 0.118, 0.004: 0.0373, 0.0005: 0.0132}
TOKENS, SINGLE = 32, 8
D, V = 576, 49152
# The label of a row, who computes it, and what.
CASES = [(name, name, "reverse_kl") for name in PROVIDERS] + [
    (f"{name}-{kind.removesuffix('_kl')}", name, kind)
    for name in ("ours-triton", "ours-torch")
    for kind in DIVERGENCES
    if kind != "reverse_kl"
]


def measured(
    target: float, device: torch.device, only: Sequence[str]
) -> Iterator[tuple[str, dict | None]]:
    """A row for each case, of those asked for, at about `target` nats; None of one that failed."""
    inputs = tensors(TOKENS, D, V, device, NOISE[target])
    exact = {kind: exact_gradients(inputs, kind) for kind in DIVERGENCES}
    divergences = {
        kind: [exact_gradients(token(inputs, i), kind, True)[0].item() for i in range(SINGLE)]
        for kind in DIVERGENCES
    }
    for label, name, kind in CASES:
        if label not in only:
            continue
        try:
            provider = PROVIDERS[name](device, kind)
            error, ratios = errors(provider, inputs, exact[kind], divergences[kind])
        except Unavailable as reason:
            print(f"{label}: {reason}")
            continue
        except Exception:  # of a provider's code, or a kernel: the others' rows stay
            print(f"{label} failed:")
            traceback.print_exc()
            yield label, None
            continue
        yield (
            label,
            {
                "provider": label,
                "kl": float(f"{exact['reverse_kl'][0].item():.2g}"),
                "gradient_error": float(f"{error:.2g}"),
                "kl_error": float(f"{max(abs(r - 1) for r in ratios):.2g}"),
                "kl_lowest": float(f"{min(ratios):.3g}"),
            },
        )


def errors(
    provider: Provider, inputs: tuple, exact: list[torch.Tensor], divergences: list[float]
) -> tuple[float, list[float]]:
    """The gradient's error over all tokens; single tokens' divergences over the exact ones."""
    error = gradient_error(gradients(provider, inputs), exact)
    singles = (gradients(provider, token(inputs, i))[0].item() for i in range(SINGLE))
    return error, [found / value for found, value in zip(singles, divergences, strict=True)]


def token(inputs: tuple, i: int) -> tuple:
    h_s, w_s, h_t, w_t = inputs
    return h_s[i : i + 1], w_s, h_t[i : i + 1], w_t


def table(rows: list[dict]) -> str:
    """Markdown: providers down, divergences across; gradient error / worst single KL error."""
    columns = list(dict.fromkeys(row["kl"] for row in rows))
    lines = [
        "| | " + " | ".join(f"KL {kl:g}" for kl in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
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
    parser.add_argument("--kl", type=float, nargs="+", choices=NOISE, default=list(NOISE))
    labels = [label for label, *_ in CASES]
    parser.add_argument("--only", nargs="+", choices=labels, default=labels, metavar="PROVIDER")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shared = {**origin(), "question": "accuracy", "D": D, "V": V, "dtype": "bfloat16"}
    rows: list[dict] = []
    failed: list[str] = []
    for target in args.kl:
        for label, row in measured(target, device, args.only):
            if row is None:
                failed.append(label)
                continue
            rows.append(row)
            if args.json is not None:  # anew each time: whoever stops it keeps what is there
                write(({**shared, **row} for row in rows), args.json)
    print(table(rows))
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
