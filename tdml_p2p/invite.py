"""Invite lines: where a peer is and which network it belongs to, `MULTIADDR/p2p/PEERID@CHAINID`."""

from dataclasses import dataclass
from typing import Self

from chain.keys import account_of
from tdml_p2p.errors import UserError

MAX_INVITE = 512
_HINT = "an invite looks like /ip4/ADDRESS/tcp/PORT/p2p/PEERID@CHAINID; `tdml-peer start` prints it"


@dataclass(frozen=True)
class Invite:
    """A parsed invite: the dialable address (with `/p2p/`), the peer's id text and the 32-byte chain id."""

    address: str
    peer: str
    chain_id: bytes

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the invite that `text` holds; raise `UserError` in one sentence."""
        address, separator, chain = text.strip().rpartition("@")
        transport, marker, peer = address.rpartition("/p2p/")
        if len(text) > MAX_INVITE or not separator or not marker or not transport.startswith("/"):
            raise UserError(f"{text[:80]!r} is not an invite.", _HINT)
        try:
            account_of(peer)
        except ValueError as error:
            raise UserError(f"The invite names no peer: {error}.", _HINT) from None
        try:
            chain_id = bytes.fromhex(chain)
        except ValueError:
            chain_id = b""
        if len(chain_id) != 32:
            raise UserError(f"The invite ends in {chain[:80]!r}, which is not a chain id.", _HINT)
        return cls(address, peer, chain_id)

    def __str__(self) -> str:
        return f"{self.address}@{self.chain_id.hex()}"


def invite_line(addresses: tuple[str, ...], peer: str, chain_id: bytes) -> str:
    """Return the invite of a peer: its first address beyond this machine, else its first one."""
    outside = [address for address in addresses if not address.startswith(("/ip4/127.", "/ip6/::1/"))]
    address = (outside or list(addresses) or ["/ip4/127.0.0.1/tcp/0"])[0]
    if "/p2p/" not in address:
        address = f"{address}/p2p/{peer}"
    return str(Invite(address, peer, chain_id))
