"""Every kernel compiles for the GPUs that it is for, and a kernel that would not run is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from colab_qlora.errors import UserError
from colab_qlora.kernels import compile_check
from colab_qlora.kernels.backend import HAS_TRITON
from colab_qlora.kernels.compile_check import (
    KERNEL_MODULES,
    Result,
    check,
    exit_status,
    load_cases,
    main,
    table_row,
)

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")

ROOT = Path(__file__).resolve().parent.parent.parent

# sm_75 compiles everything. All of sm_80, sm_86 and sm_90 takes 100 s of one core, so for sm_80 and
# sm_90 every kernel is compiled in bf16 (the elementwise ones were in fp16, for sm_75), but flash
# attention only with heads of 128 and the causal mask. Left out there: flash attention with heads
# of 64 and 256 or without the mask, and everything in fp16. For sm_86, where shared memory is
# scarce, it is flash attention alone, with its largest tiles, the heads of 256, and the mask.
FLASH_WIDTH = {80: 128, 86: 256, 90: 128}


def run(folder: Path, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """A program in a process that compiles, whatever this one does, with caches in `folder`."""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    kept |= {"HOME": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}
    kept |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.run(
        [sys.executable, *command],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_check(folder: Path, *arguments: str, **environment: str) -> tuple[str, list[Result]]:
    """The check's table and its results, if it found nothing wrong."""
    file = folder / "results.json"
    command = ["-m", "colab_qlora.kernels.compile_check", "--json", str(file), *arguments]
    done = run(folder, command, **environment)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout, [Result(**row) for row in json.loads(file.read_text())["results"]]


def quick_names(capability: int) -> list[str]:
    names = []
    # kernels without a half type have no case of that name
    for case in load_cases(capability, ["bf16", "label_count"]):
        width = case.constexprs.get("HEAD_DIM")
        if width is not None and case.uses_dot:
            chosen = width == FLASH_WIDTH[capability] and case.constexprs.get("CAUSAL", True)
        else:
            chosen = capability != 86
        if chosen:
            names.append(case.name)
    return names


def test_all_of_it_for_a_t4(tmp_path):
    # the variable set, as for all tests here: the check has to start itself anew
    table, results = run_check(tmp_path, "--capability", "75", TRITON_INTERPRET="1")
    cases = load_cases(75)
    assert [result.case for result in results] == [case.name for case in cases]
    skipped = {result.case for result in results if result.status == "skipped"}
    assert skipped == {case.name for case in cases if case.uses_dot}
    assert len(skipped) > 10 and all(
        name.startswith(("flash_attention_", "glu_lora_")) for name in skipped
    )
    for result in results:
        if result.status == "skipped":
            assert result.reason == "tl.dot has no tensor cores below sm_80"
            assert f"skipped: {result.reason}" in row_of(table, result.case)
            continue
        assert result.status == "compiled" and result.reason == ""
        assert result.spill_store_bytes == result.spill_load_bytes == 0
        assert 8 <= result.registers <= 255 and 0 <= result.shared_bytes <= 64 * 1024
        assert result.ptx_bytes > 5000 and result.milliseconds > 5
        assert " 0/0 " in row_of(table, result.case)
    # a T4 knows no bf16
    assert not any("bf16" in result.case for result in results)
    assert table.splitlines()[-1] == f"{len(cases) - len(skipped)} compiled, {len(skipped)} " + (
        "skipped, 0 failed"
    )


def row_of(table: str, name: str) -> str:
    (row,) = (line for line in table.splitlines() if re.match(rf"{re.escape(name)} +\d", line))
    return row


