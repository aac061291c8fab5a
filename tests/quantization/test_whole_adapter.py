"""`save_pretrained` of a dynamic model: adapter and map together, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from safetensors import SafetensorError  # noqa: E402

from colab_qlora import FastLanguageModel, UserError  # noqa: E402
from colab_qlora.export.merged import save_pretrained_merged  # noqa: E402
from colab_qlora.models.peer_methods import save_lora  # noqa: E402
from colab_qlora.quantization import instance_methods  # noqa: E402
from colab_qlora.quantization.instance_methods import SavesItsMap  # noqa: E402

pytestmark = pytest.mark.model

FULL = r"^the disk became full while \S+/out was written: got .*No space left on device.*removed\.$"
FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "quantization_map.safetensors",
}


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> Any:
    base, _ = FastLanguageModel.from_pretrained(
        str(tiny_model_folder), 64, "float32", quantization="dynamic", quantization_budget="+20%"
    )
    made = FastLanguageModel.get_peft_model(base, r=4, use_gradient_checkpointing=False)
    assert isinstance(made.save_pretrained, SavesItsMap)
    return made


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize("missing", ["adapter_model.safetensors", "quantization_map.safetensors"])
def test_a_disk_that_becomes_full_leaves_nothing(
    model: Any, small_disk: Any, tmp_path: Path, missing: str
) -> None:
    model.save_pretrained(tmp_path / "whole")
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "whole").iterdir()}
    assert set(sizes) == FILES
    # in pages of 4 KiB; folders take none
    pages = {name: -(-size // 4096) for name, size in sizes.items()}
    needed = pages[missing] if "adapter" in missing else sum(pages.values())
    disk = small_disk(4 * (needed - 1))
    with pytest.raises(UserError, match=FULL):
        model.save_pretrained(str(disk / "new" / "out"))
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("moment", ["adapter", "map"])
def test_what_was_there_stays(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    model.save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    before = content(tmp_path / "out")

    def full(*args: Any, **options: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    if moment == "adapter":
        monkeypatch.setattr(peft.peft_model, "safe_save_file", full)
    else:
        monkeypatch.setattr(instance_methods, "save_map", full)
    with pytest.raises(UserError, match=FULL):
        model.save_pretrained(tmp_path / "out")
    assert content(tmp_path / "out") == before
    for save in (save_lora, lambda *given: save_pretrained_merged(*given, save_method="lora")):
        # of the folder that was asked for, and not of a hidden one
        with pytest.raises(UserError, match=FULL):
            save(model, tmp_path / "new" / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_files_of_other_names_and_the_model_card_stay(model: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("1")
    (out / "README.md").write_text("---\nlicense: mit\n---\nMy own words.\n")
    model.save_pretrained(out)
    assert {file.name for file in out.iterdir()} == FILES | {"mine"}
    card = (out / "README.md").read_text()
    assert "My own words." in card and "license: mit" in card and "library_name: peft" in card
    assert list(tmp_path.iterdir()) == [out]


def test_a_second_adapter_goes_into_its_folder_each_time(model: Any, tmp_path: Path) -> None:
    model.add_adapter("second", model.peft_config["default"])
    try:
        for _ in range(2):
            model.save_pretrained(tmp_path / "out")
            names = set(content(tmp_path / "out"))
            assert FILES | {"second/adapter_model.safetensors"} <= names
    finally:
        model.delete_adapter("second")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_other_processes_write_nothing(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert content(tmp_path) == {}
