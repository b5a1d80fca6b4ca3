"""A peer's own transactions from submission to receipt: nonces, gossip, renewal. Pure bookkeeping."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from chain.codec import encode
from chain.keys import PrivateKey
from chain.transactions import DUTIES, VERSION, Payload, Transaction, Unsigned, sign

VALIDITY_BLOCKS = 100
"""Heights for which an own transaction stays valid before it is signed again."""
MAX_RENEWALS = 5
REGOSSIP_SECONDS = 4.0


@dataclass
class Own:
    """One own transaction; `names` are the ids of all versions that were signed of it."""

    payload: Payload
    transaction: Transaction
    names: list[bytes] = field(default_factory=list)
    sent: float = float("-inf")


@dataclass(frozen=True)
class Position:
    """Where the ledger is for the sender: final height, next nonce, price per byte."""

    height: int
    nonce: int
    fee_per_byte: int


class Outbox:
    """Signs with the next nonce and signs again what expired or lost its nonce."""

    def __init__(self, key: PrivateKey, chain_id: bytes) -> None:
        self._key = key
        self._chain_id = chain_id
        self._pending: list[Own] = []

    @property
    def account(self) -> bytes:
        """The sender."""
        return self._key.account

    def add(self, payload: Payload, position: Position) -> Own:
        """Return `payload` signed with the next free nonce."""
        nonce = max([position.nonce, *(own.transaction.body.nonce + 1 for own in self._pending)])
        own = Own(payload, self._sign(payload, nonce, position))
        own.names.append(own.transaction.tx_id)
        self._pending.append(own)
        return own

    def discard(self, own: Own) -> None:
        """Forget a transaction that was refused."""
        self._pending = [other for other in self._pending if other is not own]

    def settle(self, included: Iterable[bytes]) -> list[Own]:
        """Take out and return the transactions whose ids were included in a block."""
        ids = set(included)
        done = [own for own in self._pending if not ids.isdisjoint(own.names)]
        if done:
            self._pending = [own for own in self._pending if ids.isdisjoint(own.names)]
        return done

    def renew(self, position: Position) -> tuple[list[Own], list[Own]]:
        """Sign again what can no longer be included; return (renewed, given up).

        A version that is still valid is never replaced, or both could be included.
        """
        dead = [own for own in self._pending if self._is_dead(own, position)]
        lost = [own for own in dead if len(own.names) > MAX_RENEWALS]
        for own in lost:
            self.discard(own)
        alive = [own for own in self._pending if own not in dead]
        overtaken = [own for own in dead if own.transaction.body.nonce < position.nonce and own not in lost]
        expired = [own for own in dead if own not in overtaken and own not in lost]
        if not alive:
            overtaken, expired = sorted(overtaken + expired, key=lambda own: own.transaction.body.nonce), []
        for own in expired:
            self._resign(own, own.transaction.body.nonce, position)
        for own in overtaken:
            taken = (other.transaction.body.nonce + 1 for other in self._pending if other not in overtaken)
            self._resign(own, max([position.nonce, *taken]) + overtaken.index(own), position)
        return expired + overtaken, lost

    def to_gossip(self, now: float) -> list[Transaction]:
        """Return what has not been sent for a while, and count it as sent now."""
        due = [own for own in self._pending if now - own.sent >= REGOSSIP_SECONDS]
        for own in due:
            own.sent = now
        return [own.transaction for own in due]

    def next_gossip(self) -> float:
        """Return when `to_gossip` next has something."""
        return min((own.sent + REGOSSIP_SECONDS for own in self._pending), default=float("inf"))

    @staticmethod
    def _is_dead(own: Own, position: Position) -> bool:
        body = own.transaction.body
        return body.nonce < position.nonce or body.valid_until <= position.height

    def _resign(self, own: Own, nonce: int, position: Position) -> None:
        own.transaction = self._sign(own.payload, nonce, position)
        own.names.append(own.transaction.tx_id)
        own.sent = float("-inf")

    def _sign(self, payload: Payload, nonce: int, position: Position) -> Transaction:
        def body(fee: int) -> Unsigned:
            return Unsigned(
                VERSION,
                self._chain_id,
                self._key.account,
                nonce,
                position.height,
                position.height + VALIDITY_BLOCKS,
                fee,
                b"",
                payload,
            )

        fee = 0
        if position.fee_per_byte and not isinstance(payload, DUTIES):
            fee = position.fee_per_byte * len(encode(sign(self._key, body(2**31))))
        return sign(self._key, body(fee))
