"""A person hears which GPU is used, and why one is not."""

from pathlib import Path

import pytest
import torch

from opcd.runtime import device
from opcd.runtime.device import in_words, unused_gpu

CPU = torch.device("cpu")


def test_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU number {device.index}")
    assert in_words(torch.device("cuda:1")) == "cuda:1 (GPU number 1)"
    assert in_words(torch.device("cpu")) == "cpu"


def test_a_gpu_that_torch_cannot_use_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(device, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert unused_gpu(CPU) is None
    (tmp_path / "version").write_text("NVRM")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert unused_gpu(CPU) == f"torch {torch.__version__} is built for CPUs"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert unused_gpu(torch.device("meta")) is None
    assert "finds none with CUDA 13.0" in str(unused_gpu(CPU))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert unused_gpu(CPU) is None


def test_a_driver_s_program_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "DRIVER", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "nvidia-smi").write_text("")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert unused_gpu(CPU) is not None
