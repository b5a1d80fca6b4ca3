"""What must hold of every executed block, recomputed with own arithmetic from the records alone.

Nothing here calls the ledger's rules: amounts, ballots, tree and tables are worked out again from the
fields of the records before and after a block, its payloads and its receipts.
"""

import math
import struct
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import msgspec
from blake3 import blake3

from chain.state import KINDS, State
from chain.transactions import RevealAll
from tests.chain.ledger_money import conserved, escrow_covers, everybody_gets_theirs, released_in_time, stake_stays
from tests.chain.ledger_view import LIVE, Block, T, claims_of, ended, owner, rows

_KEY = blake3(derive_key_context="tdml 1 state key")


def check(block: Block) -> None:
    """Raise `AssertionError`, naming the rule, for a block that breaks one."""
    for rule in RULES:
        try:
            rule(block)
        except AssertionError as error:
            raise AssertionError(f"{rule.__name__} at height {block.height}: {error}") from error


def _numbers(value: Any) -> Iterable[int]:
    if isinstance(value, bool):
        return
    if isinstance(value, int):
        yield value
    elif isinstance(value, tuple):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            if name != "stage":
                yield from _numbers(getattr(value, name))


def never_negative(block: Block) -> None:
    for table in T:
        for key, record in rows(block.after, table).items():
            if rows(block.before, table).get(key) is not record:
                assert all(0 <= number < 2**63 for number in _numbers(record)), record


def drawn_when_final(block: Block) -> None:
    """Auditors are drawn only from the seed after the delay, and only those who may be."""
    delay = rows(block.before, T.PARAMS)[b""].draw_delay
    for key, audit in rows(block.after, T.AUDITS).items():
        known = rows(block.before, T.AUDITS).get(key)
        if known is not None and known.auditor == audit.auditor and known.drawn_at == audit.drawn_at:
            continue
        claim = rows(block.after, T.CLAIMS)[audit.claim]
        assert audit.drawn_at == block.height >= claim.height + delay, f"drawn after {block.height - claim.height}"
        assert audit.auditor != audit.worker == claim.worker, "a worker audits itself"
        assert audit.cell in claim.claim.cells
        _may_be_drawn(block, audit.auditor)
        is_neighbour = all(_is_beside(state, audit, audit.auditor) for state in (block.before, block.after))
        assert not is_neighbour or not _others(block, audit), "a neighbour audits though others could"


def _may_be_drawn(block: Block, account: bytes) -> None:
    before, after = (rows(state, T.ACCOUNTS).get(account) for state in (block.before, block.after))
    assert after is not None
    assert before is None or not before.barred, "a barred account was drawn"
    stake = max(after.bonded, before.bonded if before else 0)
    assert stake > 0, "an account without stake was drawn"
    assert before is None or before.absent_until <= block.height, "an absent account was drawn"


def _is_beside(state: State, audit: Any, account: bytes) -> bool:
    worker = rows(state, T.WORKERS).get(audit.task + account)
    return worker is not None and worker.is_seated and abs(worker.stage - audit.stage) == 1


def _others(block: Block, audit: Any) -> list[bytes]:
    """Return the validators, not beside the cell, who might have been drawn."""
    free = []
    for account, _ in block.before.validators().members:
        known, record = (rows(state, T.ACCOUNTS)[account] for state in (block.before, block.after))
        is_fit = known.bonded and record.bonded and not record.barred
        is_here = max(known.absent_until, record.absent_until) <= block.height
        is_far = not any(_is_beside(state, audit, account) for state in (block.before, block.after))
        if is_fit and is_here and is_far and account not in (audit.worker, audit.auditor):
            free.append(account)
    return free


def seated_by_the_rules(block: Block) -> None:
    """Seats go to applicants who may have them, no more than there are, and end with the lease."""
    held: Counter[tuple[bytes, int]] = Counter()
    for key, worker in rows(block.after, T.WORKERS).items():
        task = rows(block.after, T.TASKS)[worker.task]
        if worker.is_present:
            assert worker.lease_until >= block.height, "an ended lease keeps its place"
        if not worker.is_seated:
            continue
        held[worker.task, worker.stage] += 1
        assert 0 <= worker.stage < task.stages
        known = rows(block.before, T.WORKERS).get(key)
        if known is None or not known.is_seated:
            assert worker.applied_at < block.height
            account = rows(block.before, T.ACCOUNTS).get(worker.account)
            assert account is None or not account.barred, "a barred account was seated"
        assert not rows(block.after, T.ACCOUNTS)[worker.account].barred, "a barred account keeps its seat"
    for (identity, _), count in held.items():
        assert count <= rows(block.after, T.TASKS)[identity].replicas


