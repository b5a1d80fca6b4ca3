"""A small swarm whose cells are real computations: recorded cells, real sketches, the real ledger in virtual blocks.

Only peers and network are played: every peer has a character, which says what it claims, opens, serves and judges.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from msgspec import structs

from bench.support.recordings import HONEST, RESULTS, SMALL, Attack, Recording, Recordings, record
from chain.commitment import claim_root, leaf, prove
from chain.hashing import digest
from chain.keys import PrivateKey, peer_id
from chain.records import Audit
from chain.state import Duty
from chain.transactions import (
    Claim,
    Commit,
    Commitment,
    Open,
    Opening,
    Payload,
    Reveal,
    RevealAll,
    SubmitClaims,
    Trace,
    reveal_commitment,
)
from chain.verdicts import BLANK, limits_for
from tdml_p2p.swarm.contradictions import disputed_results, has_false_results, has_other_inputs
from tdml_p2p.swarm.inputs import Input, Inputs
from tdml_p2p.swarm.reexecution import Execution
from tests.chain.ledger_kit import KEYS, Ledger, Material, Sent, Swarm, by_account, genesis_of, start_swarm, state_root
from trainer.content import address_of
from trainer.sketch import cell_sketch
from trainer.stage import CellResult
from trainer.tensors import buffer_of

ATTACKS: dict[str, Attack] = {**HONEST, **SMALL, **RESULTS}
USUAL = "same kernels"
MICROBATCHES = 16
REPLICAS = 2
STAGES = 3
VALIDATORS = 10
STEPS = 400
SALT = bytes(32)


@cache
def recordings() -> Recordings:
    """Return the recorded cells, made once a process."""
    torch.set_num_threads(1)
    return record()


@cache
def result_of(attack: str, stage: int, number: int) -> CellResult:
    """Return what an attack, or an honest configuration, makes of a recorded cell."""
    recorded = recordings()
    return ATTACKS[attack](recorded, recorded.cells[stage][number])


@cache
def addresses_of(attack: str, stage: int, number: int) -> dict[str, bytes]:
    """Return the content addresses of such a result."""
    result = result_of(attack, stage, number)
    return {name: address_of(buffer_of(getattr(result, name).contiguous())) for name in ("y", "gx", "gw")}


@cache
def inputs_of(stage: int, number: int) -> Inputs:
    """Return the inputs of a recorded cell by address."""
    one: Recording = recordings().cells[stage][number]
    gy = one.gy if one.labels is None else one.labels
    assert gy is not None
    x, gy = (Input(address_of(buffer_of(part.contiguous())), "-", bytes(64)) for part in (one.x, gy))
    return Inputs(x, gy)


class Place(NamedTuple):
    """A claimed cell: task's generation, step, stage and micro-batch; for an optimiser's step, also whose it is."""

    generation: int
    step: int
    stage: int
    cell: int
    worker: bytes = b""

    @property
    def number(self) -> int:
        """The recorded cell that stands for it."""
        return (self.step * MICROBATCHES + self.cell) % len(recordings().cells[self.stage])


def always(_: "RealSwarm", __: Place) -> bool:
    """Cheat in every cell."""
    return True


@dataclass
class Character:
    """What a peer does. `attack` and `opens` name results; `withholds` are tensors that it gives nobody."""

    kernel: str = USUAL
    attack: str = ""
    is_cheating: Callable[["RealSwarm", Place], bool] = always
    opens: str = ""
    withholds: frozenset[str] = frozenset()
    judges: Callable[["RealSwarm", Audit, int], str] | None = None
    """The name of the result that it commits to when it has to judge, in the given round."""
    accuses: bool = False
    """Whether it reports contradictions that it has not found."""
    misses: bool = False
    """Whether it reports that data is not given which is."""


HONEST_PEER = Character()


@dataclass
class RealSwarm(Swarm):
    """A swarm that claims, opens and judges real results, everybody by its character."""

    characters: dict[bytes, Character] = field(default_factory=dict)
    claimed_as: dict[Place, str] = field(default_factory=dict)
    owners: dict[Place, bytes] = field(default_factory=dict)
    cheated: list[Place] = field(default_factory=list)
    """Cells with a false result, in the order of their claims."""
    executions: int = 0
    """Re-executions by auditors, third peers and voters."""

    def character(self, account: bytes) -> Character:
        """Return how a peer behaves."""
        return self.characters.get(account, HONEST_PEER)

    def claims(self, step: int) -> list[Sent]:
        """Return everybody's claims of one step: the cells dealt out among the stage's workers."""
        task = self.state.task(self.task)
        assert task is not None
        sent = []
        for stage in range(task.stages):
            workers = self.seated(stage)
            for index, account in enumerate(workers):
                cells = tuple(range(index, task.microbatches, len(workers)))
                sent.append((by_account(account), SubmitClaims((self._claim_of(account, step, stage, cells),))))
        self.claimed.add((task.generation, step))
        return sent

    def _claim_of(self, account: bytes, step: int, stage: int, cells: tuple[int, ...]) -> Claim:
        task = self.state.task(self.task)
        assert task is not None
        character = self.character(account)
        traces = []
        leaves_of = (*cells, task.transition)
        for cell in leaves_of:
            is_cell = cell < task.transition
            place = Place(task.generation, step, stage, cell, b"" if is_cell else account)
            is_false = is_cell and bool(character.attack) and character.is_cheating(self, place)
            said = character.attack if is_false else character.kernel
            if is_false and addresses_of(said, stage, place.number) != addresses_of(USUAL, stage, place.number):
                self.cheated.append(place)
            self.claimed_as[place], self.owners[place] = said, account
            traces.append(trace_of(place, said))
        leaves = [leaf(SALT, trace) for trace in traces]
        for index, (cell, trace) in enumerate(zip(leaves_of, traces, strict=True)):
            name = bytes([task.generation, stage]) + step.to_bytes(4, "big") + account
            self._material[name, cell, ()] = Material(SALT, trace, prove(leaves, index))
        states = state_root_of(step - 1, stage), state_root_of(step, stage)
        return Claim(self.task, task.generation, step, stage, cells, claim_root(leaves), *states)

    def opening(self, audit: Audit, deviation: float = 0.0) -> Opening:
        """Return the opening of an audited cell."""
        place = place_of(audit)
        name = bytes([place.generation, place.stage]) + place.step.to_bytes(4, "big") + audit.worker
        kept = self._material[name, place.cell, ()]
        said = self.character(audit.worker).opens or self.claimed_as[place]
        return Opening(audit.id, kept.salt, kept.trace, kept.proof, self._sketch(said, place, audit.key))

    def answer(self, key: PrivateKey, duty: Duty) -> Payload:
        """Return what a peer answers to one duty."""
        audit = self.state.audit(duty.audit)
        assert audit is not None
        if duty.kind == "open":
            return Open((self.opening(audit),))
        name = (key.account, duty.audit, duty.round, audit.key)
        said = self.judgement(key.account, audit, duty.round)
        if duty.kind == "commit":
            self.executions += 1
            shown = self.shown(key.account, audit)
            shared, own = (self._sketch(said, shown, one) for one in (audit.key, duty.key))
            if duty.round and shown != place_of(audit):
                shared = own = BLANK
            reveal = Reveal(duty.audit, duty.round, digest("salt", key.seed), shared, own, False, False)
            self._pending[name] = reveal
            return Commit((Commitment(duty.audit, duty.round, reveal_commitment(key.account, reveal)),))
        return RevealAll((self.found(self._pending[name], key.account, audit, said),))

    def found(self, reveal: Reveal, account: bytes, audit: Audit, said: str) -> Reveal:
        """Return a reveal with what this peer finds behind the opened trace."""
        contradicts, misses = self._look(audit, said, self.shown(account, audit))
        return structs.replace(
            reveal,
            contradiction=contradicts or self.character(account).accuses,
            missing=misses or self.character(account).misses,
        )

    def judgement(self, account: bytes, audit: Audit, round_: int) -> str:
        """Return the name of the result that a peer finds, or says to find."""
        character = self.character(account)
        return character.judges(self, audit, round_) if character.judges else character.kernel

    def shown(self, account: bytes, audit: Audit) -> Place:
        """Return the cell whose signed inputs a peer is given when it asks for those of an audited one."""
        return place_of(audit)

    def _look(self, audit: Audit, said: str, shown: Place) -> tuple[bool, bool]:
        assert audit.opening is not None
        place, trace = place_of(audit), audit.opening.trace
        execution = Execution(inputs_of(place.stage, shown.number), result_of(said, place.stage, shown.number))
        if has_other_inputs(execution, trace):
            return True, False
        disputed = disputed_results(execution, trace)
        given = self.served(place, disputed)
        return bool(given) and has_false_results(execution, given, limits_for(self.state.params)), len(given) < len(
            disputed
        )

    def served(self, place: Place, wanted: Iterable[str]) -> dict[str, memoryview]:
        """Return the claimed tensors that the worker of a cell gives to those who judge it."""
        given = set(wanted) - self.character(self.owners[place]).withholds
        result = result_of(self.claimed_as[place], place.stage, place.number)
        return {name: buffer_of(getattr(result, name).contiguous()) for name in given}

    def _sketch(self, said: str, place: Place, key: bytes) -> bytes:
        result = result_of(said, place.stage, place.number)
        return cell_sketch(result.y, result.gx, result.gw, key)


def trace_of(place: Place, said: str) -> Trace:
    """Return the trace of a cell with this result."""
    inputs = inputs_of(place.stage, place.number)
    return Trace(
        x=inputs.x.address,
        gy=inputs.gy.address,
        boundaries=bytes(32),
        state=state_root_of(place.step - 1, place.stage),
        **addresses_of(said, place.stage, place.number),
    )


def place_of(audit: Audit) -> Place:
    """Return the cell that an audit is about."""
    is_cell = audit.cell < MICROBATCHES
    return Place(audit.generation, audit.step, audit.stage, audit.cell, b"" if is_cell else audit.worker)


def state_root_of(step: int, stage: int) -> bytes:
    """Return the agreed root of a stage's state after a step, for any number of steps."""
    return digest("root", state_root(step % 256, stage), step.to_bytes(8, "big"))


