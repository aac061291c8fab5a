"""The access token for uploads: the argument, the environment, Colab's secrets, a saved login."""

from __future__ import annotations

import os

from colab_qlora.errors import UserError

NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def find_token(token: str | None = None) -> str:
    """The first token that is there. It is never printed, nor part of a message.

    Args:
        token: as passed by the user; None to look for one.

    Raises:
        UserError: there is none.
    """
    candidates = [token, *(os.environ.get(name) for name in NAMES)]
    for found in candidates:
        if isinstance(found, str) and found.strip():
            return found.strip()
    found = _colab_secret() or _saved_login()
    if found:
        return found
    raise UserError(
        "an upload needs an access token of the model hub, and there is none",
        allowed="token=..., the environment variable HF_TOKEN, or a Colab secret of that name",
        do="Make a token with write permission in the hub's settings; in Colab, add it under the "
        "key symbol on the left as HF_TOKEN and switch on notebook access",
    )


def _colab_secret() -> str | None:
    """Colab's secret HF_TOKEN; None outside Colab, or where it is missing or not granted."""
    try:
        from google.colab import userdata
    except ImportError:
        return None
    # its own errors for a missing secret and for a refused access, and a timeout of the dialogue
    try:
        found = userdata.get(NAMES[0])
    except Exception:
        return None
    return found.strip() if isinstance(found, str) and found.strip() else None


def _saved_login() -> str | None:
    """What `hf auth login` left."""
    import huggingface_hub

    return huggingface_hub.get_token()
