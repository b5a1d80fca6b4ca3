"""A worker that neither gives nor refuses what its audits need: it lets every question hang."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar, cast

import pytest
import trio
import trio.testing
from msgspec import structs

from chain.keys import PrivateKey, peer_id
from chain.records import Audit, AuditStatus, Voter
from chain.state import Duty
from chain.transactions import Commit, Commitment, Payload, Reveal, reveal_commitment
from chain.verdicts import BLANK
from tdml_p2p import blob_transfer, blobs
from tdml_p2p.host import Network
from tdml_p2p.requests import RequestFailed
from tdml_p2p.swarm import asking
from tdml_p2p.swarm.inputs import (
    MAX_REPLY_BYTES,
    MAX_REQUEST_BYTES,
    PROTOCOL,
    Descriptor,
    Senders,
    Wanted,
    encode,
    expected_messages,
    signed_input,
)
from tdml_p2p.swarm.library import Library
from tdml_p2p.swarm.material import Unavailable
from tdml_p2p.swarm.reexecution import Cell, Reexecutor
from tests.attacks.kit import Character, RealSwarm, swarm_of
from tests.tdml_p2p.network_kit import meshed
from tests.tdml_p2p.swarm.audit_samples import ME, WORKER, Bench, audit_of, name_of, opening_of, status
from tests.trainer.training_samples import small_batches, small_manifest
from trainer.content import address_of
from trainer.stage import build_stage
from trainer.state import initial_state
from trainer.tensors import buffer_of
from trainer.worker_ports import ThreadCompute

T = TypeVar("T")
TASK = bytes(range(32))
CLIENT = PrivateKey(bytes([1]) * 32)
MANIFEST = small_manifest(stages=1)
WANTED = Wanted(TASK, 0, 1, 0, 0)
STATE = initial_state(MANIFEST, 0)
PARTS = (STATE.manifest.encode(), *map(bytes, STATE.buffers()))
SCALE = 0.1
"""Of all times in the test on real sockets."""
QUESTIONS = 5
"""Of one re-execution: its inputs, then x, gy and the state's names at once, then the weights. Three waits in turn of
three seconds each are within three quarters of a window of 15 blocks, of a second each."""


class Hung(list[bytes]):
    """Questions that hang for ever."""

    async def hang(self, _sender: str, request: bytes) -> bytes:
        self.append(request)
        await trio.sleep_forever()
        return b""


async def give(network: Network) -> None:
    """Have a peer serve all that the cell's execution needs."""
    batch = small_batches(MANIFEST).batch(1, 0)
    x, gy = (bytes(buffer_of(part)) for part in (batch.tokens, batch.labels))
    for part in (*PARTS, x, gy):
        await network.blobs.put(part)
    messages = expected_messages(WANTED, MANIFEST)
    told = [signed_input(CLIENT, TASK, one, address_of(data)) for one, data in zip(messages, (x, gy), strict=True)]

    async def tell(_sender: str, _request: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        return encode(Descriptor(*told))

    network.on_request(PROTOCOL, tell, MAX_REQUEST_BYTES)


@asynccontextmanager
async def auditing(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Reexecutor, Cell, Hung]]:
    """Give an auditor, and a cell of which a worker that hangs and an honest peer have everything."""
    build_stage(MANIFEST, 0)  # what the first one imports takes seconds
    monkeypatch.setattr(blob_transfer, "_PATIENCE_SECONDS", 3.0 * SCALE)
    monkeypatch.setattr(asking, "PATIENCE_SECONDS", asking.PATIENCE_SECONDS * SCALE)
    async with meshed(3) as (worker, honest, auditor):
        await give(honest)
        hung = Hung()
        worker.on_request(PROTOCOL, hung.hang, MAX_REQUEST_BYTES)
        worker.on_request(blobs.PROTOCOL, hung.hang, blobs.MAX_REQUEST_BYTES)

        async def ask(peer: str, request: bytes) -> bytes:
            try:
                return await auditor.request(peer, PROTOCOL, request, limit=MAX_REPLY_BYTES, timeout=10.0 * SCALE)
            except RequestFailed as error:
                raise Unavailable(str(error)) from None

        client = frozenset([peer_id(CLIENT.account)])
        holders = (worker.peer, honest.peer)
        cell = Cell(WANTED, MANIFEST, STATE.root, holders, Senders(client, client))
        yield Reexecutor(Library(auditor, lambda _: None).fetch, ask, ThreadCompute()), cell, hung


