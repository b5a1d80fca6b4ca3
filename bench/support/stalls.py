"""How late the event loops of running peers were, from the histogram that each of them keeps."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import trio
from prometheus_client.parser import text_string_to_metric_families

NAME = "tdml_event_loop_stall_seconds"
TARGET_SECONDS = 0.05
Counts = dict[float, float]


async def stalls_of(homes: Iterable[Path]) -> Counts:
    """Return how many of all peers' timers have been late by at most so many seconds, by bound."""
    total: Counts = {}
    for home in homes:
        for bound, count in _counts(await _metrics(home)).items():
            total[bound] = total.get(bound, 0) + count
    return total


def figures(before: Counts, after: Counts) -> dict[str, Any]:
    """Return the bound in seconds below which 99 % of timers were late in between, and the share later than 50 ms."""
    found = {bound: count - before.get(bound, 0) for bound, count in sorted(after.items())}
    total = max(found.values(), default=0)
    if not total:
        return {}
    p99 = next(bound for bound, count in found.items() if count >= 0.99 * total)
    return {"p99_at_most": p99, "share_above_50_ms": round(1 - found[TARGET_SECONDS] / total, 4), "timers": int(total)}


async def _metrics(home: Path) -> str:
    stream = await trio.open_unix_socket(home / "control.sock")
    async with stream:
        await stream.send_all(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        answer = b"".join([part async for part in stream])
    return answer.partition(b"\r\n\r\n")[2].decode()


def _counts(text: str) -> Counts:
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {float(one.labels["le"]): one.value for one in samples if one.name == f"{NAME}_bucket"}
