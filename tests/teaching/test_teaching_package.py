"""The package's face: lazy names, the hyperparameter table, and `show`."""

from __future__ import annotations

import subprocess
import sys
import types
from html.parser import HTMLParser
from pathlib import Path

import pytest

import colab_qlora.teaching as teaching

REPO = Path(__file__).resolve().parents[2]


def run_python(code):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_name_is_there_and_is_no_module():
    assert set(teaching.__all__) == set(teaching._EXPORTS) and dir(teaching) == sorted(
        dir(teaching)
    )
    for name in teaching.__all__:
        assert not isinstance(getattr(teaching, name), types.ModuleType), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = teaching.nothing


def test_importing_loads_nothing_heavy():
    heavy = "{'torch', 'matplotlib', 'transformers', 'IPython', 'bitsandbytes'}"
    code = f"import sys, colab_qlora.teaching; print({heavy} & set(sys.modules))"
    assert run_python(code).strip() == "set()"


def test_drawing_leaves_pyplot_alone():
    code = (
        "import sys; from colab_qlora.teaching import *; draw_nf4_levels(); "
        "draw_lora_shapes(64, 64, 8); print('matplotlib.pyplot' in sys.modules)"
    )
    assert run_python(code).strip() == "False"


class _Cells(HTMLParser):
    def __init__(self):
        super().__init__()
        self.rows, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "th":
            assert dict(attrs)["scope"] in {"row", "col"}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.rows[-1].append(data)


def test_table_says_the_same_in_html_markdown_and_text():
    table = teaching.hyperparameter_table()
    expected = [table.head, *table.rows()]
    parser = _Cells()
    parser.feed(table._repr_html_())
    assert not parser.open and [tuple(row) for row in parser.rows] == expected
    lines = table._repr_markdown_().splitlines()
    assert [tuple(c.strip() for c in line.strip("|").split("|")) for line in lines] == [
        expected[0],
        ("---",) * 4,
        *expected[1:],
    ]
    text = str(table)
    assert max(map(len, text.splitlines())) <= 140
    for row in expected:
        for cell in row:
            assert all(word in text for word in cell.split())


def test_starting_values_are_those_of_the_notebooks():
    values = {value.name: value.start for value in teaching.STARTING_VALUES}
    assert values["learning_rate"] == "2e-4" and values["num_train_epochs"] == "3"
    assert values["r (LoRA rank)"] == "16" and values["warmup_steps"].startswith("5 %")
    assert values["batch size x accumulation"].startswith("8 to 16")
    for value in teaching.STARTING_VALUES:
        assert value.raise_when and value.lower_when
        with pytest.raises(AttributeError):
            value.start = "1"


def test_show_prints_the_words_outside_a_notebook(capsys):
    teaching.show(teaching.draw_lora_shapes(64, 64, 8), "a picture of three matrices")
    assert capsys.readouterr().out == "a picture of three matrices\n"


def test_show_publishes_picture_and_words_in_a_notebook():
    pytest.importorskip("IPython")
    # a kernel's shell is an InteractiveShell with an attribute `kernel`
    code = """
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from colab_qlora.teaching import draw_lora_shapes, show
shell = InteractiveShell.instance()
fig = draw_lora_shapes(64, 64, 8)
with capture_output() as terminal:
    show(fig, "three matrices")
shell.kernel = object()
with capture_output() as notebook:
    show(fig, "three matrices")
assert terminal.stdout == notebook.stdout == "three matrices\\n"
assert not terminal.outputs, "a terminal shows no picture"
(output,) = notebook.outputs
import base64
assert output.data["text/plain"] == "three matrices"
assert base64.b64decode(output.data["image/png"]).startswith(b"\\x89PNG")
assert set(output.data) == {"image/png", "text/plain"}
print("shown")
"""
    assert run_python(code).strip().endswith("shown")
