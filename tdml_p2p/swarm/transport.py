"""The swarm's `trainer.transport.Transport` over libp2p tensor streams, with every tensor signed for."""

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence

import structlog
import trio

from chain.keys import PrivateKey
from tdml_p2p.swarm.envelope import (
    MAX_RECEIPTS,
    Carried,
    EnvelopeError,
    Receipts,
    decode_envelope,
    encode_envelope,
    is_acknowledged,
    is_proven,
    receipt,
    statement,
)
from tdml_p2p.tensors import Frame, LinkLost, TensorStreams
from tdml_p2p.tensors import PeerLost as StreamLost
from trainer.content import address_of
from trainer.messages import Apply, Message, Reduce, decode_message, encode_header, payload_of
from trainer.payloads import MessageError
from trainer.trace import lane, note, span
from trainer.transport import Lost, PeerLost, Received

log = structlog.get_logger(__name__)

_SEND_SECONDS = 120.0
"""How long a link may make no progress."""
_RECEIPT_SECONDS = 0.2
_KEPT_RECEIPTS = 8192
_NOTHING = memoryview(b"")
_INLINE_BYTES = 1 << 20
"""Tensors up to this size are hashed on the event loop; larger ones in a thread."""


class SwarmTransport:
    """One task's messages between this peer and the other members of its swarm.

    `is_member` decides whose frames are read at all; evicted peers fail it at once. Must be run.
    """

    def __init__(
        self,
        task: bytes,
        key: PrivateKey,
        peer: str,
        streams: TensorStreams,
        is_member: Callable[[str], bool],
    ) -> None:
        self.peer = peer
        self.refused: Counter[str] = Counter()
        self.bytes_sent = 0
        self.receipts: OrderedDict[bytes, str] = OrderedDict()
        self.heard: dict[str, float] = {}
        """When a member last sent something."""
        self._task = task
        self._key = key
        self._streams = streams
        self._is_member = is_member
        self._frames = streams.open_session(task)
        self._owed: dict[str, list[bytes]] = {}
        self._to_self, self._from_self = trio.open_memory_channel[Received](math.inf)
        self._inbox_send, self._inbox = trio.open_memory_channel[Received](0)

    async def send(self, to: str, message: Message) -> None:
        """Deliver a message, its tensors signed; raise `PeerLost` when the link is gone."""
        header = encode_header(message)
        tensors = [payload.data for payload in payload_of(message)]
        place = _place(message)
        proofs = tuple([await self._prove(header, data, place) for data in _signed(message, tensors)])
        if to == self.peer:
            self._to_self.send_nowait(Received(to, message, proofs))
            return
        self.bytes_sent += sum(len(data) for data in tensors)
        with span("send", *place):
            await self._deliver(to, encode_envelope(Carried(header, proofs)), tensors)

    async def receive(self) -> Received:
        """Return the next message or loss."""
        return await self._inbox.receive()

    async def run(self) -> None:
        """Read frames, and answer tensors with receipts, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read)
            nursery.start_soon(self._forward_own)
            nursery.start_soon(self._acknowledge)

    def close(self) -> None:
        """Stop taking frames of this task."""
        self._streams.close_session(self._task)

    async def _prove(self, header: bytes, data: memoryview, place: tuple[int, int]) -> tuple[bytes, bytes]:
        with span("hash", *place):
            address = await _address(data)
        with span("sign", *place):
            return address, self._key.sign(statement(self._task, header, address))

    async def _deliver(self, to: str, header: bytes, tensors: Sequence[memoryview]) -> None:
        try:
            await self._streams.send(to, self._task, header, tensors, _SEND_SECONDS)
        except StreamLost:
            raise PeerLost(to) from None
        except ValueError as error:  # beyond the bounds of a frame: no manifest that was checked leads here
            log.warning("swarm message not sent", to=to, reason=str(error))
            raise PeerLost(to) from None

    async def _forward_own(self) -> None:
        async for received in self._from_self:
            await self._inbox_send.send(received)

    async def _read(self) -> None:
        with lane("receive"):
            async for frame in self._frames:
                if isinstance(frame, LinkLost):
                    await self._inbox_send.send(Received(frame.peer, Lost(frame.peer)))
                    continue
                try:
                    await self._take(frame)
                except (EnvelopeError, MessageError) as error:
                    self._refuse(frame.sender, str(getattr(error, "reason", "malformed")))

    async def _take(self, frame: Frame) -> None:
        if not self._is_member(frame.sender):
            self._refuse(frame.sender, "not-a-member")
            return
        self.heard[frame.sender] = trio.current_time()
        envelope = decode_envelope(bytes(frame.header))
        if isinstance(envelope, Receipts):
            self._keep_receipts(frame.sender, envelope)
            return
        message = decode_message(envelope.header, frame.tensors)
        place = _place(message)
        note(f"from {frame.sender}", "arrive", frame.times, *place)
        with span("verify", *place):
            is_honest = await self._is_honest(frame.sender, envelope, _signed(message, frame.tensors))
        if not is_honest:
            self._refuse(frame.sender, "false-proof")
            return
        if envelope.proofs:
            owed = self._owed.setdefault(frame.sender, [])
            owed += [signature for _, signature in envelope.proofs]
        await self._inbox_send.send(Received(frame.sender, message, envelope.proofs))

    async def _is_honest(self, sender: str, envelope: Carried, tensors: Sequence[memoryview]) -> bool:
        if len(envelope.proofs) != len(tensors):
            return False
        for proof, data in zip(envelope.proofs, tensors, strict=True):
            if await _address(data) != proof[0]:
                return False
            if not is_proven(self._task, sender, envelope.header, proof):
                return False
        return True

    def _keep_receipts(self, sender: str, receipts: Receipts) -> None:
        if not is_acknowledged(self._task, sender, receipts):
            self._refuse(sender, "false-receipt")
            return
        for proof in receipts.proofs:
            self.receipts[proof] = sender
        while len(self.receipts) > _KEPT_RECEIPTS:
            self.receipts.popitem(last=False)

    async def _acknowledge(self) -> None:
        with lane("receipts"):
            while True:
                await trio.sleep(_RECEIPT_SECONDS)
                owed, self._owed = self._owed, {}
                for sender, proofs in owed.items():
                    for start in range(0, len(proofs), MAX_RECEIPTS):
                        batch = receipt(self._task, self._key, tuple(proofs[start : start + MAX_RECEIPTS]))
                        try:
                            await self._deliver(sender, encode_envelope(batch), ())
                        except PeerLost:
                            break

    def _refuse(self, sender: str, reason: str) -> None:
        self.refused[reason] += 1
        log.info("swarm message refused", sender=sender, reason=reason)


def _signed(message: Message, tensors: Sequence[memoryview]) -> Sequence[memoryview]:
    """Return what a message is signed with: its tensors, or nothing at all under what a step's audit rests on."""
    return (_NOTHING,) if isinstance(message, Reduce | Apply) else tensors


def _place(message: Message) -> tuple[int, int]:
    """Return the step and the cell of a message, -1 for none."""
    return getattr(message, "step", -1), getattr(message, "cell", -1)


async def _address(data: memoryview) -> bytes:
    """Return the content address of `data`, hashed off the event loop when large."""
    if len(data) <= _INLINE_BYTES:
        return address_of(data)
    return await trio.to_thread.run_sync(address_of, data)
