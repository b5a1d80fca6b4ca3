"""Whole peers on 127.0.0.1: start and stop, one home one daemon, a private network of three, bad homes."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio

from chain.engine_seam import ChainBroken, Distrusted
from chain.keys import PrivateKey
from tdml_p2p.bootstrap import FAUCET_GRANT, find_origin, private_genesis
from tdml_p2p.config import PeerConfig
from tdml_p2p.errors import USAGE, UserError
from tdml_p2p.home import Home
from tdml_p2p.peer import Peer, open_peer
from tdml_p2p.plain_errors import explain, plain_errors
from tdml_p2p.wallet import BOND_FRACTION

LOCAL = ("/ip4/127.0.0.1/tcp/0",)
PATIENCE = 60.0
START = """
import json, sys, trio
from pathlib import Path
from tdml_p2p.config import PeerConfig
from tdml_p2p.errors import USAGE, UserError
from tdml_p2p.peer import run_start
config = PeerConfig(home=Path(sys.argv[1]), join=tuple(sys.argv[2:]), listen=("/ip4/127.0.0.1/tcp/0",), work=False)
try:
    sys.exit(trio.run(run_start, config, lambda event: print(json.dumps(event), flush=True)))
except UserError as error:
    print(json.dumps([error.message, error.hint]), flush=True)
    sys.exit(error.exit_code)
