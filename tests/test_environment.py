"""Platforms, dtypes, memory and problems, on machines made of folders and a fake torch."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from metadata_helpers import T4

from colab_qlora import environment, host, requirements
from colab_qlora.environment import (
    Environment,
    cpu_has_native_bfloat16,
    detect_platform,
    find_problems,
    has_native_bfloat16,
    inspect_environment,
    pick_compute_dtype,
    resolve_dtype,
)
from colab_qlora.errors import UserError
from colab_qlora.problems import Problem, has_cuda_library
from colab_qlora.requirements import REQUIREMENTS, is_older, release, version_state

GIB = 1024**3
CPU = dataclasses.replace(
    T4,
    platform="plain",
    torch_version="2.13.0+cpu",
    cuda_build=None,
    gpu_count=0,
    gpu_name=None,
    compute_capability=None,
    gpu_total_gib=None,
    gpu_free_gib=None,
    compute_dtype="bfloat16",
    versions={**T4.versions, "triton": None},
)


def fake_torch(
    capability=None,
    name="Tesla T4",
    cuda="12.8",
    arches=("sm_75", "sm_80", "sm_90"),
    free_gib=14.6,
    total_gib=14.74,
    count=1,
    error="Found no NVIDIA driver on your system.",
):
    """A stand-in for torch on a machine with that GPU; capability None is a machine without one."""

    def init():
        if capability is None:
            raise RuntimeError(error)

    cuda_module = SimpleNamespace(
        is_available=lambda: capability is not None,
        # what the real one says on a T4, where bfloat16 is emulated
        is_bf16_supported=lambda: True,
        current_device=lambda: 0,
        device_count=lambda: count,
        get_device_capability=lambda index=None: capability,
        get_device_name=lambda index=None: name,
        get_arch_list=lambda: list(arches),
        mem_get_info=lambda index=None: (int(free_gib * GIB), int(total_gib * GIB)),
        init=init,
    )
    return SimpleNamespace(
        __version__="2.11.0+cu128" if cuda else "2.11.0+cpu",
        version=SimpleNamespace(cuda=cuda),
        cuda=cuda_module,
        float16="torch.float16",
        bfloat16="torch.bfloat16",
        float32="torch.float32",
    )


def write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def with_cpu_bfloat16(monkeypatch, has: bool) -> None:
    monkeypatch.setattr("colab_qlora.dtypes.cpu_has_native_bfloat16", lambda: has)


# platform


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"COLAB_RELEASE_TAG": "release-colab-external_20260819"}, "colab"),
        ({"COLAB_GPU": "1"}, "colab"),
        ({"KAGGLE_KERNEL_RUN_TYPE": "Interactive", "COLAB_GPU": ""}, "kaggle"),
        ({"RUNPOD_POD_ID": "abc"}, "runpod"),
        ({}, "plain"),
    ],
)
def test_platform_by_variable(environ, expected, tmp_path):
    assert detect_platform(environ, tmp_path) == expected


def test_platform_lambda_by_its_package_source(tmp_path):
    folder = tmp_path / "etc/apt/sources.list.d"
    folder.mkdir(parents=True)
    assert detect_platform({}, tmp_path) == "plain"
    (folder / "lambda.list").write_text("deb ...\n")
    assert detect_platform({}, tmp_path) == "lambda"


def test_platform_by_the_colab_package(monkeypatch, tmp_path):
    for name in ("KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG", "COLAB_GPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environment, "_is_importable", lambda name: name == "google.colab")
    assert detect_platform(None, tmp_path) == "colab"


# dtypes


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 0), False), ((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True)],
)
def test_native_bfloat16_of_a_gpu(capability, expected):
    assert has_native_bfloat16(capability) is expected


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 sse\n", True),
        ("flags : fpu amx_bf16\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("flags : fpu avx512f avx2\n", False),
        ("", False),
    ],
)
def test_native_bfloat16_of_a_cpu(cpuinfo, expected, tmp_path):
    assert cpu_has_native_bfloat16(write(tmp_path, proc__cpuinfo=cpuinfo)) is expected


def test_native_bfloat16_without_cpuinfo(tmp_path):
    assert cpu_has_native_bfloat16(tmp_path) is False


def test_compute_dtype_of_gpus():
    assert pick_compute_dtype(fake_torch((7, 5))) == "torch.float16"
    assert pick_compute_dtype(fake_torch((8, 0))) == "torch.bfloat16"
    assert pick_compute_dtype(fake_torch((9, 0))) == "torch.bfloat16"


@pytest.mark.parametrize(("has", "expected"), [(True, "torch.bfloat16"), (False, "torch.float32")])
def test_compute_dtype_of_cpus(monkeypatch, has, expected):
    with_cpu_bfloat16(monkeypatch, has)
    assert pick_compute_dtype(fake_torch(None)) == expected


@pytest.mark.parametrize("asked", [None, "auto", "bfloat16", "bf16", "torch.bfloat16"])
def test_resolve_on_a_t4(asked):
    dtype, note = resolve_dtype(asked, "cuda:0", fake_torch((7, 5)))
    assert dtype == "torch.float16"
    if asked in (None, "auto"):
        assert note is None
    else:
        assert note is not None
        assert "sm_75" in note and "float16" in note and "\n" not in note


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("fp16", "torch.float16"), ("float32", "torch.float32"), ("torch.BF16", "torch.bfloat16")],
)
def test_resolve_keeps_what_an_a100_can_do(asked, expected):
    assert resolve_dtype(asked, "cuda", fake_torch((8, 0))) == (expected, None)


@pytest.mark.parametrize(("has", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_resolve_never_gives_float16_on_a_cpu(monkeypatch, has, expected):
    with_cpu_bfloat16(monkeypatch, has)
    dtype, note = resolve_dtype("half", "cpu", fake_torch(None))
    assert dtype == f"torch.{expected}"
    assert note is not None and expected in note
    assert resolve_dtype("bf16", "cpu", fake_torch(None)) == ("torch.bfloat16", None)


def test_resolve_takes_real_dtypes():
    torch = pytest.importorskip("torch")
    assert resolve_dtype(torch.float32, "cpu") == (torch.float32, None)
    assert resolve_dtype("torch.bfloat16", torch.device("cpu"))[0] is torch.bfloat16


@pytest.mark.parametrize("asked", ["int4", "float64", "", 16])
def test_resolve_refuses_an_unknown_name(asked):
    with pytest.raises(UserError, match="dtype is unknown") as caught:
        resolve_dtype(asked, "cuda", fake_torch((8, 0)))
    assert "bfloat16" in str(caught.value)


def test_resolve_refuses_a_gpu_that_is_not_there():
    with pytest.raises(UserError, match="sees no GPU"):
        resolve_dtype("fp16", "cuda", fake_torch(None))


def test_dtype_without_torch_is_a_user_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="doctor"):
        pick_compute_dtype()


# memory

MEMINFO = "MemTotal: 16777216 kB\nMemFree: 1024 kB\nMemAvailable: 8388608 kB\n"


def test_host_memory_without_a_limit(tmp_path):
    assert host.host_memory_gib(write(tmp_path, proc__meminfo=MEMINFO)) == (16.0, 8.0)


def test_host_memory_in_a_container(tmp_path):
    root = write(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/pod/one\n")
    folder = root / "sys/fs/cgroup/pod"
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text(f"{6 * GIB}\n")
    (folder / "memory.current").write_text(f"{3 * GIB}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {GIB}\n")
    (root / "sys/fs/cgroup/pod/one").mkdir()
    (root / "sys/fs/cgroup/pod/one/memory.max").write_text("max\n")
    assert host.host_memory_gib(root) == (6.0, 4.0)


def test_host_memory_in_an_old_container(tmp_path):
    root = write(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="4:cpu,memory:/docker/1\n")
    folder = root / "sys/fs/cgroup/memory"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(f"{2 * GIB}")
    (folder / "memory.usage_in_bytes").write_text(f"{GIB}")
    assert host.host_memory_gib(root) == (2.0, 1.0)
    (folder / "memory.limit_in_bytes").write_text("9223372036854771712")
    assert host.host_memory_gib(root) == (16.0, 8.0)


def test_host_memory_unknown(tmp_path):
    assert host.host_memory_gib(tmp_path) == (None, None)


def test_driver_gpus_from_a_fake_program(tmp_path):
    program = tmp_path / "smi"
    program.write_text("#!/bin/sh\necho 'Tesla T4'\necho 'Tesla T4'\n")
    program.chmod(0o755)
    assert host.driver_gpu_names(str(program)) == ("Tesla T4", "Tesla T4")
    program.write_text("#!/bin/sh\necho 'could not talk to the driver'\nexit 9\n")
    assert host.driver_gpu_names(str(program)) == ()
    assert host.driver_gpu_names(str(tmp_path / "absent")) == ()


# versions


def test_versions_compare_by_their_numbers():
    assert release("2.11.0+cu128") == (2, 11, 0)
    assert not is_older("2.11.0", "2.11") and not is_older("2.11", "2.11.0")
    assert is_older("2.9.1", "2.11") and is_older("0.15.9", "0.16.0")
    torch = next(requirement for requirement in REQUIREMENTS if requirement.name == "torch")
    assert [version_state(v, torch) for v in (None, "2.10.0", "2.13.1+cpu", "2.14.0a0")] == [
        "missing",
        "too old",
        "ok",
        "too new",
    ]


def test_table_agrees_with_the_requirements_file():
    path = Path(__file__).parents[1] / "requirements.txt"
    if not path.exists():
        pytest.skip("no requirements.txt beside the tests")
    lines = path.read_text().splitlines()
    for requirement in REQUIREMENTS:
        want = f"{requirement.name}>={requirement.minimum}"
        assert any(line.split(",")[0].split(";")[0].strip() == want for line in lines), want


def test_torchao_minimum_is_read_from_peft(monkeypatch, tmp_path):
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft/__init__.py").write_text("raise RuntimeError('must not be imported')")
    (tmp_path / "peft/import_utils.py").write_text(
        'TORCHAO_MINIMUM_VERSION = packaging.version.parse("0.21.0")\n'
    )
    monkeypatch.delitem(sys.modules, "peft", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert requirements.torchao_minimum() == "0.21.0"
    (tmp_path / "peft/import_utils.py").write_text("# rewritten upstream\n")
    assert requirements.torchao_minimum() == requirements.TORCHAO_MINIMUM


# inspect


@pytest.fixture
def no_driver(monkeypatch):
    monkeypatch.setattr(environment, "driver_gpu_names", tuple)


def test_inspect_a_t4():
    env = inspect_environment(torch_module=fake_torch((7, 5)), environ={"COLAB_GPU": "1"})
    assert (env.platform, env.gpu_name, env.compute_capability) == ("colab", "Tesla T4", (7, 5))
    assert env.gpu_free_gib == pytest.approx(14.6) and env.gpu_total_gib == pytest.approx(14.74)
    assert env.compute_dtype == "float16"
    assert not env.has_native_bf16 and not env.has_triton_matmul and env.gpu_in_torch_build


def test_inspect_an_a100():
    module = fake_torch((8, 0), name="NVIDIA A100-SXM4-40GB", free_gib=39, total_gib=39.4)
    env = inspect_environment(torch_module=module, environ={})
    assert env.compute_dtype == "bfloat16" and env.has_native_bf16 and env.has_triton_matmul


def test_inspect_no_gpu(no_driver, tmp_path):
    env = inspect_environment(torch_module=fake_torch(None, cuda=None), environ={}, root=tmp_path)
    assert (env.gpu_count, env.gpu_name, env.cuda_error) == (0, None, None)
    assert env.compute_dtype in ("bfloat16", "float32") and not env.has_triton_matmul


def test_inspect_a_driver_that_is_too_old(monkeypatch):
    monkeypatch.setattr(environment, "driver_gpu_names", lambda: ("Tesla T4",))
    error = "The NVIDIA driver on your system is too old (found version 11040)."
    env = inspect_environment(torch_module=fake_torch(None, error=error), environ={})
    assert env.cuda_error is not None and "too old" in env.cuda_error
    assert env.driver_gpus == ("Tesla T4",)


def test_inspect_a_gpu_held_by_another_program():
    module = fake_torch((7, 5))

    def fail(index=None):
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy\nmore text")

    module.cuda.mem_get_info = fail
    env = inspect_environment(torch_module=module, environ={})
    assert env.cuda_error == "RuntimeError: CUDA error: all CUDA-capable devices are busy"
    assert env.gpu_free_gib is None
    assert "does not answer" in find_problems(env)[0].what


@pytest.mark.parametrize(
    ("capability", "arches", "expected"),
    [
        ((7, 5), ["sm_75", "sm_80"], True),
        ((8, 9), ["sm_75", "sm_80"], True),
        ((6, 0), ["sm_70", "sm_75", "sm_80"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((12, 0), ["sm_75", "sm_90a", "sm_100"], False),
        ((12, 0), ["sm_120"], True),
        ((9, 0), [], True),
    ],
)
def test_gpu_in_torch_build(capability, arches, expected):
    env = inspect_environment(torch_module=fake_torch(capability, arches=arches), environ={})
    assert env.gpu_in_torch_build is expected


def test_inspect_without_torch(monkeypatch, no_driver):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(environment, "installed_version", lambda name: None)
    env = inspect_environment(environ={})
    assert (env.torch_version, env.torch_error, env.compute_dtype) == (None, None, None)
    assert ("error", "torch is not installed") in {(p.severity, p.what) for p in find_problems(env)}


def test_inspect_a_torch_that_does_not_import(monkeypatch, no_driver, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise OSError('libcudart.so.12: not found')\n")
    (tmp_path / "torch/version.py").write_text("from typing import Optional\ncuda = '12.8'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    env = inspect_environment(environ={})
    assert env.torch_error == "OSError: libcudart.so.12: not found"
    assert env.cuda_build == "12.8"
    first = find_problems(env)[0]
    assert first.severity == "error" and "cannot be imported" in first.what


def test_inspect_imports_nothing_but_torch(no_driver):
    before = set(sys.modules)
    inspect_environment(torch_module=fake_torch((7, 5)), environ={})
    new = {name.partition(".")[0] for name in set(sys.modules) - before}
    assert not new & {"transformers", "peft", "bitsandbytes", "trl", "datasets", "matplotlib"}


# problems


def only(problems: list[Problem], text: str) -> Problem:
    found = [problem for problem in problems if text in problem.what]
    assert len(found) == 1, problems
    return found[0]


def change(env: Environment, **changes) -> list[Problem]:
    versions = {**env.versions, **changes.pop("versions", {})}
    return find_problems(dataclasses.replace(env, versions=versions, **changes))


def test_a_good_t4_has_only_the_note_about_itself():
    problems = find_problems(T4)
    assert [problem.severity for problem in problems] == ["info"]
    assert "sm_75" in problems[0].what and "SDPA" in problems[0].what


def test_a_good_a100_has_nothing():
    assert change(T4, gpu_name="A100", compute_capability=(8, 0)) == []


def test_no_gpu():
    assert only(find_problems(CPU), "no GPU").severity == "info"
    colab = only(change(CPU, platform="colab"), "no GPU")
    assert colab.severity == "warning"
    assert colab.command == "Runtime > Change runtime type > T4 GPU"


def test_triton_is_not_needed_without_a_gpu():
    assert not [problem for problem in find_problems(CPU) if "triton" in problem.what]
    assert only(change(T4, versions={"triton": None}), "triton").severity == "error"


@pytest.mark.parametrize(
    ("version", "severity", "text"),
    [
        (None, "error", "torch is not installed"),
        ("2.10.0+cu128", "error", "too old"),
        ("2.14.0", "warning", "not tested"),
    ],
)
def test_torch_versions(version, severity, text):
    problem = only(change(T4, torch_version=version, versions={"torch": version}), text)
    assert problem.severity == severity
    assert problem.command == 'pip install "torch>=2.11,<2.14"'


@pytest.mark.parametrize(
    ("name", "version", "severity"),
    [
        ("trl", None, "error"),
        ("trl", "0.28.0", "error"),
        ("transformers", "4.57.6", "error"),
        ("transformers", "6.0.0", "warning"),
        ("ipywidgets", None, "warning"),
        ("numpy", "1.26.4", "error"),
    ],
)
def test_packages(name, version, severity):
    problem = only(change(T4, versions={name: version}), name)
    assert problem.severity == severity
    assert problem.command.startswith(("python -m colab_qlora install", "pip install"))


def test_torchao():
    problem = only(change(T4, versions={"torchao": "0.10.0"}), "torchao")
    assert (problem.severity, problem.command) == ("error", "pip uninstall -y torchao")
    assert not [p for p in change(T4, versions={"torchao": "0.16.0"}) if "torchao" in p.what]


@pytest.mark.parametrize(
    ("cuda", "libraries", "version", "expected"),
    [
        ("12.8", ("126", "128"), "0.49.0", True),
        ("12.9", ("126", "128"), "0.49.0", False),
        ("12.9", ("126", "128"), "0.50.0", True),
        ("13.0", ("126", "128"), "0.50.2", False),
        ("12.8", (), "0.50.2", False),
    ],
)
def test_bitsandbytes_libraries(cuda, libraries, version, expected):
    assert has_cuda_library(cuda, libraries, version) is expected
    problems = change(
        T4, cuda_build=cuda, bitsandbytes_cuda=libraries, versions={"bitsandbytes": version}
    )
    if expected:
        assert not [problem for problem in problems if "bitsandbytes" in problem.what]
    else:
        problem = only(problems, "no library for torch's CUDA")
        assert (problem.severity, problem.command) == ("error", "pip install -U bitsandbytes")


def test_gpu_with_a_cpu_torch():
    problem = only(change(CPU, driver_gpus=("Tesla T4",)), "is a CPU build")
    assert problem.severity == "error"
    assert problem.command == 'pip uninstall -y torch && pip install "torch>=2.11,<2.14"'


def test_gpu_that_torch_cannot_use():
    problem = only(
        change(CPU, driver_gpus=("Tesla T4",), cuda_build="12.8", cuda_error="driver too old"),
        "cannot use it",
    )
    assert problem.severity == "error" and "driver too old" in problem.what


def test_gpu_that_is_hidden():
    problem = only(change(CPU, driver_gpus=("T4",), cuda_visible_devices=""), "hides every GPU")
    assert problem.severity == "info"


def test_gpu_that_this_torch_was_not_built_for():
    problems = change(
        T4,
        platform="kaggle",
        gpu_name="Tesla P100-PCIE-16GB",
        compute_capability=(6, 0),
        gpu_in_torch_build=False,
    )
    problem = only(problems, "holds no code")
    assert (problem.severity, problem.command) == ("error", "Settings > Accelerator > GPU T4 x2")


def test_room_and_company():
    problems = change(
        T4, python="3.14.0", disk_free_gib=2.0, host_free_gib=3.0, gpu_free_gib=6.0, gpu_count=2
    )
    assert only(problems, "Python 3.14.0").severity == "warning"
    assert only(problems, "of disk is free").severity == "warning"
    assert only(problems, "of host memory is free").severity == "warning"
    assert only(problems, "8.7 of 14.7 GiB of GPU memory").severity == "info"
    assert only(problems, "2 GPUs").severity == "info"


def test_errors_come_first_and_each_says_what_to_do():
    problems = change(
        T4, disk_free_gib=2.0, versions={"trl": None, "torchao": "0.10.0", "ipywidgets": None}
    )
    order = [problem.severity for problem in problems]
    assert order == sorted(order, key=["error", "warning", "info"].index)
    assert all(problem.command for problem in problems if problem.severity != "info")
