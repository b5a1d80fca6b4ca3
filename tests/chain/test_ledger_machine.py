"""The ledger under everybody at once, judged by an oracle; and proof that the oracle notices broken rules."""

import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from msgspec.structs import replace

from chain import verdicts
from chain.ledger import accounts, claims, execution, hooks, payloads, pools, seats, settlement, silence, validators
from chain.ledger.book import Book
from chain.reasons import Refused
from chain.state import Table
from tests.chain.ledger_machine import Machine

EXAMPLES = int(os.environ.get("LEDGER_EXAMPLES", "200"))
"""Runs of the machine; more of them make the longer profile."""
MUTANT_EXAMPLES = 120
"""Runs within which every mutant must be noticed."""


def run(examples: int, shrink: bool) -> None:
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    profile = settings(
        max_examples=examples,
        stateful_step_count=30,
        deadline=None,
        database=None,
        derandomize="LEDGER_EXAMPLES" not in os.environ,
        suppress_health_check=list(HealthCheck),
        phases=phases,
        print_blob=True,
    )
    run_state_machine_as_test(Machine, settings=profile)


@pytest.mark.slow
def test_no_sequence_of_payloads_breaks_an_invariant() -> None:
    run(EXAMPLES, shrink=True)


def _pays_for_nothing(book: Book, task: Any, account: bytes, amount: int) -> None:
    book.credit(account, amount)
    book.burn(-amount)


def _pays_twice(book: Book, task: Any, account: bytes, amount: int) -> None:
    _PAY(book, task, account, min(2 * amount, task.escrow))


def _returns_every_bond(book: Book, task: Any) -> None:
    for worker in book.workers(task.id):
        if str(worker.state) == "left":
            book.set_worker(worker, bond=0, withheld=0)
            book.credit(worker.account, worker.bond + worker.withheld)


def _registers_anybody(book: Book, sender: bytes, payload: Any) -> None:
    known = book.draft.get(Table.VALIDATORS, sender)
    if known is not None:
        book.draft.put(Table.VALIDATORS, sender, replace(known, is_tombstoned=False, power=1000))
    _REGISTER(book, sender, payload)


def _withdraws_all(book: Book, sender: bytes) -> None:
    for key, unbonding in book.draft.items(Table.UNBONDINGS, sender):
        book.draft.delete(Table.UNBONDINGS, key)
        book.credit(sender, unbonding.amount)


def _keeps_what_was_refused(book: Book, sender: bytes, payload: Any) -> None:
    try:
        _APPLY(book, sender, payload)
    except Refused:
        book.set_account(sender, granted=not book.account(sender).granted)


def _counts_everybody(book: Book, task: Any, progress: Any) -> int:
    for worker in book.workers(task.id):
        if worker.is_seated and progress.claims:
            silence._note(book, task, worker)
    return 0


def _keeps_everything(book: Book) -> None:
    """Forget nothing."""


_PAY, _REGISTER, _APPLY = settlement._pay, validators.register, payloads.apply

MUTANTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "pay comes from nowhere": (settlement, "_pay", _pays_for_nothing),
    "work is paid twice": (settlement, "_pay", _pays_twice),
    "a bond returns while its worker is accused": (settlement, "release_bonds", _returns_every_bond),
    "a tombstoned validator registers again": (validators, "register", _registers_anybody),
    "stake is withdrawn before its release": (accounts, "withdraw", _withdraws_all),
    "an ended lease keeps its seat": (seats, "expire_leases", lambda book, task: None),
    "a refused payload leaves a trace": (execution, "apply", _keeps_what_was_refused),
    "a third of the voters convict": (verdicts, "quorum", lambda total: total // 3 + 1),
    "ended audits stay for good": (hooks, "_forget", _keeps_everything),
    "everybody is silent": (settlement, "count_silent", _counts_everybody),
    "nobody is silent": (settlement, "count_silent", lambda book, task, progress: 0),
    "anybody may be drawn": (pools, "is_fit", lambda book, account: True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, attribute, broken = MUTANTS[name]
    monkeypatch.setattr(module, attribute, broken)
    with pytest.raises((AssertionError, IndexError)):
        run(MUTANT_EXAMPLES, shrink=False)


@pytest.mark.slow
def test_a_draw_without_delay_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = claims.draw_due

    def early(book: Book) -> None:
        book.height += 1
        try:
            real(book)
        finally:
            book.height -= 1

    monkeypatch.setattr(claims, "draw_due", early)
    with pytest.raises(AssertionError):
        run(MUTANT_EXAMPLES, shrink=False)
