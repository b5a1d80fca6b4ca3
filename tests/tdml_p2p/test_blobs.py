"""Blobs: the store, and transfers from honest, lying and incomplete providers."""

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from tdml_p2p import blob_transfer
from tdml_p2p.blob_store import BlobStore, DiskFull
from tdml_p2p.blob_transfer import ABSENT, PROTOCOL, BlobUnavailable, WantChunk, WantIndex, _encoder, decode_want
from tdml_p2p.host import Network
from tdml_p2p.requests import Refused, RequestFailed, RequestReason
from tdml_p2p.streams import abandon, finish, read_exactly, write
from tests.tdml_p2p.network_kit import CHAIN, QUICK, key, meshed, until
from trainer.content import CHUNK_BYTES, address_of, index_of


def content(size: int) -> bytes:
    return blake3(size.to_bytes(8, "big")).digest(length=size)


SIZES = [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 17]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("is_on_disk", [False, True])
async def test_a_store_returns_what_was_put(size: int, is_on_disk: bool, tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs" if is_on_disk else None)
    data = content(size)
    address = await store.put(data)
    assert address == address_of(data)
    again = BlobStore(tmp_path / "blobs") if is_on_disk else store
    assert await again.index(address) == index_of(data)
    chunks = [await again.chunk(address, number) for number in range(len(index_of(data).chunks))]
    assert b"".join(chunk or b"" for chunk in chunks) == data
    assert await again.index(bytes(32)) is None


async def test_sources_are_asked_and_believed_only_when_true() -> None:
    store = BlobStore(None)
    data = content(5000)
    held: dict[bytes, bytes] = {address_of(data): data, bytes(32): b"not the one"}
    store.add_source(held.get)
    assert await store.index(address_of(data)) == index_of(data)
    assert await store.index(bytes(32)) is None


async def test_what_is_held_no_longer_or_damaged_comes_from_others(tmp_path: Path) -> None:
    data = content(CHUNK_BYTES + 5)
    async with meshed(2) as (holder, asker):
        address = await holder.blobs.put(data)
        mine: dict[bytes, bytes] = {address: data}
        asker.blobs.add_source(mine.get)
        assert await asker.blobs.fetch(address, []) == data
        mine.clear()
        assert await asker.blobs.fetch(address, [holder.peer]) == data
        asker.blobs.store = BlobStore(tmp_path)
        await asker.blobs.put(data)
        (tmp_path / address.hex()).write_bytes(data[:-1] + b"?")
        assert await asker.blobs.fetch(address, [holder.peer]) == data


async def test_a_guarded_blob_is_not_there_for_others() -> None:
    async with meshed(2) as (holder, asker):
        secret, plain = await holder.blobs.put(b"secret"), await holder.blobs.put(b"plain")
        holder.blobs.guard(lambda peer, address: address != secret)
        assert await asker.blobs.fetch(plain, [holder.peer]) == b"plain"
        with pytest.raises(BlobUnavailable, match=ABSENT):
            await asker.blobs.fetch(secret, [holder.peer])
        holder.blobs.guard(lambda peer, address: peer == asker.peer)
        assert await asker.blobs.fetch(secret, [holder.peer]) == b"secret"


async def test_a_full_disk_has_a_name_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BlobStore(tmp_path)

    def no_space(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(DiskFull, match="No space is left"):
        await store.put(b"data")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", SIZES)
async def test_a_blob_arrives_whole(size: int) -> None:
    async with meshed(2) as (first, second):
        address = await first.blobs.put(content(size))
        assert bytes(await second.blobs.fetch(address, [first.peer])) == content(size)


async def test_memory_of_the_provider_is_served_while_it_is_there() -> None:
    async with meshed(2) as (first, second):
        data = content(2 * CHUNK_BYTES)
        held: list[bytes] = [data]
        first.blobs.provide(address_of(data), lambda: memoryview(held[0]) if held else None)
        assert bytes(await second.blobs.fetch(address_of(data), [first.peer])) == data
        held.clear()
        with pytest.raises(BlobUnavailable, match=ABSENT):
            await second.blobs.fetch(address_of(data), [first.peer])


async def test_a_lying_provider_is_found_out_and_the_honest_one_used() -> None:
    async with meshed(3) as (liar, honest, reader):
        data = content(6 * CHUNK_BYTES + 5)
        address = await honest.blobs.put(data)
        truth = honest.blobs

        async def lie(sender: str, request: bytes) -> bytes:
            reply = await truth._serve(sender, request)
            return reply if isinstance(decode_want(request), WantIndex) else bytes(len(reply))

        liar.on_request(PROTOCOL, lie, 256)
        assert bytes(await reader.blobs.fetch(address, [liar.peer, honest.peer])) == data
        assert reader.limits.penalty(liar.peer) > 0
        assert reader.limits.penalty(honest.peer) == 0
        with pytest.raises(BlobUnavailable, match="false bytes"):
            await reader.blobs.fetch(address, [liar.peer])


async def test_of_a_liar_a_silent_holder_and_an_honest_one_only_the_liar_is_blamed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blob_transfer, "_PATIENCE_SECONDS", 0.2)
    async with meshed(4) as (liar, silent, honest, reader):
        data = content(9 * CHUNK_BYTES + 5)
        address = await honest.blobs.put(data)
        asked: list[int] = []

        async def lie(sender: str, request: bytes) -> bytes:
            reply = await honest.blobs._serve(sender, request)
            return reply if isinstance(decode_want(request), WantIndex) else bytes(len(reply))

        async def stay_silent(_sender: str, request: bytes) -> bytes:
            asked.append(len(request))
            await trio.sleep_forever()

        liar.on_request(PROTOCOL, lie, 256)
        silent.on_request(PROTOCOL, stay_silent, 256)
        providers = [silent.peer, liar.peer, honest.peer]
        with trio.fail_after(blob_transfer._SECONDS / 2):
            assert bytes(await reader.blobs.fetch(address, providers)) == data
        assert len(asked) <= 1 + blob_transfer._PARALLEL
        assert reader.limits.penalty(liar.peer) > 0
        assert reader.limits.penalty(silent.peer) == 0
        assert reader.limits.penalty(honest.peer) == 0


@pytest.mark.parametrize("reply", [b"", b"\xc1", b"junk", bytes(100_000)])
async def test_a_false_index_is_refused(reply: bytes) -> None:
    async with meshed(2) as (liar, reader):

        async def lie(_sender: str, _request: bytes) -> bytes:
            return reply

        liar.on_request(PROTOCOL, lie, 256)
        with pytest.raises(BlobUnavailable):
            await reader.blobs.fetch(bytes(32), [liar.peer])
        assert reader.limits.penalty(liar.peer) > 0


async def test_two_providers_with_a_half_each_make_a_whole() -> None:
    async with meshed(3) as (even, odd, reader):
        data = content(6 * CHUNK_BYTES)
        address = await even.blobs.put(data)
        await odd.blobs.put(data)
        for rest, holder in enumerate((even, odd)):
            serve = holder.blobs._serve

            async def half(sender: str, request: bytes, serve=serve, rest: int = rest) -> bytes:
                want = decode_want(request)
                if isinstance(want, WantChunk) and (want.count > 1 or want.number % 2 != rest):
                    raise Refused(ABSENT)
                return await serve(sender, request)

            holder.on_request(PROTOCOL, half, 256)
        assert bytes(await reader.blobs.fetch(address, [even.peer, odd.peer])) == data


@pytest.mark.parametrize("false", [0, CHUNK_BYTES - 1, CHUNK_BYTES, 2 * CHUNK_BYTES - 1])
async def test_a_false_byte_in_either_chunk_of_a_reply_is_found(false: int) -> None:
    async with meshed(2) as (liar, reader):
        data = content(6 * CHUNK_BYTES)
        address = await liar.blobs.put(data)
        serve = liar.blobs._serve

        async def lie(sender: str, request: bytes) -> bytes:
            reply = bytearray(await serve(sender, request))
            if isinstance(decode_want(request), WantChunk):
                reply[false] ^= 1
            return bytes(reply)

        liar.on_request(PROTOCOL, lie, 256)
        with pytest.raises(BlobUnavailable, match="false bytes"):
            await reader.blobs.fetch(address, [liar.peer])
        assert reader.limits.penalty(liar.peer) > 0


async def test_chunks_that_follow_each_other_come_in_one_reply() -> None:
    async with meshed(2) as (holder, reader):
        data = content(5 * CHUNK_BYTES + 7)
        address = await holder.blobs.put(data)
        asked: list[tuple[int, int]] = []
        serve = holder.blobs._serve

        async def count(sender: str, request: bytes) -> bytes:
            want = decode_want(request)
            if isinstance(want, WantChunk):
                asked.append((want.number, want.count))
            return await serve(sender, request)

        holder.on_request(PROTOCOL, count, 256)
        assert bytes(await reader.blobs.fetch(address, [holder.peer])) == data
        assert sorted(asked) == [(0, 2), (2, 2), (4, 2)]


async def test_a_broken_reply_loses_nothing_of_what_has_come() -> None:
    async with meshed(3) as (fragile, other, reader):
        data = content(24 * CHUNK_BYTES)
        address = await fragile.blobs.put(data)
        await other.blobs.put(data)
        asked: list[WantChunk] = []

        async def break_off(stream: Any) -> None:
            length = int.from_bytes(await read_exactly(stream, 4), "big")
            reply = await fragile.blobs._serve(reader.peer, request := await read_exactly(stream, length))
            await write(stream, b"\0" + len(reply).to_bytes(4, "big") + bytes(reply[: 3 * CHUNK_BYTES]))
            await (abandon(stream) if isinstance(decode_want(request), WantChunk) else finish(stream))

        async def count(sender: str, request: bytes, serve=other.blobs._serve) -> bytes:
            want = decode_want(request)
            asked.extend([want] if isinstance(want, WantChunk) else [])
            return await serve(sender, request)

        fragile.host.set_stream_handler(PROTOCOL, break_off)
        other.on_request(PROTOCOL, count, 256)
        assert bytes(await reader.blobs.fetch(address, [fragile.peer, other.peer])) == data
        assert reader.blobs.bytes_fetched == len(data)
        assert any(want.number % blob_transfer.MAX_SPAN for want in asked)
        assert not reader.limits.penalty(fragile.peer)


async def test_a_provider_with_too_much_on_its_way_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdml_p2p.requests.MAX_FLYING_BYTES_OF_ONE", 9 * CHUNK_BYTES)
    async with meshed(2) as (holder, reader):
        data = content(48 * CHUNK_BYTES)
        address = await holder.blobs.put(data)
        fetched: list[bytes] = []

        async def fetch() -> None:
            fetched.append(bytes(await reader.blobs.fetch(address, [holder.peer])))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(fetch)
        assert fetched == [data] * 3
        assert holder.requests.refused[RequestReason.BUSY]


async def test_who_holds_nothing_is_not_asked_for_every_chunk() -> None:
    async with meshed(4) as (holder, *empty, reader):
        data = content(24 * CHUNK_BYTES)
        address = await holder.blobs.put(data)
        asked = 0
        for other in empty:

            async def count(sender: str, request: bytes, serve=other.blobs._serve) -> bytes:
                nonlocal asked
                asked += 1
                return await serve(sender, request)

            other.on_request(PROTOCOL, count, 256)
        providers = [empty[0].peer, holder.peer, empty[1].peer]
        assert bytes(await reader.blobs.fetch(address, providers)) == data
        assert asked <= 1 + blob_transfer._PARALLEL


async def test_what_is_larger_than_wanted_is_not_fetched() -> None:
    async with meshed(2) as (first, second):
        address = await first.blobs.put(content(CHUNK_BYTES + 1))
        with pytest.raises(BlobUnavailable, match="over"):
            await second.blobs.fetch(address, [first.peer], CHUNK_BYTES)


async def test_no_provider_is_an_error_that_says_so() -> None:
    async with meshed(1) as (peer,):
        with pytest.raises(BlobUnavailable, match="none was named"):
            await peer.blobs.fetch(bytes(32), [])


async def test_a_download_continues_where_it_stopped(tmp_path: Path) -> None:
    async with meshed(1) as (holder,):
        config = replace(QUICK, home=tmp_path, bootstrap=(holder.addresses[0],))
        async with Network.open(config, key(5), CHAIN) as reader:
            await until(lambda: reader.peers() != ())
            data = content(5 * CHUNK_BYTES)
            address = await holder.blobs.put(data)
            asked: list[int] = []
            serve = holder.blobs._serve

            async def until_three(sender: str, request: bytes) -> bytes:
                want = decode_want(request)
                if isinstance(want, WantChunk):
                    if want.count > 1:
                        raise Refused(ABSENT)
                    asked.append(want.number)
                    if len(asked) > 3:
                        raise Refused(ABSENT)
                return await serve(sender, request)

            holder.on_request(PROTOCOL, until_three, 256)
            with pytest.raises(BlobUnavailable):
                await reader.blobs.download(address, [holder.peer])
            got = set(asked[:3])
            asked[:] = [-1, -1]
            holder.on_request(PROTOCOL, serve, 256)
            path = await reader.blobs.download(address, [holder.peer])
            assert path.read_bytes() == data
            assert path == tmp_path / "blobs" / address.hex()
            assert len(got) == 3
            assert reader.blobs.bytes_fetched == len(data)
            assert bytes(await reader.blobs.fetch(address, [])) == data
            assert sorted(file.name for file in path.parent.iterdir()) == [address.hex(), f"{address.hex()}.index"]


async def test_requests_beyond_the_blob_are_refused() -> None:
    async with meshed(2) as (first, second):
        address = await first.blobs.put(content(10))
        for want in (WantChunk(address, 1), WantChunk(address, 0, 2), WantChunk(bytes(32), 0), WantIndex(bytes(32))):
            with pytest.raises(RequestFailed) as failed:
                await second.request(first.peer, PROTOCOL, _encoder.encode(want), limit=100, timeout=5)
            assert failed.value.reason == ABSENT


@given(st.binary(max_size=100))
def test_any_bytes_are_a_want_or_an_error(data: bytes) -> None:
    try:
        want = decode_want(data)
    except ValueError:
        return
    assert len(want.address) == 32
