"""`tdml-chain --node`: a remote peer on a real socket, honest and lying."""

import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio
from chain_kit import ALICE, STRANGER
from control_kit import Run

from chain.keys import PrivateKey, peer_id
from chain.light import Trust
from chain.queries import answer, open_reader
from tdml_p2p.bootstrap import serve_genesis
from tdml_p2p.control import ApiError
from tdml_p2p.errors import UserError
from tdml_p2p.host import Network, NetworkConfig
from tdml_p2p.peer import _answer
from tdml_p2p.remote import reach, serve_queries
from tests.chain.ledger_kit import Ledger

NAME = peer_id(ALICE.account)
Twist = Callable[[str, Any], Any]


def newest(path: Path) -> str:
    """Return HEIGHT:HASH of the newest block."""
    with closing(open_reader(path).store) as store:
        tip = store.tip()
    assert tip is not None
    return str(Trust(tip[0].height, tip[0].hash))


@asynccontextmanager
async def node(path: Path, twist: Twist = lambda _, data: data) -> AsyncIterator[str]:
    """Run a peer that answers strangers from a database, and yield its address."""
    reader = open_reader(path)

    async def answered(query: str, arguments: Mapping[str, str]) -> Any:
        await trio.lowlevel.checkpoint()
        return twist(query, _answer(path, reader, query, dict(arguments)))

    key = PrivateKey(bytes([7]) * 32)
    async with Network.open(NetworkConfig(round_seconds=60), key, reader.store.genesis.chain_id) as network:
        serve_genesis(network, reader.store.genesis)
        serve_queries(network, answered)
        yield network.addresses[0]
    reader.store.close()


