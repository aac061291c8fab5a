"""The install ladder against a fake pip: no network, nothing installed."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest
from metadata_helpers import COLAB, READY

from colab_qlora import install, install_report, pip_tools, selftest
from colab_qlora.errors import UserError
from colab_qlora.install import (
    SOURCES,
    CommandResult,
    install_missing,
    missing_requirements,
    self_test,
    write_constraints,
)
from colab_qlora.pip_tools import failure_kind, failure_line, run_command
from colab_qlora.requirements import REQUIREMENTS, canonical_name

NO_INDEX = "ERROR: Could not find a version that satisfies the requirement {0} (from versions: none)\nERROR: No matching distribution found for {0}\n"  # noqa: E501
CONFLICT = "ERROR: Cannot install {0} because these package versions have conflicting dependencies.\nERROR: ResolutionImpossible: for help visit ...\n"  # noqa: E501


class FakePip:
    """Installs into a dictionary. `answer` may return the output of a failure for a command."""

    def __init__(self, installed, newest, answer=lambda command: None, moves=None):
        self.installed, self.newest, self.answer = dict(installed), newest, answer
        self.moves = moves or {}
        self.calls: list[list[str]] = []
        self.environs: list[dict | None] = []
        self.constraints: list[str] = []

    def __call__(self, command, environ=None):
        assert command[:3] == [sys.executable, "-m", "pip"]
        arguments = [part for part in command[3:] if not part.startswith("--")]
        self.calls.append(arguments)
        self.environs.append(environ)
        if "-c" in arguments:
            path = arguments[arguments.index("-c") + 1]
            with open(path) as file:
                self.constraints.append(file.read())
        output = self.answer(command)
        if output is not None:
            return CommandResult(1, output)
        if arguments[0] == "uninstall":
            self.installed.pop(arguments[-1], None)
            return CommandResult(0, "")
        start = 3 if "-c" in arguments else 1
        for requirement in arguments[start:]:
            name = canonical_name(re.match(r"[\w.-]+", requirement)[0])
            self.installed[name] = self.newest[name]
        self.installed.update(self.moves)
        return CommandResult(0, "Successfully installed")

    def versions(self):
        return dict(self.installed)


NEWEST = {
    "trl": "0.29.1",
    "bitsandbytes": "0.50.2",
    "gguf": "0.19.0",
    "torch": "2.13.0",
    "transformers": "5.23.0",
}


def go(pip, **options):
    options = {"platform": "colab", "has_cuda_gpu": True, "modules": (), **options}
    lines: list[str] = []
    report = install_missing(on_line=lines.append, run=pip, versions=pip.versions, **options)
    return report, "\n".join(lines)


@pytest.fixture(autouse=True)
def cpu_torch_and_known_torchao(monkeypatch):
    for module in (install, install_report):
        monkeypatch.setattr(module, "torch_cuda_build", lambda: None)
        monkeypatch.setattr(module, "torchao_minimum", lambda: "0.16.0")


# what is missing


def test_missing_on_colab():
    assert missing_requirements(COLAB, has_cuda_gpu=True) == ["bitsandbytes>=0.49", "trl>=0.29.1"]
    assert missing_requirements(READY, has_cuda_gpu=True) == []


def test_an_installed_torch_is_never_asked_for():
    old = {**READY, "torch": "2.4.0"}
    assert missing_requirements(old, has_cuda_gpu=True) == []
    assert "torch>=2.11,<2.14" in missing_requirements({}, has_cuda_gpu=False)


def test_newer_than_tested_is_left_alone():
    assert missing_requirements({**READY, "transformers": "6.1"}, has_cuda_gpu=True) == []
    old = {**READY, "transformers": "4.57.6"}
    assert missing_requirements(old, has_cuda_gpu=True) == ["transformers>=5.15,<6"]


@pytest.mark.skipif(sys.platform != "linux", reason="triton has wheels for Linux only")
def test_triton_only_with_a_gpu_and_as_torch_pins_it(monkeypatch):
    without = {name: version for name, version in READY.items() if name != "triton"}
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["jinja2", "sympy>=1.13.3"])
    assert missing_requirements(without, has_cuda_gpu=False) == []
    assert missing_requirements(without, has_cuda_gpu=True) == ["triton>=3.6"]
    pinned = ['triton==3.6.0; platform_system == "Linux"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: pinned)
    assert missing_requirements(without, has_cuda_gpu=True) == ["triton==3.6.0"]


# constraints


def distribution(name, version, url=None):
    return SimpleNamespace(
        metadata={"Name": name},
        version=version,
        files=None,
        read_text=lambda file: url if file == "direct_url.json" else None,
    )


DISTRIBUTIONS = [
    distribution("torch", "2.11.0+cu128"),
    distribution("nvidia-cublas-cu12", "12.8.4.1"),
    distribution("Jinja2", "3.1.6"),
    distribution("bitsandbytes", "0.45.0"),
    distribution("mine", "0.1", url='{"url": "file:///home/me/mine"}'),
    distribution("from-git", "1.0.dev0", url='{"url": "https://example.org/x", "vcs_info": {}}'),
    distribution("odd", "1.2-ubuntu3.1"),
    distribution("trl", "0.30.0.dev0"),
    distribution("Jinja2", "2.0"),
    distribution(None, "1.0"),
]


def test_constraints_pin_what_is_installed(tmp_path):
    path = write_constraints(
        tmp_path / "c.txt", leave_free=["bitsandbytes"], distributions=lambda: DISTRIBUTIONS
    )
    assert path.read_text().splitlines() == [
        "Jinja2==3.1.6",
        "nvidia-cublas-cu12==12.8.4.1",
        "torch==2.11.0+cu128",
        "trl==0.30.0.dev0",
    ]


def test_constraints_of_the_core(tmp_path):
    path = write_constraints(
        tmp_path / "c.txt", core_only=True, distributions=lambda: DISTRIBUTIONS
    )
    assert path.read_text().splitlines() == ["nvidia-cublas-cu12==12.8.4.1", "torch==2.11.0+cu128"]


def test_constraints_keep_a_torch_from_a_local_file(tmp_path):
    local = [distribution("torch", "2.13.0+cpu", url='{"url": "file:///wheels/torch.whl"}')]
    path = write_constraints(tmp_path / "c.txt", distributions=lambda: local)
    assert path.read_text() == "torch==2.13.0+cpu\n"


def test_constraints_of_this_very_machine(tmp_path):
    requirements = pytest.importorskip("packaging.requirements")
    for line in write_constraints(tmp_path / "c.txt").read_text().splitlines():
        requirements.Requirement(line)


# what a failure means


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        (NO_INDEX.format("trl"), "index"),
        (CONFLICT.format("trl") + NO_INDEX.format("trl"), "conflict"),
        ("Retrying ... Temporary failure in name resolution", "index"),
        ("ReadTimeoutError: Read timed out.", "index"),
        ("ERROR: HTTP error 503 while getting ...", "index"),
        ("error: Microsoft Visual C++ is required", "other"),
        ("ERROR: Could not install packages due to an OSError: No space left on device", "other"),
    ],
)
def test_failure_kinds(output, kind):
    assert failure_kind(output) == kind


def test_failure_line_is_the_last_error():
    text = "Collecting x\nERROR: first\nERROR: No matching distribution found for trl\n[notice] pip"
    assert failure_line(text) == "No matching distribution found for trl"
    assert failure_line("") == "no output"
    conflict = (
        "ERROR: Cannot install a, b\n\nThe conflict is caused by:\n    a 2 depends on hub>=1\n"
        "    a 1 depends on hub>=1\n    The user requested (constraint) hub==0.36\n\n"
        "To fix this\nERROR: ResolutionImpossible: for help"
    )
    assert failure_line(conflict) == (
        "a 2 depends on hub>=1; The user requested (constraint) hub==0.36"
    )


def test_run_command_keeps_status_and_output():
    code = "import os, sys; print(os.environ['X_TEST']); print('err', file=sys.stderr); sys.exit(3)"
    result = run_command([sys.executable, "-c", code], {"X_TEST": "value"})
    assert result.returncode == 3 and {"value", "err"} <= set(result.output.split())
    assert run_command(["/no/such/program"]).returncode == 127


# the ladder


def test_colab_gets_what_it_lacks_and_keeps_the_rest():
    pip = FakePip(COLAB, NEWEST)
    report, text = go(pip)
    assert report.ok and report.torch_kept and not report.restart_needed and not report.moved
    assert pip.calls[0] == ["uninstall", "-y", "torchao"]
    assert pip.calls[1][0] == "install" and pip.calls[1][3:] == [
        "bitsandbytes>=0.49",
        "trl>=0.29.1",
    ]
    assert len(pip.calls) == 2
    assert report.changes == {
        "bitsandbytes": (None, "0.50.2"),
        "torchao": ("0.10.0", None),
        "trl": (None, "0.29.1"),
    }
    assert "missing: bitsandbytes>=0.49, trl>=0.29.1" in text
    assert "torchao: 0.10.0 -> removed" in str(report)


def test_a_ready_machine_runs_nothing():
    pip = FakePip(READY, NEWEST)
    report, _ = go(pip)
    assert report.ok and pip.calls == [] and str(report) == "nothing to do"


@pytest.mark.parametrize(
    ("platform", "remove", "removed"),
    [
        ("colab", None, True),
        ("kaggle", None, True),
        ("plain", None, False),
        ("plain", True, True),
        ("colab", False, False),
    ],
)
def test_torchao_is_removed_where_nobody_asked_for_it(platform, remove, removed):
    pip = FakePip({**READY, "torchao": "0.10.0"}, NEWEST)
    report, _ = go(pip, platform=platform, remove_torchao=remove)
    assert ("torchao" not in pip.installed) is removed
    assert ("pip uninstall -y torchao" in str(report)) is not removed


def test_an_index_that_fails_then_git():
    def answer(command):
        last = command[-1]
        return None if "git+" in last else NO_INDEX.format(last)

    pip = FakePip(COLAB, NEWEST, answer)
    report, text = go(pip, remove_torchao=False)
    assert report.ok
    assert [call[-1] for call in pip.calls] == [
        "trl>=0.29.1",  # both together
        "bitsandbytes>=0.49",
        f"bitsandbytes @ {SOURCES['bitsandbytes']}",
        "trl>=0.29.1",
        f"trl @ {SOURCES['trl']}",
    ]
    assert all("-c" in call for call in pip.calls)
    assert "from source by git" in text


def test_without_any_index_the_build_tools_are_the_machines_own():
    def answer(command):
        return None if "--no-build-isolation" in command else NO_INDEX.format("setuptools>=77")

    pip = FakePip({**READY, "trl": "0.20"}, NEWEST, answer)
    report, _ = go(pip)
    assert report.ok and len(pip.calls) == 3
    assert pip.calls[-1] == ["install", f"trl @ {SOURCES['trl']}"]


def test_a_source_build_of_bitsandbytes_asks_for_cuda(monkeypatch):
    monkeypatch.setattr(install, "torch_cuda_build", lambda: "12.8")
    pip = FakePip(COLAB, NEWEST, lambda command: None if "git+" in command[-1] else NO_INDEX)
    go(pip, remove_torchao=False)
    used = dict(zip((call[-1] for call in pip.calls), pip.environs, strict=True))
    assert used[f"bitsandbytes @ {SOURCES['bitsandbytes']}"] == {
        "CMAKE_ARGS": "-DCOMPUTE_BACKEND=cuda"
    }
    assert used[f"trl @ {SOURCES['trl']}"] is None


def test_one_bad_package_does_not_stop_the_others():
    def answer(command):
        if any("bitsandbytes" in part for part in command):
            return "ERROR: Could not install packages due to an OSError: No space left on device"
        return None

    pip = FakePip(COLAB, NEWEST, answer)
    report, _ = go(pip)
    assert not report.ok and set(report.failed) == {"bitsandbytes"}
    assert "No space left" in report.failed["bitsandbytes"]
    assert pip.installed["trl"] == "0.29.1"


def test_a_conflict_loosens_all_but_the_core(monkeypatch, tmp_path):
    def answer(command):
        # the constraints file that holds only the core lets it pass
        return None if any("core" in part for part in command) else CONFLICT.format(command[-1])

    old = {**READY, "transformers": "4.57.6", "tokenizers": "0.22.0"}
    pip = FakePip(old, NEWEST, answer, moves={"tokenizers": "0.23.3"})
    report, text = go(pip, modules={"transformers", "tokenizers"})
    assert report.ok and report.torch_kept
    assert report.moved == ("tokenizers",)
    assert report.restart_needed and report.restart_because == ("tokenizers", "transformers")
    assert "restart the kernel" in str(report)
    assert "no version fits" in text
    assert all(line.split("==")[0] != "transformers" for line in pip.constraints[-1].splitlines())
    assert len(pip.constraints[-1]) < len(pip.constraints[0])


def test_constraints_follow_what_an_earlier_step_moved(monkeypatch):
    def answer(command):
        if len(command) - command.index("-c") > 3:
            return CONFLICT.format("all")
        lenient = "transformers" not in command[-1] or any("core" in part for part in command)
        return None if lenient else CONFLICT.format("transformers")

    old = {**COLAB, "transformers": "4.57.6", "huggingface-hub": "0.36.0"}
    pip = FakePip(old, NEWEST, answer, moves={"huggingface-hub": "1.33.0"})
    monkeypatch.setattr(
        "importlib.metadata.distributions",
        lambda: [distribution(name, version) for name, version in pip.installed.items()],
    )
    report, _ = go(pip, remove_torchao=False)
    assert report.ok and report.moved == ("huggingface-hub",)
    # holding the old hub would have made pip take transformers apart again
    last = pip.constraints[-1].splitlines()
    assert "huggingface-hub==1.33.0" in last and "transformers==5.23.0" in last
    assert not [line for line in last if line.startswith("trl")]


def test_a_source_that_cannot_be_cloned_is_tried_once():
    def answer(command):
        if "git+" in command[-1]:
            return "  fatal: unable to access: Could not resolve host: github.com\nerror: exit 128"
        return NO_INDEX.format(command[-1])

    pip = FakePip({**READY, "trl": "0.20"}, NEWEST, answer)
    report, _ = go(pip)
    assert len(pip.calls) == 2 and not report.ok
    assert report.failed["trl"] == (
        "No matching distribution found for trl>=0.29.1; "
        "from source: fatal: unable to access: Could not resolve host: github.com"
    )


def test_a_torch_that_moved_is_not_ok():
    pip = FakePip(COLAB, NEWEST, moves={"torch": "2.13.0"})
    report, _ = go(pip)
    assert not report.ok and not report.torch_kept
    assert "torch: 2.11.0+cu128 -> 2.13.0" in str(report)


def test_pip_success_without_effect_is_a_failure():
    pip = FakePip(COLAB, {**NEWEST, "trl": "0.10.0"})
    report, _ = go(pip)
    assert set(report.failed) == {"trl"} and "out of range" in report.failed["trl"]


def test_also_takes_further_packages():
    pip = FakePip(READY, NEWEST)
    report, _ = go(pip, also=["gguf>=0.17", "numpy", "datasets>=3"])
    assert report.wanted == ("gguf>=0.17",) and report.ok


def test_dry_run_runs_nothing():
    pip = FakePip(COLAB, NEWEST)
    report, text = go(pip, dry_run=True)
    assert pip.calls == [] and report.dry_run and not report.changes
    assert report.wanted == ("bitsandbytes>=0.49", "trl>=0.29.1")
    assert report.commands[0] == "pip uninstall -y torchao"
    assert re.fullmatch(
        r'pip install -c \S+ "bitsandbytes>=0.49" "trl>=0.29.1"', report.commands[1]
    )
    assert "would run: pip uninstall -y torchao" in str(report)


def test_no_torch_is_refused():
    pip = FakePip({}, NEWEST)
    with pytest.raises(UserError, match='Install torch first: pip install "torch>=2.11,<2.14"'):
        go(pip)
    assert pip.calls == []
    everything = {requirement.name: requirement.minimum for requirement in REQUIREMENTS}
    report, _ = go(FakePip({}, everything), allow_torch=True)
    assert report.ok and report.wanted[0] == "torch>=2.11,<2.14"


def test_no_pip_is_refused():
    pip = FakePip(COLAB, NEWEST, lambda command: "/usr/bin/python3: No module named pip")
    with pytest.raises(UserError, match="ensurepip"):
        go(pip, remove_torchao=False)


def test_what_pip_cannot_know_is_a_note(monkeypatch):
    monkeypatch.setattr(install_report, "torch_cuda_build", lambda: "13.0")
    monkeypatch.setattr(install_report, "bitsandbytes_cuda_versions", lambda: ("126", "128"))
    report, _ = go(FakePip({**READY, "torch": "2.8.0"}, NEWEST))
    assert "torch 2.8.0 is too old" in str(report)
    assert "no library for torch's CUDA 13.0" in str(report)


def test_commands_ask_nothing():
    command = pip_tools.pip_command("install", "x")
    assert "--no-input" in command and command[:3] == [sys.executable, "-m", "pip"]
    assert "--force-reinstall" not in command


# self test


def test_self_test_on_this_machine():
    pytest.importorskip("torch")
    pytest.importorskip("bitsandbytes")
    result = self_test()
    assert result.ok, str(result)
    assert result.nf4_error is not None and 0.05 < result.nf4_error < 0.15
    assert result.dtype in ("bfloat16", "float16", "float32") and len(result.lines) == 3


@pytest.mark.parametrize("name", ["torch", "bitsandbytes"])
def test_self_test_names_what_is_missing(monkeypatch, name):
    if name != "torch":
        pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, name, None)
    result = self_test()
    assert not result.ok and result.lines[0].startswith(f"{name} cannot be imported")


def test_self_test_catches_a_wrong_decode(monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(selftest, "_round_trip_error", lambda *arguments: 0.9)
    result = self_test()
    assert not result.ok and "expected 0.05 to 0.15" in result.lines[0]


def test_self_test_never_raises(monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("bitsandbytes")

    def fail(*arguments):
        raise RuntimeError("CUDA error: out of memory\nmore")

    monkeypatch.setattr(selftest, "_round_trip_error", fail)
    result = self_test(seconds=0)
    assert not result.ok
    assert result.lines[0] == "4-bit check failed: RuntimeError: CUDA error: out of memory"
    assert "slower than 0 s" in result.lines[-1]