async def test_a_worker_that_hangs_makes_no_auditor_late_where_others_have_the_material(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with auditing(monkeypatch) as (reexecutor, cell, hung):
        with trio.fail_after(60):
            execution = await reexecutor.run(cell)
        assert execution.inputs.x.sender == peer_id(CLIENT.account)
        assert 0 < len(hung) <= QUESTIONS


class Hanging:
    """Every source of material hangs."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def fetch(self, address: bytes, _holders: Sequence[str]) -> bytes:
        self.asked.append(address.hex())
        await trio.sleep_forever()
        return b""

    async def ask(self, peer: str, _request: bytes) -> bytes:
        self.asked.append(peer)
        await trio.sleep_forever()
        return b""

    async def compute(self, work: Callable[[], T], /) -> T:
        await trio.lowlevel.checkpoint()
        return work()


async def pass_blocks(bench: Bench, count: int) -> None:
    """Let a block a second go by; the chain gives a whole window after each commitment to audits that had to wait."""
    window = bench.params.commit_window
    for _ in range(count):
        await trio.sleep(1.0)
        bench.height += 1
        owed = [audit for audit in bench.audits.values() if audit.id not in bench.commitments()]
        newest = max(bench.outbox.heights, default=0)
        late = [audit for audit in owed if audit.deadline < bench.height <= newest + window]
        bench.show(*(structs.replace(audit, deadline=newest + window) for audit in late))


@pytest.mark.parametrize("waiting", [1, 4])
async def test_where_nobody_answers_the_auditor_says_so_in_time(
    waiting: int, autojump_clock: trio.testing.MockClock
) -> None:
    bench, hanging = Bench(), Hanging()
    bench.auditor._reexecutor = Reexecutor(hanging.fetch, hanging.ask, hanging.compute)
    window = bench.params.commit_window
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.auditor.run)
        bench.show(*(audit_of(number, deadline=1 + window) for number in range(waiting)))
        await pass_blocks(bench, waiting * (window + 1))
        nursery.cancel_scope.cancel()
    assert hanging.asked
    assert bench.commitments() == [name_of(number) for number in range(waiting)]
    before = [1, *bench.outbox.heights]
    assert all(height - since <= window - 2 for since, height in pairwise(before))


async def test_a_judge_that_was_held_up_does_not_say_that_others_give_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Of two disputes at once it has time for one: the other's worker, who may be honest, is not blamed for that."""
    bench, hanging = Bench(), Hanging()
    bench.auditor._reexecutor = Reexecutor(hanging.fetch, hanging.ask, hanging.compute)
    voters = tuple(Voter(account=account, power=1) for account in (ME, WORKER))
    deadline = 1 + bench.params.vote_window
    voting = [
        audit_of(
            number,
            status=status(AuditStatus.VOTING),
            auditor=WORKER,
            deadline=deadline,
            opening=opening_of(number),
            dispute_seed=bytes(32),
            voters=voters,
        )
        for number in range(2)
    ]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.auditor.run)
        bench.show(*voting)
        await bench.pass_blocks(deadline)
        nursery.cancel_scope.cancel()
    assert bench.commitments() == [name_of(0)]


@dataclass
class Stalled(RealSwarm):
    """A swarm in which nobody gets the material of some workers' cells."""

    stalling: frozenset[bytes] = frozenset()

    def answer(self, key: PrivateKey, duty: Duty) -> Payload:
        """Return what a peer answers: of what it has nothing of, that it has nothing."""
        audit = self.state.audit(duty.audit)
        assert audit is not None
        if duty.kind == "open" or audit.worker not in self.stalling:
            return super().answer(key, duty)
        self._blank(key, duty, audit)
        if duty.kind == "commit":
            blank = self._pending[key.account, duty.audit, duty.round, audit.key]
            return Commit((Commitment(duty.audit, duty.round, reveal_commitment(key.account, blank)),))
        return super().answer(key, duty)

    def _blank(self, key: PrivateKey, duty: Duty, audit: Audit) -> None:
        blank = Reveal(duty.audit, duty.round, key.account, BLANK, BLANK, False, True)
        self._pending[key.account, duty.audit, duty.round, audit.key] = blank

    def found(self, reveal: Reveal, account: bytes, audit: Audit, said: str) -> Reveal:
        """Return a reveal with what this peer finds behind the opened trace."""
        return reveal if reveal.shared == BLANK else super().found(reveal, account, audit, said)


def test_who_lets_every_audit_hang_loses_its_seat_and_no_auditor_its_draws() -> None:
    plain = swarm_of("stalled", 2000)
    swarm = Stalled(plain.ledger, plain.client, plain.task)
    cheat = swarm.seated(1)[0]
    swarm.stalling = frozenset([cheat])
    swarm.characters[cheat] = Character(attack="zero gradients")
    for _ in range(300):
        swarm.work(1)
        if cheat not in swarm.seated(1):
            break
    evicted = swarm.ledger.happened("evicted")
    assert [(event["worker"], event["reason"]) for event in evicted] == [(peer_id(cheat), "withheld")]
    assert not {"charged", "slashed", "absent", "undecided"} & set(swarm.ledger.kinds())
    assert cast(int, len(swarm.ledger.happened("withheld"))) >= swarm.state.params.withheld_limit