def swarm_of(run: str, rate: int = 1000, **params: object) -> RealSwarm:
    """Return a running swarm of 3 stages × 2 workers, 10 validators, no newcomers' audits; other names, other draws."""
    return swarm_of_keys(run, KEYS[: STAGES * REPLICAS], rate, **params)


def swarm_of_keys(run: str, workers: Sequence[PrivateKey], rate: int = 1000, **params: object) -> RealSwarm:
    """Return such a swarm with these workers; the first ten keys are those of validators."""
    quiet = {"newcomer_cells": 0, "lease_blocks": 100_000, **params}
    genesis = structs.replace(genesis_of(VALIDATORS, 2, **quiet), name=run.encode())
    cells = STEPS * STAGES * MICROBATCHES
    terms: dict[str, object] = {"stages": STAGES, "replicas": REPLICAS, "steps": STEPS, "microbatches": MICROBATCHES}
    terms |= {"audit_rate": rate, "worker_bond": 20_000, "escrow": 3 * cells * 10, "lifetime": 100_000}
    started = start_swarm(Ledger(genesis), workers, **terms)
    return RealSwarm(started.ledger, started.client, started.task)


def auditors_of(swarm: RealSwarm, worker: bytes) -> list[bytes]:
    """Return who may be drawn for the cells of a worker: all have the same stake, and none is beside it."""
    own = swarm.state.worker(swarm.task, worker)
    assert own is not None
    beside = {w.account for w in swarm.state.workers(swarm.task) if abs(w.stage - own.stage) <= 1}
    return [a for a in swarm.state.validators().powers if a not in beside]


