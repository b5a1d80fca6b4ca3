"""The local HTTP interface: its answers, its refusals and what the status port must not allow."""

import json
import socket
import stat
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from chain.codec import decode, encode
from chain.transactions import Bond, Payload, Transfer
from tdml_p2p.control import ApiError, ControlServer, build_app
from tdml_p2p.errors import UserError
from tdml_p2p.http_transactions import MAX_BODY_BYTES, parse_transaction
from tdml_p2p.http_watch import parse_watch

PEER = "12D3KooWPTtJAh1Ea98tqnZmE95z4KEpfYx7XQnG1yvrLqtgDgLh"


class FakeFeed:
    """Three final blocks of history, then two more."""

    height = 3

    async def past(self, height: int) -> list[dict[str, Any]]:
        return [{"height": height, "kind": kind, "data": {}} for kind in ("block", "claimed")]

    async def __aiter__(self) -> AsyncIterator[int]:
        for height in (3, 4, 5):
            await trio.lowlevel.checkpoint()
            yield height
        await trio.sleep_forever()


class FakePeer:
    """A peer with canned answers; it remembers what it was asked to sign."""

    def __init__(self) -> None:
        self.signed: list[Any] = []
        self.watchers = 0
        self.watcher_left = trio.Event()

    def status(self) -> dict[str, Any]:
        return {"peer": PEER, "height": 3}

    def page(self) -> dict[str, Any]:
        return {"status": self.status(), "tasks": [], "blocks": [], "audits": [], "evictions": []}

    def render_metrics(self) -> bytes:
        return b"tdml_height 3.0\n"

    async def open_tasks(self) -> list[dict[str, Any]]:
        return [{"task": "ab"}]

    async def answer(self, query: str, params: Mapping[str, str]) -> Any:
        if query != "status":
            raise ApiError(404, f"There is no query {query}.", "see --help")
        return {"params": dict(params)}

    async def transact(self, payload: Any) -> dict[str, Any]:
        self.signed.append(payload)
        if payload == Bond(7):
            raise ApiError(400, "The ledger refused it: insufficient-balance.", "check your balance")
        return {"id": "aa", "height": 4}

    async def replay(self, identity: str) -> dict[str, Any]:
        if identity != "ab":
            raise ApiError(404, f"There is no audit {identity}.", "see the events of a block")
        return {"audit": identity, "confirms": True}

    @asynccontextmanager
    async def feed(self) -> AsyncIterator[FakeFeed]:
        self.watchers += 1
        try:
            yield FakeFeed()
        finally:
            self.watchers -= 1
            self.watcher_left.set()


@pytest.fixture
def peer() -> FakePeer:
    return FakePeer()


def client(peer: FakePeer, *, is_trusted: bool = True) -> httpx.AsyncClient:
    app = build_app(peer, is_trusted=is_trusted)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")


@pytest.mark.trio
async def test_answers(peer: FakePeer) -> None:
    async with client(peer) as http:
        assert (await http.get("/healthz")).json() == {"ok": True}
        assert (await http.get("/status.json")).json() == {"peer": PEER, "height": 3}
        assert (await http.get("/metrics")).text == "tdml_height 3.0\n"
        assert (await http.get("/tasks.json")).json() == [{"task": "ab"}]
        assert (await http.get("/chain/status?height=2")).json() == {"params": {"height": "2"}}


@pytest.mark.trio
async def test_only_the_owner_has_an_audit_replayed(peer: FakePeer) -> None:
    async with client(peer) as http:
        assert (await http.post("/replays/ab", json={})).json() == {"audit": "ab", "confirms": True}
        unknown = await http.post("/replays/cd", json={})
        assert (await http.get("/replays/ab")).status_code == 405
    assert (unknown.status_code, unknown.json()["error"]) == (404, "There is no audit cd.")
    async with client(peer, is_trusted=False) as http:
        assert (await http.post("/replays/ab", json={})).status_code == 404


@pytest.mark.trio
async def test_page_asks_nobody_else(peer: FakePeer) -> None:
    async with client(peer, is_trusted=False) as http:
        reply = await http.get("/")
    assert reply.headers["content-security-policy"].startswith("default-src 'none'")
    assert "<h1>" in reply.text
    hosts = reply.text.replace("http://www.w3.org/2000/svg", "")
    assert "http://" not in hosts
    assert "https://" not in hosts


@pytest.mark.trio
@pytest.mark.parametrize(("path", "code"), [("/chain/nonsense", 404), ("/nowhere", 404), ("/chain/watch?from=x", 400)])
async def test_refusals_have_a_sentence_and_a_hint(peer: FakePeer, path: str, code: int) -> None:
    async with client(peer) as http:
        reply = await http.get(path)
    assert reply.status_code == code
    assert reply.json().keys() == {"error", "hint"}


