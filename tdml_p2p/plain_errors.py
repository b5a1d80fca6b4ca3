"""What the libraries below a peer raise, said to its owner in one sentence with a hint."""

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from chain.engine_seam import ChainBroken, Distrusted
from chain.store import StoreCorrupt
from tdml_p2p.errors import UserError

_FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raise `UserError` for whatever the owner can mend, alone even out of a group; pass on the rest."""
    try:
        yield
    except BaseException as error:
        cause = _chief_cause(error)
        plain = explain(cause)
        if plain is not None:
            raise plain from (None if plain is cause else cause)
        if cause is error or len(_leaves(error)) > 1:
            raise
        # Ten nested groups around one fault would hide where it is.
        raise cause from None


def explain(error: BaseException) -> UserError | None:
    """Return the error as its owner should read it, None when there is nothing that they can mend."""
    match error:
        case UserError():
            return error
        case sqlite3.Error() if "full" in str(error):
            return _full()
        case sqlite3.OperationalError():
            return UserError(
                f"A database of the home cannot be used: {str(error).rstrip('.')}.",
                "check the disk and who owns the home, then start again; everything up to the last block is kept",
            )
        case StoreCorrupt() | sqlite3.DatabaseError():
            return UserError(
                f"The chain database cannot be used: {str(error).rstrip('.')}.",
                "move chain.db out of the home (keep signing.db and key) and start with --join INVITE: "
                "the peer fetches the chain again",
            )
        case Distrusted():
            return UserError(
                f"This chain is not the one that --trust names: {str(error).rstrip('.')}.",
                "ask again for the hash of that height; if it is right, move chain.db out of the home (keep "
                "signing.db and key) and start with --join INVITE of peers that have it",
            )
        case ChainBroken():
            return UserError(
                f"This peer cannot follow the chain: {str(error).rstrip('.')}.",
                "update tdml to the version that the validators run, then start again",
            )
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


def _chief_cause(error: BaseException) -> BaseException:
    """Return what a group is about: the first error that an owner can mend, else its first."""
    leaves = _leaves(error)
    return next((leaf for leaf in leaves if explain(leaf) is not None), leaves[0])


def _leaves(error: BaseException) -> list[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for part in error.exceptions for leaf in _leaves(part)]
