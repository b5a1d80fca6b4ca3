"""GossipSub set up for consensus: one-second heartbeat, content ids, our own rules as topic validators.

A message's fate is decided once, by the topic's handler, before it is forwarded. Gossip may lose: what
must arrive is asked for again by whoever misses it.
"""

from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from enum import StrEnum
from functools import partial
from typing import Any

import structlog
import trio
from blake3 import blake3
from google.protobuf.message import DecodeError
from libp2p.exceptions import ParseError
from libp2p.io.exceptions import IOException
from libp2p.network.connection.exceptions import RawConnError
from libp2p.network.stream.exceptions import StreamEOF, StreamError
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.tools.anyio_service import background_trio_service

from tdml_p2p.gossip_router import make_router
from tdml_p2p.limits import Offence, PeerLimits

log = structlog.get_logger(__name__)

MAX_MESSAGE_BYTES = 4 << 20
_MAX_RPC_BYTES = MAX_MESSAGE_BYTES + (64 << 10)
_QUEUED_RPCS = 512
_READ_BYTES = 64 << 10
_MERGED_BYTES = 32 << 10
"""Less by far than what an RPC may exceed the greatest message by."""
_SEEN_SECONDS = 6.0
_MAX_SEEN = 65536
MAX_WAITING = 64
"""Messages of slow topics that are judged at a time."""
MAX_WAITING_BYTES = 8 << 20


class Disposition(StrEnum):
    """What a handler decides about one message: forward it, drop it, or drop it and charge its sender."""

    ACCEPT = "accept"
    IGNORE = "ignore"
    REJECT = "reject"


TopicHandler = Callable[[str, bytes], Disposition]
SlowTopicHandler = Callable[[str, bytes], Awaitable[Disposition]]