def outsiders(swarm: RealSwarm) -> list[bytes]:
    """Return the validators without a seat, who may be drawn for the cells of every stage."""
    return sorted(set(swarm.state.validators().powers) - {w.account for w in swarm.state.workers(swarm.task)})


@dataclass
class Figures:
    """What came of the runs of one attack."""

    attack: str
    theory: float
    """h, the chance that a cheated cell is audited by somebody who does not collude."""
    runs: int = 0
    convicted: int = 0
    cells: list[int] = field(default_factory=list)
    """Cheated cells up to the first that was disputed, by run."""
    claimed: list[int] = field(default_factory=list)
    """Cheated cells claimed by the time of the eviction, those in flight included."""
    settled: list[int] = field(default_factory=list)
    """Cheated cells in steps that had settled before the eviction: they stay, and no rollback undoes them."""
    honest_evictions: int = 0
    honest_charges: int = 0
    executions: int = 0
    """Re-executions, of all cells and for the disputes."""
    paid: int = 0
    """Cells of everybody."""
    ends: dict[str, int] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean cheated cells until the first that is disputed, itself included."""
        return sum(self.cells) / max(1, len(self.cells))

    def quantile(self, share: float) -> int:
        """Return the smallest number of cells that this share of the runs did not exceed."""
        ordered = sorted(self.cells)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0

    def bounds(self, deviations: float = 4.0) -> tuple[float, float]:
        """Return the interval around 1/h in which the mean of so many geometric runs lies."""
        spread = deviations * ((1 - self.theory) / self.theory**2 / max(1, len(self.cells))) ** 0.5
        return 1 / self.theory - spread, 1 / self.theory + spread


Prepare = Callable[[RealSwarm, bytes], None]
"""Gives the peers of a new swarm their characters, the cheat's among them."""


