"""A prompt template over the columns of a table, with parts that go where a cell is blank.

    {name}       the cell of column "name", which every row has to fill
    [[ ... ]]    an optional part: left out as a whole where a cell in it is blank
    {{ and }}    a brace itself

"{instruction}[[\\nYour input is:\\n{input}]]" gives the instruction alone where there is no input.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from colab_qlora.data.wording import first_few, kind_of, shown
from colab_qlora.errors import UserError

_TOKEN = re.compile(r"\{\{|\}\}|\[\[|\]\]|\{[^{}]*\}|[^{}\[\]]+|.", re.DOTALL)
_EXAMPLE = "'{instruction}[[\\n{input}]]'"


@dataclass(frozen=True)
class Part:
    """A stretch of the template.

    Args:
        pieces: (text, False) for text, (column, True) for a cell.
        optional: whether it stood in [[ ]].
    """

    pieces: tuple[tuple[str, bool], ...]
    optional: bool

    @property
    def columns(self) -> list[str]:
        """The columns whose cells are in it."""
        return [text for text, is_column in self.pieces if is_column]


@dataclass(frozen=True)
class MergeTemplate:
    """A template that was read; see the module for its language.

    Args:
        parts: its stretches, in order.
    """

    parts: tuple[Part, ...]

    @property
    def columns(self) -> list[str]:
        """The columns of the whole template, each once."""
        return list(dict.fromkeys(name for part in self.parts for name in part.columns))

    def fill(self, row: Mapping[str, Any]) -> tuple[str, list[str]]:
        """Return the text of one row, and its faults as clauses; with a fault, use no text."""
        texts: list[str] = []
        faults: list[str] = []
        for part in self.parts:
            cells = {name: cell_text(row.get(name)) for name in part.columns}
            faults += [
                f"{name!r} is {kind_of(row[name])}, not text or a number"
                for name, cell in cells.items()
                if cell is None
            ]
            blank = [name for name, cell in cells.items() if cell == ""]
            if blank and part.optional:
                continue
            faults += [f"{name!r} is blank but stands outside [[ ]]" for name in blank]
            texts += [(cells[text] or "") if is_column else text for text, is_column in part.pieces]
        return "".join(texts), faults


def cell_text(value: object) -> str | None:
    """The text of a cell: "" where it is blank or not a number, None where it has no text form."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, (Mapping, list, tuple, set, bytes, bytearray)):
        return None
    text = str(value)
    return text if text.strip() else ""


def read_template(template: object, columns: Sequence[str]) -> MergeTemplate:
    """Read a template.

    Args:
        template: the text.
        columns: the columns that it may name.

    Raises:
        UserError: it is not text, names no column or one that is not there, has a bracket or brace
            without its partner, or an optional part without a column.
    """
    if not isinstance(template, str):
        raise _broken(f"{kind_of(template)} ({shown(template)})")
    parts: list[Part] = []
    pieces: list[tuple[str, bool]] = []
    inside = False
    for match in _TOKEN.finditer(template):
        token = match[0]
        if token in ("[[", "]]"):
            if inside == (token == "[["):
                raise _broken(f"{token!r} at character {match.start() + 1} without its partner")
            parts.append(_part(pieces, inside))
            pieces, inside = [], not inside
        elif token in ("{", "}"):
            raise _broken(f"{token!r} at character {match.start() + 1} without its partner")
        elif token.startswith("{") and token != "{{":
            pieces.append((_column(token[1:-1], columns), True))
        else:
            pieces.append((token[0] if token in ("{{", "}}") else token, False))
    if inside:
        raise _broken("'[[' without ']]'")
    parts.append(_part(pieces, False))
    found = MergeTemplate(tuple(part for part in parts if part.pieces))
    if not found.columns:
        raise _broken(f"{shown(template)}, which names no column")
    return found


def _part(pieces: list[tuple[str, bool]], optional: bool) -> Part:
    part = Part(tuple(pieces), optional)
    if optional and not part.columns:
        text = "".join(text for text, _ in pieces)
        raise _broken(f"the optional part {shown(text)}, which names no column")
    return part


def _broken(got: str) -> UserError:
    return UserError(
        "merged_prompt cannot be read",
        got=got,
        allowed=f"a template such as {_EXAMPLE}, with {{{{ and }}}} for braces themselves",
        do="Correct merged_prompt",
    )


def _column(name: str, columns: Sequence[str]) -> str:
    if name in columns:
        return name
    close = difflib.get_close_matches(name, columns, n=1)
    raise UserError(
        "merged_prompt names a column that is not there",
        got=f"{{{name}}}",
        allowed=first_few([f"{{{column}}}" for column in columns], limit=12, separator=", "),
        do=f"Write {{{close[0]}}}" if close else "Name one of these columns",
    )
