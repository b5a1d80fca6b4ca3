"""Who counts as a member of a task, and what a peer does when it cannot apply for a seat."""

from types import SimpleNamespace
from typing import cast

import base58
import pytest
import trio

from chain.engine import SubmitRefused
from chain.keys import PrivateKey, peer_id
from chain.reasons import Reason
from chain.records import Task
from tdml_p2p.swarm.service import SwarmService

TASK = bytes(range(32))
CLIENT, SEATED, EVICTED, SPARE, STRANGER = (PrivateKey(bytes([number]) * 32).account for number in range(1, 6))


def service() -> SwarmService:
    """Return as much of a service as membership needs: the newest final state."""
    workers = [(SEATED, True), (EVICTED, False), (SPARE, False)]
    state = SimpleNamespace(
        task=lambda task: SimpleNamespace(client=CLIENT) if task == TASK else None,
        workers=lambda _: [SimpleNamespace(account=account, is_seated=seated) for account, seated in workers],
    )
    return cast(SwarmService, SimpleNamespace(_engine=SimpleNamespace(state=state)))


@pytest.mark.parametrize(
    ("account", "is_member"), [(CLIENT, True), (SEATED, True), (EVICTED, False), (SPARE, False), (STRANGER, False)]
)
def test_the_client_and_the_seated_are_members(account: bytes, is_member: bool) -> None:
    assert SwarmService.is_member(service(), TASK, peer_id(account)) is is_member


def test_an_unknown_task_has_no_members() -> None:
    assert not SwarmService.is_member(service(), bytes(32), peer_id(CLIENT))


def test_a_peer_without_an_ed25519_key_is_no_member() -> None:
    rsa = base58.b58encode(bytes([0x12, 0x20]) + bytes(32)).decode()
    assert not SwarmService.is_member(service(), TASK, rsa)


async def test_a_peer_that_cannot_pay_applies_again_later() -> None:
    async def refuse(_payload: object) -> bytes:
        await trio.lowlevel.checkpoint()
        raise SubmitRefused(Reason.NO_FUNDS)

    async def at_once(_work: object) -> bytes:
        await trio.lowlevel.checkpoint()
        return bytes(32)

    applied = {TASK}
    peer = SimpleNamespace(_engine=SimpleNamespace(submit=refuse), _compute=at_once, _applied=applied)
    await SwarmService._apply(cast(SwarmService, peer), cast(Task, SimpleNamespace(id=TASK)))
    assert not applied
