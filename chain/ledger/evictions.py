"""Who lost a seat and why, kept for good; and the end of a seat for which no bond is taken."""

from chain.hashing import digest
from chain.ledger.book import Book, name
from chain.records import Conviction, Worker, WorkerStatus, status_of
from chain.state import Table

WITHHELD = 2
SILENT = 3


def remember(book: Book, worker: Worker, kind: int, slashed: int, subject: bytes) -> None:
    """Keep what an eviction rests on: the id of an audit, or of a step."""
    identity = digest("conviction", subject, bytes([kind]))
    conviction = Conviction(identity, kind, worker.account, worker.task, book.height, slashed, subject)
    book.draft.put(Table.CONVICTIONS, identity, conviction)


def evict_without_slash(book: Book, worker: Worker, kind: int, subject: bytes, step: int, reason: str) -> None:
    """End the seat of a worker that cannot be told from a broken machine; its bond returns."""
    remember(book, worker, kind, 0, subject)
    book.set_worker(worker, status=status_of(WorkerStatus, WorkerStatus.LEFT))
    book.note(
        "evicted",
        task=worker.task.hex(),
        worker=name(worker.account),
        step=step,
        stage=worker.stage,
        evidence=subject.hex(),
        reason=reason,
    )
