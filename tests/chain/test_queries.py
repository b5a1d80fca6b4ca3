"""What the inspector says of evidence that is no fraud: why somebody lost a seat and kept the bond."""

from contextlib import closing
from pathlib import Path

import pytest

from chain.queries import Reader, answer
from chain.records import Conviction
from chain.store import Store
from chain.views import grounds
from tests.chain.ledger_kit import Ledger, Swarm, genesis_of, start_swarm

SMALL = 1e-4


def until_evicted(ends: str) -> Swarm:
    """Return a swarm in which a worker has lost its seat after two occasions that ended so."""
    swarm = start_swarm(Ledger(genesis_of(withheld_limit=2)))
    worker = swarm.seated(0)[0]
    if ends == "faulted":
        swarm.deviation[worker] = SMALL
    else:
        swarm.silent.add((worker, "open"))
    while not swarm.ledger.happened("evicted"):
        swarm.work(1)
    return swarm


@pytest.mark.parametrize("ends", ["faulted", "withheld"])
def test_evidence_says_whether_data_was_kept_back_or_results_were_off(ends: str, tmp_path: Path) -> None:
    swarm = until_evicted(ends)
    with closing(Store.open(tmp_path / "chain.db", swarm.ledger.genesis)) as store:
        reader = Reader(store, lambda: swarm.state)
        (row,) = answer(reader, "evidence", {})
        assert row["kind"] == ends
        assert answer(reader, "evidence", {"id": row["id"]})["kind"] == ends


@pytest.mark.parametrize(("kind", "said"), [(0, "verdict"), (1, "equivocation"), (2, "withheld"), (3, "silent")])
def test_what_an_eviction_rests_on_is_known_when_its_audit_is_not_any_more(kind: int, said: str) -> None:
    assert grounds(Conviction(bytes(32), kind, bytes(32), None, 1, 0, bytes(32)), None) == said
