"""The kernels stand alone: no trainer, tokenizer or model library is needed to import them."""

import subprocess
import sys

import pytest

BLOCK = "import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"


def run(code: str, *blocked: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked=blocked) + code],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_loss_works_with_torch_alone() -> None:
    code = (
        "import torch, opcd_kernels\n"
        "h, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)\n"
        "opcd_kernels.linear_divergence(h, w, h.detach() + 1, w).loss.backward()\n"
        "assert h.grad.abs().sum() > 0\n"
    )
    done = run(code, "triton", "transformers", "peft", "yaml", "opcd")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("missing", ["yaml", "docstring_parser", "transformers"])
def test_the_command_line_names_the_extra_it_needs(missing: str) -> None:
    code = (
        "import sys; from opcd.cli import main; sys.exit(main(["
        "'eval', '--output_dir=a', '--context=b', '--prompts=c']))"
    )
    done = run(code, missing)
    assert done.returncode == 2
    assert f"needs {missing}; install opcd-kernels with its extra [train]" in done.stderr
    assert "Traceback" not in done.stderr
