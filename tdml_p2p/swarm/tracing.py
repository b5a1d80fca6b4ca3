"""A run's trace: workers give their spans to the client of the task, who writes them as one file.

The file is in the Trace Event Format (complete events, microseconds), which Perfetto and Chrome open: a process
for each peer, a thread for each of its lanes. Asking keeps a worker's recorder on for a while, so nothing has to
be turned off. A worker's clock is set against the client's by the quickest of its answers.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import msgspec
import trio

from chain.codec import Hash
from tdml_p2p.requests import RequestFailed
from trainer.trace import MAX_REPLY_SPANS, Recorder, Span

if TYPE_CHECKING:
    from trainer.coordinator_ports import Governor, StepDone

TRACE_PROTOCOL = "/tdml/trace/1"
MAX_TRACE_REQUEST_BYTES = 128
MAX_TRACE_REPLY_BYTES = 1 << 20
MAX_PEER_SPANS = 1 << 20
"""Spans of one peer that the client keeps."""
_KEPT_ON = 60 * 10**9
_ASK_SECONDS = 2.0
_REPLY_SECONDS = 10.0
_PROBE_SECONDS = 0.01
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class TraceRequest(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Asks for a task's spans from the `position`-th recorded on, and that more are recorded."""

    task: Hash
    position: _Count


class TraceReply(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The worker's clock now, the position of the first span, the spans."""

    now: _Count
    position: _Count
    spans: Annotated[tuple[Span, ...], msgspec.Meta(max_length=MAX_REPLY_SPANS)]


_request = msgspec.msgpack.Decoder(TraceRequest)
_reply = msgspec.msgpack.Decoder(TraceReply)


class TraceService:
    """Answers of a worker; `recorder_for(sender, task)` is None for whoever may not look."""

    def __init__(self, recorder_for: Callable[[str, bytes], Recorder | None]) -> None:
        self._recorder_for = recorder_for
        self._asked = trio.Event()
        self._recorder = Recorder()

    async def serve(self, sender: str, data: bytes) -> bytes:
        """Answer one request; raise `ValueError` for what cannot be answered."""
        try:
            wanted = _request.decode(data)
        except (msgspec.DecodeError, RecursionError) as error:
            raise ValueError(str(error)) from None
        recorder = self._recorder_for(sender, wanted.task)
        if recorder is None:
            raise ValueError("no trace for this peer")
        recorder.keep_on(_KEPT_ON)
        self._recorder = recorder
        self._asked.set()
        position, spans = recorder.since(wanted.position)
        return msgspec.msgpack.encode(TraceReply(recorder.clock(), position, spans))

    async def run(self) -> None:
        """Record how late the event loop is, while somebody looks, until cancelled."""
        while True:
            await self._asked.wait()
            self._asked = trio.Event()
            while self._recorder.is_on:
                recorder, started = self._recorder, time.perf_counter()
                await trio.sleep(_PROBE_SECONDS)
                late = max(int((time.perf_counter() - started - _PROBE_SECONDS) * 1e9), 0)
                recorder.add(Span("event loop", "late", recorder.clock() - late, late))


@dataclass
class _Trail:
    """What one worker has told: its spans, and its clock less ours at the quickest answer."""

    position: int = 0
    lost: int = 0
    offset: int = 0
    round_trip: int = 1 << 62
    spans: list[Span] = field(default_factory=list)


class Asking(Protocol):
    """A network of which a peer can be asked; raises `RequestFailed`."""

    async def request(self, peer: str, protocol: str, data: bytes, *, limit: int, timeout: float) -> bytes:
        """Return the peer's reply."""
        ...


class TraceCollector:
    """The client's side: `recorder` has its own spans; the workers are those that `governor` knows."""

    def __init__(self, task: bytes, me: str, network: Asking, governor: "Governor") -> None:
        self.recorder = Recorder()
        self._task = task
        self._me = me
        self._network = network
        self._governor = governor
        self._own = _Trail(round_trip=0)
        self._trails: dict[str, _Trail] = {}
        self._stages: dict[str, int] = {}

    async def run(self) -> None:
        """Collect until cancelled."""
        while True:
            await self.collect()
            await trio.sleep(_ASK_SECONDS)

    async def collect(self) -> None:
        """Ask every worker for what it has recorded since the last time."""
        self.recorder.keep_on(_KEPT_ON)
        position, spans = self.recorder.since(self._own.position, MAX_PEER_SPANS)
        _extend(self._own, position, spans)
        for stage, peers in enumerate(self._governor.current().stages):
            for peer in peers:
                self._stages[peer] = stage
                await self._follow(peer, self._trails.setdefault(peer, _Trail()))

    def note_step(self, done: "StepDone") -> None:
        """Record a committed step in a lane of its own."""
        length, now = int(done.seconds * 1e9), self.recorder.clock()
        self.recorder.add(Span("steps", "step", max(now - length, 0), length, done.step))

    def save(self, path: Path) -> None:
        """Write what was collected."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.document()))

    def document(self) -> dict[str, Any]:
        """Return the trace as the file has it."""
        trails = {self._me: self._own, **self._trails}
        starts = [span.start - trail.offset for trail in trails.values() for span in trail.spans]
        origin = min(starts, default=0)
        events: list[dict[str, Any]] = []
        for pid, (peer, trail) in enumerate(trails.items(), 1):
            stage = self._stages.get(peer)
            events += _events(pid, f"client {peer}" if stage is None else f"stage {stage} {peer}", trail, origin)
        clocks = {
            peer: {"offset_ns": trail.offset, "round_trip_ns": trail.round_trip, "spans_lost": trail.lost}
            for peer, trail in trails.items()
        }
        return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"task": self._task.hex(), **clocks}}

    async def _follow(self, peer: str, trail: _Trail) -> None:
        while len(trail.spans) < MAX_PEER_SPANS:
            asked = self.recorder.clock()
            try:
                request = msgspec.msgpack.encode(TraceRequest(self._task, trail.position))
                data = await self._network.request(
                    peer, TRACE_PROTOCOL, request, limit=MAX_TRACE_REPLY_BYTES, timeout=_REPLY_SECONDS
                )
                reply = _reply.decode(data)
            except (RequestFailed, msgspec.DecodeError, RecursionError):
                return  # a worker that is gone or lies about its spans leaves a shorter trace
            answered = self.recorder.clock()
            if answered - asked < trail.round_trip:
                trail.round_trip = answered - asked
                trail.offset = reply.now - (asked + answered) // 2
            _extend(trail, reply.position, reply.spans)
            if len(reply.spans) < MAX_REPLY_SPANS:
                return


def _extend(trail: _Trail, position: int, spans: tuple[Span, ...]) -> None:
    trail.lost += max(position - trail.position, 0)
    trail.position = position + len(spans)
    trail.spans += spans


def _events(pid: int, name: str, trail: _Trail, origin: int) -> Iterator[dict[str, Any]]:
    lanes: dict[str, int] = {}
    yield _named("process_name", pid, 0, name)
    for span in trail.spans:
        if span.lane not in lanes:
            lanes[span.lane] = len(lanes) + 1
            yield _named("thread_name", pid, lanes[span.lane], span.lane)
        place = {"step": span.step, "cell": span.cell}
        yield {
            "name": span.name,
            "cat": "tdml",
            "ph": "X",
            "ts": (span.start - trail.offset - origin) / 1000,
            "dur": span.length / 1000,
            "pid": pid,
            "tid": lanes[span.lane],
            "args": {key: value for key, value in place.items() if value >= 0},
        }


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
