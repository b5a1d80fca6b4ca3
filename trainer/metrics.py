"""`metrics.jsonl`: one complete line a step, each step once, whatever was killed, rolled back or resumed."""

import errno
import os
from pathlib import Path
from typing import Any

import msgspec

from trainer.errors import CheckpointError, CheckpointReason


class MetricsLog:
    """The file at `path`; a line for a step replaces what is there of that step and later ones."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last: int | None = None

    def append(self, step: int, line: dict[str, Any]) -> None:
        """Add the line of a step; raise `CheckpointError`, leaving the lines before it whole."""
        try:
            self._append(step, msgspec.json.encode({"step": step, **line}) + b"\n")
        except OSError as error:
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise CheckpointError(
                CheckpointReason.DISK,
                f"The disk of {self._path} is full." if is_full else f"{self._path} cannot be written: {error}.",
                "Free some space; the training goes on without this line.",
            ) from None

    def _append(self, step: int, data: bytes) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if self._last is None or step <= self._last:
                os.ftruncate(descriptor, _end_before(self._path, step))
            self._last = None  # unknown until the line is whole
            start = os.lseek(descriptor, 0, os.SEEK_END)
            try:
                if os.write(descriptor, data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                os.ftruncate(descriptor, start)
                raise
            self._last = step
        finally:
            os.close(descriptor)


def _end_before(path: Path, step: int) -> int:
    """Return where the lines of the steps before `step` end; a torn or foreign line ends them, too."""
    end, last = 0, 0
    with path.open("rb") as lines:
        for line in lines:
            try:
                found = int(msgspec.json.decode(line)["step"])
            except (msgspec.DecodeError, KeyError, TypeError, ValueError):
                break
            if not line.endswith(b"\n") or not last < found < step:
                break
            end, last = end + len(line), found
    return end
