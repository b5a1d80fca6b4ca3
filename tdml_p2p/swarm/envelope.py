"""What one tensor frame of a swarm carries besides its tensors: a message with proofs, or receipts.

A sender signs, for every tensor, the task, the message's own header (generation, step, cell, stage,
shape) and the tensor's content address: the producer of a cell's input is thereby on record. The
receiver answers with receipts, one signature over the proofs of a batch, so that "I was sent garbage"
and "I never got it" are decided by signatures.
"""

from typing import Annotated

import msgspec

from chain.codec import Hash, SignatureBytes
from chain.hashing import digest
from chain.keys import PrivateKey, account_of, verify

MAX_MESSAGE_HEADER = 60 * 1024
MAX_RECEIPTS = 512

Header = Annotated[bytes, msgspec.Meta(max_length=MAX_MESSAGE_HEADER)]


class Carried(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=1):
    """A swarm message's header and, per tensor, (content address, sender's signature)."""

    header: Header
    proofs: Annotated[tuple[tuple[Hash, SignatureBytes], ...], msgspec.Meta(max_length=4)]


class Receipts(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=2):
    """The receiver's one signature over the proof signatures of the tensors that arrived."""

    proofs: Annotated[tuple[SignatureBytes, ...], msgspec.Meta(min_length=1, max_length=MAX_RECEIPTS)]
    signature: SignatureBytes


Envelope = Carried | Receipts

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Envelope] = msgspec.msgpack.Decoder(Envelope)


class EnvelopeError(ValueError):
    """Frame bytes that are not an envelope."""


def encode_envelope(envelope: Envelope) -> bytes:
    """Return the bytes of an envelope."""
    return _encoder.encode(envelope)


def decode_envelope(data: bytes) -> Envelope:
    """Return the envelope that `data` encodes; raise `EnvelopeError`."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise EnvelopeError(str(error)) from None


def statement(task: bytes, header: bytes, address: bytes) -> bytes:
    """Return what a sender signs for one tensor of the message with this header."""
    return digest("swarm tensor", task, digest("swarm header", header), address)


def is_proven(task: bytes, sender: str, header: bytes, proof: tuple[bytes, bytes]) -> bool:
    """Whether `proof` (address, signature) is `sender`'s for a tensor of the message with this header.

    Nobody has signed under what is no peer's name.
    """
    address, signature = proof
    try:
        account = account_of(sender)
    except ValueError:
        return False
    return verify(account, statement(task, header, address), signature)


def receipt(task: bytes, key: PrivateKey, proofs: tuple[bytes, ...]) -> Receipts:
    """Return `key`'s acknowledgement of the tensors with these proof signatures."""
    return Receipts(proofs, key.sign(digest("swarm receipt", task, *proofs)))


def is_acknowledged(task: bytes, receiver: str, receipts: Receipts) -> bool:
    """Whether `receipts` carry `receiver`'s valid signature."""
    return verify(account_of(receiver), digest("swarm receipt", task, *receipts.proofs), receipts.signature)
