"""Which tiles suit `glu_lora_backward` on the GPU that is here: all forms, the fastest first.

    python -m benchmarks.glu_lora_forms [--tokens 4096] [--width 14336] [--rank 16]

Every form is compiled, timed with a cold cache and written to the JSON; those that the kernel takes
are marked. Needs a CUDA GPU of compute capability 8.0 or later.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch

from benchmarks import record
from benchmarks.gpu_timing import Timer, pick_device
from benchmarks.table import format_table
from colab_qlora.kernels import glu_lora
from colab_qlora.kernels.glu_lora import Form, glu_lora_backward
from colab_qlora.kernels.launch import ReadyLaunches

TOKENS, COLUMNS, STAGES = (16, 32), (64, 128), (2, 3, 4)
PROGRAMS = (2, 4, 5, 8, 16)
SHOWN = 12


def main() -> None:
    """Time every form, print the fastest, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=14336)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    timer = Timer(pick_device("benchmarks.glu_lora_forms", is_dry=False))
    tensors = _tensors(options, timer.device)
    rows = []
    for form in itertools.starmap(Form, itertools.product(TOKENS, COLUMNS, STAGES, PROGRAMS)):
        rows.append({**form._asdict(), "us": _time_us(form, tensors, timer)})
    rows.sort(key=lambda row: row["us"])
    taken = (glu_lora.LARGE._asdict(), glu_lora.SMALL._asdict())
    for row in rows:
        row["is_taken"] = {name: row[name] for name in Form._fields} in taken
    shown = [row for index, row in enumerate(rows) if index < SHOWN or row["is_taken"]]
    head = [*Form._fields, "us", "taken"]
    cells = [[str(row[name]) for name in Form._fields] for row in shown]
    ends = [[f"{row['us']:.1f}", "yes" if row["is_taken"] else ""] for row in shown]
    print(format_table(head, [one + two for one, two in zip(cells, ends, strict=True)], left=()))
    path = record.write("glu_lora_forms", rows, sizes=vars(options))
    print(f"wrote {path}")


def _tensors(options: argparse.Namespace, device: torch.device) -> list[torch.Tensor]:
    def make(width: int) -> torch.Tensor:
        return torch.randn(options.tokens, width, device=device, dtype=torch.bfloat16)

    both, products = make(2 * options.width + 64), make(2 * options.rank)
    gate, up = both[:, : options.width], both[:, options.width : 2 * options.width]
    factors = [make(64)[:, : options.rank], *products.split(options.rank, 1)]
    return [make(options.width), gate, up, *factors]


def _time_us(form: Form, tensors: list[torch.Tensor], timer: Timer) -> float:
    def of_this_form(padded_ranks: Any) -> Form:
        return form

    kept, kept_launches = glu_lora.form_for, glu_lora._launches
    glu_lora.form_for, glu_lora._launches = of_this_form, ReadyLaunches()
    try:
        dm, gate, up, ds, xg, xu = tensors
        call = lambda: glu_lora_backward(dm, gate, up, ds, xg, xu, d_gate=gate, d_up=up)  # noqa: E731
        return timer.time(call).ms * 1e3
    finally:
        glu_lora.form_for, glu_lora._launches = kept, kept_launches


if __name__ == "__main__":
    main()
