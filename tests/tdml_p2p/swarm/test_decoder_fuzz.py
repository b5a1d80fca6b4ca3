"""Every decoder of the project: what is cut, stretched, changed or nested gives a value or its named refusal."""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chain.blocks import Refused, certify
from chain.blocks import decode_message as decode_consensus
from chain.codec import DecodeError, encode
from chain.genesis import to_json
from chain.keys import peer_id
from chain.records import Account
from chain.state import Table, decode_record
from chain.sync import (
    RangeRequest,
    StatusReply,
    StatusRequest,
    decode_range,
    decode_request,
    decode_status,
    pack_range,
)
from chain.transactions import decode_transaction
from tdml_p2p.blob_transfer import WantChunk, WantIndex, decode_want
from tdml_p2p.discovery import FindRecords, TakeRecords
from tdml_p2p.discovery import decode_message as decode_discovery
from tdml_p2p.errors import UserError
from tdml_p2p.home import read_genesis
from tdml_p2p.peers import Hello, decode_hello
from tdml_p2p.records import RecordError, sign_record
from tdml_p2p.swarm.envelope import Carried, EnvelopeError, decode_envelope, encode_envelope, receipt
from tdml_p2p.swarm.inputs import Descriptor, Input, InputsRefused, Wanted, decode_descriptor, decode_wanted
from tdml_p2p.tensor_frames import (
    Control,
    ControlKind,
    FrameError,
    Record,
    RecordKind,
    decode_control,
    decode_lengths,
    encode_lengths,
)
from tdml_p2p.tensor_frames import decode_record as decode_frame
from tests.chain.ledger_kit import genesis_of
from tests.chain.test_blocks import CHAIN, KEYS, SET, block, proposal, vote
from tests.chain.test_transactions import ENCODED
from tests.tdml_p2p.swarm.trace_samples import state_of
from tests.trainer.training_samples import small_manifest
from trainer.content import address_of
from trainer.errors import ManifestError, StageError
from trainer.manifest import decode_manifest, encode_manifest
from trainer.messages import Activation, Commit, Reduce, decode_message, encode_header
from trainer.payloads import MessageError, pack
from trainer.state import decode_state_manifest

PEER = peer_id(KEYS[0].account)
PART = Input(bytes(32), PEER, bytes(64))
SHOWN = Activation(0, 1, 0, 0, pack(torch.ones(1, 2, 4)))
CERTIFICATE = certify([vote(key) for key in KEYS[:3]], SET)
ACCOUNT = encode(Account(balance=5, nonce=2, bonded=1))
FRAME = Record(RecordKind.FRAME, bytes(32), 2, 100, 40)
TENSORS = [payload.data for payload in SHOWN.payload]


@dataclass(frozen=True)
class Decoder:
    """A decoder, what it may raise, and bytes that it reads."""

    name: str
    decode: Callable[[bytes], object]
    refusal: type[Exception] | tuple[type[Exception], ...]
    samples: tuple[bytes, ...]


def pack_of(*values: object) -> tuple[bytes, ...]:
    return tuple(msgspec.msgpack.encode(value) for value in values)


