"""The task of a run, noted in its out folder: a killed run's task is found again, also before a checkpoint is saved."""

import os
from pathlib import Path

import msgspec

NAME = ".task"


class Journal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A task that is about to be posted (`task` is empty then) or was: manifest and task in hexadecimal.

    `height` is that of the newest block before the task was posted.
    """

    manifest: str
    height: int
    task: str = ""


def write_journal(out: Path, journal: Journal) -> None:
    """Replace the note in a folder, durably; raise OSError."""
    pending = out / f"{NAME}.pending"
    with pending.open("wb") as file:
        file.write(msgspec.json.encode(journal))
        file.flush()
        os.fsync(file.fileno())
    os.replace(pending, out / NAME)


def read_journal(out: Path) -> Journal | None:
    """Return the note in a folder, none if there is none that can be read."""
    try:
        journal = msgspec.json.decode((out / NAME).read_bytes(), type=Journal)
        bytes.fromhex(journal.task)
    except (OSError, ValueError):
        return None
    return journal
