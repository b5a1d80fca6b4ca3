"""What the oracle asks of workers that claim nothing: counted by the rules, and evicted for nothing less."""

from collections import Counter
from typing import Any

from chain.keys import account_of
from tests.chain.ledger_view import Block, T, rows


def silent_by_the_rules(block: Block) -> None:
    """Who is noted as silent could have claimed all the time; whoever could, where claims were paid, is noted."""
    noted = Counter(_named(event.data) for event in block.executed.events if event.kind == "silent")
    assert max(noted.values(), default=1) == 1, "one occasion is counted twice"
    excused = _expected(block, is_strict=True)
    assert set(noted) <= _expected(block, is_strict=False), "a worker is noted that was not silent"
    assert excused <= set(noted), "a silent worker is not noted"


def _named(data: dict[str, Any]) -> tuple[bytes, bytes, int]:
    return bytes.fromhex(data["task"]), account_of(data["worker"]), data["step"]


def _expected(block: Block, is_strict: bool) -> set[tuple[bytes, bytes, int]]:
    """Return (task, worker, step) of who was silent; strictly, only where claims could have been paid in any case."""
    window = rows(block.before, T.PARAMS)[b""].claim_window
    found: set[tuple[bytes, bytes, int]] = set()
    for identity, task in rows(block.after, T.TASKS).items():
        known = rows(block.before, T.TASKS).get(identity, task)
        noted: dict[bytes, int] = {}
        for step in range(known.settled + 1, task.settled + 1):
            claims = _claims(block, task, step)
            first = min((c.height for c in claims), default=block.height)
            if first + window >= block.height or (is_strict and not _pays(known, task, block)):
                continue
            for worker in _silent(block, task, claims, first):
                if noted.get(worker, 0) < first:
                    found.add((identity, worker, step))
                    noted[worker] = block.height
    return found


def _pays(known: Any, task: Any, block: Block) -> bool:
    price = task.price * task.microbatches
    rich = all(one.escrow >= one.reserved + price for one in (known, task))
    return rich and task.is_open and min(known.deadline, task.deadline) >= block.height


def _claims(block: Block, task: Any, step: int) -> list[Any]:
    own = (c for c in rows(block.after, T.CLAIMS).values() if c.claim.task == task.id and c.claim.step == step)
    return [c for c in own if c.claim.generation == task.generation and not c.is_void]


def _silent(block: Block, task: Any, claims: list[Any], first: int) -> list[bytes]:
    found = []
    for stage in range(task.stages):
        often = Counter(cell for c in claims if c.claim.stage == stage for cell in c.claim.cells)
        if all(often[cell] >= task.redundancy for cell in range(task.microbatches)):
            continue
        for key, worker in rows(block.before, T.WORKERS).items():
            is_here = worker.task == task.id and worker.is_seated and worker.stage == stage
            now = rows(block.after, T.WORKERS).get(key)
            has_gone = now is None or (not now.is_seated and now.silences == worker.silences)
            is_late = worker.seated_at + task.patience >= first or worker.silent_at >= first
            if is_here and not has_gone and not is_late and worker.account not in {c.worker for c in claims}:
                found.append(worker.account)
    return found


def seats_lost_in_silence(block: Block) -> None:
    """Silence costs the seat on the last of several occasions in a row, never a bond; claims of later end the row."""
    params = rows(block.before, T.PARAMS)[b""]
    noted = {_named(event.data)[:2] for event in block.executed.events if event.kind == "silent"}
    for key, worker in rows(block.after, T.WORKERS).items():
        known = rows(block.before, T.WORKERS).get(key)
        before = 0 if known is None else known.silences
        if worker.silences > before:
            assert (worker.task, worker.account) in noted
            assert worker.silences < params.withheld_limit or not worker.is_seated, "too silent for a seat"
        elif worker.silences < before:
            assert worker.silences == 0
            spoke = (c for c in rows(block.after, T.CLAIMS).values() if c.worker == worker.account and c.is_settled)
            assert any(c.height > known.silent_at + params.absence_blocks for c in spoke), "forgotten for nothing"
    for key, conviction in rows(block.after, T.CONVICTIONS).items():
        if conviction.kind == 3 and key not in rows(block.before, T.CONVICTIONS):
            worker = rows(block.after, T.WORKERS)[conviction.task + conviction.account]
            assert worker.silences >= params.withheld_limit
            assert (conviction.slashed, str(worker.state)) == (0, "left")
