"""A chain with everything that the inspector shows: as a database file, and behind a peer's control socket."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any

import trio

from chain.blocks import Vote, VoteKind, vote_bytes
from chain.codec import encode
from chain.hashing import digest
from chain.keys import PrivateKey, peer_id
from chain.queries import Reader, open_reader
from chain.reasons import Reason
from chain.store import Store
from chain.transactions import Evidence, Transaction, Transfer, Unbond
from tdml_p2p.chain_service import Feed
from tdml_p2p.control import ControlServer
from tdml_p2p.peer import _answer
from tests.chain.ledger_kit import BALANCE, KEYS, Ledger, genesis_of, start_swarm

ALICE, BOB, TWOFACED = KEYS[6], KEYS[7], KEYS[5]
UNKNOWN = "ab" * 32
STRANGER = peer_id(PrivateKey(bytes([9]) * 32).account)


def live() -> Ledger:
    """Return a life with audits, a cheat's conviction, an equivocation and a refused transfer."""
    swarm = start_swarm(Ledger(genesis_of()))
    swarm.deviation[swarm.seated(0)[0]] = -2.0
    swarm.work(30)
    ledger = swarm.ledger
    sent = ledger.block((ALICE, Transfer(BOB.account, 1)), (BOB, Transfer(ALICE.account, 2 * BALANCE)))
    assert sent == ("", Reason.NO_FUNDS)
    assert ledger.block((KEYS[4], Unbond(10)), (ALICE, _equivocation(ledger, TWOFACED))) == ("", "")
    ledger.skip(2)
    return ledger


def _equivocation(ledger: Ledger, key: PrivateKey) -> Evidence:
    return Evidence(_vote(ledger, key, "a"), _vote(ledger, key, "b"))


def _vote(ledger: Ledger, key: PrivateKey, name: str) -> bytes:
    said = (VoteKind.NOTARIZE, ledger.genesis.chain_id, 1, 1, digest(name))
    return encode(Vote(*said, key.account, key.sign(vote_bytes(*said))))


def names_in(ledger: Ledger) -> dict[str, str]:
    """Return an id of each kind, by what it is called in the tests' command lines."""
    [slashed] = ledger.happened("slashed")
    [equivocation] = ledger.happened("equivocation")
    [(height, sent)] = [
        (height, sent)
        for height, (_, sent, *_) in enumerate(ledger.blocks, 1)
        if sent and isinstance(sent[0].body.payload, Transfer)
    ]
    return {
        "TASK": str(slashed["task"]),
        "AUDIT": str(slashed["evidence"]),
        "CHEAT": str(slashed["worker"]),
        "CLAIM": str(ledger.happened("claimed")[0]["claim"]),
        "ALICE": peer_id(ALICE.account),
        "BOB": peer_id(BOB.account),
        "TWOFACED": peer_id(TWOFACED.account),
        "UNBONDING": peer_id(KEYS[4].account),
        "EVIDENCE": str(equivocation["evidence"]),
        "HEIGHT": str(height),
        "TX": sent[0].tx_id.hex(),
        "REFUSED": sent[1].tx_id.hex(),
        "UNKNOWN": UNKNOWN,
        "STRANGER": STRANGER,
    }


class InspectedPeer:
    """A peer that only answers the inspector, from a database that does not grow."""

    def __init__(self, path: Path, waiting: tuple[Transaction, ...]) -> None:
        self._path = path
        with closing(open_reader(path).store) as store:
            state = store.load_state()
        self._reader = Reader(store, lambda: state, lambda: waiting)

    async def answer(self, query: str, params: Mapping[str, str]) -> Any:
        return await trio.to_thread.run_sync(partial(_answer, self._path, self._reader, query, dict(params)))

    @asynccontextmanager
    async def feed(self) -> AsyncIterator[Feed]:
        """Subscribe to a chain that has ended: history, and no news."""
        send, receive = trio.open_memory_channel[Any](0)
        send.close()
        with receive, closing(Store.open_read_only(self._path)) as store:
            yield Feed(self._reader.state.height, receive, store)


@asynccontextmanager
async def inspected(home: Path, path: Path, waiting: tuple[Transaction, ...] = ()) -> AsyncIterator[None]:
    """Serve the database at `path` on the control socket of `home` while the block runs."""
    server = ControlServer(InspectedPeer(path, waiting), home / "control.sock", None)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        yield
        nursery.cancel_scope.cancel()
