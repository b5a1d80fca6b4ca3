"""Audits and stand-ins for the chain's state, the outbox and the re-executor, for the tests of the auditor."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import cast

import msgspec
import trio

from chain.keys import PrivateKey, peer_id
from chain.params import Params
from chain.records import Account, Audit, AuditStatus
from chain.state import Duty, State
from chain.transactions import Commitment, Opening, Reveal, Trace
from chain.verdicts import Limits
from tdml_p2p.swarm.auditor import Auditor
from tdml_p2p.swarm.inputs import Input, Inputs, Senders, Wanted
from tdml_p2p.swarm.material import Unavailable
from tdml_p2p.swarm.outbox import Entry, Outbox
from tdml_p2p.swarm.reexecution import Cell, Execution, Keep, Reexecutor, results_of
from tests.tdml_p2p.swarm.trace_samples import tensor_of
from tests.trainer.swarm_kit import manifest_of
from trainer.content import address_of
from trainer.stage import CellResult

TASK = bytes(range(32))
ME = PrivateKey(bytes([1]) * 32).account
WORKER = PrivateKey(bytes([2]) * 32).account
MANIFEST = manifest_of(stages=2, steps=9, microbatches=8)
STATE = bytes([3]) * 32


def name_of(cell: int) -> bytes:
    """Return the id of the audit of a cell."""
    return bytes([cell + 1]) * 32


def audit_of(cell: int, **changes: object) -> Audit:
    """Return an audit of a cell that this account has been drawn for."""
    drawn = Audit(
        id=name_of(cell),
        claim=bytes([7]) * 32,
        task=TASK,
        generation=0,
        step=1,
        stage=0,
        cell=cell,
        worker=WORKER,
        auditor=ME,
        key=bytes([cell + 100]) * 32,
        drawn_at=1,
        deadline=10,
    )
    return msgspec.structs.replace(drawn, **changes)


def status(wanted: AuditStatus) -> int:
    """Return the number of a status in a record."""
    return tuple(AuditStatus).index(wanted)


def execution_of(cell: int) -> Execution:
    """Return what re-executing a cell gives here."""
    parts = (tensor_of(cell, 1), tensor_of(cell, 2), tensor_of(cell, 3, shape=(20,)))
    x, gy = (Input(bytes([cell, side]) * 16, peer_id(WORKER), bytes(64)) for side in (1, 2))
    return Execution(Inputs(x, gy), CellResult(*parts, boundaries=()))


def trace_of(cell: int) -> Trace:
    """Return the trace of an honest worker."""
    execution = execution_of(cell)
    y, gx, gw = results_of(execution)
    x, gy = execution.inputs.x.address, execution.inputs.gy.address
    return Trace(x=x, y=y, gy=gy, gx=gx, gw=gw, boundaries=bytes(32), state=STATE)


def opening_of(cell: int, **changes: bytes) -> Opening:
    """Return a worker's opening, with a changed trace if there are changes."""
    trace = msgspec.structs.replace(trace_of(cell), **changes)
    return Opening(name_of(cell), bytes(32), trace, (), execution_of(cell).sketch(audit_of(cell).key))


def opening_off(cell: int, factor: float) -> Opening:
    """Return the opening of a worker whose y is so many times the honest one, as its sketch says."""
    opening, execution = opening_of(cell, y=address_of(altered(cell, factor))), execution_of(cell)
    y = replace(execution, result=execution.result._replace(y=execution.result.y * factor))
    return msgspec.structs.replace(opening, sketch=y.sketch(audit_of(cell).key))