class Gossip:
    """The topics of one network; `topic` names are short, such as `block`."""

    def __init__(self, host: Any, prefix: str, limits: PeerLimits) -> None:
        self.counts: Counter[str] = Counter()
        self._prefix = prefix
        self._limits = limits
        self._self = host.get_id()
        self._handlers: dict[str, TopicHandler] = {}
        self._slow: dict[str, SlowTopicHandler] = {}
        self._joined: dict[str, trio.Event] = {}
        self._nursery: trio.Nursery | None = None
        self.router = make_router()
        self._pubsub = _Pubsub(host, self.router, limits)
        self._pubsub.defer = self._defer
        self._waiting = _Waiting()

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Take part in gossip while the block runs."""
        async with (
            background_trio_service(self.router),
            background_trio_service(self._pubsub),
            trio.open_nursery() as nursery,
        ):
            await self._pubsub.wait_until_ready()
            self._nursery = nursery
            for topic in self._handlers:
                nursery.start_soon(self._join, topic)
            yield
            nursery.cancel_scope.cancel()

    def on_topic(self, topic: str, handler: TopicHandler) -> None:
        """Join `topic`; every message that is new here goes through `handler` exactly once."""
        is_new = topic not in self._handlers
        self._handlers[topic] = handler
        if is_new and self._nursery is not None:
            self._nursery.start_soon(self._join, topic)

    def on_slow_topic(self, topic: str, handler: SlowTopicHandler) -> None:
        """Join `topic`, whose messages take their handler long: other topics' do not wait for them.

        Where too many wait, further ones are dropped and counted.
        """
        self._slow[self._name(topic)] = handler
        self.on_topic(topic, lambda _sender, _data: Disposition.ACCEPT)

    async def publish(self, topic: str, data: bytes) -> None:
        """Send `data` to the topic's other members; raise `ValueError` when it is too large."""
        if len(data) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a gossip message of {len(data)} bytes exceeds {MAX_MESSAGE_BYTES}")
        if topic in self._joined:
            await self._joined[topic].wait()
        self.counts["published"] += 1
        await self._pubsub.publish(self._name(topic), data)

    def mesh(self, topic: str) -> int:
        """Return the number of peers that get this peer's messages of `topic` directly."""
        return len(self.router.mesh.get(self._name(topic), ()))

    def _name(self, topic: str) -> str:
        return f"{self._prefix}/{topic}/1"

    async def _join(self, topic: str) -> None:
        self._joined[topic] = trio.Event()
        name = self._name(topic)
        self._pubsub.set_topic_validator(name, partial(self._judge, topic), is_async_validator=False)
        subscription = await self._pubsub.subscribe(name)
        self._joined[topic].set()
        while True:
            # The handler has already had the message; the queue only must not fill up.
            await subscription.get()

    def _defer(self, forwarder: Any, message: Any) -> bool:
        """Whether the message is of a slow topic, and so is judged, and passed on, in a task of its own."""
        if len(message.topicIDs) != 1 or message.topicIDs[0] not in self._slow or self._nursery is None:
            return False
        key = _message_id(message)
        if self._pubsub.seen_messages.has(key) or key in self._waiting.sizes:
            return True
        if self._waiting.put(key, len(message.data)):
            self._nursery.start_soon(self._judge_slowly, key, forwarder, message)
        else:
            self.counts["dropped"] += 1
        return True

    async def _judge_slowly(self, key: bytes, forwarder: Any, message: Any) -> None:
        try:
            verdict = await self._slow[message.topicIDs[0]](str(forwarder), message.data)
        except Exception:
            # As for the other topics: one message must not stop the peer.
            log.exception("a gossip handler failed", topic=message.topicIDs[0], sender=str(forwarder))
            verdict = Disposition.IGNORE
            self.counts["failed"] += 1
        finally:
            self._waiting.drop(key)
        self._note(verdict, str(forwarder))
        if verdict == Disposition.ACCEPT:
            await self._pubsub.push_msg(forwarder, message)

    def _note(self, verdict: Disposition, sender: str) -> None:
        self.counts[verdict] += 1
        if verdict == Disposition.REJECT:
            self._limits.charge(sender, Offence.INVALID_MESSAGE)

    def _judge(self, topic: str, forwarder: Any, message: Any) -> bool:
        if forwarder == self._self or self._name(topic) in self._slow:
            return True
        sender = str(forwarder)
        try:
            verdict = self._handlers[topic](sender, message.data)
        except Exception:
            # One message must not stop the peer; the fault is logged with its traceback.
            log.exception("a gossip handler failed", topic=topic, sender=sender)
            self.counts["failed"] += 1
            return False
        self._note(verdict, sender)
        return verdict == Disposition.ACCEPT


class _Waiting:
    """Messages of slow topics that are being judged, bounded in number and bytes."""

    def __init__(self) -> None:
        self.sizes: dict[bytes, int] = {}
        self._bytes = 0

    def put(self, key: bytes, size: int) -> bool:
        """Count a message in; whether there is room for it."""
        if len(self.sizes) >= MAX_WAITING or self._bytes + size > MAX_WAITING_BYTES:
            return False
        self.sizes[key] = size
        self._bytes += size
        return True

    def drop(self, key: bytes) -> None:
        """Count it out."""
        self._bytes -= self.sizes.pop(key)


