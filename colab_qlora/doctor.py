"""`python -m colab_qlora doctor`: the machine as a table, what is wrong, and what mends it.

The table and the JSON come from the same record, so they say the same.
"""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from colab_qlora.environment import Environment, Problem, find_problems, inspect_environment
from colab_qlora.requirements import REQUIREMENTS, version_state

WIDTH = 100
_LABEL = 18


def report(env: Environment, problems: Sequence[Problem]) -> dict[str, Any]:
    """Environment and problems as plain values for JSON.

    Returns:
        {"ok": no error-severity problem, "environment": every field, "problems": [{severity, what,
        command}]}.
    """
    return {
        "ok": not has_errors(problems),
        "environment": dataclasses.asdict(env),
        "problems": [dataclasses.asdict(problem) for problem in problems],
    }


def has_errors(problems: Sequence[Problem]) -> bool:
    """Whether one of the problems keeps the kit from training."""
    return any(problem.severity == "error" for problem in problems)


def run_doctor(
    as_json: bool = False,
    *,
    env: Environment | None = None,
    out: Callable[[str], object] = print,
) -> int:
    """Looks at the machine and prints what it finds.

    Args:
        as_json: print one JSON object instead of the table.
        env: what to report on; None looks at this machine.
        out: takes the text.

    Returns:
        The exit status: 1 if a problem is an error, else 0.
    """
    env = inspect_environment() if env is None else env
    problems = find_problems(env)
    if as_json:
        out(json.dumps(report(env, problems), indent=2))
    else:
        out(format_report(env, problems))
    return 1 if has_errors(problems) else 0


def format_report(env: Environment, problems: Sequence[Problem]) -> str:
    """The table of the environment and the list of problems, as text."""
    lines = [f"colab_qlora {env.versions.get('colab_qlora') or '(version unknown)'}", "", "machine"]
    lines += [_row(label, value) for label, value in _machine(env)]
    lines += ["", "packages"]
    lines += [_row(name, value) for name, value in _packages(env)]
    lines += ["", "problems" if problems else "problems: none found"]
    for problem in problems:
        lines += textwrap.wrap(
            f"{problem.severity}: {problem.what}",
            WIDTH,
            initial_indent="  ",
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        if problem.command:
            # never wrapped: it is there to be copied
            lines.append(f"    -> {problem.command}")
    return "\n".join(lines)


def _row(label: str, value: str) -> str:
    return f"  {label:<{_LABEL}}{value}".rstrip()


def _machine(env: Environment) -> list[tuple[str, str]]:
    rows = [
        ("platform", f"{env.platform}, {env.os}, Python {env.python}"),
        ("CPU", f"{env.cpu_count} core{'' if env.cpu_count == 1 else 's'}"),
        ("host memory", _free_of(env.host_free_gib, env.host_total_gib)),
        (
            "disk",
            "unknown" if env.disk_free_gib is None else f"{env.disk_free_gib:.1f} GiB free here",
        ),
        ("torch", _torch(env)),
        ("GPU", _gpu(env)),
    ]
    if env.gpu_count:
        rows.append(("GPU memory", _free_of(env.gpu_free_gib, env.gpu_total_gib)))
        rows.append(
            (
                "Triton matmul",
                "on" if env.has_triton_matmul else "off: matrix products go to cuBLAS",
            )
        )
    rows.append(("compute dtype", _dtype(env)))
    return rows


def _free_of(free: float | None, total: float | None) -> str:
    if total is None:
        return "unknown"
    return f"{total:.1f} GiB" if free is None else f"{free:.1f} GiB free of {total:.1f} GiB"


def _torch(env: Environment) -> str:
    if env.torch_version is None:
        return "not installed"
    build = f"CUDA {env.cuda_build} build" if env.cuda_build else "CPU build"
    return f"{env.torch_version} ({build})" + (", import fails" if env.torch_error else "")


def _gpu(env: Environment) -> str:
    if not env.gpu_count:
        return f"{env.driver_gpus[0]}, which torch does not see" if env.driver_gpus else "none"
    major, minor = env.compute_capability or (0, 0)
    count = f"{env.gpu_count} x " if env.gpu_count > 1 else ""
    return f"{count}{env.gpu_name}, compute capability {major}.{minor}"


def _dtype(env: Environment) -> str:
    if env.compute_dtype is None:
        return "unknown without torch"
    where = "GPU" if env.gpu_count else "CPU"
    native = "has" if env.has_native_bf16 else "has no"
    return f"{env.compute_dtype} (this {where} {native} native bfloat16)"


def _packages(env: Environment) -> list[tuple[str, str]]:
    requirements = {requirement.name: requirement for requirement in REQUIREMENTS}
    rows: list[tuple[str, str]] = []
    for name, version in env.versions.items():
        if name == "colab_qlora":
            continue
        requirement = requirements.get(name)
        shown = version or "-"
        if requirement is None:
            rows.append((name, shown))
            continue
        state = version_state(version, requirement)
        if state == "missing" and requirement.gpu_only and not env.gpu_count:
            state_text = "not needed without a GPU"
        else:
            state_text = f"{state}, needs {requirement.range}"
        rows.append((name, f"{shown:<16}{state_text}"))
    return rows
