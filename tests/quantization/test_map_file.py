"""What a map file brings back, and what it says where it cannot."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from colab_qlora.errors import UserError
from colab_qlora.quantization import map_file
from colab_qlora.quantization.dynamic import DynamicQuantization, MapChange
from colab_qlora.quantization.map_file import FILE, read_map, save_map
from colab_qlora.quantization.precision_map import Placement, PrecisionMap


def state_of_two():
    placements = {
        "model.layers.0.mlp.down_proj": Placement(
            "int8", 90, 0.1, "nf4_64", 50, 0.25, "promoted: 4e-3 a byte"
        ),
        "lm_head": Placement("16bit", 200, 0.0, "16bit", 200, 0.0, "as in plain NF4"),
    }
    change = MapChange(12, "lm_head", "int8", "16bit", 100, "worth it")
    return DynamicQuantization(
        PrecisionMap(placements, 300),
        {},
        300,
        {"lm_head": torch.rand(7), "model.layers.0.mlp.down_proj": torch.rand(5)},
        lambda name: torch.empty(0),
        torch.float16,
        "+5%",
        True,
        [change],
        "embedded",
    )


def test_it_comes_back_whole(tmp_path):
    state = state_of_two()
    assert read_map(tmp_path) is None
    assert save_map(state, tmp_path / "made") == tmp_path / "made" / FILE
    found = read_map(tmp_path / "made")
    assert found.map == state.map
    assert found.column_weights.keys() == state.column_weights.keys()
    for name, values in state.column_weights.items():
        assert torch.equal(found.column_weights[name], values)
    assert found.compute_dtype == "float16"
    assert (found.budget, found.has_data, found.history, found.base) == (
        "+5%",
        True,
        state.history,
        "embedded",
    )


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    save_map(state_of_two(), tmp_path)
    before = (tmp_path / FILE).read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_map(state_of_two(), tmp_path)
    assert (tmp_path / FILE).read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize("damage", ["cut", "empty", "version", "rung", "other"])
def test_a_damaged_file_is_named(tmp_path, monkeypatch, damage):
    state = state_of_two()
    if damage == "version":
        monkeypatch.setattr(map_file, "VERSION", 2)
    if damage == "rung":
        wrong = dataclasses.replace(state.map["lm_head"], rung="nf4_128")
        state.map = PrecisionMap({**state.map.placements, "lm_head": wrong}, 300)
    path = save_map(state, tmp_path)
    monkeypatch.undo()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:40])
    if damage == "empty":
        path.write_bytes(b"")
    if damage == "other":
        from safetensors.torch import save_file

        save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=f"{FILE} cannot be read: .* Copy it again"):
        read_map(tmp_path)
