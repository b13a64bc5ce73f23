"""What a configuration becomes."""

import torch
from peft import get_peft_model_state_dict

from opcd.config import TrainConfig
from opcd.tasks.prepare import prepare
from opcd.training.build import build_distiller


def test_an_adapter_begins_as_its_seed_says(settings: dict) -> None:
    """Whatever was drawn before; the other factor is 0, so that the first step has the base."""

    def begun(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(1)
        setup = prepare(TrainConfig(**settings, lora_rank=4, seed=seed))
        return get_peft_model_state_dict(build_distiller(setup).student)

    first, again, other = begun(3), begun(3), begun(4)
    assert len(first) == 2 * 7 * 2  # factors, linear layers of a block, blocks
    for name, weight in first.items():
        assert torch.equal(again[name], weight), name
        if "lora_A" in name:
            assert not torch.equal(other[name], weight), name
        else:
            assert not weight.any(), name
