"""Engines with real databases on an in-memory network and a virtual clock."""

from contextlib import AsyncExitStack
from pathlib import Path

import trio

from chain.engine import ChainEngine
from chain.genesis import Genesis
from chain.keys import PrivateKey
from chain.transactions import Transfer
from tests.chain.hub import Hub, genesis_of, keys, running, until_height


async def start_all(
    stack: AsyncExitStack, hub: Hub, folder: Path, genesis: Genesis, members: list[PrivateKey]
) -> list[ChainEngine]:
    return [
        await stack.enter_async_context(running(hub, folder / str(i), genesis, key))
        for i, key in enumerate(members)
    ]


async def test_four_validators_finalize_transfers(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    members, hub = keys(4), Hub()
    genesis = genesis_of(members, [])
    async with AsyncExitStack() as stack:
        engines = await start_all(stack, hub, tmp_path, genesis, members)
        to = members[1].account
        names = [await engines[0].submit(Transfer(to, 10)) for _ in range(5)]
        names.append(await engines[2].submit(Transfer(to, 1)))
        with trio.fail_after(20):
            receipts = [await engines[0].receipt(name) for name in names[:5]]
            receipts.append(await engines[2].receipt(names[5]))
            assert all(receipt.ok for receipt in receipts)
            height = engines[0].state.height
            for engine in engines:
                await until_height(engine, height)
        assert len({engine.state.root for engine in engines}) == 1
        assert engines[3].state.account(to).balance == 1_000_051
        assert hub.refused == []
        assert hub.penalized == []