class FakeOutbox:
    """Keeps what is put in it, with the height at which it was."""

    def __init__(self, height: Callable[[], int]) -> None:
        self.entries: list[Entry] = []
        self.heights: list[int] = []
        self._height = height

    def put(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.heights.append(self._height())


@dataclass
class FakeReexecutor:
    """Takes `seconds` of virtual time for each cell; `failures` are raised once each."""

    seconds: dict[int, float] = field(default_factory=dict)
    failures: dict[int, Exception] = field(default_factory=dict)
    broken: dict[int, Exception] = field(default_factory=dict)
    """What executing a cell raises, every time."""
    blobs: dict[bytes, bytes] = field(default_factory=dict)
    started: list[int] = field(default_factory=list)
    silent: set[bytes] = field(default_factory=set)
    """Addresses that are never answered."""
    lost: set[int] = field(default_factory=set)
    """Cells whose material nobody has."""
    two_faced: set[int] = field(default_factory=set)
    """Cells of which neighbours were sent other results than are claimed."""
    compared: list[tuple[int, str, CellResult]] = field(default_factory=list)
    unsteady: tuple[float, ...] = ()
    """What each second look makes of y, in multiples of the first."""
    second_looks: list[int] = field(default_factory=list)

    async def run(self, cell: Cell, keep: Keep | None = None) -> Execution:
        number = cell.wanted.cell
        self.started.append(number)
        await trio.sleep(self.seconds.get(number, 0.0))
        if number in self.lost:
            raise Unavailable("gone with its worker")
        if number in self.broken:
            raise self.broken[number]
        if number in self.failures:
            raise self.failures.pop(number)
        return execution_of(number)

    async def again(self, cell: Cell, execution: Execution, seed: int) -> Execution:
        await trio.lowlevel.checkpoint()
        if not self.unsteady:
            raise Unavailable("gone since")
        self.second_looks.append(seed)
        off = self.unsteady[(len(self.second_looks) - 1) % len(self.unsteady)]
        return replace(execution, result=execution.result._replace(y=execution.result.y * off))

    async def is_other_kernel(self, cell: Cell) -> bool:
        await trio.lowlevel.checkpoint()
        return bool(cell.kernel)

    async def handed_others(self, cell: Cell, worker: str, result: CellResult, _limits: Limits, _until: float) -> bool:
        await trio.lowlevel.checkpoint()
        self.compared.append((cell.wanted.cell, worker, result))
        return cell.wanted.cell in self.two_faced

    async def fetch(self, address: bytes, _holders: object) -> bytes:
        await trio.lowlevel.checkpoint()
        if address in self.silent:
            await trio.sleep_forever()
        if address not in self.blobs:
            raise Unavailable("nobody has it")
        return self.blobs[address]


class Bench:
    """An auditor with stand-ins around it, and the audits that the chain knows."""

    def __init__(self) -> None:
        self.outbox = FakeOutbox(lambda: self.height)
        self.reexecutor = FakeReexecutor()
        self.audits: dict[bytes, Audit] = {}
        self.height = 1
        self.params = Params()
        self.is_manifest_here = True
        self.senders = Senders(frozenset(), frozenset())
        self.openings: dict[bytes, Opening] = {}
        self.auditor = Auditor(
            ME,
            cast(Outbox, self.outbox),
            cast(Reexecutor, self.reexecutor),
            self._describe,
            self._open,
        )

    async def _open(self, audit: Audit) -> Opening | None:
        await trio.lowlevel.checkpoint()
        return self.openings.get(audit.id)

    def active_audits(self) -> list[Audit]:
        return [audit for audit in self.audits.values() if audit.deadline >= self.height]

    def audit(self, name: bytes) -> Audit | None:
        return self.audits.get(name)

    def account(self, _account: bytes) -> Account:
        """Return an account of which nobody has complained."""
        return Account()

    def duties(self, account: bytes) -> tuple[Duty, ...]:
        return State.duties(cast(State, self), account)

    def show(self, *audits: Audit) -> None:
        """Tell the auditor of a new final state, in which these audits have changed."""
        self.audits |= {audit.id: audit for audit in audits}
        self.auditor.on_state(cast(State, self))

    async def pass_blocks(self, last: int) -> None:
        """Let a block a second go by until `last`."""
        while self.height < last:
            await trio.sleep(1.0)
            self.height += 1
            self.show()

    def commitments(self) -> list[bytes]:
        """Return the audits committed to, in order."""
        return [entry.audit for entry in self.outbox.entries if isinstance(entry, Commitment)]

    def reveals(self) -> list[Reveal]:
        """Return the reveals, in order."""
        return [entry for entry in self.outbox.entries if isinstance(entry, Reveal)]

    def _describe(self, audit: Audit) -> Cell | None:
        if not self.is_manifest_here:
            return None
        wanted = Wanted(audit.task, audit.generation, audit.step, audit.stage, audit.cell)
        return Cell(wanted, MANIFEST, STATE, (peer_id(WORKER),), self.senders)


def altered(cell: int, factor: float) -> bytes:
    """Return the bytes of a claimed y that is `factor` times the honest one."""
    return bytes((execution_of(cell).result.y * factor).numpy().tobytes())
