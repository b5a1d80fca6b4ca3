"""What engines gossip when all goes well."""

from contextlib import AsyncExitStack
from pathlib import Path

import trio

from tests.chain.hub import Hub, genesis_of, keys, running, until_height

HEIGHT = 6


async def test_a_block_is_gossiped_once(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    members, hub, sent = keys(4), Hub(), []

    def count(topic: str, receiver: str, data: bytes) -> bytes:
        if topic == "block":
            sent.append((receiver, data))
        return data

    genesis = genesis_of(members, [])
    async with AsyncExitStack() as stack:
        for index, key in enumerate(members):
            await stack.enter_async_context(running(hub, tmp_path / str(index), genesis, key))
        hub.twists = dict.fromkeys(hub.engines, count)
        await until_height(next(iter(hub.engines.values())), HEIGHT)
    assert len(sent) == len(set(sent))
    assert HEIGHT - 1 <= len(sent) // 3 <= HEIGHT + 1
