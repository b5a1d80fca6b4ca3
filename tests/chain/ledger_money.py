"""The money of a block worked out again: what everybody and every escrow must have after it."""

import math
from collections import Counter
from fractions import Fraction
from typing import Any

from chain.keys import peer_id
from chain.state import State
from chain.transactions import Unbond, Withdraw
from tests.chain.ledger_view import Block, T, claims_of, ended, owner, rows

PAID = {"passed", "convicted", "faulted", "withheld"}


def _issued(state: State) -> int:
    chain = rows(state, T.CHAIN)[b""]
    parts = [chain.burned, chain.faucet]
    parts += [a.balance + a.bonded for a in rows(state, T.ACCOUNTS).values()]
    parts += [u.amount for u in rows(state, T.UNBONDINGS).values()]
    parts += [t.escrow for t in rows(state, T.TASKS).values()]
    parts += [w.bond + w.withheld for w in rows(state, T.WORKERS).values()]
    return sum(parts)


def conserved(block: Block) -> None:
    assert _issued(block.after) == rows(block.after, T.CHAIN)[b""].issued


def escrow_covers(block: Block) -> None:
    """Every claimed cell can still be paid in full."""
    owed: Counter[bytes] = Counter()
    for claim in claims_of(block.after):
        owed[claim.claim.task] += len(claim.claim.cells)
    for identity, cells in owed.items():
        task = rows(block.after, T.TASKS)[identity]
        assert task.escrow >= cells * task.price == task.reserved, f"escrow {task.escrow} for {cells} at {task.price}"


def wealth(state: State) -> Counter[bytes]:
    """Return what every account has, wherever it lies."""
    found: Counter[bytes] = Counter()
    for account, record in rows(state, T.ACCOUNTS).items():
        found[account] += record.balance + record.bonded
    for key, unbonding in rows(state, T.UNBONDINGS).items():
        found[key[:32]] += unbonding.amount
    for worker in rows(state, T.WORKERS).values():
        found[worker.account] += worker.bond + worker.withheld
    return found


def _by_payloads(block: Block, change: Counter[bytes], escrow: Counter[bytes]) -> None:
    grant = rows(block.before, T.PARAMS)[b""].faucet_grant
    for transaction in block.transactions:
        change[transaction.body.sender] -= transaction.body.fee
    for sender, payload in block.applied():
        match type(payload).__name__:
            case "Transfer":
                change[sender] -= payload.amount
                change[payload.to] += payload.amount
            case "Faucet":
                change[sender] += grant
            case "TopUp":
                change[sender] -= payload.amount
                escrow[payload.task] += payload.amount
            case "PostTask":
                change[sender] -= payload.escrow
    posts = [payload for _, payload in block.applied() if type(payload).__name__ == "PostTask"]
    posted = [event.data["task"] for event in block.executed.events if event.kind == "posted"]
    assert len(posted) == len(posts), "a task is posted that was not accepted"
    for identity, payload in zip(posted, posts, strict=True):
        escrow[bytes.fromhex(identity)] += payload.escrow


def _by_work(block: Block, change: Counter[bytes], escrow: Counter[bytes]) -> None:
    price = {identity: task.price for identity, task in rows(block.after, T.TASKS).items()}
    before = rows(block.before, T.CLAIMS)
    for key, claim in rows(block.after, T.CLAIMS).items():
        if claim.is_settled and not (key in before and before[key].is_settled):
            worker = rows(block.after, T.WORKERS)[claim.claim.task + claim.worker]
            pay = price[claim.claim.task] * len(set(claim.claim.cells).difference(claim.unpaid))
            if str(worker.state) != "evicted":
                change[claim.worker] += pay
                escrow[claim.claim.task] -= pay
    cost: Counter[bytes] = Counter()
    closed = {key for key, task in rows(block.before, T.TASKS).items() if str(task.state) == "closed"}
    for audit in ended(block):
        # what a closed task had left is its client's again
        if str(audit.state) in PAID and not audit.is_reopened and audit.task not in closed:
            change[audit.auditor] += price[audit.task]
            escrow[audit.task] -= price[audit.task]
            cost[audit.claim] += price[audit.task]
    for key, claim in rows(block.after, T.CLAIMS).items():
        assert claim.audit_pay == cost[key] + (before[key].audit_pay if key in before else 0)