def bonds_stay_while_disputed(block: Block) -> None:
    """A worker's bond is there while an audit or an unsettled claim of it is open, unless it was convicted."""
    engaged = {(a.task, a.worker) for a in rows(block.after, T.AUDITS).values() if a.state in LIVE}
    engaged |= {(c.claim.task, c.worker) for c in claims_of(block.after)}
    charged: Counter[tuple[bytes, bytes]] = Counter()
    for audit in ended(block):
        if str(audit.state) == "withheld":
            charged[audit.task, audit.worker] += 30 * rows(block.after, T.TASKS)[audit.task].price
    for key, worker in rows(block.before, T.WORKERS).items():
        now = rows(block.after, T.WORKERS).get(key)
        place = (worker.task, worker.account)
        if place in engaged and (now is None or str(now.state) != "evicted"):
            assert now is not None
            assert now.bond + now.withheld >= worker.bond + worker.withheld - charged[place], "a bond left in a dispute"


def _apart(claimed: bytes, own: bytes) -> list[float]:
    if claimed == own:
        return [0.0, 0.0, 0.0]
    a, b = struct.unpack("<96f", claimed), struct.unpack("<96f", own)
    found = []
    for start in (0, 32, 64):
        x, y = a[start : start + 32], b[start : start + 32]
        if not all(map(math.isfinite, x + y)):
            found.append(0.0 if claimed[4 * start : 4 * start + 128] == own[4 * start : 4 * start + 128] else math.inf)
            continue
        found.append(math.dist(x, y) / max(math.hypot(*y), 1e-30))
    return found


def ballots_are_what_was_revealed(block: Block) -> None:
    """What stays of a voter's reveal is whether it speaks against the worker, the auditor, both or neither."""
    params = rows(block.before, T.PARAMS)[b""]
    limits = [params.fraud_factor * tau / 1e9 for tau in params.tau]
    for sender, payload in block.applied():
        for entry in payload.entries if isinstance(payload, RevealAll) else ():
            audit = rows(block.after, T.AUDITS)[entry.audit]
            if entry.round != 2 or audit.state not in (*LIVE, "convicted", "acquitted", "undecided"):
                continue
            voter = next(v for v in audit.voters if v.account == sender)
            off = [
                any(v > m for v, m in zip(_apart(sketch, entry.shared), limits, strict=True))
                for sketch in (audit.opening.sketch, audit.reveal.shared)
            ]
            against = (off[0] or entry.contradiction, off[1])
            assert voter.said == [(True, False), (False, True), (True, True), (False, False)].index(against)


def verdicts_have_two_thirds(block: Block) -> None:
    for audit in ended(block):
        if str(audit.state) not in ("convicted", "acquitted"):
            continue
        against = 0
        for voter in audit.voters:
            assert voter.account not in (audit.worker, audit.auditor)
            against += voter.power if voter.said in ((0, 2) if str(audit.state) == "convicted" else (1, 2)) else 0
        assert 3 * against > 2 * sum(v.power for v in audit.voters), f"{audit.state} with {against}"


def convicted_by_verdict(block: Block) -> None:
    """Nobody is evicted, barred or tombstoned without a conviction that names it."""
    named = defaultdict(set)
    for conviction in rows(block.after, T.CONVICTIONS).values():
        named[conviction.kind].add(conviction.account)
    verdicts = {a.worker for a in rows(block.after, T.AUDITS).values() if str(a.state) == "convicted"}
    assert named[0] <= verdicts
    barred = {key for key, account in rows(block.after, T.ACCOUNTS).items() if account.barred}
    assert {owner(block.after, key) for key in barred} == {owner(block.after, key) for key in named[0]}
    assert {key for key, v in rows(block.after, T.VALIDATORS).items() if v.is_tombstoned} == named[1]
    out = named[1] | {key for key, v in rows(block.after, T.VALIDATORS).items() if v.is_jailed}
    assert not out & set(block.after.validators().powers)


def nonces_count(block: Block) -> None:
    sent = Counter(transaction.body.sender for transaction in block.transactions)
    for account, record in rows(block.after, T.ACCOUNTS).items():
        known = rows(block.before, T.ACCOUNTS).get(account)
        assert record.nonce == (known.nonce if known else 0) + sent[account]