def measure(attack: str, prepare: Prepare, runs: int, stage: int = 1, colluding: int = 0, **params: object) -> Figures:
    """Return what came of `runs` runs, each until the cheat is out; `colluding` of its auditors are its friends."""
    figures, rate = Figures(attack, 0.0), 1000
    for run in range(runs):
        swarm = swarm_of(f"{attack} {run}", rate, **params)
        cheat = swarm.seated(stage)[run % REPLICAS]
        pool = auditors_of(swarm, cheat)
        friends = pool[:colluding]
        figures.theory = rate / 10_000 * (1 - len(friends) / len(pool))
        swarm.characters |= {friend: Character(judges=agree) for friend in friends}
        prepare(swarm, cheat)
        follow(swarm, cheat, figures)
    return figures


def follow(swarm: RealSwarm, cheat: bytes, figures: Figures, blocks: int = 600) -> None:
    """Let a swarm work until the cheat has lost its seat; add what came of it to `figures`."""
    for _ in range(blocks):
        swarm.work(1)
        worker = swarm.state.worker(swarm.task, cheat)
        if worker is None or not worker.is_seated:
            break
    note(swarm, cheat, figures)


def note(swarm: RealSwarm, cheat: bytes, figures: Figures) -> None:
    """Add what came of a run to `figures`."""
    name, ledger = peer_id(cheat), swarm.ledger
    figures.runs += 1
    gone = [str(event["worker"]) for event in ledger.happened("slashed")]
    figures.convicted += name in gone
    figures.honest_evictions += sum(1 for event in ledger.happened("evicted") if event["worker"] != name)
    guilty = {peer_id(a) for a, c in swarm.characters.items() if c.judges or c.accuses or c.misses or c.attack}
    figures.honest_charges += sum(1 for event in ledger.happened("charged") if event["auditor"] not in guilty)
    disputed = {
        (event["step"], event["stage"], event["cell"])
        for event in ledger.happened("disputed")
        if event["worker"] == name
    }
    order = [place[1:4] for place in swarm.cheated if swarm.owners[place] == cheat]
    first = next((index for index, place in enumerate(order, 1) if place in disputed), None)
    if first is not None:
        figures.cells.append(first)
    figures.claimed.append(len(order))
    figures.settled.append(sum(1 for step, _, _ in order if step <= swarm.settled))
    figures.executions += swarm.executions
    figures.paid += len(swarm.claimed_as)
    for kind in ("passed", "convicted", "faulted", "undecided", "withheld", "acquitted", "void"):
        figures.ends[kind] = figures.ends.get(kind, 0) + len(ledger.happened(kind))


def agree(swarm: RealSwarm, audit: Audit, round_: int) -> str:
    """Find what the worker has claimed: a friend that tells it the result beforehand."""
    return swarm.claimed_as[place_of(audit)]


def cheating(attack: str, **changes: Any) -> Prepare:
    """Return what makes the cheat claim this false result."""

    def prepare(swarm: RealSwarm, cheat: bytes) -> None:
        swarm.characters[cheat] = replace(Character(attack=attack), **changes)

    return prepare
