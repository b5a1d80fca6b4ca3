"""Replay of an audit: its cell executed once more, here, and compared with what was claimed and judged.

Nobody's word is needed but the chain's: material is fetched by the addresses that the worker opened, and the
claimed sketch is on chain. What could not be had is said in the report.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import trio

from chain.keys import peer_id
from chain.params import Params
from chain.queries import Reader, open_reader
from chain.records import Audit, AuditStatus, ClaimRecord
from chain.state import State
from chain.transactions import EXACT, Opening
from chain.verdicts import TENSORS, Deviations, Limits, deviations, finding, is_match, limits_for, wide_limits
from tdml_p2p.blob_store import BlobStore
from tdml_p2p.swarm.audited import audited_cell
from tdml_p2p.swarm.contradictions import tolerances
from tdml_p2p.swarm.doubts import Doubt
from tdml_p2p.swarm.evidence import EvidenceStore
from tdml_p2p.swarm.inputs import decode_wanted, encode
from tdml_p2p.swarm.material import Unavailable
from tdml_p2p.swarm.reexecution import Cell, Execution, Reexecutor, results_of
from tdml_p2p.swarm.step_audits import contradicts
from trainer.content import address_of
from trainer.manifest import TaskManifest, decode_manifest
from trainer.worker_ports import ThreadCompute

if TYPE_CHECKING:
    from torch import Tensor

_TENSOR_SECONDS = 20.0


class NotReplayable(Exception):
    """An audit that cannot be replayed here: one sentence says why, a hint what would help."""

    def __init__(self, sentence: str, hint: str) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.hint = hint


ReadManifest = Callable[[bytes, Sequence[str]], Awaitable[TaskManifest]]


class Records(Protocol):
    """Where audits and claims are found, also those that have left the state."""

    def audit(self, audit: bytes) -> Audit | None:
        """Return an audit."""

    def claim(self, claim: bytes) -> ClaimRecord | None:
        """Return a claim."""


@dataclass(frozen=True)
class Case:
    """An audit whose worker has opened the cell, and the cell as it must have been executed."""

    audit: Audit
    opening: Opening
    cell: Cell


def audit_id(text: str) -> bytes:
    """Return the id that a user has written; raise `NotReplayable`."""
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise NotReplayable(f"{text[:80]!r} is not hexadecimal.", "ids are; --verbose shows them whole") from None


async def find_case(records: Records, state: State, identity: bytes, read: ReadManifest) -> Case:
    """Return the case of an audit, its manifest read from whoever judged it; raise `NotReplayable`."""
    audit = records.audit(identity)
    if audit is None:
        raise NotReplayable(f"There is no audit {identity.hex()}.", "see the events of a block")
    claim, task = records.claim(audit.claim), state.task(audit.task)
    if audit.opening is None:
        raise NotReplayable("The worker has not opened this cell: nothing names what it computed on.", "see the audit")
    if claim is None or task is None:
        raise NotReplayable("The chain here does not hold the claim of this audit.", "ask a peer with all blocks")
    holders = (*judges(audit), peer_id(audit.worker), peer_id(task.client))
    try:
        manifest = await read(task.manifest, holders)
    except Unavailable as error:
        raise NotReplayable(f"The task's manifest cannot be had: {error}.", "ask a peer that judged it") from None
    cell = audited_cell(audit, claim, state, manifest, judges(audit))
    assert cell is not None  # the task is known
    return Case(audit, audit.opening, cell)


def judges(audit: Audit) -> tuple[str, ...]:
    """Return the peers that have re-executed an audited cell, those who keep its material longest first."""
    third = () if audit.third is None else (audit.third.account,)
    accounts = (*(voter.account for voter in audit.voters), *third, audit.auditor)
    return tuple(peer_id(account) for account in accounts)


async def replay(case: Case, reexecutor: Reexecutor, params: Params) -> dict[str, Any]:
    """Return what re-execution on this machine says of a claim; raise `NotReplayable`."""
    trace = case.opening.trace
    try:
        execution = await reexecutor.replay(case.cell, trace.x, trace.gy)
    except Unavailable as error:
        raise NotReplayable(
            f"The material of this audit cannot be had any more: {error}.",
            "ask a peer that judged it; what was not disputed is kept only until its step has settled",
        ) from None
    own = await trio.to_thread.run_sync(execution.sketch, case.audit.key)
    is_unlike = await reexecutor.is_other_kernel(case.cell)
    limits = wide_limits(params) if is_unlike else limits_for(params)
    found = deviations(case.opening.sketch, own)
    doubt = Doubt(reexecutor, case.cell, execution)
    tolerance = await doubt.tolerance(case.audit.key, case.opening.sketch, limits)
    limits = limits._replace(tolerance=tolerance or EXACT)
    told: dict[str, Any] = {
        "audit": case.audit.id.hex(),
        "worker": peer_id(case.audit.worker),
        "status": str(case.audit.state),
        "inputs": await _inputs(case, reexecutor),
        "deviations": _by_tensor(found),
        "thresholds": _by_tensor(limits.allowed),
        "tolerance": list(limits.tolerance),
        "other_kernel": is_unlike,
        "finding": finding(found, limits) if tolerance else "unsteady",
        "tensors": await _tensors(case, reexecutor, execution, doubt, limits),
    }
    if case.audit.reveal is not None:
        told["auditor_deviations"] = _by_tensor(deviations(case.audit.reveal.shared, own))
    if case.cell.is_transition:
        is_contradicted = contradicts(execution, case.cell, case.opening)
        told["step"] = execution.contradiction or ("another state than was claimed follows" if is_contradicted else "")
    told["machine"] = await trio.to_thread.run_sync(_machine, case.cell.manifest.precision)
    is_right = confirms(case.audit.state, is_false=is_false(told, found, limits))
    told["confirms"] = is_right if tolerance else None
    return told


def is_false(told: dict[str, Any], found: Deviations, limits: Limits) -> bool:
    """Whether the claim does not stand: sketch, inputs or claimed tensors contradict the re-execution."""
    has_other_inputs = told["inputs"] == "others than were signed for"
    return not is_match(found, limits) or has_other_inputs or "false" in told["tensors"] or bool(told.get("step"))


def confirms(status: AuditStatus, *, is_false: bool) -> bool | None:
    """Return whether a replay confirms what became of an audit; None where nothing was decided about the claim."""
    if status in (AuditStatus.CONVICTED, AuditStatus.FAULTED):
        return is_false
    if status in (AuditStatus.PASSED, AuditStatus.ACQUITTED):
        return not is_false
    return None


def replay_database(path: Path, identity: str) -> dict[str, Any]:
    """Return what `replay` does, from a chain's database and the evidence kept beside it, without any peer.

    Raises `NotReplayable`, or what opening the database raises.
    """
    reader = open_reader(path)
    return trio.run(_replay_offline, reader, path.parent, audit_id(identity))


async def _replay_offline(reader: Reader, home: Path, identity: bytes) -> dict[str, Any]:
    blobs = BlobStore(home / "blobs")
    evidence = EvidenceStore(home / "evidence", blobs)

    async def fetch(address: bytes, _holders: Sequence[str]) -> bytes:
        index = await blobs.index(address)
        chunks = [await blobs.chunk(address, number) for number in range(len(index.chunks))] if index else [None]
        data = b"".join(chunk for chunk in chunks if chunk is not None)
        if None in chunks or address_of(data) != address:
            raise Unavailable(f"{address.hex()} is not beside the database")
        return data

    async def read(address: bytes, holders: Sequence[str]) -> TaskManifest:
        return decode_manifest(await fetch(address, holders))

    async def ask(_peer: str, request: bytes) -> bytes:
        found = await trio.to_thread.run_sync(evidence.describe, decode_wanted(request))
        if found is None:
            raise Unavailable("no signatures are beside the database")
        return encode(found)

    case = await find_case(reader, reader.state, identity, read)
    return await replay(case, Reexecutor(fetch, ask, ThreadCompute()), reader.state.params)


async def _inputs(case: Case, reexecutor: Reexecutor) -> str:
    """Return whether the senders' signatures stand for the inputs that the worker named."""
    trace = case.opening.trace
    if case.cell.is_transition:
        return "the worker's own record of the step"
    try:
        signed = await reexecutor.inputs(case.cell)
    except Unavailable:
        return "as the worker named them; nobody has the senders' signatures any more"
    same = (signed.x.address, signed.gy.address) == (trace.x, trace.gy)
    return "signed by their senders" if same else "others than were signed for"


