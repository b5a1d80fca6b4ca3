"""States and blocks that hostile accounts can bring about: each shape is as bad as its number says.

States are written record by record, as the transactions that lead to them would have left them.
"""

from collections.abc import Callable

from msgspec import structs

from bench.support.shape import HEIGHT, SKETCH, SPAN, TRACE, Shape, key_of, name_of
from chain.blocks import Vote, VoteKind, vote_bytes
from chain.codec import encode
from chain.commitment import claim_root, leaf
from chain.ledger.book import step_key
from chain.ledger.claims import claim_id
from chain.records import AuditStatus, StepProgress, Unbonding, Validator, Voter
from chain.state import Table
from chain.transactions import (
    Claim,
    Commit,
    Commitment,
    Evidence,
    Opening,
    PostTask,
    RenewLease,
    Reveal,
    RevealAll,
    SubmitClaims,
    TakeSeat,
    Transfer,
    Unbond,
    Withdraw,
    reveal_commitment,
)


def idle_tasks(number: int) -> Shape:
    """Many open tasks in each of which something is due in this very block, each with a worker."""
    shape = Shape()
    for index in range(number):
        task = shape.task(1 * SPAN + index, stages=2)
        shape.worker(task, key_of(index % 50).account, 0)
        shape.wake(HEIGHT + 1, Table.TASKS, task.id)
    return shape


