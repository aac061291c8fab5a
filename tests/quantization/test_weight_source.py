"""16-bit matrices out of a checkpoint: whole, in shards, gone, quantised."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from colab_qlora.errors import UserError
from colab_qlora.quantization.weight_source import SourceGone, WeightSource

NAME = "model.layers.1.mlp.up_proj"


@pytest.fixture
def sharded(tiny_model_folder, tmp_path):
    tensors = load_file(tiny_model_folder / "model.safetensors")
    names, index = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, tmp_path / f"shard-{number}.safetensors")
        index |= dict.fromkeys(part, f"shard-{number}.safetensors")
    text = json.dumps({"metadata": {}, "weight_map": index})
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.model
def test_whole_and_in_shards(tiny_model_folder, sharded):
    tensors = load_file(tiny_model_folder / "model.safetensors")
    for folder in (tiny_model_folder, sharded):
        source = WeightSource.of_checkpoint(str(folder))
        assert NAME in source and "lm_head" not in source
        assert torch.equal(source(NAME), tensors[f"{NAME}.weight"])
    with pytest.raises(UserError, match="the checkpoint has no weight of lm_head"):
        source("lm_head")


@pytest.mark.model
def test_a_shard_that_is_gone_or_cut(sharded):
    source = WeightSource.of_checkpoint(str(sharded))
    file = source.files[f"{NAME}.weight"]
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(SourceGone, match=f"the 16-bit weight of {NAME} cannot be read any more"):
        source(NAME)
    shutil.rmtree(sharded)
    with pytest.raises(SourceGone, match="Put the checkpoint back"):
        source(NAME)


def test_no_safetensors_and_no_matrix(tmp_path):
    with pytest.raises(UserError, match="has no safetensors to read 16-bit weights from"):
        WeightSource.of_checkpoint(str(tmp_path))
    packed = {"a.weight": torch.zeros(8, 1, dtype=torch.uint8), "b.weight": torch.zeros(3)}
    save_file(packed, tmp_path / "model.safetensors")
    source = WeightSource.of_checkpoint(str(tmp_path))
    for name in ("a", "b"):
        with pytest.raises(UserError, match=f"the weight of {name} .* quantised already: got"):
            source(name)
