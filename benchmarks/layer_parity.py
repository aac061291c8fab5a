"""How far loss and gradients of each family are from float64: the fused layers, and stock.

    python -m benchmarks.layer_parity [--families llama,qwen3] [--dtypes float32,bfloat16]

The models are the tiny random ones of tests/layers; on a GPU they are wider, so that half precision
runs on tensor cores. The weights are rounded to the dtype first and the truth is computed from the
rounded ones in float64: an error is the arithmetic's alone. Half precision comes twice, with the
adapters in the same dtype and with adapters in float32, as `get_peft_model` leaves them.

An error is ||got - truth|| / ||truth||, as the root mean square over a few batches: of the loss, of
the gradients of all adapters as one vector, and of the adapter matrix that comes off worst.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.table import exponent, format_table

# tiny models of every family and their truth, which the tests judge the fused layers by
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "layers"))
import layer_helpers  # noqa: E402

from colab_qlora.layers.saved import KEEP_ALL, KEEP_INPUT  # noqa: E402
from colab_qlora.models.fuse import fuse  # noqa: E402

HALF = ("float16", "bfloat16")
CPU_DTYPES, GPU_DTYPES = "float64,float32,bfloat16", "float64,float32,bfloat16,float16"
# heads of 64 and a hidden size of 256: what tensor cores and flash attention take
GPU_SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
}
ROWS, CPU_LENGTH, GPU_LENGTH = 2, 11, 128
PLANS = {"ours": KEEP_INPUT, "kept": KEEP_ALL}


def main() -> None:
    """Measure every family and dtype; print the table and write the JSON."""
    options = _options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for family in options.families.split(","):
        for dtype in options.dtypes.split(","):
            for adapters in dict.fromkeys([dtype, "float32"] if dtype in HALF else [dtype]):
                batches = [_batch(options.padding, i, device) for i in range(options.batches)]
                rows.append(measure(family, dtype, adapters, batches))
    print(_table(rows))
    for row in rows:
        if row["stock_passes"]:
            print(f"{row['family']}: layers ran the model's own code: {row['stock_passes']}")
    about = {"sizes": GPU_SIZES if device.type == "cuda" else layer_helpers.SIZES}
    name = options.name or f"layer_parity_{device.type}"
    print(f"wrote {record.write(name, rows, padding=options.padding, **about)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", default=",".join(layer_helpers.FAMILIES))
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--dtypes", default=GPU_DTYPES if has_gpu else CPU_DTYPES)
    parser.add_argument("--padding", default="right", choices=["none", "right", "left"])
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--name", help="name of the result file")
    options = parser.parse_args()
    unknown = set(options.families.split(",")) - set(layer_helpers.FAMILIES)
    if unknown:
        parser.error(f"unknown: {sorted(unknown)}; there are {', '.join(layer_helpers.FAMILIES)}")
    return options


def measure(
    family: str, dtype: str, adapters: str, batches: list[dict[str, Any]]
) -> dict[str, Any]:
    """Errors of one family, weights in `dtype`, adapters in `adapters`; a row for JSON."""
    exact = _model(family, batches[0]["input_ids"].device)
    _round(exact, getattr(torch, dtype), getattr(torch, adapters))
    rounded = copy.deepcopy(exact)
    _widen(exact)
    truths = [layer_helpers.true_loss_and_gradients(exact, inputs) for inputs in batches]
    sides = {"stock": _errors(rounded, batches, truths)}
    state = fuse(rounded)
    for name, plan in PLANS.items():
        state.plan = plan
        sides[name] = _errors(rounded, batches, truths)
    return {
        "family": family,
        "dtype": dtype,
        "adapters": adapters,
        "sides": sides,
        "stock_passes": dict(state.stock_passes),
    }


def _batch(padding: str, number: int, device: torch.device) -> dict[str, Any]:
    """The tests' batch; its random tokens follow from its length."""
    length = (GPU_LENGTH if device.type == "cuda" else CPU_LENGTH) + number
    found = layer_helpers.batch(padding, ROWS, length)
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in found.items()}


def _model(family: str, device: torch.device) -> Any:
    """The tests' model in float64; of `GPU_SIZES` on a GPU."""
    if device.type != "cuda":
        return layer_helpers.tiny_model(family)
    config = copy.deepcopy(layer_helpers.FAMILIES[family])
    for name, value in GPU_SIZES.items():
        setattr(config, name, value)
    wide = f"{family}, wide"
    layer_helpers.FAMILIES[wide] = config
    try:
        return layer_helpers.tiny_model(wide).to(device)
    finally:
        del layer_helpers.FAMILIES[wide]


def _round(model: Any, dtype: torch.dtype, adapters: torch.dtype) -> None:
    """Round the parameters; buffers (rotation frequencies) stay float32, as when loaded."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(adapters if "lora_" in name else dtype)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(torch.float64 if dtype == torch.float64 else torch.float32)


def _widen(model: Any) -> None:
    """The same numbers in float64."""
    for parameter in model.parameters():
        parameter.data = parameter.data.double()


def _errors(model: Any, batches: list[Any], truths: list[Any]) -> dict[str, float]:
    """Root mean square over the batches of the three errors."""
    found = []
    for inputs, (true_loss, truth) in zip(batches, truths, strict=True):
        loss, gradients = layer_helpers.loss_and_gradients(model, inputs)
        got = {name: gradient.double() for name, gradient in gradients.items()}
        found.append(
            {
                "loss": abs(float((loss.double() - true_loss) / true_loss)),
                "gradients": _norm(got[n] - truth[n] for n in truth) / _norm(truth.values()),
                "worst": layer_helpers.largest_error(got, truth),
            }
        )
    return {key: statistics.fmean(e[key] ** 2 for e in found) ** 0.5 for key in found[0]}


def _norm(tensors: Iterable[torch.Tensor]) -> float:
    return sum(float(tensor.square().sum()) for tensor in tensors) ** 0.5


def _table(rows: list[dict[str, Any]]) -> str:
    pairs = [(error, side) for error in ("loss", "gradients", "worst") for side in rows[0]["sides"]]
    head = ["family", "dtype", "adapters", *(f"{error}: {side}" for error, side in pairs)]
    cells = [
        [row["family"], row["dtype"], row["adapters"]]
        + [exponent(row["sides"][side][error]) for error, side in pairs]
        for row in rows
    ]
    return format_table(head, cells, left=("dtype", "adapters"))


if __name__ == "__main__":
    main()