def crowds(number: int) -> Shape:
    """Tasks as full of applicants as they may be, in each of which something is due in this block."""
    shape = Shape()
    for index in range(number // 4096):
        task = shape.task(2 * SPAN + index, applicants=4096)
        for place in range(4096):
            shape.worker(task, name_of("spare", place), lease_until=HEIGHT)
        shape.wake(HEIGHT + 1, Table.TASKS, task.id)
        applicant = key_of(10**5 + index)
        shape.account(applicant)
        shape.sent.append((applicant, TakeSeat(task.id, bytes(32))))
    return shape


def draws(number: int) -> Shape:
    """A full queue of draws with 256 validators to draw from."""
    shape = Shape(validators=256)
    task = shape.task(0, microbatches=1024)
    worker = shape.worker(task, key_of(10**5).account, 0)
    for step in range(number // 16):
        shape.claim(task, worker, step, tuple(range(16)))
    return shape


def single_draws(number: int) -> Shape:
    """A queue of claims of one cell each, by many workers of as many tasks."""
    shape = Shape(validators=256)
    for index in range(number):
        task = shape.task(3 * SPAN + index)
        shape.claim(task, shape.worker(task, name_of("worker", index), 0), 1, (0,))
    return shape


def silent(number: int) -> Shape:
    """Workers that have claimed nothing of a step which settles without their cells, for the last time."""
    shape = Shape()
    for index in range(number // 64):
        task = shape.task(5 * SPAN + index, stages=2, microbatches=1024)
        workers = [shape.worker(task, name_of("silent", 64 * index + place), 0, silences=2) for place in range(64)]
        record = shape.claim(task, workers[0], 1, (0,), drawn=True)
        shape.put(Table.CLAIMS, record.id, structs.replace(record, open_audits=0))
        progress = StepProgress(HEIGHT - 50, (bytes(128),) * 2, (record.id,), is_questioned=True)
        shape.put(Table.STEPS, step_key(task.id, 0, 1), progress)
        shape.wake(HEIGHT + 1, Table.TASKS, task.id)
    return shape


def waiting_audits(number: int) -> Shape:
    """Many audits whose auditors have time left."""
    return _audits(number, AuditStatus.DRAWN, HEIGHT + 50)


def overdue_audits(number: int) -> Shape:
    """Many audits whose deadline passes in this block, with 256 validators to draw others from."""
    return _audits(number, AuditStatus.DRAWN, HEIGHT)


def _audits(number: int, state: AuditStatus, deadline: int) -> Shape:
    shape = Shape(validators=256)
    for index in range(number // 64):
        task = shape.task(4 * SPAN + index, microbatches=1024)
        worker = shape.worker(task, name_of("worker", index), 0)
        record = shape.claim(task, worker, 1, tuple(range(64)), drawn=True)
        for cell in range(64):
            shape.audit(record, cell, shape.keys[(index + cell) % 256].account, state, deadline=deadline)
    return shape


def votes(number: int) -> Shape:
    """A block full of reveals of 256 voters, each in many votes that everybody else has spoken in."""
    shape = Shape(validators=256)
    revealer = shape.keys[1]
    for index in range(number):
        task = shape.task(index)
        worker = shape.worker(task, name_of("worker", index), 0, bond=100)
        record = shape.claim(task, worker, 1, (0,), drawn=True)
        identity = name_of("audit", record.id, 0)
        plain = Reveal(identity, 2, bytes(32), SKETCH, SKETCH, False, False)
        opening = Opening(identity, bytes(32), TRACE, (), SKETCH)
        voters = [
            Voter(key.account, 10**6, reveal_commitment(key.account, plain), None, None if key is revealer else 3)
            for key in shape.keys[1:]
        ]
        shape.audit(
            record, 0, shape.keys[0].account, AuditStatus.VOTING, opening=opening, is_revealing=True,
            commitment=bytes(32), reveal=structs.replace(plain, round=0), voters=tuple(voters),
        )  # fmt: skip
    for start in range(0, number, 16):
        entries = [
            Reveal(name_of("audit", claim_id(_first_claim(index), name_of("worker", index)), 0), 2, bytes(32), SKETCH,
                   SKETCH, False, False)
            for index in range(start, min(number, start + 16))
        ]  # fmt: skip
        shape.sent.append((revealer, RevealAll(tuple(entries))))
    return shape


def _first_claim(index: int) -> Claim:
    root = claim_root([leaf(bytes(32), TRACE)])
    return Claim(name_of("task", index), 0, 1, 0, (0,), root, bytes(32), bytes(32))


def claims(number: int) -> Shape:
    """A block full of claims, each of one cell of another step of tasks with many stages."""
    shape = Shape()
    worker = key_of(10**5)
    shape.account(worker, bonded=10**6)
    for index in range(number // 64):
        task = shape.task(index, stages=16, microbatches=1024, depth=64)
        shape.worker(task, worker.account, 0)
        for first in range(1, 65, 16):
            entries = (
                Claim(task.id, 0, step, 0, (0,), bytes(32), bytes(32), bytes(32)) for step in range(first, first + 16)
            )
            shape.sent.append((worker, SubmitClaims(tuple(entries))))
    return shape


def conviction(number: int) -> Shape:
    """A verdict that makes many claims of a task void."""
    shape = votes(1)
    task = structs.replace(shape.task(0), replicas=256, depth=1024)
    worker = shape.worker(task, name_of("worker", 0), 0, bond=100)
    others = [shape.worker(task, name_of("other", place), 0) for place in range(64)]
    for step in range(2, number // 64 + 2):
        for place, other in enumerate(others):
            shape.claim(task, other, step, (place,), drawn=True)
    told = Reveal(bytes(32), 2, bytes(32), b"\x00\x00\x80\x3f" * 96, SKETCH, True, False)
    record = shape._draft.get(Table.CLAIMS, claim_id(_first_claim(0), worker.account))
    identity = name_of("audit", record.id, 0)
    told = structs.replace(told, audit=identity)
    audit = shape._draft.get(Table.AUDITS, identity)
    voters = tuple(
        Voter(v.account, v.power, reveal_commitment(v.account, told), None, None if v.said is None else 0)
        for v in audit.voters
    )
    shape.put(Table.AUDITS, identity, structs.replace(audit, voters=voters))
    shape.sent[:] = [(shape.keys[1], RevealAll((told,)))]
    return shape


def transfers(number: int) -> Shape:
    """As many transfers between as many accounts."""
    shape = Shape()
    for index in range(number):
        key = key_of(10**5 + index)
        shape.account(key)
        shape.sent.append((key, Transfer(name_of("payee", index), 1)))
    return shape


def evidence(number: int) -> Shape:
    """False evidence, which takes two checks of signatures to refuse."""
    shape = Shape(validators=256)
    culprit = shape.keys[5]
    for index in range(number):
        votes_ = []
        for side in (0, 1):
            named = (VoteKind.NOTARIZE, shape.genesis.chain_id, 1, index + 1, name_of("block", side))
            signature = culprit.sign(vote_bytes(*named))
            votes_.append(encode(Vote(*named, culprit.account, signature if side == 0 else bytes(64))))
        shape.sent.append((shape.keys[index % 200 + 6], Evidence(*votes_)))
    return shape


def registered(number: int) -> Shape:
    """Many registered validators without stake, and validators that leave the set."""
    shape = Shape(validators=200)
    for index in range(number):
        shape.put(Table.VALIDATORS, name_of("registered", index), Validator(bytes(32), 1))
        if index < 2048:  # as many as one block may register
            shape.wake(HEIGHT + 1, Table.VALIDATORS, name_of("registered", index))
    shape.sent += [(key, Unbond(10**6)) for key in shape.keys]
    return shape


def unbondings(number: int) -> Shape:
    """Accounts with many unbondings that try to withdraw too early."""
    shape = Shape()
    for index in range(200):
        key = key_of(10**5 + index)
        shape.account(key, bonded=10**6)
        for place in range(number // 200):
            release = HEIGHT + 10 + place
            shape.put(Table.UNBONDINGS, key.account + release.to_bytes(8, "big"), Unbonding(1, release))
        shape.sent += [(key, Withdraw())] * 10
    return shape


def duties(number: int) -> Shape:
    """Duties that nobody owes, by those who may owe some, while many tasks are open."""
    shape = idle_tasks(number)
    worker = key_of(10**5)
    shape.account(worker)
    shape.worker(shape.task(number), worker.account, 0)
    junk = Commit(tuple(Commitment(bytes(32), 0, bytes(32)) for _ in range(1)))
    shape.sent += [(worker, junk), (worker, RenewLease(bytes(32)))] * 1024
    return shape


def posts(number: int) -> Shape:
    """New tasks as large as they may be."""
    shape = Shape()
    client = key_of(10**5)
    shape.account(client)
    task = PostTask(bytes(32), 1, 1, 1, 1, 1, 2, 100, 10_000, 1, 1, 0)
    shape.sent += [(client, structs.replace(task, lifetime=index + 1)) for index in range(number)]
    return shape


def everything(number: int) -> Shape:
    """All of it in one block: votes and false evidence, a full queue, overdue audits, tasks that are due."""
    shape = votes(min(number, 450))
    for part in (overdue_audits(2 * number), single_draws(number), idle_tasks(number), crowds(4 * number)):
        for table, rows in part._draft.changes.items():
            if table is not Table.CHAIN:
                for key, record in rows.items():
                    shape.put(table, key, record)
        shape.sent += part.sent
    shape.sent += evidence(1024).sent
    return shape


SHAPES: dict[str, tuple[Callable[[int], Shape], int]] = {
    "transfers": (transfers, 2048),
    "evidence": (evidence, 2048),
    "posts": (posts, 2048),
    "idle tasks": (idle_tasks, 10_000),
    "crowds": (crowds, 40_960),
    "draws": (draws, 4096),
    "single draws": (single_draws, 4096),
    "silent": (silent, 40_960),
    "waiting audits": (waiting_audits, 50_000),
    "overdue audits": (overdue_audits, 8192),
    "votes": (votes, 900),
    "claims": (claims, 4096),
    "conviction": (conviction, 20_000),
    "registered": (registered, 40_960),
    "unbondings": (unbondings, 40_000),
    "duties": (duties, 5000),
    "everything": (everything, 4096),
}
"""Shapes and the number at which the bench measures them."""
