"""What verification writes on chain for a cell when all is well."""

from chain.codec import encode
from chain.transactions import Commit, Open, RevealAll, SubmitClaims
from tests.chain.ledger_kit import Ledger, genesis_of, start_swarm

MOST_BYTES = 400
STEPS = 40
CELLS = 8
SIGNED_INPUTS = 311 + 2
"""Bytes by which an opening of real peers is longer than one of the kit: two signed inputs."""


def test_claims_and_audits_at_the_usual_rate_take_at_most_400_bytes_a_cell() -> None:
    genesis = genesis_of(newcomer_cells=0, reaudit_rate=500)
    terms = {"steps": STEPS, "microbatches": CELLS, "audit_rate": 1000, "escrow": 4 * STEPS * CELLS * 2 * 10}
    swarm = start_swarm(Ledger(genesis), replicas=2, **terms)
    swarm.work(120)
    assert swarm.settled == STEPS
    taken = dict.fromkeys((SubmitClaims, Commit, Open, RevealAll), 0)
    for _, transactions, _, _ in swarm.ledger.blocks:
        for transaction in transactions:
            kind = type(transaction.body.payload)
            if kind in taken:
                taken[kind] += len(encode(transaction))
            if kind is Open:
                taken[kind] += SIGNED_INPUTS * len(transaction.body.payload.entries)
    assert all(taken.values())
    audits = len(swarm.ledger.happened("passed"))
    cells = STEPS * CELLS * 2
    assert 0.05 < audits / cells < 0.2
    # claims, and at a tenth of the cells a commitment, an opening and a reveal of two sketches of 384 bytes each
    assert sum(taken.values()) / cells <= MOST_BYTES, {kind.__name__: n / cells for kind, n in taken.items()}