class _Pubsub(Pubsub):
    """Pubsub whose outbound queues take messages of consensus size, and whose inbound faults end one stream.

    The stock reader fetches lengths byte by byte, verifies a signed address record with every message,
    and handles messages in tasks whose failure ends the service.
    """

    def __init__(self, host: Any, router: GossipSub, limits: PeerLimits) -> None:
        self._limits = limits
        self.defer: Callable[[Any, Any], bool] = lambda _forwarder, _message: False
        super().__init__(
            _Unrecorded(host),
            router,
            strict_signing=False,
            msg_id_constructor=_message_id,
            validation_cache_ttl=-1,
            validation_cache_size=1,
            max_inbound_rpc_size=_MAX_RPC_BYTES,
        )
        stock: Any = self.seen_messages
        stock.stop()
        self.seen_messages: Any = _Seen()

    async def continuously_read_stream(self, stream: Any) -> None:
        peer = stream.muxed_conn.peer_id
        frames = _Frames(stream)
        try:
            with suppress(StreamError, IOException, RawConnError):
                while True:
                    await self._handle(peer, rpc_pb2.RPC.FromString(await frames.next()))
        except (ParseError, DecodeError):
            self._limits.charge(str(peer), Offence.INVALID_MESSAGE)
            raise

    async def _handle(self, peer: Any, rpc: Any) -> None:
        for message in rpc.publish:
            if self._is_subscribed_to_msg(message) and not self.defer(peer, message):
                await self.push_msg(peer, message)
        for subscription in rpc.subscriptions[: self.max_subscriptions_per_rpc]:
            self.handle_subscription(peer, subscription)
        if rpc.HasField("control"):
            rpc.ClearField("senderRecord")
            for prune in rpc.control.prune:
                # Nobody tells this peer whom to dial.
                prune.ClearField("peers")
            await self.router.handle_rpc(rpc, peer)

    async def handle_sending_messages(self, peer_id: Any, stream: Any, queue: Any) -> None:
        queue.max_message_size = _MAX_RPC_BYTES
        queue._queue.max_size = _QUEUED_RPCS
        await super().handle_sending_messages(peer_id, stream, _Merging(queue))


class _Merging:
    """A peer's outbound queue whose waiting messages leave together: one frame costs less than several."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    async def pop(self) -> Any:
        """Return what waits, up to some bytes; None once the queue is closed."""
        first = await self._queue.pop()
        if first is None or not len(self._queue):
            return first
        merged = rpc_pb2.RPC()  # the messages themselves are in the queues of other peers too
        merged.MergeFrom(first)
        while len(self._queue) and merged.ByteSize() < _MERGED_BYTES:
            merged.MergeFrom(await self._queue.pop())
        return merged


class _Frames:
    """Varint-prefixed messages of one stream, read as they come."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._buffer = bytearray()

    async def next(self) -> bytes:
        """Return the next message; raise `ParseError` for a wrong or too large length, `StreamError` at the end."""
        size = shift = 0
        while True:
            byte = (await self._take(1))[0]
            size |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
            if shift > 28:
                raise ParseError("a length of more than five bytes")
        if size > _MAX_RPC_BYTES:
            raise ParseError(f"a message of {size} bytes")
        return await self._take(size)

    async def _take(self, count: int) -> bytes:
        while len(self._buffer) < count:
            data = await self._stream.read(_READ_BYTES)
            if not data:
                raise StreamEOF("the peer ended the stream")
            self._buffer += data
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken


class _Unrecorded:
    """A host, as gossip sees it, without a signed address record for every message: discovery has its own."""

    def __init__(self, host: Any) -> None:
        self._host = host

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def get_addrs(self) -> list[Any]:
        """Return nothing, which is what the empty record says."""
        return []

    def get_peerstore(self) -> Any:
        """Return the place of the empty record."""
        return _Unrecorded(self._host.get_peerstore())

    def get_local_record(self) -> Any:
        """Return the record without addresses."""
        return self

    def _env_addrs_set(self) -> set[Any]:
        return set()

    def marshal_envelope(self) -> bytes:
        """Return no bytes, whatever the message."""
        return b""


class _Seen:
    """Ids of recent messages. They expire, so that a message said again on purpose travels again."""

    def __init__(self) -> None:
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def add(self, key: bytes) -> bool:
        now = trio.current_time()
        while self._until and (len(self._until) >= _MAX_SEEN or next(iter(self._until.values())) <= now):
            self._until.popitem(last=False)
        is_new = key not in self._until
        self._until.setdefault(key, now + _SEEN_SECONDS)
        return is_new

    def has(self, key: bytes) -> bool:
        return self._until.get(key, 0.0) > trio.current_time()


def _message_id(message: Any) -> bytes:
    hasher = blake3(message.data)
    for topic in message.topicIDs:
        hasher.update(topic.encode())
    return hasher.digest(20)
