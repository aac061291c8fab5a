"""The script that tutorials use runs as it stands; only the model's name is another."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")
pytestmark = pytest.mark.model
ROOT = Path(__file__).resolve().parent.parent.parent


def test_script_runs_unchanged(embedded_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import tutorial

    assert "from colab_qlora import FastLanguageModel, SFTTrainer" in tutorial.script_for("x")
    result = tutorial.run("embedded", rows=64)
    trainer = result["trainer"]
    assert result["steps"] == 24  # 64 rows, 8 a step, 3 epochs
    assert trainer.args.max_length == 2048
    assert len(result["losses"]) == 2
    assert all(math.isfinite(loss) for loss in result["losses"])
    assert result["losses"][1] < result["losses"][0] - 0.3
    if not torch.cuda.is_available():
        starts = (
            "max_seq_length is max_length now; dataset_text_field belongs to SFTConfig",
            "fp16=True was asked for",
            "all LoRA matrices are updated together",
        )
        # what padding costs is said besides, and depends on the rows
        notes = [note for note in result["notes"] if "is padding" not in note]
        assert len(notes) == len(starts)
        assert all(note.startswith(start) for note, start in zip(notes, starts, strict=True))
        assert result["precision"] in {"bf16", "fp32"}
