"""The packages that the kit is measured against, where they are installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util

# name in the tables: (module, distribution)
PEERS = {"liger": ("liger_kernel", "liger-kernel"), "unsloth": ("unsloth", "unsloth")}


def is_installed(peer: str) -> bool:
    """True if it can be imported; it is not imported here, since Unsloth patches others then."""
    return importlib.util.find_spec(PEERS[peer][0]) is not None


def versions() -> dict[str, str | None]:
    """Version of each peer; None where it is not installed."""
    found: dict[str, str | None] = {}
    for peer, (_, distribution) in PEERS.items():
        try:
            found[peer] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[peer] = None
    return found
