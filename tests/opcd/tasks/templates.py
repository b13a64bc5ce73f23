"""Chat templates in the manner of the families that people use, written for these tests.

Each does what its family's template does to a request, a context and an answer: default system
messages, dates, refused or moved system roles, reasoning, closed conversations.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


class Family(NamedTuple):
    """A template, its special tokens, and what it makes of "Be brief." and "Why?" on 1 May 2026."""

    template: str
    special: tuple[str, ...]
    eos: str
    ends: str  # the token behind an answer
    alone: str
    system: str | None  # with the context as a system message; None: refused
    user: str  # with the context in front of the user message
    arguments: Mapping[str, Any] = MappingProxyType({})


def tokenizer_of(family: Family) -> PreTrainedTokenizerFast:
    """Bytes as tokens, and the family's special tokens."""
    return byte_tokenizer(family.template, family.special, family.eos)


def byte_tokenizer(
    template: str, special: Sequence[str], eos: str, prefix_space: bool = False
) -> PreTrainedTokenizerFast:
    """Bytes as tokens, and special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=eos)
    tokenizer.chat_template = template
    return tokenizer


CHATML_TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

FAMILIES = {
    "Qwen2.5": Family(
        template=(
            "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helper.<|im_end|>\n"
            "{% endif %}" + CHATML_TURNS
        ),
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>",
        ends="<|im_end|>",
        alone=(
            "<|im_start|>system\nYou are a helper.<|im_end|>\n"
            "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
        ),
        system=(
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
        ),
        user=(
            "<|im_start|>system\nYou are a helper.<|im_end|>\n"
            "<|im_start|>user\nBe brief.\n\nWhy?<|im_end|>\n<|im_start|>assistant\n"
        ),
    ),
    "Qwen3, without thinking": Family(
        template=(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n"
            "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}"
            "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
            "{% if enable_thinking is defined and enable_thinking is false %}"
            "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
        ),
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>",
        ends="<|im_end|>",
        alone="<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        system=(
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\n"
        ),
        user=(
            "<|im_start|>user\nBe brief.\n\nWhy?<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\n"
        ),
        arguments={"enable_thinking": False},
    ),
    "Llama 3.x": Family(
        template=(
            "{% set day = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}"
            "{% if messages[0].role == 'system' %}{% set said = messages[0].content | trim %}"
            "{% set messages = messages[1:] %}{% else %}{% set said = '' %}{% endif %}"
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
            "Cutting Knowledge Date: December 2023\nToday Date: {{ day }}\n\n{{ said }}<|eot_id|>"
            "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
            "{{ m.content | trim }}<|eot_id|>{% endfor %}"
            "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
            "{% endif %}"
        ),
        special=(
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ),
        eos="<|end_of_text|>",
        ends="<|eot_id|>",
        alone=(
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
            "Cutting Knowledge Date: December 2023\nToday Date: 01 May 2026\n\n<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        system=(
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
            "Cutting Knowledge Date: December 2023\nToday Date: 01 May 2026\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        user=(
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
            "Cutting Knowledge Date: December 2023\nToday Date: 01 May 2026\n\n<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nBe brief.\n\nWhy?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
    ),
    "Gemma 1 and 2": Family(
        template=(
            "<bos>{% if messages[0].role == 'system' %}"
            "{{ raise_exception('System role not supported') }}{% endif %}"
            "{% for m in messages %}"
            "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
            "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
            "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
            "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
        ),
        special=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        eos="<eos>",
        ends="<end_of_turn>",
        alone="<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
        system=None,
        user="<bos><start_of_turn>user\nBe brief.\n\nWhy?<end_of_turn>\n<start_of_turn>model\n",
    ),
    "Gemma 3": Family(
        template=(
            "<bos>{% if messages[0].role == 'system' %}"
            "{% set first = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}"
            "{% else %}{% set first = '' %}{% endif %}{% for m in messages %}"
            "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
            "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
            "{{ first if loop.first }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
            "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
        ),
        special=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        eos="<eos>",
        ends="<end_of_turn>",
        alone="<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
        system="<bos><start_of_turn>user\nBe brief.\n\nWhy?<end_of_turn>\n<start_of_turn>model\n",
        user="<bos><start_of_turn>user\nBe brief.\n\nWhy?<end_of_turn>\n<start_of_turn>model\n",
    ),
    "Mistral v0.1": Family(
        template=(
            "<s>{% for m in messages %}"
            "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}"
            "{% endif %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
            "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
        ),
        special=("<s>", "</s>"),
        eos="</s>",
        ends="</s>",
        alone="<s>[INST] Why? [/INST]",
        system=None,
        user="<s>[INST] Be brief.\n\nWhy? [/INST]",
    ),
    "Mistral v0.3": Family(
        template=(
            "{% if messages[0].role == 'system' %}{% set said = messages[0].content + '\n\n' %}"
            "{% set messages = messages[1:] %}{% else %}{% set said = '' %}{% endif %}<s>"
            "{% for m in messages %}{% if m.role == 'user' %}[INST]"
            "{{ ' ' + said if loop.last and said else ' ' }}{{ m.content }}[/INST]"
            "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
        ),
        special=("<s>", "</s>", "[INST]", "[/INST]"),
        eos="</s>",
        ends="</s>",
        alone="<s>[INST] Why?[/INST]",
        system="<s>[INST] Be brief.\n\nWhy?[/INST]",
        user="<s>[INST] Be brief.\n\nWhy?[/INST]",
    ),
    "Mistral Small 3": Family(
        template=(
            "{% set default = 'You are Small. Today is ' + strftime_now('%Y-%m-%d') + '.' %}<s>"
            "{% if messages[0].role == 'system' %}{% set said = messages[0].content %}"
            "{% set messages = messages[1:] %}{% else %}{% set said = default %}{% endif %}"
            "[SYSTEM_PROMPT]{{ said }}[/SYSTEM_PROMPT]{% for m in messages %}"
            "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
            "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
        ),
        special=("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        eos="</s>",
        ends="</s>",
        alone=(
            "<s>[SYSTEM_PROMPT]You are Small. Today is 2026-05-01.[/SYSTEM_PROMPT][INST]Why?[/INST]"
        ),
        system="<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Why?[/INST]",
        user=(
            "<s>[SYSTEM_PROMPT]You are Small. Today is 2026-05-01.[/SYSTEM_PROMPT]"
            "[INST]Be brief.\n\nWhy?[/INST]"
        ),
    ),
    "Phi-3": Family(
        template=(
            "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
        ),
        special=("<|endoftext|>", "<|assistant|>", "<|system|>", "<|user|>", "<|end|>"),
        eos="<|endoftext|>",
        ends="<|end|>",
        alone="<|user|>\nWhy?<|end|>\n<|assistant|>\n",
        system="<|system|>\nBe brief.<|end|>\n<|user|>\nWhy?<|end|>\n<|assistant|>\n",
        user="<|user|>\nBe brief.\n\nWhy?<|end|>\n<|assistant|>\n",
    ),
    "Phi-4-mini": Family(
        template=(
            "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% else %}<|endoftext|>{% endif %}"
        ),
        special=("<|endoftext|>", "<|assistant|>", "<|system|>", "<|user|>", "<|end|>"),
        eos="<|endoftext|>",
        ends="<|end|>",
        alone="<|user|>Why?<|end|><|assistant|>",
        system="<|system|>Be brief.<|end|><|user|>Why?<|end|><|assistant|>",
        user="<|user|>Be brief.\n\nWhy?<|end|><|assistant|>",
    ),
    "SmolLM3": Family(
        template=(
            "{% if messages[0].role == 'system' %}{% set said = messages[0].content %}"
            "{% set messages = messages[1:] %}{% else %}{% set said = 'You are Smol.' %}{% endif %}"
            "<|im_start|>system\n## Metadata\n\nToday Date: {{ strftime_now('%d %B %Y') }}\n"
            "Reasoning Mode: /no_think\n\n## Custom Instructions\n\n{{ said }}<|im_end|>\n"
            + CHATML_TURNS
        ),
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>",
        ends="<|im_end|>",
        alone=(
            "<|im_start|>system\n## Metadata\n\nToday Date: 01 May 2026\n"
            "Reasoning Mode: /no_think\n\n## Custom Instructions\n\nYou are Smol.<|im_end|>\n"
            "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
        ),
        system=(
            "<|im_start|>system\n## Metadata\n\nToday Date: 01 May 2026\n"
            "Reasoning Mode: /no_think\n\n## Custom Instructions\n\nBe brief.<|im_end|>\n"
            "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
        ),
        user=(
            "<|im_start|>system\n## Metadata\n\nToday Date: 01 May 2026\n"
            "Reasoning Mode: /no_think\n\n## Custom Instructions\n\nYou are Smol.<|im_end|>\n"
            "<|im_start|>user\nBe brief.\n\nWhy?<|im_end|>\n<|im_start|>assistant\n"
        ),
    ),
    "gpt-oss": Family(
        template=(
            "<|start|>system<|message|>You are a large model.\nCurrent date: "
            "{{ strftime_now('%Y-%m-%d') }}<|end|>{% for m in messages %}"
            "{% if m.role == 'system' %}<|start|>developer<|message|># Instructions\n\n"
            "{{ m.content }}<|end|>{% elif m.role == 'assistant' %}"
            "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
            "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
            "{% else %}<|start|>user<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
        ),
        special=("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"),
        eos="<|return|>",
        ends="<|return|>",
        alone=(
            "<|start|>system<|message|>You are a large model.\nCurrent date: 2026-05-01<|end|>"
            "<|start|>user<|message|>Why?<|end|><|start|>assistant"
        ),
        system=(
            "<|start|>system<|message|>You are a large model.\nCurrent date: 2026-05-01<|end|>"
            "<|start|>developer<|message|># Instructions\n\nBe brief.<|end|>"
            "<|start|>user<|message|>Why?<|end|><|start|>assistant"
        ),
        user=(
            "<|start|>system<|message|>You are a large model.\nCurrent date: 2026-05-01<|end|>"
            "<|start|>user<|message|>Be brief.\n\nWhy?<|end|><|start|>assistant"
        ),
    ),
    "Granite": Family(
        template=(
            "{% if messages[0].role == 'system' %}{% set said = messages[0].content %}"
            "{% set messages = messages[1:] %}{% else %}"
            "{% set said = 'Knowledge Cutoff Date: April 2024.\nToday\\'s Date: ' + "
            "strftime_now('%B %d, %Y') + '.\nYou are Granite.' %}{% endif %}"
            "<|start_of_role|>system<|end_of_role|>{{ said }}<|end_of_text|>\n"
            "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}"
            "<|end_of_text|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
        ),
        special=("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
        eos="<|end_of_text|>",
        ends="<|end_of_text|>",
        alone=(
            "<|start_of_role|>system<|end_of_role|>Knowledge Cutoff Date: April 2024.\n"
            "Today's Date: May 01, 2026.\nYou are Granite.<|end_of_text|>\n"
            "<|start_of_role|>user<|end_of_role|>Why?<|end_of_text|>\n"
            "<|start_of_role|>assistant<|end_of_role|>"
        ),
        system=(
            "<|start_of_role|>system<|end_of_role|>Be brief.<|end_of_text|>\n"
            "<|start_of_role|>user<|end_of_role|>Why?<|end_of_text|>\n"
            "<|start_of_role|>assistant<|end_of_role|>"
        ),
        user=(
            "<|start_of_role|>system<|end_of_role|>Knowledge Cutoff Date: April 2024.\n"
            "Today's Date: May 01, 2026.\nYou are Granite.<|end_of_text|>\n"
            "<|start_of_role|>user<|end_of_role|>Be brief.\n\nWhy?<|end_of_text|>\n"
            "<|start_of_role|>assistant<|end_of_role|>"
        ),
    ),
    "DeepSeek-R1": Family(
        template=(
            "{% if messages[0].role == 'system' %}{% set said = messages[0].content %}"
            "{% set messages = messages[1:] %}{% else %}{% set said = '' %}{% endif %}"
            "<｜begin｜>{{ said }}"
            "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% else %}"
            "<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end｜>{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
        ),
        special=("<｜begin｜>", "<｜end｜>", "<｜User｜>", "<｜Assistant｜>"),
        eos="<｜end｜>",
        ends="<｜end｜>",
        alone="<｜begin｜><｜User｜>Why?<｜Assistant｜><think>\n",
        system="<｜begin｜>Be brief.<｜User｜>Why?<｜Assistant｜><think>\n",
        user="<｜begin｜><｜User｜>Be brief.\n\nWhy?<｜Assistant｜><think>\n",
    ),
    "ChatML base model": Family(
        template=CHATML_TURNS,
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        eos="<|endoftext|>",
        ends="<|im_end|>",
        alone="<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        system=(
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
        ),
        user="<|im_start|>user\nBe brief.\n\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    ),
}
