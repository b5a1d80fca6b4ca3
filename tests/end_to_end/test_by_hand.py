"""What the README tells people to type: three peers, a client, the chain as it grows, a peer that comes later."""

import signal
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio
from processes_kit import (
    LOCAL,
    PATIENCE,
    assert_nothing_left,
    finished,
    losses,
    model_opens,
    printed,
    training,
    undisturbed,
)

from tdml_p2p.demo.processes import Child, child

pytestmark = [pytest.mark.slow, pytest.mark.trio]


def start(home: Path, invite: str = "") -> Any:
    joining = ["--join", invite] if invite else []
    return child(home.name, "cli.peer", ["start", "--home", str(home), *LOCAL, *joining], home.with_suffix(".log"))


async def ready(running: Child) -> str:
    return str((await running.expect("ready", PATIENCE))["invite"])


async def ended(running: Child, number: signal.Signals) -> int:
    running.process.send_signal(number)
    with trio.fail_after(PATIENCE):
        return int(await running.process.wait())


async def test_three_terminals_a_client_and_a_watcher(tmp_path: Path) -> None:
    train = training(tmp_path, steps=6)
    homes = [tmp_path / name for name in "abcd"]
    events: list[dict[str, Any]] = []
    seen: list[dict[str, Any]] = []
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(start(homes[0]))
        invite = await ready(first)
        peers = [first] + [await stack.enter_async_context(start(home, invite)) for home in homes[1:3]]
        for running in peers[1:]:
            assert await ready(running)
        watching = ["watch", "--home", str(homes[0]), "--from", "1", "-o", "json"]
        watch = await stack.enter_async_context(child("watch", "cli.chain", watching, tmp_path / "watch.log"))
        arguments = [
            "train", *LOCAL, "--model", train.model, "--data", str(train.data[0]), "--out", str(train.out),
            "--steps", "6", "--replicas", "1", "--batch", "2", "--microbatches", "4", "--sequence", "64",
            "--learning-rate", "0.003", "--join", invite,
        ]  # fmt: skip
        client = await stack.enter_async_context(child("client", "cli.peer", arguments, tmp_path / "client.log"))
        peers.append(await stack.enter_async_context(start(homes[3], invite)))
        assert await ready(peers[3])
        with trio.fail_after(2 * PATIENCE):
            assert await finished(client, events) == 0, client.log.read_text()
            async for event in watch.events():
                seen.append(event)
                if event["kind"] == "closed":
                    break
        assert len((await printed("cli.peer", "status", "--home", str(homes[3]), "--json"))["peers"]) >= 3
        assert await ended(watch, signal.SIGINT) in (0, 130)
        signals = (signal.SIGINT, signal.SIGTERM) * 2
        assert [await ended(running, number) for running, number in zip(peers, signals, strict=True)] == [0] * 4
    assert {"posted", "seated", "claimed", "settled"} <= {event["kind"] for event in seen}
    assert losses(events) == pytest.approx(undisturbed(train), rel=1e-4)
    database = ("--db", str(train.out / "chain.db"), "-o", "json")
    assert (await printed("cli.chain", "db", "check", *database))["data"]["ok"] is True
    assert (await printed("cli.chain", "evidence", *database))["data"] == []
    assert (await printed("cli.chain", "status", *database))["data"]["convictions"] == 0
    model_opens(train.out)
    assert_nothing_left([*homes, train.out / ".peer"])
