"""Ed25519 keys: one key is the chain account, the validator and the libp2p peer.

The text form of an account is its libp2p peer id: base58btc of the identity multihash of the
protobuf-encoded public key (libp2p peer-id specification), `12D3Koo…`.
"""

from typing import Self

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_PREFIX = bytes.fromhex("002408011220")


class PrivateKey:
    """An ed25519 signing key made from a 32-byte seed."""

    __slots__ = ("_key", "account", "seed")

    def __init__(self, seed: bytes) -> None:
        self.seed = seed
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.account: bytes = self._key.public_key().public_bytes_raw()

    @classmethod
    def generate(cls) -> Self:
        """Return a new key from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate().private_bytes_raw())

    def sign(self, message: bytes) -> bytes:
        """Return the 64-byte signature of `message` (RFC 8032)."""
        return self._key.sign(message)

    def __repr__(self) -> str:
        return f"PrivateKey({peer_id(self.account)})"


def verify(account: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` is `account`'s signature of `message`."""
    try:
        Ed25519PublicKey.from_public_bytes(account).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def peer_id(account: bytes) -> str:
    """Return the libp2p peer id text of a 32-byte account."""
    return base58.b58encode(_PREFIX + account).decode("ascii")


def account_of(peer: str) -> bytes:
    """Return the 32-byte account of a peer id text; raise `ValueError` when it is not an ed25519 one."""
    try:
        raw: bytes = base58.b58decode(peer)
    except ValueError:
        raise ValueError(f"{peer!r} is not a peer id") from None
    if len(raw) != len(_PREFIX) + 32 or not raw.startswith(_PREFIX):
        raise ValueError(f"{peer!r} is not an ed25519 peer id")
    return raw[len(_PREFIX) :]
