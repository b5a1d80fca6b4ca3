"""An audit that is drawn again: everybody keeps one key for it, so that who is late computes under the right one."""

from chain.hashing import digest
from tests.chain.ledger_kit import KEYS, Ledger, Swarm, genesis_of, start_swarm

PARAMS = {"newcomer_cells": 0, "commit_window": 3, "redraws": 2, "absence_blocks": 1}


def test_a_peer_that_is_drawn_again_keeps_its_key() -> None:
    """The only auditor misses its window and is drawn anew: what it has computed meanwhile still counts."""
    ledger = Ledger(genesis_of(3, 9, **PARAMS))
    swarm: Swarm = start_swarm(ledger, KEYS[3:7], audit_rate=10_000)
    swarm.silent |= {(key.account, "commit") for key in KEYS}
    keys: dict[tuple[bytes, bytes], set[bytes]] = {}
    seeds: dict[bytes, set[bytes]] = {}
    draws: dict[tuple[bytes, bytes], set[int]] = {}
    for _ in range(20):
        swarm.work(1)
        for audit in ledger.state.active_audits():
            keys.setdefault((audit.id, audit.auditor), set()).add(audit.key)
            seeds.setdefault(audit.id, set()).add(audit.seed)
            draws.setdefault((audit.id, audit.auditor), set()).add(audit.redraws)
            assert audit.key == digest("sketch key", audit.seed, audit.auditor, audit.id)
    assert any(len(found) > 1 for found in draws.values()), "nobody was drawn again for an audit"
    assert all(len(found) == 1 for found in (*keys.values(), *seeds.values()))
