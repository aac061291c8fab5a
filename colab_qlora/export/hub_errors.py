"""What goes wrong while a model hub is asked, in one line that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from colab_qlora.errors import UserError

# the libraries that huggingface_hub's releases send requests with, and its uploader in Rust
_SENDERS = ("httpx", "httpx2", "httpcore", "requests", "urllib3", "hf_xet")


@contextmanager
def readable_hub_errors(repo_id: str, endpoint: str) -> Iterator[None]:
    """Turn a refusal or a broken connection into a UserError; other errors pass.

    Args:
        repo_id, endpoint: for the message.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        found = _readable(error, repo_id, endpoint)
        if found is None:
            raise
        raise found from error


def _readable(error: BaseException, repo_id: str, endpoint: str) -> UserError | None:
    from huggingface_hub.errors import HFValidationError

    if isinstance(error, HFValidationError):
        return UserError(
            "this is no name of a repository",
            got=repr(repo_id),
            allowed="name or user/name, of letters, digits, '-', '_' and '.'",
            do='Pass repo_id="user/name"',
        )
    chain = _chain(error)
    for link in chain:
        status = getattr(getattr(link, "response", None), "status_code", None)
        if status is not None:
            return _refused(link, int(status), repo_id, endpoint)
    if any(type(link).__name__ == "OfflineModeIsEnabled" for link in chain):
        return UserError(
            "nothing can be uploaded while the hub is switched off",
            got="HF_HUB_OFFLINE=1",
            do="Unset HF_HUB_OFFLINE, restart the session, and push again",
        )
    for link in chain:
        if isinstance(link, ConnectionError | TimeoutError) or _is_of_a_sender(link):
            return UserError(
                f"the connection to {endpoint} failed",
                got=_first_line(link),
                allowed="a network that reaches the hub",
                do="Check the network and push again; what is uploaded already is not sent twice",
            )
    return None


def _refused(error: Any, status: int, repo_id: str, endpoint: str) -> UserError:
    got = f"{status}: {_reason(error)}"
    if status == 401:
        return UserError(
            f"{endpoint} refused the access token",
            got=got,
            allowed="a token that is valid",
            do="Make a new token with write permission in the hub's settings and pass token=...",
        )
    if status == 403:
        return UserError(
            f"this access token may not write to {repo_id}",
            got=got,
            allowed="a token with write permission for that user or organisation",
            do="Choose a repository of your own, or make a token with write permission",
        )
    return UserError(
        f"{endpoint} did not take {repo_id}",
        got=got,
        do="Wait a minute and push again" if status in (429, 500, 502, 503, 504) else None,
    )


def _reason(error: Any) -> str:
    text = getattr(error, "server_message", None)
    return str(text).splitlines()[0] if text else _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from, outermost first."""
    found: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in found:
        found.append(link)
        link = link.__cause__ or link.__context__
    return found


def _is_of_a_sender(error: BaseException) -> bool:
    return any(kind.__module__.split(".")[0] in _SENDERS for kind in type(error).__mro__)
