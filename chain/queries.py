"""What the inspector asks, answered from a store and a state: JSON values, the same live and offline."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from chain.blocks import Block, Certificate
from chain.codec import Record, encode
from chain.keys import account_of, peer_id
from chain.records import Account, Audit, ClaimRecord, Conviction, Task, Validator, Worker
from chain.replay import replay
from chain.state import State, Table
from chain.store import Store
from chain.transactions import Trace, Transaction
from chain.verdicts import TENSORS, ballot, deviations, thresholds

Arguments = dict[str, str]
_AMOUNTS = frozenset(
    ("balance", "bonded", "amount", "stake", "escrow", "price", "worker_bond", "bond", "withheld", "earned",
     "slashed", "issued", "burned", "faucet", "fee", "power")
)  # fmt: skip
_ACCOUNTS = frozenset(("account", "client", "worker", "auditor", "sender", "proposer", "validator", "to"))
_PAGE = 20
_MOST = 1000


class QueryError(Exception):
    """A query without an answer: one sentence, and a hint."""

    is_missing = False

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class NotFound(QueryError):
    """There is no such thing on this chain."""

    is_missing = True


class BadQuery(QueryError):
    """A query that cannot be understood."""


@dataclass
class Reader:
    """What queries read: the store, the newest state and, on a running peer, its waiting transactions."""

    store: Store
    newest: Callable[[], State]
    waiting: Callable[[], tuple[Transaction, ...]] = field(default=lambda: ())

    @property
    def state(self) -> State:
        """The newest final state."""
        return self.newest()


def open_reader(path: Path) -> Reader:
    """Return a reader of a database file; raise `StoreCorrupt` or `FileNotFoundError`."""
    store = Store.open_read_only(path)
    state = store.load_state()
    return Reader(store, lambda: state)


def answer(reader: Reader, query: str, arguments: Arguments) -> Any:
    """Return the answer to `query`; raise `NotFound` or `BadQuery`."""
    handler = _QUERIES.get(query)
    if handler is None:
        raise BadQuery(f"There is no query {query!r}.")
    return handler(reader, arguments)


def plain(value: Any, name: str = "") -> Any:
    """Return a record or value as JSON: accounts as peer ids, bytes as hex, amounts as strings."""
    match value:
        case bytes():
            return peer_id(value) if name in _ACCOUNTS and len(value) == 32 else value.hex()
        case bool() | None | str() | float():
            return value
        case int():
            return str(value) if name in _AMOUNTS else value
        case Record():
            return {key: plain(getattr(value, key), key) for key in value.__struct_fields__}
        case tuple() | list():
            return [plain(item, name) for item in value]
        case _:
            raise TypeError(f"{type(value).__name__} has no JSON form")


def _number(arguments: Arguments, name: str, default: int) -> int:
    try:
        return int(arguments.get(name, default))
    except ValueError:
        raise BadQuery(f"{name} must be a number, not {arguments[name]!r}.") from None


def _bytes(arguments: Arguments, name: str = "id") -> bytes:
    text = arguments.get(name, "")
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise BadQuery(f"{text!r} is not hexadecimal.") from None


def _account(arguments: Arguments) -> bytes:
    text = arguments.get("id", "")
    try:
        return account_of(text)
    except ValueError:
        raise BadQuery(f"{text!r} is not a peer id.") from None


def _status(reader: Reader, _: Arguments) -> Any:
    state, tip = reader.state, reader.store.tip()
    validators = state.validators()
    shares = [power for _, power in validators.members]
    return {
        "chain_id": state.chain.chain_id.hex(),
        "network": reader.store.genesis.name.decode("utf-8", "replace"),
        "height": state.height,
        "hash": tip[0].hash.hex() if tip else None,
        "timestamp": state.chain.timestamp,
        "state_root": state.root.hex(),
        "validators": len(validators),
        "power": str(validators.total),
        "largest_share": max(shares) / validators.total if shares else 0.0,
        "open_tasks": len(state.open_tasks()),
        "active_audits": len(state.tables[Table.ACTIVE]),
        "convictions": len(state.tables[Table.CONVICTIONS]),
    }


def block_line(block: Block, certificate: Certificate) -> dict[str, Any]:
    """Return a block in a line."""
    header = block.header
    return {
        "height": header.height,
        "hash": header.hash.hex(),
        "proposer": peer_id(header.proposer),
        "view": certificate.view,
        "timestamp": header.timestamp,
        "transactions": len(block.transactions),
        "signatures": len(certificate.signatures),
        "bytes": len(encode(block)),
    }


def _blocks(reader: Reader, arguments: Arguments) -> Any:
    last = _number(arguments, "to", reader.state.height)
    count = min(_number(arguments, "count", _PAGE), _MOST)
    first = _number(arguments, "from", max(1, last - count + 1))
    pairs = (reader.store.block(height) for height in range(max(1, first), min(last, first + count - 1) + 1))
    return [block_line(*pair) for pair in pairs if pair is not None]


def _find_block(reader: Reader, arguments: Arguments) -> tuple[Block, Certificate]:
    ref = arguments.get("id", "latest")
    if ref == "latest":
        found = reader.store.tip()
    elif ref == "earliest":
        found = reader.store.block(1)
    elif ref.isdecimal() and len(ref) < 20:
        found = reader.store.block(int(ref))
    else:
        found = reader.store.block_by_hash(_bytes(arguments))
    if found is None:
        raise NotFound(f"There is no block {ref}.")
    return found


def _block(reader: Reader, arguments: Arguments) -> Any:
    block, certificate = _find_block(reader, arguments)
    receipts = {receipt.tx_id: receipt.reason for receipt in reader.store.receipts(block.height)}
    return {
        **block_line(block, certificate),
        "header": plain(block.header),
        "raw": encode(block.header).hex(),
        "transactions": [{**_transaction_line(tx), "reason": receipts.get(tx.tx_id, "")} for tx in block.transactions],
        "events": [
            {"kind": event.kind, "data": event.data} for _, event in reader.store.events(block.height, block.height)
        ],
    }


def _transaction_line(transaction: Transaction) -> dict[str, Any]:
    body = transaction.body
    return {
        "id": transaction.tx_id.hex(),
        "kind": type(body.payload).__name__,
        "sender": peer_id(body.sender),
        "nonce": body.nonce,
        "fee": str(body.fee),
    }


def _tx(reader: Reader, arguments: Arguments) -> Any:
    tx_id = _bytes(arguments)
    found = reader.store.receipt(tx_id)
    if found is None:
        raise NotFound(f"There is no transaction {tx_id.hex()}.")
    height, place, reason = found
    pair = reader.store.block(height)
    assert pair is not None  # a receipt is written with its block
    transaction = pair[0].transactions[place]
    return {
        **_transaction_line(transaction),
        "height": height,
        "place": place,
        "ok": not reason,
        "reason": reason,
        "payload": plain(transaction.body.payload),
        "raw": encode(transaction).hex(),
    }


def _account_query(reader: Reader, arguments: Arguments) -> Any:
    account = _account(arguments)
    known: Account | None = reader.state.tables[Table.ACCOUNTS].get(account)
    if known is None:
        raise NotFound(f"The account {peer_id(account)} was never used.")
    unbonding = [
        plain(record)
        for key, record in sorted(reader.state.tables[Table.UNBONDINGS].items())
        if key.startswith(account)
    ]
    return {"account": peer_id(account), **plain(known), "unbonding": unbonding}


def _validator_line(reader: Reader, account: bytes, validator: Validator) -> dict[str, Any]:
    record = reader.state.account(account)
    return {
        "validator": peer_id(account),
        "bonded": str(record.bonded),
        "is_active": account in reader.state.validators(),
        "is_jailed": validator.is_jailed,
        "is_tombstoned": validator.is_tombstoned,
        "missed": len(validator.missed),
    }


def _validators(reader: Reader, _: Arguments) -> Any:
    table = reader.state.tables[Table.VALIDATORS]
    return [_validator_line(reader, account, table[account]) for account in sorted(table)]


def _validator(reader: Reader, arguments: Arguments) -> Any:
    account = _account(arguments)
    validator = reader.state.validator(account)
    if validator is None:
        raise NotFound(f"{peer_id(account)} is not a validator.")
    return _validator_line(reader, account, validator)


def _task_line(task: Task) -> dict[str, Any]:
    return {**plain(task), "status": str(task.state)}


def _tasks(reader: Reader, _: Arguments) -> Any:
    tasks: list[Task] = sorted(reader.state.tables[Table.TASKS].values(), key=lambda task: task.posted_at)
    return [_task_line(task) for task in tasks]


def _task(reader: Reader, arguments: Arguments) -> Any:
    task = reader.state.task(_bytes(arguments))
    if task is None:
        raise NotFound(f"There is no task {arguments.get('id', '')}.")
    return {**_task_line(task), "workers": [_worker_line(w) for w in reader.state.workers(task.id)]}


def _worker_line(worker: Worker) -> dict[str, Any]:
    line = plain(worker)
    del line["account"]
    return {"worker": peer_id(worker.account), **line, "status": str(worker.state)}


def _workers(reader: Reader, arguments: Arguments) -> Any:
    workers: list[Worker] = list(reader.state.tables[Table.WORKERS].values())
    task = _bytes(arguments, "task") if "task" in arguments else None
    chosen = [worker for worker in workers if task in (None, worker.task)]
    return [_worker_line(w) for w in sorted(chosen, key=lambda w: (w.task, w.stage, w.account))]


def _worker(reader: Reader, arguments: Arguments) -> Any:
    account = _account(arguments)
    workers: list[Worker] = list(reader.state.tables[Table.WORKERS].values())
    seats = [_worker_line(worker) for worker in workers if worker.account == account]
    if not seats:
        raise NotFound(f"{peer_id(account)} never applied for a seat.")
    return {"worker": peer_id(account), "seats": seats, "barred": reader.state.account(account).barred}


def _claim(reader: Reader, arguments: Arguments) -> Any:
    claim: ClaimRecord | None = reader.state.claim(_bytes(arguments))
    if claim is None:
        raise NotFound(f"There is no claim {arguments.get('id', '')}.")
    return plain(claim)


def _audit(reader: Reader, arguments: Arguments) -> Any:
    audit = reader.state.audit(_bytes(arguments))
    if audit is None:
        raise NotFound(f"There is no audit {arguments.get('id', '')}.")
    return audit_story(reader.state, audit)


def audit_story(state: State, audit: Audit) -> dict[str, Any]:
    """Return who claimed what, what others computed, by how much it differs, and who voted how."""
    opening, reveal = audit.opening, audit.reveal
    story: dict[str, Any] = {
        "id": audit.id.hex(),
        "task": audit.task.hex(),
        "generation": audit.generation,
        "step": audit.step,
        "stage": audit.stage,
        "cell": audit.cell,
        "worker": peer_id(audit.worker),
        "auditor": peer_id(audit.auditor),
        "status": str(audit.state),
        "drawn_at": audit.drawn_at,
        "claim": audit.claim.hex(),
        "thresholds": _by_tensor(thresholds(state.params)),
        "fraud_factor": state.params.fraud_factor,
        "trace": _trace(opening.trace) if opening else None,
        "votes": [],
    }
    if opening and reveal:
        story["deviations"] = _by_tensor(deviations(opening.sketch, reveal.shared))
        story["contradiction"] = reveal.contradiction
    for role, voters in (("third", (audit.third,) if audit.third else ()), ("voter", audit.voters)):
        for voter in voters:
            vote: dict[str, Any] = {"role": role, "peer": peer_id(voter.account), "power": str(voter.power)}
            if opening and reveal and voter.reveal:
                said = ballot(voter.reveal, opening.sketch, reveal.shared, state.params)
                vote["ballot"] = str(said)
                vote["deviations"] = _by_tensor(deviations(opening.sketch, voter.reveal.shared))
            story["votes"].append(vote)
    convictions: list[Conviction] = list(state.tables[Table.CONVICTIONS].values())
    story["convictions"] = [plain(c) for c in convictions if c.subject == audit.id]
    return story


def _trace(trace: Trace) -> dict[str, str]:
    return {name: getattr(trace, name).hex() for name in trace.__struct_fields__}


def _by_tensor(values: tuple[float, float, float]) -> dict[str, float | str]:
    return {name: value if value < float("inf") else "inf" for name, value in zip(TENSORS, values, strict=True)}


def _evidence(reader: Reader, arguments: Arguments) -> Any:
    table: dict[bytes, Conviction] = reader.state.tables[Table.CONVICTIONS]
    kinds = ("verdict", "equivocation", "withheld")
    if "id" not in arguments:
        rows = sorted(table.values(), key=lambda c: c.height)
        return [{**plain(c), "kind": kinds[c.kind]} for c in rows]
    wanted = _bytes(arguments)
    for conviction in table.values():
        if wanted in (conviction.id, conviction.subject):
            audit = reader.state.audit(conviction.subject)
            story = audit_story(reader.state, audit) if audit else None
            return {**plain(conviction), "kind": kinds[conviction.kind], "audit": story}
    raise NotFound(f"There is no evidence {wanted.hex()}.")


def _certificate(reader: Reader, arguments: Arguments) -> Any:
    block, certificate = _find_block(reader, arguments)
    size = 8 * len(certificate.signers)
    bits = [bool(certificate.signers[i // 8] >> (i % 8) & 1) for i in range(size)]
    return {
        "height": block.height,
        "view": certificate.view,
        "block_hash": certificate.block_hash.hex(),
        "signers": certificate.signers.hex(),
        "bitmap": bits,
        "signatures": [signature.hex() for signature in certificate.signatures],
        "validators_hash": block.header.validators_hash.hex(),
        "raw": encode(certificate).hex(),
    }


def _params(reader: Reader, _: Arguments) -> Any:
    return msgspec.to_builtins(msgspec.structs.asdict(reader.state.params))


def _supply(reader: Reader, _: Arguments) -> Any:
    state = reader.state
    accounts: list[Account] = list(state.tables[Table.ACCOUNTS].values())
    parts = {
        "balances": sum(account.balance for account in accounts),
        "bonded": sum(account.bonded for account in accounts),
        "unbonding": sum(record.amount for record in state.tables[Table.UNBONDINGS].values()),
        "escrow": sum(task.escrow for task in state.tables[Table.TASKS].values()),
        "worker_bonds": sum(worker.bond for worker in state.tables[Table.WORKERS].values()),
        "withheld": sum(worker.withheld for worker in state.tables[Table.WORKERS].values()),
        "faucet": state.chain.faucet,
        "burned": state.chain.burned,
    }
    is_conserved = sum(parts.values()) == state.chain.issued
    return {
        "issued": str(state.chain.issued),
        **{name: str(value) for name, value in parts.items()},
        "is_conserved": is_conserved,
    }


def _mempool(reader: Reader, _: Arguments) -> Any:
    return [_transaction_line(transaction) for transaction in reader.waiting()]


def _genesis(reader: Reader, _: Arguments) -> Any:
    from chain.genesis import to_json

    return msgspec.json.decode(to_json(reader.store.genesis).encode())


def _events(reader: Reader, arguments: Arguments) -> Any:
    first = _number(arguments, "from", 1)
    last = _number(arguments, "to", reader.state.height)
    count = min(_number(arguments, "count", _MOST), 10 * _MOST)
    kinds = [kind for kind in arguments.get("topics", "").split(",") if kind]
    rows = reader.store.events(first, last, kinds, count)
    return [{"height": height, "kind": event.kind, "data": event.data} for height, event in rows]


def block_events(reader: Reader, height: int) -> list[dict[str, Any]]:
    """Return what `watch` prints of one stored block: the block itself, then its events in order."""
    pair = reader.store.block(height)
    if pair is None:
        return []
    header = pair[0].header
    block = {
        "hash": header.hash.hex(),
        "proposer": peer_id(header.proposer),
        "transactions": len(pair[0].transactions),
    }
    stored = [(event.kind, event.data) for _, event in reader.store.events(height, height)]
    lines = [("block", block), *stored]
    return [{"height": height, "time": header.timestamp, "kind": kind, "data": data} for kind, data in lines]


def _db_check(reader: Reader, _: Arguments) -> Any:
    return replay(reader.store)


_QUERIES: dict[str, Callable[[Reader, Arguments], Any]] = {
    "status": _status,
    "blocks": _blocks,
    "block": _block,
    "tx": _tx,
    "account": _account_query,
    "validators": _validators,
    "validator": _validator,
    "tasks": _tasks,
    "task": _task,
    "workers": _workers,
    "worker": _worker,
    "claim": _claim,
    "audit": _audit,
    "evidence": _evidence,
    "votes": _certificate,
    "certificate": _certificate,
    "params": _params,
    "supply": _supply,
    "mempool": _mempool,
    "genesis": _genesis,
    "events": _events,
    "db-check": _db_check,
}
