"""Records of the chain as JSON values: accounts as peer ids, other bytes as hex, amounts as strings."""

from typing import Any

from chain.blocks import Block, Certificate
from chain.bounds import changes
from chain.codec import Record, encode
from chain.keys import peer_id
from chain.params import Params
from chain.records import Audit, AuditStatus, Conviction, Task, Worker
from chain.state import State
from chain.transactions import Transaction

_AMOUNTS = frozenset(
    ("balance", "bonded", "amount", "stake", "escrow", "price", "worker_bond", "bond", "withheld", "earned",
     "slashed", "issued", "burned", "faucet", "fee", "power")
)  # fmt: skip
_ACCOUNTS = frozenset(("account", "client", "worker", "auditor", "sender", "proposer", "validator", "to"))


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


def grounds(conviction: Conviction, audit: Audit | None) -> str:
    """Return what a conviction rests on; of too many audits how the last ended, as long as the state has it."""
    match conviction.kind:
        case 0:
            return "verdict"
        case 1:
            return "equivocation"
        case 2:
            return str(audit.state) if audit is not None else str(AuditStatus.WITHHELD)
        case _:
            return "silent"


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


def transaction_line(transaction: Transaction) -> dict[str, Any]:
    """Return a transaction in a line."""
    body = transaction.body
    return {
        "id": transaction.tx_id.hex(),
        "kind": type(body.payload).__name__,
        "sender": peer_id(body.sender),
        "nonce": body.nonce,
        "fee": str(body.fee),
    }


def validator_line(state: State, account: bytes) -> dict[str, Any]:
    """Return a registered validator in a line."""
    validator = state.validator(account)
    assert validator is not None  # the caller has looked
    return {
        "validator": peer_id(account),
        "bonded": str(state.account(account).bonded),
        "power": str(validator.power),
        "is_active": account in state.validators(),
        "is_jailed": validator.is_jailed,
        "is_tombstoned": validator.is_tombstoned,
        "missed": len(validator.missed),
    }


def standing_votes(state: State) -> list[dict[str, Any]]:
    """Return the changes of parameters that validators stand for, with the power behind each and what is needed."""
    behind: dict[Params, dict[bytes, int]] = {}
    for account, power in state.validators().members:
        validator = state.validator(account)
        if validator is not None and validator.wish is not None:
            behind.setdefault(validator.wish, {})[account] = power
    return [
        {
            "changes": changes(state.params, wish),
            "power": str(sum(voters.values())),
            "needed": str(2 * state.validators().total // 3 + 1),
            "validators": [peer_id(account) for account in voters],
        }
        for wish, voters in behind.items()
    ]


def task_line(task: Task) -> dict[str, Any]:
    """Return a task in a line."""
    return {**plain(task), "status": str(task.state)}


def worker_line(worker: Worker) -> dict[str, Any]:
    """Return a worker's seat or application in a line."""
    line = plain(worker)
    del line["account"]
    return {"worker": peer_id(worker.account), **line, "status": str(worker.state)}
