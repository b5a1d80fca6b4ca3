"""What goes wrong in torch's work: errors that end a piece of work and not the peer, and what they are called."""

from trainer.payloads import Reason

COMPUTE_ERRORS = (RuntimeError, ValueError, IndexError, MemoryError)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error tells of lack of memory, which torch names in words only."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error)


def fault_of(error: Exception) -> Reason:
    """Return what to tell the client of a computation that failed."""
    return Reason.MEMORY_FULL if lacks_memory(error) else Reason.COMPUTE_FAILED
