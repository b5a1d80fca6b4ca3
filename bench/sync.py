"""Blocks a second that one real engine catches up with, from four others in this process. Prints one JSON object.

The network is memory and Python's lock is shared with the four servers, so a peer of its own process is faster.
"""

import argparse
import cProfile
import json
import pstats
import shutil
import tempfile
import time
from contextlib import closing
from pathlib import Path

import trio
from msgspec import structs

from chain.blocks import Block, Certificate, Vote, VoteKind, certify, vote_bytes
from chain.engine import ChainEngine, EngineConfig
from chain.engine_blocks import Draft, Tip, assemble
from chain.genesis import Allocation, Genesis, GenesisValidator
from chain.keys import PrivateKey
from chain.params import Params
from chain.randomness import leader, onion_of
from chain.state import genesis_state
from chain.store import Store
from chain.transactions import VERSION, Transaction, Transfer, Unsigned, sign

START_MS = 1_700_000_000_000
SERVERS = 4


def genesis_of(keys: list[PrivateKey], start_ms: int) -> Genesis:
    """Return a network of these validators with equal stakes."""
    return Genesis(
        b"sync",
        start_ms,
        structs.replace(Params(), epoch_blocks=20),
        tuple(Allocation(key.account, 10**9) for key in keys),
        tuple(GenesisValidator(key.account, 10_000, onion_of(key).tip) for key in keys),
    )


def finalized(block: Block, tip: Tip, keys: dict[bytes, PrivateKey]) -> Certificate:
    """Return the certificate of all validators for a block."""
    said = (VoteKind.FINALIZE, tip.chain_id, block.height, 1, block.hash)
    message = vote_bytes(*said)
    validators = tip.state.validators()
    return certify([Vote(*said, account, keys[account].sign(message)) for account in validators.powers], validators)


def transfers(key: PrivateKey, chain_id: bytes, nonce: int, count: int) -> tuple[Transaction, ...]:
    """Return `count` transfers of one account from `nonce` on."""
    bodies = (
        Unsigned(VERSION, chain_id, key.account, nonce + i, 0, 2**31, 0, b"", Transfer(bytes(32), 1))
        for i in range(count)
    )
    return tuple(sign(key, body) for body in bodies)


def write(path: Path, validators: int, blocks: int, load: int, start_ms: int = START_MS) -> Genesis:
    """Write a chain with `load` transfers a block, one block a second; return its genesis."""
    members = [PrivateKey(bytes([i + 1]) * 32) for i in range(validators)]
    genesis, keys = genesis_of(members, start_ms), {key.account: key for key in members}
    tip = Tip(genesis.chain_id, genesis_state(genesis))
    with closing(Store.open(path, genesis)) as store, store.batch():
        for height in range(1, blocks + 1):
            proposer = keys[leader(tip.state.validators(), tip.state.leader_seed, height, 1)]
            validator = tip.state.validator(proposer.account)
            assert validator is not None
            reveal = onion_of(proposer).below(validator.onion_tip)
            draft = Draft(proposer.account, 1, start_ms + height * 1000, reveal)
            block, executed = assemble(tip, draft, transfers(members[0], tip.chain_id, load * (height - 1), load))
            certificate = finalized(block, tip, keys)
            store.commit(block, certificate, tip.state, executed)
            tip = Tip(tip.chain_id, executed.state, block.header, certificate, tip.state.validators())
    return genesis


class Link:
    """A network of engines in this process."""

    def __init__(self, engines: dict[str, ChainEngine]) -> None:
        self._engines = engines

    async def publish(self, topic: str, data: bytes) -> None:
        """Nobody votes here."""

    def peers(self) -> tuple[str, ...]:
        """Return the servers."""
        return tuple(self._engines)

    async def request(self, peer: str, data: bytes) -> bytes:
        """Ask a server."""
        return await self._engines[peer].serve("late", data)

    def penalize(self, peer: str, reason: str) -> None:
        """Every server is honest."""
        raise AssertionError(f"{peer}: {reason}")


async def catch_up(folder: Path, genesis: Genesis, blocks: int) -> float:
    """Return the seconds from the late engine's start to the last block."""
    config = EngineConfig(sync_grace=0.0)
    async with trio.open_nursery() as nursery:
        servers: dict[str, ChainEngine] = {}
        for i in range(SERVERS):
            home = folder / str(i)
            home.mkdir()
            shutil.copy(folder / "chain.db", home / "chain.db")
            servers[str(i)] = ChainEngine(home, genesis, None, Link({}), config)
            await nursery.start(servers[str(i)].run)
        (folder / "late").mkdir()
        late = ChainEngine(folder / "late", genesis, None, Link(servers), config)
        began = time.perf_counter()
        await nursery.start(late.run)
        async with late.subscribe() as committed:
            while late.state.height < blocks:
                await committed.receive()
        took = time.perf_counter() - began
        nursery.cancel_scope.cancel()
    return took


def measure(validators: int, blocks: int, load: int, *, profile: bool = False) -> dict[str, float | int]:
    """Return the rate for one kind of chain."""
    folder = Path(tempfile.mkdtemp(prefix="tdml-bench-"))
    try:
        genesis = write(folder / "chain.db", validators, blocks, load)
        profiler = cProfile.Profile()
        if profile:
            profiler.enable()
        took = trio.run(catch_up, folder, genesis, blocks)
        if profile:
            profiler.disable()
            pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    finally:
        shutil.rmtree(folder)
    return {
        "validators": validators,
        "transfers_per_block": load,
        "blocks": blocks,
        "seconds": round(took, 2),
        "blocks_per_second": round(blocks / took),
    }


def main() -> None:
    """Measure empty and loaded chains of few and many validators."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=2000)
    parser.add_argument("--json", action="store_true", help="print JSON, as is always done")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    kinds = ((4, 0), (4, 10), (20, 0), (20, 10))
    print(json.dumps([measure(n, arguments.blocks, load, profile=arguments.profile) for n, load in kinds], indent=1))


if __name__ == "__main__":
    main()
