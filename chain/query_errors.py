"""Why a query has no answer."""


class QueryError(Exception):
    """A query without an answer: one sentence, and a hint."""

    is_missing = False

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class NotFound(QueryError):
    """There is no such thing on this chain."""

    is_missing = True


class BadQuery(QueryError):
    """A query that cannot be understood."""
