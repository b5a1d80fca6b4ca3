"""One process of a testnet: a real peer, which may lie, and whose network can be cut by SIGUSR1.

`python -m tests.testnet.process ATTACK SECONDS start …`: everything after the two words goes to `tdml-peer`.
The attacks change what the peer says, not how it keeps its records: it is a liar that works.
"""

import signal
import socket
import sys
import time
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import trio
from msgspec import structs

from chain import engine as engines
from chain.blocks import Block, Proposal, Vote, VoteKind, vote_bytes
from chain.codec import encode
from chain.engine_core import Core, SignJob
from chain.hashing import ZERO, digest
from tdml_p2p import p2p_host

FIRST_LIE = 4
"""The height from which a liar lies: before, it helps to get the network going."""


def contradiction(vote: Vote, core: Core, *, two_faced: bool) -> Vote:
    """Return a vote that no honest validator signs beside `vote`."""
    key = core._config.key
    assert key is not None
    kind = VoteKind.NULLIFY if two_faced else vote.kind
    subject = ZERO if two_faced else digest("another block", vote.block_hash)
    said = (kind, vote.chain_id, vote.height, vote.view, subject)
    return Vote(*said, vote.validator, key.sign(vote_bytes(*said)))


def lie(attack: str) -> None:
    """Change what this process's consensus says."""
    core_type: Any = Core
    engine_module: Any = engines
    signed, broadcast, assemble = Core.signed, Core._broadcast, engine_module.assemble

    def signs_twice(core: Core, job: SignJob, vote: Vote, now: float) -> None:
        signed(core, job, vote, now)
        wanted = VoteKind.FINALIZE if attack == "two-faced" else VoteKind.NOTARIZE
        if vote.kind == wanted and vote.height >= FIRST_LIE:
            other = contradiction(vote, core, two_faced=attack == "two-faced")
            core.publish.append(("vote", encode(other)))

    def withholds(core: Core, message: Any) -> None:
        if not isinstance(message, Proposal) or message.block.height < FIRST_LIE:
            broadcast(core, message)

    def falsifies(*arguments: Any) -> Any:
        block, executed = assemble(*arguments)
        header = structs.replace(block.header, state_root=digest("no state"))
        return (block if block.height < FIRST_LIE else Block(header, *_body(block))), executed

    if attack in ("equivocate", "two-faced"):
        core_type.signed = signs_twice
    elif attack == "withhold":
        core_type._broadcast = withholds
    elif attack == "invalid":
        engine_module.assemble = falsifies


def _body(block: Block) -> tuple[Any, Any]:
    return block.transactions, block.parent_certificate


class Cut:
    """Real sockets that close and cannot be opened while the network is cut."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until = 0.0
        self._sockets: WeakSet[Any] = WeakSet()

    def install(self) -> None:
        """Watch every socket of the peer's host, and cut at SIGUSR1."""
        reader_type: Any = p2p_host._ReadAhead
        made = reader_type.__init__

        def watched(reader: Any, stream: Any) -> None:
            made(reader, stream)
            self._sockets.add(reader)
            if time.monotonic() < self._until:
                _close(reader)

        reader_type.__init__ = watched
        signal.signal(signal.SIGUSR1, lambda *_: self._cut())

    def _cut(self) -> None:
        self._until = time.monotonic() + self._seconds
        for reader in list(self._sockets):
            _close(reader)
        self._sockets.clear()


def _close(reader: Any) -> None:
    """Shut a socket down at once; whoever reads or writes it sees its end."""
    stream = reader._stream
    while not isinstance(stream, trio.SocketStream):
        inner = getattr(stream, "stream", None) or getattr(stream, "_stream", None)
        if inner is None:
            return
        stream = inner
    with suppress(OSError):
        raw: Any = stream.socket
        raw._sock.shutdown(socket.SHUT_RDWR)


def main() -> None:
    """Run the peer."""
    attack, seconds, arguments = sys.argv[1], float(sys.argv[2]), sys.argv[3:]
    if attack != "none":
        lie(attack)
    Cut(seconds).install()
    sys.argv = ["tdml-peer", *arguments]
    from cli.peer import main as peer_main

    peer_main()


if __name__ == "__main__":
    main()
