"""When the next block is due and when a view has lasted too long; times are seconds of one clock."""

from dataclasses import dataclass, field


@dataclass
class Pace:
    """One block per `interval` while anything is pending, one per `heartbeat` otherwise.

    The view timer of the first view runs from the moment the block is due, so it never fires while
    the leader rightly waits.
    """

    interval: float
    heartbeat: float
    standstill: float
    last: float = float("-inf")
    """When the block of the height before was proposed."""
    due: float = 0.0
    progress: float = 0.0
    """When height or view last changed, or the standstill was last answered."""
    _proposed: float | None = None
    _timer: tuple[int, float, float] | None = field(default=None)

    def begin(self, now: float, pending: bool) -> None:
        """A new height begins."""
        if self._proposed is not None:
            self.last = self._proposed
        self._proposed = None
        self._timer = None
        self.due = max(now, self.last + (self.interval if pending else self.heartbeat))
        self.progress = now

    def hurry(self, now: float) -> bool:
        """Something is pending now; whether the block became due earlier by that."""
        earlier = min(self.due, max(now, self.last + self.interval))
        changed, self.due = earlier < self.due, earlier
        return changed

    def proposed(self, now: float) -> None:
        """A proposal of this height was seen."""
        if self._proposed is None:
            self._proposed = now
            self.due = min(self.due, now)

    def enter(self, view: int, seconds: float, now: float) -> None:
        """A view begins that may last `seconds`."""
        self._timer = (view, seconds, now)
        self.progress = now

    def expired(self, now: float) -> int | None:
        """Return the view whose time is over, once."""
        deadline = self.view_deadline
        if self._timer is None or deadline > now:
            return None
        view, self._timer = self._timer[0], None
        return view

    @property
    def view_deadline(self) -> float:
        """When the current view's time is over."""
        if self._timer is None:
            return float("inf")
        view, seconds, entered = self._timer
        return (max(self.due, entered) if view == 1 else entered) + seconds

    @property
    def standstill_deadline(self) -> float:
        """When to resend for want of progress."""
        return max(self.progress, self.due) + self.standstill

    def is_still(self, now: float) -> bool:
        """Whether to resend now; starts the next period when so."""
        if now < self.standstill_deadline:
            return False
        self.progress = now
        return True
