"""What is said of an adapter."""

from peft import LoraConfig, get_peft_model

from opcd.models.adapter import lora_coverage
from tests.conftest import tiny_llama
from tests.opcd.test_teacher import tiny_moe


def test_linear_layers_and_what_is_left() -> None:
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    # Of 35,072 weights 18,432 are linear layers, 8,256 each are the embeddings and the head.
    assert lora_coverage(get_peft_model(tiny_llama(), lora)) == (
        "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj: 53% of the weights; not on "
        "embed_tokens (24%), lm_head (24%)"
    )


def test_experts_are_named_as_what_they_are() -> None:
    everywhere = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    assert (
        "gate_up_proj" in lora_coverage(get_peft_model(tiny_moe(), everywhere)).split("not on")[0]
    )
    attention = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    assert (
        "gate_up_proj (" in lora_coverage(get_peft_model(tiny_moe(), attention)).split("not on")[1]
    )
