"""The dispatch of payloads to their rules."""

from typing import assert_never

from chain.ledger import accounts, audits, claims, governance, rotation, seats, tasks, validators
from chain.ledger.book import Book
from chain.transactions import (
    Bond,
    CloseTask,
    Commit,
    Evidence,
    Faucet,
    LeaveSeat,
    Open,
    Payload,
    PostTask,
    RegisterValidator,
    RenewLease,
    RevealAll,
    RotateKey,
    SubmitClaims,
    TakeSeat,
    TopUp,
    Transfer,
    Unbond,
    Unjail,
    VoteParams,
    WatchWorker,
    Withdraw,
)


def apply(book: Book, sender: bytes, payload: Payload) -> None:  # noqa: C901 - one case a kind
    """Apply one payload of `sender`; raise `Refused`."""
    match payload:
        case Transfer():
            accounts.transfer(book, sender, payload)
        case Bond():
            accounts.bond(book, sender, payload)
        case Unbond():
            accounts.unbond(book, sender, payload)
        case Withdraw():
            accounts.withdraw(book, sender)
        case RegisterValidator():
            validators.register(book, sender, payload)
        case Unjail():
            validators.unjail(book, sender)
        case Faucet():
            accounts.faucet(book, sender)
        case Evidence():
            accounts.evidence(book, sender, payload)
        case RotateKey():
            rotation.rotate(book, sender, payload)
        case VoteParams():
            governance.vote(book, sender, payload)
        case PostTask() | TopUp() | CloseTask() | TakeSeat() | RenewLease() | LeaveSeat() | WatchWorker():
            _apply_to_task(book, sender, payload)
        case SubmitClaims():
            claims.submit(book, sender, payload)
        case Commit():
            audits.commit(book, sender, payload)
        case Open():
            audits.open_cells(book, sender, payload)
        case RevealAll():
            audits.reveal(book, sender, payload)
        case _:
            assert_never(payload)


def _apply_to_task(
    book: Book, sender: bytes, payload: PostTask | TopUp | CloseTask | TakeSeat | RenewLease | LeaveSeat | WatchWorker
) -> None:
    """Apply a payload about a task or its seats."""
    match payload:
        case PostTask():
            tasks.post(book, sender, payload)
        case TopUp():
            tasks.top_up(book, sender, payload)
        case CloseTask():
            tasks.close_by_client(book, sender, payload)
        case TakeSeat():
            seats.take_seat(book, sender, payload)
        case RenewLease():
            seats.renew_lease(book, sender, payload)
        case LeaveSeat():
            seats.leave_seat(book, sender, payload)
        case WatchWorker():
            seats.watch(book, sender, payload)
        case _:
            assert_never(payload)
