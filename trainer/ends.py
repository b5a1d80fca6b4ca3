"""The client's two ends of a private run: the first and the last stage as workers in the client's own process.

`Ends` stands between the coordinator and the network. Both ends have names of their own there, and are one peer,
the client, for everybody else. Only what is listed in `_OUTWARD` ever leaves: no tokens, no labels, no gradient of
the tied tensor.
"""

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

import msgspec
import trio

from trainer.coordinator_ports import Governor, Members
from trainer.families.base import Costs
from trainer.manifest import ManifestError, ManifestReason, TaskManifest, balanced_cuts, complete
from trainer.messages import (
    Activation,
    Apply,
    Commit,
    Finish,
    Gradient,
    Message,
    OpenStep,
    Prepare,
    Probe,
    Reduce,
    Relay,
    Repeat,
    Reroute,
)
from trainer.payloads import TensorPayload
from trainer.state import StageState, initial_state
from trainer.transport import Received, Transport
from trainer.worker import Worker
from trainer.worker_ports import StateUnavailable, WorkerConfig, WorkerPorts

_OUTWARD = (
    Prepare | OpenStep | Reroute | Reduce | Repeat | Apply | Commit | Finish  # of the coordinator
    | Activation | Gradient | Relay  # of the ends
)  # fmt: skip
_Place: TypeAlias = tuple[int, int, int]
FetchState: TypeAlias = Callable[[bytes, tuple[str, ...]], Awaitable[StageState]]


def end_names(client: str) -> tuple[str, str]:
    """Return the names of the client's first and last stage."""
    return f"{client}:first", f"{client}:last"


def with_ends(members: Members, client: str) -> Members:
    """Return the members of a run whose first and last stage the client holds."""
    first, last = end_names(client)
    return replace(members, stages=((first,), *members.stages, (last,)))


class EndsGovernor:
    """A governor whose members have the client's ends around the stages that the chain gives seats for.

    Raises `StateUnavailable` for a rollback to a step after which the ends are not held any more: nobody else
    could give them.
    """

    def __init__(self, inner: Governor, ends: "Ends") -> None:
        self._inner = inner
        self._ends = ends
        self._generation: int | None = None

    def current(self) -> Members:
        """Return the members as known now."""
        return self._checked(self._inner.current())

    async def admit(self, step: int) -> Members:
        """Return the members once the ring has room for `step`, or the generation has changed."""
        return self._checked(await self._inner.admit(step))

    async def settled(self, step: int) -> Members:
        """Return the members once `step` has settled, or the generation has changed."""
        return self._checked(await self._inner.settled(step))

    def _checked(self, members: Members) -> Members:
        is_rollback = self._generation not in (None, members.generation)
        if is_rollback and not self._ends.has(members.resume_step):
            raise StateUnavailable(f"the client does not hold its ends after step {members.resume_step} any more")
        self._generation = members.generation
        return with_ends(members, self._ends.client)


class _Link:
    """One local member's `Transport`: the coordinator's, or that of an end."""

    def __init__(self, peer: str, ends: "Ends") -> None:
        self.peer = peer
        self.put, self._inbox = trio.open_memory_channel[Received](math.inf)
        self._ends = ends

    async def send(self, to: str, message: Message) -> None:
        """Deliver a message within the client, or to a worker; raise `PeerLost` when the link is gone."""
        await self._ends.carry(self.peer, to, message)

    async def receive(self) -> Received:
        """Return the next message or loss."""
        return await self._inbox.receive()


