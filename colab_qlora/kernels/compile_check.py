"""Compile every kernel for GPUs that need not be here, and say what would not run on them.

    python -m colab_qlora.kernels.compile_check [--capability 75 80 90] [--case NAME] [--json FILE]

Each case of each kernel goes through Triton and its ptxas for a compute capability, with the
options of its launch. Registers and spills are what `ptxas -v` reports when Triton calls it
(cuobjdump's LOCAL leaves them out); shared memory is what the launch would ask for. A case fails
if it does not compile, if it spills on a GPU of `SPILL_FREE`, if it needs more shared memory than a
program gets there, or if it holds a `tl.dot` that it does not own up to. From sm_80 up, "*fp16" is
compiled as "*bf16" too.

Exit status: 0 if all is well, 1 if a case fails, 2 if the check itself could not run.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from colab_qlora.errors import UserError
from colab_qlora.kernels.backend import HAS_TRITON, is_interpreting
from colab_qlora.kernels.compile_case import BFLOAT, HALF, CompileCase
from colab_qlora.kernels.compile_report import (
    Result,
    counts_line,
    exit_status,
    table_head,
    table_row,
    write_json,
)

# every module that has a compile_cases of its own
KERNEL_MODULES = (
    "rms_norm",
    "rope",
    "swiglu",
    "glu_lora",
    "nf4",
    "nf4_many",
    "nf4_group",
    "mixed_group",
    "nf4_search",
    "int8_decode",
    "lora_borders",
    "copy_rows",
    "qkv_gradients",
    "label_count",
    "cross_entropy_rows",
    "flash_attention",
    "flash_attention_backward",
)

DEFAULT_CAPABILITIES = (75, 80, 90)

# the most that one program can have, by NVIDIA's CUDA programming guide
SHARED_MEMORY_BYTES = {
    75: 64 * 1024,
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}

# what runs on a T4 are small kernels that have no need to; a large tile of flash attention may lose
# less by a few spills than by being smaller (flash_attention_parts.py)
SPILL_FREE = (75,)

# the first capability with bf16, and with tensor cores that Triton can use
_AMPERE = 80

_NO_DOT = "tl.dot has no tensor cores below sm_80"


def load_cases(capability: int, names: Sequence[str] = ()) -> list[CompileCase]:
    """The cases of all kernels as they are launched on a capability, bf16 among them.

    Args:
        capability: such as 75. A `compile_cases` that takes a capability gets it.
        names: only cases whose name contains one of these; all of them if empty.
    """
    cases: list[CompileCase] = []
    for module_name in KERNEL_MODULES:
        module = importlib.import_module(f"colab_qlora.kernels.{module_name}")
        if "capability" in inspect.signature(module.compile_cases).parameters:
            cases += module.compile_cases(capability=divmod(capability, 10))
        else:
            cases += module.compile_cases()
    if capability >= _AMPERE:
        cases += [_as_bfloat16(case) for case in cases if HALF in case.signature.values()]
    return [case for case in cases if not names or any(name in case.name for name in names)]


def _as_bfloat16(case: CompileCase) -> CompileCase:
    kinds = {name: BFLOAT if kind == HALF else kind for name, kind in case.signature.items()}
    return dataclasses.replace(case, name=f"{case.name} bf16", signature=kinds)


def compile_kernel(case: CompileCase, capability: int, **options: Any) -> tuple[Any, str]:
    """Compile one case, whatever GPU is here, and whatever Triton's cache holds.

    Args:
        case: the kernel and its arguments.
        capability: such as 75.
        **options: further options of Triton's, over those of the case.

    Returns:
        Triton's CompiledKernel, with the stages in `.asm` and `.metadata`; and ptxas' report.

    Raises:
        UserError: no Triton, Triton's interpreter instead of its compiler, or a case that names
            other arguments than its kernel has.
    """
    _check_can_compile()
    from triton import compile as compile_source
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = _check_names(case)
    source = ASTSource(
        case.kernel,
        {name: case.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in case.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible_by_16},
    )
    launch = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    printed = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), redirect_stdout(printed):
        # a kernel from the cache would bring no report
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        target = GPUTarget("cuda", capability, 32)
        compiled = compile_source(source, target, {**launch, **case.options, **options})
    return compiled, printed.getvalue()


def _check_can_compile() -> None:
    if not HAS_TRITON:
        raise UserError("kernels cannot be compiled", got="no package triton", allowed="Linux only")
    if is_interpreting():
        raise UserError(
            "Triton was imported as an interpreter, which compiles nothing",
            got="TRITON_INTERPRET=1",
            do="Unset it and start Python again",
        )


def _check_names(case: CompileCase) -> list[str]:
    names = list(case.kernel.arg_names)
    given = sorted([*case.signature, *case.constexprs])
    if given != sorted(names) or not set(case.divisible_by_16) <= set(case.signature):
        raise UserError(f"{case.name} does not fit its kernel", got=given, allowed=sorted(names))
    return names


def check_case(case: CompileCase, capability: int) -> Result:
    """Compile one case and hold it against the limits of a capability."""
    if case.uses_dot and capability < _AMPERE:
        return Result(case.name, capability, "skipped", _NO_DOT)
    start = time.perf_counter()
    try:
        compiled, report = compile_kernel(case, capability)
        milliseconds = (time.perf_counter() - start) * 1000
        result = Result(
            case=case.name,
            capability=capability,
            status="compiled",
            registers=max(_counts(r"Used (\d+) registers", report)),
            shared_bytes=compiled.metadata.shared,
            # a function that was not inlined has a line of its own
            spill_store_bytes=sum(_counts(r"(\d+) bytes spill stores", report)),
            spill_load_bytes=sum(_counts(r"(\d+) bytes spill loads", report)),
            ptx_bytes=len(compiled.asm["ptx"]),
            milliseconds=round(milliseconds, 1),
        )
    except Exception as error:  # whatever the compiler raises is the finding
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " | ".join([type(error).__name__, *lines[-3:]])
        return Result(case.name, capability, "failed", reason)
    problems = list(_broken_limits(result))
    if "tt.dot" in compiled.asm["ttir"] and not case.uses_dot:
        problems.append("holds a tl.dot, but uses_dot is False")
    if not problems:
        return result
    return dataclasses.replace(result, status="failed", reason="; ".join(problems))


def _counts(pattern: str, report: str) -> list[int]:
    found = [int(count) for count in re.findall(pattern, report)]
    if not found:
        raise UserError("ptxas' report is not understood", got=repr(report), allowed=pattern)
    return found


def _broken_limits(result: Result) -> Iterator[str]:
    limit = SHARED_MEMORY_BYTES[result.capability]
    if (result.shared_bytes or 0) > limit:
        yield f"needs more than {limit} bytes of shared memory"
    if result.capability in SPILL_FREE and (result.spill_store_bytes or result.spill_load_bytes):
        yield "spills registers"


def check(cases: Iterable[CompileCase], capability: int) -> Iterator[Result]:
    """`check_case` for every case, each when it is asked for.

    Raises:
        UserError: nothing can be compiled here, or the capability's limits are not known.
    """
    _check_can_compile()
    if capability not in SHARED_MEMORY_BYTES:
        allowed = ", ".join(map(str, SHARED_MEMORY_BYTES))
        raise UserError("capability is not known", got=capability, allowed=allowed)
    return (check_case(case, capability) for case in cases)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m colab_qlora.kernels.compile_check")
    parser.add_argument(
        "--capability", type=int, nargs="+", default=DEFAULT_CAPABILITIES, metavar="SM"
    )
    parser.add_argument(
        "--case", nargs="+", default=[], metavar="NAME", help="only cases with this in their name"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check from the command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(arguments)
    if is_interpreting():
        # Triton reads the variable when a kernel is decorated, so a process keeps to it
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "colab_qlora.kernels.compile_check", *arguments]
        return subprocess.run(command, env=environment, check=False).returncode
    results: list[Result] = []
    try:
        _check_can_compile()
        print(table_head())
        for capability in options.capability:
            for result in check(load_cases(capability, options.case), capability):
                results.append(result)
                print(table_row(result), flush=True)
        if not results:
            raise UserError("no case has such a name", got=", ".join(options.case))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if options.json is not None:
        write_json(options.json, results)
    print(counts_line(results))
    return exit_status(results)


if __name__ == "__main__":
    sys.exit(main())