DECODERS = (
    Decoder(
        "envelope",
        decode_envelope,
        EnvelopeError,
        (
            encode_envelope(Carried(b"header", ((bytes(32), bytes(64)),))),
            encode_envelope(receipt(bytes(32), KEYS[0], (bytes(64),))),
        ),
    ),
    Decoder("inputs request", decode_wanted, InputsRefused, pack_of(Wanted(bytes(32), 0, 1, 2, 3))),
    Decoder("inputs reply", decode_descriptor, InputsRefused, pack_of(Descriptor(PART, None), Descriptor(PART, PART))),
    Decoder("blob request", decode_want, ValueError, pack_of(WantIndex(bytes(32)), WantChunk(bytes(32), 7))),
    Decoder("hello", decode_hello, ValueError, pack_of(Hello(("/ip4/1.2.3.4/tcp/5",), ((PEER, ("/dns/a/tcp/1",)),)))),
    Decoder(
        "discovery",
        decode_discovery,
        RecordError,
        pack_of(FindRecords("tasks"), TakeRecords((sign_record(KEYS[0], "tasks", b"x", 1, 600),))),
    ),
    Decoder("frame head", lambda data: decode_frame(data, 1 << 20), FrameError, (FRAME.encode(),)),
    Decoder("frame control", decode_control, FrameError, (Control(ControlKind.GRANT, bytes(32), 9).encode(),)),
    Decoder("frame lengths", lambda data: decode_lengths(data, FRAME), FrameError, (encode_lengths((8, 32)),)),
    Decoder("tensor message", lambda data: decode_message(data, TENSORS), MessageError, (encode_header(SHOWN),)),
    Decoder(
        "bare message",
        lambda data: decode_message(data, ()),
        MessageError,
        (encode_header(Commit(0, 1)), encode_header(Reduce(0, 1, 1, (PEER,), (PEER,)))),
    ),
    Decoder(
        "state manifest",
        lambda data: decode_state_manifest(data, address_of(data)),
        StageError,
        (state_of(3).manifest.encode(),),
    ),
    Decoder("task manifest", decode_manifest, ManifestError, (encode_manifest(small_manifest(stages=2)),)),
    Decoder("transaction", decode_transaction, DecodeError, tuple(ENCODED)),
    Decoder(
        "consensus",
        decode_consensus,
        DecodeError,
        (encode(vote(KEYS[0])), encode(proposal(block())), encode(proposal(block(2))), encode(CERTIFICATE)),
    ),
    Decoder(
        "sync request",
        lambda data: decode_request(data, CHAIN),
        (DecodeError, Refused),
        (encode(StatusRequest(CHAIN, 5)), encode(RangeRequest(CHAIN, 1, 8))),
    ),
    Decoder("sync status", decode_status, DecodeError, (encode(StatusReply(5, bytes(32), 1)),)),
    Decoder(
        "sync range",
        decode_range,
        DecodeError,
        (pack_range([(encode(block()), encode(CERTIFICATE)), (encode(block(2)), encode(CERTIFICATE))]),),
    ),
    Decoder("genesis file", lambda data: read_genesis(data, "it"), UserError, (to_json(genesis_of()).encode(),)),
    Decoder("state record", lambda data: decode_record(Table.ACCOUNTS, data), DecodeError, (ACCOUNT,)),
)
NESTED = tuple(byte * depth for byte in (b"\x91", b"\x81", b"[", b'{"a":') for depth in (200, 5000, 200_000))


def read(decoder: Decoder, data: bytes) -> None:
    """Decode, and fail on anything but a value or a refusal that says something."""
    try:
        decoder.decode(data)
    except decoder.refusal as error:
        assert not isinstance(error, UnicodeDecodeError | RecursionError)
        assert str(error)


def by_name(decoder: Decoder) -> str:
    return decoder.name


@st.composite
def damaged(draw: st.DrawFn, samples: tuple[bytes, ...]) -> bytes:
    """Draw one of the samples, cut, stretched, overwritten or with a piece taken out."""
    data = bytearray(draw(st.sampled_from(samples)))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 3)):
            case 0:
                del data[place:]
            case 1:
                data[place:place] = draw(st.binary(min_size=1, max_size=12))
            case 2:
                data[place : place + 1] = bytes([draw(st.integers(0, 255))])
            case _:
                del data[place : place + draw(st.integers(1, 9))]
    return bytes(data)


@pytest.mark.parametrize("decoder", DECODERS, ids=by_name)
def test_the_samples_are_read(decoder: Decoder) -> None:
    for sample in decoder.samples:
        assert decoder.decode(sample) is not None


@pytest.mark.parametrize("decoder", DECODERS, ids=by_name)
@given(data=st.data())
@settings(max_examples=40)
def test_damaged_samples_are_read_or_refused(decoder: Decoder, data: st.DataObject) -> None:
    read(decoder, data.draw(damaged(decoder.samples)))


@pytest.mark.parametrize("decoder", DECODERS, ids=by_name)
@given(data=st.binary(max_size=200))
@settings(max_examples=40)
def test_random_bytes_are_read_or_refused(decoder: Decoder, data: bytes) -> None:
    read(decoder, data)


@pytest.mark.parametrize("decoder", DECODERS, ids=by_name)
def test_every_cut_of_a_sample_is_refused(decoder: Decoder) -> None:
    for sample in decoder.samples:
        for length in range(0, len(sample), max(1, len(sample) // 150)):
            with pytest.raises(decoder.refusal):
                decoder.decode(sample[:length])


@pytest.mark.parametrize("decoder", DECODERS, ids=by_name)
def test_what_follows_a_sample_is_refused(decoder: Decoder) -> None:
    for sample in decoder.samples:
        for more in (b"\x00", b"\xc0", sample, bytes(100_000)):
            with pytest.raises(decoder.refusal):
                decoder.decode(sample + more)


@pytest.mark.parametrize("decoder", DECODERS, ids=by_name)
def test_deep_nesting_and_text_that_is_none_are_refused(decoder: Decoder) -> None:
    texts = (b"\xa2\xff\xff", b"\x92\x01\xa2\xff\xff", b'"\xff"')
    for data in (*NESTED, *(b"\x92\x01" + nested for nested in NESTED), *texts):
        with pytest.raises(decoder.refusal):
            decoder.decode(data)
        read(decoder, data)
