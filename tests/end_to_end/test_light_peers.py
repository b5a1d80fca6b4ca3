"""Processes that do no tensor work: none of the libraries for it is in their memory."""

from pathlib import Path

import pytest
from processes_kit import LOCAL, PATIENCE

from tdml_p2p.demo.processes import Child, child

pytestmark = [pytest.mark.slow, pytest.mark.end_to_end]

HEAVY = ("torch", "numpy", "safetensors", "transformers")
IDLE_MEGABYTES = 200


def libraries(running: Child) -> set[str]:
    """Return which of the heavy packages a process has mapped."""
    maps = Path(f"/proc/{running.process.pid}/maps").read_text()
    return {name for name in HEAVY if f"site-packages/{name}" in maps}


def megabytes(running: Child) -> float:
    """Return the resident memory of a process."""
    lines = Path(f"/proc/{running.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


@pytest.mark.parametrize("flags", [("--no-work",), ()])
async def test_a_peer_without_a_task_holds_no_tensor_library(tmp_path: Path, flags: tuple[str, ...]) -> None:
    home = tmp_path / "home"
    async with child("peer", "cli.peer", ["start", "--home", str(home), *LOCAL, *flags], tmp_path / "log") as running:
        await running.expect("ready", PATIENCE)
        watching = ["watch", "--home", str(home), "--from", "1", "-o", "json"]
        async with child("watch", "cli.chain", watching, tmp_path / "watch") as watch:
            async for _ in watch.events():
                break
            assert libraries(watch) == set()
        assert libraries(running) == set()
        assert megabytes(running) < IDLE_MEGABYTES


def test_the_check_sees_a_library_that_is_there() -> None:
    import numpy as np

    assert f"site-packages/{np.__name__}" in Path("/proc/self/maps").read_text()
