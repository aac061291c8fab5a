"""The listing of a folder."""

from __future__ import annotations

import pytest

from colab_qlora import UserError
from colab_qlora.teaching import list_files


def test_files_are_listed_by_size_with_their_sum(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "large.bin").write_bytes(b"0" * 1_500_000)
    (tmp_path / "small.json").write_bytes(b"0" * 2_000)
    assert list_files(tmp_path).splitlines() == [
        "       1.500 MB  inner/large.bin",
        "       0.002 MB  small.json",
        f"       1.502 MB  in {tmp_path}",
    ]


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        list_files(tmp_path / "nothing")
