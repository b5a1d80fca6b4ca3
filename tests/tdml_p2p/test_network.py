"""Real hosts on 127.0.0.1: identity, encryption, gossip, requests and shutdown."""

import pytest
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.pubsub.pb.rpc_pb2 import ControlPrune
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport

from chain.keys import peer_id
from tdml_p2p.gossip import MAX_MESSAGE_BYTES, MAX_WAITING, Disposition
from tdml_p2p.host import Network, NetworkConfig
from tdml_p2p.peers import ConnectFailed, peer_info
from tdml_p2p.requests import Refused, RequestFailed, RequestReason
from tests.tdml_p2p.network_kit import CHAIN, key, meshed, until


def collector(into: list[bytes], verdict: Disposition = Disposition.ACCEPT):
    def handle(_sender: str, data: bytes) -> Disposition:
        into.append(data)
        return verdict

    return handle


async def test_a_peer_is_its_account() -> None:
    async with Network.open(NetworkConfig(), key(0), CHAIN) as network:
        assert str(network.host.get_id()) == network.peer == peer_id(key(0).account)
        assert network.addresses[0].endswith(f"/p2p/{network.peer}")
        assert network.peers() == ()


async def test_plaintext_is_refused() -> None:
    async with Network.open(NetworkConfig(), key(0), CHAIN) as network:
        pair = create_new_key_pair(bytes([9]) * 32)
        other = new_host(key_pair=pair, sec_opt={PLAINTEXT_PROTOCOL_ID: InsecureTransport(pair)})
        async with other.run([]):
            with pytest.raises(BaseLibp2pError):
                await other.connect(peer_info(network.addresses[0]))
        assert network.host.get_connected_peers() == []


class Slow:
    """A handler of a slow topic that answers when it may."""

    def __init__(self, verdict: Disposition = Disposition.ACCEPT) -> None:
        self.may = trio.Event()
        self.heard: list[bytes] = []
        self._verdict = verdict

    async def handle(self, _sender: str, data: bytes) -> Disposition:
        self.heard.append(data)
        await self.may.wait()
        return self._verdict


async def test_other_topics_do_not_wait_for_a_slow_one() -> None:
    async with meshed(3) as peers:
        slow = [Slow() for _ in peers]
        votes: list[bytes] = []
        for peer, one in zip(peers, slow, strict=True):
            peer.on_slow_topic("tx", one.handle)
            peer.on_topic("vote", collector(votes))
        await until(lambda: all(peer.gossip.mesh(topic) > 0 for peer in peers for topic in ("tx", "vote")))
        await peers[0].publish("tx", b"long")
        await until(lambda: slow[1].heard == slow[2].heard == [b"long"])
        await peers[0].publish("vote", b"short")
        await until(lambda: votes == [b"short", b"short"])
        for one in slow:
            one.may.set()
        await until(lambda: all(peer.gossip.counts["accept"] == 2 for peer in peers[1:]))
        assert slow[1].heard == slow[2].heard == [b"long"]


async def test_what_waits_for_a_slow_topic_is_bounded() -> None:
    async with meshed(2) as (sender, receiver):
        slow = Slow()
        sender.on_slow_topic("tx", Slow().handle)
        receiver.on_slow_topic("tx", slow.handle)
        await until(lambda: sender.gossip.mesh("tx") > 0)
        for number in range(MAX_WAITING + 5):
            await sender.publish("tx", number.to_bytes(2, "big"))
        await until(lambda: receiver.gossip.counts["dropped"] >= 5)
        assert len(slow.heard) == MAX_WAITING
        slow.may.set()
        await until(lambda: receiver.gossip.counts["accept"] == MAX_WAITING)
        await sender.publish("tx", b"later")
        await until(lambda: slow.heard[-1] == b"later")


async def test_a_false_message_of_a_slow_topic_is_charged_and_goes_no_further() -> None:
    async with meshed(2) as (sender, receiver):
        slow = Slow(Disposition.REJECT)
        slow.may.set()
        sender.on_slow_topic("tx", Slow().handle)
        receiver.on_slow_topic("tx", slow.handle)
        await until(lambda: sender.gossip.mesh("tx") > 0)
        await sender.publish("tx", b"false")
        await until(lambda: receiver.gossip.counts["reject"] == 1)
        assert receiver.limits.penalty(sender.peer) > 0


async def test_a_message_reaches_everybody_once() -> None:
    async with meshed(5) as peers:
        heard: list[list[bytes]] = [[] for _ in peers]
        for peer, into in zip(peers, heard, strict=True):
            peer.on_topic("vote", collector(into))
        await until(lambda: all(peer.gossip.mesh("vote") > 0 for peer in peers))
        await peers[3].publish("vote", b"first")
        await until(lambda: sum(map(len, heard)) == 4)
        large = bytes(MAX_MESSAGE_BYTES)
        await peers[0].publish("vote", large)
        await until(lambda: sum(map(len, heard)) == 8)
        assert heard[3] == [large]
        assert heard[0] == [b"first"]
        assert all(into == [b"first", large] for into in (heard[1], heard[2], heard[4]))
        with pytest.raises(ValueError, match="exceeds"):
            await peers[0].publish("vote", large + b"x")