async def _tensors(
    case: Case, reexecutor: Reexecutor, execution: Execution, doubt: Doubt, limits: Limits
) -> dict[str, Any]:
    """Return the whole tensors' deviations, as far as the claimed ones differ and can be had."""
    from trainer.compare import compare
    from trainer.stage import CellResult
    from trainer.tensors import vector_of

    trace, result = case.opening.trace, execution.result
    own = await trio.to_thread.run_sync(results_of, execution)
    theirs: dict[str, Tensor] = {"y": result.y, "gx": result.gx, "gw": result.gw}
    told: dict[str, Any] = {}
    for name, mine, claimed in zip(TENSORS, own, (trace.y, trace.gx, trace.gw), strict=True):
        if mine == claimed:
            told[name] = 0.0
            continue
        try:
            with trio.fail_after(_TENSOR_SECONDS):
                data = await reexecutor.fetch(claimed, case.cell.holders)
            theirs[name] = vector_of(data, theirs[name].numel()).reshape(theirs[name].shape)
        except (Unavailable, trio.TooSlowError):
            told[name] = "not available"
        except ValueError:
            told[name] = "of another size"
    parts = CellResult(**theirs, boundaries=())
    compared = await trio.to_thread.run_sync(compare, parts, result, tolerances(limits))
    if not compared.is_match and (spread := await doubt.spread()):
        compared = await trio.to_thread.run_sync(compare, parts, result, tolerances(limits, spread))
    told = {name: told.get(name, _plain(getattr(compared, name))) for name in TENSORS}
    return told | ({} if compared.is_match and "of another size" not in told.values() else {"false": True})


def _machine(precision: str) -> dict[str, str]:
    """Return what this machine computes with."""
    import torch

    from trainer.kernel import kernel_class

    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": str(torch.__version__), "cpu": capability, "kernel": kernel_class(precision).hex()}


def _plain(value: float) -> float | str:
    return value if value < float("inf") else "inf"


def _by_tensor(values: Deviations) -> dict[str, float | str]:
    return {name: _plain(value) for name, value in zip(TENSORS, values, strict=True)}
