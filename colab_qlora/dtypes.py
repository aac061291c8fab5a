"""Which 16-bit type this machine computes in: bfloat16 where it is native, else what is fast.

| device                    | dtype    | why                                                     |
|---------------------------|----------|---------------------------------------------------------|
| CUDA, sm_80 and later     | bfloat16 | tensor cores take it; no loss scaling needed            |
| CUDA, older (T4 is sm_75) | float16  | tensor cores take only float16                          |
| CPU with bfloat16 opcodes | bfloat16 | half the memory of float32 at about its speed           |
| CPU without               | float32  | never float16: a training step is 11 to 18 times slower |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from colab_qlora.errors import UserError
from colab_qlora.host import cpu_has_native_bfloat16

if TYPE_CHECKING:
    import torch

_NAMES = {
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "float32": "float32",
    "fp32": "float32",
    "float": "float32",
}
_ALLOWED = "None, 'auto', 'bfloat16', 'float16', 'float32', or the torch dtype of one of these"


def has_native_bfloat16(capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability has bfloat16 tensor cores (sm_80 and later).

    Args:
        capability: (major, minor), such as (7, 5) for a T4.
    """
    # torch.cuda.is_bf16_supported() is never asked: it says True on a T4, where bfloat16 is
    # emulated
    return tuple(capability) >= (8, 0)


def pick_compute_dtype(torch_module: Any = None) -> torch.dtype:
    """The dtype to compute in on this machine; see the table at the top of the file.

    Args:
        torch_module: stands in for torch in tests; None imports torch.

    Raises:
        UserError: torch is not installed or cannot be imported.
    """
    module = _import_torch(torch_module)
    device_type = "cuda" if module.cuda.is_available() else "cpu"
    dtype: torch.dtype = getattr(module, _best_name(device_type, module))
    return dtype


def resolve_dtype(
    dtype: torch.dtype | str | None, device_type: str, torch_module: Any = None
) -> tuple[torch.dtype, str | None]:
    """The dtype to use for what the user asked for, and one line of explanation if it is another.

    Args:
        dtype: None or "auto" for the machine's own, a name ("bf16", "torch.float16", "float32"),
            or a torch.dtype.
        device_type: "cuda" or "cpu"; "cuda:0" is taken too.
        torch_module: stands in for torch in tests; None imports torch.

    Returns:
        The dtype, and None or one line that says why it is not the one that was asked for.

    Raises:
        UserError: the name is none of the three, a GPU is named where there is none, or torch is
            missing.
    """
    module = _import_torch(torch_module)
    device_type = str(device_type).split(":")[0]
    if device_type == "cuda" and not module.cuda.is_available():
        raise UserError(
            "device_type is 'cuda', but torch sees no GPU",
            allowed="'cpu' on this machine",
            do="Run `python -m colab_qlora doctor` to see why",
        )
    best = _best_name(device_type, module)
    if dtype is None or (isinstance(dtype, str) and dtype.strip().lower() == "auto"):
        return getattr(module, best), None
    name = _NAMES.get(str(dtype).strip().lower().removeprefix("torch."))
    if name is None:
        raise UserError("dtype is unknown", got=repr(dtype), allowed=_ALLOWED, do="Pass dtype=None")
    if device_type == "cpu" and name == "float16":
        return getattr(module, best), f"float16 is over 10 times slower on a CPU: using {best}"
    if device_type == "cuda" and name == "bfloat16" and best != "bfloat16":
        major, minor = module.cuda.get_device_capability()
        return (
            getattr(module, best),
            f"this GPU (sm_{major}{minor}) has no bfloat16 tensor cores: using {best}",
        )
    return getattr(module, name), None


def _best_name(device_type: str, module: Any) -> str:
    if device_type == "cuda":
        capability = module.cuda.get_device_capability()
        return "bfloat16" if has_native_bfloat16(capability) else "float16"
    if device_type == "cpu":
        return "bfloat16" if cpu_has_native_bfloat16() else "float32"
    return "float32"


def _import_torch(torch_module: Any) -> Any:
    if torch_module is not None:
        return torch_module
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of torch is missing
        raise UserError(
            f"torch cannot be imported ({error})",
            do="Run `python -m colab_qlora doctor` to see the command that mends it",
        ) from error
    return torch
