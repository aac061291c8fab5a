"""A disk that is full is told in one line, whichever library met it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from colab_qlora.disk import is_disk_full, readable_write_errors
from colab_qlora.errors import UserError

FULL = r"^the disk became full while out was written: got .*No space left on device.*is removed\.$"


@pytest.fixture
def full_file(tmp_path: Path) -> Path:
    """A file that takes no byte.

    A link, since some libraries write beside a file and rename, which would replace the device.
    """
    if not Path("/dev/full").is_char_device():
        pytest.skip("there is no /dev/full here")
    (tmp_path / "file").symlink_to("/dev/full")
    return tmp_path / "file"


def by_python(file: Path) -> None:
    file.write_text("1")


def by_tokenizers(file: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(file))


def by_torch(file: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save(torch.zeros(100_000), file)


@pytest.mark.parametrize("write", [by_python, by_tokenizers])
def test_a_full_disk_is_told_whoever_wrote(full_file: Path, write: Callable[[Path], None]) -> None:
    with pytest.raises(UserError, match=FULL), readable_write_errors(Path("out")):
        write(full_file)


def test_torch_says_it_in_words_of_its_own(full_file: Path) -> None:
    with (
        pytest.raises(UserError, match="^the disk became full while out was written: got "),
        readable_write_errors(Path("out")),
    ):
        by_torch(full_file)


def test_tokenizers_raises_no_os_error(full_file: Path) -> None:
    # what makes a list of classes to catch fall short
    with pytest.raises(Exception, match="os error 28") as caught:
        by_tokenizers(full_file)
    assert type(caught.value) is Exception and is_disk_full(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("I/O error: No space left on device (os error 28)", "^the disk became full"),
        ("I/O error: Disk quota exceeded (os error 122)", "^the disk became full"),
        ("I/O error: Read-only file system (os error 30)", "^out cannot be written: got I/O"),
        ("odd", "^out cannot be written: got odd; allowed"),
    ],
)
def test_errors_of_safetensors(text: str, message: str) -> None:
    safetensors = pytest.importorskip("safetensors")
    with pytest.raises(UserError, match=message), readable_write_errors(Path("out")):
        raise safetensors.SafetensorError(text)


def test_tokenizers_other_failed_writes(tmp_path: Path) -> None:
    # a folder in the place of its file
    with (
        pytest.raises(UserError, match=r"^out cannot be written: got .*\(os error 21\)"),
        readable_write_errors(Path("out")),
    ):
        by_tokenizers(tmp_path)


@pytest.mark.parametrize(
    "error",
    [UserError("a weight is gone"), RuntimeError("odd"), KeyboardInterrupt(), KeyError("q_proj")],
)
def test_what_is_no_failed_write_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, readable_write_errors(Path("out")):
        raise error
    assert caught.value is error


def test_a_full_disk_while_a_model_is_fetched() -> None:
    pytest.importorskip("safetensors")
    from colab_qlora.models.readable_errors import readable_errors

    # of hf_xet, which fetches from the hub; OSError is Python's
    rust = RuntimeError("IO Error: No space left on device (os error 28)")
    for error in (rust, OSError(errno.ENOSPC, "No space left on device")):
        with (
            pytest.raises(UserError, match="^the disk is full while the model is fetched: got "),
            readable_errors("some/model"),
        ):
            raise error
