"""The router under `gossip`: GossipSub's mesh with a degree for consensus, and nobody left out of it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import trio
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pb import rpc_pb2

_MAX_BACK_OFF_SECONDS = 60
_SLACK_SECONDS = 2
"""What the clocks of two peers, cut to whole seconds, and a heartbeat may differ by."""


class Router(GossipSub):
    """GossipSub that believes no unsigned origin: what a message is worth is decided by its handler.

    It leaves nobody alone for long. A peer is let in again as soon as the back-off of its being pruned is over,
    however often it asks meanwhile (the stock router begins the back-off anew with every refusal, on both
    sides, and a peer that everybody has refused once never gets in). Who was pruned asks a little later than
    it is refused for, and until then what it says itself goes to peers outside its mesh. Peers have no scores:
    the stock router would graft beyond the degree every heartbeat for their sake, and prune others for it.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.scorer = None
        self._pruned: dict[tuple[str, Any], float] = {}

    def mesh_heartbeat(self) -> tuple[Any, Any]:
        """Return whom to graft and whom to prune, by peer with their topics."""
        now = trio.current_time()
        self._pruned = {name: until for name, until in self._pruned.items() if until > now}
        grafts, prunes = super().mesh_heartbeat()
        for peer, topics in prunes.items():
            self._pruned |= {(topic, peer): now + self.prune_back_off for topic in topics}
        return grafts, prunes

    async def handle_graft(self, graft_msg: Any, sender_peer_id: Any) -> None:
        """Let a peer into the mesh, unless it was pruned just now or far too many have been let in."""
        topic = graft_msg.topicID
        mesh = self.mesh.get(topic)
        if mesh is not None and sender_peer_id in mesh:
            return
        is_pruned = self._pruned.get((topic, sender_peer_id), 0.0) > trio.current_time()
        if mesh is None or is_pruned or len(mesh) >= 2 * self.degree_high:
            await self.emit_prune(topic, sender_peer_id, False, False)
            return
        mesh.add(sender_peer_id)
        self._notify_mesh_peer_added(sender_peer_id, topic)

    async def handle_prune(self, prune_msg: Any, sender_peer_id: Any) -> None:
        """Leave the mesh of a peer, and do not ask it again before it would agree."""
        told = prune_msg.backoff or self.prune_back_off
        prune_msg.backoff = min(told, _MAX_BACK_OFF_SECONDS) + _SLACK_SECONDS
        await super().handle_prune(prune_msg, sender_peer_id)

    def send_rpc(self, peer_id: Any, rpc: Any, priority: bool = False) -> None:
        """Queue an RPC, without a record of this peer's addresses."""
        rpc.ClearField("senderRecord")
        super().send_rpc(peer_id, rpc, priority)

    def _select_peers_for_pruning(self, topic: str, num_to_prune: int) -> list[Any]:
        # down to the upper degree only: a newcomer has let the mesh grow, and is not to be the one that goes
        return super()._select_peers_for_pruning(topic, min(num_to_prune, len(self.mesh[topic]) - self.degree_high))

    def _get_peers_to_send(
        self, topic_ids: Iterable[str], msg_forwarder: Any, origin: Any, msg_id: bytes | None = None
    ) -> Iterable[Any]:
        topics = tuple(topic_ids)
        chosen = set(super()._get_peers_to_send(topics, msg_forwarder, origin, msg_id))
        pubsub: Any = self.pubsub
        for topic in topics if msg_forwarder == pubsub.my_id else ():
            lacking = self.degree - len(self.mesh.get(topic, ()))
            if topic in pubsub.peer_topics and lacking > self.degree - self.degree_low:
                chosen.update(self._get_in_topic_gossipsub_peers_from_minus(topic, lacking, {*chosen, pubsub.my_id}))
        return chosen

    async def _emit_control_msgs(
        self,
        peers_to_graft: Mapping[Any, Sequence[str]],
        peers_to_prune: Mapping[Any, Sequence[str]],
        peers_to_gossip: Mapping[Any, Mapping[str, Sequence[Any]]],
    ) -> None:
        # the stock method tells each peer also what it has told those before it
        for peer in dict.fromkeys((*peers_to_graft, *peers_to_prune, *peers_to_gossip)):
            control = rpc_pb2.ControlMessage()
            for topic in peers_to_graft.get(peer, ()):
                control.graft.add(topicID=topic)
            for topic in peers_to_prune.get(peer, ()):
                control.prune.add(topicID=topic, backoff=self.prune_back_off)
            for topic, ids in peers_to_gossip.get(peer, {}).items():
                control.ihave.add(topicID=topic, messageIDs=ids)
            await self.emit_control_message(control, peer)

    def _check_equivocation(self, msg: Any) -> bool:
        # Else whoever forges the origin and number of a message first would silence the true one.
        return True


def make_router() -> Router:
    """Return the router that every topic of a peer shares."""
    return Router(
        protocols=[PROTOCOL_ID_V11],
        degree=3,
        degree_low=2,
        degree_high=4,
        heartbeat_initial_delay=0.1,
        heartbeat_interval=1,
        prune_back_off=5,
        unsubscribe_back_off=5,
        adaptive_gossip_enabled=False,
        spam_protection_enabled=False,
        eclipse_protection_enabled=False,
        max_pending_messages_per_peer=256,
    )
