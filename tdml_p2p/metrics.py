"""The Prometheus metrics of one peer, in a registry of its own."""

from collections import deque
from collections.abc import Callable

import trio
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

STALL_INTERVAL = 0.05
FINALITY_WINDOW = 256
_FINALITY_BUCKETS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
_STALL_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


class Metrics:
    """Gauges, counters and histograms under the prefix `tdml_`, and the figures that `status` repeats."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.peers = Gauge("tdml_peers", "Connected peers of this network.", registry=registry)
        self.height = Gauge("tdml_height", "Height of the latest final block.", registry=registry)
        self.finality = Histogram(
            "tdml_finality_seconds",
            "Seconds from a block's timestamp to its finality here.",
            buckets=_FINALITY_BUCKETS,
            registry=registry,
        )
        self.stall = Histogram(
            "tdml_event_loop_stall_seconds",
            "Seconds by which a timer of the event loop was late.",
            buckets=_STALL_BUCKETS,
            registry=registry,
        )
        self.gossip_drops = Counter(
            "tdml_gossip_dropped", "Gossip messages dropped because a queue was full.", registry=registry
        )
        self.refused = Counter("tdml_refused_messages", "Messages refused, by reason.", ["reason"], registry=registry)
        self.tensor_bytes = Counter(
            "tdml_tensor_bytes", "Tensor bytes over the network.", ["direction"], registry=registry
        )
        self.audits = Counter("tdml_audits", "Audits by their event on chain.", ["event"], registry=registry)
        self.balance = Gauge("tdml_balance", "Base units on this peer's account.", registry=registry)
        self.bonded = Gauge("tdml_bonded", "Base units of this peer's bonded stake.", registry=registry)
        self.seats = Gauge("tdml_seats", "Seats that this peer holds in tasks.", registry=registry)
        self.warnings = Gauge("tdml_warnings", "Warnings that this peer shows now.", registry=registry)
        self.reachable = Gauge(
            "tdml_reachable", "1 reachable from outside, 0 not, -1 not known yet.", registry=registry
        )
        self._finalities: deque[float] = deque(maxlen=FINALITY_WINDOW)
        self._counts: dict[str, int] = {}

    def observe_finality(self, seconds: float) -> None:
        """Record that a block became final `seconds` after its timestamp."""
        self.finality.observe(max(seconds, 0.0))
        self._finalities.append(max(seconds, 0.0))

    def finality_quantile(self, quantile: float) -> float | None:
        """Return a quantile in [0, 1] of the latest finality times in seconds, None before the first."""
        ordered = sorted(self._finalities)
        if not ordered:
            return None
        return ordered[min(int(quantile * len(ordered)), len(ordered) - 1)]

    def advance(self, counter: Counter, name: str, total: int) -> None:
        """Bring `counter` up to the running `total` that another part of the peer keeps as `name`."""
        before = self._counts.get(name, 0)
        if total > before:
            counter.inc(total - before)
            self._counts[name] = total

    def render(self) -> bytes:
        """Return the Prometheus text of every metric."""
        return generate_latest(self.registry)

    async def watch_stalls(self, report: Callable[[float], None] | None = None) -> None:
        """Observe for ever how late the event loop's timers are."""
        while True:
            due = trio.current_time() + STALL_INTERVAL
            await trio.sleep_until(due)
            late = trio.current_time() - due
            self.stall.observe(late)
            if report is not None:
                report(late)