def _by_verdicts(block: Block, change: Counter[bytes], escrow: Counter[bytes]) -> None:
    params = rows(block.before, T.PARAMS)[b""]
    left: dict[bytes, int] = {}
    for audit in ended(block):
        key, task = audit.task + audit.worker, rows(block.before, T.TASKS)[audit.task]
        if _is_against_auditor(audit):
            change[audit.auditor] -= min(_stake_of(block, audit.auditor), max(1, task.worker_bond))
        if str(audit.state) == "withheld":
            worker = rows(block.before, T.WORKERS)[key]
            fine = _fine(block, task, worker, audit) if key not in left else task.price
            if _is_slashed_before(block, audit):
                left[key] = 0
            charge = min(fine, left.setdefault(key, worker.bond + worker.withheld))
            left[key] -= charge
            change[audit.worker] -= charge
            escrow[audit.task] += min(charge, task.price)
    order = [event.data["evidence"] for event in block.executed.events if event.kind == "slashed"]
    first: dict[int, tuple[bytes, int]] = {}
    for key, conviction in rows(block.after, T.CONVICTIONS).items():
        if key in rows(block.before, T.CONVICTIONS) or conviction.kind in (2, 3):
            continue
        change[conviction.account] -= conviction.slashed
        reward = conviction.slashed * params.reporter_share // 10_000
        if conviction.kind == 0:
            change[rows(block.after, T.AUDITS)[conviction.subject].auditor] += reward
            first.setdefault(order.index(conviction.subject.hex()), (conviction.task, conviction.slashed - reward))
            continue
        reporters = [s for s, p in block.applied() if type(p).__name__ == "Evidence" and p.first == conviction.first]
        assert len(reporters) == 1
        change[reporters[0]] += reward if reporters[0] != conviction.account else 0
    made_good: dict[bytes, int] = {}
    for _, (identity, most) in sorted(first.items()):
        if identity not in made_good:
            made_good[identity] = _made_good(block, identity, most)
    escrow.update(made_good)


def _is_slashed_before(block: Block, audit: Any) -> bool:
    """Whether the bond of an audit's worker was slashed, for another of its cells, before this audit ended."""
    for event in block.executed.events:
        if event.data.get("audit") == audit.id.hex() and event.kind == str(audit.state):
            return False
        if event.kind == "slashed" and _is_of(event.data, audit):
            return True
    raise AssertionError("an audit ended without an event")


def _is_of(data: dict[str, Any], audit: Any) -> bool:
    return (data.get("task"), data.get("worker")) == (audit.task.hex(), peer_id(audit.worker))


def _is_against_auditor(audit: Any) -> bool:
    """Whether two thirds of the voters' stake found the auditor's own result false."""
    against = sum(voter.power for voter in audit.voters if voter.said in (1, 2))
    is_judged = str(audit.state) in ("acquitted", "refuted")
    return is_judged and 3 * against > 2 * sum(voter.power for voter in audit.voters)


def _fine(block: Block, task: Any, worker: Any, audit: Any) -> int:
    """Return what a worker is charged that does not open: more where it did so before, on another occasion."""
    faulted = any(str(a.state) == "faulted" and a.worker == worker.account for a in ended(block) if a.task == task.id)
    if not worker.withholdings or worker.flagged_until > block.height or faulted:
        return task.price
    claim, params = rows(block.before, T.CLAIMS)[audit.claim], rows(block.before, T.PARAMS)[b""]
    if claim.height + params.absence_blocks <= worker.flagged_until:
        return task.price
    return task.price * max(1, *(math.ceil(Fraction(10**8, h) - 1) for h in _found(params, task.audit_rate)))


