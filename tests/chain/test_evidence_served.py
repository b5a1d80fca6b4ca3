"""Evidence in what hostile servers serve: of heights long past, and of heights that are not reached yet."""

from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
import trio.testing
from msgspec import structs

from chain import evidence as rules
from chain.blocks import Reason, Refused, VoteKind
from chain.engine_core import MAX_FOREIGN
from chain.evidence import Watch
from chain.hashing import digest
from chain.keys import verify
from tests.chain.hub import Hub, running, until_height
from tests.chain.test_evidence import GENESIS, MEMBERS, OTHER, SET, blocks_with_evidence, certificate, culprits


def test_two_certificates_of_a_height_convict_who_signed_both() -> None:
    final = certificate(VoteKind.FINALIZE, 900, digest("final"), MEMBERS[:3])
    foreign = certificate(VoteKind.FINALIZE, 900, OTHER, MEMBERS[2:])
    watch = Watch(verify)
    watch.compare(SET, final, foreign)
    assert culprits(list(watch.open_cases())) == [MEMBERS[2].account]
    for harmless in (final, certificate(VoteKind.NOTARIZE, 900, digest("final"), MEMBERS)):
        watch = Watch(verify)
        watch.compare(SET, final, harmless)
        assert not watch.has_news


def test_a_forged_certificate_accuses_nobody() -> None:
    final = certificate(VoteKind.FINALIZE, 900, digest("final"), MEMBERS[:3])
    forged = structs.replace(final, block_hash=OTHER)
    watch = Watch(verify)
    with pytest.raises(Refused) as refusal:
        watch.compare(SET, final, forged)
    assert refusal.value.reason == Reason.BAD_SIGNATURE
    with pytest.raises(Refused) as refusal:
        watch.compare(SET, final, structs.replace(forged, signers=b"\xff"))
    assert refusal.value.reason == Reason.BAD_BITMAP
    assert not watch.has_news


@pytest.mark.parametrize("height", [2, 14])
async def test_a_served_certificate_convicts_however_old_it_is_and_when_its_height_is_reached(
    height: int, tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "WINDOW", 2)
    hub = Hub()
    async with AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(running(hub, tmp_path / str(i), GENESIS, key))
            for i, key in enumerate(MEMBERS)
        ]
        await until_height(engines[0], 9)
        core = engines[0]._core
        assert not core.watch.covers(height)
        for i in range(MAX_FOREIGN):
            core.witness(
                structs.replace(certificate(VoteKind.FINALIZE, height, OTHER, MEMBERS), chain_id=bytes([i] * 32))
            )
        core.witness(certificate(VoteKind.FINALIZE, height, OTHER, MEMBERS[1:]))
        engines[0]._pump()
        with trio.fail_after(120):
            found = await blocks_with_evidence(engines[0], 12)
        assert set(culprits(found)) <= {key.account for key in MEMBERS[1:]}
        assert found
