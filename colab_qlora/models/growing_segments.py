"""GPU memory that torch may grow in place, so that a plan's peak is also what it takes.

torch's allocator asks the driver for segments and never moves what lies in them. With long rows the
tensors that layers keep (320 MiB) settle in holes that larger passing ones left (450 MiB), and what
is left of each hole is too small for anyone: an 8B at 40,960 tokens ran out of a T4's memory with
2.3 GiB of it in such holes. Expandable segments are one range of addresses that grows; pages in
its holes go back to the driver and come again at its end (CUDA virtual memory management).
"""

from __future__ import annotations

import os

# both names that torch reads; whoever sets one has chosen
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
SETTING = "expandable_segments:True"


def let_segments_grow() -> bool:
    """Switch torch's CUDA allocator to expandable segments, for memory it has yet to ask for.

    Nothing is done without a CUDA GPU, nor if one of `VARIABLES` mentions expandable segments.

    Returns:
        Whether they are on because of this call.
    """
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_allocator_backend() != "native":
        return False
    if any("expandable_segments" in os.environ.get(name, "") for name in VARIABLES):
        return False
    torch._C._accelerator_setAllocatorSettings(_settings())
    return True


def _settings() -> str:
    # setting one anew puts all others back to torch's defaults, so the user's come along
    given = next((os.environ[name] for name in VARIABLES if os.environ.get(name)), "")
    return f"{given},{SETTING}" if given else SETTING
