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
from chain.transactions import Commit, RevealAll
from tests.chain.ledger_money import conserved, escrow_covers, everybody_gets_theirs, released_in_time, stake_stays
from tests.chain.ledger_silent import seats_lost_in_silence, silent_by_the_rules
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
        task = rows(block.after, T.TASKS)[audit.task]
        assert audit.cell in claim.claim.cells or (audit.cell == task.microbatches and task.redundancy == 1)
        _may_be_drawn(block, audit)
        first = rows(block.before, T.AUDITS).get(audit.first)
        assert first is None or audit.auditor != first.auditor, "an auditor repeats its own audit"
        _from_outside(block, audit, len(claim.claim.cells))


def _from_outside(block: Block, audit: Any, cells: int) -> None:
    """Neighbours judge a stage where nobody else can, its replicas where fewer than three can: none, of one cell."""
    near = {_distance(state, audit, audit.auditor) for state in (block.before, block.after)}
    enough = 3 if near == {0} and cells != 1 else 1
    assert near not in ({0}, {1}) or len(_others(block, audit)) < enough, "a neighbour audits though others could"


def _may_be_drawn(block: Block, audit: Any) -> None:
    before, after = (rows(state, T.ACCOUNTS).get(audit.auditor) for state in (block.before, block.after))
    assert after is not None
    assert before is None or not before.barred, "a barred account was drawn"
    stake = max(after.bonded, before.bonded if before else 0)
    assert stake > 0, "an account without stake was drawn"
    is_absent = before is not None and before.absent_until > block.height
    assert not is_absent or not _others(block, audit), "an absent account was drawn though others could be"


def _distance(state: State, audit: Any, account: bytes) -> int | None:
    """Return how many stages from the audited one an account's is; None without a seat."""
    worker = rows(state, T.WORKERS).get(audit.task + account)
    return abs(worker.stage - audit.stage) if worker is not None and worker.is_seated else None


def _is_beside(state: State, audit: Any, account: bytes) -> bool:
    """Whether an account is of this stage or of a next one."""
    return _distance(state, audit, account) in (0, 1)


def _others(block: Block, audit: Any) -> list[bytes]:
    """Return the validators, not beside the cell, who might have been drawn."""
    free = []
    for account, _ in block.before.validators().members:
        known, record = (rows(state, T.ACCOUNTS)[account] for state in (block.before, block.after))
        is_fit = known.bonded and record.bonded and not record.barred
        is_here = max(known.absent_until, record.absent_until) <= block.height
        is_far = not any(_is_beside(state, audit, account) for state in (block.before, block.after))
        first = rows(block.before, T.AUDITS).get(audit.first)
        taken = (audit.worker, audit.auditor, first.auditor if first else b"")
        if is_fit and is_here and is_far and account not in taken:
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
            _is_alike(block, task, worker)
        assert not rows(block.after, T.ACCOUNTS)[worker.account].barred, "a barred account keeps its seat"
    for (identity, _), count in held.items():
        assert count <= rows(block.after, T.TASKS)[identity].replicas


def _is_alike(block: Block, task: Any, worker: Any) -> None:
    """With redundancy no class of kernels has more seats than that of who is seated."""
    if task.redundancy == 1:
        return
    seated = [w for w in rows(block.before, T.WORKERS).values() if w.task == task.id and w.is_seated]
    kept = [w for w in seated if rows(block.after, T.WORKERS)[w.task + w.account].is_seated]
    often = Counter(w.kernel for w in kept)
    assert not often or often[worker.kernel] == max(often.values()), "seated among peers of another kernel class"


