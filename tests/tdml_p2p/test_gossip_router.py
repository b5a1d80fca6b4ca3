"""The mesh of gossip in virtual time: routers of many peers, a link with jitter, no sockets."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from libp2p.peer.id import ID
from libp2p.pubsub import gossipsub
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11
from libp2p.pubsub.pb import rpc_pb2
from trio.testing import MockClock

from tdml_p2p.gossip_router import Router, make_router

TOPIC, OTHER = "block", "vote"
SECONDS = 60.0


class Mesh:
    """Routers that know each other, whose control messages arrive after a jitter."""

    def __init__(self, count: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names = [ID(bytes([number])) for number in range(count)]
        self.routers: dict[ID, Router] = {}
        self.longest_alone: dict[ID, float] = dict.fromkeys(self.names, 0.0)
        self.widest = 0
        self._chance = random.Random(seed)
        random.seed(seed)  # the stock router draws from it
        self.clock = MockClock(autojump_threshold=0)
        clock = SimpleNamespace(time=lambda: 1_000_000.0 + self.clock.current_time())
        monkeypatch.setattr(gossipsub, "time", clock)

    async def run(self) -> None:
        """Have the peers join one after another and live for a while."""
        async with trio.open_nursery() as nursery:
            for name in self.names:
                self._add(name, nursery)
                await trio.sleep(self._chance.uniform(0.0, 1.5))
            await self._watch()
            nursery.cancel_scope.cancel()

    def _add(self, name: ID, nursery: trio.Nursery) -> None:
        router = make_router()
        known = list(self.routers)
        topics = {topic: set(known) for topic in (TOPIC, OTHER)}
        router.pubsub = SimpleNamespace(my_id=name, peer_topics=topics)  # type: ignore[assignment]
        router.peer_protocol = dict.fromkeys(known, PROTOCOL_ID_V11)
        router.mesh = {TOPIC: set(), OTHER: set()}
        router.send_rpc = lambda peer, rpc, priority=False: nursery.start_soon(  # type: ignore[method-assign]
            self._deliver, name, peer, rpc
        )
        for other in known:
            pubsub: Any = self.routers[other].pubsub
            for topic in (TOPIC, OTHER):
                pubsub.peer_topics[topic].add(name)
            self.routers[other].peer_protocol[name] = PROTOCOL_ID_V11
        self.routers[name] = router
        nursery.start_soon(router.heartbeat)

    async def _deliver(self, sender: ID, to: ID, rpc: rpc_pb2.RPC) -> None:
        await trio.sleep(self._chance.expovariate(200.0))
        router = self.routers[to]
        for graft in rpc.control.graft:
            await router.handle_graft(graft, sender)
        for prune in rpc.control.prune:
            await router.handle_prune(prune, sender)

    async def _watch(self) -> None:
        alone: dict[ID, float] = dict.fromkeys(self.names, 0.0)
        for _ in range(int(SECONDS * 10)):
            await trio.sleep(0.1)
            for name, router in self.routers.items():
                alone[name] = 0.0 if router.mesh[TOPIC] else alone[name] + 0.1
                self.longest_alone[name] = max(self.longest_alone[name], alone[name])
                self.widest = max(self.widest, len(router.mesh[TOPIC]))


@pytest.mark.parametrize("count", [4, 7, 12])
def test_nobody_stays_outside_the_mesh(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(6):
        mesh = Mesh(count, seed, monkeypatch)
        trio.run(mesh.run, clock=mesh.clock)
        back_off = make_router().prune_back_off
        assert max(mesh.longest_alone.values()) <= back_off + 4, f"seed {seed}"
        assert mesh.widest <= 8
        for name, router in mesh.routers.items():
            ours = {other for other in mesh.names if name in mesh.routers[other].mesh[TOPIC]}
            assert router.mesh[TOPIC] == ours, "one-sided"
            assert 2 <= len(router.mesh[TOPIC]) <= 4


async def test_refusals_do_not_lengthen_the_back_off(autojump_clock: MockClock) -> None:
    router, peer, refused = make_router(), ID(b"p"), []
    router.mesh = {TOPIC: set()}
    router.emit_prune = lambda *said: _note(refused, said)  # type: ignore[method-assign]
    router._pruned[TOPIC, peer] = trio.current_time() + router.prune_back_off
    graft = rpc_pb2.ControlGraft(topicID=TOPIC)
    for _ in range(10):
        await router.handle_graft(graft, peer)
        await trio.sleep(0.49)
    assert len(refused) == 10
    await trio.sleep(0.2)
    await router.handle_graft(graft, peer)
    assert router.mesh[TOPIC] == {peer}


async def test_who_is_pruned_is_refused_for_a_while(autojump_clock: MockClock) -> None:
    router, refused = make_router(), []
    peers = {ID(bytes([number])) for number in range(6)}
    router.mesh = {TOPIC: set(peers)}
    router.pubsub = SimpleNamespace(peer_topics={TOPIC: peers})  # type: ignore[assignment]
    router.emit_prune = lambda *said: _note(refused, said)  # type: ignore[method-assign]
    _, pruned = router.mesh_heartbeat()
    assert len(router.mesh[TOPIC]) == router.degree_high
    for peer in pruned:
        await router.handle_graft(rpc_pb2.ControlGraft(topicID=TOPIC), peer)
    assert len(refused) == len(pruned) == 2
    await trio.sleep(router.prune_back_off)
    for peer in pruned:
        await router.handle_graft(rpc_pb2.ControlGraft(topicID=TOPIC), peer)
    assert router.mesh[TOPIC] == peers


@pytest.mark.parametrize("told", [0, 5, 2**40])
async def test_who_was_pruned_asks_later_than_it_would_be_refused(told: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1_000.9]
    monkeypatch.setattr(gossipsub, "time", SimpleNamespace(time=lambda: now[0]))
    router, peer = make_router(), ID(b"p")
    router.mesh = {TOPIC: {peer}}
    await router.handle_prune(rpc_pb2.ControlPrune(topicID=TOPIC, backoff=told), peer)
    waits = 0.0
    while waits < 100.0 and router._check_back_off(peer, TOPIC):
        waits += 0.1
        now[0] += 0.1
    assert router.prune_back_off + 1.0 <= waits <= 63.0


async def test_a_crowd_does_not_fill_the_mesh() -> None:
    router, refused = make_router(), []
    router.mesh = {TOPIC: set()}
    router.emit_prune = lambda *said: _note(refused, said)  # type: ignore[method-assign]
    for number in range(100):
        await router.handle_graft(rpc_pb2.ControlGraft(topicID=TOPIC), ID(bytes([number])))
    assert (len(router.mesh[TOPIC]), len(refused)) == (8, 92)


async def test_each_peer_is_told_what_concerns_it() -> None:
    router, sent = make_router(), {}
    router.pubsub = SimpleNamespace()  # type: ignore[assignment]
    router.send_rpc = lambda peer, rpc, priority=False: sent.update({peer: rpc.control})  # type: ignore[method-assign]
    one, two, three = (ID(bytes([number])) for number in range(3))
    await router._emit_control_msgs(
        {one: [TOPIC], two: [OTHER]}, {one: [OTHER], three: [TOPIC]}, {two: {TOPIC: [b"x"]}}
    )
    said = {
        peer: ([g.topicID for g in control.graft], [p.topicID for p in control.prune], len(control.ihave))
        for peer, control in sent.items()
    }
    assert said == {one: ([TOPIC], [OTHER], 0), two: ([OTHER], [], 1), three: ([], [TOPIC], 0)}


async def _note(into: list[Any], said: Any) -> None:
    into.append(said)
