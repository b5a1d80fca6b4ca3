"""A small network of real peers in this process, and clients that train on it."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
import trio

from chain.genesis import Genesis, GenesisValidator
from chain.keys import PrivateKey
from chain.randomness import onion_of
from tdml_p2p.bootstrap import private_genesis
from tdml_p2p.config import PeerConfig, TrainConfig
from tdml_p2p.home import Home
from tdml_p2p.peer import Peer, open_peer
from tdml_p2p.swarm.client import SwarmClient
from tdml_p2p.swarm.preparation import prepare

LOCAL = ("/ip4/127.0.0.1/tcp/0",)
PARAMS = {"block_interval_ms": 50, "heartbeat_ms": 150, "formation_blocks": 6, "absence_blocks": 1} | dict.fromkeys(
    ("claim_window", "commit_window", "open_window", "reveal_window"), 100
)
"""Short blocks, and windows that are many of them, so that nobody is late on a busy machine."""
JUDGED = PARAMS | {"block_interval_ms": 100, "heartbeat_ms": 2000, "jail_window": 1000, "jail_missed": 1000}
MODEL = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def write_inputs(folder: Path) -> tuple[Path, Path]:
    """Write a model config and a corpus below `folder`; return both files."""
    model, data = folder / "config.json", folder / "corpus.txt"
    model.write_text(json.dumps(MODEL))
    data.write_text("".join(f"line {number}: {number * number % 97} apples\n" for number in range(400)))
    return model, data


def settings(folder: Path, **changes: Any) -> TrainConfig:
    """Return a run of a few steps of a tiny model, its inputs and output below `folder`."""
    model, data = write_inputs(folder)
    values = {"steps": 6, "batch": 2, "microbatches": 2, "sequence": 8, "stages": 2, "replicas": 1}
    return TrainConfig(**{"model": str(model), "data": (data,), "out": folder / "out", **values, **changes})


@asynccontextmanager
async def swarm(folder: Path, workers: int = 2, judges: int = 0) -> AsyncIterator[tuple[Peer, ...]]:
    """Run a founder that validates and audits, and peers that take seats; blocks come many times a second.

    It validates alone: a busy machine would make several validators miss such short turns, and jail each other.
    Disputes need others to vote on them: `judges` validate beside it, in longer turns, and nobody is jailed.
    """
    torch.set_num_threads(1)
    homes = [Home(folder / name) for name in ("founder", *(f"judge-{index}" for index in range(judges)))]
    for home in homes:
        home.create()
    home = homes[0]
    genesis = private_genesis(home.load_key(), 1_700_000_000_000)
    validators = tuple(_validator(each.load_key(), genesis) for each in homes)
    params = msgspec.structs.replace(genesis.params, **(JUDGED if judges else PARAMS))
    home.save_genesis(msgspec.structs.replace(genesis, params=params, validators=validators))
    async with AsyncExitStack() as stack:
        founder = await stack.enter_async_context(open_peer(_config(home.path, work=False)))
        peers = [founder]
        for judge in homes[1:]:
            await stack.enter_async_context(open_peer(_config(judge.path, founder.invite, work=False)))
        for index in range(workers):
            config = worker(folder, index, founder.invite)
            peers.append(await stack.enter_async_context(open_peer(config)))
        yield tuple(peers)


def _validator(key: PrivateKey, genesis: Genesis) -> GenesisValidator:
    return GenesisValidator(key.account, genesis.validators[0].stake, onion_of(key).tip)


def worker(folder: Path, index: int, invite: str) -> PeerConfig:
    """Return the settings of a peer that takes seats."""
    return _config(folder / f"worker-{index}", invite, validate=False)


def _config(home: Path, *join: str, work: bool = True, validate: bool = True) -> PeerConfig:
    return PeerConfig(home=home, join=join, listen=LOCAL, work=work, validate=validate, status_port=-1)


@dataclass
class Client:
    """One start of `tdml-peer train`; `crash` ends it as kill -9 would, `client.interrupt` as Ctrl-C."""

    train: TrainConfig
    invite: str
    on_event: Callable[["Client", dict[str, Any]], None] = lambda client, event: None
    home: Path | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    client: SwarmClient | None = None

    def report(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        self.on_event(self, event)

    def crash(self) -> None:
        self.scope.cancel()

    def of(self, kind: str, key: str = "step") -> list[Any]:
        """Return one field of every event of a kind."""
        return [event[key] for event in self.events if event["event"] == kind]

    async def run(self, seconds: float = 120.0) -> int | None:
        """Return the exit code, None after a crash."""
        prepared = await trio.to_thread.run_sync(prepare, self.train)
        config = _config(self.home or self.train.out / ".peer", self.invite, work=False, validate=False)
        with self.scope, trio.fail_after(seconds):
            async with open_peer(config) as peer:
                self.client = SwarmClient(peer, prepared, self.train, self.report)
                return await self.client.run()
        return None