def settled_with_all_copies(block: Block) -> None:
    """A step settles once every cell is claimed as often as it is computed, or when the claims' time is over."""
    window = rows(block.before, T.PARAMS)[b""].claim_window
    claims = list(rows(block.after, T.CLAIMS).values())
    for identity, task in rows(block.after, T.TASKS).items():
        known = rows(block.before, T.TASKS).get(identity, task)
        for step in range(known.settled + 1, task.settled + 1):
            own = [c for c in claims if c.claim.task == identity and c.claim.step == step and not c.is_void]
            own = [c for c in own if c.claim.generation == task.generation]
            if not own or min(c.height for c in own) + window < block.height:
                continue
            for stage in range(task.stages):
                held = min(_held(state, identity, stage) for state in (block.before, block.after))
                least = min(task.redundancy, max((task.redundancy + 1) // 2, held))
                often = Counter(cell for c in own if c.claim.stage == stage for cell in c.claim.cells)
                assert all(often[cell] >= least for cell in range(task.microbatches)), f"{often} of {least} each"


def _held(state: State, task: bytes, stage: int) -> int:
    return sum(1 for w in rows(state, T.WORKERS).values() if w.task == task and w.is_seated and w.stage == stage)


def watched_by_the_client(block: Block) -> None:
    """Only who pays for it has all of a worker's cells audited."""
    wishes = [(s, p.task + p.worker) for s, p in block.applied() if type(p).__name__ == "WatchWorker"]
    for sender, key in wishes:
        assert rows(block.before, T.TASKS)[key[:32]].client == sender
        assert rows(block.after, T.WORKERS)[key].watched_until > block.height
    for key, worker in rows(block.after, T.WORKERS).items():
        known = rows(block.before, T.WORKERS).get(key)
        if known is not None and known.watched_until != worker.watched_until:
            assert key in {place for _, place in wishes}


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
    judged = (*LIVE, "convicted", "acquitted", "undecided", "withheld", "faulted", "refuted", "passed")
    for sender, payload in block.applied():
        for entry in payload.entries if isinstance(payload, RevealAll) else ():
            audit = rows(block.after, T.AUDITS).get(entry.audit)
            assert audit is not None, "a reveal of no audit was taken"
            task = rows(block.after, T.TASKS)[audit.task]
            is_exact = bool(task.kernel) or audit.cell == task.microbatches
            assert not is_exact or entry.tolerance == (1, 1, 1), "what is exact was tolerated"
            if entry.round == 0 and str(audit.state) == "passed":
                _is_within(audit, entry, params)
            if entry.round != 2 or audit.state not in judged:
                continue
            voter = next(v for v in audit.voters if v.account == sender)
            assert voter.said == _said(block, audit, entry, params)


def _is_within(audit: Any, entry: Any, params: Any) -> None:
    taus = params.wide_tau if entry.other_kernel else params.tau
    found = zip(_apart(audit.opening.sketch, entry.shared), taus, entry.tolerance, strict=True)
    assert all(v <= own * tau / 1e9 for v, tau, own in found), "passed beyond what its auditor allows"


def _said(block: Block, audit: Any, entry: Any, params: Any) -> int:
    """Return the ballot that a re-execution amounts to."""
    if audit.cell == rows(block.after, T.TASKS)[audit.task].microbatches:
        return _said_of_step(audit, entry, params)
    wide = entry.other_kernel, entry.other_kernel or audit.reveal.other_kernel
    taus = [params.wide_tau if one else params.tau for one in wide]
    factors = [params.wide_factor if one else params.fraud_factor for one in wide]
    off = [
        any(
            v > max(factor, own) * tau / 1e9
            for v, tau, own in zip(_apart(sketch, entry.shared), limits, entry.tolerance, strict=True)
        )
        for sketch, limits, factor in zip((audit.opening.sketch, audit.reveal.shared), taus, factors, strict=True)
    ]
    found = zip(_apart(audit.opening.sketch, entry.shared), taus[0], entry.tolerance, strict=True)
    is_off = any(v > own * tau / 1e9 for v, tau, own in found)
    nothing = [r.missing and not r.contradiction and not any(r.shared) for r in (entry, audit.reveal)]
    if nothing[0]:
        return 4
    if entry.contradiction and not any(entry.shared):
        return 0
    assert audit.reveal.shown or not entry.misled, "a word on inputs that nobody has shown was taken"
    answers = audit.is_reopened and _rests_on_tolerance(audit, params) and is_off
    against = (off[0] or entry.contradiction, answers or (off[1] and not nothing[1] and not entry.misled))
    plain = [(True, False), (False, True), (True, True), (False, False)].index(against)
    if plain == 3 and entry.missing:
        return 4
    if plain == 3 and is_off:
        return 5
    return 6 if plain == 3 and entry.misled else plain


def _rests_on_tolerance(audit: Any, params: Any) -> bool:
    """Whether an audit passed only because its auditor allowed more than τ."""
    found = zip(_apart(audit.opening.sketch, audit.reveal.shared), params.tau, strict=True)
    return any(one > 1 for one in audit.reveal.tolerance) and any(v > tau / 1e9 for v, tau in found)


def _said_of_step(audit: Any, entry: Any, params: Any) -> int:
    """Return the ballot on an optimiser's step: exact, and without a word on who says that it lacked data."""
    if entry.missing and not entry.contradiction:
        return 4
    worker = any(v > tau / 1e9 for v, tau in zip(_apart(audit.opening.sketch, entry.shared), params.tau, strict=True))
    limits = [params.fraud_factor * tau / 1e9 for tau in params.tau]
    found = _apart(audit.reveal.shared, entry.shared)
    auditor = not audit.reveal.missing and any(v > limit for v, limit in zip(found, limits, strict=True))
    return [(True, False), (False, True), (True, True), (False, False)].index((worker or entry.contradiction, auditor))


def states_follow(block: Block) -> None:
    """A claim starts from a state that its stage has claimed; two claims that differ are both audited."""
    claims = rows(block.after, T.CLAIMS)
    for key, progress in rows(block.after, T.STEPS).items():
        task, own = rows(block.after, T.TASKS)[key[:32]], [claims[identity] for identity in progress.claims]
        for stage in range(task.stages):
            roots = [c.claim.state_after for c in own if c.claim.stage == stage]
            said = {0: b"", 1: roots[0] if roots else b""}.get(len(set(roots)), b"?")
            assert not progress.after or progress.after[stage] == said
        for one in (c for c in own if c.drawn and not c.is_void and c.claim.generation == task.generation):
            steps = [a for a in rows(block.after, T.AUDITS).values() if a.claim == one.id]
            is_split = task.redundancy == 1 and progress.after[one.claim.stage] == b"?"
            is_one = any(a.cell == task.microbatches for a in steps)
            notes = [e for e in block.executed.events if e.kind == "unaudited"]
            assert not is_split or is_one or notes or one.height + 1 < block.height, "a step in question is not audited"


_BACKED = {
    "convicted": [(0, 2)],
    "acquitted": [(1, 2), (3, 6)],
    "withheld": [(0, 2, 4)],
    "faulted": [(0, 2, 4, 5)],
    "refuted": [(1, 2)],
}
"""Ballots whose stake must be more than two thirds."""


def verdicts_have_two_thirds(block: Block) -> None:
    """Verdicts have two thirds of the voters' stake; against a worker also with its accuser's, if most voters agree."""
    for audit in ended(block):
        sides = _BACKED.get(str(audit.state))
        if sides is None or (str(audit.state) in ("withheld", "faulted") and not audit.voters):
            continue
        assert not {voter.account for voter in audit.voters} & {audit.worker, audit.auditor}
        total = sum(v.power for v in audit.voters)
        backed = [sum(v.power for v in audit.voters if v.said in side) for side in sides]
        is_enough = any(3 * one > 2 * total for one in backed)
        if not is_enough and str(audit.state) in ("convicted", "withheld", "faulted"):
            said = _said(block, audit, audit.reveal, rows(block.before, T.PARAMS)[b""])
            power = block.before.validators().powers.get(audit.auditor, 0)
            is_enough = any(
                2 * one > total and 3 * (one + power * (said in side)) > 2 * (total + power)
                for side, one in zip(sides, backed, strict=True)
            )
        assert is_enough, f"{audit.state} with {backed}"


def reopened_by_conviction(block: Block) -> None:
    """A passed audit is judged again only when another audit of the cell has convicted or found it false."""
    audits = rows(block.after, T.AUDITS)
    judged = {a.first for a in ended(block) if a.voters and a.first}
    for key, audit in audits.items():
        known = rows(block.before, T.AUDITS).get(key)
        if audit.is_reopened and not (known and known.is_reopened):
            assert known is not None
            assert str(known.state) == "passed"
            assert key in judged
        assert audit.is_reopened or str(audit.state) != "refuted"


def the_convicted_judge_nobody(block: Block) -> None:
    barred = {key for key, account in rows(block.before, T.ACCOUNTS).items() if account.barred}
    for sender, payload in block.applied():
        assert sender not in barred or not isinstance(payload, Commit | RevealAll), "a convict has judged"
    for key, audit in rows(block.after, T.AUDITS).items():
        known = rows(block.before, T.AUDITS).get(key)
        is_new = known is None or {v.account for v in known.voters} != {v.account for v in audit.voters}
        assert not is_new or not {v.account for v in audit.voters} & barred, "a convict may vote"


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
            often = Counter(cell for c in own if c.claim.stage == stage for cell in c.claim.cells)
            assert max(often.values(), default=0) <= task.redundancy, "claimed more often than computed"
            for copy in range(task.redundancy):
                bitmap = progress.covered[stage * task.redundancy + copy]
                assert sum(1 << cell for cell in often if often[cell] > copy) == int.from_bytes(bitmap, "little")


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
    settled_with_all_copies,
    silent_by_the_rules,
    seats_lost_in_silence,
    watched_by_the_client,
    bonds_stay_while_disputed,
    ballots_are_what_was_revealed,
    verdicts_have_two_thirds,
    reopened_by_conviction,
    states_follow,
    the_convicted_judge_nobody,
    convicted_by_verdict,
    nonces_count,
    tables_agree,
    root_is_the_root,
)