def tables_agree(block: Block) -> None:
    """The working tables are exactly what the records say."""
    state = block.after
    audits, claims = rows(state, T.AUDITS), rows(state, T.CLAIMS)
    live = {key for key, audit in audits.items() if audit.state in LIVE}
    assert {key[-32:] for key in rows(state, T.ACTIVE)} == live
    assert {c.id for c in claims_of(state) if not c.drawn} <= {key[-32:] for key in rows(state, T.QUEUE)}
    opened = Counter(audits[key].claim for key in live)
    for key, claim in claims.items():
        assert claim.open_audits == opened[key], f"{claim.open_audits} open audits, {opened[key]} found"
    busy = {key for key, t in rows(state, T.TASKS).items() if str(t.state) != "closed"}
    busy |= {audits[key].task for key in live}
    busy |= {w.task for w in rows(state, T.WORKERS).values() if w.bond + w.withheld and str(w.state) == "left"}
    assert busy <= set(rows(state, T.OPEN))
    _watched(state)
    for key, progress in rows(state, T.STEPS).items():
        own = [claims[identity] for identity in progress.claims]
        task = rows(state, T.TASKS)[key[:32]]
        for stage in range(task.stages):
            cells = sorted(cell for c in own if c.claim.stage == stage for cell in c.claim.cells)
            assert len(set(cells)) == len(cells)
            assert sum(1 << cell for cell in cells) == int.from_bytes(progress.covered[stage], "little")


def _watched(state: State) -> None:
    """Whoever works is known by account too, and counts what it still answers for; what has a time is woken."""
    workers, opened = rows(state, T.WORKERS), rows(state, T.OPEN)
    assert {key[32:] + key[:32] for key in rows(state, T.JOBS)} == {key for key in workers if key[:32] in opened}
    engaged = Counter((c.claim.task, c.worker) for c in rows(state, T.CLAIMS).values() if not c.is_settled)
    engaged -= Counter((c.claim.task, c.worker) for c in rows(state, T.CLAIMS).values() if c.is_void)
    engaged += Counter((a.task, a.worker) for a in rows(state, T.AUDITS).values() if a.state in LIVE)
    woken = {(int.from_bytes(key[:32], "big"), key[33:]) for key in rows(state, T.WAKE)}
    for worker in workers.values():
        assert worker.engaged == engaged[worker.task, worker.account], f"{worker.engaged} counted"
        assert not worker.is_present or (worker.lease_until + 1, worker.task) in woken
    for audit in rows(state, T.AUDITS).values():
        assert audit.state not in LIVE or audit.deadline + 1 <= state.height or (audit.deadline + 1, audit.id) in woken
    late = {key[:32] for key in rows(state, T.WAKE) if int.from_bytes(key[:32], "big") <= state.height}
    named = {key[33:] for key in rows(state, T.WAKE) if key[32] == T.WAKE}
    assert late == named, "something is overdue and nothing says so"


def _subtree(leaves: list[tuple[bytes, bytes]], depth: int) -> bytes:
    if not leaves:
        return bytes(32)
    if len(leaves) == 1:
        return blake3(b"\x00" + leaves[0][0] + leaves[0][1]).digest()
    halves: tuple[list[tuple[bytes, bytes]], list[tuple[bytes, bytes]]] = ([], [])
    for leaf in leaves:
        halves[leaf[0][depth // 8] >> (7 - depth % 8) & 1].append(leaf)
    return blake3(b"\x01" + _subtree(halves[0], depth + 1) + _subtree(halves[1], depth + 1)).digest()


def root_is_the_root(block: Block) -> None:
    """The root follows from the encoded records, which decode to themselves."""
    leaves = []
    for table in T:
        decoder = msgspec.msgpack.Decoder(KINDS[table])
        for key, record in rows(block.after, table).items():
            data = msgspec.msgpack.encode(record)
            if rows(block.before, table).get(key) is not record:
                assert decoder.decode(data) == record
            hasher = _KEY.copy()
            hasher.update(bytes([table]) + key)
            leaves.append((hasher.digest(), blake3(data).digest()))
    assert _subtree(leaves, 0) == block.after.root


RULES = (
    conserved,
    never_negative,
    escrow_covers,
    everybody_gets_theirs,
    stake_stays,
    released_in_time,
    drawn_when_final,
    seated_by_the_rules,
    bonds_stay_while_disputed,
    ballots_are_what_was_revealed,
    verdicts_have_two_thirds,
    convicted_by_verdict,
    nonces_count,
    tables_agree,
    root_is_the_root,
)
