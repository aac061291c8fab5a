"""Modelfiles: Go templates that write what the tokenizer's own chat template writes."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("transformers")
pytest.importorskip("torch")

from go_templates import render  # noqa: E402
from model_files import CHATML, byte_level  # noqa: E402

from colab_qlora.data.chat_templates import get_chat_template  # noqa: E402
from colab_qlora.data.template_texts import FORMATS  # noqa: E402
from colab_qlora.export.chat_pieces import read_pieces  # noqa: E402
from colab_qlora.export.ollama import modelfile  # noqa: E402

NAMES = [entry.name for entry in FORMATS]
TALKS = {
    "a question": ["user"],
    "a system text": ["system", "user"],
    "later": ["user", "assistant", "user"],
    "both": ["system", "user", "assistant", "user", "assistant", "user"],
}


def chat_tokenizer(name, capsys=None, adds_bos=False):
    entry = next(entry for entry in FORMATS if entry.name == name)
    tokenizer = byte_level("gpt-2")
    tokens = {*entry.markers, entry.turn_end or entry.eos_token, entry.eos_token, "<s>"}
    known = tokenizer.get_vocab()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": sorted(token for token in tokens if token not in known)}
    )
    tokenizer.bos_token, tokenizer.eos_token = "<s>", entry.eos_token
    if adds_bos:
        from tokenizers import processors

        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    return get_chat_template(tokenizer, name)


def parts_of(text):
    """(template, system, stops) of a Modelfile."""
    template = re.search(r'^TEMPLATE """(.*?)"""$', text, re.S | re.M)
    system = re.search(r'^SYSTEM """(.*?)"""$', text, re.S | re.M)
    stops = re.findall(r'^PARAMETER stop "(.*)"$', text, re.M)
    return template and template[1], system[1] if system else "", stops


def as_ollama(text, messages):
    """What Ollama puts in front of the model: SYSTEM stands in where a talk has no system text."""
    template, system, _ = parts_of(text)
    own = [message["content"] for message in messages if message["role"] == "system"]
    turns = [{"Role": m["role"], "Content": m["content"]} for m in messages]
    return render(template, {"System": own[0] if own else system, "Messages": turns})


def talk(roles):
    return [{"role": role, "content": f'{role} {n}: a "b"\n c'} for n, role in enumerate(roles)]


@pytest.mark.parametrize("roles", TALKS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_template_is_the_tokenizers_own(name, roles, adds_bos):
    tokenizer = chat_tokenizer(name, adds_bos=adds_bos)
    messages = talk(TALKS[roles])
    theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if adds_bos:
        # llama.cpp writes it
        theirs = theirs.removeprefix("<s>")
    assert as_ollama(modelfile("m.gguf", tokenizer), messages) == theirs


@pytest.mark.parametrize("name", NAMES)
def test_where_an_answer_ends(name):
    tokenizer = chat_tokenizer(name)
    text = modelfile("m.Q8_0.gguf", tokenizer)
    assert text.startswith("FROM ./m.Q8_0.gguf\n") and text.endswith("\n")
    stops = parts_of(text)[2]
    assert tokenizer.eos_token in stops and len(stops) == len(set(stops))
    entry = next(entry for entry in FORMATS if entry.name == name)
    if entry.turn_end:
        assert entry.turn_end in stops


@pytest.mark.parametrize(("name", "heading"), [("alpaca", "### Instruction:"), ("vicuna", "USER:")])
def test_a_heading_in_plain_text_stops_too(name, heading):
    assert heading in parts_of(modelfile("m.gguf", chat_tokenizer(name)))[2]


def test_the_default_system_text_can_be_changed():
    text = modelfile("m.gguf", chat_tokenizer("qwen-2.5"))
    assert parts_of(text)[1].startswith("You are Qwen")
    assert parts_of(modelfile("m.gguf", chat_tokenizer("qwen-3")))[1] == ""


def test_no_template_at_all():
    tokenizer = byte_level("gpt-2")
    tokenizer.chat_template = None
    assert modelfile("m.gguf", tokenizer) == 'FROM ./m.gguf\nPARAMETER stop "<|im_end|>"\n'


@pytest.mark.parametrize(
    "template",
    [
        # numbers its turns, looks at the words, says nothing of the user, and fails
        "{% for m in messages %}{{ loop.index }}{{ m['content'] }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] | length }}{{ m['content'] }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
        "{% for m in messages %}{% if m['role'] != 'user' %}{{ m['content'] }}{% endif %}"
        "{% endfor %}",
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ m['content'] }}{% if loop.length > 3 %}!{% endif %}{% endfor %}",
    ],
)
def test_a_template_that_cannot_be_taken_apart_is_said(template):
    tokenizer = byte_level("gpt-2")
    tokenizer.chat_template = template
    assert read_pieces(tokenizer) is None
    text = modelfile("m.gguf", tokenizer)
    assert "TEMPLATE" not in text and text.count("could not be translated") == 1


def test_a_template_without_a_place_for_a_system_text():
    tokenizer = byte_level("gpt-2")
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    )
    pieces = read_pieces(tokenizer)
    assert pieces is not None and pieces.before_system == pieces.after_system == ""
    messages = talk(["user", "assistant", "user"])
    theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert as_ollama(modelfile("m.gguf", tokenizer), messages) == theirs


def test_the_interpreter_of_these_tests_by_examples_of_gos_own_documentation():
    assert render('{{ "a  b" }} {{- " c" }} ', {}) == "a  b c "
    assert render("x\n{{- range .L }}{{ .V }},{{- end }}\ny", {"L": [{"V": 1}, {"V": 2}]}) == (
        "x1,2,\ny"
    )
    branches = '{{ if eq .R "a" }}A{{ else if .S }}S{{ else }}N{{ end }}'
    assert [render(branches, {"R": r, "S": s}) for r, s in (("a", ""), ("b", "s"), ("b", ""))] == [
        "A", "S", "N",
    ]  # fmt: skip
    first = "{{ $f := true }}{{ range .L }}{{ if $f }}<{{ $.N }}{{ end }}{{ $f = false }}.{{ end }}"
    assert render(first, {"L": [1, 2], "N": "n"}) == "<n.."
