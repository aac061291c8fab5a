from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from colab_qlora.data.response_markers import TurnMarkers, choose_markers, find_markers

CHATML_WITH_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# the last answer gets an empty thought, the earlier ones lose theirs
CHATML_WITH_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>"
    "\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "<bos>{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# the system prompt stands in the first instruction
MISTRAL = (
    "<s>{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set ns.system = m['content'] + '\n\n' %}"
    "{% elif m['role'] == 'user' %}[INST] {{ ns.system + m['content'] }} [/INST]"
    "{% set ns.system = '' %}{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }} </s>"
    "{% else %}{{ raise_exception('no system role') }}{% endif %}{% endfor %}"
)
PHI_3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
)
PHI_4 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}<|im_sep|>{{ m['content'] }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
ALPACA = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\n\n' }}"
    "{% elif m['role'] == 'user' %}### Instruction:\n{{ m['content'] }}\n\n"
    "{% else %}### Response:\n{{ m['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
STYLES = {
    "chatml": (
        CHATML_WITH_DEFAULT,
        TurnMarkers("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>", True),
    ),
    "chatml, thoughts": (
        CHATML_WITH_THOUGHTS,
        TurnMarkers("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>", True),
    ),
    "llama 3": (
        LLAMA_3,
        TurnMarkers(
            "<|start_header_id|>user<|end_header_id|>\n\n",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|eot_id|>",
            True,
        ),
    ),
    "gemma": (
        GEMMA,
        TurnMarkers("<start_of_turn>user\n", "<start_of_turn>model\n", "<end_of_turn>", True),
    ),
    "mistral": (MISTRAL, TurnMarkers("[INST]", "[/INST]", "</s>")),
    "llama 2": (LLAMA_2, TurnMarkers("<s>[INST]", "[/INST]", "</s>")),
    "phi 3": (PHI_3, TurnMarkers("<|user|>\n", "<|assistant|>\n", "<|end|>", True)),
    "phi 4": (
        PHI_4,
        TurnMarkers(
            "<|im_start|>user<|im_sep|>", "<|im_start|>assistant<|im_sep|>", "<|im_end|>", True
        ),
    ),
    "alpaca": (ALPACA, TurnMarkers("### Instruction:\n", "### Response:\n")),
}


@pytest.fixture
def with_template(tokenizer: Any) -> Callable[[str | None], Any]:
    """A copy of the tokenizer with another chat template."""

    def build(template: str | None) -> Any:
        copied = copy.deepcopy(tokenizer)
        copied.chat_template = template
        return copied

    return build


@pytest.mark.parametrize("style", STYLES)
def test_markers_are_read_from_the_template(with_template, style):
    template, expected = STYLES[style]
    assert find_markers(with_template(template)) == expected


@pytest.mark.parametrize("style", STYLES)
def test_the_response_begins_where_the_prompt_for_an_answer_ends(with_template, style):
    tokenizer = with_template(STYLES[style][0])
    question = [{"role": "user", "content": "Why?"}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith(find_markers(tokenizer).response)


@pytest.mark.parametrize("style", STYLES)
def test_given_markers_of_the_template_bring_its_end_of_turn(with_template, style):
    template, expected = STYLES[style]
    tokenizer = with_template(template)
    given = expected.instruction, expected.response
    assert choose_markers(tokenizer, *given) == expected
    stripped = choose_markers(tokenizer, *(part.rstrip() for part in given))
    assert (stripped.end, stripped.ends_every_turn) == (expected.end, expected.ends_every_turn)
    # an end of turn in front is the other turn's
    ends = expected.end + "\n"
    assert choose_markers(tokenizer, ends + given[0], ends + given[1]) == expected


def test_other_markers_than_the_templates_say_nothing_of_its_end(with_template):
    tokenizer = with_template(LLAMA_3)
    chosen = choose_markers(tokenizer, "USER: ", "BOT: ")
    assert chosen == TurnMarkers("USER: ", "BOT:")
    assert choose_markers(with_template(None), "USER:\n", "BOT:\n") == TurnMarkers(
        "USER:\n", "BOT:\n"
    )
    # the end-of-sequence token is known without a template
    assert choose_markers(with_template(None), "U:", "<|im_end|>\nB:") == TurnMarkers("U:", "B:")


@pytest.mark.parametrize("call", [find_markers, choose_markers])
def test_without_a_template_both_parts_are_asked_for(with_template, refused, call):
    message = refused(call, with_template(None))
    assert "chat_template is None" in message
    assert r"instruction_part='<|im_start|>user\n'" in message
    assert r"response_part='<|im_start|>assistant\n'" in message


@pytest.mark.parametrize(
    "template, words",
    [
        ("{{ raise_exception('not today') }}", "not today"),
        ("{% for m in messages %}{{ m['content'] | upper }} {% endfor %}", "once and in order"),
        ("{% for m in messages %}{{ m['content'] * 2 }} {% endfor %}", "once and in order"),
        ("{% for m in messages %}{{ m['content'] }} {% endfor %}", "tell a user's turn"),
        ("{% for m in messages %}> {{ m['content'] }}\n{% endfor %}", "tell a user's turn"),
        ("{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}", "tell a user's turn"),
    ],
)
def test_templates_that_do_not_tell_the_roles_are_refused(with_template, refused, template, words):
    message = refused(find_markers, with_template(template))
    assert words in message and "instruction_part=" in message


@pytest.mark.parametrize(
    "parts, words",
    [
        (("USER:", None), "belong together"),
        ((None, "BOT:"), "belong together"),
        ((3, "BOT:"), "belong together"),
        (("", "BOT:"), "not blank"),
        (("USER:", " \n"), "not blank"),
        (("X:", "X:"), "two different texts"),
    ],
)
def test_half_a_pair_of_markers_is_refused(with_template, refused, parts, words):
    assert words in refused(choose_markers, with_template(LLAMA_3), *parts)
