"""Who runs which cell, and in which order: pure rules.

`apportion` and `plan_routes` spread the micro-batches of a step over replicas by speed; `in_flight_limit`
is the 1F1B bound on a stage's memory (Narayanan et al., PipeDream-Flush, 2021): S − i graphs, and one more
so that the next stage already has its next input when it finishes a cell, however long the way is.
"""

from collections.abc import Mapping, Sequence


def in_flight_limit(stage: int, stages: int) -> int:
    """Return how many forward halves stage `stage` of `stages` may hold before a backward half is due."""
    return stages - stage + 1 if stage < stages - 1 else 1


def apportion(count: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Share `count` cells by weight with the largest-remainder method; ties go to the smaller name.

    Raises ValueError without a peer or with a weight that is not positive.
    """
    if not weights or min(weights.values()) <= 0:
        raise ValueError("apportionment needs peers with positive weights")
    total = sum(weights.values())
    exact = {peer: count * weight / total for peer, weight in weights.items()}
    shares = {peer: int(quota) for peer, quota in exact.items()}
    by_remainder = sorted(exact, key=lambda peer: (shares[peer] - exact[peer], peer))
    for peer in by_remainder[: count - sum(shares.values())]:
        shares[peer] += 1
    return shares


def interleave(shares: Mapping[str, int]) -> tuple[str, ...]:
    """Return the peers in an order that spreads each one's share evenly (smooth weighted round robin)."""
    total = sum(shares.values())
    credit = dict.fromkeys(sorted(shares), 0)
    order = []
    for _ in range(total):
        for peer in credit:
            credit[peer] += shares[peer]
        chosen = max(credit, key=lambda peer: credit[peer])
        credit[chosen] -= total
        order.append(chosen)
    return tuple(order)


def plan_routes(cells: int, stages: Sequence[Mapping[str, float]]) -> tuple[tuple[str, ...], ...]:
    """Return for every cell its peers of stage 0 … S−1, given each stage's weights (cells per second)."""
    columns = [interleave(apportion(cells, weights)) for weights in stages]
    return tuple(zip(*columns, strict=True))


def substitute(load: Mapping[str, int], weights: Mapping[str, float], excluded: Sequence[str]) -> str | None:
    """Return the replica that would finish one more cell first, or None if all are excluded."""
    free = [peer for peer in weights if peer not in excluded]
    return min(free, key=lambda peer: ((load.get(peer, 0) + 1) / weights[peer], peer), default=None)