@pytest.fixture(autouse=True)
def _logs() -> Iterator[None]:
    """Give back the logging that the command sets up for its process."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.fixture
def ask(run: Run, chain_db: Path) -> Any:
    """Return a function that runs a command line against a node and returns what came of it."""
    trust = newest(chain_db)

    def of_line(*words: str, twist: Twist = lambda _, data: data, place: str = "", trusted: str = trust) -> Any:
        async def main() -> Any:
            async with node(chain_db, twist) as address:
                where = ("--node", address + place, "--trust", trusted)
                return await trio.to_thread.run_sync(partial(run, "tdml-chain", *words, *where))

        return trio.run(main)

    return of_line


def test_what_is_not_proven_is_the_peers_word(ask: Any, ledger: Ledger) -> None:
    told = json.loads(ask("status", "-o", "json").out)
    assert told["data"]["height"] == ledger.state.height
    assert told["warnings"][0].startswith("This is the word of one peer")


@pytest.mark.parametrize("line", ["blocks", "block", "block 2", "votes 2"])
def test_blocks_of_a_remote_peer(ask: Any, line: str) -> None:
    ran = ask(*line.split())
    assert (ran.code, ran.err) == (0, "")


def test_an_account_is_verified(ask: Any, ledger: Ledger) -> None:
    told = json.loads(ask("account", NAME, "-o", "json").out)["data"]
    assert told["verified"] is True
    assert told["balance"] == str(ledger.state.account(ALICE.account).balance)
    absent = ask("account", STRANGER)
    assert (absent.code, "proven at height" in absent.err) == (1, True)


def test_a_remote_proof_is_a_file_that_verifies(run: Run, ask: Any, tmp_path: Path, chain_db: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(ask("proof", "account", NAME).out)
    assert run("tdml-chain", "verify", path, "--trust", newest(chain_db)).code == 0


def test_a_whole_invite_is_trust_from_the_genesis_on(ask: Any, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    invite = "@" + ledger.genesis.chain_id.hex()
    old = ask("account", NAME, place=invite, trusted="")
    assert (old.code, "trust-expired" in old.err) == (1, True)
    monkeypatch.setattr(time, "time_ns", lambda: (ledger.state.chain.timestamp + 1000) * 1_000_000)
    fresh = ask("account", NAME, place=invite, trusted="")
    assert (fresh.code, fresh.err) == (0, "")
    other = ask("account", NAME, place="@" + "ab" * 32, trusted="")
    assert (other.code, "not of the network" in other.err) == (1, True)


def lie(query: str, data: Any) -> Any:
    return data | {"record": {"balance": "1000000000"}} if query == "proof" else data


@pytest.mark.parametrize(
    "twist",
    [
        lie,
        lambda _, data: data | {"proof": data["proof"][:-2] + "00"},
        lambda _, data: data | {"proof": data["proof"] + "00"},
        lambda _, data: [],
        lambda _, data: None,
        lambda _, data: {"note": "\x1b[2J"},
    ],
)
def test_a_lying_peer_is_not_believed(ask: Any, twist: Twist) -> None:
    ran = ask("account", NAME, twist=twist)
    assert ran.code == 1
    assert ran.err.startswith("error: ")
    assert ran.out == ""


def test_a_proof_of_something_else_is_not_believed(ask: Any, chain_db: Path) -> None:
    other = answer(open_reader(chain_db), "proof", {"kind": "account", "id": STRANGER})
    ran = ask("account", NAME, twist=lambda _, data: other)
    assert (ran.code, "of something else" in ran.err) == (1, True)


def test_an_answer_that_makes_no_sense(ask: Any) -> None:
    for data in ([], {"transactions": 5}, "x"):
        ran = ask("block", twist=lambda _, __, data=data: data)
        assert (ran.code, ran.err.startswith("error: ")) == (1, True)


@pytest.mark.parametrize(
    ("words", "place", "trusted", "code", "said"),
    [
        (("mempool",), "", "", 2, "not asked this"),
        (("db", "check"), "", "", 2, "not asked this"),
        (("account", NAME, "--height", "2"), "", "", 2, "not asked this"),
        (("account", NAME), "", "", 2, "word is not enough"),
        (("account", "nobody"), "", "5:" + "00" * 32, 2, "nobody"),
        (("account", NAME), "", "2:" + "00" * 32, 1, "wrong-block"),
        (("block", "1000000"), "", "", 1, "no block"),
        (("watch",), "", "", 2, "cannot be followed"),
    ],
)
def test_what_a_remote_peer_is_not_asked(
    ask: Any, words: tuple[str, ...], place: str, trusted: str, code: int, said: str
) -> None:
    ran = ask(*words, place=place, trusted=trusted)
    assert ran.code == code
    assert said in ran.err


def test_nobody_there(run: Run) -> None:
    gone = run("tdml-chain", "status", "--node", f"/ip4/127.0.0.1/tcp/1/p2p/{NAME}")
    assert (gone.code, "cannot be reached" in gone.err) == (3, True)
    assert run("tdml-chain", "status", "--node", "nonsense").code == 2


@pytest.mark.trio
async def test_strangers_may_ask_only_what_is_cheap(chain_db: Path) -> None:
    async with node(chain_db) as address, reach(address) as remote:
        for query, arguments in (
            ("db-check", {}),
            ("mempool", {}),
            ("status", {"height": "1"}),
            ("blocks", {"count": "1000"}),
            ("proof", {"kind": "x" * 300}),
        ):
            with pytest.raises(UserError):
                await remote.ask(query, arguments)
        assert len(await remote.ask("blocks", {"count": "3"})) == 3


@pytest.mark.trio
async def test_what_the_owner_is_told_strangers_are_told(chain_db: Path) -> None:
    def refuse(_: str, __: Any) -> Any:
        raise ApiError(400, "That is senseless.", "ask otherwise")

    async with node(chain_db, refuse) as address, reach(address) as remote:
        with pytest.raises(UserError) as refused:
            await remote.ask("status", {})
    assert (refused.value.message, refused.value.hint, refused.value.exit_code) == (
        "That is senseless.",
        "ask otherwise",
        2,
    )
