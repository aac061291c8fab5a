"""The part of Go's text/template that the Modelfile uses, read from its documentation.

https://pkg.go.dev/text/template: text between actions; `{{-` trims the text before it; string
literals; `.Field`, `$.Field` of the data; `$name := value` and `$name = value`; `range`,
`if`, `else if`, `else`, `end`; `eq`.
"""

from __future__ import annotations

import json
import re

_ACTION = re.compile(r"\{\{(-?)\s*((?:\"(?:[^\"\\]|\\.)*\"|[^\"}])*?)\s*(-?)\}\}", re.S)


def render(template, data):
    """What Go's `Execute` writes for a template and its data, a dict."""
    tree, rest = _parse(_tokens(template))
    assert rest == []
    names = {"$": data}
    return "".join(_run(tree, data, names))


def _tokens(template):
    found, last, trims_next = [], 0, False
    for action in _ACTION.finditer(template):
        text = template[last : action.start()]
        text = text.lstrip() if trims_next else text
        text = text.rstrip() if action[1] else text
        found += [("text", text), ("action", action[2])]
        last, trims_next = action.end(), bool(action[3])
    text = template[last:]
    return [*found, ("text", text.lstrip() if trims_next else text)]


def _parse(tokens):
    nodes = []
    while tokens:
        kind, value = tokens[0]
        if kind == "action" and value.split(" ")[0] in ("end", "else"):
            return nodes, tokens
        tokens = tokens[1:]
        word, _, rest = value.partition(" ")
        if kind == "text":
            nodes.append(("text", value))
        elif word in ("if", "range"):
            node, tokens = _block(word, rest, tokens)
            nodes.append(node)
        else:
            nodes.append(("action", value))
    return nodes, tokens


def _block(word, condition, tokens):
    body, tokens = _parse(tokens)
    end, tokens = tokens[0][1], tokens[1:]
    otherwise = []
    if end.startswith("else if "):
        node, tokens = _block("if", end.removeprefix("else if "), tokens)
        return (word, condition, body, [node]), tokens
    if end == "else":
        otherwise, tokens = _parse(tokens)
        end, tokens = tokens[0][1], tokens[1:]
    assert end == "end"
    return (word, condition, body, otherwise), tokens


def _run(nodes, dot, names):
    for node in nodes:
        if node[0] == "text":
            yield node[1]
        elif node[0] == "action":
            assigned = re.fullmatch(r"(\$\w+) :?= (.*)", node[1])
            if assigned:
                names[assigned[1]] = _value(assigned[2], dot, names)
            else:
                yield str(_value(node[1], dot, names))
        elif node[0] == "if":
            taken = node[2] if _value(node[1], dot, names) else node[3]
            yield from _run(taken, dot, names)
        else:
            for item in _value(node[1], dot, names):
                yield from _run(node[2], item, names)


def _value(text, dot, names):
    if text.startswith("eq "):
        first, second = text.removeprefix("eq ").split(" ", 1)
        return _value(first, dot, names) == _value(second, dot, names)
    if text in ("true", "false") or text.startswith('"'):
        return json.loads(text)
    if text.startswith("$."):
        return names["$"][text[2:]]
    if text.startswith("."):
        return dot[text[1:]]
    return names[text]
