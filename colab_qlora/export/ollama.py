"""An Ollama Modelfile: which GGUF file, how a conversation is written, where an answer ends.

Ollama does not run a tokenizer's Jinja text, but has templates of its own (Go's text/template):
https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx
"""

from __future__ import annotations

import json
from typing import Any

from colab_qlora.export.chat_pieces import ChatPieces, read_pieces


def modelfile(file: str, tokenizer: Any) -> str:
    """The text of a Modelfile.

    Args:
        file: name of the GGUF file beside it.
        tokenizer: whose chat template is translated. Of one that cannot be, a comment says so, and
            Ollama looks at the GGUF file's.
    """
    pieces = read_pieces(tokenizer)
    lines = [f"FROM ./{file}"]
    if pieces is not None:
        lines.append(f'TEMPLATE """{go_template(pieces)}"""')
        if pieces.default_system:
            lines.append(f'SYSTEM """{pieces.default_system}"""')
    elif getattr(tokenizer, "chat_template", None):
        lines.append("# the chat template could not be translated; Ollama reads the GGUF file's")
    lines += [f"PARAMETER stop {json.dumps(text)}" for text in stop_texts(tokenizer, pieces)]
    return "\n".join(lines) + "\n"


def go_template(pieces: ChatPieces) -> str:
    """The pieces as a template of Go; each text is a literal, so that no blank gets lost."""
    lines = [
        "{{- $isFirst := true }}",
        "{{- range .Messages }}",
        '{{- if eq .Role "user" }}',
        "{{- if $isFirst }}",
        *_beginning(pieces),
        *(["{{- else }}", _said(pieces.before_user)] if pieces.before_user else []),
        "{{- end }}",
        "{{- $isFirst = false }}",
        _said("", ".Content", pieces.after_user),
        '{{- else if eq .Role "assistant" }}',
        _said(pieces.before_answer, ".Content", pieces.after_answer),
        "{{- end }}",
        "{{- end }}",
        *([_said(pieces.before_new_answer)] if pieces.before_new_answer else []),
    ]
    return "\n".join(lines)


def _beginning(pieces: ChatPieces) -> list[str]:
    """Lines in front of the first user turn."""
    plain = [_said(pieces.start)] if pieces.start else []
    if not pieces.before_system and not pieces.after_system:
        return plain
    # with a default there is always a system text
    otherwise = ["{{- else }}", *plain] if plain and pieces.default_system is None else []
    headed = _said(pieces.before_system, "$.System", pieces.after_system)
    return ["{{- if $.System }}", headed, *otherwise, "{{- end }}"]


def _said(before: str, value: str = "", after: str = "") -> str:
    """One line that writes a text, a value and a text; what is empty is left out."""
    parts = [_literal(before) if before else "", value, _literal(after) if after else ""]
    actions = [part for part in parts if part]
    return "".join(
        f"{{{{{'' if number else '-'} {action} }}}}" for number, action in enumerate(actions)
    )


def stop_texts(tokenizer: Any, pieces: ChatPieces | None) -> list[str]:
    """Where an answer ends: the tokens that end a text or a turn, or a turn's heading in plain."""
    found = [tokenizer.eos_token] if tokenizer.eos_token else []
    if pieces is not None:
        special = sorted(tokenizer.added_tokens_decoder.items())
        tokens = [str(token) for _, token in special if token.special]
        # a model that does not stop goes on with the next turn
        found += [token for token in tokens if token in pieces.after_answer + pieces.before_user]
        heading = pieces.before_user.strip()
        if heading and not any(token in heading for token in tokens):
            found.append(heading)
    return list(dict.fromkeys(found))


def _literal(text: str) -> str:
    # a JSON text is one of Go's, too
    return json.dumps(text, ensure_ascii=False)
