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


def tokenizer_of(family: "Family | ToolFamily") -> PreTrainedTokenizerFast:
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


class ToolFamily(NamedTuple):
    """A template that knows tools, and what it makes of two requests behind tools.

    `asked` is the question behind what a tool gave (messages RAIN of the tests), `result` the same
    cut off at the result: for the student (no context, no tools) and for the teacher ("Be brief."
    and a tool), as a conversation is rendered for an answer.
    """

    template: str
    special: tuple[str, ...]
    eos: str
    asked_alone: str
    asked_prompted: str
    result_alone: str
    result_prompted: str
    call: str  # the assistant's turn that calls, up to what ends it
    shared: str  # what all prompts behind the context begin with
    placement: str = "system"  # with which the context is kept in front of a result, too


TOOL_FAMILIES = {
    "Qwen2.5": ToolFamily(  # as Hermes has them: in the system message, calls between marks
        template=(
            "{% set said = messages[0].content if messages[0].role == 'system' else "
            "'You are a helper.' %}<|im_start|>system\n{{ said }}"
            "{% if tools %}{{ '\n\n# Tools\n<tools>' }}{% for tool in tools %}"
            "{{ '\n' }}{{ tool | tojson }}{% endfor %}{{ '\n</tools>' }}{% endif %}<|im_end|>\n"
            "{% for m in messages %}"
            "{% if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}"
            "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
            "{% elif m.role == 'assistant' %}<|im_start|>assistant"
            "{% if m.content %}{{ '\n' + m.content }}{% endif %}"
            '{% for call in m.tool_calls %}{{ \'\n<tool_call>\n{"name": "\' }}'
            '{{ call.function.name }}{{ \'", "arguments": \' }}'
            "{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}"
            "<|im_end|>\n"
            "{% elif m.role == 'tool' %}"
            "{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
            "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
            "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
            "{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>",
        asked_alone=(
            "<|im_start|>system\nYou are a helper.<|im_end|>\n"
            "<|im_start|>user\nRain in Bonn?<|im_end|>\n"
            "<|im_start|>assistant\n<tool_call>\n"
            '{"name": "weather", "arguments": {"city": "Bonn", "days": 2}}\n'
            "</tool_call><|im_end|>\n"
            '<|im_start|>user\n<tool_response>\n{"rain": true}\n</tool_response><|im_end|>\n'
            "<|im_start|>assistant\nYes.<|im_end|>\n"
            "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
        ),
        asked_prompted=(
            "<|im_start|>system\nBe brief.\n\n# Tools\n<tools>\n"
            '{"type": "function", "function": {"name": "weather", "description": "Of a city.", '
            '"parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}\n'
            "</tools><|im_end|>\n"
            "<|im_start|>user\nRain in Bonn?<|im_end|>\n"
            "<|im_start|>assistant\n<tool_call>\n"
            '{"name": "weather", "arguments": {"city": "Bonn", "days": 2}}\n'
            "</tool_call><|im_end|>\n"
            '<|im_start|>user\n<tool_response>\n{"rain": true}\n</tool_response><|im_end|>\n'
            "<|im_start|>assistant\nYes.<|im_end|>\n"
            "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
        ),
        result_alone=(
            "<|im_start|>system\nYou are a helper.<|im_end|>\n"
            "<|im_start|>user\nRain in Bonn?<|im_end|>\n"
            "<|im_start|>assistant\n<tool_call>\n"
            '{"name": "weather", "arguments": {"city": "Bonn", "days": 2}}\n'
            "</tool_call><|im_end|>\n"
            '<|im_start|>user\n<tool_response>\n{"rain": true}\n</tool_response><|im_end|>\n'
            "<|im_start|>assistant\n"
        ),
        result_prompted=(
            "<|im_start|>system\nBe brief.\n\n# Tools\n<tools>\n"
            '{"type": "function", "function": {"name": "weather", "description": "Of a city.", '
            '"parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}\n'
            "</tools><|im_end|>\n"
            "<|im_start|>user\nRain in Bonn?<|im_end|>\n"
            "<|im_start|>assistant\n<tool_call>\n"
            '{"name": "weather", "arguments": {"city": "Bonn", "days": 2}}\n'
            "</tool_call><|im_end|>\n"
            '<|im_start|>user\n<tool_response>\n{"rain": true}\n</tool_response><|im_end|>\n'
            "<|im_start|>assistant\n"
        ),
        call=(
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn", "days": 2}}\n'
            "</tool_call><|im_end|>"
        ),
        shared=(
            "<|im_start|>system\nBe brief.\n\n# Tools\n<tools>\n"
            '{"type": "function", "function": {"name": "weather", "description": "Of a city.", '
            '"parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}\n'
            "</tools><|im_end|>\n<|im_start|>user\n"
        ),
    ),
    "Llama 3.1": ToolFamily(  # in the first user message; one call a turn, and no text beside it
        template=(
            "<|begin_of_text|>{% if messages[0].role == 'system' %}"
            "{% set said = messages[0].content | trim %}{% set messages = messages[1:] %}"
            "{% else %}{% set said = '' %}{% endif %}"
            "<|start_header_id|>system<|end_header_id|>\n\n"
            "{% if tools %}{{ 'Environment: ipython\n' }}{% endif %}{{ said }}<|eot_id|>"
            "{% if tools %}<|start_header_id|>user<|end_header_id|>\n\n"
            "Respond with JSON for a call.\n\n"
            "{% for tool in tools %}{{ tool | tojson(indent=4) }}{{ '\n\n' }}{% endfor %}"
            "{{ messages[0].content | trim }}<|eot_id|>{% set messages = messages[1:] %}{% endif %}"
            "{% for m in messages %}{% if 'tool_calls' in m %}"
            "{% if m.tool_calls | length != 1 %}{{ raise_exception('single tool-calls only') }}"
            "{% endif %}{% set call = m.tool_calls[0].function %}"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
            '{{ \'{"name": "\' + call.name + \'", "parameters": \' }}'
            "{{ call.arguments | tojson }}{{ '}' }}<|eot_id|>"
            "{% elif m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n"
            "{{ m.content | tojson if m.content is iterable else m.content }}<|eot_id|>"
            "{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
            "{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
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
        asked_alone=(
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nRain in Bonn?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
            '{"name": "weather", "parameters": {"city": "Bonn", "days": 2}}<|eot_id|>'
            '<|start_header_id|>ipython<|end_header_id|>\n\n"{\\"rain\\": true}"<|eot_id|>'
            "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        asked_prompted=(
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
            "Environment: ipython\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nRespond with JSON for a call.\n\n"
            '{\n    "type": "function",\n    "function": {\n        "name": "weather",\n'
            '        "description": "Of a city.",\n        "parameters": {\n'
            '            "type": "object",\n            "properties": {\n'
            '                "city": {\n                    "type": "string"\n'
            "                }\n            }\n        }\n    }\n}\n\n"
            "Rain in Bonn?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
            '{"name": "weather", "parameters": {"city": "Bonn", "days": 2}}<|eot_id|>'
            '<|start_header_id|>ipython<|end_header_id|>\n\n"{\\"rain\\": true}"<|eot_id|>'
            "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        result_alone=(
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nRain in Bonn?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
            '{"name": "weather", "parameters": {"city": "Bonn", "days": 2}}<|eot_id|>'
            '<|start_header_id|>ipython<|end_header_id|>\n\n"{\\"rain\\": true}"<|eot_id|>'
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        result_prompted=(
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
            "Environment: ipython\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nRespond with JSON for a call.\n\n"
            '{\n    "type": "function",\n    "function": {\n        "name": "weather",\n'
            '        "description": "Of a city.",\n        "parameters": {\n'
            '            "type": "object",\n            "properties": {\n'
            '                "city": {\n                    "type": "string"\n'
            "                }\n            }\n        }\n    }\n}\n\n"
            "Rain in Bonn?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
            '{"name": "weather", "parameters": {"city": "Bonn", "days": 2}}<|eot_id|>'
            '<|start_header_id|>ipython<|end_header_id|>\n\n"{\\"rain\\": true}"<|eot_id|>'
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        call='{"name": "weather", "parameters": {"city": "Bonn", "days": 2}}<|eot_id|>',
        shared=(
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
            "Environment: ipython\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nRespond with JSON for a call.\n\n"
            '{\n    "type": "function",\n    "function": {\n        "name": "weather",\n'
            '        "description": "Of a city.",\n        "parameters": {\n'
            '            "type": "object",\n            "properties": {\n'
            '                "city": {\n                    "type": "string"\n'
            "                }\n            }\n        }\n    }\n}\n\n"
        ),
    ),
    "Mistral v0.3": ToolFamily(  # in front of the last user message, ids of nine characters
        template=(
            "{% if messages[0].role == 'system' %}{% set said = messages[0].content + '\n\n' %}"
            "{% set messages = messages[1:] %}{% else %}{% set said = '' %}{% endif %}"
            "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}<s>"
            "{% for m in messages %}{% if m.role == 'user' %}"
            "{% if tools and m == asked[-1] %}{{ '[AVAILABLE_TOOLS] ' }}{{ tools | tojson }}"
            "{{ '[/AVAILABLE_TOOLS]' }}{% endif %}"
            "{{ '[INST] ' + (said if loop.last else '') + m.content + '[/INST]' }}"
            "{% elif m.tool_calls is defined %}{{ '[TOOL_CALLS] [' }}"
            "{% for call in m.tool_calls %}"
            "{% if call.id is not defined or call.id | length != 9 %}"
            "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}"
            "{% endif %}{{ (call.function | tojson)[:-1] + ', \"id\": \"' + call.id + '\"}' }}"
            "{% if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}]</s>"
            "{% elif m.role == 'tool' %}"
            '{{ \'[TOOL_RESULTS] {"content": \' + m.content + \', "call_id": "\' }}'
            "{{ m.tool_call_id + '\"}[/TOOL_RESULTS]' }}"
            "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
        ),
        special=(
            "<s>",
            "</s>",
            "[INST]",
            "[/INST]",
            "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]",
            "[TOOL_CALLS]",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
        ),
        eos="</s>",
        asked_alone=(
            "<s>[INST] Rain in Bonn?[/INST]"
            '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Bonn", "days": 2}, '
            '"id": "a1b2c3d4e"}]</s>'
            '[TOOL_RESULTS] {"content": {"rain": true}, "call_id": "a1b2c3d4e"}[/TOOL_RESULTS]'
            " Yes.</s>[INST] Why?[/INST]"
        ),
        asked_prompted=(
            "<s>[INST] Be brief.\n\nRain in Bonn?[/INST]"
            '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Bonn", "days": 2}, '
            '"id": "a1b2c3d4e"}]</s>'
            '[TOOL_RESULTS] {"content": {"rain": true}, "call_id": "a1b2c3d4e"}[/TOOL_RESULTS]'
            ' Yes.</s>[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "weather", '
            '"description": "Of a city.", "parameters": {"type": "object", "properties": '
            '{"city": {"type": "string"}}}}}][/AVAILABLE_TOOLS][INST] Why?[/INST]'
        ),
        result_alone=(
            "<s>[INST] Rain in Bonn?[/INST]"
            '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Bonn", "days": 2}, '
            '"id": "a1b2c3d4e"}]</s>'
            '[TOOL_RESULTS] {"content": {"rain": true}, "call_id": "a1b2c3d4e"}[/TOOL_RESULTS]'
        ),
        result_prompted=(
            '<s>[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "weather", '
            '"description": "Of a city.", "parameters": {"type": "object", "properties": '
            '{"city": {"type": "string"}}}}}][/AVAILABLE_TOOLS]'
            "[INST] Be brief.\n\nRain in Bonn?[/INST]"
            '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Bonn", "days": 2}, '
            '"id": "a1b2c3d4e"}]</s>'
            '[TOOL_RESULTS] {"content": {"rain": true}, "call_id": "a1b2c3d4e"}[/TOOL_RESULTS]'
        ),
        call=(
            '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Bonn", "days": 2}, '
            '"id": "a1b2c3d4e"}]</s>'
        ),
        shared="<s>",
        placement="user",
    ),
    "DeepSeek V3.1": ToolFamily(  # as text behind the system message; marks around each call
        template=(
            "{% set ns = namespace(said='', asked=false) %}"
            "{% if messages[0].role == 'system' %}{% set ns.said = messages[0].content %}"
            "{% set messages = messages[1:] %}{% endif %}"
            "{% if tools %}{% set ns.said = ns.said + '\n\n## Tools\n' %}{% for tool in tools %}"
            "{% set ns.said = ns.said + '\n### ' + tool.function.name + '\nDescription: ' "
            "+ tool.function.description + '\n\nParameters: ' "
            "+ tool.function.parameters | tojson + '\n' %}{% endfor %}{% endif %}"
            "<｜begin｜>{{ ns.said }}{% for m in messages %}"
            "{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% set ns.asked = true %}"
            "{% elif m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}"
            "<｜tool▁output▁end｜>{% set ns.asked = false %}"
            "{% else %}{% if ns.asked %}<｜Assistant｜></think>{% endif %}{{ m.content }}"
            "{% if m.tool_calls %}<｜tool▁calls▁begin｜>{% for call in m.tool_calls %}"
            "<｜tool▁call▁begin｜>{{ call.function.name }}<｜tool▁sep｜>"
            "{{ call.function.arguments | tojson }}<｜tool▁call▁end｜>{% endfor %}"
            "<｜tool▁calls▁end｜>{% endif %}<｜end｜>{% set ns.asked = false %}"
            "{% endif %}{% endfor %}"
            "{% if add_generation_prompt and ns.asked %}<｜Assistant｜></think>{% endif %}"
        ),
        special=("<｜begin｜>", "<｜end｜>", "<｜User｜>", "<｜Assistant｜>"),
        eos="<｜end｜>",
        asked_alone=(
            "<｜begin｜><｜User｜>Rain in Bonn?<｜Assistant｜></think>"
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
            '{"city": "Bonn", "days": 2}<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end｜>'
            '<｜tool▁output▁begin｜>{"rain": true}<｜tool▁output▁end｜>Yes.<｜end｜>'
            "<｜User｜>Why?<｜Assistant｜></think>"
        ),
        asked_prompted=(
            "<｜begin｜>Be brief.\n\n## Tools\n\n### weather\nDescription: Of a city.\n\n"
            'Parameters: {"type": "object", "properties": {"city": {"type": "string"}}}\n'
            "<｜User｜>Rain in Bonn?<｜Assistant｜></think>"
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
            '{"city": "Bonn", "days": 2}<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end｜>'
            '<｜tool▁output▁begin｜>{"rain": true}<｜tool▁output▁end｜>Yes.<｜end｜>'
            "<｜User｜>Why?<｜Assistant｜></think>"
        ),
        result_alone=(
            "<｜begin｜><｜User｜>Rain in Bonn?<｜Assistant｜></think>"
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
            '{"city": "Bonn", "days": 2}<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end｜>'
            '<｜tool▁output▁begin｜>{"rain": true}<｜tool▁output▁end｜>'
        ),
        result_prompted=(
            "<｜begin｜>Be brief.\n\n## Tools\n\n### weather\nDescription: Of a city.\n\n"
            'Parameters: {"type": "object", "properties": {"city": {"type": "string"}}}\n'
            "<｜User｜>Rain in Bonn?<｜Assistant｜></think>"
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
            '{"city": "Bonn", "days": 2}<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end｜>'
            '<｜tool▁output▁begin｜>{"rain": true}<｜tool▁output▁end｜>'
        ),
        call=(
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
            '{"city": "Bonn", "days": 2}<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end｜>'
        ),
        shared=(
            "<｜begin｜>Be brief.\n\n## Tools\n\n### weather\nDescription: Of a city.\n\n"
            'Parameters: {"type": "object", "properties": {"city": {"type": "string"}}}\n'
            "<｜User｜>"
        ),
    ),
}
