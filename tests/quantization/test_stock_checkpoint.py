"""Quantised weights on disk: plain transformers and bitsandbytes give the same logits."""

from __future__ import annotations

import errno
import functools
import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
import safetensors.torch  # noqa: E402
from small_checkpoint import (  # noqa: E402
    RUNGS,
    adapt,
    is_tied,
    load_mixed,
    load_nf4,
    load_plain,
    logits,
    write_llama,
)

from colab_qlora import UserError  # noqa: E402
from colab_qlora.models.fuse import fused_layers  # noqa: E402
from colab_qlora.quantization.merging import save_merged_16_bit  # noqa: E402
from colab_qlora.quantization.stock_checkpoint import save_stock_checkpoint  # noqa: E402

LOADS = {"nf4": load_nf4, "mixed": load_mixed}
# with a head that PEFT can train
TRAINABLE = {"nf4": load_nf4, "mixed": functools.partial(load_mixed, table="16bit")}
# all that can be in 4 bit is, the head with it
ALL_4BIT = {"lm_head": "nf4_64", "model.layers.1.mlp.gate_proj": "nf4_32"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("stock")
    return {
        tied: write_llama(root / str(tied), tied=tied, biased=not tied) for tied in (True, False)
    }


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("limit", [2**30, 20_000])
def test_identical_logits(folders, tmp_path, load, dtype, tied, limit):
    model = LOADS[load](folders[tied], dtype)
    expected = logits(model)
    saved = save_stock_checkpoint(model, tmp_path / "stock", max_shard_bytes=limit)
    assert (len(list(saved.glob("*.safetensors"))) > 1) == (limit < 2**30)
    loaded = load_plain(saved)
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(model), expected)
    assert is_tied(loaded) == tied


def test_blocks_of_64_and_32_stay_what_they_are(folders, tmp_path):
    import bitsandbytes

    model = load_mixed(folders[True])
    loaded = load_plain(save_stock_checkpoint(model, tmp_path / "stock"))
    sizes = set()
    for name, module in model.named_modules():
        if not isinstance(module, bitsandbytes.nn.Linear4bit):
            continue
        other = loaded.get_submodule(name)
        assert isinstance(other, bitsandbytes.nn.Linear4bit), name
        ours, theirs = module.weight, other.weight
        assert torch.equal(ours, theirs), name
        assert ours.quant_state.blocksize == theirs.quant_state.blocksize, name
        assert torch.equal(ours.quant_state.absmax, theirs.quant_state.absmax), name
        assert ours.quant_state.nested and theirs.quant_state.nested, name
        sizes.add(theirs.quant_state.blocksize)
    assert sizes == {32, 64}


def test_int8_is_written_as_the_numbers_that_are_computed_with(folders, tmp_path):
    model = load_mixed(folders[True])
    saved = save_stock_checkpoint(model, tmp_path / "stock")
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    decoded = {name: rung for name, rung in RUNGS.items() if rung == "int8"}
    assert len(decoded) == 2
    for name in [*decoded, "model.embed_tokens"]:
        module = model.get_submodule(name)
        assert torch.equal(tensors[f"{name}.weight"], module.decoded(torch.bfloat16)), name
        assert f"{name}.SCB" not in tensors
    assert "lm_head.weight" not in tensors
    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    dense = {name for name, rung in RUNGS.items() if not rung.startswith("nf4")}
    assert set(config["llm_int8_skip_modules"]) == dense | {"lm_head"}
    assert config["load_in_4bit"] and config["bnb_4bit_quant_type"] == "nf4"
    assert config["bnb_4bit_compute_dtype"] == "bfloat16"


def test_a_head_in_4_bit(folders, tmp_path):
    model = load_mixed(folders[False], rungs=ALL_4BIT)
    expected = logits(model)
    saved = save_stock_checkpoint(model, tmp_path / "stock")
    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == []
    loaded = load_plain(saved)
    assert torch.equal(logits(loaded), expected)
    assert type(loaded.lm_head) is type(model.lm_head)


def test_nothing_in_4_bit_is_a_plain_checkpoint(folders, tmp_path):
    model = load_plain(folders[True], dtype=torch.bfloat16)
    expected = logits(model)
    saved = save_stock_checkpoint(model, tmp_path / "stock")
    assert "quantization_config" not in json.loads((saved / "config.json").read_text())
    assert torch.equal(logits(load_plain(saved)), expected)


@pytest.mark.parametrize("load", TRAINABLE)
def test_adapters_are_left_out_and_left_alone(folders, tmp_path, load):
    expected = logits(TRAINABLE[load](folders[False]))
    model = adapt(TRAINABLE[load](folders[False]), modules_to_save=["lm_head"])
    model.base_model.model.lm_head.modules_to_save["default"].weight.data += 0.5
    with_adapters = logits(model)
    loaded = load_plain(save_stock_checkpoint(model, tmp_path / "stock"))
    assert not any("lora" in name for name, _ in loaded.named_parameters())
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(model), with_adapters)
    assert not torch.equal(with_adapters, expected)
    assert len(fused_layers(model)) == 2


def test_written_again_from_what_was_read(folders, tmp_path):
    model = load_mixed(folders[True])
    first = save_stock_checkpoint(model, tmp_path / "first")
    second = save_stock_checkpoint(load_nf4(first, quantization_config=None), tmp_path / "second")
    names = {path.name for path in first.iterdir()}
    assert names == {path.name for path in second.iterdir()}
    ours, theirs = (
        safetensors.torch.load_file(folder / "model.safetensors") for folder in (first, second)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_weights_that_bitsandbytes_repacked_for_a_cpu(folders, tmp_path):
    model = load_nf4(folders[True])
    # what its first forward pass in evaluation mode leaves on a CPU with AVX-512 bfloat16
    model.model.layers[1].mlp.down_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UserError, match="down_proj was repacked for a CPU.*keep_weights_in_place"):
        save_stock_checkpoint(model, tmp_path / "stock")
    assert list(tmp_path.iterdir()) == []


def test_llm_int8_cannot_stand_beside_4_bit(folders, tmp_path):
    import bitsandbytes

    model = load_nf4(folders[True])
    old = model.model.layers[0].mlp.up_proj
    new = bitsandbytes.nn.Linear8bitLt(
        old.in_features, old.out_features, bias=False, has_fp16_weights=False
    )
    new.weight = bitsandbytes.nn.Int8Params(
        torch.zeros(old.out_features, old.in_features, dtype=torch.int8), requires_grad=False
    )
    model.model.layers[0].mlp.up_proj = new
    with pytest.raises(UserError, match="up_proj is in a format that cannot.*got Linear8bitLt"):
        save_stock_checkpoint(model, tmp_path / "stock")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("save", [save_stock_checkpoint, save_merged_16_bit])
@pytest.mark.parametrize("load", LOADS)
def test_a_full_disk_leaves_nothing_behind(folders, tmp_path, monkeypatch, save, load):
    save_file, written = safetensors.torch.save_file, []

    def fills_up(tensors, path, metadata=None):
        if len(written) == 2:
            path.write_bytes(b"half a header")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        save_file(tensors, path, metadata=metadata)

    model = adapt(LOADS[load](folders[True]))
    before = logits(model)
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", fills_up)
        with pytest.raises(UserError, match="the disk became full.*what was written is removed"):
            save(model, tmp_path / "out", max_shard_bytes=20_000)
    assert len(written) == 2
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(logits(model), before)
    assert save(model, tmp_path / "out", max_shard_bytes=20_000).is_dir()
