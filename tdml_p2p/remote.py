"""What a stranger may ask about this peer's chain, and how to ask: `/tdml/query/1`, JSON both ways."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import trio
from libp2p.exceptions import BaseLibp2pError

from chain.codec import MAX_OBJECT_BYTES, DecodeError, decode
from chain.genesis import Genesis
from chain.keys import PrivateKey
from tdml_p2p.bootstrap import GENESIS_PROTOCOL
from tdml_p2p.control import ApiError
from tdml_p2p.errors import FAILED, UNREACHABLE, USAGE, UserError
from tdml_p2p.host import Network
from tdml_p2p.limits import LimitConfig, PeerLimits
from tdml_p2p.p2p_host import build_host
from tdml_p2p.peers import peer_info
from tdml_p2p.requests import Refused, RequestFailed, Requests

QUERY_PROTOCOL = "/tdml/query/1"
OPEN_QUERIES = ("status", "blocks", "block", "votes", "proof")
"""Queries whose cost is bounded, whoever asks."""
REQUEST_BYTES = 1024
REPLY_BYTES = 8 * 1024 * 1024
TIMEOUT = 20.0
MOST_BLOCKS = 100
_ARGUMENTS = frozenset(("id", "kind", "from", "count"))

Answerer = Callable[[str, Mapping[str, str]], Awaitable[Any]]
Text = Annotated[str, msgspec.Meta(max_length=256)]


class Query(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One question: a query of `chain.queries` and its arguments."""

    query: Text
    arguments: Annotated[dict[Text, Text], msgspec.Meta(max_length=4)]


def serve_queries(network: Network, answer: Answerer) -> None:
    """Answer open queries, one at a time, so that strangers never take what the owner's questions need."""
    turn = trio.CapacityLimiter(1)

    async def serve(_sender: str, data: bytes) -> bytes:
        question = msgspec.json.decode(data, type=Query)
        arguments = question.arguments
        if question.query not in OPEN_QUERIES or not _ARGUMENTS.issuperset(arguments):
            raise Refused("not-open: strangers may not ask this")
        count = arguments.get("count", "1")
        if not count.isdecimal() or len(count) > 3 or int(count) > MOST_BLOCKS:
            raise Refused(f"too-many: at most {MOST_BLOCKS} blocks at once")
        async with turn:
            try:
                return msgspec.json.encode({"data": await answer(question.query, arguments)})
            except ApiError as error:
                return msgspec.json.encode({"error": error.message, "hint": error.hint, "code": error.code})

    network.on_request(QUERY_PROTOCOL, serve, REQUEST_BYTES)


@dataclass(frozen=True)
class Node:
    """A connection to a remote peer, whose word is not to be trusted."""

    peer: str
    _requests: Requests

    async def ask(self, query: str, arguments: Mapping[str, str]) -> Any:
        """Return the peer's answer, a JSON value; raise `UserError`."""
        question = msgspec.json.encode(Query(query, dict(arguments)))
        try:
            reply = msgspec.json.decode(await self._exchange(QUERY_PROTOCOL, question, REPLY_BYTES))
            if not _is_printable(reply):
                raise ValueError("control characters")
            if "data" in reply:
                return reply["data"]
            code = USAGE if reply["code"] == 400 else FAILED
            raise UserError(str(reply["error"])[:500], str(reply["hint"])[:500], code)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError("The peer gave an answer that cannot be read.", "ask another peer") from None

    async def genesis(self, chain_id: bytes) -> Genesis:
        """Return the genesis of the network `chain_id`; raise `UserError` when the peer has another."""
        try:
            genesis: Genesis = decode(Genesis, await self._exchange(GENESIS_PROTOCOL, b"", MAX_OBJECT_BYTES))
        except DecodeError:
            genesis = None  # type: ignore[assignment]
        if genesis is None or genesis.chain_id != chain_id:
            raise UserError(f"The peer is not of the network {chain_id.hex()[:12]}.", "check the invite line")
        return genesis

    async def _exchange(self, protocol: str, data: bytes, limit: int) -> bytes:
        try:
            return await self._requests.ask(self.peer, protocol, data, limit=limit, timeout=TIMEOUT)
        except RequestFailed as error:
            raise UserError(f"The peer does not answer: {error.reason}.", "ask another peer", UNREACHABLE) from None


@asynccontextmanager
async def reach(address: str) -> AsyncIterator[Node]:
    """Connect to the peer at `address` (a multiaddr ending in `/p2p/PEERID`); raise `UserError`."""
    try:
        info = peer_info(address)
    except ValueError as error:
        raise UserError(f"{error}.", "it looks like /ip4/ADDRESS/tcp/PORT/p2p/PEERID", USAGE) from None
    limits = PeerLimits(LimitConfig(), time.monotonic, lambda _: None)
    host = build_host(PrivateKey.generate(), "/tdml/inspector", limits, 4)
    async with host.run([]):
        try:
            with trio.fail_after(TIMEOUT):
                await host.get_network().dial_addr(info.addrs[0], info.peer_id)
        except (BaseLibp2pError, OSError, trio.TooSlowError):
            raise UserError("The peer cannot be reached.", "check its address and that it runs", UNREACHABLE) from None
        yield Node(str(info.peer_id), Requests(host, limits))


def _is_printable(value: Any) -> bool:
    """Whether no text in a JSON value can do anything to a terminal."""
    match value:
        case str():
            return value.isprintable()
        case list():
            return all(map(_is_printable, value))
        case dict():
            return all(_is_printable(key) and _is_printable(item) for key, item in value.items())
        case _:
            return True
