"""The doctor's table, its JSON and the exit statuses of the command line."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import metadata_helpers
import pytest

from colab_qlora import __main__ as command_line
from colab_qlora.doctor import WIDTH, format_report, report, run_doctor
from colab_qlora.environment import Environment, find_problems
from colab_qlora.errors import UserError
from colab_qlora.install_report import InstallReport

ROOT = Path(__file__).parents[1]
T4 = dataclasses.replace(
    metadata_helpers.T4,
    versions={**metadata_helpers.T4.versions, "IPython": "7.34.0", "colab_qlora": "0.1.0"},
)
ILL = dataclasses.replace(T4, versions={**T4.versions, "torchao": "0.10.0", "trl": None})


def test_table_of_a_t4():
    text = format_report(T4, find_problems(T4))
    for part in (
        "colab_qlora 0.1.0",
        "Tesla T4, compute capability 7.5",
        "14.6 GiB free of 14.7 GiB",
        "2.11.0+cu128 (CUDA 12.8 build)",
        "float16 (this GPU has no native bfloat16)",
        "off: matrix products go to cuBLAS",
        "ok, needs >=5.15,<6",
        "info: Tesla T4 (sm_75)",
    ):
        assert part in text
    assert text.isascii() and max(map(len, text.splitlines())) <= WIDTH


def test_table_without_anything():
    empty = Environment()
    text = format_report(empty, find_problems(empty))
    assert "torch             not installed" in text
    assert "unknown" in text and '-> pip install "torch>=2.11,<2.14"' in text


def test_table_without_problems():
    fine = dataclasses.replace(T4, gpu_name="A100", compute_capability=(8, 0))
    assert "problems: none found" in format_report(fine, find_problems(fine))


def test_commands_stand_whole_on_their_line():
    text = format_report(ILL, find_problems(ILL))
    assert "    -> pip uninstall -y torchao" in text.splitlines()
    assert "    -> python -m colab_qlora install" in text.splitlines()


@pytest.mark.parametrize(("env", "status"), [(T4, 0), (ILL, 1)])
def test_exit_status_and_json(env, status):
    out: list[str] = []
    assert run_doctor(True, env=env, out=out.append) == status
    assert run_doctor(False, env=env, out=out.append) == status
    data = json.loads(out[0])
    assert data["ok"] is (status == 0)
    assert data["environment"]["compute_capability"] == [7, 5]
    problems = find_problems(env)
    assert [entry["what"] for entry in data["problems"]] == [problem.what for problem in problems]
    for entry in data["problems"]:
        assert entry["severity"] in ("error", "warning", "info")
        assert " ".join(entry["what"].split()) in " ".join(out[1].split())
        assert entry["command"] in out[1]
    for name, version in data["environment"]["versions"].items():
        assert name in out[1] and (version or "-") in out[1]


def test_report_is_plain_values():
    assert json.loads(json.dumps(report(T4, []))) is not None


# the command line


def test_every_command_has_help(capsys):
    for arguments in (["--help"], ["doctor", "--help"], ["install", "--help"]):
        with pytest.raises(SystemExit) as stop:
            command_line.main(arguments)
        assert stop.value.code == 0
    assert "--dry-run" in capsys.readouterr().out


def test_no_command_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.main([])
    assert stop.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("colab_qlora ")


def test_a_further_command_is_one_function(monkeypatch):
    def add_count(subparsers):
        parser = subparsers.add_parser("count")
        parser.add_argument("tokens", type=int)
        parser.set_defaults(handler=lambda options: options.tokens)

    monkeypatch.setattr(command_line, "COMMANDS", (*command_line.COMMANDS, add_count))
    assert command_line.main(["count", "7"]) == 7


def test_a_user_error_is_one_line(monkeypatch, capsys):
    def fail(**options):
        raise UserError("torch is not installed", do="Install torch first")

    monkeypatch.setattr("colab_qlora.install.install_missing", fail)
    assert command_line.main(["install"]) == 2
    assert capsys.readouterr().err == "error: torch is not installed. Install torch first.\n"


@pytest.mark.parametrize(("failed", "status"), [({}, 0), ({"trl": "no network"}, 1)])
def test_install_passes_its_options(monkeypatch, capsys, failed, status):
    seen = {}

    def fake(**options):
        seen.update(options)
        return InstallReport(failed=failed, changes={"numpy": ("2.0", "2.1")})

    monkeypatch.setattr("colab_qlora.install.install_missing", fake)
    assert command_line.main(["install", "--dry-run", "--no-remove-torchao"]) == status
    assert seen == {"dry_run": True, "remove_torchao": False, "allow_torch": False}
    assert "restart the kernel" in capsys.readouterr().out


def test_doctor_in_a_process_of_its_own():
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "colab_qlora", "doctor", "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environ,
        timeout=300,
    )
    data = json.loads(done.stdout)
    assert done.returncode == (0 if data["ok"] else 1), done.stderr
    assert data["environment"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "peft", "ipykernel", "colab_qlora"} <= set(data["environment"]["versions"])


def test_doctor_without_torch_in_a_process_of_its_own(tmp_path):
    # -S leaves site-packages out, so nothing but the standard library and this package is there
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-S", "-m", "colab_qlora", "doctor"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environ,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    assert "error: torch is not installed" in done.stdout
    assert '-> pip install "torch>=2.11,<2.14"' in done.stdout
    assert "Traceback" not in done.stderr
