"""Traces: what workers record of a run, who may look at it, and the file that the client makes of it."""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import trio

from tdml_p2p.requests import RequestFailed
from tdml_p2p.swarm.governor import ChainGovernor
from tdml_p2p.swarm.tracing import TRACE_PROTOCOL, TraceCollector, TraceReply, TraceRequest, TraceService
from tests.tdml_p2p.swarm.session_kit import CLIENT, TASK, Run
from tests.trainer.swarm_kit import FakeGovernor
from trainer.coordinator_ports import Members, StepDone
from trainer.trace import MAX_REPLY_SPANS, Recorder, Span, lane, note, recording, span

HOUR = 3600 * 10**9


class Clock:
    """Nanoseconds that pass by ten with each look."""

    def __init__(self, start: int = 1000) -> None:
        self.now = start

    def __call__(self) -> int:
        self.now += 10
        return self.now


def assert_nested(spans: Iterable[tuple[int, int]]) -> None:
    """Any two of the spans (start, end) are apart or one inside the other."""
    open_ends: list[int] = []
    for start, end in sorted(spans, key=lambda times: (times[0], -times[1])):
        while open_ends and open_ends[-1] <= start:
            open_ends.pop()
        assert not open_ends or end <= open_ends[-1]
        open_ends.append(end)


async def traced_run(is_on: bool) -> Run:
    run = Run()
    for session in run.sessions.values():
        if is_on:
            session.recorder.keep_on(HOUR)
    await run.train()
    return run


async def test_every_cell_of_every_step_is_there_and_spans_nest(autojump_clock: trio.testing.MockClock) -> None:
    run = await traced_run(is_on=True)
    cells = {(step, cell) for step in range(1, 4) for cell in range(run.manifest.microbatches)}
    for session in run.sessions.values():
        _, spans = session.recorder.since(0)
        for name in ("forward", "backward", "hash", "sign", "send", "verify"):
            found = {(s.step, s.cell) for s in spans if s.name == name and s.cell >= 0}
            assert found == cells, name
        for name in ("sum", "reduce", "optimiser", "root", "claim"):
            assert {s.step for s in spans if s.name == name} == {1, 2, 3}, name
        lanes = defaultdict(list)
        for found_span in spans:
            lanes[found_span.lane].append((found_span.start, found_span.start + found_span.length))
        assert {"worker", "receive", "claims"} <= set(lanes)
        for times in lanes.values():
            assert_nested(times)


async def test_nothing_is_recorded_while_nobody_looks(autojump_clock: trio.testing.MockClock) -> None:
    run = await traced_run(is_on=False)
    assert [session.recorder.recorded for session in run.sessions.values()] == [0, 0]


def test_spans_take_the_lane_of_their_task_and_stop_when_the_recorder_is_off() -> None:
    recorder = Recorder(clock=Clock())
    with recording(recorder), lane("a" * 40):
        with span("early"):
            pass
        recorder.keep_on(200)
        with span("outer", 3, 1), span("inner"):
            note("other", "known", (5, 9))
        recorder.keep_on(0)
        with span("late"):
            pass
    with span("outside"):
        pass
    _, spans = recorder.since(0)
    assert [(s.lane, s.name, s.step, s.cell) for s in spans] == [
        ("other", "known", -1, -1),
        ("a" * 32, "inner", -1, -1),
        ("a" * 32, "outer", 3, 1),
    ]


def test_the_ring_keeps_the_newest_spans_and_says_where_they_begin() -> None:
    recorder = Recorder(size=3, clock=Clock())
    for index in range(5):
        recorder.add(Span("lane", f"span {index}", index, 1))
    position, spans = recorder.since(0)
    assert (position, [s.name for s in spans]) == (2, ["span 2", "span 3", "span 4"])
    position, spans = recorder.since(4)
    assert (position, [s.name for s in spans]) == (4, ["span 4"])
    assert recorder.since(5) == (5, ())


