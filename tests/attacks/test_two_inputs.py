"""Two signed inputs for one cell: a worker and who sent them show one to an auditor, the other to everybody else."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from msgspec import structs

from chain.keys import PrivateKey, peer_id
from chain.records import Audit
from chain.transactions import Opening, Reveal, Trace
from tdml_p2p.swarm.inputs import (
    Descriptor,
    Senders,
    Wanted,
    checked,
    encode,
    expected_messages,
    misleads,
    signed_input,
)
from tests.attacks.cells import inputs_of
from tests.attacks.figures import Figures, follow
from tests.attacks.kit import MICROBATCHES, STAGES, Character, Place, RealSwarm, auditors_of, place_of, swarm_of
from tests.chain.ledger_kit import by_account
from tests.trainer.swarm_kit import manifest_of

RATE = 3000
BLOCKS = 60
TASK = bytes(range(32))
SHAPES = manifest_of(stages=STAGES, microbatches=MICROBATCHES, layers=STAGES)
"""A task that says in which messages inputs travel; the recorded cells are of another one."""


@dataclass
class Deceiving(RealSwarm):
    """A swarm in which some are given the inputs of another cell, by the workers who deceive them."""

    liars: frozenset[bytes] = frozenset()
    deceived: frozenset[bytes] = frozenset()
    is_second: bool = False
    """Whether only votes on a reopened audit are deceived."""
    sacrificed: frozenset[bytes] = frozenset()
    """Workers that open second audits falsely."""
    is_first_only: bool = False
    """Whether only auditors are deceived, and nobody who judges once a cell is opened."""
    alibis: "dict[bytes, Callable[[Deceiving, Audit], bytes]]" = field(default_factory=dict)
    """What auditors show as inputs that they were given."""

    def shown(self, account: bytes, audit: Audit) -> Place:
        """Return the cell whose inputs a peer is given."""
        place = place_of(audit)
        is_meant = audit.worker in self.liars and account in self.deceived and audit.is_reopened >= self.is_second
        is_meant = is_meant and not (self.is_first_only and audit.opening is not None and account != audit.auditor)
        if place.worker or not is_meant:  # of an optimiser's step there is one record, the worker's own
            return place
        return place._replace(cell=place.cell + 1)

    def opening(self, audit: Audit, deviation: float = 0.0) -> Opening:
        """Return the opening of an audited cell."""
        opened = super().opening(audit)
        if audit.first is None or audit.worker not in self.sacrificed:
            return opened
        return structs.replace(opened, sketch=self._sketch("sign flip", place_of(audit), audit.key))

    def found(self, reveal: Reveal, account: bytes, audit: Audit, said: str) -> Reveal:
        """Return a reveal: a deceived auditor shows what it was given, and voters look at what one shows."""
        told, shown = super().found(reveal, account, audit, said), self.shown(account, audit)
        if account in self.alibis and reveal.round == 0 and not place_of(audit).worker:
            return structs.replace(told, contradiction=True, shown=self.alibis[account](self, audit))
        if reveal.round == 0 and shown != place_of(audit):
            return structs.replace(
                told, shown=self.signed(audit, address=inputs_of(shown.stage, shown.number).x.address)
            )
        if reveal.round != 2 or audit.reveal is None or shown != place_of(audit):
            return told
        here = Wanted(audit.task, audit.generation, audit.step, audit.stage, audit.cell)
        return structs.replace(
            told, misled=misleads(audit.reveal.shown, opened(audit), here, SHAPES, self.senders(audit.stage))
        )

    def senders(self, stage: int) -> Senders:
        """Return who may send the inputs of a stage's cells."""
        every = [frozenset(map(peer_id, self.seated(one))) for one in range(STAGES)]
        client = frozenset([peer_id(self.client.account)])
        return Senders(every[stage - 1] if stage else client, every[stage + 1] if stage + 1 < STAGES else client)

    def signed(self, audit: Audit, key: PrivateKey | None = None, address: bytes = bytes(32), **changes: int) -> bytes:
        """Return an x of a cell, as the worker before it signs it unless the key is another's."""
        wanted = structs.replace(Wanted(audit.task, audit.generation, audit.step, audit.stage, audit.cell), **changes)
        x, _ = expected_messages(wanted, SHAPES)
        signer = key or (by_account(self.seated(audit.stage - 1)[0]) if audit.stage else self.client)
        return encode(Descriptor(signed_input(signer, audit.task, x, address), None))