@pytest.mark.trio
@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("from=2&count=5", [(2, "block"), (2, "claimed"), (3, "block"), (3, "claimed"), (4, "block")]),
        ("topics=claimed&count=2", [(4, "claimed"), (5, "claimed")]),
        ("from=3&topics=block,other&count=3", [(3, "block"), (4, "block"), (5, "block")]),
        ("from=1&count=0", []),
    ],
)
async def test_watch_streams_history_then_news(peer: FakePeer, query: str, expected: list[tuple[int, str]]) -> None:
    async with client(peer) as http:
        reply = await http.get(f"/chain/watch?{query}")
    lines = [json.loads(line) for line in reply.text.splitlines()]
    assert [(line["height"], line["kind"]) for line in lines] == expected


@pytest.mark.trio
async def test_transactions(peer: FakePeer) -> None:
    async with client(peer) as http:
        good = await http.post("/transactions", json={"kind": "bond", "amount": "5"})
        refused = await http.post("/transactions", json={"kind": "bond", "amount": "7"})
        large = await http.post("/transactions", content=b"x" * (MAX_BODY_BYTES + 1))
        wrong = await http.post("/transactions", json={"kind": "steal"})
    assert (good.status_code, good.json()) == (200, {"id": "aa", "height": 4})
    assert (refused.status_code, refused.json()["hint"]) == (400, "check your balance")
    assert (large.status_code, wrong.status_code) == (413, 400)
    assert peer.signed == [Bond(5), Bond(7)]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"kind":"bond"}',
        b'{"kind":"bond","amount":5}',
        b'{"kind":"bond","amount":"-5"}',
        b'{"kind":"bond","amount":"0"}',
        b'{"kind":"bond","amount":"9999999999999999999"}',
        b'{"kind":"bond","amount":"1","more":1}',
        b'{"kind":"transfer","to":"nobody","amount":"1"}',
    ],
)
def test_malformed_transactions_are_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_transaction(body)


@given(st.binary(max_size=200) | st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=9),
       lambda inner: st.dictionaries(st.sampled_from(["kind", "amount", "to", "x"]), inner) | st.lists(inner),
       max_leaves=6).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_no_body_breaks_the_parser(body: bytes) -> None:
    try:
        payload = parse_transaction(body)
    except ValueError:
        return
    assert decode(Payload, encode(payload)) == payload


@given(st.dictionaries(st.sampled_from(["from", "count", "topics", "x"]), st.text(max_size=30)))
def test_no_query_breaks_the_watch_parser(params: dict[str, str]) -> None:
    try:
        wanted = parse_watch(params)
    except ValueError:
        return
    assert wanted.count is None or wanted.count >= 0


def test_transfer_names_an_account() -> None:
    payload = parse_transaction(json.dumps({"kind": "transfer", "to": PEER, "amount": "12"}).encode())
    assert isinstance(payload, Transfer)
    assert payload.amount == 12


@pytest.mark.trio
async def test_status_port_cannot_transact_and_answers_to_loopback_names_only(peer: FakePeer) -> None:
    async with client(peer, is_trusted=False) as http:
        assert (await http.post("/transactions", json={"kind": "faucet"})).status_code == 404
        assert (await http.get("/status.json", headers={"host": "evil.example"})).status_code == 400
        assert (await http.get("/status.json", headers={"host": "127.0.0.1:1"})).status_code == 200
    assert peer.signed == []


@pytest.mark.trio
async def test_server_serves_both_sockets_and_leaves_nothing(
    peer: FakePeer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "control.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    server = ControlServer(peer, path, 0)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(path))) as http:
            assert (await http.get("http://localhost/status.json")).json()["height"] == 3
            watched = await http.get("http://localhost/chain/watch?count=1")
            assert json.loads(watched.text)["height"] == 4
        assert server.status_url is not None
        async with httpx.AsyncClient() as http:
            assert (await http.get(f"{server.status_url}healthz")).status_code == 200
        nursery.cancel_scope.cancel()
    assert not path.exists()
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.trio
async def test_a_watcher_that_leaves_ends_its_subscription(peer: FakePeer, tmp_path: Path) -> None:
    server = ControlServer(peer, tmp_path / "control.sock", None)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        stream = await trio.open_unix_socket(str(tmp_path / "control.sock"))
        async with stream:
            await stream.send_all(b"GET /chain/watch HTTP/1.1\r\nhost: localhost\r\n\r\n")
            received = b""
            while b'"height":5' not in received:
                received += await stream.receive_some(4096)
            assert peer.watchers == 1
        with trio.fail_after(10):
            await peer.watcher_left.wait()
        assert peer.watchers == 0
        nursery.cancel_scope.cancel()


def test_port_in_use_is_one_sentence_with_a_hint(peer: FakePeer, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="cannot be used") as caught:
            ControlServer(peer, tmp_path / "control.sock", taken.getsockname()[1])
    assert "--status-port" in caught.value.hint
    assert not (tmp_path / "control.sock").exists()


def test_too_long_a_home_is_refused(peer: FakePeer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too long"):
        ControlServer(peer, tmp_path / ("x" * 120) / "control.sock", None)