async def test_only_the_client_of_the_task_may_look() -> None:
    recorder = Recorder(clock=Clock())
    service = TraceService(lambda sender, task: recorder if (sender, task) == (CLIENT, TASK) else None)
    request = msgspec.msgpack.encode(TraceRequest(TASK, 0))
    for sender, data in (("stranger", request), (CLIENT, msgspec.msgpack.encode(TraceRequest(bytes(32), 0)))):
        with pytest.raises(ValueError, match="no trace"):
            await service.serve(sender, data)
    with pytest.raises(ValueError, match=r"Expected|truncated|malformed"):
        await service.serve(CLIENT, request[:-1])
    assert not recorder.is_on
    await service.serve(CLIENT, request)
    assert recorder.is_on


class Workers:
    """Workers with clocks of their own, asked without a network."""

    def __init__(self, recorders: dict[str, Recorder]) -> None:
        self.services = {
            peer: TraceService(lambda sender, task, found=found: found)  # type: ignore[misc]
            for peer, found in recorders.items()
        }

    async def request(self, peer: str, protocol: str, data: bytes, *, limit: int, timeout: float) -> bytes:
        assert protocol == TRACE_PROTOCOL
        if peer not in self.services:
            raise RequestFailed(peer, "unreachable")
        reply = await self.services[peer].serve(CLIENT, data)
        assert len(reply) <= limit
        return reply


def collector(recorders: dict[str, Recorder], *stages: tuple[str, ...]) -> TraceCollector:
    governor = cast(ChainGovernor, FakeGovernor(Members(0, 0, stages)))
    made = TraceCollector(TASK, CLIENT, Workers(recorders), governor)
    made.recorder = Recorder(clock=Clock())
    return made


async def test_the_file_has_a_process_for_each_peer_and_times_of_one_clock(tmp_path: Path) -> None:
    ahead, gone_peer = Recorder(clock=Clock(1_000_000)), "gone"
    ahead.add(Span("compute", "forward", 1_000_500, 2000, 1, 0))
    made = collector({"ahead": ahead}, ("ahead",), (gone_peer,))
    made.recorder.add(Span("steps", "step", 400, 2500, 1))
    await made.collect()
    made.save(tmp_path / "new" / "trace.json")
    document: dict[str, Any] = json.loads((tmp_path / "new" / "trace.json").read_text())
    events = document["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert sorted(names.values()) == sorted([f"client {CLIENT}", "stage 0 ahead", "stage 1 gone"])
    (step,) = (e for e in events if e["name"] == "step")
    (forward,) = (e for e in events if e["name"] == "forward")
    assert (forward["ph"], forward["dur"], forward["args"]) == ("X", 2.0, {"step": 1, "cell": 0})
    assert forward["ts"] - step["ts"] == pytest.approx(1.1, abs=0.02)  # 500 ns after a clock that shows 999,000 more
    assert document["otherData"]["ahead"]["offset_ns"] == pytest.approx(999_000, abs=30)


async def test_more_spans_than_a_reply_holds_come_in_several_and_losses_are_counted() -> None:
    busy = Recorder(size=2 * MAX_REPLY_SPANS, clock=Clock())
    for index in range(2 * MAX_REPLY_SPANS + 5):
        busy.add(Span("compute", "forward", index, 1))
    made = collector({"busy": busy}, ("busy",))
    await made.collect()
    await made.collect()
    found = [e["ts"] for e in made.document()["traceEvents"] if e["name"] == "forward"]
    assert len(found) == len(set(found)) == 2 * MAX_REPLY_SPANS
    assert made.document()["otherData"]["busy"]["spans_lost"] == 5


async def test_a_committed_step_has_a_span() -> None:
    made = collector({})
    made.note_step(StepDone(4, 0, 1.0, 8, 100e-9, 0.0))
    await made.collect()
    (event,) = (e for e in made.document()["traceEvents"] if e["name"] == "step")
    assert (event["dur"], event["args"]) == (0.1, {"step": 4})


def test_a_reply_with_too_long_a_name_is_refused() -> None:
    data = msgspec.msgpack.encode(TraceReply(1, 0, (Span("compute", "x" * 33, 0, 1),)))
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(data, type=TraceReply)