def opened(audit: Audit) -> Trace:
    """Return the trace that a worker has opened."""
    assert audit.opening is not None
    return audit.opening.trace


def deceiving(run: str, **params: object) -> Deceiving:
    plain = swarm_of(run, RATE, **params)
    swarm = Deceiving(plain.ledger, plain.client, plain.task)
    swarm.liars = frozenset(swarm.seated(1))
    return swarm


def test_one_who_signs_two_inputs_for_a_cell_is_believed_twice() -> None:
    """What the attack rests on: an auditor cannot see that it was given another input than the worker was."""
    manifest, key = manifest_of(stages=2), PrivateKey(bytes([9]) * 32)
    wanted = Wanted(TASK, 0, 1, 1, 0)
    x, _ = expected_messages(wanted, manifest)
    senders = Senders(frozenset([peer_id(key.account)]), frozenset())
    both = [Descriptor(signed_input(key, TASK, x, address), None) for address in (bytes(32), bytes([1]) * 32)]
    assert [checked(wanted, one, manifest, senders) for one in both] == both


def deceived_auditor() -> tuple[Deceiving, bytes]:
    """Return a swarm in which one honest auditor has been given other inputs for a while."""
    swarm = deceiving("auditor deceived")
    victim = min(set(swarm.state.validators().powers) - {w.account for w in swarm.state.workers(swarm.task)})
    swarm.deceived = frozenset([victim])
    for _ in range(BLOCKS):
        swarm.work(1)
    return swarm, victim


def test_only_the_deceived_auditor_disputes_and_whom_it_accuses_loses_nothing() -> None:
    swarm, victim = deceived_auditor()
    disputed = swarm.ledger.happened("disputed")
    assert disputed
    assert {event["auditor"] for event in disputed} == {peer_id(victim)}
    assert not {"evicted", "withheld", "undecided", "slashed"} & set(swarm.ledger.kinds())


def test_a_deceived_auditor_loses_neither_stake_nor_draws() -> None:
    swarm, victim = deceived_auditor()
    assert not {"charged", "absent"} & set(swarm.ledger.kinds())
    assert swarm.state.account(victim).bonded == 1_000_000
    (said,) = {event["ballot"] for event in swarm.ledger.happened("ballot")}
    assert said == "auditor-misled"
    acquitted = swarm.ledger.happened("acquitted")
    assert {event["worker"] for event in acquitted} <= {peer_id(account) for account in swarm.liars}
    drawn = [event for event in swarm.ledger.happened("drawn") if event["auditor"] == peer_id(victim)]
    assert drawn[-1]["step"] > acquitted[0]["step"]


def test_a_worker_that_deceives_its_auditor_about_a_false_cell_is_convicted_by_it() -> None:
    swarm = deceiving("deceived and cheated")
    swarm.deceived = frozenset(auditors_of(swarm, swarm.seated(1)[0]))
    swarm.is_first_only = True
    cheat = swarm.seated(1)[0]
    swarm.liars = frozenset([cheat])
    swarm.characters[cheat] = Character(attack="sign flip")
    figures = Figures("deceived and cheated", RATE / 10_000)
    follow(swarm, cheat, figures)
    assert (figures.convicted, figures.honest_evictions, figures.honest_charges) == (1, 0, 0)


ALIBIS: dict[str, Callable[[Deceiving, Audit], bytes]] = {
    "nothing": lambda swarm, audit: b"",
    "noise": lambda swarm, audit: b"\x92\xc0\xc1",
    "neither input": lambda swarm, audit: encode(Descriptor(None, None)),
    "signed by itself": lambda swarm, audit: swarm.signed(audit, key=by_account(audit.auditor)),
    "signed by another stage": lambda swarm, audit: swarm.signed(audit, key=by_account(swarm.seated(2)[0])),
    "signed by the worker": lambda swarm, audit: swarm.signed(audit, key=by_account(audit.worker)),
    "of another cell": lambda swarm, audit: swarm.signed(audit, cell=audit.cell + 1),
    "of another step": lambda swarm, audit: swarm.signed(audit, step=audit.step + 1),
    "of another generation": lambda swarm, audit: swarm.signed(audit, generation=audit.generation + 1),
    "what was opened": lambda swarm, audit: swarm.signed(audit, address=opened(audit).x),
}


