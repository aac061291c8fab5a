"""Where measured rates are kept, for how long, and who measures."""

from __future__ import annotations

import dataclasses
import errno
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from machines import LARGE

from colab_qlora.activations import profile_cache
from colab_qlora.activations.gpu_profile import profile_of_this_machine
from colab_qlora.activations.measure_profile import Measured
from colab_qlora.activations.model_shape import ModelShape
from colab_qlora.activations.profile_cache import cached_profile, read_profile, write_profile
from colab_qlora.errors import UserError

SHAPE = ModelShape(2, 64, 96, 4, 2, 16, 101)
HAS_GPU = torch.cuda.is_available()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A GPU that is measured by counting; `sizes` were asked for."""
    found = SimpleNamespace(name="a GPU", total_memory=7, sizes=[], is_sound=True, seconds=0.0)

    def measured(shape: ModelShape, tokens: int, seq_length: int) -> Measured:
        found.sizes.append((tokens, seq_length))
        time.sleep(found.seconds)
        return Measured(dataclasses.replace(LARGE, name=f"{len(found.sizes)}"), found.is_sound)

    monkeypatch.setenv("COLAB_QLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(profile_cache, "measure_or_recorded", measured)
    return found


def new_process() -> None:
    profile_cache._known.clear()


def test_a_profile_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    assert read_profile(path) is None
    write_profile(path, LARGE)
    assert read_profile(path) == LARGE
    assert [entry.name for entry in path.parent.iterdir()] == ["x.json"]
    fields = json.loads(path.read_text("utf-8"))
    for broken in (
        "{",
        "[]",
        *(json.dumps({**fields, name: 0}) for name in fields if name.endswith("_flops_per_s")),
        json.dumps({**fields, "move_bytes_per_s": "fast"}),
        json.dumps({**fields, "decode_bytes_per_s": float("nan")}),
        json.dumps({**fields, "copy_up_bytes_per_s": float("inf")}),
        json.dumps({**fields, "copy_up_bytes_per_s": -1.0}),
        json.dumps({**fields, "layer_launch_s": None}),
        json.dumps({**fields, "memory_bytes": None}),
        json.dumps({**fields, "memory_bytes": 1.5}),
        json.dumps({**fields, "attention": 3}),
        json.dumps({**fields, "capability": [7]}),
        json.dumps({**fields, "capability": "75"}),
        json.dumps({**fields, "another": 1}),
        json.dumps({name: value for name, value in fields.items() if name != "source"}),
    ):
        path.write_text(broken, "utf-8")
        assert read_profile(path) is None, broken
    whole = dataclasses.replace(LARGE, copy_down_bytes_per_s=0, copy_up_bytes_per_s=0.0)
    write_profile(path, whole)
    assert read_profile(path) == whole


def test_two_writers_have_files_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written: list[Path] = []
    write = Path.write_text

    def spied(path: Path, text: str, **options: str) -> int:
        written.append(path)
        return write(path, text, **options)

    monkeypatch.setattr(Path, "write_text", spied)
    for _ in range(2):
        write_profile(tmp_path / "x.json", LARGE)
    assert len(set(written)) == 2
    assert {path.parent for path in written} == {tmp_path}


def test_what_cannot_be_written_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "x.json"
    write_profile(path, LARGE)
    write = Path.write_text

    def full(self: Path, text: str, **options: str) -> int:
        write(self, text[:20], **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    write_profile(path, dataclasses.replace(LARGE, name="another"))
    monkeypatch.undo()
    assert read_profile(path) == LARGE
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "file").write_text("", "utf-8")
    write_profile(tmp_path / "file" / "x.json", LARGE)  # no folder can be made there


def test_it_is_measured_once_for_all_sizes_of_a_power_of_two(gpu: SimpleNamespace) -> None:
    first = cached_profile(SHAPE, 3000, 1500)
    assert gpu.sizes == [(4096, 2048)]
    for _ in range(2):
        assert cached_profile(SHAPE, 4096, 2048) == first
        assert len(gpu.sizes) == 1
        new_process()
    cached_profile(SHAPE, 100_000, 50_000)
    assert gpu.sizes[1:] == [(8192, 8192)]


def test_a_batch_of_few_tokens_is_measured_too(gpu: SimpleNamespace) -> None:
    assert cached_profile(SHAPE, 40, 20).is_measured
    assert gpu.sizes == [(128, 32)]


def test_what_rates_depend_on_has_files_of_its_own(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measures_anew() -> bool:
        before = len(gpu.sizes)
        cached_profile(SHAPE, 512, 512)
        return len(gpu.sizes) > before

    assert measures_anew()
    assert not measures_anew()
    cached_profile(dataclasses.replace(SHAPE, hidden=128), 512, 512)
    for target, name, value in (
        (gpu, "name", "another"),
        (gpu, "total_memory", 8),
        (profile_cache, "FORMAT", profile_cache.FORMAT + 1),
        (profile_cache, "__version__", "another"),
        (profile_cache, "_processor", lambda: ("another", 2)),
        (torch, "__version__", "another"),
        (torch.backends.cuda, "flash_sdp_enabled", lambda: False),
        (torch, "are_deterministic_algorithms_enabled", lambda: True),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            assert measures_anew(), name
        assert not measures_anew()


def test_the_processor_has_a_name() -> None:
    name, count = profile_cache._processor()
    assert name
    assert count


def test_what_is_not_sound_is_forgotten_with_the_process(
    gpu: SimpleNamespace, tmp_path: Path
) -> None:
    gpu.is_sound = False
    for process in range(1, 3):
        for _ in range(2):
            assert cached_profile(SHAPE, 512, 512).name == f"{process}"
        assert not list(tmp_path.rglob("*.json"))
        new_process()


def test_a_folder_that_takes_no_files_costs_one_measurement_a_process(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    monkeypatch.setenv("COLAB_QLORA_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        assert cached_profile(SHAPE, 512, 512).name == "1"


def test_who_waited_reads_what_the_other_wrote(gpu: SimpleNamespace) -> None:
    """Locks are of open files, so that threads stand for processes."""
    gpu.seconds = 0.4
    names: list[str] = []

    def process() -> None:
        names.append(cached_profile(SHAPE, 512, 512).name)

    threads = [threading.Thread(target=process) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names == ["1"] * 3
    assert len(gpu.sizes) == 1


def test_nobody_waits_for_ever(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(profile_cache, "LONGEST_WAIT_S", 0.2)
    folder = tmp_path / "gpu_profiles"
    folder.mkdir()
    with (folder / "measuring.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        start = time.monotonic()
        assert cached_profile(SHAPE, 512, 512).name == "1"
        assert time.monotonic() - start >= 0.2

    def refuse(file: object, what: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert cached_profile(SHAPE, 1024, 512).name == "2"


def test_an_error_while_measuring_lets_the_next_one_measure(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> Measured:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(profile_cache, "LONGEST_WAIT_S", 5.0)
    with monkeypatch.context() as patch:
        patch.setattr(profile_cache, "measure_or_recorded", fail)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            cached_profile(SHAPE, 512, 512)
    fcntl = pytest.importorskip("fcntl")
    with (profile_cache.profile_path(SHAPE, 512, 512).parent / "measuring.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert cached_profile(SHAPE, 512, 512).name == "1"


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_told_to_name_one() -> None:
    with pytest.raises(UserError, match='Name one: gpu="T4"'):
        profile_of_this_machine(SHAPE, 8, 8)
