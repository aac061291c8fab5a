"""Keep warnings away that users would take for a fault and can do nothing about.

On a CPU with bfloat16, bitsandbytes looks for a faster kernel on a model hub and warns, each time,
that a package for that is missing; its own kernel works. Users would take the warning for a fault.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from colab_qlora.errors import UserError


def import_bitsandbytes() -> ModuleType:
    """Return the bitsandbytes module.

    Raises:
        UserError: it is missing, or was built for another CUDA than torch.
    """
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    log.addFilter(_is_not_the_hub_kernel)
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            "bitsandbytes, which does the 4-bit arithmetic, cannot be imported",
            got=str(error).splitlines()[0],
            do="Run `pip install -U bitsandbytes`, then `python -m colab_qlora doctor`",
        ) from error
    finally:
        log.removeFilter(_is_not_the_hub_kernel)
    return bitsandbytes


@contextmanager
def without_rename_warnings() -> Iterator[None]:
    """Hide FutureWarnings that PEFT causes by asking transformers under names it has renamed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _is_not_the_hub_kernel(record: logging.LogRecord) -> bool:
    return "kernels-community" not in record.getMessage()
