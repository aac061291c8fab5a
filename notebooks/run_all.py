"""Execute the notebooks in order with papermill and leave the results in one folder.

    python notebooks/run_all.py [NAME ...] [--out out] [--model embedded] [-p NAME VALUE ...]

A notebook whose source, parameters and kit are the same as in the last complete run is not run
again.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ORDER = (
    "00_quickstart",
    "01_install",
    "02_load_4bit_model",
    "03_attach_lora",
    "04_format_data",
    "05_train",
    "06_read_loss_curves",
    "07_chat_and_export",
)
CELL_TIMEOUT_SECONDS = 1800
# small models take higher learning rates than the 2e-4 that suits an 8B
EMBEDDED_LEARNING_RATE = 2e-3


def main() -> int:
    """Run the notebooks; exit status 1 if one of them failed."""
    options = _parse()
    out = Path(options.out).absolute()
    (out / "notebooks").mkdir(parents=True, exist_ok=True)
    stamps_file = out / "notebooks" / "done.json"
    stamps = json.loads(stamps_file.read_text()) if stamps_file.is_file() else {}
    began = time.monotonic()
    kit = HERE.parent
    sources = [*kit.glob("colab_qlora/**/*.py"), *kit.glob("data_samples/**/*.jsonl")]
    before = _hash_files(sorted(sources), json.dumps(_versions()))
    for name in ORDER:
        parameters = _parameters(name, out, options)
        # a stage builds on the ones before it, so its stamp builds on theirs too
        files = [Path(str(v)) for v in parameters.values() if Path(str(v)).is_file()]
        sources = [HERE / f"{name}.ipynb", *files]
        before = _hash_files(sources, before + json.dumps(parameters))
        if options.names and name not in options.names:
            continue
        is_there = (out / "notebooks" / f"{name}.ipynb").is_file()
        if stamps.get(name) == before and is_there and not options.force:
            print(f"{name}: unchanged since the last run", flush=True)
            continue
        # a training that this very run left unfinished goes on; any other begins anew
        if "resume" in _known_parameters(name) and "resume" not in parameters:
            parameters["resume"] = stamps.get(f"{name} begun") == before and not options.force
        stamps.pop(name, None)
        stamps[f"{name} begun"] = before
        stamps_file.write_text(json.dumps(stamps, indent=1) + "\n")
        seconds = _execute(name, parameters, out)
        if seconds is None:
            return 1
        print(f"{name}: done in {seconds:.0f} s", flush=True)
        stamps[name] = stamps.pop(f"{name} begun")
        stamps_file.write_text(json.dumps(stamps, indent=1) + "\n")
    _summary(out, time.monotonic() - began)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks to run; all of them if none is named")
    parser.add_argument("--out", default="out", help="folder for everything that the run leaves")
    parser.add_argument("--model", default="embedded", help="model_name of every notebook")
    parser.add_argument("--force", action="store_true", help="run unchanged notebooks again")
    parser.add_argument(
        "-p",
        dest="parameters",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a further parameter, given to the notebooks that have it (VALUE is JSON or text)",
    )
    options = parser.parse_args()
    known = set().union(*(_known_parameters(name) for name in ORDER))
    unknown = [name for name, _ in options.parameters if name not in known]
    if unknown:
        parser.error(f"no notebook has {', '.join(unknown)}; they have {', '.join(sorted(known))}")
    missing = [name for name in options.names if name not in ORDER]
    if missing:
        parser.error(f"no notebook is called {', '.join(missing)}; there are {', '.join(ORDER)}")
    return options


def _parameters(name: str, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Those parameters that this notebook's parameter cell knows."""
    wanted: dict[str, Any] = {"work_dir": str(out), "model_name": options.model}
    if options.model == "embedded":
        wanted["learning_rate"] = EMBEDDED_LEARNING_RATE
    for key, value in options.parameters:
        try:
            wanted[key] = json.loads(value)
        except ValueError:
            wanted[key] = value
    known = _known_parameters(name)
    return {key: value for key, value in wanted.items() if key in known}


def _known_parameters(name: str) -> set[str]:
    notebook = json.loads((HERE / f"{name}.ipynb").read_text(encoding="utf-8"))
    cells = [c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", [])]
    lines = "".join(cells[0]["source"]).split("\n")
    return {line.split(":")[0].split("=")[0].strip() for line in lines}


def _versions() -> dict[str, str]:
    found = {"python": sys.version}
    for name in ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "matplotlib"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def _hash_files(paths: list[Path], start: str = "") -> str:
    digest = hashlib.sha256(start.encode())
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _execute(name: str, parameters: dict[str, Any], out: Path) -> float | None:
    import papermill

    print(f"\n== {name} {parameters}", flush=True)
    # imports of a notebook start from its folder; the kit must be found there when it is not
    # installed
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    )
    began = time.monotonic()
    try:
        papermill.execute_notebook(
            str(HERE / f"{name}.ipynb"),
            str(out / "notebooks" / f"{name}.ipynb"),
            parameters=parameters,
            kernel_name="python3",
            cwd=str(out),
            progress_bar=False,
            stdout_file=sys.stdout,
            stderr_file=sys.stderr,
            execution_timeout=CELL_TIMEOUT_SECONDS,
            # what a cell prints piece by piece is one output, as a person sees it
            coalesce_streams=True,
        )
    except papermill.PapermillExecutionError as error:
        what = f"{error.ename}: {error.evalue}"
        print(f"\n{name} failed in cell {error.exec_count}: {what}", flush=True)
        print(f"the notebook up to there: {out / 'notebooks' / (name + '.ipynb')}", flush=True)
        return None
    return time.monotonic() - began


def _summary(out: Path, seconds: float) -> None:
    print(f"\nall notebooks done in {seconds:.0f} s; results in {out}")
    for path in sorted(out.iterdir()):
        print("  " + path.name + ("/" if path.is_dir() else ""))
    answers = out / "answers.json"
    if answers.is_file():
        content = json.loads(answers.read_text(encoding="utf-8"))
        for part in ("question", "before", "after"):
            print(f"{part + ':':<10}{content[part]}")


if __name__ == "__main__":
    raise SystemExit(main())
