"""Noise messages many at a time: one write for a batch of them, one read for as many as have come.

The stock reader and writer of libp2p take a turn of the event loop or more for each message of 64 KiB, which costs more
than its cipher. The bytes on the wire are the same.
"""

from typing import Any

from libp2p.io.exceptions import ConnectionClosedError
from libp2p.security.noise.io import MAX_PLAINTEXT_LENGTH, SIZE_NOISE_MESSAGE_LEN, NoiseTransportReadWriter


class BatchedNoise(NoiseTransportReadWriter):
    """The messages of one connection after its handshake; whoever reads or writes does so alone."""

    def __init__(self, former: NoiseTransportReadWriter) -> None:
        self._raw: Any = former.read_writer.read_write_closer
        super().__init__(self._raw, former.noise_state)
        self._ahead = b""

    async def write_msg(self, msg: bytes, prefix_encoded: bool = False) -> None:
        """Send all of `msg`, in as many messages as it takes."""
        assert not prefix_encoded  # handshakes only
        parts = []
        for start in range(0, len(msg), MAX_PLAINTEXT_LENGTH):
            sealed = self.encrypt(msg[start : start + MAX_PLAINTEXT_LENGTH])
            parts += [len(sealed).to_bytes(SIZE_NOISE_MESSAGE_LEN, "big"), sealed]
        await self._raw.write(b"".join(parts))

    async def read_msg(self, prefix_encoded: bool = False) -> bytes:
        """Return what the messages hold that have come whole; raise `ConnectionClosedError` at the end."""
        assert not prefix_encoded
        while True:
            opened = self._opened()
            if opened:
                return opened
            data = await self._raw.read(None)
            if not data:
                raise ConnectionClosedError("the peer closed the connection", transport="tcp")
            self._ahead = self._ahead + data if self._ahead else data

    def _opened(self) -> bytes:
        parts, start, ahead = [], 0, self._ahead
        while True:
            body = start + SIZE_NOISE_MESSAGE_LEN
            end = body + int.from_bytes(ahead[start:body], "big")
            if body > len(ahead) or end > len(ahead):
                break
            parts.append(self.decrypt(ahead[body:end]))
            start = end
        self._ahead = ahead[start:] if start else ahead
        return parts[0] if len(parts) == 1 else b"".join(parts)


def batch(session: Any) -> None:
    """Have a secured connection, whose handshake is over, read and write in batches, if Noise secures it."""
    if type(session.conn) is NoiseTransportReadWriter:
        session.conn = BatchedNoise(session.conn)
