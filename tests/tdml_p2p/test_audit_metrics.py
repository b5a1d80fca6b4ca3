"""The metric of audits counts every kind of event that the ledger has about them."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import trio

import chain.ledger
from chain.ledger import Event
from chain.records import ACTIVE, AuditStatus
from tdml_p2p.chain_service import AUDIT_EVENTS, ChainService
from tdml_p2p.metrics import Metrics
from tests.chain.ledger_kit import start_swarm

OTHERS = {"posted", "closed", "seated", "left", "claimed", "settled", "jailed", "unjailed", "equivocation", "rotated",
          "params-vote", "params-changed"}  # fmt: skip
"""Events that are not about audits."""


def noted() -> Iterator[str]:
    """Yield the kinds of events in the ledger's source."""
    for path in Path(chain.ledger.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "note":
                kind = node.args[0]
                if isinstance(kind, ast.Constant):
                    yield str(kind.value)
    yield from (str(state) for state in AuditStatus if state not in ACTIVE)


def test_every_kind_of_event_is_counted_or_is_of_something_else() -> None:
    kinds = set(noted())
    assert kinds - AUDIT_EVENTS == OTHERS
    assert kinds >= AUDIT_EVENTS


async def test_what_happens_in_blocks_is_counted() -> None:
    swarm = start_swarm()
    swarm.deviation[swarm.seated(0)[0]] = -2.0
    swarm.work(30)
    metrics = Metrics()
    service: Any = ChainService(SimpleNamespace(), SimpleNamespace(), metrics, lambda: 0)  # type: ignore[arg-type]
    header = SimpleNamespace(height=1, timestamp=0, hash=bytes(32), proposer=bytes(32))
    events = [*swarm.ledger.events, *(Event(kind, {}) for kind in AUDIT_EVENTS)]
    service._note(SimpleNamespace(block=SimpleNamespace(header=header, transactions=()), events=events))
    await trio.lowlevel.checkpoint()
    counts = Counter(event.kind for event in events)
    text = metrics.render().decode()
    for kind in AUDIT_EVENTS:
        assert f'tdml_audits_total{{event="{kind}"}} {float(counts[kind])}' in text
    assert counts["ballot"] > 1
    assert 'event="seated"' not in text
