"""A small swarm whose cells are real computations: recorded cells, real sketches, the real ledger in virtual blocks.

Only peers and network are played: every peer has a character, which says what it claims, opens, serves and judges.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from msgspec import structs

from chain.commitment import claim_root, leaf, prove
from chain.hashing import digest
from chain.keys import PrivateKey
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
from tdml_p2p.swarm.reexecution import Execution
from tests.attacks.cells import USUAL, addresses_of, inputs_of, recordings, result_of, sketch_of
from tests.chain.ledger_kit import KEYS, Ledger, Material, Sent, Swarm, by_account, genesis_of, start_swarm, state_root
from trainer.tensors import buffer_of

MICROBATCHES = 16
REPLICAS = 2
STAGES = 3
VALIDATORS = 10
STEPS = 400
SALT = bytes(32)


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
    is_of_steps: bool = False
    """Whether its false results are its optimiser's steps instead of its cells."""
    after: bytes = b""
    """What makes another root of the state after a step of which it claims a false result."""


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
            is_false = (
                bool(character.attack) and is_cell != character.is_of_steps and character.is_cheating(self, place)
            )
            said = character.attack if is_false else character.kernel
            if is_false and addresses_of(said, stage, place.number) != addresses_of(USUAL, stage, place.number):
                self.cheated.append(place)
            self.claimed_as[place], self.owners[place] = said, account
            traces.append(trace_of(place, said))
        leaves = [leaf(SALT, trace) for trace in traces]
        for index, (cell, trace) in enumerate(zip(leaves_of, traces, strict=True)):
            name = bytes([task.generation, stage]) + step.to_bytes(4, "big") + account
            self._material[name, cell, ()] = Material(SALT, trace, prove(leaves, index))
        before, after = state_root_of(step - 1, stage), state_root_of(step, stage)
        if character.after and is_false:  # the optimiser's step is the last leaf
            after = digest("root", character.after, after)
        return Claim(self.task, task.generation, step, stage, cells, claim_root(leaves), before, after)

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
        return sketch_of(said, place.stage, place.number, key)


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


def swarm_of(run: str, rate: int = 1000, **params: Any) -> RealSwarm:
    """Return a running swarm of 3 stages with 2 workers each, 10 validators, and no newcomers' audits.

    Runs of other names have other draws.
    """
    return swarm_of_keys(run, KEYS[: STAGES * REPLICAS], rate, **params)


def swarm_of_keys(
    run: str,
    workers: Sequence[PrivateKey],
    rate: int = 1000,
    *,
    validators: int = VALIDATORS,
    steps: int = STEPS,
    **params: object,
) -> RealSwarm:
    """Return such a swarm with these workers; the first keys are those of validators."""
    quiet = {"newcomer_cells": 0, "lease_blocks": 100_000, **params}
    genesis = structs.replace(genesis_of(validators, 2, **quiet), name=run.encode())
    cells = steps * STAGES * MICROBATCHES
    terms: dict[str, object] = {"stages": STAGES, "replicas": REPLICAS, "steps": steps, "microbatches": MICROBATCHES}
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


def agree(swarm: RealSwarm, audit: Audit, round_: int) -> str:
    """Find what the worker has claimed: a friend that tells it the result beforehand."""
    return swarm.claimed_as[place_of(audit)]
