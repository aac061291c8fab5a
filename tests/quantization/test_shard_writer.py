"""Checkpoints are written whole or not at all."""

from __future__ import annotations

import errno
import json
import shutil
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
import safetensors.torch  # noqa: E402

from colab_qlora import UserError  # noqa: E402
from colab_qlora.quantization.shard_writer import (  # noqa: E402
    PlannedTensor,
    split_into_shards,
    stored,
    write_checkpoint,
)

SIZES = (10, 30, 5, 70, 1, 0)


class Config:
    """Writes a file, as those of transformers do."""

    def save_pretrained(self, folder):
        (folder / "config.json").write_text("{}")


def tensors():
    return [stored(f"t{n}", torch.full((size,), n, dtype=torch.int16)) for n, size in SIZES_BY_N]


SIZES_BY_N = list(enumerate(SIZES))


def write(folder, **options):
    return write_checkpoint(folder, tensors(), config=Config(), **options)


def contents(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found.update(safetensors.torch.load_file(file))
    return found


@pytest.mark.parametrize(
    ("limit", "shards"),
    [(2**30, [6]), (80, [2, 1, 1, 2]), (1, [1, 1, 1, 1, 1, 1]), (232, [5, 1]), (140, [3, 1, 2])],
)
def test_shards(tmp_path, limit, shards):
    # 2 bytes a number; an empty tensor never needs a shard of its own, unless it comes after one
    # that is too large
    found = split_into_shards(tensors(), limit)
    assert [tensor.name for shard in found for tensor in shard] == [f"t{n}" for n, _ in SIZES_BY_N]
    for shard in found:
        assert sum(tensor.bytes for tensor in shard) <= limit or len(shard) == 1
    folder = write(tmp_path / "out", max_shard_bytes=limit)
    ours = contents(folder)
    assert len(list(folder.glob("*.safetensors"))) == len(found)
    for n, size in SIZES_BY_N:
        assert torch.equal(ours[f"t{n}"], torch.full((size,), n, dtype=torch.int16))
    if len(found) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_size": 2 * sum(SIZES)}
        for name, file in index["weight_map"].items():
            assert name in safetensors.torch.load_file(folder / file)


def test_no_tensor_at_all(tmp_path):
    folder = write_checkpoint(tmp_path / "out", [], config=Config())
    assert contents(folder) == {}


def test_tensors_that_share_memory(tmp_path):
    whole = torch.arange(6.0)
    parts = [stored("a", whole), stored("b", whole[2:]), stored("c", whole, torch.float16)]
    ours = contents(write_checkpoint(tmp_path / "out", parts, config=Config()))
    assert torch.equal(ours["b"], whole[2:]) and ours["c"].dtype == torch.float16


def test_an_empty_folder_is_taken_and_a_full_one_is_not(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    write(folder)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(UserError, match="nothing is overwritten: got a folder with config.json"):
        write(folder)
    assert sorted(path.name for path in folder.iterdir()) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="nothing is overwritten: got a file"):
        write(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_folder_stays_itself(tmp_path, small_disk):
    """A link, or a mount point, and what a killed writer left there."""
    disk = small_disk(256)
    (disk / ".0123abcd.partial").mkdir()
    (tmp_path / "link").symlink_to(disk)
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and disk.is_mount()
    names = {".0123abcd.partial", "config.json", "model.safetensors"}
    assert {entry.name for entry in disk.iterdir()} == names
    assert len(contents(disk)) == len(SIZES)


def test_names_as_long_as_they_may_be(tmp_path):
    assert len(contents(write(tmp_path / ("n" * 255)))) == len(SIZES)
    with pytest.raises(UserError, match="cannot be written: got .*File name too long"):
        write(tmp_path / ("n" * 300))


@pytest.mark.parametrize("limit", [0, -1, True, 2.5, "2GB", None])
def test_shard_sizes_that_are_none(tmp_path, limit):
    with pytest.raises(UserError, match="max_shard_bytes is not a number of bytes"):
        write(tmp_path / "out", max_shard_bytes=limit)
    assert list(tmp_path.iterdir()) == []


def failing(error, after):
    """A `save_file` that writes `after` files and then a half."""
    save_file, done = safetensors.torch.save_file, []

    def fails(tensors, path, metadata=None):
        if len(done) < after:
            done.append(path)
            return save_file(tensors, path, metadata=metadata)
        path.write_bytes(b"half")
        raise error

    return fails


FULL = "the disk became full while .*out was written.*what was written is removed"


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), UserError, FULL),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), UserError, FULL),
        (
            safetensors.SafetensorError("I/O error: No space left on device (os error 28)"),
            UserError,
            FULL,
        ),
        (PermissionError(errno.EACCES, "denied"), UserError, "out cannot be written: got .*denied"),
        (safetensors.SafetensorError("odd"), UserError, "out cannot be written: got odd"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (UserError("a weight is gone"), UserError, "a weight is gone"),
    ],
)
@pytest.mark.parametrize("after", [0, 2])
def test_nothing_half_written_remains(tmp_path, monkeypatch, error, kind, message, after):
    monkeypatch.setattr(safetensors.torch, "save_file", failing(error, after))
    with pytest.raises(kind, match=message):
        write(tmp_path / "out", max_shard_bytes=80)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_stays_where_writing_fails(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(safetensors.torch, "save_file", failing(OSError(errno.ENOSPC, "full"), 1))
    with pytest.raises(UserError, match="became full"):
        write(tmp_path / "out", max_shard_bytes=80)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_that_is_too_small_is_seen_before_the_first_byte(tmp_path, monkeypatch):
    gib = 2**30
    usage = SimpleNamespace(free=3 * gib)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    def never():
        raise AssertionError("nothing is made")

    large = [PlannedTensor("t", (2 * gib,), torch.bfloat16, never)]
    with pytest.raises(UserError, match=r"too small.*got 3.00 GiB free; allowed: 4.04 GiB or more"):
        write_checkpoint(tmp_path / "out", large, config=Config())
    assert list(tmp_path.iterdir()) == []
