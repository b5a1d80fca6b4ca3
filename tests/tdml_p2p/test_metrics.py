"""Metrics and the figures drawn from them."""

import json
from pathlib import Path

import pytest
import trio
import trio.testing

from tdml_p2p.http_status import LOSS_POINTS, loss_curve
from tdml_p2p.metrics import FINALITY_WINDOW, STALL_INTERVAL, Metrics


def test_quantiles_are_of_the_latest_blocks() -> None:
    metrics = Metrics()
    assert metrics.finality_quantile(0.5) is None
    for _ in range(10):
        metrics.observe_finality(100.0)
    for index in range(FINALITY_WINDOW):
        metrics.observe_finality(index / FINALITY_WINDOW)
    assert metrics.finality_quantile(0.0) == 0.0
    assert metrics.finality_quantile(0.5) == 0.5
    assert metrics.finality_quantile(1.0) == (FINALITY_WINDOW - 1) / FINALITY_WINDOW


def test_a_clock_that_runs_ahead_gives_no_negative_time() -> None:
    metrics = Metrics()
    metrics.observe_finality(-3.0)
    assert metrics.finality_quantile(1.0) == 0.0


def test_totals_kept_elsewhere_never_count_twice() -> None:
    metrics = Metrics()
    for total in (5, 5, 9):
        metrics.advance(metrics.tensor_bytes.labels("sent"), "sent", total)
    assert b'tdml_tensor_bytes_total{direction="sent"} 9.0' in metrics.render()


def test_two_peers_in_one_process_do_not_share_metrics() -> None:
    first, second = Metrics(), Metrics()
    first.height.set(7)
    assert b"tdml_height 7.0" in first.render()
    assert b"tdml_height 0.0" in second.render()


@pytest.mark.trio
async def test_stalls_are_how_late_a_timer_is(mock_clock: trio.testing.MockClock) -> None:
    late: list[float] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Metrics().watch_stalls, late.append)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(STALL_INTERVAL)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(STALL_INTERVAL + 0.25)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert late == pytest.approx([0.0, 0.25])


def test_the_loss_curve_skips_what_is_no_point(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert loss_curve(path) == []
    lines = [{"step": 2, "loss": 1.5}, {"step": 1, "loss": 2.0}, {"step": 3}, [], {"step": 4, "loss": float("nan")}]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 5, "lo')
    assert loss_curve(path) == [(1, 2.0), (2, 1.5)]


def test_a_long_loss_curve_is_thinned(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step":{step},"loss":1.0}}\n' for step in range(10 * LOSS_POINTS)))
    assert len(loss_curve(path)) == LOSS_POINTS
