"""The chat formats: each one's Jinja text, its end token, and where its authors define it."""

from __future__ import annotations

from dataclasses import replace

from colab_qlora.data.alpaca import PROMPT_WITHOUT_INPUT
from colab_qlora.data.template_parts import NAMED_ROLES, ChatFormat


def _role_headed(before: str, behind: str, after_turn: str = "", content: str = "") -> str:
    """The text of a format in which each turn stands below its role's name."""
    return (
        "{%- for turn in chat.turns -%}\n"
        f"{{{{- '{before}' + turn['role'] + '{behind}' -}}}}\n"
        f"{{{{- turn['content']{content} + turn_end + '{after_turn}' -}}}}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}\n"
        f"{{{{- '{before}assistant{behind}' -}}}}\n"
        "{%- endif -%}\n"
    )


_CHATML = _role_headed("<|im_start|>", r"\n", r"\n")
_ZEPHYR = _role_headed("<|", r"|>\n", r"\n")
_PHI_4 = _role_headed("<|im_start|>", "<|im_sep|>")
_LLAMA_3 = _role_headed("<|start_header_id|>", r"<|end_header_id|>\n\n", content=" | trim")

# answers before the last question lose their reasoning; the last answer has a block even if empty
_QWEN_3 = r"""{%- set chat.last_question = chat.turns | length - 1 -%}
{%- for turn in chat.turns -%}
{%- if turn['role'] == 'user' -%}{%- set chat.last_question = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for turn in chat.turns -%}
{%- set answer = turn['content'] -%}
{%- set thought = turn['reasoning_content'] if turn['reasoning_content'] is string else '' -%}
{%- if turn['role'] == 'assistant' and not thought and '</think>' in answer -%}
{%- set thought = answer.split('</think>')[0].split('<think>')[-1] -%}
{%- set answer = answer.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{{- '<|im_start|>' + turn['role'] + '\n' -}}
{%- if turn['role'] == 'assistant' and loop.index0 > chat.last_question
 and (loop.last or thought) -%}
{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + answer.lstrip('\n') -}}
{%- else -%}
{{- answer -}}
{%- endif -%}
{{- turn_end + '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- if enable_thinking is defined and not enable_thinking -%}
{{- '<think>\n\n</think>\n\n' -}}
{%- endif -%}
{%- endif -%}
"""

# the date is fixed, as in the authors' text, so that a row looks the same on every day
_LLAMA_31 = (
    r"""{{- '<|start_header_id|>system<|end_header_id|>\n\n' -}}
{{- 'Cutting Knowledge Date: December 2023\n' -}}
{{- 'Today Date: ' + (date_string | default('26 Jul 2024')) + '\n\n' -}}
{{- chat.system | trim + turn_end -}}
"""
    + _LLAMA_3
)

_MISTRAL = r"""{%- for turn in chat.turns -%}
{%- if turn['role'] == 'user' -%}
{{- '[INST] ' -}}
{%- if loop.first and chat.system -%}{{- chat.system + '\n\n' -}}{%- endif -%}
{{- turn['content'] + '[/INST]' -}}
{%- else -%}
{{- ' ' + turn['content'] | trim + turn_end -}}
{%- endif -%}
{%- endfor -%}
"""

