"""Whether a worker handed its neighbours what it claims: the inputs that these hold, signed by it, tell.

A claim names what a worker computed, its signature on a message what it sent. Who sends another result than it claims
would pass every re-execution. What is found counts like a claimed tensor that nobody gets (`missing`), not as fraud: a
client may begin a step again, and an honest worker then sends a second output, which differs by rounding where its own
input came from another machine.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import trio

from chain.verdicts import Limits
from tdml_p2p.swarm.asking import PATIENCE_SECONDS
from tdml_p2p.swarm.inputs import Descriptor, Input, InputsRefused, Senders, checked, decode_descriptor, encode
from tdml_p2p.swarm.material import Buffer, Fetch, Unavailable
from trainer.content import address_of
from trainer.payloads import Dtype, TensorPayload, pack, unpack

if TYPE_CHECKING:
    from torch import Tensor

    from tdml_p2p.swarm.reexecution import Ask, Cell
    from trainer.stage import CellResult


class _Side(NamedTuple):
    """A result that goes to a stage beside: which input it is there, and who may hold it."""

    result: str
    given_as: str
    stage: int
    peers: frozenset[str]


def _sides(cell: "Cell") -> Iterator[_Side]:
    place, senders = cell.wanted.stage, cell.senders
    if place < cell.manifest.stages - 1:
        yield _Side("y", "x", place + 1, senders.gy)
    if place > 0:
        yield _Side("gx", "gy", place - 1, senders.x)


@dataclass(frozen=True, slots=True)
class Handed:
    """Looks at what neighbours were sent: `ask` and `fetch` reach them, `limits` say what is gross."""

    ask: "Ask"
    fetch: Fetch
    limits: Limits

    async def is_other(self, cell: "Cell", worker: str, result: "CellResult", until: float) -> bool:
        """Whether a neighbour holds, signed by `worker`, a grossly other result of `cell` than the claimed `result`.

        Neighbours that are silent, or that have another sender's message of this cell, say nothing of this worker.
        What they were sent is fetched only if it is something else, and may come until a time.
        """
        found = False
        with trio.move_on_at(until):
            async with trio.open_nursery() as nursery:

                async def one(side: _Side, peer: str) -> None:
                    nonlocal found
                    with suppress(Unavailable, InputsRefused):
                        if await self._has_other(cell, worker, side, peer, getattr(result, side.result)):
                            found = True
                            nursery.cancel_scope.cancel()

                for side in _sides(cell):
                    for peer in side.peers:
                        nursery.start_soon(one, side, peer)
        return found

    async def _has_other(self, cell: "Cell", worker: str, side: _Side, peer: str, claimed: "Tensor") -> bool:
        """Whether one neighbour has another result; raise `Unavailable`, `InputsRefused`."""
        given: Input | None = None
        with trio.move_on_after(PATIENCE_SECONDS):
            given = await self._given(cell, worker, side, peer)
        wire = cell.manifest.wire
        if given is None or await trio.to_thread.run_sync(_address, claimed, wire) == given.address:
            return False
        data = await self.fetch(given.address, (peer, worker))
        limit = self.limits.fraud_factor * self.limits.tau[0 if side.result == "y" else 1]
        return await trio.to_thread.run_sync(is_gross, data, claimed, wire, limit)

    async def _given(self, cell: "Cell", worker: str, side: _Side, peer: str) -> Input | None:
        wanted = msgspec.structs.replace(cell.wanted, stage=side.stage)
        told = decode_descriptor(await self.ask(peer, encode(wanted)))
        part = Descriptor(told.x, None) if side.given_as == "x" else Descriptor(None, told.gy)
        only = frozenset([worker])
        return getattr(checked(wanted, part, cell.manifest, Senders(only, only)), side.given_as)


def _address(claimed: "Tensor", wire: Dtype) -> bytes:
    return address_of(pack(claimed, wire)[0].data)


def is_gross(data: Buffer, claimed: "Tensor", wire: Dtype, limit: float) -> bool:
    """Whether the bytes that a neighbour was sent are, beyond `limit` and the encoding's loss, not of `claimed`."""
    from trainer.compare import by_token, deviation

    payload = TensorPayload(wire, tuple(claimed.shape), memoryview(bytes(data)))
    if payload.nbytes != len(data):
        return True
    own = by_token(claimed)
    loss = deviation(by_token(unpack(pack(claimed, wire))), own)
    return deviation(by_token(unpack((payload,))), own) > limit + 2 * loss