@pytest.mark.parametrize("capabilities", [(80, 90), (86,)], ids=str)
def test_a_selection_for_newer_gpus(capabilities, tmp_path):
    names = quick_names(capabilities[0])
    kernels = {case.kernel for case in load_cases(capabilities[0], names)}
    if 86 not in capabilities:
        assert kernels == {case.kernel for case in load_cases(capabilities[0])}
    else:
        assert len(kernels) == 4
    options = ["--capability", *map(str, capabilities), "--case", *names]
    _, results = run_check(tmp_path, *options)
    ran = [(result.capability, result.case) for result in results]
    assert ran == [(capability, name) for capability in capabilities for name in names]
    assert all(result.status == "compiled" for result in results)
    limits = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}
    assert all(result.shared_bytes <= limits[result.capability] for result in results)


def test_kernels_that_would_not_run_are_refused(tmp_path):
    names = ["good", "spills", "shared memory", "hidden dot", "no code", "other arguments"]
    done = run(tmp_path, [str(Path(__file__).with_name("bad_kernels.py")), *names])
    assert done.returncode == 1, done.stderr[-2000:]
    results = {row["case"]: Result(**row) for row in json.loads(done.stdout)}
    assert list(results) == names
    good = results.pop("good")
    assert (good.status, good.reason, exit_status([good])) == ("compiled", "", 0)
    assert all(result.status == "failed" for result in results.values())
    assert all(exit_status([good, result]) == 1 for result in results.values())
    assert results["spills"].reason == "spills registers"
    assert results["spills"].spill_store_bytes > 0 and results["spills"].spill_load_bytes > 0
    assert results["shared memory"].reason == "needs more than 65536 bytes of shared memory"
    assert results["shared memory"].shared_bytes > 65536
    assert results["hidden dot"].reason == "holds a tl.dot, but uses_dot is False"
    assert results["no code"].reason.startswith("CompileTimeAssertionFailure")
    assert "a block this large is refused" in results["no code"].reason
    assert "got ['SIZE', 'x', 'y']; allowed: ['BLOCK', 'x', 'y']" in (
        results["other arguments"].reason
    )
    assert "failed: spills registers" in table_row(results["spills"])
    assert "failed: CompileTimeAssertionFailure" in table_row(results["no code"])


def test_no_kernel_module_is_forgotten():
    folder = Path(compile_check.__file__).parent
    pattern = re.compile(r"^def compile_cases\(", re.MULTILINE)
    found = {path.stem for path in folder.glob("*.py") if pattern.search(path.read_text())}
    assert sorted(found) == sorted(KERNEL_MODULES)
    names = [case.name for case in load_cases(90)]
    assert len(names) == len(set(names))


def test_the_blocks_of_flash_attention_are_those_of_the_gpu():
    small, large = (load_cases(capability, ["flash_attention_forward"]) for capability in (86, 90))
    assert [case.name for case in small] == [case.name for case in large]
    assert [case.constexprs for case in small] != [case.constexprs for case in large]


def test_bf16_stands_beside_fp16_and_changes_nothing_else():
    cases = {case.name: case for case in load_cases(80)}
    assert not any("*bf16" in case.signature.values() for case in load_cases(75))
    for name, case in cases.items():
        if not name.endswith(" bf16"):
            has_half = "*fp16" in case.signature.values()
            assert has_half == (f"{name} bf16" in cases)
            continue
        plain = cases[name.removesuffix(" bf16")]
        for argument, kind in plain.signature.items():
            assert case.signature[argument] == ("*bf16" if kind == "*fp16" else kind)
        assert (case.constexprs, case.options) == (plain.constexprs, plain.options)


def test_what_cannot_be_checked_is_said(monkeypatch, capsys):
    monkeypatch.setattr(compile_check, "is_interpreting", lambda: False)
    assert main(["--case", "no_such_kernel"]) == 2
    assert "no case has such a name: got no_such_kernel" in capsys.readouterr().err
    assert main(["--capability", "70"]) == 2
    assert "capability is not known: got 70; allowed: 75, 80" in capsys.readouterr().err
    monkeypatch.setattr(compile_check, "is_interpreting", lambda: True)
    with pytest.raises(UserError, match="imported as an interpreter, which compiles nothing"):
        check([], 75)