def _found(params: Any, rate: int) -> tuple[int, int]:
    """Return in units of 1e-8 how likely a false cell, and a false optimiser's step, is found."""
    steps = rate if rate == 10_000 else max(params.floor_rate, rate * params.step_share // 10_000)
    return max(1, rate) * (10_000 - params.colluding_share), max(1, steps) * (10_000 - params.colluding_share)


def _made_good(block: Block, task: bytes, most: int) -> int:
    """Return what a slashed bond gives back to the escrow for audits, paid before, of work that it made void."""
    before = rows(block.before, T.CLAIMS)
    voided = {
        key: claim for key, claim in rows(block.after, T.CLAIMS).items()
        if claim.claim.task == task and claim.is_void and not before[key].is_void
    }  # fmt: skip
    price, events = rows(block.after, T.TASKS)[task].price, block.executed.events
    paid = {
        a.id.hex() for a in ended(block)
        if a.claim in voided and str(a.state) in PAID and not a.is_reopened
    }  # fmt: skip
    begun = next(i for i, e in enumerate(events) if e.kind == "slashed" and e.data.get("task") == task.hex())
    later = [e for e in events[begun:] if e.kind in PAID and e.data.get("audit") in paid]
    return min(most, sum(claim.audit_pay for claim in voided.values()) - len(later) * price)


def _stake_of(block: Block, account: bytes) -> int:
    """Return what an account can be charged: its stake, also what is on its way out and not released yet."""
    record, leaving = rows(block.before, T.ACCOUNTS).get(account), rows(block.before, T.UNBONDINGS).items()
    held = sum(u.amount for key, u in leaving if key[:32] == account and u.release_at > block.height)
    return (record.bonded if record else 0) + held


def everybody_gets_theirs(block: Block) -> None:
    """What an account has changes by its payments, its work, and verdicts on it, and by nothing else."""
    change: Counter[bytes] = Counter()
    escrow: Counter[bytes] = Counter()
    _by_payloads(block, change, escrow)
    _by_work(block, change, escrow)
    _by_verdicts(block, change, escrow)
    for identity, task in rows(block.after, T.TASKS).items():
        known = rows(block.before, T.TASKS).get(identity)
        returned = (known.escrow if known else 0) + escrow[identity] - task.escrow
        assert returned == 0 or str(task.state) == "closed", f"escrow {task.escrow} lacks {returned}"
        change[task.client] += returned
    gained: Counter[bytes] = Counter()
    for sign, counted in ((1, wealth(block.after)), (-1, wealth(block.before)), (-1, change)):
        for account, amount in counted.items():
            gained[owner(block.after, account)] += sign * amount
    assert not any(gained.values()), {account.hex()[:8]: amount for account, amount in gained.items() if amount}


def _stakes(block: Block, state: State) -> Counter[bytes]:
    found: Counter[bytes] = Counter()
    for account, record in rows(state, T.ACCOUNTS).items():
        found[owner(block.after, account)] += record.bonded
    return found


def _punished(block: Block) -> set[bytes]:
    """Return who may lose stake in the block: offenders, false accusers, auditors that let false cells pass."""
    offenders = {c.account for c in rows(block.after, T.CONVICTIONS).values() if c.height == block.height}
    accusers = {audit.auditor for audit in ended(block) if str(audit.state) in ("acquitted", "refuted")}
    return {owner(block.after, account) for account in offenders | accusers}


def stake_stays(block: Block) -> None:
    """Stake falls only by its owner's unbonding, an offence, or a false accusation."""
    unbonded: Counter[bytes] = Counter()
    for sender, payload in block.applied():
        if isinstance(payload, Unbond):
            unbonded[owner(block.after, sender)] += payload.amount
    after = _stakes(block, block.after)
    for account, stake in _stakes(block, block.before).items():
        lost = stake - after[account]
        assert lost <= unbonded[account] or account in _punished(block), f"{account.hex()[:8]} lost {lost} of stake"


def released_in_time(block: Block) -> None:
    """Leaving stake stays for the whole unbonding period: it leaves to its owner later, or is slashed."""
    period = rows(block.before, T.PARAMS)[b""].unbonding_blocks
    least: Counter[bytes] = Counter()
    for key, unbonding in rows(block.before, T.UNBONDINGS).items():
        if unbonding.release_at > block.height:
            least[owner(block.after, key[:32])] += unbonding.amount
    for sender, payload in block.applied():
        if isinstance(payload, Unbond):
            least[owner(block.after, sender)] += payload.amount
    held: Counter[bytes] = Counter()
    for key, unbonding in rows(block.after, T.UNBONDINGS).items():
        held[key[:32]] += unbonding.amount
        fresh = key not in rows(block.before, T.UNBONDINGS) and owner(block.after, key[:32]) == key[:32]
        assert not fresh or unbonding.release_at >= min(block.height + period, _latest(block, key[:32]))
    withdrew = {owner(block.after, sender) for sender, payload in block.applied() if isinstance(payload, Withdraw)}
    for account, amount in least.items():
        assert held[account] >= amount or account in _punished(block), "stake left before its release"
        assert account in withdrew or held[account] >= amount or account in _punished(block)


def _latest(block: Block, account: bytes) -> int:
    """Return the earliest release among what the account, or who it succeeds, had waiting."""
    before = rows(block.before, T.UNBONDINGS).items()
    return min((u.release_at for k, u in before if owner(block.after, k[:32]) == account), default=2**63)
