"""What the inspector asks, answered from a store and a state: JSON values, the same live and offline."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from chain.audit_story import audit_story
from chain.blocks import Block, Certificate, ValidatorSet, Vote
from chain.codec import decode, encode
from chain.genesis import to_json
from chain.keys import account_of, peer_id
from chain.query_errors import BadQuery, NotFound, QueryError
from chain.query_proofs import proof
from chain.query_votes import Deciding, certificate_line, final_votes, votes_heard
from chain.records import Account, Audit, ClaimRecord, Conviction, Task, Worker
from chain.replay import replay
from chain.state import State, Table, holdings
from chain.store import Store
from chain.transactions import Transaction
from chain.views import (
    block_line,
    grounds,
    plain,
    standing_votes,
    task_line,
    transaction_line,
    validator_line,
    worker_line,
)

__all__ = ["BadQuery", "NotFound", "QueryError", "Reader", "answer", "open_reader"]

Arguments = dict[str, str]
_PAGE = 20
_MOST = 1000
_DIGITS = 18
_SAFE_VALIDATORS = 4


@dataclass
class Reader:
    """What queries read: the store, a state and, on a running peer, what waits and what is under decision."""

    store: Store
    newest: Callable[[], State]
    waiting: Callable[[], tuple[Transaction, ...]] = field(default=lambda: ())
    deciding: Callable[[], Deciding | None] = field(default=lambda: None)

    @property
    def state(self) -> State:
        """The final state that is asked about: the newest, unless an earlier height was."""
        return self.newest()

    def claim(self, claim: bytes) -> ClaimRecord | None:
        """Return a claim, also one that has left the state."""
        found = self._record(Table.CLAIMS, claim)
        return found if found is not None and found.height <= self.state.height else None

    def audit(self, audit: bytes) -> Audit | None:
        """Return an audit, also one that has left the state."""
        found = self._record(Table.AUDITS, audit)
        return found if found is not None and found.drawn_at <= self.state.height else None

    def _record(self, table: Table, key: bytes) -> Any:
        return self.state.tables[table].get(key) or self.store.archived(table, key)


def open_reader(path: Path) -> Reader:
    """Return a reader of a database file as it is now; raise `StoreCorrupt` or `FileNotFoundError`."""
    store = Store.open_read_only(path)
    store.pin()
    state = store.load_state()
    return Reader(store, lambda: state)


def answer(reader: Reader, query: str, arguments: Arguments) -> Any:
    """Return the answer to `query`; raise `NotFound`, `BadQuery` or `StoreCorrupt`."""
    handler = _QUERIES.get(query)
    if handler is None:
        raise BadQuery(f"There is no query {query!r}.", f"there are: {', '.join(sorted(_QUERIES))}")
    if "height" not in arguments:
        return handler(reader, arguments)
    if query in _OF_BLOCKS:
        raise BadQuery(f"The answer to {query} does not depend on a height.", "leave --height out")
    return handler(_earlier(reader, _number(arguments, "height", 0)), arguments)


def _earlier(reader: Reader, height: int) -> Reader:
    """Return a reader of the state as it was after block `height`."""
    try:
        state = reader.store.state_at(height, reader.state)
    except LookupError as error:
        raise NotFound(f"{str(error)[:1].upper()}{str(error)[1:]}.", "the newest thousand heights are") from None
    return Reader(reader.store, lambda: state)


def _number(arguments: Arguments, name: str, default: int) -> int:
    text = arguments.get(name, str(default))
    if not text.isdecimal() or len(text) > _DIGITS:
        raise BadQuery(f"{name} must be a number, not {text[:40]!r}.", "give digits only")
    return int(text)


def _bytes(arguments: Arguments, name: str = "id") -> bytes:
    text = arguments.get(name, "")
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise BadQuery(f"{text[:80]!r} is not hexadecimal.", "ids and hashes are; --verbose shows them whole") from None


def _account(arguments: Arguments) -> bytes:
    text = arguments.get("id", "")
    try:
        return account_of(text)
    except ValueError:
        raise BadQuery(f"{text[:80]!r} is not a peer id.", "peer ids begin with 12D3Koo") from None


def _status(reader: Reader, _: Arguments) -> Any:
    state = reader.state
    tip = reader.store.block(state.height)
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
        "warnings": _warnings(shares),
    }


def _warnings(shares: list[int]) -> list[str]:
    """Return in a line what the spread of stake means for verdicts."""
    if len(shares) < _SAFE_VALIDATORS:
        return [f"With {len(shares)} of {_SAFE_VALIDATORS} validators, verdicts rest on their owners."]
    if 3 * max(shares) > sum(shares):
        return ["One validator holds more than 1/3 of the stake: verdicts rest on its owner."]
    return []


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
    elif ref.isdecimal() and len(ref) <= _DIGITS:
        found = reader.store.block(int(ref))
    else:
        found = reader.store.block_by_hash(_bytes(arguments))
    if found is None:
        raise NotFound(f"There is no block {ref}.", f"the newest is {reader.state.height}")
    return found


def _block(reader: Reader, arguments: Arguments) -> Any:
    block, certificate = _find_block(reader, arguments)
    receipts = {receipt.tx_id: receipt.reason for receipt in reader.store.receipts(block.height)}
    return {
        **block_line(block, certificate),
        "header": plain(block.header),
        "raw": encode(block.header).hex(),
        "transactions": [{**transaction_line(tx), "reason": receipts.get(tx.tx_id, "")} for tx in block.transactions],
        "events": [
            {"kind": event.kind, "data": event.data} for _, event in reader.store.events(block.height, block.height)
        ],
    }


def _tx(reader: Reader, arguments: Arguments) -> Any:
    tx_id = _bytes(arguments)
    found = reader.store.receipt(tx_id)
    if found is None:
        raise NotFound(f"There is no transaction {tx_id.hex()}.", "it may be waiting: see mempool")
    height, place, reason = found
    pair = reader.store.block(height)
    assert pair is not None  # a receipt is written with its block
    transaction = pair[0].transactions[place]
    return {
        **transaction_line(transaction),
        "height": height,
        "place": place,
        "timestamp": pair[0].header.timestamp,
        "valid_from": transaction.body.valid_from,
        "valid_until": transaction.body.valid_until,
        "memo": transaction.body.memo.hex(),
        "ok": not reason,
        "reason": reason,
        "payload": plain(transaction.body.payload),
        "raw": encode(transaction).hex(),
    }


def _account_query(reader: Reader, arguments: Arguments) -> Any:
    account = _account(arguments)
    known: Account | None = reader.state.tables[Table.ACCOUNTS].get(account)
    if known is None:
        raise NotFound(f"The account {peer_id(account)} was never used.", "check the peer id")
    unbonding = [
        plain(record)
        for key, record in sorted(reader.state.tables[Table.UNBONDINGS].items())
        if key.startswith(account)
    ]
    successor = {"successor": peer_id(reader.state.heir(account))} if reader.state.is_closed(account) else {}
    return {"account": peer_id(account), **plain(known), "unbonding": unbonding, **successor}


def _validators(reader: Reader, _: Arguments) -> Any:
    table = reader.state.tables[Table.VALIDATORS]
    return [validator_line(reader.state, account) for account in sorted(table)]


def _validator(reader: Reader, arguments: Arguments) -> Any:
    account = _account(arguments)
    if reader.state.validator(account) is None:
        raise NotFound(f"{peer_id(account)} is not a validator.", "see validators")
    return validator_line(reader.state, account)


def _tasks(reader: Reader, _: Arguments) -> Any:
    tasks: list[Task] = sorted(reader.state.tables[Table.TASKS].values(), key=lambda task: task.posted_at)
    return [task_line(task) for task in tasks]


def _task(reader: Reader, arguments: Arguments) -> Any:
    task = reader.state.task(_bytes(arguments))
    if task is None:
        raise NotFound(f"There is no task {arguments.get('id', '')}.", "see tasks")
    workers = sorted(reader.state.workers(task.id), key=lambda worker: (worker.stage, worker.account))
    return {**task_line(task), "workers": [worker_line(worker) for worker in workers]}


def _workers(reader: Reader, arguments: Arguments) -> Any:
    workers: list[Worker] = list(reader.state.tables[Table.WORKERS].values())
    task = _bytes(arguments, "task") if "task" in arguments else None
    chosen = [worker for worker in workers if task in (None, worker.task)]
    return [worker_line(w) for w in sorted(chosen, key=lambda w: (w.task, w.stage, w.account))]


def _worker(reader: Reader, arguments: Arguments) -> Any:
    account = _account(arguments)
    workers: list[Worker] = list(reader.state.tables[Table.WORKERS].values())
    seats = [worker_line(worker) for worker in workers if worker.account == account]
    if not seats:
        raise NotFound(f"{peer_id(account)} never applied for a seat.", "see workers")
    return {"worker": peer_id(account), "seats": seats, "barred": reader.state.account(account).barred}


def _claim(reader: Reader, arguments: Arguments) -> Any:
    claim = reader.claim(_bytes(arguments))
    if claim is None:
        raise NotFound(f"There is no claim {arguments.get('id', '')}.", "see the events of a block")
    return plain(claim)


def _audit(reader: Reader, arguments: Arguments) -> Any:
    audit = reader.audit(_bytes(arguments))
    if audit is None:
        raise NotFound(f"There is no audit {arguments.get('id', '')}.", "see the events of a block")
    return audit_story(reader, audit)


def _evidence(reader: Reader, arguments: Arguments) -> Any:
    table: dict[bytes, Conviction] = reader.state.tables[Table.CONVICTIONS]
    if "id" not in arguments:
        rows = sorted(table.values(), key=lambda c: c.height)
        return [{**plain(c), "kind": grounds(c, reader.audit(c.subject))} for c in rows]
    wanted = _bytes(arguments)
    for conviction in table.values():
        if wanted in (conviction.id, conviction.subject):
            audit = reader.audit(conviction.subject)
            story = audit_story(reader, audit) if audit else None
            votes = [_vote(data) for data in (conviction.first, conviction.second) if data]
            return {**plain(conviction), "kind": grounds(conviction, audit), "audit": story, "votes": votes}
    raise NotFound(f"There is no evidence {wanted.hex()}.", "see evidence without an id")


def _vote(data: bytes) -> dict[str, Any]:
    vote: Vote = decode(Vote, data)
    return {**plain(vote), "kind": vote.kind.name.lower()}


def _certificate(reader: Reader, arguments: Arguments) -> Any:
    block, certificate = _find_block(reader, arguments)
    return certificate_line(block, certificate, _signers(reader, block))


def _votes(reader: Reader, arguments: Arguments) -> Any:
    deciding = reader.deciding()
    if deciding is not None and arguments.get("id") == str(deciding.height):
        return votes_heard(deciding)
    found = _find_block(reader, arguments)
    after = reader.store.block(found[0].height + 1)
    return final_votes(found, after[0] if after else None, _signers(reader, found[0]))


def _signers(reader: Reader, block: Block) -> ValidatorSet:
    validators = reader.store.validators(block.header.validators_hash)
    assert validators is not None  # a set is written with its first block
    return validators


def _params(reader: Reader, _: Arguments) -> Any:
    return plain(reader.state.params) | {"pending": standing_votes(reader.state)}


def _supply(reader: Reader, _: Arguments) -> Any:
    parts, issued = holdings(reader.state), reader.state.chain.issued
    amounts = {name: str(value) for name, value in parts.items()}
    return {"issued": str(issued), **amounts, "is_conserved": sum(parts.values()) == issued}


def _mempool(reader: Reader, _: Arguments) -> Any:
    return [transaction_line(transaction) for transaction in reader.waiting()]


def _genesis(reader: Reader, _: Arguments) -> Any:
    return msgspec.json.decode(to_json(reader.store.genesis).encode())


def _events(reader: Reader, arguments: Arguments) -> Any:
    first = _number(arguments, "from", 1)
    last = _number(arguments, "to", reader.state.height)
    count = min(_number(arguments, "count", _MOST), 10 * _MOST)
    kinds = [kind for kind in arguments.get("kinds", arguments.get("topics", "")).split(",") if kind]
    rows = reader.store.events(first, last, kinds, count)
    return [{"height": height, "kind": event.kind, "data": event.data} for height, event in rows]


def _proof(reader: Reader, arguments: Arguments) -> Any:
    return proof(reader.store, reader.state, arguments)


def _db_check(reader: Reader, _: Arguments) -> Any:
    return replay(reader.store)


_OF_BLOCKS = frozenset(("blocks", "block", "tx", "votes", "certificate", "mempool", "genesis", "events", "db-check"))
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
    "votes": _votes,
    "certificate": _certificate,
    "params": _params,
    "supply": _supply,
    "mempool": _mempool,
    "genesis": _genesis,
    "events": _events,
    "proof": _proof,
    "db-check": _db_check,
}
