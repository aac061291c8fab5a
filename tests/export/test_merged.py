"""save_pretrained_merged: what stock transformers and PEFT read back, and what a failure leaves."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "quantization"))

from small_checkpoint import (  # noqa: E402
    adapt,
    assert_same_weights,
    load_mixed,
    load_nf4,
    load_plain,
    logits,
    write_llama,
)

from colab_qlora import UserError  # noqa: E402
from colab_qlora import whole_files as whole_files_module  # noqa: E402
from colab_qlora.export import merged as merged_module  # noqa: E402
from colab_qlora.export.merged import SAVE_METHODS, save_pretrained_merged  # noqa: E402
from colab_qlora.export.options import shard_bytes  # noqa: E402
from colab_qlora.quantization.merging import merge_16_bit  # noqa: E402

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("merged") / "llama", biased=True)


@pytest.fixture(scope="module")
def untied_folder(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("merged") / "untied", tied=False)


def by_bitsandbytes(folder, dtype):
    """What stock transformers makes of a 16-bit folder with load_in_4bit."""
    return load_nf4(folder, dtype)


def test_16_bit_is_merge_16_bit(folder, tmp_path):
    model = adapt(load_nf4(folder))
    saved = save_pretrained_merged(model, tmp_path / "out", max_shard_size="50KB")
    assert len(list(saved.glob("*.safetensors"))) > 3
    assert_same_weights(merge_16_bit(model), load_plain(saved))


@pytest.mark.parametrize("load", [load_nf4, load_mixed])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_4_bit_is_what_bitsandbytes_makes_of_the_merged_checkpoint(
    folder, untied_folder, tmp_path, load, tied, dtype, capsys
):
    model = adapt(load(folder if tied else untied_folder, dtype))
    dense = save_pretrained_merged(model, tmp_path / "dense")
    assert "costs accuracy" not in capsys.readouterr().out
    saved = save_pretrained_merged(
        model, tmp_path / "four", save_method="merged_4bit", max_shard_size="30KB"
    )
    assert capsys.readouterr().out.count("costs accuracy") == 1
    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_quant_type"] == "nf4" and config["bnb_4bit_use_double_quant"]
    assert len(list(saved.glob("*.safetensors"))) > 2
    theirs, ours = by_bitsandbytes(dense, dtype), load_plain(saved)
    assert torch.equal(logits(ours), logits(theirs))
    for name, module in theirs.named_modules():
        assert type(ours.get_submodule(name)) is type(module), name
    four_bit = [m for m in ours.modules() if type(m).__name__ == "Linear4bit"]
    assert len(four_bit) == 14


def test_forced_is_another_name(folder, tmp_path):
    model = adapt(load_nf4(folder))
    first, second = (
        save_pretrained_merged(model, tmp_path / method, save_method=method)
        for method in ("merged_4bit", "merged_4bit_forced")
    )
    name = "model.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()


def test_lora_is_what_peft_reads(folder, tmp_path):
    model = adapt(load_nf4(folder))
    saved = save_pretrained_merged(model, tmp_path / "adapter", save_method="lora")
    assert (saved / "adapter_model.safetensors").stat().st_size < 100_000
    again = peft.PeftModel.from_pretrained(load_nf4(folder), str(saved)).eval()
    beside = logits(again)
    # the fused layers round elsewhere; the adapters' own numbers are equal
    state, ours = peft.get_peft_model_state_dict(again), peft.get_peft_model_state_dict(model)
    assert state.keys() == ours.keys()
    assert all(torch.equal(state[name], ours[name]) for name in state)
    assert (beside - logits(model)).abs().max() < 0.05 * beside.abs().max()


def test_lora_of_a_model_without_adapters(folder, tmp_path):
    with pytest.raises(UserError, match=r"no adapter to save.*merged_16bit"):
        save_pretrained_merged(load_nf4(folder), tmp_path / "out", save_method="lora")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", SAVE_METHODS)
def test_tokenizer_and_chat_template_come_along(tiny_model_folder, tmp_path, method):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.chat_template = TEMPLATE
    model = adapt(load_nf4(tiny_model_folder))
    saved = save_pretrained_merged(model, tmp_path / "out", tokenizer, save_method=method)
    again = AutoTokenizer.from_pretrained(saved)
    assert again.chat_template == TEMPLATE
    text = "A river, 2 mills.\n"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("method", ["merged_8bit", "gguf", "", None, 16])
def test_an_unknown_method_is_refused_with_the_list(folder, tmp_path, method):
    with pytest.raises(UserError, match="lora, merged_16bit, merged_4bit, merged_4bit_forced"):
        save_pretrained_merged(load_nf4(folder), tmp_path / "out", save_method=method)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", SAVE_METHODS)
def test_a_disk_that_is_too_small_is_said_before_the_first_byte(
    folder, tmp_path, monkeypatch, method
):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"is too small.*nothing was written"):
        save_pretrained_merged(adapt(load_nf4(folder)), tmp_path / "out", save_method=method)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", SAVE_METHODS)
def test_a_disk_that_becomes_full_leaves_nothing(folder, tmp_path, monkeypatch, method):
    import safetensors.torch

    def full(*args, **kwargs):
        Path(args[1]).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    adapter = save_pretrained_merged(adapt(load_nf4(folder)), tmp_path / "a", save_method="lora")
    before = {file.name: file.read_bytes() for file in adapter.iterdir()}
    model = adapt(load_nf4(folder))
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    if method == "lora":
        import peft.peft_model

        monkeypatch.setattr(peft.peft_model, "safe_save_file", full)
    with pytest.raises(UserError, match=r"disk became full.*removed"):
        save_pretrained_merged(model, tmp_path / "new" / "out", save_method=method)
    assert {file.name: file.read_bytes() for file in adapter.iterdir()} == before
    assert list((tmp_path / "new").rglob("*")) == []
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("method", SAVE_METHODS)
def test_a_folder_with_an_adapter_is_left_alone(folder, tmp_path, method):
    model = adapt(load_nf4(folder))
    save_pretrained_merged(model, tmp_path / "out", save_method="lora")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match="nothing is overwritten.*adapter_config.json"):
        save_pretrained_merged(model, tmp_path / "out", save_method=method)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_an_interrupt_leaves_nothing(folder, tmp_path, monkeypatch):
    def stop(self, matrix):
        raise KeyboardInterrupt

    model = adapt(load_nf4(folder))
    monkeypatch.setattr(merged_module.MergedWeights, "weight", stop)
    for method in ("merged_16bit", "merged_4bit"):
        with pytest.raises(KeyboardInterrupt):
            save_pretrained_merged(model, tmp_path / "out", save_method=method)
    assert list(tmp_path.iterdir()) == []


def test_at_most_one_matrix_is_quantised_at_a_time(folder, tmp_path):
    from colab_qlora.export.merged_4bit import planned_4bit
    from colab_qlora.quantization.merged_weights import MergedWeights

    planned = planned_4bit(MergedWeights(adapt(load_nf4(folder))))
    takers = {id(t.make.__closure__[1].cell_contents): t for t in planned if "absmax" in t.name}
    for tensor in planned:
        made = tensor.make()
        assert (tuple(made.shape), made.dtype) == (tensor.shape, tensor.dtype), tensor.name
        holders = [t.make.__closure__[1].cell_contents for t in takers.values()]
        assert sum(bool(holder._made) for holder in holders) <= 1


def test_options_of_tutorials(folder, tmp_path, capsys):
    model = adapt(load_nf4(folder))
    save_pretrained_merged(
        model, tmp_path / "out", None, "merged_16bit", maximum_memory_usage=0.5,
        safe_serialization=True, temporary_location="buffers",
    )  # fmt: skip
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "temporary_location (nothing is buffered" in said
    with pytest.raises(UserError, match=r"unknown keyword argument: got max_shrad"):
        save_pretrained_merged(model, tmp_path / "new", max_shrad="5GB")


@pytest.mark.parametrize("share", [0, -1, 1.5, "0.5", True, None])
def test_a_share_that_is_none(share):
    with pytest.raises(UserError, match="maximum_memory_usage is not a share"):
        shard_bytes(share, None)


@pytest.mark.parametrize("size", [0, -5, "5", "GB", "5XB", "0GB", True, [5]])
def test_a_size_that_is_none(size):
    with pytest.raises(UserError, match=r'max_shard_size is not a size.*"5GB"'):
        shard_bytes(0.75, size)


def test_both_limits_are_kept(monkeypatch):
    from colab_qlora.export import options

    monkeypatch.setattr(options, "host_memory_gib", lambda: (12.7, 2.0))
    assert shard_bytes(0.5, None) == 2**29
    assert shard_bytes(1, None) == 2**30
    assert shard_bytes(0.5, "500MB") == 500 * 10**6
    assert shard_bytes(0.5, "1.5GiB") == 2**29
    assert shard_bytes(0.0001, None) == 64 * 2**20
    monkeypatch.setattr(options, "host_memory_gib", lambda: (None, None))
    assert shard_bytes(0.75, "5GB") == 2 * 2**30
    assert shard_bytes(0.75, 12345) == 12345


def test_files_of_other_names_stay(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("1")
    (tmp_path / "out" / "both").write_text("2")
    with whole_files_module.whole_files(tmp_path / "out", 1) as partial:
        (partial / "both").write_text("3")
        assert (tmp_path / "out" / "both").read_text() == "2"
    found = {file.name: file.read_text() for file in (tmp_path / "out").iterdir()}
    assert found == {"mine": "1", "both": "3"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    inside = tmp_path / "file" / "out"
    with (
        pytest.raises(UserError, match="cannot be written.*Choose another folder"),
        whole_files_module.whole_files(inside, 1),
    ):
        pass
    assert (tmp_path / "file").read_text() == ""


def _content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("method", SAVE_METHODS)
def test_an_earlier_folder_is_replaced_by_the_new_one(folder, tmp_path, method):
    model, out = adapt(load_nf4(folder)), tmp_path / "out"
    save_pretrained_merged(model, out, save_method="lora")
    (out / "of_the_earlier_run").write_text("1")
    saved = save_pretrained_merged(model, str(out), save_method=method, overwrite=True)
    fresh = save_pretrained_merged(model, tmp_path / "fresh", save_method=method)
    assert saved == out and _content(out) == _content(fresh)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["fresh", "out"]
    # and one that is not there yet, or is empty
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        again = save_pretrained_merged(model, tmp_path / name, save_method=method, overwrite=True)
        assert _content(again) == _content(fresh)


@pytest.mark.parametrize("method", SAVE_METHODS)
@pytest.mark.parametrize("moment", ["small disk", "full disk", "interrupt", "swap"])
def test_the_earlier_folder_stays_where_the_new_one_fails(
    folder, tmp_path, monkeypatch, method, moment
):
    import peft.peft_model
    import safetensors.torch

    model, out = adapt(load_nf4(folder)), tmp_path / "out"
    save_pretrained_merged(model, out, save_method="lora")
    before = _content(out)
    rename = Path.rename

    def stop(*args, **kwargs):
        # the old folder is there while the new one is written
        assert _content(out) == before
        if moment == "interrupt":
            raise KeyboardInterrupt
        raise OSError(errno.ENOSPC, "No space left on device")

    def no_second(path, target):
        if path.name.endswith(".new") and Path(target).name == "out":
            assert not out.exists()
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    if moment == "small disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    elif moment == "swap":
        monkeypatch.setattr(Path, "rename", no_second)
    else:
        monkeypatch.setattr(safetensors.torch, "save_file", stop)
        monkeypatch.setattr(peft.peft_model, "safe_save_file", stop)
    with pytest.raises(KeyboardInterrupt if moment == "interrupt" else UserError):
        save_pretrained_merged(model, out, save_method=method, overwrite=True)
    assert _content(out) == before
    assert list(tmp_path.iterdir()) == [out]


def test_overwrite_removes_nothing_but_exports(folder, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "rows.jsonl").write_text("1")
    model = adapt(load_nf4(folder))
    with pytest.raises(UserError, match=r"no folder of a model or an adapter: got a folder with r"):
        save_pretrained_merged(model, tmp_path / "work", overwrite=True)
    assert (tmp_path / "work" / "rows.jsonl").read_text() == "1"
    (tmp_path / "file").write_text("2")
    with pytest.raises(UserError, match="file is there already"):
        save_pretrained_merged(model, tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "2"


@pytest.mark.parametrize("method", SAVE_METHODS)
def test_the_models_own_checkpoint_is_not_replaced(tmp_path, monkeypatch, method):
    own = write_llama(tmp_path / "own")
    before = _content(own)
    model = adapt(load_nf4(own))
    (tmp_path / "link").symlink_to(own)
    monkeypatch.chdir(tmp_path)
    for name in (own, "own", tmp_path / "link"):
        with pytest.raises(UserError, match="the model's own weights are read from it"):
            save_pretrained_merged(model, name, save_method=method, overwrite=True)
    other = write_llama(tmp_path / "other")
    with pytest.raises(UserError, match="the model's own weights are read from it"):
        save_pretrained_merged(
            model, other, save_method=method, overwrite=True, base_model=str(other)
        )
    assert _content(own) == before


def test_the_folder_behind_a_link_is_replaced(folder, tmp_path):
    model = adapt(load_nf4(folder))
    save_pretrained_merged(model, tmp_path / "drive" / "out", save_method="lora")
    (tmp_path / "link").symlink_to(tmp_path / "drive" / "out")
    saved = save_pretrained_merged(model, tmp_path / "link", overwrite=True)
    assert saved == tmp_path / "link" and saved.is_symlink()
    assert (tmp_path / "drive" / "out" / "model.safetensors").is_file()
    assert [entry.name for entry in (tmp_path / "drive").iterdir()] == ["out"]


def test_what_something_else_wrote_meanwhile_stays(tmp_path):
    out = tmp_path / "new" / "out"
    with (
        pytest.raises(UserError, match="cannot be written"),
        whole_files_module.whole_files(out, 1) as partial,
    ):
        (partial / "model").write_text("half")
        (tmp_path / "new" / "log").write_text("1")
        raise OSError(errno.EIO, "Input/output error")
    assert [entry.name for entry in tmp_path.rglob("*")] == ["new", "log"]
    with (
        pytest.raises(KeyboardInterrupt),
        whole_files_module.whole_files(tmp_path / "b" / "out", 1),
    ):
        raise KeyboardInterrupt
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_files_that_were_moved_are_moved_back(tmp_path, monkeypatch, error):
    import os

    out = tmp_path / "out"
    out.mkdir()
    for name in ("b", "c", "mine"):
        (out / name).write_text(f"old {name}")
    replace = os.replace

    def second_fails(source, target):
        if Path(target) == out / "c" and Path(source).parent.name.endswith(".partial"):
            raise error
        replace(source, target)

    with (
        pytest.raises((UserError, KeyboardInterrupt)),
        whole_files_module.whole_files(out, 1) as partial,
    ):
        for name in ("a", "b", "c"):
            (partial / name).write_text(f"new {name}")
        monkeypatch.setattr(os, "replace", second_fails)
    found = {file.name: file.read_text() for file in out.iterdir()}
    assert found == {"b": "old b", "c": "old c", "mine": "old mine"}
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_in_the_place_of_a_file_is_not_replaced(tmp_path):
    (tmp_path / "out" / "b").mkdir(parents=True)
    (tmp_path / "out" / "b" / "mine").write_text("1")
    with (
        pytest.raises(UserError, match="cannot be written"),
        whole_files_module.whole_files(tmp_path / "out", 1) as partial,
    ):
        for name in ("a", "b"):
            (partial / name).write_text("new")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
        "out",
        "out/b",
        "out/b/mine",
    ]