_VICUNA = r"""{%- if chat.system -%}{{- chat.system + ' ' -}}{%- endif -%}
{%- for turn in chat.turns -%}
{%- if turn['role'] == 'user' -%}
{{- 'USER: ' + turn['content'] + ' ' -}}
{%- else -%}
{{- 'ASSISTANT: ' + turn['content'] + turn_end -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""

_ALPACA = r"""{%- if chat.system -%}{{- chat.system + '\n\n' -}}{%- endif -%}
{%- for turn in chat.turns -%}
{%- if turn['role'] == 'user' -%}
{{- '### Instruction:\n' + turn['content'] + '\n\n' -}}
{%- else -%}
{{- '### Response:\n' + turn['content'] + turn_end -}}
{%- if not loop.last -%}{{- '\n\n' -}}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Response:\n' -}}{%- endif -%}
"""

# a finished text ends with eos behind its last turn, unless the turn has ended with it already
_PHI_3 = r"""{%- for turn in chat.turns -%}
{%- if turn['content'] or turn['role'] != 'system' -%}
{{- '<|' + turn['role'] + '|>\n' + turn['content'] + turn_end + '\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>\n' -}}
{%- elif eos_token is defined and eos_token != turn_end -%}
{{- eos_token -}}
{%- endif -%}
"""

_GEMMA = r"""{%- for turn in chat.turns -%}
{{- '<start_of_turn>' + ('model' if turn['role'] == 'assistant' else 'user') + '\n' -}}
{%- if loop.first and chat.system -%}{{- chat.system + '\n\n' -}}{%- endif -%}
{{- turn['content'] | trim + turn_end + '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}
"""

_HUB = "https://huggingface.co/"
_CONFIG = "/blob/main/tokenizer_config.json"
_GITHUB = "https://github.com/"

_CHATML_FORMAT = ChatFormat(
    "chatml",
    _CHATML,
    turn_end="<|im_end|>",
    eos_token="<|im_end|>",
    source=_GITHUB + "openai/openai-python/blob/v0.28.1/chatml.md",
    markers=("<|im_start|>",),
    roles=(),
)
_LLAMA_3_FORMAT = ChatFormat(
    "llama-3",
    _LLAMA_3,
    turn_end="<|eot_id|>",
    eos_token="<|eot_id|>",
    source=_GITHUB + "meta-llama/llama-models/blob/main/models/llama3/chat_format.py",
    aliases=("llama3",),
    markers=("<|start_header_id|>", "<|end_header_id|>"),
    writes_bos=True,
    roles=(),
)
_GEMMA_FORMAT = ChatFormat(
    "gemma",
    _GEMMA,
    turn_end="<end_of_turn>",
    eos_token="<eos>",
    source="https://ai.google.dev/gemma/docs/core/prompt-structure",
    markers=("<start_of_turn>",),
    writes_bos=True,
    alternates=True,
    has_system=False,
)

FORMATS = (
    _CHATML_FORMAT,
    _LLAMA_3_FORMAT,
    replace(
        _LLAMA_3_FORMAT,
        name="llama-3.1",
        turns=_LLAMA_31,
        source=_HUB + "meta-llama/Llama-3.1-8B-Instruct" + _CONFIG,
        aliases=("llama-3.2", "llama-3.3"),
        has_system=False,
        roles=NAMED_ROLES,
    ),
    replace(
        _CHATML_FORMAT,
        name="qwen-2.5",
        source=_HUB + "Qwen/Qwen2.5-7B-Instruct" + _CONFIG,
        aliases=("qwen2.5",),
        roles=NAMED_ROLES,
        default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    ),
    replace(
        _CHATML_FORMAT,
        name="qwen-3",
        turns=_QWEN_3,
        source=_HUB + "Qwen/Qwen3-8B" + _CONFIG,
        aliases=("qwen3",),
        roles=NAMED_ROLES,
    ),
    # version 3 of the format. From version 2 on its authors put a system text before the last user
    # turn, which would hide it from the earlier answers, and those are trained too.
    ChatFormat(
        "mistral",
        _MISTRAL,
        turn_end=None,
        eos_token="</s>",
        source=_GITHUB + "mistralai/mistral-common/blob/main/src/mistral_common/tokens/"
        "tokenizers/instruct.py",
        writes_bos=True,
        alternates=True,
        has_system=False,
    ),
    ChatFormat(
        "zephyr",
        _ZEPHYR,
        turn_end=None,
        eos_token="</s>",
        source=_HUB + "HuggingFaceH4/zephyr-7b-beta" + _CONFIG,
    ),
    ChatFormat(
        "vicuna",
        _VICUNA,
        turn_end="</s>",
        eos_token="</s>",
        source=_GITHUB + "lm-sys/FastChat/blob/main/docs/vicuna_weights_version.md",
        alternates=True,
        has_system=False,
        default_system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    ),
    # the authors define one turn and no line break behind "### Response:"; this package's prompt
    # has one, and a further turn repeats both headings
    ChatFormat(
        "alpaca",
        _ALPACA,
        turn_end=None,
        eos_token="</s>",
        source=_GITHUB + "tatsu-lab/stanford_alpaca/blob/main/train.py",
        alternates=True,
        has_system=False,
        default_system=PROMPT_WITHOUT_INPUT.partition("\n\n")[0],
    ),
    ChatFormat(
        "phi-3",
        _PHI_3,
        turn_end="<|end|>",
        eos_token="<|endoftext|>",
        source=_HUB + "microsoft/Phi-3.5-mini-instruct" + _CONFIG,
        aliases=("phi-3.5",),
        markers=("<|system|>", "<|user|>", "<|assistant|>"),
    ),
    ChatFormat(
        "phi-4",
        _PHI_4,
        turn_end="<|im_end|>",
        eos_token="<|im_end|>",
        source=_HUB + "microsoft/phi-4" + _CONFIG,
        markers=("<|im_start|>", "<|im_sep|>"),
    ),
    _GEMMA_FORMAT,
    replace(_GEMMA_FORMAT, name="gemma-2", aliases=("gemma2",)),
    replace(
        _GEMMA_FORMAT,
        name="gemma-3",
        source=_HUB + "google/gemma-3-4b-it/blob/main/chat_template.json",
        aliases=("gemma3",),
    ),
)

BY_NAME = {name: entry for entry in FORMATS for name in (entry.name, *entry.aliases)}
