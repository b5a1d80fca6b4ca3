"""A client's wishes that workers be audited in full: once in a while for each, and only for those who have a seat."""

from types import SimpleNamespace
from typing import cast

import msgspec
import pytest
import trio
import trio.testing

from chain.engine import SubmitRefused
from chain.keys import PrivateKey, peer_id
from chain.records import Worker, WorkerStatus
from chain.transactions import WatchWorker
from tdml_p2p.peer import Peer
from tdml_p2p.swarm.watching import Watcher
from trainer.coordinator_ports import Outvoted, Suspicious
from trainer.monitors import Why

TASK = bytes(range(32))
ACCOUNT, SPARE, STRANGER = (PrivateKey(bytes([number]) * 32).account for number in (1, 2, 3))
PERIOD = 60


class FakePeer:
    """A peer whose chain takes the wishes of `takes`; the worker is watched from then on."""

    def __init__(self) -> None:
        self.sent: list[WatchWorker] = []
        self.height = 100
        self.params = SimpleNamespace(absence_blocks=PERIOD)
        self.workers = {ACCOUNT: seat(ACCOUNT, WorkerStatus.SEATED), SPARE: seat(SPARE, WorkerStatus.SPARE)}
        self.engine = SimpleNamespace(state=self)
        self.is_refusing = False

    def worker(self, task: bytes, account: bytes) -> Worker | None:
        assert task == TASK
        return self.workers.get(account)

    async def submit(self, payload: WatchWorker) -> SimpleNamespace:
        await trio.lowlevel.checkpoint()
        self.sent.append(payload)
        if self.is_refusing:
            raise SubmitRefused("full")
        worker = self.workers[payload.worker]
        self.workers[payload.worker] = msgspec.structs.replace(worker, watched_until=self.height + PERIOD)
        return SimpleNamespace(ok=True, reason=None)


def seat(account: bytes, status: WorkerStatus) -> Worker:
    return Worker(TASK, account, bytes(32), 1, 1000, stage=0, status=tuple(WorkerStatus).index(status))


def odd(account: bytes) -> Suspicious:
    return Suspicious(7, 0, peer_id(account), Why.GRADIENT)


async def sent_after(peer: FakePeer, *events: Suspicious | Outvoted) -> list[bytes]:
    """Return whom the client has had watched once it knows of these events."""
    watcher = Watcher(cast(Peer, peer), TASK)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watcher.run)
        for event in events:
            watcher.note(event)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    return [wish.worker for wish in peer.sent]


async def test_an_odd_worker_is_watched_once_in_a_while() -> None:
    peer = FakePeer()
    assert await sent_after(peer, *[odd(ACCOUNT)] * 5, Outvoted(7, 0, peer_id(ACCOUNT), (1,))) == [ACCOUNT]
    peer.height += PERIOD // 4
    assert await sent_after(peer, odd(ACCOUNT)) == [ACCOUNT]
    peer.height += PERIOD
    assert await sent_after(peer, odd(ACCOUNT)) == [ACCOUNT] * 2


@pytest.mark.parametrize("account", [SPARE, STRANGER])
async def test_who_has_no_seat_is_not_watched(account: bytes) -> None:
    assert await sent_after(FakePeer(), odd(account)) == []


async def test_a_wish_that_the_chain_does_not_take_ends_nothing() -> None:
    peer = FakePeer()
    peer.is_refusing = True
    assert await sent_after(peer, odd(ACCOUNT), odd(ACCOUNT)) == [ACCOUNT] * 2
