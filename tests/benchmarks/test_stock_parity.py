"""The rows of the comparison are worded as in the tutorial script."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def test_template_is_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.stock_parity import prompt_template

    template = prompt_template()
    script = (ROOT / "tests" / "tutorial_script.py").read_text(encoding="utf-8")
    assert f'alpaca_prompt = """{template}"""' in script
    assert template.format("Count to 2.", "1 2").endswith(
        "### Instruction:\nCount to 2.\n### Response:\n1 2"
    )
