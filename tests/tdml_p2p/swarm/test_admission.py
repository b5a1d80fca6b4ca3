"""Known-answer cells: a machine that computes rightly is let in, a broken one finds out, and nobody waits in vain."""

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

import pytest
import trio
import trio.testing
from msgspec import structs

from chain.params import Params
from chain.records import Audit, AuditStatus
from tdml_p2p.swarm.admission import CELLS, WrongAnswer, known_answers
from tdml_p2p.swarm.reexecution import Cell, Execution, Reexecutor
from tests.tdml_p2p.swarm.test_reexecution import Material, inline
from tests.tdml_p2p.swarm.test_replay import Judged
from trainer.stage import CellResult

T = TypeVar("T")


async def broken(work: Callable[[], T], /) -> T:
    """Compute as a machine with a faulty multiplier."""
    result: Any = await inline(work)
    return result._replace(gw=result.gw * 1.01) if isinstance(result, CellResult) else result


def described(cell: Cell | None, audit: Audit) -> Cell | None:
    """Return what is known of an audit's cell: the same of each."""
    return cell


async def ask(judged: Judged, reexecutor: Reexecutor, *statuses: AuditStatus) -> tuple[int, int]:
    """Return the known answers of audits with these statuses, and blocks waited for; one passes in the third."""
    cases = [(await judged.case(status)).audit for status in statuses]
    audits = [structs.replace(audit, id=bytes([number]) * 32) for number, audit in enumerate(cases)]
    later = structs.replace((await judged.case(AuditStatus.PASSED)).audit, id=bytes([99]) * 32)
    heights: list[int] = []

    async def blocks() -> AsyncIterator[int]:
        for height in range(1, 4):
            await trio.lowlevel.checkpoint()
            heights.append(height)
            yield height

    def newest() -> list[Audit]:
        return [later] if len(heights) == 3 else audits

    async with aclosing(blocks()) as arriving:
        found = await known_answers(newest, arriving, lambda _: judged.cell, reexecutor, Params())
    return found, len(heights)


async def test_verified_cells_computed_alike_let_a_peer_in() -> None:
    judged = Judged(Material())
    assert await ask(judged, judged.reexecutor) == (0, 0)
    assert await ask(judged, judged.reexecutor, AuditStatus.PASSED) == (1, 0)
    assert await ask(judged, judged.reexecutor, *[AuditStatus.PASSED] * 5) == (CELLS, 0)


async def test_an_audit_that_is_under_way_is_waited_for() -> None:
    judged = Judged(Material())
    assert await ask(judged, judged.reexecutor, AuditStatus.OPENED) == (1, 3)


async def test_a_machine_that_computes_wrongly_finds_out() -> None:
    judged = Judged(Material())
    faulty = Reexecutor(judged.material.fetch, judged.material.ask, broken)
    with pytest.raises(WrongAnswer, match=r"gw 9\.\de-03"):
        await ask(judged, faulty, AuditStatus.PASSED)


class Rough(Reexecutor):
    """A machine of other kernels on a model that grows rounding: off by 3 τ of gw, and by so much from itself."""

    spread = 0.0

    async def replay(self, cell: Cell, x: bytes, gy: bytes) -> Execution:
        return self._off(await super().replay(cell, x, gy), 1e-4)

    async def again(self, cell: Cell, execution: Execution, seed: int) -> Execution:
        return self._off(execution, self.spread)

    def _off(self, execution: Execution, off: float) -> Execution:
        return Execution(execution.inputs, execution.result._replace(gw=execution.result.gw * (1 + off)))


@pytest.mark.parametrize(("spread", "answers"), [(0.0, None), (1e-4, 1)])
async def test_a_machine_is_held_to_what_it_can_hold_itself(spread: float, answers: int | None) -> None:
    judged = Judged(Material())
    rough = Rough(judged.material.fetch, judged.material.ask, inline)
    rough.spread = spread
    if answers is None:
        with pytest.raises(WrongAnswer, match=r"gw 1\.0e-04"):
            await ask(judged, rough, AuditStatus.PASSED)
    else:
        assert await ask(judged, rough, AuditStatus.PASSED) == (answers, 0)


@pytest.mark.parametrize("status", [AuditStatus.FAULTED, AuditStatus.CONVICTED, AuditStatus.UNDECIDED])
async def test_only_what_has_passed_is_an_answer(status: AuditStatus) -> None:
    judged = Judged(Material())
    faulty = Reexecutor(judged.material.fetch, judged.material.ask, broken)
    assert await ask(judged, faulty, status) == (0, 0)


async def endless() -> AsyncIterator[int]:
    """A block a second."""
    height = 0
    while True:
        await trio.sleep(1)
        height += 1
        yield height


async def test_what_nobody_has_any_more_keeps_nobody_out(autojump_clock: trio.testing.MockClock) -> None:
    judged = Judged(Material())
    audit = (await judged.case(AuditStatus.PASSED)).audit
    judged.material.blobs.clear()
    for cell in (judged.cell, None):
        began = trio.current_time()
        async with aclosing(endless()) as blocks:
            describe = partial(described, cell)
            assert await known_answers(lambda: [audit], blocks, describe, judged.reexecutor, Params()) == 0
        assert trio.current_time() - began == pytest.approx(30.0)


async def test_where_all_material_is_gone_and_nothing_is_under_way_the_next_audit_is_waited_for(
    autojump_clock: trio.testing.MockClock,
) -> None:
    judged = Judged(Material())
    old = (await judged.case(AuditStatus.PASSED)).audit
    new = structs.replace(old, id=bytes([99]) * 32)

    def newest() -> list[Audit]:
        return [old, new] if trio.current_time() - began >= 5 else [old]

    began = trio.current_time()
    async with aclosing(endless()) as blocks:
        cells = {old.id: None, new.id: judged.cell}
        found = await known_answers(newest, blocks, lambda audit: cells[audit.id], judged.reexecutor, Params())
    assert found == 1
