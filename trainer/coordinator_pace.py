"""How fast the workers are, how much of what they do is verified, and who has been silent for too long."""

from collections import Counter
from collections.abc import Iterable, Mapping

from trainer.coordinator_ports import Patience, Settled

_SMOOTHING = 0.3
_FORGIVENESS = 0.1
_SHORTEST = 1e-6
_MOST_STRETCH = 8.0
"""How many times longer than usual a step waits for its workers when they stalled one after the other."""


_PRIOR = 8
"""Cells, half of them verified, that everybody is taken to have done before."""
_LEAST = 0.05
"""Share that is left to whom nothing settles of, so that it can do better."""


class Verified:
    """Which share of the cells that the client counted has settled on chain; an unsettled step counts nowhere yet."""

    def __init__(self) -> None:
        self._pending: dict[int, Mapping[str, int]] = {}
        self._done: Counter[str] = Counter()
        self._settled: Mapping[str, int] = {}

    def note(self, step: int, cells: Mapping[str, int]) -> None:
        """Take what each worker has done of a committed step, in place of what a rollback has voided of it."""
        self._pending[step] = cells

    def update(self, settled: Settled) -> None:
        """Take what has settled."""
        for step in sorted(step for step in self._pending if step <= settled.step):
            self._done.update(self._pending.pop(step))
        self._settled = settled.cells

    def share(self, peer: str) -> float:
        """Return a number from `_LEAST` to 1: near 1 for who does what it is paid for, a half for who is new.

        Of whom the chain knows nothing, such as the client's own ends, all counts.
        """
        if peer not in self._settled:
            return 1.0
        share = (self._settled[peer] + _PRIOR / 2) / (self._done[peer] + _PRIOR)
        return min(1.0, max(_LEAST, share))


class Pace:
    """Smoothed seconds a cell of every worker, and since when each one is waited for.

    Only the client's own clock counts: a worker's time is that during which it had all it needed.
    """

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._seconds: dict[str, float] = {}
        self._since: dict[str, float] = {}
        self._busy: dict[str, float] = {}
        self._stretch = 1.0
        self.verified = Verified()

    def finished(self, peer: str) -> float:
        """Count the time since the last finished cell as that of one more, and return it; call after `heard`."""
        seconds = max(self._busy.pop(peer, 0.0), _SHORTEST)
        known = self._seconds.get(peer, seconds)
        self._seconds[peer] = known + _SMOOTHING * (seconds - known)
        return seconds

    def penalise(self, peer: str, now: float) -> None:
        """Count the time that `peer` let the step wait as a cell's time, and wait longer for the next."""
        self._seconds[peer] = max(self._seconds.get(peer, 0.0), now - self._since.get(peer, now), _SHORTEST)
        self.postpone(peer, now)

    def postpone(self, peer: str, now: float) -> None:
        """Start the clock of a worker that is waited for on again, with a longer deadline."""
        self._busy[peer] = self._busy.get(peer, 0.0) + now - self._since.pop(peer, now)
        self._stretch = min(2 * self._stretch, _MOST_STRETCH)

    def weights(self, replicas: Iterable[str]) -> dict[str, float]:
        """Return verified cells per second of a stage's replicas: what the next cells are shared out by."""
        return {peer: speed * self.verified.share(peer) for peer, speed in self.speeds(replicas).items()}

    def speeds(self, replicas: Iterable[str]) -> dict[str, float]:
        """Return cells per second of a stage's replicas; an unknown one counts as usual."""
        peers = tuple(replicas)
        usual = self._usual(peers) or 1.0
        return {peer: 1.0 / self._seconds.get(peer, usual) for peer in peers}

    def forgive(self, idle: Iterable[str], replicas: Iterable[str]) -> None:
        """Bring the estimates of workers without a cell nearer to the usual, so that they are tried again."""
        usual = self._usual(tuple(replicas))
        for peer in idle:
            if usual and peer in self._seconds:
                self._seconds[peer] *= (usual / self._seconds[peer]) ** _FORGIVENESS

    def start(self) -> None:
        """Begin a step: nobody is waited for yet."""
        self._since.clear()
        self._busy.clear()
        self._stretch = 1.0

    def watch(self, waited_for: frozenset[str], now: float) -> None:
        """Start the clock of those who are waited for from now on, and stop that of the others."""
        self._since = {peer: self._since.get(peer, now) for peer in waited_for}

    def heard(self, peer: str, now: float) -> None:
        """Start the clock of `peer` again: it made progress."""
        if peer in self._since:
            self._busy[peer] = self._busy.get(peer, 0.0) + now - self._since[peer]
            self._since[peer] = now

    def is_overdue(self, peer: str, replicas: Iterable[str], now: float) -> bool:
        """Whether `peer` has been waited for beyond its deadline."""
        since = self._since.get(peer)
        return since is not None and now - since > self.deadline(replicas)

    def deadline(self, replicas: Iterable[str]) -> float:
        """Return how many seconds a replica may go without progress."""
        usual = self._usual(tuple(replicas))
        if usual is None:
            return self._patience.first * self._stretch
        return max(self._patience.floor, self._patience.factor * usual) * self._stretch

    def _usual(self, peers: tuple[str, ...]) -> float | None:
        # the lower median: half of the replicas being slow does not make slowness usual
        known = sorted(self._seconds[peer] for peer in peers if peer in self._seconds)
        return known[(len(known) - 1) // 2] if known else None