@pytest.mark.parametrize("alibi", ALIBIS)
def test_a_lazy_auditor_is_charged_whatever_it_shows(alibi: str) -> None:
    swarm = deceiving(f"lazy {alibi}")
    lazy = min(set(swarm.state.validators().powers) - {w.account for w in swarm.state.workers(swarm.task)})
    swarm.characters[lazy] = Character(judges=lambda _, __, ___: "random gradients")
    swarm.alibis = {lazy: ALIBIS[alibi]}
    while not (ended := [e for e in swarm.ledger.happened("acquitted") if e["auditor"] == peer_id(lazy)]):
        swarm.work(1)
    (charged, *_) = swarm.ledger.happened("charged")
    assert (charged["audit"], charged["auditor"]) == (ended[0]["audit"], peer_id(lazy))


def test_a_lazy_auditor_with_a_partner_beside_the_worker_is_spared_and_unpaid() -> None:
    """All that a partner's second signature buys: an audit that ends as if there had been none."""
    swarm = deceiving("lazy with a partner")
    lazy = min(set(swarm.state.validators().powers) - {w.account for w in swarm.state.workers(swarm.task)})
    swarm.characters[lazy] = Character(judges=lambda _, __, ___: "random gradients")
    swarm.alibis = {lazy: lambda swarm, audit: swarm.signed(audit) if audit.stage == 1 else b""}
    while not any(event["stage"] == 1 and event["auditor"] == peer_id(lazy) for event in ended_of(swarm)):
        swarm.work(1)
    (first, *_) = [e for e in ended_of(swarm) if e["stage"] == 1 and e["auditor"] == peer_id(lazy)]
    assert first["audit"] not in {event["audit"] for event in swarm.ledger.happened("charged")}
    assert first["audit"] not in {event["audit"] for event in swarm.ledger.happened("passed")}
    assert not {"evicted", "undecided", "withheld"} & set(swarm.ledger.kinds())


def ended_of(swarm: Deceiving) -> list[dict[str, object]]:
    """Return the audits that ended in the worker's favour."""
    return swarm.ledger.happened("acquitted")


def test_a_worker_that_opens_other_inputs_than_the_voters_get_convicts_itself_and_never_its_auditor() -> None:
    """All who judge are given another input: the worker, not the auditor that agreed with it, is out."""
    swarm = deceiving("voters deceived")
    swarm.deceived = frozenset(swarm.state.validators().powers)
    cheat = swarm.seated(1)[0]
    swarm.liars = frozenset([cheat])
    figures = Figures("voters deceived", RATE / 10_000)
    follow(swarm, cheat, figures)
    assert (figures.convicted, figures.honest_evictions, figures.honest_charges) == (1, 0, 0)
    assert {event["ballot"] for event in swarm.ledger.happened("ballot")} == {"against-worker"}


def test_votes_on_a_passed_audit_cannot_be_turned_on_its_auditor() -> None:
    """A worker that sacrifices itself: convicted by a second audit, it shows the voters on the first other inputs."""
    reopened = 0
    for run in range(4):
        swarm = deceiving(f"sacrifice {run}", reaudit_rate=10_000)
        swarm.is_second, swarm.deceived = True, frozenset(swarm.state.validators().powers)
        cheat = swarm.seated(1)[run % 2]
        swarm.liars = swarm.sacrificed = frozenset([cheat])
        for _ in range(BLOCKS):
            swarm.work(1)
        assert {event["worker"] for event in swarm.ledger.happened("slashed")} <= {peer_id(cheat)}
        assert not swarm.ledger.happened("charged")
        assert not swarm.ledger.happened("refuted")
        reopened += len(swarm.ledger.happened("reopened"))
    assert reopened >= 2