class Ends:
    """The first and the last stage, held by the client behind its `network` transport. Must be run.

    `transport` is the coordinator's. `seats` are those of the first and the last stage, `ports` how they compute.
    """

    def __init__(self, seats: Sequence[WorkerConfig], network: Transport, ports: WorkerPorts) -> None:
        self.client = network.peer
        self.names = end_names(network.peer)
        self._network = network
        self._links = {name: _Link(name, self) for name in (network.peer, *self.names)}
        self._labels: dict[_Place, TensorPayload] = {}
        self.workers = {
            name: Worker(seat, self._links[name], ports) for name, seat in zip(self.names, seats, strict=True)
        }

    @property
    def transport(self) -> Transport:
        """The coordinator's links to the ends and to the network."""
        return self._links[self._network.peer]

    async def run(self) -> None:
        """Serve the coordinator until it says `Finish`, and take what comes from the network until cancelled."""
        async with trio.open_nursery() as nursery:
            for worker in self.workers.values():
                nursery.start_soon(worker.run)
            while True:
                self._take(await self._network.receive())

    def forget(self, step: int) -> None:
        """Drop the ends' states before `step`, which has settled."""
        for worker in self.workers.values():
            worker.forget(step)

    def has(self, step: int) -> bool:
        """Whether both ends can go back to the state after `step`."""
        return all(step in {state.step for state in worker.states} for worker in self.workers.values())

    def fetching(self, fetch: FetchState) -> FetchState:
        """Return a way to fetch states that asks the ends for theirs, and `fetch` for all others."""

        async def fetch_any(root: bytes, holders: tuple[str, ...]) -> StageState:
            states = (state for worker in self.workers.values() for state in worker.states)
            if set(holders) & set(self.names):
                found = next((state for state in states if state.root == root), None)
                if found is not None:
                    return found
            return await fetch(root, holders)

        return fetch_any

    async def carry(self, sender: str, to: str, message: Message) -> None:
        """Deliver a message of a local member; raise `PeerLost` when the link is gone.

        Raises `ValueError` for one that must not leave the client.
        """
        link = self._links.get(to)
        if link is None:
            await self._network.send(to, self._outward(message))
            return
        if isinstance(message, Probe):
            self._labels = {place: kept for place, kept in self._labels.items() if place[:2] == _place(message)[:2]}
            self._labels[_place(message)] = message.payload[1]
        link.put.send_nowait(Received(sender, message))
        await trio.lowlevel.checkpoint()

    def _take(self, received: Received) -> None:
        """Give what comes from the network to the end that it is for, or to the coordinator."""
        message, link = received.message, self._links[self._network.peer]
        match message:
            case Activation():
                link = self._links[self.names[1]]
            case Gradient():
                link = self._links[self.names[0]]
            case Relay() if (labels := self._labels.get(_place(message))) is not None:
                route = (self.names[0], *message.route[1:-1], self.names[1])
                message = msgspec.structs.replace(message, route=route, payload=(message.payload[0], labels))
                link = self._links[self.names[1]]
            case _:
                pass
        link.put.send_nowait(msgspec.structs.replace(received, message=message))

    def _outward(self, message: Message) -> Message:
        """Return a message as it leaves: the ends are the client there, and labels are blank."""
        if not isinstance(message, _OUTWARD):
            raise ValueError(f"{type(message).__name__} must not leave the client of a private run")
        match message:
            case OpenStep():
                return msgspec.structs.replace(message, routes=tuple(map(self._public, message.routes)))
            case Reroute():
                return msgspec.structs.replace(message, peer=self._public((message.peer,))[0])
            case Relay():
                blank = message.payload[1]
                blank = msgspec.structs.replace(blank, data=memoryview(bytes(len(blank.data))))
                route = self._public(message.route)
                return msgspec.structs.replace(message, route=route, payload=(message.payload[0], blank))
            case _:
                return message

    def _public(self, peers: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(self._network.peer if peer in self.names else peer for peer in peers)


def _place(message: Probe | Relay) -> _Place:
    return message.generation, message.step, message.cell


def keeping(manifest: TaskManifest, kept: int) -> TaskManifest:
    """Return a private run's manifest whose client holds `kept` decoder layers at each end; raise `ManifestError`."""
    stages, left = len(manifest.seated), manifest.layers - 2 * kept
    if kept < 0 or left < stages:
        raise ManifestError(
            ManifestReason.NOT_PRIVATE,
            f"A model of {manifest.layers} layers cannot leave {stages} stages a layer each if the client keeps"
            f" {kept} at both ends.",
            "Keep fewer with --private-layers, or use fewer stages.",
        )
    cuts = (kept, *balanced_cuts(left, stages, Costs(1, 0, 0)), kept)
    return complete(msgspec.structs.replace(manifest, cuts=cuts))


def drawn_ends(manifest: TaskManifest, seed: int) -> tuple[StageState, ...]:
    """Return the ends' states before step 1, drawn from a seed of their own: the manifest's is known to everybody."""
    own = msgspec.structs.replace(manifest, seed=seed)
    return initial_state(own, 0), initial_state(own, manifest.stages - 1)
