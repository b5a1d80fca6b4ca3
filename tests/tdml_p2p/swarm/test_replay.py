"""Replay of an audit: an honest claim stands, a false one does not, and evidence outlives the task."""

from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from chain.keys import peer_id
from chain.params import Params
from chain.records import Audit, AuditStatus, ClaimRecord
from chain.state import State
from chain.transactions import Claim, Opening, Reveal, Trace
from tdml_p2p.blob_store import BlobStore
from tdml_p2p.swarm.evidence import Evidence, EvidenceStore, keep_evidence
from tdml_p2p.swarm.inputs import Input
from tdml_p2p.swarm.material import Unavailable
from tdml_p2p.swarm.reexecution import Cell, Execution, Reexecutor, Senders, results_of
from tdml_p2p.swarm.replay import Case, NotReplayable, Records, audit_id, find_case, replay
from tests.tdml_p2p.swarm.audit_samples import audit_of, status
from tests.tdml_p2p.swarm.test_reexecution import CLIENT, HOLDER, MANIFEST, WANTED, Material, inline
from trainer.content import address_of
from trainer.tensors import buffer_of

KEY = bytes([9]) * 32
pytestmark = pytest.mark.usefixtures("_warm")


@pytest.fixture(scope="module")
def _warm() -> None:
    from trainer.stage import build_stage

    build_stage(MANIFEST, 0)


class Judged:
    """An audited cell of a real stage, its claim as honest as the test leaves it."""

    def __init__(self, material: Material) -> None:
        self.material = material
        self.reexecutor = Reexecutor(material.fetch, material.ask, inline)
        client = frozenset([peer_id(CLIENT.account)])
        self.cell = Cell(WANTED, MANIFEST, material.state, (HOLDER,), Senders(client, client))

    async def execution(self) -> Execution:
        return await self.reexecutor.run(self.cell)

    async def case(self, wanted: AuditStatus, factor: float = 1.0) -> Case:
        """Return the case of a claim whose y is `factor` times the true one."""
        execution = await self.execution()
        false = Execution(execution.inputs, execution.result._replace(y=execution.result.y * factor))
        y, gx, gw = results_of(false)
        x, gy = execution.inputs.x.address, execution.inputs.gy.address
        trace = Trace(x=x, y=y, gy=gy, gx=gx, gw=gw, boundaries=bytes(32), state=self.cell.state)
        opening = Opening(audit_of(0).id, bytes(32), trace, (), false.sketch(KEY))
        honest = execution.sketch(KEY)
        reveal = Reveal(audit_of(0).id, 0, bytes(32), honest, honest, False, False)
        audit = audit_of(0, key=KEY, status=status(wanted), opening=opening, reveal=reveal)
        self.material.give(bytes(buffer_of(false.result.y)))
        return Case(audit, opening, self.cell)


async def test_an_honest_claim_stands() -> None:
    judged = Judged(Material())
    told = await replay(await judged.case(AuditStatus.PASSED), judged.reexecutor, Params())
    assert (told["finding"], told["inputs"], told["confirms"]) == ("match", "signed by their senders", True)
    assert told["tensors"] == {"y": 0.0, "gx": 0.0, "gw": 0.0}
    assert told["deviations"] == told["auditor_deviations"] == {"y": 0.0, "gx": 0.0, "gw": 0.0}


@pytest.mark.parametrize(
    ("wanted", "said"),
    [(AuditStatus.CONVICTED, True), (AuditStatus.PASSED, False), (AuditStatus.UNDECIDED, None)],
)
async def test_a_false_claim_does_not(wanted: AuditStatus, said: bool | None) -> None:
    judged = Judged(Material())
    told = await replay(await judged.case(wanted, -1.0), judged.reexecutor, Params())
    assert (told["finding"], told["confirms"]) == ("fraud", said)
    assert told["deviations"]["y"] > 1.0  # of losses, which the sketch steadies
    assert told["tensors"]["y"] > 1.0
    assert told["auditor_deviations"]["y"] == 0.0


class Unsteady(Reexecutor):
    """A machine whose second looks differ from the first by so much of y."""

    off = 0.0

    async def again(self, cell: Cell, execution: Execution, seed: int) -> Execution:
        look = await super().again(cell, execution, seed)
        return Execution(look.inputs, execution.result._replace(y=execution.result.y * (1 + self.off)))


@pytest.mark.parametrize(
    ("spread", "off", "finding", "said"),
    [
        (0.0, 2e-5, "fault", False),
        (1e-5, 2e-5, "match", True),
        (1e-5, 1e-3, "fraud", False),
        (1e-2, 1e-3, "unsteady", None),
    ],
)
async def test_a_replay_allows_what_this_machine_cannot_hold_itself(
    spread: float, off: float, finding: str, said: bool | None
) -> None:
    judged = Judged(Material())
    judged.reexecutor = Unsteady(judged.material.fetch, judged.material.ask, inline)
    judged.reexecutor.off = spread
    told = await replay(await judged.case(AuditStatus.PASSED, 1 + off), judged.reexecutor, Params())
    assert (told["finding"], told["confirms"]) == (finding, said)
    assert (max(told["tolerance"]) > 1) is (finding != "unsteady" and spread > 0)
    assert told["thresholds"]["y"] == pytest.approx(2.5e-6 * told["tolerance"][0])


