"""What the libraries below a peer raise, said to its owner in one sentence with a hint."""

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from chain.store import StoreCorrupt
from tdml_p2p.errors import UserError

_FULL = frozenset((errno.ENOSPC, errno.EDQUOT))


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raise `UserError` for whatever the owner can mend, alone even out of a group; pass on the rest."""
    try:
        yield
    except BaseException as error:
        cause = _only_cause(error)
        plain = explain(cause)
        if plain is None:
            raise
        raise plain from (None if plain is cause else cause)


def explain(error: BaseException) -> UserError | None:
    """Return the error as its owner should read it, None when there is nothing that they can mend."""
    match error:
        case UserError():
            return error
        case StoreCorrupt():
            return UserError(
                f"The chain database cannot be used: {_sentence(str(error))}",
                "move chain.db out of the home (keep signing.db and key) and start with --join INVITE: "
                "the peer fetches the chain again",
            )
        case sqlite3.Error() if "full" in str(error):
            return _full()
        case OSError() if error.errno in _FULL:
            return _full()
        case OSError() if error.errno == errno.EADDRINUSE:
            return UserError(
                "An address to listen on is in use by another program.",
                "choose another with --listen MULTIADDR; port 0 takes any free one",
            )
        case PermissionError():
            return UserError(f"The file {error.filename} cannot be used: {error.strerror}.", "make it yours with chown")
    return None


def _full() -> UserError:
    return UserError("The disk is full.", "free some space and start again; everything up to the last block is kept")


def _only_cause(error: BaseException) -> BaseException:
    """Return what a group is about: its one error, or the first that an owner can mend."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    causes = [_only_cause(part) for part in error.exceptions]
    return next((cause for cause in causes if explain(cause) is not None), causes[0])


def _sentence(text: str) -> str:
    return f"{text.rstrip('.')}."