async def test_a_late_joiner_is_heard_by_everybody() -> None:
    async with meshed(3) as peers:
        heard: list[list[bytes]] = [[] for _ in peers]
        for peer, into in zip(peers, heard, strict=True):
            peer.on_topic("tx", collector(into))
        config = NetworkConfig(bootstrap=(peers[0].addresses[0],))
        async with Network.open(config, key(7), CHAIN) as late:
            late.on_topic("tx", collector([]))
            await until(lambda: late.peers() != ())
            await late.publish("tx", b"hello")
            await until(lambda: all(into == [b"hello"] for into in heard))


async def test_who_is_outside_every_mesh_is_heard_by_everybody() -> None:
    async with meshed(5) as peers:
        heard: list[list[bytes]] = [[] for _ in peers]
        for peer, into in zip(peers, heard, strict=True):
            peer.on_topic("vote", collector(into))
        await until(lambda: all(peer.gossip.mesh("vote") > 0 for peer in peers))
        alone = peers[2].gossip.router
        (topic,) = alone.mesh
        for other in list(alone.pubsub.peer_topics[topic]):
            await alone.handle_prune(ControlPrune(topicID=topic, backoff=5), other)
        assert peers[2].gossip.mesh("vote") == 0
        own = alone.pubsub.my_id
        assert len(list(alone._get_peers_to_send([topic], own, own))) == alone.degree
        assert not list(alone._get_peers_to_send([topic], ID(b"other"), ID(b"other")))
        await peers[2].publish("vote", b"here")
        await until(lambda: all(into == [b"here"] for number, into in enumerate(heard) if number != 2))


async def test_a_rejected_message_stops_and_its_senders_are_charged() -> None:
    async with meshed(2) as peers:
        heard: list[bytes] = []
        peers[0].on_topic("tx", collector([]))
        peers[1].on_topic("tx", collector(heard, Disposition.REJECT))
        await until(lambda: peers[0].gossip.mesh("tx") > 0)
        await peers[0].publish("tx", b"bad")
        await until(lambda: heard == [b"bad"])
        assert peers[1].limits.penalty(peers[0].peer) > 0
        assert peers[1].gossip.counts["reject"] == 1


async def test_a_failing_handler_costs_one_message() -> None:
    async with meshed(2) as peers:
        heard: list[bytes] = []

        def fail_once(_sender: str, data: bytes) -> Disposition:
            heard.append(data)
            if len(heard) == 1:
                raise RuntimeError("a fault of the handler")
            return Disposition.ACCEPT

        peers[0].on_topic("tx", collector([]))
        peers[1].on_topic("tx", fail_once)
        await until(lambda: peers[0].gossip.mesh("tx") > 0)
        await peers[0].publish("tx", b"1")
        await peers[0].publish("tx", b"2")
        await until(lambda: heard == [b"1", b"2"])
        assert peers[1].gossip.counts["failed"] == 1


async def test_requests_answers_and_refusals() -> None:
    async with meshed(2) as (first, second):

        async def serve(sender: str, data: bytes) -> bytes:
            if data == b"refuse":
                raise Refused("not-today")
            if data == b"malformed":
                raise ValueError("odd bytes")
            if data == b"fault":
                raise RuntimeError("a fault of the handler")
            return sender.encode() + data

        first.on_request("/tdml/test/1", serve, 100)

        async def ask(data: bytes, limit: int = 1000) -> bytes:
            return await second.request(first.peer, "/tdml/test/1", data, limit=limit, timeout=5)

        async def reason(data: bytes, limit: int = 1000) -> str:
            with pytest.raises(RequestFailed) as failed:
                await ask(data, limit)
            return failed.value.reason

        assert await ask(b"x") == second.peer.encode() + b"x"
        assert await ask(b"") == second.peer.encode()
        assert await reason(b"refuse") == "not-today"
        assert await reason(b"malformed") == "malformed: odd bytes"
        assert await reason(b"fault") == RequestReason.INTERNAL
        assert await reason(bytes(101)) == RequestReason.REQUEST_TOO_LARGE
        assert await reason(b"x", limit=8) == RequestReason.REPLY_TOO_LARGE
        with pytest.raises(RequestFailed) as failed:
            await second.request(first.peer, "/tdml/other/1", b"", limit=9, timeout=5)
        assert failed.value.reason == RequestReason.UNREACHABLE
        with pytest.raises(RequestFailed) as failed:
            await second.request(peer_id(key(9).account), "/tdml/test/1", b"", limit=9, timeout=5)
        assert failed.value.reason == RequestReason.UNREACHABLE


async def test_a_slow_answer_times_out_and_the_connection_survives() -> None:
    async with meshed(2) as (first, second):

        async def serve(_sender: str, data: bytes) -> bytes:
            if data == b"slow":
                await trio.sleep_forever()
            return data

        first.on_request("/tdml/test/1", serve, 100)
        with pytest.raises(RequestFailed) as failed:
            await second.request(first.peer, "/tdml/test/1", b"slow", limit=9, timeout=0.1)
        assert failed.value.reason == RequestReason.TIMEOUT
        assert await second.request(first.peer, "/tdml/test/1", b"quick", limit=9, timeout=5) == b"quick"
        assert second.peers() == (first.peer,)


async def test_a_peer_of_another_network_is_not_a_neighbour() -> None:
    async with (
        Network.open(NetworkConfig(), key(0), CHAIN) as network,
        Network.open(NetworkConfig(), key(1), bytes(32)) as stranger,
    ):
        with pytest.raises(ConnectFailed, match="no answer from a peer of this network"):
            await stranger.connect(network.addresses[0])
        assert network.peers() == ()
        assert stranger.peers() == ()