async def test_a_sketch_of_other_results_than_those_claimed_is_no_way_out() -> None:
    judged = Judged(Material())
    case = await judged.case(AuditStatus.CONVICTED, -1.0)
    honest = (await judged.execution()).sketch(KEY)
    told = await replay(
        Case(case.audit, msgspec.structs.replace(case.opening, sketch=honest), case.cell),
        judged.reexecutor,
        Params(),
    )
    assert (told["finding"], told["confirms"]) == ("match", True)
    assert told["tensors"]["false"] is True


async def test_inputs_that_nobody_signed_are_told() -> None:
    judged = Judged(Material())
    tokens = judged.material.tokens
    judged.material.tokens = bytes(len(tokens))
    other = judged.material.give(bytes(len(tokens)))
    case = await judged.case(AuditStatus.CONVICTED)
    judged.material.tokens = tokens
    told = await replay(case, judged.reexecutor, Params())
    assert case.opening.trace.x == other
    assert (told["inputs"], told["finding"]) == ("others than were signed for", "match")
    assert told["confirms"] is True


async def test_what_is_gone_is_said() -> None:
    judged = Judged(Material())
    case = await judged.case(AuditStatus.CONVICTED, -1.0)
    del judged.material.blobs[case.opening.trace.y]
    told = await replay(case, judged.reexecutor, Params())
    assert told["tensors"]["y"] == "not available"
    assert told["confirms"] is True
    del judged.material.blobs[address_of(judged.material.tokens)]
    with pytest.raises(NotReplayable, match="cannot be had"):
        await replay(case, judged.reexecutor, Params())


async def test_evidence_outlives_its_holder(tmp_path: Path) -> None:
    judged = Judged(Material())
    case = await judged.case(AuditStatus.CONVICTED, -1.0)
    blobs = BlobStore(tmp_path / "blobs")
    store = EvidenceStore(tmp_path / "evidence", blobs)

    async def keep(inputs: Any, material: Any) -> None:
        await keep_evidence(store, judged.material.fetch, case.audit, case.cell, inputs, material)

    await judged.reexecutor.run(case.cell, keep)
    kept = store.of_audit(case.audit.id)
    assert kept is not None
    assert store.describe(WANTED) == kept.descriptor
    for address in (case.opening.trace.x, case.opening.trace.gy, case.opening.trace.y, case.cell.state):
        assert address in kept.blobs
        assert await blobs.index(address) is not None
    assert store.describe(msgspec.structs.replace(WANTED, cell=7)) is None


async def test_the_oldest_evidence_makes_room_and_shared_blobs_stay(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path / "blobs")
    store = EvidenceStore(tmp_path / "evidence", blobs, limit=2)
    shared, side = b"weights", Input(bytes(32), "peer", bytes(64))
    for number in range(3):
        own = bytes([number])
        found = Evidence(bytes([number]) * 32, WANTED, side, side, (address_of(shared), address_of(own)))
        await store.keep(found, (shared, own))
    assert store.of_audit(bytes(32)) is None
    assert store.of_audit(bytes([2]) * 32) is not None
    assert await blobs.index(address_of(bytes([0]))) is None
    assert await blobs.index(address_of(shared)) is not None


@pytest.mark.parametrize("content", [b"", b"\xc1", bytes(300_000)])
def test_a_damaged_file_is_no_evidence(tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "evidence"
    folder.mkdir()
    (folder / bytes(32).hex()).write_bytes(content)
    store = EvidenceStore(folder, BlobStore(tmp_path / "blobs"))
    assert store.of_audit(bytes(32)) is None
    assert store.describe(WANTED) is None


class Known:
    """A chain that knows one audit, and its claim unless that is gone."""

    def __init__(self, audit: Audit | None, is_claim_here: bool = True) -> None:
        claim = Claim(bytes(32), 0, 1, 0, (0,), bytes(32), bytes(32), bytes(32))
        self._audit = audit
        self._claim = ClaimRecord(bytes(32), claim, bytes(32), 1) if is_claim_here else None

    def audit(self, _audit: bytes) -> Audit | None:
        return self._audit

    def claim(self, _claim: bytes) -> ClaimRecord | None:
        return self._claim

    def task(self, _task: bytes) -> None:
        return None


@pytest.mark.parametrize(
    ("known", "said"),
    [
        (Known(None), "There is no audit"),
        (Known(audit_of(0)), "has not opened"),
        (Known(audit_of(0, opening=Opening(bytes(32), bytes(32), Trace(*[bytes(32)] * 7), (), bytes(384)))), "claim"),
    ],
)
async def test_what_cannot_be_replayed_is_said(known: Known, said: str) -> None:
    async def read(_address: bytes, _holders: Any) -> Any:
        raise Unavailable("nobody")

    with pytest.raises(NotReplayable, match=said):
        await find_case(cast(Records, known), cast(State, known), bytes(32), read)


def test_an_id_that_is_none_is_said() -> None:
    with pytest.raises(NotReplayable, match="not hexadecimal"):
        audit_id("zz")
