"""The one exception that a user is meant to read.

`UserError` is a ValueError, so code that catches ValueError keeps working. Its message is one line
that says what was got, what is allowed, and what to do next.
"""

from __future__ import annotations

from collections.abc import Iterator


class UserError(ValueError):
    """A mistake that the user can mend.

    Args:
        problem: what is wrong, as a clause without a full stop ("max_seq_length is not positive").
        got: the offending value, shown as it is.
        allowed: what would have been accepted.
        do: the next step, as an imperative sentence without a full stop.

    Example:
        >>> print(UserError("r is not positive", got=0, allowed="1 or more", do="Pass r=16"))
        r is not positive: got 0; allowed: 1 or more. Pass r=16.
    """

    def __init__(
        self,
        problem: str,
        *,
        got: object = None,
        allowed: object = None,
        do: str | None = None,
    ) -> None:
        self.problem, self.got, self.allowed, self.do = problem, got, allowed, do
        parts = []
        if got is not None:
            parts.append(f"got {got}")
        if allowed is not None:
            parts.append(f"allowed: {allowed}")
        message = problem + (": " + "; ".join(parts) if parts else "")
        super().__init__(f"{message}. {do}." if do else f"{message}.")

    def __reduce__(self):
        # exceptions are rebuilt from args by default, which would lose the keyword arguments
        return _rebuild, (self.problem, self.got, self.allowed, self.do)


def _rebuild(problem: str, got: object, allowed: object, do: str | None) -> UserError:
    return UserError(problem, got=got, allowed=allowed, do=do)


def error_chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it was raised from or beside, the last one first."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