"""


def quick_home(path: Path) -> Home:
    """Return the home of a founder whose network makes blocks many times a second."""
    home = Home(path)
    home.create()
    genesis = private_genesis(home.load_key(), 1_700_000_000_000)
    params = msgspec.structs.replace(genesis.params, block_interval_ms=50, heartbeat_ms=150)
    home.save_genesis(msgspec.structs.replace(genesis, params=params))
    return home


@asynccontextmanager
async def client(home: Home) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.AsyncHTTPTransport(uds=str(home.socket_path))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=PATIENCE) as http:
        yield http


async def until(condition: Callable[[], bool], peer: Peer) -> None:
    """Wait, block by block, until `condition` holds."""
    with trio.fail_after(PATIENCE):
        while not condition():
            await peer.next_block()


def config(path: Path, *join: str) -> PeerConfig:
    return PeerConfig(home=path, join=join, listen=LOCAL, work=False, status_port=0)


@pytest.mark.trio
@pytest.mark.slow
async def test_one_peer_answers_on_both_ports_and_leaves_nothing(tmp_path: Path) -> None:
    home = quick_home(tmp_path / "a")
    events: list[dict[str, Any]] = []
    async with open_peer(config(home.path), report=events.append) as peer, client(home) as http:
        await until(lambda: peer.engine.state.height >= 2, peer)
        status = (await http.get("/status.json")).json()
        ready = {key: status[key] for key in ("peer", "invite", "status_url")}
        assert events == [{"event": "ready", **ready, "height": events[0]["height"]}]
        assert status["height"] >= 2
        assert status["is_validator"]
        assert "one-owner" in [warn["code"] for warn in status["warnings"]]
        assert status["reachability"]["verdict"] == "local"
        assert (status["recent_audits"], status["evictions"]) == ([], [])
        async with httpx.AsyncClient() as tcp:
            page = (await tcp.get(f"{status['status_url']}page.json")).json()
            metrics = (await tcp.get(f"{status['status_url']}metrics")).text
        assert page["blocks"][0]["height"] >= 2
        assert "tdml_finality_seconds_count" in metrics
        assert "tdml_refused_messages_total" in metrics
        assert (await http.get("/tasks.json")).json() == []
        block = (await http.get("/chain/block", params={"id": "1"})).json()
        watched = (await http.get("/chain/watch", params={"from": "1", "count": "1"})).text
        assert json.loads(watched)["data"]["hash"] == block["hash"]
        for query, code in (("/chain/block?id=99999999", 404), ("/chain/tx?id=zz", 400), ("/chain/x", 400)):
            refusal = await http.get(query)
            assert (refusal.status_code, refusal.json().keys()) == (code, {"error", "hint"})
    assert not home.lock_path.exists()
    assert not home.socket_path.exists()


@pytest.mark.trio
@pytest.mark.slow
async def test_three_peers_share_a_chain_validate_and_pay(tmp_path: Path) -> None:
    homes = [quick_home(tmp_path / "a"), Home(tmp_path / "b"), Home(tmp_path / "c")]
    async with AsyncExitStack() as stack:
        founder = await stack.enter_async_context(open_peer(config(homes[0].path)))
        joiners = [await stack.enter_async_context(open_peer(config(home.path, founder.invite))) for home in homes[1:]]
        peers = [founder, *joiners]
        bond = FAUCET_GRANT // BOND_FRACTION
        for peer in peers:
            await until(lambda peer=peer: len(peer.engine.state.validators()) == 3, peer)  # type: ignore[misc]
        for peer in joiners:
            account = peer.engine.state.account(peer.key.account)
            assert (account.balance, account.bonded) == (FAUCET_GRANT - bond, bond)
        async with client(homes[0]) as http:
            body = {"kind": "transfer", "to": joiners[0].name, "amount": "5"}
            sent = (await http.post("/transactions", json=body)).json()
            too_much = await http.post("/transactions", json={"kind": "unbond", "amount": "999999999999"})
        assert too_much.status_code == 409
        assert "no-stake" in too_much.json()["error"]
        for peer in peers:
            await until(lambda peer=peer: peer.engine.state.height >= sent["height"], peer)  # type: ignore[misc]
            receiver = peer.engine.state.account(joiners[0].key.account)
            assert receiver.balance == FAUCET_GRANT - bond + 5
        assert {peer.genesis.chain_id for peer in peers} == {founder.genesis.chain_id}
        assert len(founder.status()["peers"]) == 2


@pytest.mark.end_to_end
@pytest.mark.slow
def test_a_daemon_starts_refuses_a_second_one_and_stops_on_sigterm(tmp_path: Path) -> None:
    home = Home(tmp_path / "peer")
    with start(home.path) as daemon:
        assert daemon.stdout is not None
        ready = json.loads(daemon.stdout.readline())
        assert ready.keys() == {"event", "peer", "invite", "status_url", "height"}
        with start(home.path) as second:
            said, _ = second.communicate(timeout=PATIENCE)
        assert second.returncode == 1
        assert f"process id {daemon.pid}" in json.loads(said)[0]
        status = httpx.Client(transport=httpx.HTTPTransport(uds=str(home.socket_path))).get("http://x/status.json")
        assert status.json()["invite"] == ready["invite"]
        daemon.send_signal(signal.SIGTERM)
        rest, _ = daemon.communicate(timeout=PATIENCE)
    assert (daemon.returncode, rest) == (0, b"")
    assert {path.name for path in home.path.iterdir()} == {
        "key",
        "genesis.json",
        "chain.db",
        "signing.db",
        "peers.json",
    }


def start(*arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", START, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[2])


@pytest.mark.trio
@pytest.mark.slow
async def test_a_corrupted_chain_db_is_refused_and_kept(tmp_path: Path) -> None:
    home = quick_home(tmp_path / "a")
    home.chain_path.write_bytes(b"not a database" * 100)
    before = home.chain_path.read_bytes()
    with pytest.raises(UserError, match="chain database cannot be used") as caught:
        async with open_peer(config(home.path)):
            raise AssertionError("it started")
    assert "signing.db" in caught.value.hint
    assert home.chain_path.read_bytes() == before
    assert not home.lock_path.exists()
    assert not home.socket_path.exists()


@pytest.mark.trio
async def test_a_home_in_use_is_refused_before_anything_else(tmp_path: Path) -> None:
    home = quick_home(tmp_path / "a")
    with home.lock(), pytest.raises(UserError, match=f"process id {os.getpid()}"):
        async with open_peer(config(home.path)):
            raise AssertionError("it started")


@pytest.mark.trio
async def test_an_invite_of_another_network_is_refused(tmp_path: Path) -> None:
    home, other = quick_home(tmp_path / "a"), quick_home(tmp_path / "b")
    chain_id = find_origin(other, PrivateKey(bytes(32)), (), 0).chain_id
    invite = f"/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN@{chain_id.hex()}"
    with pytest.raises(UserError, match="belongs to network"):
        async with open_peer(config(home.path, invite)):
            raise AssertionError("it started")


@pytest.mark.trio
@pytest.mark.slow
async def test_a_listening_port_in_use_is_one_sentence(tmp_path: Path) -> None:
    home = quick_home(tmp_path / "a")
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    port = listener.socket.getsockname()[1]
    taken = replace(config(home.path), listen=(f"/ip4/127.0.0.1/tcp/{port}",))
    async with listener:
        with pytest.raises(UserError, match="Cannot listen") as caught:
            async with open_peer(taken):
                raise AssertionError("it started")
    assert "--listen" in caught.value.hint


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "The disk is full."),
        (OSError(98, "Address already in use"), "An address to listen on is in use by another program."),
        (sqlite3.OperationalError("database or disk is full"), "The disk is full."),
        (
            sqlite3.DatabaseError("database disk image is malformed"),
            "The chain database cannot be used: database disk image is malformed.",
        ),
        (PermissionError(13, "Permission denied", "/x"), "The file /x cannot be used: Permission denied."),
        (Distrusted("Block 3 is another"), "This chain is not the one that --trust names: Block 3 is another."),
        (ChainBroken("block 3 is odd"), "This peer cannot follow the chain: block 3 is odd."),
    ],
)
def test_system_errors_are_said_plainly_even_out_of_a_group(error: Exception, said: str) -> None:
    with pytest.raises(UserError) as caught, plain_errors():
        raise ExceptionGroup("all", [RuntimeError("noise"), ExceptionGroup("inner", [error])])
    assert caught.value.message == said
    assert caught.value.hint


def test_a_fault_of_the_program_is_not_dressed_up() -> None:
    assert explain(RuntimeError("bug")) is None
    with pytest.raises(RuntimeError), plain_errors():
        raise RuntimeError("bug")
    with pytest.raises(RuntimeError), plain_errors():
        raise ExceptionGroup("all", [ExceptionGroup("inner", [RuntimeError("bug")])])
    with pytest.raises(ExceptionGroup), plain_errors():
        raise ExceptionGroup("all", [RuntimeError("bug"), KeyError("other")])


@pytest.mark.trio
@pytest.mark.slow
async def test_a_chain_without_the_trusted_block_is_not_followed(tmp_path: Path) -> None:
    home = quick_home(tmp_path / "a")
    async with open_peer(config(home.path)) as peer:
        await until(lambda: peer.engine.state.height >= 1, peer)
    with pytest.raises(UserError, match="not the one that --trust names"):
        async with open_peer(replace(config(home.path), trust="1:" + "00" * 32)):
            pass


@pytest.mark.parametrize(
    "changes",
    [{"device": "cuda:0"}, {"memory": -1}, {"threads": 0}, {"grace": 0}, {"trust": "5:00"}, {"keep": 999}],
    ids=str,
)
async def test_settings_that_a_peer_cannot_follow_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        async with open_peer(replace(config(tmp_path / "a"), **changes)):
            pass
    assert caught.value.exit_code == USAGE
    assert caught.value.hint
    assert not (tmp_path / "a").exists()
