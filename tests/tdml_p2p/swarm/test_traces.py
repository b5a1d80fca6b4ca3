"""The trace book keeps a worker's cells until they settle, and opens them under an audit's key."""

import pytest
import torch

from chain.commitment import is_member, leaf
from tdml_p2p.swarm.traces import EMPTY, KeptCell, TraceBook
from tests.tdml_p2p.swarm.trace_samples import AFTER, BEFORE, ROOT, cell_of, state_of, step_of
from trainer.content import address_of
from trainer.sketch import cell_sketch
from trainer.tensors import buffer_of

TASK = bytes(range(32))
AUDIT = bytes([9]) * 32
KEY = bytes([5]) * 32


def book_of(*steps: int, generation: int = 0, secret: bytes = b"secret") -> TraceBook:
    """Return a book that holds cells 0, 2 and 3 of each step."""
    book = TraceBook(TASK, secret)
    for step in steps:
        book.add(
            step_of(step, *(cell_of(step, n, generation) for n in (0, 2, 3)), generation=generation), BEFORE, AFTER
        )
    return book


def kept_of(book: TraceBook, step: int, cell: int, generation: int = 0) -> KeptCell:
    kept = book.cell(generation, step, cell)
    assert kept is not None
    return kept


def addresses(kept: KeptCell) -> tuple[bytes, ...]:
    trace = kept.trace
    return trace.x, trace.y, trace.gy, trace.gx, trace.gw


def test_a_claim_says_which_cells_and_states_it_is_about() -> None:
    claim = TraceBook(TASK, b"secret").add(step_of(4, cell_of(4, 1), cell_of(4, 2), generation=3), BEFORE, AFTER)
    assert claim is not None
    assert (claim.task, claim.generation, claim.step, claim.stage) == (TASK, 3, 4, 1)
    assert (claim.cells, claim.state_before, claim.state_after) == ((1, 2), BEFORE, ROOT)


def test_a_step_without_own_cells_is_claimed_by_its_optimisers_step_alone() -> None:
    book, state = TraceBook(TASK, b"secret"), state_of(4)
    claim = book.add(step_of(4), BEFORE, state.manifest)
    assert (claim.cells, claim.state_before, claim.state_after) == ((), BEFORE, ROOT)
    assert book.cell(0, 4, 0) is None
    book.provide_state(state)
    opened = book.opening((0, 4, 4), AUDIT, KEY)
    assert opened is not None
    assert is_member(claim.root, leaf(opened.salt, opened.trace), 0, 1, opened.proof)


def test_the_trace_names_every_tensor_of_the_cell() -> None:
    kept = kept_of(book_of(1), 1, 2)
    record = cell_of(1, 2)
    tensors = (record.x, record.y, record.gy, record.gx, record.gw)
    assert addresses(kept) == tuple(address_of(buffer_of(tensor)) for tensor in tensors if tensor is not None)
    assert kept.trace.state == BEFORE


def test_a_weight_gradient_is_known_by_its_address_and_forgotten_with_its_step() -> None:
    book = book_of(1, 2)
    trace = kept_of(book, 1, 3).trace
    assert [(claim.step, cell) for claim, cell in book.gradients(trace.gw)] == [(1, 3)]
    assert book.gradients(trace.gx) == []
    book.forget(1, 0)
    assert book.gradients(trace.gw) == []


def test_a_gradient_that_is_computed_again_after_a_rollback_is_of_both_claims() -> None:
    book, once = book_of(1), cell_of(1, 3)
    book.add(step_of(1, once, generation=1), BEFORE, AFTER)
    claims = book.gradients(kept_of(book, 1, 3).trace.gw)
    assert [(claim.generation, cell) for claim, cell in claims] == [(0, 3), (1, 3)]


def test_a_step_that_is_done_again_in_one_generation_stays_as_it_was_claimed() -> None:
    book = TraceBook(TASK, b"secret")
    claim = book.add(step_of(1, cell_of(1, 3)), BEFORE, AFTER)
    opened = book.opening((0, 1, 3), bytes(32), bytes(32))
    assert book.add(step_of(1, cell_of(2, 3), cell_of(2, 2)), BEFORE, AFTER) == claim
    assert book.opening((0, 1, 3), bytes(32), bytes(32)) == opened
    assert book.cell(0, 1, 2) is None


def test_kept_tensors_are_served_by_their_address() -> None:
    book = book_of(1)
    for address in addresses(kept_of(book, 1, 3)):
        blob = book.blob(address)
        assert blob is not None
        assert address_of(blob) == address
    assert book.blob(bytes(32)) is None


def test_labels_stand_where_the_gradient_does_elsewhere() -> None:
    labels = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    book = TraceBook(TASK, b"secret")
    book.add(step_of(1, cell_of(1, 0, labels=labels)), BEFORE, AFTER)
    trace = kept_of(book, 1, 0).trace
    assert trace.gy == address_of(buffer_of(labels)) != EMPTY
    assert book.blob(trace.gy) == buffer_of(labels)


@pytest.mark.parametrize("name", [(0, 9, 0), (1, 1, 0), (0, 1, 1)])
def test_unknown_cells_give_nothing(name: tuple[int, int, int]) -> None:
    book = book_of(1)
    assert book.cell(*name) is None
    assert book.opening(name, AUDIT, KEY) is None


@pytest.mark.parametrize("cell", [0, 2, 3])
def test_an_opening_proves_the_cell_under_the_claim(cell: int) -> None:
    book = TraceBook(TASK, b"secret")
    claim = book.add(step_of(1, *(cell_of(1, number) for number in (0, 2, 3))), BEFORE, AFTER)
    opening = book.opening((0, 1, cell), AUDIT, KEY)
    assert claim is not None
    assert opening is not None
    assert opening.audit == AUDIT
    position = claim.cells.index(cell)
    assert is_member(claim.root, leaf(opening.salt, opening.trace), position, 4, opening.proof)
    assert not is_member(claim.root, leaf(opening.salt, opening.trace), (position + 1) % 4, 4, opening.proof)


def test_an_opening_sketches_the_results_under_the_key_of_the_audit() -> None:
    book, record = book_of(1), cell_of(1, 2)
    found = [book.opening((0, 1, 2), AUDIT, key) for key in (KEY, bytes(32))]
    expected = [cell_sketch(record.y, record.gx, record.gw, key) for key in (KEY, bytes(32))]
    assert [opening.sketch for opening in found if opening] == expected
    assert expected[0] != expected[1]


def test_salts_differ_by_cell_step_generation_and_secret() -> None:
    salts = [kept_of(book_of(1, 2), step, cell).salt for step in (1, 2) for cell in (0, 2, 3)]
    salts.append(kept_of(book_of(1, generation=1), 1, 0, generation=1).salt)
    salts.append(kept_of(book_of(1, secret=b"other"), 1, 0).salt)
    assert len(set(salts)) == len(salts)
    assert kept_of(book_of(1), 1, 0).salt == salts[0]


def test_settled_steps_are_dropped_and_unsettled_ones_kept() -> None:
    book = book_of(1, 2, 3)
    names = {step: addresses(kept_of(book, step, 0)) for step in (1, 2, 3)}
    book.forget(settled=2, generation=0)
    assert [step for step in (1, 2, 3) if book.cell(0, step, 0)] == [3]
    assert book.opening((0, 2, 0), AUDIT, KEY) is None
    assert book.opening((0, 3, 0), AUDIT, KEY) is not None
    assert all(book.blob(address) is None for step in (1, 2) for address in names[step])
    assert all(book.blob(address) is not None for address in names[3])


def test_the_generation_before_is_kept_and_older_ones_are_dropped() -> None:
    book = TraceBook(TASK, b"secret")
    for generation in (0, 1, 2):
        book.add(step_of(5, cell_of(5, 0, generation), generation=generation), BEFORE, AFTER)
    book.forget(settled=0, generation=2)
    assert [generation for generation in (0, 1, 2) if book.cell(generation, 5, 0)] == [1, 2]


def test_a_tensor_that_a_kept_step_still_names_outlives_the_dropped_one() -> None:
    book = TraceBook(TASK, b"secret")
    for generation in (0, 2):  # the step is computed again from the same state: every tensor is the same
        book.add(step_of(5, cell_of(5, 0), generation=generation), BEFORE, AFTER)
    book.forget(settled=0, generation=2)
    assert book.cell(0, 5, 0) is None
    assert all(book.blob(address) is not None for address in addresses(kept_of(book, 5, 0, generation=2)))
    book.forget(settled=5, generation=2)
    assert all(book.blob(address) is None for address in addresses(kept_of(book_of(5), 5, 0)))


def test_states_are_served_until_a_later_step_has_settled() -> None:
    book = TraceBook(TASK, b"secret")
    states = [state_of(step, shared=True) for step in (1, 2)]
    for state in states:
        book.provide_state(state)
    book.forget(settled=1, generation=0)
    assert book.blob(states[0].root) == memoryview(states[0].manifest.encode())
    book.forget(settled=2, generation=0)
    assert book.blob(states[0].root) is None
    assert book.blob(states[0].manifest.weights) is None
    served = states[1].manifest
    assert all(book.blob(name) is not None for name in (served.root(), served.weights, served.m, served.v))


def test_gradients_are_kept_while_there_is_room_and_the_others_can_be_restored() -> None:
    one = cell_of(1, 0).gw
    assert one is not None
    book = TraceBook(TASK, b"secret", room=4 * one.nbytes)
    for step in (1, 2):
        book.add(step_of(step, *(cell_of(step, n) for n in (0, 2, 3))), BEFORE, AFTER)
    held = [kept_of(book, step, n).record.gw is not None for step in (1, 2) for n in (0, 2, 3)]
    assert held == [True, True, True, True, False, False]
    lost = kept_of(book, 2, 3)
    assert book.blob(lost.trace.gw) is None
    assert book.opening((0, 2, 3), AUDIT, KEY) is None
    assert not book.restore((0, 2, 3), torch.zeros(20))
    assert not book.restore((0, 9, 9), torch.zeros(20))
    again = cell_of(2, 3).gw
    assert again is not None
    assert book.restore((0, 2, 3), again)
    roomy, opened = book_of(1, 2).opening((0, 2, 3), AUDIT, KEY), book.opening((0, 2, 3), AUDIT, KEY)
    assert opened is not None
    assert opened == roomy
    assert book.blob(lost.trace.gw) == buffer_of(again)


def test_steps_that_settle_make_room() -> None:
    one = cell_of(1, 0).gw
    assert one is not None
    book = TraceBook(TASK, b"secret", room=3 * one.nbytes)
    for step in (1, 2, 3, 4):
        book.add(step_of(step, *(cell_of(step, n) for n in (0, 2, 3))), BEFORE, AFTER)
        assert kept_of(book, step, 3).record.gw is not None
        book.forget(step, 0)
